//! The store: path infos over a castore.
//!
//! One directory holds everything:
//!
//! | Name | What |
//! |---|---|
//! | `format` | `understory store 1`; written last when a store is made |
//! | `castore/` | the content |
//! | `db.sqlite` | path infos, realisations, settings |
//! | `generation` | keeps caches of rows coherent between processes |
//! | `gc.lock` | held exclusively by a collection, shared while temporary roots are added |
//! | `temproots/` | temporary roots, one locked file per client |
//! | `gcroots/` | permanent roots: symlinks into the store, `auto/` for indirect ones |
//! | `log/` | build logs |
//! | `overlays/` | overlay stores that stand on this one, whose needs are kept |
//!
//! Several processes may have it open. A path is valid when its row is committed, and that happens
//! only after its content is durable and all its references are valid. What [`Store::publish`]
//! acknowledged survives a crash; what it did not is invisible.
//!
//! Formats: `docs/disk-format.md`.
//!
//! Cost: opening reads a few small files and pages, whatever the number of paths. [`Store::path`] is
//! one hash lookup and one atomic load when the row is in memory ([`ROW_CACHE_BYTES_MAX`]), one
//! SQLite point lookup otherwise. A publication costs one sync of the castore and one of the
//! database, whatever the number of paths in it.

mod check;
mod create;
pub(crate) mod db;
mod derivations;
mod gc;
mod generation;
mod log;
mod metrics;
mod overlays;
mod publish;
mod queries;
mod reclaim;
mod repair;
mod reserve;
mod roots;
mod stats;

pub use check::{CheckFinding, CheckProgress, CheckReport};
pub use log::BUILD_LOG_BYTES_MAX;
pub use reclaim::Keepers;
pub use repair::Repaired;
pub use roots::TempRootOwner;
pub use stats::StoreStats;
pub use understory_castore::store::{CollectOptions, CollectReport, CollectStep, KeptPacks};

use crate::{Error, Result};
use db::{Database, lock};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use understory_castore::{Castore, Masks, Node, OpenOptions, Writer};
use understory_nix::{PathInfo, StoreDir, StorePath};

/// Bytes of decoded rows kept in memory: about 20,000 paths with a dozen references each.
pub const ROW_CACHE_BYTES_MAX: u64 = 16 << 20;

/// What the file `format` holds.
const FORMAT: &str = "understory store 1\n";
/// What it starts with in every version.
const FORMAT_PREFIX: &str = "understory store ";

/// How to open a store.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// The castore's options; `read_only` holds for the whole store.
    pub castore: OpenOptions,
}

/// A path info with its root node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPath {
    /// Row number: grows with each registration, never used twice.
    pub id: u64,
    /// The metadata.
    pub info: PathInfo,
    /// The content.
    pub root: Node,
}

/// An open store. Cheap to clone, shared by threads.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    store_dir: StoreDir,
    id: String,
    castore: Castore,
    db: Database,
    rows: Cache<StorePath, CachedRow, RowWeighter>,
    observers: Mutex<Vec<Arc<dyn Observer>>>,
    writer: Mutex<WriterWatch>,
}

/// Notices when the castore's writer failed and was replaced.
#[derive(Default)]
struct WriterWatch {
    last: Option<Arc<Writer>>,
    was_replaced: bool,
}

/// A row and the generation under which it was read.
#[derive(Clone)]
struct CachedRow {
    generation: u64,
    row: Arc<StoredPath>,
}

#[derive(Clone)]
struct RowWeighter;

impl Weighter<StorePath, CachedRow> for RowWeighter {
    fn weight(&self, key: &StorePath, value: &CachedRow) -> u64 {
        // Allocations are about as long as the texts; the rest is the structs, the tree's nodes
        // and the cache's own entry.
        const FIXED: usize = 400;
        let info = &value.row.info;
        let references: usize = info
            .references
            .iter()
            .map(|path| path.base_name().len() + 32)
            .sum();
        let signatures: usize = info.signatures.iter().map(|s| s.as_str().len() + 32).sum();
        (FIXED + 2 * key.base_name().len() + references + signatures) as u64
    }
}

/// A realisation: which path a derivation output is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realisation {
    /// `sha256:<hex>!<output>`, or `<drv base name>!<output>` in the form of Nix 2.35.
    pub id: String,
    /// The output's path.
    pub out_path: StorePath,
    /// Signatures, verbatim.
    pub signatures: BTreeSet<String>,
}

/// What a garbage collection is asked to do: Nix's `GCOptions`.
#[derive(Debug, Clone)]
pub enum GcAction {
    /// Names what is alive.
    ReturnLive,
    /// Names what is dead.
    ReturnDead,
    /// Deletes what is dead, at most about this many NAR bytes.
    DeleteDead {
        /// Stops when more is freed.
        freed_bytes_max: u64,
    },
    /// Deletes these, or fails if one is alive.
    DeleteSpecific {
        /// The paths.
        paths: BTreeSet<StorePath>,
    },
    /// Deletes some of these, as the protocol's feature `delete-dead-specific-referrers` has it.
    DeleteAmong {
        /// The paths.
        paths: BTreeSet<StorePath>,
        /// What refers to them goes too.
        referrers: bool,
        /// What is alive, or needed by what stays, is left alone; otherwise it is an error.
        skip_alive: bool,
        /// Stops when more NAR bytes are freed.
        freed_bytes_max: u64,
    },
}

/// What a garbage collection did.
#[derive(Debug, Clone, Default)]
pub struct GcReport {
    /// Live, dead or deleted paths, by the action.
    pub paths: BTreeSet<StorePath>,
    /// NAR bytes of deleted paths.
    pub freed_bytes: u64,
}

