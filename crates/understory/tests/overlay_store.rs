//! The overlay store on real overlayfs mounts, over a live castore mount and plain directories. Rows are those of the
//! defects of C++ Nix's local-overlay store in `docs/overlay-store.md`. Needs root; without, each test says so and
//! passes.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::archive;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use understory::add::AddMethod;
use understory::builder::NoBuilder;
use understory::daemon::{AddOptions, Backend, ClientInfo, Operations, Silent};
use understory::local::LocalPaths;
use understory::mount::{LiveMount, LiveOptions, OverlayLayers, OverlayMount};
use understory::overlay::lower::{CastoreLower, Identity};
use understory::overlay::{Lower, Options, Overlay, Remount};
use understory::settings::Settings;
use understory::store::GcAction;
use understory::{Result, Store, StoreOptions};
use understory_nix::worker::{DrvOutput, SetOptions, WireRealisation};
use understory_nix::{
    ContentAddressMethod, Hash, HashAlgorithm, NarHash, PathInfo, SecretKey, Signature, StoreDir,
    StorePath,
};

const CLIENT: ClientInfo = ClientInfo {
    trusted: true,
    uid: None,
    pid: None,
};
const UNSIGNED: AddOptions = AddOptions {
    repair: false,
    check_signatures: false,
};
const REPAIR: AddOptions = AddOptions {
    repair: true,
    check_signatures: false,
};

/// A castore with its mount, an overlay over it and over other lowers.
struct World {
    // Dropped in this order.
    overlay: Option<Overlay>,
    merged: Option<OverlayMount>,
    live: Option<LiveMount>,
    castore: Option<Store>,
    lowers: Vec<Arc<dyn Lower>>,
    dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.overlay = None;
        if let Some(merged) = self.merged.take() {
            merged.unmount().unwrap();
        }
        self.live = None;
    }
}

impl World {
    /// Over a castore.
    fn castore() -> Option<Self> {
        Self::new(true, Vec::new())
    }

    /// Over plain directories.
    fn plain(count: usize) -> Option<(Self, Vec<Arc<Plain>>)> {
        let dir = root_dir()?;
        let plain: Vec<Arc<Plain>> = (0..count)
            .map(|number| Arc::new(Plain::new(&dir.path().join(format!("lower{number}")))))
            .collect();
        let lowers = plain.iter().map(|p| p.clone() as Arc<dyn Lower>).collect();
        let mut world = Self::mounted(dir, None, None, lowers);
        world.open().unwrap();
        Some((world, plain))
    }

    fn new(castore: bool, more: Vec<Arc<dyn Lower>>) -> Option<Self> {
        let dir = root_dir()?;
        assert!(castore);
        Store::create(&dir.path().join("castore"), &StoreDir::default()).unwrap();
        let store = Store::open(&dir.path().join("castore"), &StoreOptions::default()).unwrap();
        let mountpoint = dir.path().join("live");
        std::fs::create_dir(&mountpoint).unwrap();
        let live = LiveMount::mount(&store, &mountpoint, &LiveOptions::default()).unwrap();
        let mut lowers: Vec<Arc<dyn Lower>> =
            vec![Arc::new(CastoreLower::new(store.clone(), &mountpoint))];
        lowers.extend(more);
        let mut world = Self::mounted(dir, Some(live), Some(store), lowers);
        world.open().unwrap();
        Some(world)
    }

    fn mounted(
        dir: tempfile::TempDir,
        live: Option<LiveMount>,
        castore: Option<Store>,
        lowers: Vec<Arc<dyn Lower>>,
    ) -> Self {
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let layers = OverlayLayers {
            lowers: lowers.iter().map(|l| l.real_dir().to_path_buf()).collect(),
            upper: make("upper"),
            work: make("work"),
        };
        let merged = OverlayMount::mount(&layers, &make("root/nix/store"), false).unwrap();
        Self {
            overlay: None,
            merged: Some(merged),
            live,
            castore,
            lowers,
            dir,
        }
    }

