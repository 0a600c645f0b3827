//! One substituter: a source, what its URL says of it, and whether it can be reached.

use super::Shared;
use super::binary_cache::{BinaryCache, Memory};
use super::cache::Ttl;
use super::daemon::DaemonSource;
use super::file::DirFiles;
use super::files::{Context, Failure};
use super::http::{HttpFiles, HttpOptions};
use super::local::LocalSource;
use super::s3::S3Files;
use super::source::{About, Source};
use super::url::StoreUrl;
use crate::settings::Settings;
use crate::{Error, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use understory_nix::StoreDir;

/// How long one that failed is left alone, as in Nix.
const DISABLED: Duration = Duration::from_secs(60);
/// How often to look whether someone else has opened it.
const GATE_POLL: Duration = Duration::from_millis(20);

/// What makes two substituters differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    url: String,
    http: HttpOptions,
    positive_ttl: Duration,
    negative_ttl: Duration,
}

impl Key {
    pub(super) fn new(url: &str, settings: &Settings) -> Self {
        Self {
            url: url.to_owned(),
            http: HttpOptions::new(settings),
            positive_ttl: settings.narinfo_positive_ttl,
            negative_ttl: settings.narinfo_negative_ttl,
        }
    }
}

/// A substituter. Clients share it.
pub(super) struct Substituter {
    /// Its URL without parameters.
    pub(super) name: Arc<str>,
    pub(super) source: Box<dyn Source>,
    /// `trusted=true`: signatures are not asked for.
    pub(super) trusted: bool,
    priority: Option<u32>,
    want_mass_query: Option<bool>,
    state: Mutex<State>,
    /// Held by who opens it.
    gate: Mutex<()>,
}

enum State {
    New,
    Open(Arc<About>),
    Down(Instant),
}

impl Substituter {
    /// Contacts nobody.
    ///
    /// # Errors
    /// A URL of an unknown kind, a parameter that cannot be, certificates that cannot be read.
    pub(super) fn new(key: &Key, shared: &Shared) -> Result<Self> {
        let url = StoreUrl::parse(&key.url)?;
        let name: Arc<str> = url.display().into();
        let store_dir = match url.param("store").filter(|dir| !dir.is_empty()) {
            Some(dir) => StoreDir::new(dir).map_err(|e| Error::user(e.to_string()))?,
            None => shared.store_dir.clone(),
        };
        let cache = |files, remembered: bool| BinaryCache {
            files,
            name: name.to_string(),
            store_dir: store_dir.clone(),
            memory: remembered.then(|| Memory {
                cache: shared.cache.clone(),
                url: memory_key(&url),
                ttl: Ttl {
                    positive: key.positive_ttl,
                    negative: key.negative_ttl,
                },
            }),
        };
        let source: Box<dyn Source> = match url.scheme.as_str() {
            "http" | "https" => {
                let http = shared.http(&key.http)?;
                let files = HttpFiles::new(http, &url.scheme, &url.place)?;
                Box::new(cache(Box::new(files), true))
            }
            "s3" => {
                let files = S3Files::new(shared.http(&key.http)?, &url)?;
                Box::new(cache(Box::new(files), true))
            }
            "file" => {
                let files = DirFiles::new(PathBuf::from(url.path()));
                Box::new(cache(Box::new(files), false))
            }
            "unix" | "daemon" | "ssh-ng" => Box::new(DaemonSource::new(
                &url,
                store_dir,
                key.http.stalled_timeout(),
            )?),
            "local" => Box::new(LocalSource::new(&key.url, store_dir)),
            _ => {
                return Err(Error::user(format!(
                    "don't know how to open Nix store with URI '{}'",
                    key.url
                ))
                .with_hint(
                    "substituters are https://, http://, file://, s3://, unix://, daemon, ssh-ng:// or a local store's path",
                ));
            }
        };
        let priority = url
            .param("priority")
            .map(|text| {
                text.parse().map_err(|_| {
                    Error::user(format!("setting 'priority' has invalid value '{text}'"))
                })
            })
            .transpose()?;
        Ok(Self {
            trusted: url.flag("trusted")?.unwrap_or(false),
            want_mass_query: url.flag("want-mass-query")?,
            priority,
            name,
            source,
            state: Mutex::new(State::New),
            gate: Mutex::default(),
        })
    }

    /// True if someone would have to be asked now.
    pub(super) fn is_new(&self) -> bool {
        self.known().is_none()
    }
    /// What it is. `None` if it cannot be used at present, which is said once.
    pub(super) fn open(&self, context: Context<'_>) -> Option<Arc<About>> {
        let _gate = loop {
            if let Some(known) = self.known() {
                return known;
            }
            // Another client may wait for it long; this one must not wait longer than it wants to.
            match self.gate.try_lock() {
                Ok(gate) => break gate,
                Err(TryLockError::Poisoned(gate)) => break gate.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    if context.cancel.wait(GATE_POLL) {
                        return None;
                    }
                }
            }
        };
        // Someone else may have been quicker.
        if let Some(known) = self.known() {
            return known;
        }
        match self.source.open(context) {
            Ok(mut about) => {
                about.priority = self.priority.unwrap_or(about.priority);
                about.want_mass_query = self.want_mass_query.unwrap_or(about.want_mass_query);
                let about = Arc::new(about);
                *self.lock() = State::Open(about.clone());
                Some(about)
            }
            Err(Failure::Cancelled) => None,
            Err(failure) => {
                *self.lock() = State::Down(Instant::now() + DISABLED);
                self.say_disabled(&failure.into_error(), context);
                None
            }
        }
    }
    /// What it is, or that it is down; `None` if nobody knows.
    fn known(&self) -> Option<Option<Arc<About>>> {
        match &*self.lock() {
            State::Open(about) => Some(Some(about.clone())),
            State::Down(until) if *until > Instant::now() => Some(None),
            State::New | State::Down(_) => None,
        }
    }
    /// True if it was not found to be down since it was opened.
    pub(super) fn is_usable(&self) -> bool {
        matches!(&*self.lock(), State::Open(_))
    }
    /// Leaves it alone for a while.
    pub(super) fn disable(&self, error: &Error, context: Context<'_>) {
        let mut state = self.lock();
        if matches!(&*state, State::Open(_)) {
            *state = State::Down(Instant::now() + DISABLED);
            self.say_disabled(error, context);
        }
    }
    fn say_disabled(&self, error: &Error, context: Context<'_>) {
        context.warn(&format!(
            "{}; disabling substituter '{}' for {} seconds",
            error.chain(),
            self.name,
            DISABLED.as_secs()
        ));
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an answer depends on: the place, and for S3 which bucket of that name it is.
fn memory_key(url: &StoreUrl) -> String {
    let mut key = url.display();
    for name in ["store", "endpoint", "region", "scheme", "profile"] {
        if let Some(value) = url.param(name) {
            key.push_str(&format!("?{name}={value}"));
        }
    }
    key
}
