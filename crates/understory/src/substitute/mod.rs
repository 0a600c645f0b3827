//! Substitution: paths from binary caches (`https://`, `http://`, `file://`, `s3://`) and other stores (`unix://`,
//! `ssh-ng://`, `daemon`), several in the order of their priority.
//!
//! Knows nothing of layers: what it fetches goes to a [`Sink`], as a stream. The parts: [`files`] are what binary caches
//! are made of ([`http`], [`s3`], [`file`]), [`source`] is any store that has paths ([`binary_cache`], [`daemon`]),
//! [`substituter`] adds what the settings say of one, [`find`] decides who may provide what, [`plan`] walks closures and
//! [`schedule`] fetches and publishes them.
//!
//! Cost of a closure of n paths: one narinfo each, asked level by level and many at a time; one archive each, up to
//! `max-substitution-jobs` at a time; one publication (two syncs of the disk) for up to [`BATCH_PATHS_MAX`] paths, but
//! at least one in [`BATCH_AGE_MAX`]. Memory: the infos of the closure, and per archive the buffers of a connection and
//! a decompressor.

mod binary_cache;
mod cache;
mod cancel;
mod castore;
mod choice;
mod daemon;
mod fetch;
mod file;
mod files;
mod find;
mod http;
mod in_flight;
mod local;
mod plan;
mod s3;
mod schedule;
mod source;
mod substituter;
mod url;

pub use castore::CastoreSink;
pub use schedule::{BATCH_AGE_MAX, BATCH_PATHS_MAX};

use crate::daemon::Reporter;
use crate::settings::Settings;
use crate::{Error, Result};
use cache::InfoCache;
use cancel::watched;
use files::Context;
use http::{Http, HttpOptions};
use in_flight::InFlight;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::BufRead;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use substituter::{Key, Substituter};
use understory_nix::worker::{DrvOutput, Verbosity, WireRealisation};
use understory_nix::{ContentAddress, PathInfo, StoreDir, StorePath};

/// Substituters and clients that are remembered. More come only from trusted clients that invent ever new settings.
const KNOWN_MAX: usize = 256;

/// Takes what is substituted. Called from many threads.
pub trait Sink: Sync {
    /// A path's content, stored but not valid yet.
    type Content: Send + Clone;
    /// Those of `paths` that are valid in the store that is filled.
    fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>>;
    /// Reads exactly one NAR of `info` and stores its content, checking hash, size and `ca`. `bytes` is increased by
    /// what is read. Nothing is left behind when it fails.
    fn receive(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        bytes: &AtomicU64,
        reporter: &dyn Reporter,
    ) -> Result<Self::Content>;
    /// Makes paths valid, all together, references first; references are valid or among them. Visible on return. After
    /// an error of kind [`User`](crate::error::ErrorKind::User) each path is tried by itself.
    fn publish(&self, paths: Vec<(PathInfo, Self::Content)>) -> Result<()>;
    /// Registers what an output became; its path is valid.
    fn register(&self, realisation: &WireRealisation) -> Result<()>;
}

/// A path that a substituter offers.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Its metadata, as the substituter says it; checked against what was asked for and its signatures.
    pub info: Arc<PathInfo>,
    /// Bytes to download; 0 if unknown.
    pub download_size: u64,
    /// The substituter's URL.
    pub from: Arc<str>,
}

/// What became of a substitution.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Paths that are valid now and were not before.
    pub substituted: Vec<StorePath>,
    /// Paths (asked for, or references of them) that could not be had, and why: no substituter has it, or the last
    /// error.
    pub failed: BTreeMap<StorePath, Error>,
}

/// The substituters of a store, with their caches and connections. Threads share it.
pub struct Substituters {
    settings: Settings,
    list: Vec<Arc<Substituter>>,
    shared: Arc<Shared>,
}

/// What all clients share.
struct Shared {
    store_dir: StoreDir,
    /// Settings of the daemon, which clients start from.
    base: Settings,
    cache: Arc<InfoCache>,
    https: Mutex<HashMap<HttpOptions, Arc<Http>>>,
    known: Mutex<HashMap<Key, Arc<Substituter>>>,
    in_flight: Arc<InFlight>,
}