    fn options(&self) -> Options {
        Options {
            local: LocalPaths::at_root(&self.dir.path().join("root"), StoreDir::default()),
            upper: self.dir.path().join("upper"),
            lowers: self.lowers.clone(),
            check_mount: true,
            remount: Remount::Ours,
            settings: Settings::default(),
            builder: Arc::new(NoBuilder {
                reason: "a test".into(),
            }),
        }
    }

    fn open(&mut self) -> Result<()> {
        self.overlay = None;
        self.overlay = Some(Overlay::open(self.options())?);
        Ok(())
    }

    fn client(&self) -> Box<dyn Operations> {
        self.overlay.as_ref().unwrap().connect(&CLIENT).unwrap()
    }
    fn store(&self) -> &Store {
        self.castore.as_ref().unwrap()
    }
    fn upper(&self, path: &StorePath) -> PathBuf {
        self.dir.path().join("upper").join(path.base_name())
    }
    fn merged(&self, path: &StorePath) -> PathBuf {
        self.dir
            .path()
            .join("root/nix/store")
            .join(path.base_name())
    }
    /// What is in the upper directory, without what is always there.
    fn upper_names(&self) -> BTreeSet<String> {
        let names = std::fs::read_dir(self.dir.path().join("upper")).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".links")
            .collect()
    }
    fn no_whiteouts(&self) {
        for name in self.upper_names() {
            let found = self.dir.path().join("upper").join(&name);
            let found = found.symlink_metadata().unwrap();
            assert!(!found.file_type().is_char_device(), "whiteout: {name}");
        }
    }
    /// Publishes a file in the castore, as another client of it would.
    fn below(&self, name: &str, text: &str, references: &[&StorePath]) -> StorePath {
        let owner = self.store().temp_root_owner().unwrap();
        let references = references.iter().copied().cloned().collect();
        understory::add::add_from_dump(
            self.store(),
            &owner,
            name,
            &text_method(),
            &references,
            false,
            &mut text.as_bytes(),
        )
        .unwrap()
        .path
    }
}

fn root_dir() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("real mounts need root");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

fn text_method() -> AddMethod {
    AddMethod {
        method: ContentAddressMethod::Text,
        algorithm: HashAlgorithm::Sha256,
    }
}

fn add_text(
    client: &dyn Operations,
    name: &str,
    text: &str,
    references: &[&StorePath],
) -> Result<PathInfo> {
    let references = references.iter().copied().cloned().collect();
    client.add_dump(
        name,
        &text_method(),
        &references,
        false,
        &mut text.as_bytes(),
        &Silent,
    )
}

fn add(
    client: &dyn Operations,
    (info, nar): &(PathInfo, Vec<u8>),
    options: AddOptions,
) -> Result<()> {
    client.add_nar(info.clone(), &mut &nar[..], options, &Silent)
}

fn info_of(client: &dyn Operations, path: &StorePath) -> Option<PathInfo> {
    let mut found = None;
    client
        .with_path_info(path, &mut |info| found = Some(info.clone()))
        .unwrap();
    found
}

/// A lower store whose infos are in memory and whose objects are in a directory.
struct Plain {
    dir: PathBuf,
    infos: Mutex<BTreeMap<StorePath, PathInfo>>,
    realisations: Mutex<BTreeMap<String, WireRealisation>>,
    generation: AtomicUsize,
    /// Calls of `infos`.
    queries: AtomicUsize,
}

