//! Overlays on real kernel mounts, over plain directories. They need root; without, each says so and passes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use understory::mount::{OverlayLayers, OverlayMount, mountinfo};

struct Dirs {
    dir: tempfile::TempDir,
    layers: OverlayLayers,
    merged: PathBuf,
}

impl Dirs {
    fn new(odd: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            understory_testkit::skip("real mounts need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(format!("{name}{odd}"));
            std::fs::create_dir(&path).unwrap();
            path
        };
        let layers = OverlayLayers {
            lowers: vec![make("l1"), make("l2")],
            upper: make("u"),
            work: make("w"),
        };
        let merged = make("m");
        Some(Self {
            dir,
            layers,
            merged,
        })
    }
    fn mount(&self) -> Mounted {
        Mounted(OverlayMount::mount(&self.layers, &self.merged, false).unwrap())
    }
}

/// Unmounts also when a test fails.
struct Mounted(OverlayMount);

impl Drop for Mounted {
    fn drop(&mut self) {
        self.0.unmount().unwrap();
    }
}

#[test]
fn paths_with_separators_and_spaces() {
    for odd in ["", ":", ",x=y", "\\", "\\,", " \t\n", "#é", "'\"", ":\\:,,"] {
        let Some(d) = Dirs::new(odd) else { return };
        for (number, lower) in d.layers.lowers.iter().enumerate() {
            std::fs::write(lower.join("both"), format!("{number}")).unwrap();
            std::fs::write(lower.join(format!("only{number}")), b"").unwrap();
        }
        let m = d.mount();
        assert_eq!(
            std::fs::read(d.merged.join("both")).unwrap(),
            b"0",
            "{odd:?}: the first lower is uppermost"
        );
        assert!(d.merged.join("only1").exists(), "{odd:?}");
        std::fs::write(d.merged.join("new"), b"x").unwrap();
        assert!(d.layers.upper.join("new").exists(), "{odd:?}");
        let entry = m.0.entry().unwrap().unwrap();
        assert_eq!(entry.mount_point, d.merged);
        assert_eq!(entry.overlay_lower_dirs(), d.layers.lowers, "{odd:?}");
        for off in ["index", "metacopy", "redirect_dir"] {
            // The kernel leaves out what is its default.
            assert!(entry.super_option(off).is_none_or(|v| v == "off"), "{off}");
        }
        let found = OverlayMount::find(&d.merged).unwrap().unwrap();
        assert_eq!(found.lowers(), d.layers.lowers);
        m.0.remount().unwrap();
        assert_eq!(std::fs::read(d.merged.join("new")).unwrap(), b"x");
        m.0.unmount().unwrap();
        m.0.unmount().unwrap();
        assert!(OverlayMount::find(&d.merged).unwrap().is_none());
        let error = m.0.remount().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("no overlay is mounted on {}", d.merged.display())
        );
    }
}

#[test]
fn a_name_looked_up_too_early_is_hidden_until_the_remount() {
    let Some(d) = Dirs::new("") else { return };
    let m = d.mount();
    let name = OsStr::new("late");
    assert!(!d.merged.join(name).exists());
    assert!(!m.0.is_hidden(name).unwrap(), "nowhere is not hidden");
    std::fs::write(d.layers.lowers[1].join(name), b"x").unwrap();
    assert!(m.0.is_hidden(name).unwrap());
    let held = std::fs::File::open(&d.merged).unwrap();
    m.0.remount().unwrap();
    assert!(!m.0.is_hidden(name).unwrap());
    assert_eq!(std::fs::read(d.merged.join(name)).unwrap(), b"x");
    drop(held);
}

#[test]
fn an_overlay_in_use_is_detached() {
    let Some(d) = Dirs::new("") else { return };
    std::fs::write(d.layers.lowers[0].join("f"), b"x").unwrap();
    let m = d.mount();
    let held = std::fs::File::open(d.merged.join("f")).unwrap();
    m.0.unmount().unwrap();
    assert!(!d.merged.join("f").exists());
    assert!(mountinfo::mount_at(&d.merged).unwrap().is_none());
    drop(held);
}

#[test]
fn refusals_say_what_to_do() {
    let Some(mut d) = Dirs::new("") else { return };
    let good = d.layers.clone();
    let refusal =
        |layers: &OverlayLayers| OverlayMount::mount(layers, &d.merged, false).unwrap_err();

    let error = refusal(&OverlayLayers {
        lowers: vec![],
        ..good.clone()
    });
    assert_eq!(error.to_string(), "an overlay needs a lower directory");
    let absent = d.dir.path().join("absent");
    let error = refusal(&OverlayLayers {
        lowers: vec![absent.clone()],
        ..good.clone()
    });
    assert_eq!(
        error.chain(),
        format!(
            "examining {}: No such file or directory (os error 2)",
            absent.display()
        )
    );

    let other = Path::new("/dev/shm");
    if rustix::fs::stat(other).map(|s| s.st_dev).ok()
        != rustix::fs::stat(&good.upper).map(|s| s.st_dev).ok()
    {
        let error = refusal(&OverlayLayers {
            work: other.into(),
            ..good.clone()
        });
        let hint = error.hint().unwrap();
        assert!(
            hint.contains("must be on the same file system as the upper one"),
            "{hint}"
        );
    }
    let inside = good.upper.join("w");
    std::fs::create_dir(&inside).unwrap();
    let error = refusal(&OverlayLayers {
        work: inside,
        ..good.clone()
    });
    assert!(
        error.hint().unwrap().contains("beside each other"),
        "{:?}",
        error.hint()
    );

    // An upper on an overlay.
    let m = d.mount();
    let (upper, work) = (d.merged.join("u2"), d.merged.join("w2"));
    let merged = d.dir.path().join("m2");
    for dir in [&upper, &work, &merged] {
        std::fs::create_dir(dir).unwrap();
    }
    d.layers = OverlayLayers {
        upper: upper.clone(),
        work,
        ..good
    };
    let error = OverlayMount::mount(&d.layers, &merged, false).unwrap_err();
    assert_eq!(
        error.hint().unwrap(),
        format!(
            "the upper directory {} lies on another overlay, which overlayfs does not take: use ext4, xfs, btrfs or tmpfs",
            upper.display()
        )
    );
    drop(m);
}
