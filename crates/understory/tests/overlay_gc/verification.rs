//! What is damaged or lost, above and below: said, and repaired.

use super::common::archive;
use super::support::{Object, World, read};
use std::collections::BTreeSet;
use understory::local::{Database, OpenMode};
use understory::settings::Settings;
use understory_nix::{NarHash, StoreDir};

// -- verification

#[test]
fn verify_says_what_was_modified_and_takes_the_good_copy_of_the_lower() {
    let Some(world) = World::new() else { return };
    let twice = archive("twice", "twice", &[]);
    let alone = archive("alone", "alone", &[]);
    world.add(&twice);
    world.add(&alone);
    world.lower.add(&twice);
    assert!(!world.verify(false).0);
    for object in [&twice, &alone] {
        let file = world.upper(object.0.path.base_name()).join("file");
        std::fs::write(file, "other").unwrap();
    }
    let (errors, said) = world.verify(false);
    assert!(errors);
    let damaged = self::archive("twice", "other", &[]);
    let print = |hash: &NarHash| format!("sha256:{}", hash.to_hash().to_nix32());
    let line = format!(
        "path '/nix/store/{}' was modified! expected hash '{}', got '{}'",
        twice.0.path,
        print(&twice.0.nar_hash),
        print(&damaged.0.nar_hash)
    );
    assert!(said.lines().any(|l| l == line), "{said}");
    let (errors, said) = world.verify(true);
    assert!(errors, "one has no good copy anywhere");
    assert!(
        said.contains(&format!("cannot repair path '/nix/store/{}'", alone.0.path)),
        "{said}"
    );
    assert_eq!(
        world.upper_names(),
        BTreeSet::from([alone.0.path.to_string()])
    );
    assert_eq!(read(&world.merged(&twice.0.path)), "twice");
}

#[test]
fn repair_substitutes_what_is_damaged_or_lost_into_the_upper() {
    let cache = tempfile::tempdir().unwrap();
    let settings = Settings {
        substituters: vec![format!("file://{}", cache.path().display())],
        require_signatures: false,
        ..Settings::default()
    };
    let Some(world) = World::with(settings) else {
        return;
    };
    let damaged = archive("damaged", "damaged", &[]);
    let below = archive("below", "below", &[]);
    let lost = archive("lost", "lost", &[]);
    let referrer = archive(
        "referrer",
        "r",
        &[&damaged.0.path, &below.0.path, &lost.0.path],
    );
    world.lower.add(&below);
    world.lower.add(&lost);
    world.add(&damaged);
    world.add(&referrer);
    std::fs::create_dir(cache.path().join("nar")).unwrap();
    std::fs::write(
        cache.path().join("nix-cache-info"),
        "StoreDir: /nix/store\n",
    )
    .unwrap();
    for (info, nar) in [&damaged, &below, &lost] {
        let name = info.path.hash_part();
        std::fs::write(cache.path().join(format!("nar/{name}.nar")), nar).unwrap();
        let text = format!(
            "StorePath: /nix/store/{}\nURL: nar/{name}.nar\nCompression: none\nNarHash: sha256:{}\nNarSize: {}\nReferences: \n",
            info.path,
            info.nar_hash.to_hash().to_nix32(),
            info.nar_size
        );
        std::fs::write(cache.path().join(format!("{name}.narinfo")), text).unwrap();
    }
    // In the upper and in the lower, which is not ours to mend.
    std::fs::write(world.upper(damaged.0.path.base_name()).join("file"), "x").unwrap();
    let lower = |object: &Object| world.lower.dir.join(object.0.path.base_name());
    std::fs::write(lower(&below).join("file"), "x").unwrap();
    std::fs::remove_dir_all(lower(&lost)).unwrap();
    let (errors, said) = world.verify(false);
    assert!(errors, "{said}");
    let (errors, said) = world.verify(true);
    assert!(!errors, "{said}");
    for (object, text) in [(&damaged, "damaged"), (&below, "below"), (&lost, "lost")] {
        assert_eq!(read(&world.merged(&object.0.path)), text);
    }
    assert_eq!(read(&lower(&below)), "x");
    assert!(!lower(&lost).exists());
    let (errors, said) = world.verify(false);
    assert!(!errors, "{said}");
    world.upper_names();
}

#[test]
fn row_11_what_a_lower_lost_is_an_error_and_not_dropped() {
    let Some(world) = World::new() else { return };
    let lost = archive("lost", "lost", &[]);
    let referrer = archive("referrer", "referrer", &[&lost.0.path]);
    let alone = archive("alone", "alone", &[]);
    world.lower.add(&lost);
    world.lower.add(&alone);
    world.add(&referrer);
    let dependent = archive("dependent", "dependent", &[&alone.0.path]);
    world.add(&dependent);
    // What nothing refers to any more stays a row until the next collection.
    let database =
        Database::open(&world.state(), &StoreDir::default(), OpenMode::ReadWrite).unwrap();
    database
        .invalidate(std::slice::from_ref(&dependent.0.path))
        .unwrap();
    drop(database);
    for object in [&lost, &alone] {
        std::fs::remove_dir_all(world.lower.dir.join(object.0.path.base_name())).unwrap();
    }
    let rows = world.rows();
    let (errors, said) = world.verify(false);
    assert!(errors);
    let has = |line: String| assert!(said.lines().any(|l| l == line), "{line}\n--- said\n{said}");
    has(format!(
        "path '/nix/store/{}' disappeared, but it still has valid referrers!",
        lost.0.path
    ));
    for object in [&lost, &alone] {
        has(format!(
            "lower store 'plain' lost path '/nix/store/{}': it calls the path valid, but has no such file",
            object.0.path
        ));
    }
    assert_eq!(world.rows(), rows);
    // When the lower does not know it either, and nothing needs it, it goes.
    world.lower.forget(&alone.0.path);
    let (_, said) = world.verify(false);
    assert!(said.contains(&format!(
        "path '/nix/store/{}' disappeared, removing from database...",
        alone.0.path
    )));
    assert!(!world.rows().contains(&alone.0.path));
    assert!(world.rows().contains(&lost.0.path));
}

#[test]
fn what_the_upper_lost_and_a_lower_has_is_fine() {
    let Some(world) = World::new() else { return };
    let twice = archive("twice", "twice", &[]);
    world.add(&twice);
    read(&world.merged(&twice.0.path));
    world.lower.add(&twice);
    std::fs::remove_dir_all(world.upper(twice.0.path.base_name())).unwrap();
    let (errors, said) = world.verify(false);
    assert!(!errors, "{said}");
    assert_eq!(read(&world.merged(&twice.0.path)), "twice");
    // Hidden by another program's whiteout: said, and repaired when asked.
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    world.add(&archive("referrer", "r", &[&below.0.path]));
    world.whiteout(below.0.path.base_name());
    world.mount.as_ref().unwrap().remount().unwrap();
    let (errors, said) = world.verify(false);
    assert!(
        errors && said.contains("is hidden by a whiteout in the upper directory"),
        "{said}"
    );
    assert!(!world.verify(true).0);
    assert_eq!(read(&world.merged(&below.0.path)), "below");
    world.upper_names();
}