impl Plain {
    fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        Self {
            dir: dir.to_path_buf(),
            infos: Mutex::default(),
            realisations: Mutex::default(),
            generation: AtomicUsize::new(1),
            queries: AtomicUsize::new(0),
        }
    }
    fn add(&self, (info, nar): &(PathInfo, Vec<u8>)) {
        let target = self.dir.join(info.path.base_name());
        understory::local::restore::restore_nar(
            &mut &nar[..],
            &target,
            understory::nar::HashRequest::None,
            &|| false,
        )
        .unwrap();
        self.infos
            .lock()
            .unwrap()
            .insert(info.path.clone(), info.clone());
        self.generation.fetch_add(1, Ordering::Relaxed);
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
            id: Some(self.dir.display().to_string()),
            generation: Some(self.generation.load(Ordering::Relaxed) as u64),
        })
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        self.queries.fetch_add(1, Ordering::Relaxed);
        let infos = self.infos.lock().unwrap();
        Ok(paths
            .iter()
            .map(|path| infos.get(path).cloned().map(Arc::new))
            .collect())
    }
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        let infos = self.infos.lock().unwrap();
        Ok(paths.iter().map(|path| infos.contains_key(path)).collect())
    }
    fn all_paths(&self) -> Result<Vec<StorePath>> {
        Ok(self.infos.lock().unwrap().keys().cloned().collect())
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        let infos = self.infos.lock().unwrap();
        let refer = infos.values().filter(|i| i.references.contains(path));
        Ok(refer.map(|info| info.path.clone()).collect())
    }
    fn valid_derivers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>> {
        Ok(BTreeSet::new())
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        let infos = self.infos.lock().unwrap();
        Ok(infos.keys().find(|p| p.hash_part() == hash_part).cloned())
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        Ok(self.realisations.lock().unwrap().get(&id.id()).cloned())
    }
}

#[test]
fn what_is_copied_in_goes_below_and_is_seen_though_it_was_looked_up_before() {
    let Some(w) = World::castore() else { return };
    let client = w.client();
    let one = archive("one", "1", &[]);
    let two = archive("two", "2", &[&one.0.path]);
    assert!(!w.merged(&one.0.path).exists(), "overlayfs remembers this");
    let error = add(&*client, &two, UNSIGNED).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{}' is not valid", one.0.path)
    );
    add(&*client, &one, UNSIGNED).unwrap();
    assert_eq!(
        std::fs::read(w.merged(&one.0.path).join("file")).unwrap(),
        b"1"
    );
    add(&*client, &two, UNSIGNED).unwrap();
    for path in [&one.0.path, &two.0.path] {
        assert!(w.store().is_valid(path).unwrap());
        assert!(client.is_valid(path).unwrap());
    }
    assert_eq!(w.upper_names(), BTreeSet::new());

    // What refers to something of the upper cannot go below it.
    let local = add_text(&*client, "local", "text", &[&two.0.path]).unwrap();
    assert_eq!(w.upper_names(), [local.path.base_name().to_owned()].into());
    let three = archive("three", "3", &[&local.path, &one.0.path]);
    add(&*client, &three, UNSIGNED).unwrap();
    assert!(!w.store().is_valid(&three.0.path).unwrap());
    assert!(w.upper(&three.0.path).join("file").exists());
    let found = info_of(&*client, &three.0.path).unwrap();
    assert_eq!(found.references, three.0.references);
    assert_eq!(found.nar_hash, three.0.nar_hash);
    assert_eq!(client.referrers(&one.0.path).unwrap().len(), 2);
    let part = three.0.path.hash_part();
    assert_eq!(
        client.path_from_hash_part(part).unwrap(),
        Some(three.0.path.clone())
    );
    // Canonical, and no lock is left.
    let file = w.upper(&three.0.path).join("file").metadata().unwrap();
    assert_eq!(
        (file.permissions().mode() & 0o7777, file.mtime()),
        (0o444, 1)
    );
    let mut again = Vec::new();
    client.nar(&three.0.path).unwrap()(&mut again).unwrap();
    assert_eq!(again, three.1);
    let mut again = Vec::new();
    client.nar(&two.0.path).unwrap()(&mut again).unwrap();
    assert_eq!(again, two.1);
}

#[test]
fn a_publication_by_anybody_is_seen_through_the_overlay_at_once() {
    let Some(w) = World::castore() else { return };
    let (info, nar) = archive("late", "x", &[]);
    assert!(!w.merged(&info.path).exists());
    let owner = w.store().temp_root_owner().unwrap();
    understory::add::add_nar(
        w.store(),
        &owner,
        info.clone(),
        &mut BufReader::new(&nar[..]),
        Default::default(),
    )
    .unwrap();
    assert!(w.merged(&info.path).join("file").exists());
}

