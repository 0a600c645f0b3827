//! Overlays over castores and over lower stores in memory, and what is added to them.

use super::common::overlay::{self, CLIENT, root_dir};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use understory::add::AddMethod;
use understory::daemon::{AddOptions, Backend, Operations, Silent};
use understory::mount::{LiveMount, LiveOptions, OverlayMount};
use understory::overlay::lower::{CastoreLower, Identity};
use understory::overlay::{Lower, Options, Overlay};
use understory::settings::Settings;
use understory::{Result, Store, StoreOptions};
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{ContentAddressMethod, HashAlgorithm, PathInfo, StoreDir, StorePath};

pub(super) const UNSIGNED: AddOptions = AddOptions {
    repair: false,
    check_signatures: false,
};

pub(super) const REPAIR: AddOptions = AddOptions {
    repair: true,
    check_signatures: false,
};

/// A castore with its mount, an overlay over it and over other lowers.
pub(super) struct World {
    // Dropped in this order.
    pub(super) overlay: Option<Overlay>,
    pub(super) merged: Option<OverlayMount>,
    pub(super) live: Option<LiveMount>,
    pub(super) castore: Option<Store>,
    pub(super) lowers: Vec<Arc<dyn Lower>>,
    pub(super) dir: tempfile::TempDir,
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
    pub(super) fn castore() -> Option<Self> {
        Self::new(true, Vec::new())
    }

    /// Over plain directories.
    pub(super) fn plain(count: usize) -> Option<(Self, Vec<Arc<Plain>>)> {
        let dir = root_dir()?;
        let plain: Vec<Arc<Plain>> = (0..count)
            .map(|number| Arc::new(Plain::new(&dir.path().join(format!("lower{number}")))))
            .collect();
        let lowers = plain.iter().map(|p| p.clone() as Arc<dyn Lower>).collect();
        let mut world = Self::mounted(dir, None, None, lowers);
        world.open().unwrap();
        Some((world, plain))
    }

    pub(super) fn new(castore: bool, more: Vec<Arc<dyn Lower>>) -> Option<Self> {
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

    pub(super) fn mounted(
        dir: tempfile::TempDir,
        live: Option<LiveMount>,
        castore: Option<Store>,
        lowers: Vec<Arc<dyn Lower>>,
    ) -> Self {
        let dirs = lowers.iter().map(|l| l.real_dir().to_path_buf()).collect();
        let merged = overlay::mount(dir.path(), dirs);
        Self {
            overlay: None,
            merged: Some(merged),
            live,
            castore,
            lowers,
            dir,
        }
    }

    pub(super) fn options(&self) -> Options {
        overlay::options(self.dir.path(), self.lowers.clone(), Settings::default())
    }

    pub(super) fn open(&mut self) -> Result<()> {
        self.overlay = None;
        self.overlay = Some(Overlay::open(self.options())?);
        Ok(())
    }

    pub(super) fn client(&self) -> Box<dyn Operations> {
        self.overlay.as_ref().unwrap().connect(&CLIENT).unwrap()
    }
    pub(super) fn store(&self) -> &Store {
        self.castore.as_ref().unwrap()
    }
    pub(super) fn upper(&self, path: &StorePath) -> PathBuf {
        self.dir.path().join("upper").join(path.base_name())
    }
    pub(super) fn merged(&self, path: &StorePath) -> PathBuf {
        overlay::merged(self.dir.path(), path)
    }
    /// What is in the upper directory, without what is always there.
    pub(super) fn upper_names(&self) -> BTreeSet<String> {
        overlay::upper_names(self.dir.path())
    }
    pub(super) fn no_whiteouts(&self) {
        for name in self.upper_names() {
            let found = self.dir.path().join("upper").join(&name);
            let found = found.symlink_metadata().unwrap();
            assert!(!found.file_type().is_char_device(), "whiteout: {name}");
        }
    }
    /// Publishes a file in the castore, as another client of it would.
    pub(super) fn below(&self, name: &str, text: &str, references: &[&StorePath]) -> StorePath {
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

pub(super) fn text_method() -> AddMethod {
    AddMethod {
        method: ContentAddressMethod::Text,
        algorithm: HashAlgorithm::Sha256,
    }
}

pub(super) fn add_text(
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

pub(super) fn add(
    client: &dyn Operations,
    (info, nar): &(PathInfo, Vec<u8>),
    options: AddOptions,
) -> Result<()> {
    client.add_nar(info.clone(), &mut &nar[..], options, &Silent)
}

pub(super) fn info_of(client: &dyn Operations, path: &StorePath) -> Option<PathInfo> {
    let mut found = None;
    client
        .with_path_info(path, &mut |info| found = Some(info.clone()))
        .unwrap();
    found
}

/// A lower store whose infos are in memory and whose objects are in a directory.
pub(super) struct Plain {
    pub(super) dir: PathBuf,
    pub(super) infos: Mutex<BTreeMap<StorePath, PathInfo>>,
    pub(super) realisations: Mutex<BTreeMap<String, WireRealisation>>,
    pub(super) generation: AtomicUsize,
    /// Calls of `infos`.
    pub(super) queries: AtomicUsize,
}

impl Plain {
    pub(super) fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        Self {
            dir: dir.to_path_buf(),
            infos: Mutex::default(),
            realisations: Mutex::default(),
            generation: AtomicUsize::new(1),
            queries: AtomicUsize::new(0),
        }
    }
    pub(super) fn add(&self, (info, nar): &(PathInfo, Vec<u8>)) {
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