impl Shared {
    /// The HTTP client with these options.
    fn http(&self, options: &HttpOptions) -> Result<Arc<Http>> {
        let mut https = self.https.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(http) = https.get(options) {
            return Ok(http.clone());
        }
        let http = Arc::new(Http::new(options.clone())?);
        if https.len() >= KNOWN_MAX {
            https.clear();
        }
        https.insert(options.clone(), http.clone());
        Ok(http)
    }
    /// The substituter of that URL with these settings.
    fn substituter(&self, url: &str, settings: &Settings) -> Result<Arc<Substituter>> {
        let key = Key::new(url, settings);
        if let Some(known) = self.known().get(&key) {
            return Ok(known.clone());
        }
        let made = Arc::new(Substituter::new(&key, self)?);
        let mut known = self.known();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        Ok(known.entry(key).or_insert(made).clone())
    }
    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<Substituter>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Substituters {
    /// Reads the settings; nothing is contacted yet. What the substituters say is remembered in
    /// `cache_dir/binary-caches.sqlite`. A substituter of an unknown kind is warned about and left out.
    ///
    /// # Errors
    /// None at present.
    pub fn new(settings: &Settings, store_dir: &StoreDir, cache_dir: &Path) -> Result<Self> {
        let shared = Arc::new(Shared {
            store_dir: store_dir.clone(),
            base: settings.clone(),
            cache: Arc::new(InfoCache::new(cache_dir.join("binary-caches.sqlite"))),
            https: Mutex::default(),
            known: Mutex::default(),
            in_flight: Arc::default(),
        });
        Ok(Self::with(shared, settings.clone(), &|text| {
            tracing::warn!("{text}");
        }))
    }

    fn with(shared: Arc<Shared>, settings: Settings, warn: &dyn Fn(&str)) -> Self {
        let mut list: Vec<Arc<Substituter>> = Vec::new();
        let mut urls = HashSet::new();
        for url in settings.substituters.iter().filter(|_| settings.substitute) {
            if !urls.insert(url) {
                continue;
            }
            match shared.substituter(url, &settings) {
                Ok(substituter) => list.push(substituter),
                Err(error) => warn(&format!("ignoring substituter '{url}': {}", error.chain())),
            }
        }
        Self {
            settings,
            list,
            shared,
        }
    }

    /// The same with what a client has chosen: settings by Nix's names (`substituters`, `extra-substituters`,
    /// `trusted-public-keys`, `substitute`, …) as they come with SetOptions. What a client without trust may not
    /// choose is ignored, with a warning to `reporter`. Caches and connections are shared.
    ///
    /// # Errors
    /// None at present.
    pub fn for_client(
        self: &Arc<Self>,
        overrides: &BTreeMap<Vec<u8>, Vec<u8>>,
        trusted: bool,
        reporter: &dyn Reporter,
    ) -> Result<Arc<Self>> {
        let warn = |text: &str| reporter.say(Verbosity::Warn, &format!("warning: {text}"));
        let settings = choice::choose(&self.shared.base, overrides, trusted, &warn);
        Ok(Arc::new(Self::with(self.shared.clone(), settings, &warn)))
    }

    /// The settings that count, with what the client has chosen.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// True if there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Who offers these paths: the first substituter in order whose offer may be used. Asked in parallel, remembered
    /// for as long as the settings say. With `mass_query_only` substituters that do not want many questions are left
    /// out. Paths with a content address may come from a store with another directory. A substituter that cannot be
    /// reached is said to `reporter` and left out.
    ///
    /// # Errors
    /// Interrupted.
    pub fn query(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        mass_query_only: bool,
        reporter: &dyn Reporter,
    ) -> Result<HashMap<StorePath, Offer>> {
        if self.is_empty() || paths.is_empty() {
            return Ok(HashMap::new());
        }
        watched(reporter, |cancel| {
            let context = Context { reporter, cancel };
            let mut finder = self.finder(context);
            finder.retain(|about| about.want_mass_query || !mass_query_only);
            let found = finder.find(paths, find::Say::Nothing, context)?;
            Ok(found
                .into_iter()
                .map(|(path, candidate)| (path, candidate.offer()))
                .collect())
        })
    }

    /// Fetches `paths` and what they refer to, as far as it is not valid: many at once, each published when its
    /// references are. Activities of Nix (`Realise`, `CopyPaths`, `Substitute`, `CopyPath`, `FileTransfer`) go to
    /// `reporter`. What fails is in the outcome.
    ///
    /// # Errors
    /// Interrupted; the sink's when it cannot publish.
    pub fn substitute<S: Sink>(
        &self,
        paths: &BTreeSet<StorePath>,
        sink: &S,
        reporter: &dyn Reporter,
    ) -> Result<Outcome> {
        let paths = paths.iter().map(|path| (path.clone(), None)).collect();
        self.substitute_with(&paths, sink, reporter)
    }

    /// [`Substituters::substitute`] of paths whose content addresses may be known: those may come from a store with
    /// another directory.
    ///
    /// # Errors
    /// As [`Substituters::substitute`].
    pub fn substitute_with<S: Sink>(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        sink: &S,
        reporter: &dyn Reporter,
    ) -> Result<Outcome> {
        if paths.is_empty() {
            return Ok(Outcome::default());
        }
        watched(reporter, |cancel| {
            let context = Context { reporter, cancel };
            schedule::run(self, paths, sink, context)
        })
    }

    /// What an output became, if a substituter knows it. One that is signed, but by none of the trusted keys, is not
    /// believed, unless signatures are not required or the substituter is trusted. One without signatures is: `nix copy`
    /// writes no others, and Nix does not ask for any. Its path needs a signature or a content address of its own.
    ///
    /// # Errors
    /// Interrupted.
    pub fn realisation(
        &self,
        id: &DrvOutput,
        reporter: &dyn Reporter,
    ) -> Result<Option<WireRealisation>> {
        if self.is_empty() {
            return Ok(None);
        }
        watched(reporter, |cancel| {
            let context = Context { reporter, cancel };
            self.finder(context).realisation(id, context)
        })
    }
}