#[test]
fn nothing_is_left_of_what_lies_about_itself() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let (good, nar) = archive("liar", "text", &[]);
    let mut other = good.clone();
    other.nar_hash = NarHash([7; 32]);
    let error = add(&*client, &(other, nar.clone()), UNSIGNED).unwrap_err();
    let path = format!("/nix/store/{}", good.path);
    assert!(
        error
            .to_string()
            .starts_with(&format!("hash mismatch importing path '{path}';")),
        "{error}"
    );
    let mut other = good.clone();
    other.nar_size += 1;
    let error = add(&*client, &(other, nar.clone()), UNSIGNED).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("size mismatch importing path"),
        "{error}"
    );
    let cut = nar[..nar.len() - 9].to_vec();
    add(&*client, &(good.clone(), cut), UNSIGNED).unwrap_err();
    let mut lonely = good.clone();
    lonely.references = [archive("absent", "", &[]).0.path].into();
    let error = add(&*client, &(lonely, nar.clone()), UNSIGNED).unwrap_err();
    assert!(
        error.to_string().ends_with("-absent' is not valid"),
        "{error}"
    );
    assert!(!w.upper(&good.path).exists());
    let strict = AddOptions {
        check_signatures: true,
        ..UNSIGNED
    };
    let error = add(&*client, &(good.clone(), nar.clone()), strict).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot add path '{path}' because it lacks a signature by a trusted key")
    );
    let good_name = good.path.base_name().to_owned();
    add(&*client, &(good, nar), UNSIGNED).unwrap();
    assert_eq!(w.upper_names(), [good_name].into());
    w.no_whiteouts();
}

#[test]
fn a_trusted_client_brings_its_own_keys() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let key = SecretKey::generate("theirs").unwrap();
    let (mut info, nar) = archive("signed", "text", &[]);
    info.ca = None;
    info.sign(&StoreDir::default(), &key);
    let signed = (info, nar);
    let choice = SetOptions {
        overrides: BTreeMap::from([(
            b"trusted-public-keys".to_vec(),
            key.public().to_string().into_bytes(),
        )]),
        ..SetOptions::default()
    };
    let strict = AddOptions {
        check_signatures: true,
        ..UNSIGNED
    };
    let untrusted = ClientInfo {
        trusted: false,
        ..CLIENT
    };
    let untrusted = w.overlay.as_ref().unwrap().connect(&untrusted).unwrap();
    untrusted.set_options(&choice).unwrap();
    let error = add(&*untrusted, &signed, strict).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot add path '/nix/store/{}' because it lacks a signature by a trusted key",
            signed.0.path
        )
    );
    let trusted = w.client();
    trusted.set_options(&choice).unwrap();
    add(&*trusted, &signed, strict).unwrap();
    assert!(trusted.is_valid(&signed.0.path).unwrap());
}

#[test]
fn dumps_of_all_methods_small_and_large() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let large = vec![b'x'; (32 << 20) + 5];
    let none = BTreeSet::new();
    for contents in [&b"small"[..], &large] {
        let mut nar = understory_nix::nar::Writer::new(Vec::new());
        nar.file(None, true, contents.len() as u64).unwrap();
        nar.contents(contents).unwrap();
        let nar = nar.finish().unwrap();
        for (method, algorithm) in [
            (ContentAddressMethod::Nar, HashAlgorithm::Sha256),
            (ContentAddressMethod::Nar, HashAlgorithm::Sha1),
            (ContentAddressMethod::Git, HashAlgorithm::Sha1),
            (ContentAddressMethod::Flat, HashAlgorithm::Sha512),
            (ContentAddressMethod::Text, HashAlgorithm::Sha256),
        ] {
            let how = AddMethod { method, algorithm };
            let is_flat = matches!(
                method,
                ContentAddressMethod::Flat | ContentAddressMethod::Text
            );
            let mut dump: &[u8] = if is_flat { contents } else { &nar };
            let name = format!("{}-{}", algorithm.name(), contents.len());
            let info = client
                .add_dump(&name, &how, &none, false, &mut dump, &Silent)
                .unwrap();
            assert!(dump.is_empty());
            assert!(info.is_content_addressed(&StoreDir::default()));
            assert!(info.registration_time > 0);
            let file = w.upper(&info.path).metadata().unwrap();
            assert_eq!(file.len(), contents.len() as u64, "{how:?}");
            let mode = if is_flat { 0o444 } else { 0o555 };
            assert_eq!(
                (file.permissions().mode() & 0o7777, file.mtime()),
                (mode, 1)
            );
            let mut out = Vec::new();
            client.nar(&info.path).unwrap()(&mut out).unwrap();
            assert_eq!(
                Hash::of(HashAlgorithm::Sha256, &out),
                info.nar_hash.to_hash()
            );
            // Once more writes nothing.
            let inode = file.ino();
            let mut dump: &[u8] = if is_flat { contents } else { &nar };
            let again = client
                .add_dump(&name, &how, &none, false, &mut dump, &Silent)
                .unwrap();
            assert_eq!(again, info);
            assert_eq!(w.upper(&info.path).metadata().unwrap().ino(), inode);
        }
    }
    assert!(w.upper_names().iter().all(|name| !name.starts_with("tmp-")));
}

