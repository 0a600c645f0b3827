//! Collection, optimisation and verification of an overlay store on real overlayfs mounts over a plain lower store, and
//! temporary roots between stock Nix and us. Needs root; without, each test says so and passes.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::archive;
use rustix::fs::{CWD, FileType, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use understory::Result;
use understory::builder::NoBuilder;
use understory::daemon::{AddOptions, Backend, ClientInfo, Operations, Reporter, Silent};
use understory::local::lock::GcLock;
use understory::local::restore::restore_nar;
use understory::local::temp_roots::{RootServer, TempRoots};
use understory::local::{Database, LocalPaths, OpenMode};
use understory::mount::{OverlayLayers, OverlayMount};
use understory::nar::HashRequest;
use understory::overlay::lower::Identity;
use understory::overlay::{Lower, Options, Overlay, Remount};
use understory::settings::Settings;
use understory::store::GcReport;
use understory_nix::worker::{
    BuildMode, DerivedPath, DrvOutput, GcActionKind, GcRequest, LogMessage, Verbosity,
    WireRealisation,
};
use understory_nix::{Hash, HashAlgorithm, NarHash, PathInfo, StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

const UNSIGNED: AddOptions = AddOptions {
    repair: false,
    check_signatures: false,
};

/// A path info and its archive.
type Object = (PathInfo, Vec<u8>);

/// A lower store whose infos are in memory. A listing of it fails the test: nothing here may need one.
struct Plain {
    dir: PathBuf,
    infos: Mutex<BTreeMap<StorePath, PathInfo>>,
}

impl Plain {
    fn add(&self, (info, nar): &Object) {
        let target = self.dir.join(info.path.base_name());
        restore_nar(&mut &nar[..], &target, HashRequest::None, &|| false).unwrap();
        self.infos
            .lock()
            .unwrap()
            .insert(info.path.clone(), info.clone());
    }
    fn forget(&self, path: &StorePath) {
        self.infos.lock().unwrap().remove(path);
    }
}

impl Lower for Plain {
    fn describe(&self) -> String {
        "plain".into()
    }
    fn real_dir(&self) -> &Path {
        &self.dir
    }
    fn store_dir(&self) -> &StoreDir {
        static DIR: std::sync::OnceLock<StoreDir> = std::sync::OnceLock::new();
        DIR.get_or_init(StoreDir::default)
    }
    fn identity(&self) -> Result<Identity> {
        Ok(Identity {
            id: None,
            generation: None,
        })
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        let infos = self.infos.lock().unwrap();
        let infos = paths.iter().map(|path| infos.get(path).cloned());
        Ok(infos.map(|info| info.map(Arc::new)).collect())
    }
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        let infos = self.infos.lock().unwrap();
        Ok(paths.iter().map(|path| infos.contains_key(path)).collect())
    }
    fn all_paths(&self) -> Result<Vec<StorePath>> {
        panic!("the lower was listed");
    }
    fn referrers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>> {
        panic!("the lower was asked for referrers");
    }
    fn valid_derivers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>> {
        Ok(BTreeSet::new())
    }
    fn path_from_hash_part(&self, _hash_part: &str) -> Result<Option<StorePath>> {
        Ok(None)
    }
    fn realisation(&self, _id: &DrvOutput) -> Result<Option<WireRealisation>> {
        Ok(None)
    }
}

/// Keeps what is said.
#[derive(Default)]
struct Heard(Mutex<String>);

impl Heard {
    fn take(&self) -> String {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}
impl Reporter for Heard {
    fn verbosity(&self) -> Verbosity {
        Verbosity::Info
    }
    fn is_cancelled(&self) -> bool {
        false
    }
    fn send(&self, message: &LogMessage) {
        if let LogMessage::Next(text) = message {
            self.0
                .lock()
                .unwrap()
                .push_str(std::str::from_utf8(text).unwrap());
        }
    }
}

/// An overlay over one plain lower.
struct World {
    overlay: Option<Overlay>,
    mount: Option<OverlayMount>,
    lower: Arc<Plain>,
    dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.overlay = None;
        if let Some(mount) = self.mount.take() {
            mount.unmount().unwrap();
        }
    }
}

impl World {
    fn new() -> Option<Self> {
        Self::with(Settings::default())
    }
    fn with(settings: Settings) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            understory_testkit::skip("real mounts need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let lower = Arc::new(Plain {
            dir: make("lower"),
            infos: Mutex::default(),
        });
        let layers = OverlayLayers {
            lowers: vec![lower.dir.clone()],
            upper: make("upper"),
            work: make("work"),
        };
        let mount = OverlayMount::mount(&layers, &make("root/nix/store"), false).unwrap();
        let mut world = Self {
            overlay: None,
            mount: Some(mount),
            lower,
            dir,
        };
        world.open(settings);
        Some(world)
    }
    fn open(&mut self, settings: Settings) {
        self.overlay = None;
        let overlay = Overlay::open(Options {
            local: LocalPaths::at_root(&self.dir.path().join("root"), StoreDir::default()),
            upper: self.dir.path().join("upper"),
            lowers: vec![self.lower.clone()],
            check_mount: true,
            remount: Remount::Ours,
            settings,
            builder: Arc::new(NoBuilder {
                reason: "a test".into(),
            }),
        });
        self.overlay = Some(overlay.unwrap());
    }
    fn client(&self) -> Box<dyn Operations> {
        let client = ClientInfo {
            trusted: true,
            uid: None,
            pid: None,
        };
        self.overlay.as_ref().unwrap().connect(&client).unwrap()
    }
    /// Adds to the upper by a client that leaves.
    fn add(&self, (info, nar): &Object) {
        self.client()
            .add_nar(info.clone(), &mut &nar[..], UNSIGNED, &Silent)
            .unwrap();
    }
    fn state(&self) -> PathBuf {
        self.dir.path().join("root/nix/var/nix")
    }
    fn root(&self, name: &str, path: &StorePath) {
        let target = StoreDir::default().print(path);
        symlink(target, self.state().join("gcroots").join(name)).unwrap();
    }
    fn upper(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join("upper").join(name)
    }
    fn merged(&self, path: &StorePath) -> PathBuf {
        self.dir
            .path()
            .join("root/nix/store")
            .join(path.base_name())
    }
    fn rows(&self) -> Vec<StorePath> {
        Database::open(&self.state(), &StoreDir::default(), OpenMode::ReadOnly)
            .unwrap()
            .all_paths()
            .unwrap()
    }
    /// What is in the upper directory, without what is always there. Whiteouts fail the test.
    fn upper_names(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(self.upper("")).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            assert!(
                !entry.file_type().unwrap().is_char_device(),
                "whiteout: {name}"
            );
            if name != ".links" {
                names.insert(name);
            }
        }
        names
    }
    fn collect(&self, action: GcActionKind, paths: Option<&[&StorePath]>) -> (GcReport, String) {
        let heard = Heard::default();
        let report = self
            .client()
            .collect_garbage(&request(action, paths), &heard)
            .unwrap();
        (report, heard.take())
    }
    fn delete_dead(&self) -> (GcReport, String) {
        self.collect(GcActionKind::DeleteDead, None)
    }
    fn verify(&self, repair: bool) -> (bool, String) {
        let heard = Heard::default();
        let errors = self.client().verify(true, repair, &heard).unwrap();
        (errors, heard.take())
    }
    fn whiteout(&self, name: &str) {
        let place = self.upper(name);
        rustix::fs::mknodat(CWD, &place, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }
}

