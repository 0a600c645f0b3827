//! The live file system as the lower of an overlay.

use super::*;
use crate::mount::{OverlayLayers, OverlayMount};

struct Overlaid {
    overlay: OverlayMount,
    _dirs: TempDir,
    below: Fixture,
}

impl Overlaid {
    fn new() -> Option<Self> {
        let below = Fixture::new()?;
        let dirs = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let path = dirs.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let layers = OverlayLayers {
            lowers: vec![below.dir.path().into()],
            upper: dir("upper"),
            work: dir("work"),
        };
        let overlay = OverlayMount::mount(&layers, &dir("merged"), false).unwrap();
        Some(Self {
            overlay,
            _dirs: dirs,
            below,
        })
    }
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.overlay.merged().join(name)
    }
}

impl Drop for Overlaid {
    fn drop(&mut self) {
        self.overlay.unmount().unwrap();
    }
}

#[test]
fn what_was_looked_up_too_early_shows_after_a_remount() {
    let Some(o) = Overlaid::new() else { return };
    let m = &o.below.memory;
    m.publish(&name(1), m.directory(vec![(b"x", m.file(b"1", false))]));
    assert_eq!(std::fs::read(o.path(&name(1)).join("x")).unwrap(), b"1");
    for number in 2..6 {
        assert!(!o.path(&name(number)).exists());
        m.publish(&name(number), m.file(b"late", false));
        o.below.mount.announce(&[]);
        assert!(o.overlay.is_hidden(OsStr::new(&name(number))).unwrap());
        o.overlay.remount().unwrap();
        assert!(!o.overlay.is_hidden(OsStr::new(&name(number))).unwrap());
        assert_eq!(std::fs::read(o.path(&name(number))).unwrap(), b"late");
        let listed: Vec<_> = std::fs::read_dir(o.overlay.merged())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(listed.len() as u64, number);
    }
    // One that nobody asked for shows by itself.
    m.publish(&name(9), m.file(b"new", false));
    assert_eq!(std::fs::read(o.path(&name(9))).unwrap(), b"new");
}

#[test]
fn replacing_and_deleting_leaves_equal_files_alone() {
    let Some(o) = Overlaid::new() else { return };
    let m = &o.below.memory;
    m.publish(
        &name(1),
        m.directory(vec![
            (b"a", m.file(b"twin", false)),
            (b"b", m.file(b"twin", false)),
            (b"c", m.file(b"twin", false)),
        ]),
    );
    let p = o.path(&name(1));
    for file in ["a", "b", "c"] {
        assert_eq!(std::fs::read(p.join(file)).unwrap(), b"twin");
    }
    std::fs::remove_file(p.join("a")).unwrap();
    std::fs::write(p.join(".new"), b"other").unwrap();
    std::fs::rename(p.join(".new"), p.join("b")).unwrap();
    assert!(!p.join("a").exists());
    assert_eq!(std::fs::read(p.join("b")).unwrap(), b"other");
    assert_eq!(std::fs::read(p.join("c")).unwrap(), b"twin");
    std::fs::remove_dir_all(&p).unwrap();
    assert!(!p.exists());
    assert_eq!(
        std::fs::read(o.below.path(name(1)).join("c")).unwrap(),
        b"twin"
    );
}

#[test]
fn writing_into_a_file_of_the_lower_shows_in_its_twins_until_mounted_anew() {
    let Some(o) = Overlaid::new() else { return };
    let m = &o.below.memory;
    m.publish(
        &name(1),
        m.directory(vec![
            (b"a", m.file(b"twin", false)),
            (b"b", m.file(b"twin", false)),
        ]),
    );
    let p = o.path(&name(1));
    assert_eq!(std::fs::read(p.join("b")).unwrap(), b"twin");
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(p.join("a"))
        .unwrap();
    std::io::Write::write_all(&mut file, b"!").unwrap();
    drop(file);
    assert_eq!(std::fs::read(p.join("a")).unwrap(), b"twin!");
    // The known price of sharing page cache between equal files; the lower itself is as it was.
    assert_eq!(std::fs::read(p.join("b")).unwrap(), b"twin!");
    assert_eq!(
        std::fs::read(o.below.path(name(1)).join("a")).unwrap(),
        b"twin"
    );
    eventually("the overlay forgets", || {
        o.overlay.remount().unwrap();
        drop_caches();
        std::fs::read(p.join("b")).unwrap() == b"twin"
    });
    assert_eq!(std::fs::read(p.join("a")).unwrap(), b"twin!");
}
