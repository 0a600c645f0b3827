//! An overlay of a test: its directories, its mount, how its store is opened.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory::builder::NoBuilder;
use understory::daemon::ClientInfo;
use understory::local::LocalPaths;
use understory::mount::{OverlayLayers, OverlayMount};
use understory::overlay::{Lower, Options, Remount};
use understory::settings::Settings;
use understory_nix::{StoreDir, StorePath};

pub(crate) const CLIENT: ClientInfo = ClientInfo {
    trusted: true,
    uid: None,
    pid: None,
};

/// A directory for all of it; without root `None`, and a word why.
pub(crate) fn root_dir() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("real mounts need root");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

/// Mounts an overlay in `dir` over directories that there are.
pub(crate) fn mount(dir: &Path, lowers: Vec<PathBuf>) -> OverlayMount {
    let make = |name: &str| {
        let path = dir.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let layers = OverlayLayers {
        lowers,
        upper: make("upper"),
        work: make("work"),
    };
    OverlayMount::mount(&layers, &make("root/nix/store"), false).unwrap()
}

/// How the store of the overlay in `dir` is opened.
pub(crate) fn options(dir: &Path, lowers: Vec<Arc<dyn Lower>>, settings: Settings) -> Options {
    Options {
        local: LocalPaths::at_root(&dir.join("root"), StoreDir::default()),
        upper: dir.join("upper"),
        lowers,
        check_mount: true,
        remount: Remount::Ours,
        settings,
        builder: Arc::new(NoBuilder {
            reason: "a test".into(),
        }),
    }
}

/// Where the overlay in `dir` shows a path.
pub(crate) fn merged(dir: &Path, path: &StorePath) -> PathBuf {
    dir.join("root/nix/store").join(path.base_name())
}

/// What is in the upper directory, without what is always there.
pub(crate) fn upper_names(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir.join("upper"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".links")
        .collect()
}
