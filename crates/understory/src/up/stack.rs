//! What an instance's overlay store is made of: the lowers, the places, the Nix that builds.

use crate::builder::{Builder, NixBuilder};
use crate::config::Layout;
use crate::generation::stack::Places;
use crate::local::LocalPaths;
use crate::mount::OverlayMount;
use crate::overlay::lower::{self, CastoreLower};
use crate::overlay::{self, Lower, Overlay, Remount};
use crate::overlay_url::{BuilderUrl, OverlayUrl};
use crate::settings::Resolved;
use crate::{Error, Result, Store, namespace};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_nix::StoreDir;

/// The stores below an instance's overlay: the castore, then those of the settings.
pub(super) struct Lowers {
    all: Vec<Arc<dyn Lower>>,
}

impl Lowers {
    /// `at` is where the castore is mounted; `image` are the lower directories if the overlay stands on an image.
    pub(super) fn open(
        store: &Store,
        at: &Path,
        image: Option<[PathBuf; 2]>,
        settings: &Resolved,
    ) -> Result<Self> {
        let mut castore = CastoreLower::new(store.clone(), at);
        if let Some(layers) = image {
            castore = castore.over(layers.to_vec());
        }
        let mut all: Vec<Arc<dyn Lower>> = vec![Arc::new(castore)];
        for url in &settings.settings.lowers {
            all.push(lower::open(url, store.store_dir())?);
        }
        Ok(Self { all })
    }
    /// Lower directories of the overlayfs, uppermost first.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        self.all.iter().flat_map(|l| l.layers()).collect()
    }
    /// Those of them that are not the castore's.
    pub(super) fn others(&self) -> Vec<PathBuf> {
        self.all.iter().skip(1).flat_map(|l| l.layers()).collect()
    }
    /// What they are, for people.
    pub(super) fn describe(&self) -> Vec<String> {
        self.all.iter().map(|l| l.describe()).collect()
    }
    /// True if the overlayfs has more than one lower directory.
    pub(super) fn are_several(&self) -> bool {
        self.directories().len() > 1
    }
}

/// The lower directories of the castore's part of the overlay if it stands on an image: of the overlay that is mounted,
/// or of the one that is about to be.
pub(super) fn image(layout: &Layout) -> Result<Option<[PathBuf; 2]>> {
    let places = Places::of(layout);
    let upper =
        fs::canonicalize(&layout.upper).map_err(|e| Error::io("resolving", &layout.upper, e))?;
    let number = match OverlayMount::stacked(&layout.merged, &upper)?.last() {
        Some(overlay) => places.number_of(&overlay.overlay_lower_dirs()),
        None => places.mounted()?,
    };
    Ok(number.map(|number| places.set(number).lowers()))
}

/// Opens the overlay store; its overlayfs is mounted.
pub(super) fn open(
    layout: &Layout,
    url: &OverlayUrl,
    lowers: Lowers,
    settings: &Resolved,
) -> Result<Overlay> {
    Overlay::open(overlay::Options {
        local: local_paths(layout, &url.store_dir),
        upper: layout.upper.clone(),
        lowers: lowers.all,
        check_mount: true,
        remount: Remount::Ours,
        settings: settings.settings.clone(),
        builder: Arc::new(builder(layout, url, settings)),
    })
}

/// Where an instance's overlay store keeps what.
pub(super) fn local_paths(layout: &Layout, store_dir: &StoreDir) -> LocalPaths {
    LocalPaths {
        store_dir: store_dir.clone(),
        real: layout.merged.clone(),
        state: layout.nix_state.clone(),
        log: layout.nix_log.clone(),
    }
}

fn builder(layout: &Layout, url: &OverlayUrl, settings: &Resolved) -> NixBuilder {
    let url = BuilderUrl {
        local: &local_paths(layout, &url.store_dir),
        upper: &layout.upper,
        lower: &url.lower(),
        remount_hook: None,
    };
    NixBuilder {
        program: settings.settings.nix.clone(),
        store_url: url.to_string(),
        options: builder_options(settings),
    }
}

/// What would build for an instance; `Err` says why nothing can.
///
/// # Errors
/// No usable Nix, with a hint; a path that cannot stand in a URL.
pub fn describe_builder(layout: &Layout, settings: &Resolved) -> Result<String> {
    let url = OverlayUrl::of(layout, &StoreDir::default())?;
    builder(layout, &url, settings).describe()
}

/// What the Nix that builds must be told: our settings where they are not its own, and what it cannot do here.
pub fn builder_options(settings: &Resolved) -> Vec<(String, String)> {
    let mut out = settings.for_nix();
    let group = &settings.settings.build_users_group;
    // In a user namespace nobody may change groups; and a group that is built in but that the machine lacks is an error.
    let is_default = settings
        .value("build-users-group")
        .is_none_or(|value| value.origins.is_empty());
    if namespace::in_user_namespace() || is_default && !has_group(group) {
        out.retain(|(name, _)| name != "build-users-group");
        out.push(("build-users-group".into(), String::new()));
    }
    if namespace::in_user_namespace() {
        out.push(("require-drop-supplementary-groups".into(), "false".into()));
    }
    out
}

fn has_group(name: &str) -> bool {
    let line = |line: &str| line.split(':').next() == Some(name);
    match fs::read_to_string("/etc/group") {
        Ok(text) => text.lines().any(line),
        // Groups may come from elsewhere: Nix will say.
        Err(_) => true,
    }
}
