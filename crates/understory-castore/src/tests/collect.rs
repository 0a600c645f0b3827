//! Collection of content, against a model: whatever is rooted reads right at every step, and what is
//! not goes.

use super::crash::{Faulty, Mode, assert_sound, temporary};
use super::*;
use crate::store::{CollectOptions, CollectReport};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(super) fn options() -> OpenOptions {
    OpenOptions {
        compress_threads: 1,
        compression_level: 1,
        pack_bytes_max: 60_000,
        ..OpenOptions::default()
    }
}

/// Everything that is dead goes.
pub(super) fn thorough() -> CollectOptions {
    CollectOptions {
        dead_permille_min: 1,
        pack_wait: Duration::ZERO,
        ..CollectOptions::default()
    }
}

/// And everything else is written anew, ordered by likeness.
fn densely() -> CollectOptions {
    CollectOptions {
        all: true,
        dense: Some(CollectOptions::DENSE_FRAME_BYTES),
        ..thorough()
    }
}

pub(super) fn collect<'a>(
    castore: &Castore,
    roots: impl Iterator<Item = &'a Node>,
    options: &CollectOptions,
) -> Result<CollectReport, CastoreError> {
    let roots: Vec<&Node> = roots.collect();
    castore.collect(
        &mut |each| roots.iter().try_for_each(|root| each(root)),
        options,
        &mut |_| Ok(()),
    )
}

/// A tree that shares some of its files with others: small files, and now and then a large one.
pub(super) fn tree(seed: u64) -> Tree {
    let mut entries = BTreeMap::new();
    let file = |seed: u64, len: usize| Tree::File(noise(seed, len), false);
    entries.insert(
        b"own".to_vec(),
        file(seed, 4_000 + (seed % 7) as usize * 900),
    );
    entries.insert(b"shared".to_vec(), file(1_000_000 + seed / 3, 3_000));
    entries.insert(b"link".to_vec(), Tree::Symlink(b"own".to_vec()));
    if seed.is_multiple_of(5) {
        let mut large = noise(2_000_000 + seed % 10, 150_000);
        large.extend(noise(seed, 150_000));
        entries.insert(b"large".to_vec(), Tree::File(large, true));
    }
    let below = BTreeMap::from([(b"same".to_vec(), file(3_000_000 + seed % 4, 2_000))]);
    entries.insert(b"below".to_vec(), Tree::Directory(below));
    Tree::Directory(entries)
}

fn put(castore: &Castore, seed: u64) -> Node {
    let writer = castore.writer().unwrap();
    let node = put_tree(&writer, &tree(seed));
    writer.sync().unwrap();
    node
}

/// What a store takes that has only these trees.
fn bytes_of(seeds: impl Iterator<Item = u64>) -> u64 {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let writer = castore.writer().unwrap();
    for seed in seeds {
        put_tree(&writer, &tree(seed));
    }
    writer.sync().unwrap();
    castore.stats().unwrap().stored_bytes
}

