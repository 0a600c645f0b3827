//! What a collection deletes, keeps, counts and says.

use super::common::archive;
use super::support::{Heard, UNSIGNED, World, read, request};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use understory::daemon::Silent;
use understory_nix::StorePath;
use understory_nix::worker::{BuildMode, DerivedPath, GcActionKind};

// -- collection

#[test]
fn row_1_and_2_lower_paths_are_not_counted_not_reported_and_not_listed() {
    let Some(world) = World::new() else { return };
    let below = archive("below", "in the lower", &[]);
    world.lower.add(&below);
    let first = archive("first", "12345", &[&below.0.path]);
    let second = archive("second", "123", &[&first.0.path]);
    world.add(&first);
    world.add(&second);
    assert_eq!(world.rows().len(), 3);

    let dead = BTreeSet::from([first.0.path.clone(), second.0.path.clone()]);
    let (report, _) = world.collect(GcActionKind::ReturnDead, None);
    assert_eq!(report.paths, dead);
    let (report, said) = world.delete_dead();
    assert_eq!(report.paths, dead);
    assert_eq!(report.freed_bytes, 8);
    assert!(!said.contains("below"), "{said}");
    // Row 3: referrers first.
    let at = |path: &StorePath| said.find(&format!("deleting '/nix/store/{path}'")).unwrap();
    assert!(at(&second.0.path) < at(&first.0.path));
    assert!(world.rows().is_empty());
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&below.0.path)), "in the lower");
    let (report, _) = world.delete_dead();
    assert_eq!((report.paths.len(), report.freed_bytes), (0, 0));
}

#[test]
fn what_roots_and_clients_keep_stays() {
    let Some(world) = World::new() else { return };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    let kept = archive("kept", "kept", &[&below.0.path]);
    let root = archive("root", "root", &[&kept.0.path]);
    let temporary = archive("temporary", "temporary", &[]);
    let dead = archive("dead", "dead", &[]);
    for object in [&kept, &root, &temporary, &dead] {
        world.add(object);
    }
    world.root("r", &root.0.path);
    world.root("lower-only", &below.0.path);
    let client = world.client();
    client.add_temp_root(&temporary.0.path).unwrap();

    let (live, _) = world.collect(GcActionKind::ReturnLive, None);
    let expected = [&below, &kept, &root, &temporary].map(|object| object.0.path.clone());
    assert_eq!(live.paths, BTreeSet::from(expected));
    let (report, _) = world.delete_dead();
    assert_eq!(report.paths, BTreeSet::from([dead.0.path.clone()]));
    assert_eq!(read(&world.merged(&temporary.0.path)), "temporary");
    drop(client);
    let (report, _) = world.delete_dead();
    assert_eq!(report.paths, BTreeSet::from([temporary.0.path.clone()]));
    assert_eq!(read(&world.merged(&root.0.path)), "root");
    assert_eq!(world.rows().len(), 3);
}

#[test]
fn what_a_client_is_told_to_be_valid_stays_while_it_is_connected() {
    let Some(world) = World::new() else { return };
    let (ensured, built) = (archive("ensured", "1", &[]), archive("built", "2", &[]));
    world.add(&ensured);
    world.add(&built);
    let client = world.client();
    client.ensure_path(&ensured.0.path, &Silent).unwrap();
    let request = DerivedPath::Opaque(built.0.path.clone());
    client
        .build_paths(&[request], BuildMode::Normal, &Silent)
        .unwrap();
    assert_eq!(world.delete_dead().0.paths, BTreeSet::new());
    drop(client);
    let both = BTreeSet::from([ensured.0.path, built.0.path]);
    assert_eq!(world.delete_dead().0.paths, both);
}

#[test]
fn a_living_path_cannot_be_deleted_and_the_others_stay_too() {
    let Some(world) = World::new() else { return };
    let one = archive("one", "1", &[]);
    let two = archive("two", "2", &[&one.0.path]);
    let other = archive("other", "3", &[]);
    for object in [&one, &two, &other] {
        world.add(object);
    }
    let paths = [&one.0.path, &other.0.path];
    let error = world
        .client()
        .collect_garbage(
            &request(GcActionKind::DeleteSpecific, Some(&paths)),
            &Silent,
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "Cannot delete path '/nix/store/{}' since it is still alive. To find out why, use: \
             nix-store --query --roots and nix-store --query --referrers",
            one.0.path
        )
    );
    assert_eq!(world.rows().len(), 3);
    // With the feature delete-dead-specific-referrers.
    let (report, _) = world.collect(GcActionKind::DeleteDead, Some(&paths));
    assert_eq!(report.paths, BTreeSet::from([other.0.path.clone()]));
    let mut with_referrers = request(GcActionKind::DeleteDead, Some(&[&one.0.path]));
    with_referrers.delete_referrers = true;
    let report = world
        .client()
        .collect_garbage(&with_referrers, &Silent)
        .unwrap();
    assert_eq!(
        report.paths,
        BTreeSet::from([one.0.path.clone(), two.0.path.clone()])
    );
    assert!(world.upper_names().is_empty());

    let mut ignoring = request(GcActionKind::DeleteDead, None);
    ignoring.ignore_liveness = true;
    let error = world
        .client()
        .collect_garbage(&ignoring, &Silent)
        .unwrap_err();
    assert_eq!(error.to_string(), "you are not allowed to ignore liveness");
}

