//! An overlay over a lower store that must not be listed.

use super::common::overlay;
use rustix::fs::{CWD, FileType, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use understory::Result;
use understory::daemon::{AddOptions, Backend, Operations, Reporter, Silent};
use understory::local::restore::restore_nar;
use understory::local::{Database, OpenMode};
use understory::mount::OverlayMount;
use understory::nar::HashRequest;
use understory::overlay::lower::Identity;
use understory::overlay::{Lower, Overlay};
use understory::settings::Settings;
use understory::store::GcReport;
use understory_nix::worker::{
    DrvOutput, GcActionKind, GcRequest, LogMessage, Verbosity, WireRealisation,
};
use understory_nix::{PathInfo, StoreDir, StorePath};

pub(super) const UNSIGNED: AddOptions = AddOptions {
    repair: false,
    check_signatures: false,
};

/// A path info and its archive.
pub(super) type Object = (PathInfo, Vec<u8>);

/// A lower store whose infos are in memory. A listing of it fails the test: nothing here may need one.
pub(super) struct Plain {
    pub(super) dir: PathBuf,
    pub(super) infos: Mutex<BTreeMap<StorePath, PathInfo>>,
}

impl Plain {
    pub(super) fn add(&self, (info, nar): &Object) {
        let target = self.dir.join(info.path.base_name());
        restore_nar(&mut &nar[..], &target, HashRequest::None, &|| false).unwrap();
        self.infos
            .lock()
            .unwrap()
            .insert(info.path.clone(), info.clone());
    }
    pub(super) fn forget(&self, path: &StorePath) {
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
pub(super) struct Heard(pub(super) Mutex<String>);

impl Heard {
    pub(super) fn take(&self) -> String {
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
pub(super) struct World {
    pub(super) overlay: Option<Overlay>,
    pub(super) mount: Option<OverlayMount>,
    pub(super) lower: Arc<Plain>,
    pub(super) dir: tempfile::TempDir,
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
    pub(super) fn new() -> Option<Self> {
        Self::with(Settings::default())
    }
    pub(super) fn with(settings: Settings) -> Option<Self> {
        let dir = overlay::root_dir()?;
        let lower = Arc::new(Plain {
            dir: dir.path().join("lower"),
            infos: Mutex::default(),
        });
        std::fs::create_dir(&lower.dir).unwrap();
        let mount = overlay::mount(dir.path(), vec![lower.dir.clone()]);
        let mut world = Self {
            overlay: None,
            mount: Some(mount),
            lower,
            dir,
        };
        world.open(settings);
        Some(world)
    }
    pub(super) fn open(&mut self, settings: Settings) {
        self.overlay = None;
        let options = overlay::options(self.dir.path(), vec![self.lower.clone()], settings);
        self.overlay = Some(Overlay::open(options).unwrap());
    }
    pub(super) fn client(&self) -> Box<dyn Operations> {
        self.overlay
            .as_ref()
            .unwrap()
            .connect(&overlay::CLIENT)
            .unwrap()
    }
    /// Adds to the upper by a client that leaves.
    pub(super) fn add(&self, (info, nar): &Object) {
        self.client()
            .add_nar(info.clone(), &mut &nar[..], UNSIGNED, &Silent)
            .unwrap();
    }
    pub(super) fn state(&self) -> PathBuf {
        self.dir.path().join("root/nix/var/nix")
    }
    pub(super) fn root(&self, name: &str, path: &StorePath) {
        let target = StoreDir::default().print(path);
        symlink(target, self.state().join("gcroots").join(name)).unwrap();
    }
    pub(super) fn upper(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join("upper").join(name)
    }
    pub(super) fn merged(&self, path: &StorePath) -> PathBuf {
        overlay::merged(self.dir.path(), path)
    }
    pub(super) fn rows(&self) -> Vec<StorePath> {
        Database::open(&self.state(), &StoreDir::default(), OpenMode::ReadOnly)
            .unwrap()
            .all_paths()
            .unwrap()
    }
    /// What is in the upper directory, without what is always there. Whiteouts fail the test.
    pub(super) fn upper_names(&self) -> BTreeSet<String> {
        let names = overlay::upper_names(self.dir.path());
        for name in &names {
            let found = self.upper(name).symlink_metadata().unwrap();
            assert!(!found.file_type().is_char_device(), "whiteout: {name}");
        }
        names
    }
    pub(super) fn collect(
        &self,
        action: GcActionKind,
        paths: Option<&[&StorePath]>,
    ) -> (GcReport, String) {
        let heard = Heard::default();
        let report = self
            .client()
            .collect_garbage(&request(action, paths), &heard)
            .unwrap();
        (report, heard.take())
    }
    pub(super) fn delete_dead(&self) -> (GcReport, String) {
        self.collect(GcActionKind::DeleteDead, None)
    }
    pub(super) fn verify(&self, repair: bool) -> (bool, String) {
        let heard = Heard::default();
        let errors = self.client().verify(true, repair, &heard).unwrap();
        (errors, heard.take())
    }
    pub(super) fn whiteout(&self, name: &str) {
        let place = self.upper(name);
        rustix::fs::mknodat(CWD, &place, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }
}

pub(super) fn request(action: GcActionKind, paths: Option<&[&StorePath]>) -> GcRequest {
    GcRequest {
        action,
        paths: paths.map(|paths| paths.iter().copied().cloned().collect()),
        delete_referrers: false,
        ignore_liveness: false,
        freed_bytes_max: u64::MAX,
    }
}

pub(super) fn read(place: &Path) -> String {
    std::fs::read_to_string(place.join("file")).unwrap()
}
