//! How an overlay store is opened: names, mounts, remounts, lowers that changed.

use super::common::archive;
use super::common::overlay::root_dir;
use super::support::{Plain, UNSIGNED, World, add, add_text};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use understory::mount::{OverlayLayers, OverlayMount};
use understory::overlay::{Options, Overlay};
use understory::store::GcAction;
use understory_nix::StoreDir;

#[test]
fn row_13_the_mount_is_known_by_device_and_inode() {
    let Some(dir) = root_dir() else { return };
    // A space, what is special in regular expressions, a symlinked upper, a second lower, an odd source.
    let at = |name: &str| dir.path().join(name);
    let plain = Arc::new(Plain::new(&at("lower a.b+c")));
    let second = Arc::new(Plain::new(&at("second")));
    for name in ["upper,really", "work", "root/nix/store", "other"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    std::os::unix::fs::symlink(at("upper,really"), at("upper")).unwrap();
    let layers = OverlayLayers {
        lowers: vec![second.dir.clone(), plain.dir.clone()],
        upper: at("upper"),
        work: at("work"),
    };
    let mut w = World {
        overlay: None,
        merged: Some(OverlayMount::mount(&layers, &at("root/nix/store"), false).unwrap()),
        live: None,
        castore: None,
        lowers: vec![plain.clone()],
        dir,
    };
    w.open().unwrap();
    w.lowers = vec![second.clone(), plain.clone()];
    w.open().unwrap();
    let real = w.dir.path().join("root/nix/store");
    let start = format!(
        "overlay filesystem \"{}\" mounted incorrectly: ",
        real.display()
    );
    let said = |options: Options| {
        let error = Overlay::open(options).map(drop).unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        let text = error.to_string();
        let rest = text.strip_prefix(&start);
        rest.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    let mut options = w.options();
    options.upper = w.dir.path().join("other");
    assert!(said(options).starts_with("expected "));
    let mut options = w.options();
    options.lowers = vec![Arc::new(Plain::new(&w.dir.path().join("elsewhere")))];
    let text = said(options);
    assert!(
        text.contains("elsewhere of plain as a lower directory, found "),
        "{text}"
    );
    let merged = w.merged.take().unwrap();
    merged.unmount().unwrap();
    assert_eq!(said(w.options()), "nothing is mounted there");
    let mut options = w.options();
    options.check_mount = false;
    Overlay::open(options).map(drop).unwrap();
}

#[test]
fn row_14_a_remount_that_is_due_is_made_up_for_at_the_next_open() {
    let Some((mut w, lowers)) = World::plain(1) else {
        return;
    };
    let path = archive("both", "text", &[]);
    add(&*w.client(), &path, UNSIGNED).unwrap();
    lowers[0].add(&path);
    w.overlay = None;
    let file = w.merged(&path.0.path).join("file");
    assert!(std::fs::read(&file).is_ok());
    // As a deletion does that is killed before its remount.
    std::fs::write(
        w.dir
            .path()
            .join("root/nix/var/nix/understory-remount-is-due"),
        b"",
    )
    .unwrap();
    std::fs::remove_dir_all(w.upper(&path.0.path)).unwrap();
    w.open().unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"text");
    assert!(
        !w.dir
            .path()
            .join("root/nix/var/nix/understory-remount-is-due")
            .exists()
    );
}

#[test]
fn rows_19_and_20_an_upper_and_a_lower_must_be_named() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let mut options = w.options();
    options.upper = PathBuf::new();
    let error = Overlay::open(options).map(drop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the overlay store has no upper directory"
    );
    let mut options = w.options();
    options.lowers.clear();
    let error = Overlay::open(options).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "an overlay store needs a lower store");
    let mut options = w.options();
    options.local.store_dir = StoreDir::new("/other/store").unwrap();
    let error = Overlay::open(options).map(drop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the lower store plain has the store directory /nix/store, expected /other/store as the overlay store has"
    );
}

#[test]
fn row_22_a_lower_that_lost_paths_or_went_back() {
    let Some((mut w, lowers)) = World::plain(1) else {
        return;
    };
    let path = archive("relied-upon", "text", &[]);
    lowers[0].add(&path);
    add_text(&*w.client(), "above", "text", &[&path.0.path]).unwrap();
    w.open().unwrap();
    lowers[0].infos.lock().unwrap().clear();
    lowers[0].generation.store(1, Ordering::Relaxed);
    let error = w.open().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the lower store plain went back to an older state: expected generation 2 or later, found 1; \
             lower store lost a path that the overlay store relies on: '/nix/store/{}'",
            path.0.path
        )
    );
    assert!(
        error.hint().unwrap().contains("accept-lower-loss"),
        "{error:?}"
    );
    let accept = w
        .dir
        .path()
        .join("root/nix/var/nix/understory/accept-lower-loss");
    std::fs::write(&accept, b"").unwrap();
    w.open().unwrap();
    assert!(!accept.exists());
    w.overlay = None;
    // Back again, and grown.
    lowers[0]
        .infos
        .lock()
        .unwrap()
        .insert(path.0.path.clone(), path.0.clone());
    lowers[0].generation.store(9, Ordering::Relaxed);
    w.open().unwrap();
}

#[test]
fn a_collection_of_the_castore_keeps_what_an_overlay_needs_while_it_is_down() {
    let Some(mut w) = World::castore() else {
        return;
    };
    let leaf = w.below("leaf", "leaf", &[]);
    let middle = w.below("middle", "middle", &[&leaf]);
    let rooted = w.below("rooted", "rooted", &[]);
    let garbage = w.below("garbage", "garbage", &[]);
    let above = add_text(&*w.client(), "above", "of middle", &[&middle]).unwrap();
    let state = w.dir.path().join("root/nix/var/nix");
    let target = StoreDir::default().print(&rooted);
    std::os::unix::fs::symlink(target, state.join("gcroots/rooted")).unwrap();
    w.overlay = None;

    let all = GcAction::DeleteDead {
        freed_bytes_max: u64::MAX,
    };
    let report = w.store().collect(&all).unwrap();
    assert_eq!(report.paths, BTreeSet::from([garbage]));
    w.open().unwrap();
    assert!(w.client().is_valid(&above.path).unwrap());
    w.overlay = None;

    // A database that cannot be read stops a collection; a state directory that is gone needs nothing.
    let (database, aside) = (state.join("db/db.sqlite"), state.join("db/aside"));
    std::fs::rename(&database, &aside).unwrap();
    let error = w.store().collect(&all).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "what the overlay store at {} needs cannot be told, so nothing is deleted",
            state.display()
        )
    );
    std::fs::remove_dir_all(&state).unwrap();
    let report = w.store().collect(&all).unwrap();
    assert_eq!(report.paths, BTreeSet::from([leaf, middle, rooted]));
}