#[test]
fn deletion_of_what_a_lower_has_leaves_the_lower_readable() {
    let Some(world) = World::new() else { return };
    let twice = archive("twice", "twice", &[]);
    world.add(&twice);
    // Known to overlayfs as the upper's, then added below.
    assert_eq!(read(&world.merged(&twice.0.path)), "twice");
    world.lower.add(&twice);
    let (report, _) = world.collect(GcActionKind::DeleteSpecific, Some(&[&twice.0.path]));
    assert_eq!(report.paths, BTreeSet::from([twice.0.path.clone()]));
    assert_eq!(report.freed_bytes, 5);
    assert!(world.upper_names().is_empty());
    let inode = |place: &Path| std::fs::metadata(place.join("file")).unwrap().ino();
    let below = world.lower.dir.join(twice.0.path.base_name());
    assert_eq!(inode(&world.merged(&twice.0.path)), inode(&below));

    // Only in the lower: it stays, and that is said.
    let (report, said) = world.collect(GcActionKind::DeleteSpecific, Some(&[&twice.0.path]));
    assert!(report.paths.is_empty());
    assert!(
        said.contains("is in the lower store and stays there"),
        "{said}"
    );
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&twice.0.path)), "twice");
}

#[test]
fn a_file_of_the_lower_that_its_database_does_not_know_gets_no_whiteout() {
    let Some(world) = World::new() else { return };
    let object = archive("half", "half", &[]);
    world.add(&object);
    world.lower.add(&object);
    world.lower.forget(&object.0.path);
    world.delete_dead();
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&object.0.path)), "half");
}

#[test]
fn leftovers_go_and_what_is_in_use_stays() {
    let Some(world) = World::new() else { return };
    let kept = archive("kept", "kept", &[]);
    world.add(&kept);
    world.root("r", &kept.0.path);
    let store = world.dir.path().join("root/nix/store");
    let name = kept.0.path.base_name();
    std::fs::write(store.join(format!("{name}.lock")), "").unwrap();
    std::fs::create_dir(store.join(format!("{name}.chroot"))).unwrap();
    std::fs::create_dir(store.join("tmp-1-held")).unwrap();
    std::fs::create_dir_all(store.join("tmp-1-free/x")).unwrap();
    std::fs::write(store.join("garbage"), "12").unwrap();
    let orphan = archive("orphan", "orphan", &[]).0.path;
    std::fs::write(store.join(orphan.base_name()), "123").unwrap();
    let building = archive("building", "", &[]).0.path;
    std::fs::write(store.join(building.base_name()), "123").unwrap();
    std::fs::write(store.join(format!("{building}.lock")), "").unwrap();
    let client = world.client();
    client.add_temp_root(&building).unwrap();
    let held = std::fs::File::open(store.join("tmp-1-held")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    std::fs::write(world.state().join("db/reserved"), "X").unwrap();

    let (report, _) = world.delete_dead();
    assert_eq!(report.freed_bytes, 5);
    assert!(report.paths.contains(&orphan));
    let expected = [
        name.to_string(),
        "tmp-1-held".into(),
        building.to_string(),
        format!("{building}.lock"),
    ];
    assert_eq!(world.upper_names(), BTreeSet::from(expected));
    assert!(!world.state().join("db/reserved").exists());
    drop((held, client));
    world.delete_dead();
    assert_eq!(world.upper_names(), BTreeSet::from([name.to_string()]));
}

#[test]
fn a_limit_stops_after_the_object_that_reaches_it() {
    let Some(world) = World::new() else { return };
    for number in 0..5 {
        world.add(&archive(&format!("n{number}"), "1234567890", &[]));
    }
    let heard = Heard::default();
    let mut limited = request(GcActionKind::DeleteDead, None);
    limited.freed_bytes_max = 15;
    let report = world.client().collect_garbage(&limited, &heard).unwrap();
    assert_eq!((report.paths.len(), report.freed_bytes), (2, 20));
    assert!(
        heard
            .take()
            .contains("deleted more than 15 bytes; stopping")
    );
    assert_eq!(world.rows().len(), 3);
    assert_eq!(world.upper_names().len(), 3);
    limited.freed_bytes_max = 0;
    let report = world.client().collect_garbage(&limited, &heard).unwrap();
    assert!(report.paths.is_empty());
}

#[test]
fn clients_add_and_hold_while_it_collects() {
    const CLIENTS: usize = 6;
    const ADDED: usize = 40;
    let Some(world) = World::new() else { return };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (world, below) = (&world, &below);
                scope.spawn(move || {
                    for number in 0..ADDED {
                        let session = world.client();
                        // Names that others add, too, and collections take.
                        let shared =
                            archive(&format!("shared{}", number % 5), "shared", &[&below.0.path]);
                        let mine =
                            archive(&format!("c{client}n{number}"), "mine", &[&shared.0.path]);
                        for added in [&shared, &mine] {
                            session.add_temp_root(&added.0.path).unwrap();
                            session
                                .add_nar(added.0.clone(), &mut &added.1[..], UNSIGNED, &Silent)
                                .unwrap();
                        }
                        // Nothing takes it while the client is there.
                        for added in [&shared, &mine] {
                            assert!(session.is_valid(&added.0.path).unwrap());
                            let text = read(&world.merged(&added.0.path));
                            assert!(["shared", "mine"].contains(&text.as_str()));
                        }
                    }
                })
            })
            .collect();
        let mut collections = 0;
        while clients.iter().any(|client| !client.is_finished()) {
            world.delete_dead();
            if collections % 4 == 0 {
                world.client().optimise(&Silent).unwrap();
            }
            collections += 1;
        }
        clients
            .into_iter()
            .for_each(|client| client.join().unwrap());
        assert!(collections > 1);
    });
    let (errors, said) = world.verify(false);
    assert!(!errors, "{said}");
    world.delete_dead();
    assert!(world.rows().is_empty());
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&below.0.path)), "below");
}