/// Is told of each publication or deletion by this process, after the commit.
pub trait Observer: Send + Sync {
    /// These paths have become valid and are durable.
    fn published(&self, paths: &[StorePath]);
    /// These paths are gone.
    fn deleted(&self, paths: &[StorePath]);
}

impl Store {
    /// Creates a store in `dir`, which is made if it is not there and must otherwise be empty. A
    /// creation that was interrupted is finished by the next one.
    ///
    /// # Errors
    /// There is one, or something else; I/O.
    pub fn create(dir: &Path, store_dir: &StoreDir) -> Result<()> {
        create::create(dir, store_dir)
    }

    /// Opens the store in `dir`.
    ///
    /// # Errors
    /// None there, unknown format, not permitted.
    pub fn open(dir: &Path, options: &StoreOptions) -> Result<Self> {
        check_format(dir)?;
        let read_only = options.castore.read_only;
        let db_path = dir.join("db.sqlite");
        let generation_path = dir.join("generation");
        let db = if read_only {
            Database::open_read_only(&db_path, &generation_path)?
        } else {
            reserve::open_with_room(dir, || Database::open(&db_path, &generation_path))?
        };
        let setting = |name: &str| {
            db.setting(name)?.ok_or_else(|| {
                Error::corrupt(format!("{} has no setting `{name}`", db_path.display()))
            })
        };
        let store_dir = StoreDir::new(&setting("store_dir")?).map_err(|e| {
            Error::corrupt(format!("{}: setting `store_dir`: {e}", db_path.display()))
        })?;
        let id = setting("store_id")?;
        let castore = Castore::open(&dir.join("castore"), &options.castore)?;
        // An average entry weighs about 800 bytes.
        let rows = Cache::with_weighter(
            (ROW_CACHE_BYTES_MAX / 800) as usize,
            ROW_CACHE_BYTES_MAX,
            RowWeighter,
        );
        let inner = Arc::new(Inner {
            dir: dir.to_path_buf(),
            store_dir,
            id,
            castore,
            db,
            rows,
            observers: Mutex::default(),
            writer: Mutex::default(),
        });
        crate::metrics::register(&inner);
        let store = Self { inner };
        if !read_only {
            store.reserve_room();
        }
        Ok(store)
    }

    /// The directory it lies in.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }
    /// The logical store directory.
    pub fn store_dir(&self) -> &StoreDir {
        &self.inner.store_dir
    }
    /// 32 hexadecimal digits that no other store has.
    pub fn id(&self) -> &str {
        &self.inner.id
    }
    /// Its castore.
    pub fn castore(&self) -> &Castore {
        &self.inner.castore
    }
    /// What the castore should mask in the contents of an object: the hash parts of `path`, if it is
    /// known, and of `references`, and whatever follows the store directory like one. A rebuilt object,
    /// in which these alone are new, then costs next to nothing.
    pub fn masks(&self, path: Option<&StorePath>, references: &BTreeSet<StorePath>) -> Arc<Masks> {
        let known = references.iter().chain(path).map(|path| {
            let mut hash_part = [0; 32];
            hash_part.copy_from_slice(path.hash_part().as_bytes());
            hash_part
        });
        let dir = self.inner.store_dir.as_str().as_bytes();
        Arc::new(Masks::new(dir, known))
    }
    /// The castore's writer. Whoever stores content that is to be published must take it from here:
    /// when one fails and is replaced, publications are verified before they are acknowledged, since
    /// the failed one may have lost content that it had taken.
    ///
    /// # Errors
    /// The store is open read-only, I/O.
    pub fn writer(&self) -> Result<Arc<Writer>> {
        self.check_writable()?;
        let writer = self.inner.castore.writer()?;
        let mut watch = lock(&self.inner.writer);
        if watch
            .last
            .as_ref()
            .is_none_or(|last| !Arc::ptr_eq(last, &writer))
        {
            watch.was_replaced |= watch.last.is_some();
            watch.last = Some(writer.clone());
        }
        Ok(writer)
    }
    /// True if nothing can be changed through this handle.
    pub fn is_read_only(&self) -> bool {
        self.inner.db.is_read_only()
    }
    /// Adds an observer for as long as the process lives.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        lock(&self.inner.observers).push(observer);
    }

    fn db(&self) -> &Database {
        &self.inner.db
    }

    /// `path '…' is not valid`, in Nix's words.
    fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.inner.store_dir.print(path)
        ))
    }

    fn tell_observers(&self, tell: impl Fn(&dyn Observer)) {
        let observers = lock(&self.inner.observers).clone();
        for observer in observers {
            tell(&*observer);
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::user(format!(
                "the store {} is open read-only",
                self.inner.dir.display()
            )));
        }
        Ok(())
    }
}

fn check_format(dir: &Path) -> Result<()> {
    let path = dir.join("format");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Err(Error::environment(format!("{} is not an understory store", dir.display()))
                .with_hint("the first `understory import`, `add` or `up` makes one; `--store DIR` names another"));
        }
        Err(error) => return Err(Error::io("reading", path, error)),
    };
    if text == FORMAT.as_bytes() {
        return Ok(());
    }
    match text.strip_prefix(FORMAT_PREFIX.as_bytes()) {
        Some(version) => Err(Error::environment(format!(
            "{} has format {}, this program knows format 1",
            dir.display(),
            String::from_utf8_lossy(version).trim()
        ))
        .with_hint("use a newer understory")),
        None => Err(Error::corrupt(format!(
            "{} does not hold a store's format",
            path.display()
        ))),
    }
}