fn request(action: GcActionKind, paths: Option<&[&StorePath]>) -> GcRequest {
    GcRequest {
        action,
        paths: paths.map(|paths| paths.iter().copied().cloned().collect()),
        delete_referrers: false,
        ignore_liveness: false,
        freed_bytes_max: u64::MAX,
    }
}

fn read(place: &Path) -> String {
    std::fs::read_to_string(place.join("file")).unwrap()
}

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
fn whiteouts_of_other_programs_are_removed() {
    let Some(world) = World::new() else { return };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    world.whiteout(below.0.path.base_name());
    world.whiteout("something");
    let (report, said) = world.delete_dead();
    assert!(report.paths.is_empty());
    assert!(
        said.contains(&format!(
            "warning: '/nix/store/{}' of the lower store was hidden by a whiteout",
            below.0.path
        )),
        "{said}"
    );
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&below.0.path)), "below");
}

#[test]
fn whiteouts_that_a_crash_left_are_removed_at_the_next_open() {
    let Some(mut world) = World::new() else {
        return;
    };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    let place = world.merged(&below.0.path);
    assert_eq!(read(&place), "below");
    world.whiteout(below.0.path.base_name());
    world.whiteout("something");
    // What overlayfs has cached is forgotten, too.
    world.open(Settings::default());
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&place), "below");
    let later = archive("later", "later", &[]);
    world.lower.add(&later);
    assert_eq!(read(&world.merged(&later.0.path)), "later");
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

// -- with stock Nix