#[test]
fn row_04_a_reference_that_is_valid_only_below() {
    let Some(w) = World::castore() else { return };
    let leaf = w.below("leaf", "leaf", &[]);
    let middle = w.below("middle", "middle", &[&leaf]);
    let client = w.client();
    let info = add_text(&*client, "above", "of middle", &[&middle]).unwrap();
    assert_eq!(info.references, [middle.clone()].into());
    assert_eq!(
        client.referrers(&middle).unwrap(),
        [info.path.clone()].into()
    );
    // What is nowhere is still an error, in Nix's words, and leaves nothing.
    let absent = archive("absent", "", &[]).0.path;
    let error = add_text(&*client, "bad", "text", &[&absent]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
    assert_eq!(w.upper_names(), [info.path.base_name().to_owned()].into());
}

#[test]
fn row_05_and_17_a_lower_object_is_repaired_by_a_fresh_upper_copy() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let leaf = archive("leaf", "leaf", &[]);
    let top = archive("top", "what it should be", &[&leaf.0.path]);
    lowers[0].add(&leaf);
    lowers[0].add(&top);
    let client = w.client();
    let below = lowers[0].dir.join(top.0.path.base_name());
    std::fs::write(below.join("file"), b"damaged").unwrap();
    std::fs::write(below.join("more"), b"must not show through").unwrap();
    assert_eq!(
        std::fs::read(w.merged(&top.0.path).join("file")).unwrap(),
        b"damaged"
    );
    add(&*client, &top, REPAIR).unwrap();
    assert_eq!(
        std::fs::read(w.merged(&top.0.path).join("file")).unwrap(),
        b"what it should be"
    );
    assert!(!w.merged(&top.0.path).join("more").exists());
    assert!(w.upper(&top.0.path).join("file").exists());
    w.no_whiteouts();
    let mut nar = Vec::new();
    client.nar(&top.0.path).unwrap()(&mut nar).unwrap();
    assert_eq!(nar, top.1);
    // Again, over an upper copy.
    add(&*client, &top, REPAIR).unwrap();
    assert!(!w.merged(&top.0.path).join("more").exists());
    assert!(w.upper_names().iter().all(|name| !name.starts_with("tmp-")));
}

#[test]
fn row_06_signatures_of_a_lower_only_path() {
    let Some(w) = World::castore() else { return };
    let leaf = w.below("leaf", "leaf", &[]);
    let top = w.below("top", "top", &[&leaf]);
    let client = w.client();
    let key = understory_nix::SecretKey::generate("test-1").unwrap();
    let signature: BTreeSet<Signature> = [key.sign(b"anything")].into();
    client.add_signatures(&top, &signature).unwrap();
    assert_eq!(info_of(&*client, &top).unwrap().signatures, signature);
    assert!(
        w.store()
            .path(&top)
            .unwrap()
            .unwrap()
            .info
            .signatures
            .is_empty()
    );
    let absent = archive("absent", "", &[]).0.path;
    let error = client.add_signatures(&absent, &signature).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
}