#[test]
fn what_no_root_needs_goes_and_all_else_stays() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let nodes: Vec<Node> = (0..60).map(|seed| put(&castore, seed)).collect();
    nodes.iter().for_each(|node| castore.release(node));
    let before = castore.stats().unwrap();
    let kept = || nodes.iter().step_by(2);
    let dry = CollectOptions {
        dry_run: true,
        ..thorough()
    };
    let expected = collect(&castore, kept(), &dry).unwrap();
    assert_eq!(
        castore.stats().unwrap(),
        before,
        "a dry run changes nothing"
    );
    let report = collect(&castore, kept(), &thorough()).unwrap();
    for (seed, node) in nodes.iter().enumerate().step_by(2) {
        assert_eq!(get_tree(&castore, node), tree(seed as u64));
    }
    let Node::Directory { digest, .. } = &nodes[1] else {
        panic!()
    };
    assert!(!castore.contains(digest));
    assert_sound(&castore);
    let after = castore.stats().unwrap();
    let should = bytes_of((0..60).step_by(2));
    assert!(
        after.stored_bytes <= should + should / 100,
        "{after:?} {should}"
    );
    assert_eq!(report.disk_bytes_before, before.disk_bytes);
    assert_eq!(report.disk_bytes_after, after.disk_bytes);
    assert_eq!(report.roots, 30);
    assert_eq!(report.packs_after, after.packs);
    assert_eq!(
        report.freed_pieces,
        before.data_pieces + before.directories + before.recipes
            - after.data_pieces
            - after.directories
            - after.recipes
    );
    assert_eq!(report.freed_pieces, expected.freed_pieces);
    let (freed, said) = (
        before.disk_bytes - after.disk_bytes,
        expected.disk_bytes_before - expected.disk_bytes_after,
    );
    assert!(freed.abs_diff(said) < freed / 10, "{freed} {said}");
    // Again: nothing to do.
    let again = collect(&castore, kept(), &thorough()).unwrap();
    assert_eq!(
        (again.packs_deleted, again.dead_pieces),
        (0, 0),
        "{again:?}"
    );
    // All of it.
    collect(&castore, [].iter(), &thorough()).unwrap();
    assert_eq!(castore.stats().unwrap().data_pieces, 0);
    let node = put(&castore, 3);
    assert_eq!(get_tree(&castore, &node), tree(3));
    assert_eq!(get_tree(&open(dir.path()), &node), tree(3));
}

#[test]
fn a_tree_that_is_not_published_yet_stays() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let other = Castore::open(dir.path(), &options()).unwrap();
    let old = put(&castore, 1);
    castore.release(&old);
    // Finds all of it stored, so writes nothing; and is not published.
    let writer = other.writer().unwrap();
    let found = put_tree(&writer, &tree(1));
    writer.sync().unwrap();
    assert_eq!(writer.counters().new_bytes, 0);
    let now = CollectOptions {
        lease_wait: Duration::ZERO,
        ..thorough()
    };
    drop(castore);
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let report = collect(&castore, [].iter(), &now).unwrap();
    assert!(report.kept_leased.packs > 0, "{report:?}");
    assert_eq!(
        report.kept_leased.processes,
        [std::process::id()].into_iter().collect()
    );
    assert_eq!(get_tree(&castore, &found), tree(1));
    // Published, then not needed any more.
    other.release(&found);
    let report = collect(&castore, [&found].into_iter(), &now).unwrap();
    assert_eq!(report.kept_leased.packs, 0);
    assert_eq!(get_tree(&castore, &found), tree(1));
    drop(writer);
    drop(other);
    collect(&castore, [].iter(), &now).unwrap();
    assert_eq!(castore.stats().unwrap().data_pieces, 0);
}

#[test]
fn a_root_that_was_read_is_secured_before_it_is_published_again() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let node = put(&castore, 10);
    castore.release(&node);
    castore.secure(&node).unwrap();
    let now = CollectOptions {
        lease_wait: Duration::ZERO,
        ..thorough()
    };
    let other = Castore::open(dir.path(), &options()).unwrap();
    collect(&other, [].iter(), &now).unwrap();
    assert_eq!(get_tree(&castore, &node), tree(10));
    castore.release(&node);
    castore.writer().unwrap().give_up_pack().unwrap();
    collect(&other, [].iter(), &now).unwrap();
    let late = Castore::open(dir.path(), &options()).unwrap();
    let error = late.secure(&node).unwrap_err();
    assert!(matches!(error, CastoreError::Missing { .. }), "{error}");
    // What a process has in memory still, it can store again.
    castore.secure(&node).unwrap();
    castore.writer().unwrap().sync().unwrap();
    let late = Castore::open(dir.path(), &options()).unwrap();
    assert_eq!(get_tree(&late, &node), tree(10));
}

