//! Equal files: copies of the lower's, and hard links in the upper directory.

use super::common::archive;
use super::support::{Heard, Object, World, read};
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use understory::daemon::Silent;
use understory::settings::Settings;
use understory_nix::{Hash, HashAlgorithm};

// -- optimisation

#[test]
fn optimise_removes_copies_of_lower_objects_and_links_equal_files() {
    let Some(world) = World::new() else { return };
    let twice = archive("twice", "twice", &[]);
    let different = archive("different", "built here", &[]);
    let (a, b) = (archive("a", "equal", &[]), archive("b", "equal", &[]));
    for object in [&twice, &different, &a, &b] {
        world.add(object);
    }
    // Looked up, so that overlayfs has them in its cache.
    for object in [&twice, &different, &a, &b] {
        read(&world.merged(&object.0.path));
    }
    world.lower.add(&twice);
    world
        .lower
        .add(&archive("different", "built elsewhere", &[]));
    let heard = Heard::default();
    world.client().optimise(&heard).unwrap();
    let said = heard.take();
    assert!(
        said.contains("is not the same in the lower store 'plain'"),
        "{said}"
    );
    let names = [&different, &a, &b].map(|object| object.0.path.to_string());
    assert_eq!(world.upper_names(), BTreeSet::from(names));
    assert_eq!(read(&world.merged(&twice.0.path)), "twice");
    assert_eq!(read(&world.merged(&different.0.path)), "built here");

    let file = |object: &Object| world.upper(object.0.path.base_name()).join("file");
    let (one, two) = (
        std::fs::metadata(file(&a)).unwrap(),
        std::fs::metadata(file(&b)).unwrap(),
    );
    assert_eq!(one.ino(), two.ino());
    assert_eq!(one.nlink(), 3);
    let parent = std::fs::metadata(world.upper(b.0.path.base_name())).unwrap();
    assert_eq!((parent.mtime(), parent.mode() & 0o7777), (1, 0o555));
    // The link's name is Nix's: the hash of the file's NAR.
    let mut nar = understory_nix::nar::Writer::new(Vec::new());
    nar.file(None, false, 5).unwrap();
    nar.contents(b"equal").unwrap();
    let hash = Hash::of(HashAlgorithm::Sha256, &nar.finish().unwrap());
    assert!(world.upper(".links").join(hash.to_nix32()).exists());

    let (errors, said) = world.verify(false);
    assert!(!errors, "{said}");
    // Linked objects can be deleted, and the link goes with the last of them.
    let (report, _) = world.delete_dead();
    assert_eq!(report.paths.len(), 3);
    assert!(world.upper_names().is_empty());
    assert_eq!(std::fs::read_dir(world.upper(".links")).unwrap().count(), 0);
    assert!(!world.merged(&a.0.path).exists());
    world.add(&a);
    assert_eq!(read(&world.merged(&a.0.path)), "equal");
}

#[test]
fn row_10_optimise_does_not_touch_links_of_the_lower() {
    let Some(world) = World::new() else { return };
    let one = archive("one", "equal", &[]);
    let mut nar = understory_nix::nar::Writer::new(Vec::new());
    nar.file(None, false, 5).unwrap();
    nar.contents(b"equal").unwrap();
    let hash = Hash::of(HashAlgorithm::Sha256, &nar.finish().unwrap()).to_nix32();
    std::fs::create_dir(world.lower.dir.join(".links")).unwrap();
    let link = world.lower.dir.join(".links").join(&hash);
    std::fs::write(&link, "equal").unwrap();
    world.add(&one);
    world.client().optimise(&Silent).unwrap();
    assert_eq!(std::fs::metadata(&link).unwrap().nlink(), 1);
    let file = world.upper(one.0.path.base_name()).join("file");
    assert_eq!(std::fs::metadata(&file).unwrap().nlink(), 2);
    world.delete_dead();
    // No whiteout for the lower's link either.
    assert_eq!(std::fs::read_dir(world.upper(".links")).unwrap().count(), 0);
    assert!(link.exists());
}

#[test]
fn files_are_linked_as_they_are_added_if_that_is_wanted() {
    let settings = Settings {
        auto_optimise: true,
        ..Settings::default()
    };
    let Some(world) = World::with(settings) else {
        return;
    };
    let (a, b) = (archive("a", "equal", &[]), archive("b", "equal", &[]));
    world.add(&a);
    world.add(&b);
    let links = |object: &Object| {
        std::fs::metadata(world.merged(&object.0.path).join("file"))
            .unwrap()
            .nlink()
    };
    assert_eq!((links(&a), links(&b)), (3, 3));
    // Stock Nix deletes through the merged directory, where nothing may be stale.
    for object in [&a, &b] {
        std::fs::remove_dir_all(world.merged(&object.0.path)).unwrap();
    }
    assert!(world.upper_names().is_empty());
}

#[test]
fn a_damaged_link_is_not_spread() {
    let Some(world) = World::new() else { return };
    let (a, b) = (archive("a", "equal", &[]), archive("b", "equal", &[]));
    world.add(&a);
    world.client().optimise(&Silent).unwrap();
    let file = world.upper(a.0.path.base_name()).join("file");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(&file, "EQUAL").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o444)).unwrap();
    world.add(&b);
    let heard = Heard::default();
    world.client().optimise(&heard).unwrap();
    let said = heard.take();
    assert!(said.contains("removing corrupted link"), "{said}");
    assert_eq!(read(&world.upper(b.0.path.base_name())), "equal");
}