#[test]
fn row_07_outputs_of_a_derivation_that_only_the_lower_knows() {
    let Some(w) = World::castore() else { return };
    let text = br#"Derive([("out","/nix/store/zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed","sha256","ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")],[],[],"builtin","builtin:fetchurl",[],[("out","/nix/store/zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed")])"#;
    let text = String::from_utf8(text.to_vec()).unwrap();
    // The path that this output really has.
    let ca = understory_nix::ContentAddress {
        method: ContentAddressMethod::Flat,
        hash: Hash::of(HashAlgorithm::Sha256, b"abc"),
    };
    let name = understory_nix::StorePathName::new("fixed").unwrap();
    let output = ca
        .make_path(
            &StoreDir::default(),
            &name,
            &understory_nix::content_address::References {
                others: BTreeSet::new(),
                itself: false,
            },
        )
        .unwrap();
    let text = text.replace("zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed", output.base_name());
    let drv = w.below("fixed.drv", &text, &[]);
    let client = w.client();
    let map = client.derivation_output_map(&drv).unwrap();
    assert_eq!(map, [("out".to_owned(), Some(output.clone()))].into());
    assert_eq!(
        client.valid_derivers(&output).unwrap(),
        [drv.clone()].into()
    );
    let absent = archive("absent.drv", "", &[]).0.path;
    let error = client.derivation_output_map(&absent).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
    // Referred to from above it comes into U with its outputs.
    add_text(&*client, "above", "of it", &[&drv]).unwrap();
    assert_eq!(client.valid_derivers(&output).unwrap(), [drv].into());
}

#[test]
fn row_08_clients_see_all_paths_of_both() {
    let Some(w) = World::castore() else { return };
    let lower = w.below("lower", "text", &[]);
    let client = w.client();
    let upper = add_text(&*client, "upper", "text", &[]).unwrap().path;
    let all: BTreeSet<StorePath> = client.all_valid_paths().unwrap().into_iter().collect();
    assert_eq!(all, [lower, upper].into());
}

#[test]
fn row_09_realisations_of_both() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let leaf = archive("leaf", "leaf", &[]);
    let top = archive("top", "top", &[&leaf.0.path]);
    let other = archive("other", "other", &[]);
    for path in [&leaf, &top, &other] {
        lowers[0].add(path);
    }
    let id = DrvOutput::Hash(format!("sha256:{}!out", "0".repeat(64)));
    let realisation = |path: &StorePath, signature: &str| WireRealisation {
        id: id.clone(),
        out_path: path.clone(),
        signatures: [signature.to_owned()].into(),
    };
    let below = realisation(&top.0.path, "key-1:below");
    lowers[0]
        .realisations
        .lock()
        .unwrap()
        .insert(id.id(), below.clone());
    let client = w.client();
    assert_eq!(client.realisation(&id).unwrap(), Some(below));
    let error = client
        .register_realisation(&realisation(&other.0.path, "key-1:x"))
        .unwrap_err();
    assert!(
        error.to_string().contains("already have another one"),
        "{error}"
    );
    client
        .register_realisation(&realisation(&top.0.path, "key-1:above"))
        .unwrap();
    let found = client.realisation(&id).unwrap().unwrap();
    assert_eq!(found.out_path, top.0.path);
    assert_eq!(found.signatures.len(), 2, "{found:?}");
}

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
fn row_15_a_closure_is_synced_level_by_level() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    // Ten levels of twenty paths, each of which refers to all of the level below.
    let mut level: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    for depth in 0..10 {
        let references: Vec<StorePath> = level.iter().map(|(i, _)| i.path.clone()).collect();
        let references: Vec<&StorePath> = references.iter().collect();
        level = (0..20)
            .map(|n| archive(&format!("p-{depth}-{n}"), "x", &references))
            .collect();
        level.iter().for_each(|path| lowers[0].add(path));
    }
    let client = w.client();
    lowers[0].queries.store(0, Ordering::Relaxed);
    add_text(&*client, "top", "text", &[&level[0].0.path]).unwrap();
    let queries = lowers[0].queries.load(Ordering::Relaxed);
    assert!(queries <= 14, "{queries} queries for ten levels");
    lowers[0].queries.store(0, Ordering::Relaxed);
    add_text(&*client, "again", "text", &[&level[0].0.path]).unwrap();
    assert!(lowers[0].queries.load(Ordering::Relaxed) <= 3);
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
fn several_lowers_answer_in_turn() {
    let Some((w, lowers)) = World::plain(2) else {
        return;
    };
    let one = archive("one", "1", &[]);
    let two = archive("two", "2", &[]);
    lowers[0].add(&one);
    lowers[1].add(&two);
    let client = w.client();
    let both = [one.0.path.clone(), two.0.path.clone()];
    let absent = archive("absent", "", &[]).0.path;
    let asked = [both[0].clone(), absent, both[1].clone()];
    assert_eq!(client.valid_paths(&asked, false, &Silent).unwrap(), both);
    add_text(&*client, "above", "text", &[&both[0], &both[1]]).unwrap();
    add(&*client, &archive("copied", "x", &[&both[1]]), UNSIGNED).unwrap();
    assert_eq!(client.referrers(&both[1]).unwrap().len(), 2);
    // A lower that is not our castore is never written to.
    assert_eq!(std::fs::read_dir(&lowers[0].dir).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(&lowers[1].dir).unwrap().count(), 1);
}