/// Operations of a random run.
#[derive(Debug, Clone)]
enum Step {
    Add(u64),
    Root(usize),
    Unroot(usize),
    Collect(u32),
    Repack {
        level: i32,
        dense: Option<usize>,
    },
    Join,
    Read,
    Reopen,
    /// The process dies at an operation of a collection.
    Crash {
        at: u64,
        dense: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..40_u64).prop_map(Step::Add),
        2 => any::<usize>().prop_map(Step::Root),
        4 => any::<usize>().prop_map(Step::Unroot),
        3 => prop_oneof![Just(1_u32), Just(300), Just(800)].prop_map(Step::Collect),
        2 => (1..12_i32, prop_oneof![Just(None), Just(Some(CollectOptions::DENSE_FRAME_BYTES)), Just(Some(4 << 20))])
            .prop_map(|(level, dense)| Step::Repack { level, dense }),
        1 => Just(Step::Join),
        2 => Just(Step::Read),
        1 => Just(Step::Reopen),
        2 => (1..40_u64, any::<bool>()).prop_map(|(at, dense)| Step::Crash { at, dense }),
    ];
    proptest::collection::vec(step, 1..40)
}

/// Runs steps on a castore and a model of it: the trees that are rooted.
fn run_steps(steps: &[Step]) {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let open_it = || Castore::open(dir.path(), &options()).unwrap();
    // Looks on with a state of its own, as another process does.
    let reader = open_it();
    let mut castore = open_it();
    let mut rooted: BTreeMap<u64, Node> = BTreeMap::new();
    let mut dropped: BTreeMap<u64, Node> = BTreeMap::new();
    let check = |castore: &Castore, rooted: &BTreeMap<u64, Node>| {
        for (seed, node) in rooted {
            assert_eq!(get_tree(castore, node), tree(*seed));
        }
    };
    for step in steps {
        match step {
            Step::Add(seed) => {
                let node = put(&castore, *seed);
                rooted.insert(*seed, node.clone());
                castore.release(&node);
            }
            Step::Root(at) if !dropped.is_empty() => {
                // Rooted again by whoever has the node still: only if it is there.
                let seed = *dropped.keys().nth(at % dropped.len()).unwrap();
                let node = dropped.remove(&seed).unwrap();
                if castore.secure(&node).is_ok() {
                    castore.writer().unwrap().sync().unwrap();
                    rooted.insert(seed, node.clone());
                    castore.release(&node);
                }
            }
            Step::Unroot(at) if !rooted.is_empty() => {
                let seed = *rooted.keys().nth(at % rooted.len()).unwrap();
                dropped.insert(seed, rooted.remove(&seed).unwrap());
            }
            Step::Root(_) | Step::Unroot(_) => {}
            Step::Collect(permille) => {
                let options = CollectOptions {
                    dead_permille_min: *permille,
                    ..CollectOptions::default()
                };
                collect(&castore, rooted.values(), &options).unwrap();
            }
            Step::Repack { level, dense } => {
                let options = CollectOptions {
                    all: true,
                    level: Some(*level),
                    dense: *dense,
                    ..CollectOptions::default()
                };
                collect(&castore, rooted.values(), &options).unwrap();
            }
            Step::Join => {
                let options = CollectOptions {
                    join_small: true,
                    ..CollectOptions::default()
                };
                collect(&castore, rooted.values(), &options).unwrap();
            }
            Step::Read => check(&reader, &rooted),
            Step::Reopen => castore = open_it(),
            Step::Crash { at, dense } => {
                drop(castore);
                let medium = Faulty::new(Mode::Kill, *at);
                let dying = Castore::open_on(dir.path(), &options(), medium.clone()).unwrap();
                let options = if *dense { densely() } else { thorough() };
                let _ = collect(&dying, rooted.values(), &options);
                drop(dying);
                castore = open_it();
            }
        }
        check(&castore, &rooted);
    }
    check(&reader, &rooted);
    drop(reader);
    collect(&castore, rooted.values(), &thorough()).unwrap();
    check(&castore, &rooted);
    assert_sound(&castore);
    // Dead bytes are gone: a store that never had anything else takes about as much. Frames may be cut
    // otherwise, so a little less or more.
    let (has, should) = (castore.stats().unwrap(), bytes_of(rooted.keys().copied()));
    let slack = 4_096 + should / 50;
    assert!(has.stored_bytes <= should + slack, "{has:?} {should}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn any_interleaving_keeps_what_is_rooted_and_frees_the_rest(steps in steps()) {
        run_steps(&steps);
    }
}