/// A store of stock Nix in a directory that both sides see.
fn stock(version: Version) -> Option<(NixRoot, tempfile::TempDir, Vec<Bind>)> {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("entering the root needs root");
        return None;
    }
    let root = NixRoot::get(version)?;
    let dir = tempfile::tempdir().unwrap();
    let binds = vec![Bind::new(dir.path(), "/shared")];
    Some((root, dir, binds))
}

const NIX: &str = "export NIX_REMOTE='local?root=/shared/s' HOME=/tmp; ";

fn add_by_stock(root: &NixRoot, binds: &[Bind], text: &str) -> StorePath {
    let script = format!("{NIX} echo {text} > /tmp/{text}; nix-store --add /tmp/{text}");
    let path = root.run_ok(binds, 0, &script);
    StoreDir::default().parse(path.trim().as_bytes()).unwrap()
}

#[test]
fn real_nix_keeps_our_temporary_roots() {
    for version in [Version::Nix2_26, Version::Nix2_34] {
        let Some((root, dir, binds)) = stock(version) else {
            continue;
        };
        let (kept, late) = (
            add_by_stock(&root, &binds, "kept"),
            add_by_stock(&root, &binds, "late"),
        );
        let paths = LocalPaths::at_root(&dir.path().join("s"), StoreDir::default());
        let roots = TempRoots::new(&paths.state, &paths.store_dir);
        roots.add(std::slice::from_ref(&kept)).unwrap();
        // The collector waits at the FIFO: it has its lock, its socket, and all roots that were there.
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let script = format!(
            "{NIX} export _NIX_TEST_GC_SYNC_2=/shared/fifo; exec nix-store --gc -vvvvv 2>&1"
        );
        let mut gc = root
            .command(&binds, 0, &[], "bash")
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Opens when the collector has opened it to read.
        let mut open = std::fs::File::options().write(true).open(&fifo).unwrap();
        roots.add(std::slice::from_ref(&late)).unwrap();
        open.write_all(b"go\n").unwrap();
        drop(open);
        let said: Vec<String> = BufReader::new(gc.stdout.take().unwrap())
            .lines()
            .map_while(std::io::Result::ok)
            .collect();
        assert!(gc.wait().unwrap().success(), "{said:?}");
        assert!(paths.object(&kept).exists(), "{said:?}");
        assert!(paths.object(&late).exists(), "{said:?}");
        drop(roots);
        root.run_ok(&binds, 0, &format!("{NIX} nix-store --gc"));
        assert!(!paths.object(&kept).exists());
        assert!(!paths.object(&late).exists());
    }
}

#[test]
fn real_nix_hands_its_temporary_roots_to_our_collection() {
    for version in [Version::Nix2_26, Version::Nix2_34] {
        let Some((root, dir, binds)) = stock(version) else {
            continue;
        };
        add_by_stock(&root, &binds, "first");
        let paths = LocalPaths::at_root(&dir.path().join("s"), StoreDir::default());
        let lock = GcLock::exclusive(&paths.state, &Silent).unwrap();
        let (server, before) = RootServer::start(&paths.state, &paths.store_dir).unwrap();
        assert!(before.is_empty(), "{before:?}");
        // It ends, though the collection runs.
        let path = add_by_stock(&root, &binds, "during");
        assert!(server.is_root(&path));
        assert!(!server.claim(&path));
        drop(server);
        drop(lock);
        assert_eq!(add_by_stock(&root, &binds, "during"), path);
    }
}

#[test]
fn real_nix_store_on_disk_is_a_substituter() {
    let Some((root, dir, binds)) = stock(Version::Nix2_34) else {
        return;
    };
    let path = add_by_stock(&root, &binds, "there");
    let settings = Settings {
        substituters: vec![dir.path().join("s").display().to_string()],
        ..Settings::default()
    };
    let Some(world) = World::with(settings) else {
        return;
    };
    let heard = Heard::default();
    world.client().ensure_path(&path, &heard).unwrap();
    assert_eq!(
        std::fs::read_to_string(world.merged(&path)).unwrap(),
        "there\n"
    );
    assert!(world.upper_names().contains(path.base_name()));
    // What is not as its row says is refused, and nothing is left of it.
    let damaged = add_by_stock(&root, &binds, "damaged");
    let file = dir.path().join("s/nix/store").join(damaged.base_name());
    std::fs::write(&file, "other").unwrap();
    let error = world.client().ensure_path(&damaged, &heard).unwrap_err();
    assert!(error.chain().contains("hash mismatch"), "{}", error.chain());
    assert!(!world.upper_names().contains(damaged.base_name()));
}