#[test]
fn leftovers_above_and_below_are_in_nobodys_way() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let path = archive("leftover", "text", &[]);
    // In the lower's directory, and not valid there: an addition under way, or one that was interrupted.
    let below = lowers[0].dir.join(path.0.path.base_name());
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join("half"), b"").unwrap();
    add(&*client, &path, UNSIGNED).unwrap();
    assert!(!w.merged(&path.0.path).join("half").exists());
    assert!(w.merged(&path.0.path).join("file").exists());
    w.no_whiteouts();
    // In the upper.
    let path = archive("upper-leftover", "text", &[]);
    std::fs::create_dir(w.merged(&path.0.path)).unwrap();
    std::fs::write(w.merged(&path.0.path).join("half"), b"").unwrap();
    add(&*client, &path, UNSIGNED).unwrap();
    assert!(!w.upper(&path.0.path).join("half").exists());
    w.no_whiteouts();
}

#[test]
fn a_leftover_of_the_upper_does_not_hide_what_goes_below() {
    let Some(w) = World::castore() else { return };
    let path = archive("leftover", "text", &[]);
    std::fs::create_dir(w.merged(&path.0.path)).unwrap();
    std::fs::write(w.merged(&path.0.path).join("half"), b"").unwrap();
    add(&*w.client(), &path, UNSIGNED).unwrap();
    assert!(w.store().is_valid(&path.0.path).unwrap());
    assert!(!w.upper(&path.0.path).exists());
    assert_eq!(
        std::fs::read(w.merged(&path.0.path).join("file")).unwrap(),
        b"text"
    );
}

#[test]
fn logs_are_where_nix_has_them() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let drv = archive("some.drv", "", &[]).0.path;
    let client = w.client();
    client.add_build_log(&drv, &mut &b"line\n"[..]).unwrap();
    client.add_build_log(&drv, &mut &b"another"[..]).unwrap();
    let (folder, name) = drv.base_name().split_at(2);
    let file = w.dir.path().join("root/nix/var/log/nix/drvs").join(folder);
    let file = file.join(format!("{name}.bz2"));
    assert_eq!(&std::fs::read(&file).unwrap()[..3], b"BZh");
    let overlay = w.overlay.as_ref().unwrap();
    let mut text = String::new();
    overlay
        .build_log(&drv)
        .unwrap()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "line\n");
    let other = archive("other.drv", "", &[]).0.path;
    assert!(overlay.build_log(&other).unwrap().is_none());
    assert!(file.as_os_str().as_bytes().ends_with(b".drv.bz2"));
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