/// Collects with a failure at operation `fail_at`; returns the operations that it took.
fn run_with_failure(mode: Mode, how: &CollectOptions, fail_at: u64) -> u64 {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let mut nodes = Vec::new();
    {
        let castore = Castore::open(dir.path(), &options()).unwrap();
        for seed in 0..12 {
            nodes.push(put(&castore, seed));
        }
    }
    let kept: Vec<(u64, &Node)> = nodes
        .iter()
        .enumerate()
        .filter(|(seed, _)| seed % 3 != 0 && *seed != 4)
        .map(|(seed, node)| (seed as u64, node))
        .collect();
    let roots = || kept.iter().map(|(_, node)| *node);
    let check = |castore: &Castore| {
        for (seed, node) in &kept {
            assert_eq!(get_tree(castore, node), tree(*seed), "{mode:?} {fail_at}");
        }
    };
    let medium = Faulty::new(mode, fail_at);
    let looks_on = Castore::open(dir.path(), &options()).unwrap();
    {
        let castore = Castore::open_on(dir.path(), &options(), medium.clone()).unwrap();
        let result = collect(&castore, roots(), how);
        check(&castore);
        if mode == Mode::NoSpace {
            if let Err(error) = result {
                assert!(error.is_no_space(), "{error}");
            }
            // The same process goes on when there is space again.
            medium.mend();
            collect(&castore, roots(), how).unwrap();
            check(&castore);
        }
    }
    check(&looks_on);
    drop(looks_on);
    let operations = medium.operations();
    medium.cut_power();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    check(&castore);
    assert_sound(&castore);
    // A writer that comes after a crash stores again what is condemned, and the next collection
    // frees what this one left.
    let node = put(&castore, 3);
    castore.release(&node);
    let roots = || kept.iter().map(|(_, node)| *node).chain([&node]);
    collect(&castore, roots(), &thorough()).unwrap();
    check(&castore);
    assert_eq!(get_tree(&castore, &node), tree(3));
    assert_sound(&castore);
    let left: Vec<String> = crate::core::list_names(&dir.path().join("packs"))
        .unwrap()
        .into_iter()
        .filter(|name| !name.ends_with(".pack"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!dir.path().join("condemned").exists());
    let again = collect(&castore, roots(), &thorough()).unwrap();
    assert_eq!(again.dead_pieces, 0, "{mode:?} {fail_at}: {again:?}");
    operations
}

fn at_each_operation(mode: Mode) {
    for how in [thorough(), densely()] {
        let operations = run_with_failure(mode, &how, u64::MAX);
        assert!(operations > 30, "{operations}");
        for fail_at in 1..=operations {
            run_with_failure(mode, &how, fail_at);
        }
    }
}

#[test]
fn a_collection_that_is_killed_at_any_operation_loses_nothing() {
    at_each_operation(Mode::Kill);
}

#[test]
fn a_power_cut_at_any_operation_of_a_collection_loses_nothing() {
    at_each_operation(Mode::PowerCut(false));
    at_each_operation(Mode::PowerCut(true));
}

#[test]
fn a_disk_that_is_full_at_any_operation_of_a_collection_loses_nothing() {
    at_each_operation(Mode::NoSpace);
}

#[test]
fn readers_and_writers_notice_nothing_of_collections() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let stable: Vec<Node> = (0..20).map(|seed| put(&castore, seed)).collect();
    stable.iter().for_each(|node| castore.release(node));
    let done = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    // Rows: what a collection takes for roots. A writer adds and removes at any time.
    let rows = std::sync::Mutex::new(BTreeMap::<u64, Node>::new());
    let rounds = 40;
    std::thread::scope(|scope| {
        for own_state in [false, true] {
            let (stable, done, reads) = (&stable, &done, &reads);
            let reader = if own_state {
                Castore::open(dir.path(), &options()).unwrap()
            } else {
                castore.clone()
            };
            scope.spawn(move || {
                // Blobs that stay open, and trees that are looked up anew.
                let open: Vec<(crate::Blob, Vec<u8>)> = stable
                    .iter()
                    .enumerate()
                    .map(|(seed, node)| open_own(&reader, node, seed as u64))
                    .collect();
                while !done.load(Ordering::Relaxed) {
                    for (seed, node) in stable.iter().enumerate() {
                        assert_eq!(get_tree(&reader, node), tree(seed as u64));
                        let (blob, expected) = &open[seed];
                        let mut found = vec![0; expected.len()];
                        blob.read_at(0, &mut found).unwrap();
                        assert!(found == *expected);
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for number in 0..2_u64 {
            let (done, rows) = (&done, &rows);
            let castore = Castore::open(dir.path(), &options()).unwrap();
            scope.spawn(move || {
                let mut seed = number;
                while !done.load(Ordering::Relaxed) {
                    // Much of it is what was dropped a moment ago, so is found, condemned or not.
                    seed = (seed * 7 + 3) % 12;
                    let node = put(&castore, 100 + seed);
                    rows.lock().unwrap().insert(100 + seed, node.clone());
                    assert_eq!(get_tree(&castore, &node), tree(100 + seed));
                    castore.release(&node);
                    // What is a row now reads right, until it is none.
                    let row = rows
                        .lock()
                        .unwrap()
                        .iter()
                        .next()
                        .map(|(s, n)| (*s, n.clone()));
                    if let Some((seed, node)) = row {
                        let rows = rows.lock().unwrap();
                        if rows.contains_key(&seed) {
                            assert_eq!(get_tree(&castore, &node), tree(seed));
                        }
                    }
                    rows.lock().unwrap().pop_first();
                }
            });
        }
        for round in 0..rounds {
            let options = CollectOptions {
                all: round % 4 == 3,
                dense: (round % 2 == 1).then_some(CollectOptions::DENSE_FRAME_BYTES_MAX),
                ..thorough()
            };
            let roots = |each: &mut dyn FnMut(&Node) -> Result<(), CastoreError>| {
                stable.iter().try_for_each(&mut *each)?;
                let rows: Vec<Node> = rows.lock().unwrap().values().cloned().collect();
                rows.iter().try_for_each(each)
            };
            castore
                .collect(&mut { roots }, &options, &mut |_| Ok::<_, CastoreError>(()))
                .unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 40);
    let rows = rows.into_inner().unwrap();
    collect(&castore, stable.iter().chain(rows.values()), &thorough()).unwrap();
    assert_sound(&castore);
}

/// The file `own` of a tree, open.
fn open_own(castore: &Castore, node: &Node, seed: u64) -> (crate::Blob, Vec<u8>) {
    let Node::Directory { digest, .. } = node else {
        panic!("{node:?}")
    };
    let directory = castore.directory(digest).unwrap();
    let entry = directory
        .entries()
        .iter()
        .find(|entry| *entry.name == *b"own");
    let Some(Node::File { digest, size, .. }) = entry.map(|entry| &entry.node) else {
        panic!("{entry:?}")
    };
    let expected = noise(seed, *size as usize);
    (castore.blob(digest, *size).unwrap(), expected)
}

#[test]
fn deleted_packs_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let other = Castore::open(dir.path(), &options()).unwrap();
    let nodes: Vec<Node> = (0..30).map(|seed| put(&castore, seed)).collect();
    nodes.iter().for_each(|node| castore.release(node));
    for (seed, node) in nodes.iter().enumerate() {
        assert_eq!(get_tree(&other, node), tree(seed as u64));
    }
    let deleted_and_open = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
            .filter(|path| path.starts_with(dir.path()))
            .filter(|path| path.to_string_lossy().ends_with("(deleted)"))
            .count()
    };
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let dir = dir.path().to_string_lossy().into_owned();
        maps.lines()
            .filter(|line| line.contains(&dir) && line.ends_with("(deleted)"))
            .count()
    };
    collect(&castore, nodes.iter().step_by(2), &thorough()).unwrap();
    assert!(deleted_and_open() > 0, "the other has some open");
    other.refresh().unwrap();
    assert_eq!((deleted_and_open(), mapped()), (0, 0));
}

#[test]
fn a_process_that_looks_on_leaves_its_pack_and_closes_what_is_deleted() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let idle = Castore::open(dir.path(), &options()).unwrap();
    idle.keep_fresh().unwrap();
    let nodes: Vec<Node> = (0..12).map(|seed| put(&idle, seed)).collect();
    for (seed, node) in nodes.iter().enumerate() {
        assert_eq!(get_tree(&idle, node), tree(seed as u64));
        idle.release(node);
    }
    // Its writer lives on, and has a pack open.
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let patient = CollectOptions {
        pack_wait: Duration::from_secs(60),
        ..thorough()
    };
    let report = collect(&castore, nodes.iter().take(1), &patient).unwrap();
    assert_eq!(report.kept_open.packs, 0, "{report:?}");
    assert_eq!(report.live_pieces + report.freed_pieces, {
        report.live_pieces + report.dead_pieces
    });
    let open_and_deleted = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .any(|path| {
                path.starts_with(dir.path()) && path.to_string_lossy().ends_with("(deleted)")
            })
    };
    while open_and_deleted() {
        std::thread::yield_now();
    }
    let node = put(&idle, 40);
    assert_eq!(get_tree(&castore, &node), tree(40));
    assert_eq!(get_tree(&idle, &nodes[0]), tree(0));
}

#[test]
fn small_packs_become_one() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    let mut nodes = Vec::new();
    for seed in 0..20 {
        // A writer that has only its time.
        let castore = Castore::open(
            dir.path(),
            &OpenOptions {
                pack_bytes_max: 4_096,
                ..options()
            },
        )
        .unwrap();
        nodes.push(put(&castore, seed));
    }
    let castore = Castore::open(
        dir.path(),
        &OpenOptions {
            pack_bytes_max: 100 << 20,
            ..options()
        },
    )
    .unwrap();
    assert!(castore.stats().unwrap().packs >= 20);
    let frames = castore.stats().unwrap().frames;
    let report = collect(&castore, nodes.iter(), &CollectOptions::default()).unwrap();
    assert_eq!(
        (report.packs_after, report.freed_pieces),
        (1, 0),
        "{report:?}"
    );
    let after = castore.stats().unwrap();
    assert!(after.frames * 2 < frames, "{after:?} {frames}");
    for (seed, node) in nodes.iter().enumerate() {
        assert_eq!(get_tree(&castore, node), tree(seed as u64));
    }
    assert_sound(&castore);
}

#[test]
fn a_dense_repack_of_more_than_it_orders_at_once_keeps_everything() {
    let dir = temporary();
    Castore::create(dir.path()).unwrap();
    // 64 packs' worth are ordered at once: 256 KiB.
    let options = OpenOptions {
        pack_bytes_max: 4_096,
        ..options()
    };
    let castore = Castore::open(dir.path(), &options).unwrap();
    let nodes: Vec<Node> = (0..60).map(|seed| put(&castore, seed)).collect();
    nodes.iter().for_each(|node| castore.release(node));
    let before = castore.stats().unwrap();
    assert!(before.raw_bytes > 3 << 18, "{before:?}");
    let mut progress = Vec::new();
    let report = castore
        .collect::<CastoreError>(
            &mut |each| nodes.iter().try_for_each(each),
            &densely(),
            &mut |step| {
                if let crate::store::CollectStep::Rewriting { done, total } = step {
                    progress.push((done, total));
                }
                Ok(())
            },
        )
        .unwrap();
    assert_eq!(report.packs_deleted, report.packs_before, "{report:?}");
    assert_eq!((report.dead_pieces, report.freed_pieces), (0, 0));
    assert!(progress.is_sorted(), "{progress:?}");
    let (done, total) = progress.last().unwrap();
    assert_eq!(done, total);
    let after = castore.stats().unwrap();
    assert_eq!(after.data_pieces, before.data_pieces);
    assert!(after.frames < before.frames, "{after:?} {before:?}");
    for reader in [&castore, &open(dir.path())] {
        for (seed, node) in nodes.iter().enumerate() {
            assert_eq!(get_tree(reader, node), tree(seed as u64));
        }
    }
    assert_sound(&castore);
}
