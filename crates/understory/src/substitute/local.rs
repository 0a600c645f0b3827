//! A store of this machine's disk as a source: what Nix calls a local store, opened for reading only.
//!
//! Cost: archives are made from the files as they are read, through a pipe, in memory that does not grow.

use super::files::{Context, Failure};
use super::source::{About, FetchError, Found, Progress, Receive, Source};
use crate::local::restore::dump_path;
use crate::nar::HashRequest;
use crate::overlay::Lower;
use crate::overlay::lower;
use crate::{Error, Result};
use std::io::{BufReader, BufWriter, Write};
use std::sync::{Arc, Mutex, PoisonError};
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{StoreDir, StorePath};

/// Bytes that are read and written at once: what a pipe holds.
const PIPE_BYTES: usize = 64 << 10;

/// See the module.
pub(super) struct LocalSource {
    url: String,
    store_dir: StoreDir,
    /// Opened with the first question.
    store: Mutex<Option<Arc<dyn Lower>>>,
}

impl LocalSource {
    /// `url` is `local?root=…` or a path.
    pub(super) fn new(url: &str, store_dir: StoreDir) -> Self {
        Self {
            url: url.to_owned(),
            store_dir,
            store: Mutex::default(),
        }
    }

    fn store(&self) -> Result<Arc<dyn Lower>> {
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*store {
            return Ok(open.clone());
        }
        let open = lower::open(&self.url, &self.store_dir)?;
        *store = Some(open.clone());
        Ok(open)
    }
}

impl Source for LocalSource {
    fn open(&self, _context: Context<'_>) -> Result<About, Failure> {
        self.store().map_err(Failure::Final)?;
        Ok(About {
            store_dir: self.store_dir.clone(),
            want_mass_query: true,
            priority: 0,
            id: None,
        })
    }

    fn lookup(
        &self,
        _about: &About,
        paths: &[StorePath],
        _context: Context<'_>,
    ) -> Result<Vec<Result<Option<Found>>>, Failure> {
        let infos = self.store().and_then(|store| store.infos(paths));
        let found = infos.map_err(Failure::Final)?.into_iter().map(|info| {
            Ok(info.map(|info| Found {
                info: (*info).clone(),
                file: None,
            }))
        });
        Ok(found.collect())
    }

    fn fetch(
        &self,
        found: &Found,
        _progress: Progress<'_>,
        context: Context<'_>,
        receive: &mut Receive<'_>,
    ) -> Result<(), FetchError> {
        let failed = |error| FetchError::Failed {
            error,
            unreachable: false,
        };
        let store = self.store().map_err(failed)?;
        let place = store.real_dir().join(found.info.path.base_name());
        if !place.is_symlink() && !place.exists() {
            return Err(FetchError::Gone);
        }
        let (reader, writer) = std::io::pipe()
            .map_err(|e| failed(Error::environment("making a pipe").with_source(e)))?;
        let (received, dumped) = std::thread::scope(|scope| {
            let dump = scope.spawn(move || {
                let mut out = BufWriter::with_capacity(PIPE_BYTES, writer);
                dump_path(&place, HashRequest::None, &mut out)?;
                out.flush()
                    .map_err(|e| Error::environment("writing to a pipe").with_source(e))
            });
            // The pipe's end goes with it, so that a writer that nobody listens to ends.
            let received = {
                let mut archive = BufReader::with_capacity(PIPE_BYTES, reader);
                receive(&mut archive)
            };
            let dumped = dump
                .join()
                .unwrap_or_else(|_| Err(Error::internal("making an archive panicked")));
            (received, dumped)
        });
        if context.cancel.is_set() {
            return Err(FetchError::Cancelled);
        }
        match (received, dumped) {
            (Ok(()), _) => Ok(()),
            // A file that cannot be read is why the archive ended early.
            (Err(error), Err(cause)) if !is_broken_pipe(&cause) => {
                Err(failed(cause.with_source(error.chain())))
            }
            (Err(error), _) => Err(failed(error)),
        }
    }

    fn realisation(
        &self,
        _about: &About,
        id: &DrvOutput,
        _context: Context<'_>,
    ) -> Result<Option<WireRealisation>, Failure> {
        self.store()
            .and_then(|store| store.realisation(id))
            .map_err(Failure::Final)
    }
}

/// True if the cause is that the other side has stopped reading.
fn is_broken_pipe(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::BrokenPipe;
        }
        cause = inner.source();
    }
    false
}
