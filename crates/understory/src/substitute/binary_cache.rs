//! Binary caches: `nix-cache-info`, narinfos, archives, realisations.
//!
//! Narinfos are looked up many at a time and, unless the cache is a directory, remembered on disk. An archive streams
//! from the server through the decompressor to who takes it; nothing of it is kept.
//!
//! Cost of looking up n paths of which none is known: n small requests over at most `http-connections` connections that
//! are kept open; of known ones one point query each in SQLite.

use super::cache::{InfoCache, Known, Ttl};
use super::cancel::Cancel;
use super::files::{Attempts, Context, Failure, Files, read_retrying};
use super::source::{About, FetchError, Found, NarFile, Progress, Receive, Source};
use crate::daemon::Activity;
use crate::import::decompress;
use crate::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use understory_nix::narinfo::{CacheInfo, NARINFO_BYTES_MAX, NarInfo};
use understory_nix::worker::{ActivityType, DrvOutput, Field, Verbosity, WireRealisation};
use understory_nix::{StoreDir, StorePath};

/// Longest `nix-cache-info` and realisation that is read: they have a few lines.
const SMALL_FILE_BYTES_MAX: usize = 64 << 10;
/// Most lookups at a time, whatever the settings say: each is a thread.
const LOOKUPS_MAX: usize = 64;
/// Narinfos that are written down at once.
const REMEMBER_BATCH: usize = 1000;
/// Buffer between a file and its decompressor.
const BUFFER_BYTES: usize = 256 << 10;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);
/// Where realisations are, up to Nix 2.34 and from 2.35 on.
const REALISATIONS: &str = "realisations";
const BUILD_TRACE: &str = "build-trace-v2";

/// Where answers are remembered.
pub(super) struct Memory {
    pub(super) cache: Arc<InfoCache>,
    /// The key: the store's URL without parameters.
    pub(super) url: String,
    pub(super) ttl: Ttl,
}

/// A binary cache.
pub(super) struct BinaryCache {
    pub(super) files: Box<dyn Files>,
    /// For messages.
    pub(super) name: String,
    /// The store directory that it must have.
    pub(super) store_dir: StoreDir,
    /// `None` for directories, which are quick.
    pub(super) memory: Option<Memory>,
}

impl BinaryCache {
    fn check(&self, text: &str) -> Result<CacheInfo> {
        let info = CacheInfo::parse(&self.files.place("nix-cache-info"), text)
            .map_err(|e| Error::corrupt(e.to_string()))?;
        match &info.store_dir {
            Some(found) if *found != self.store_dir => Err(Error::user(format!(
                "binary cache '{}' is for Nix stores with prefix '{found}', not '{}'",
                self.name, self.store_dir
            ))),
            _ => Ok(info),
        }
    }
    /// Reads a narinfo's text, which is of the path that was asked for.
    fn parse(&self, path: &StorePath, text: &str) -> Result<Found> {
        let file = self.files.place(&narinfo_name(path));
        let narinfo = NarInfo::parse(&self.store_dir, &file, text)
            .map_err(|e| Error::corrupt(e.to_string()))?;
        if narinfo.info.path != *path {
            return Err(Error::corrupt(format!(
                "'{file}': expected path '{}', found '{}'",
                self.store_dir.print(path),
                self.store_dir.print(&narinfo.info.path)
            )));
        }
        Ok(Found {
            file: Some(NarFile {
                url: narinfo.url,
                compression: narinfo.compression,
                bytes: narinfo.file_size,
            }),
            info: narinfo.info,
        })
    }
    /// Asks the server for one narinfo.
    fn ask(&self, path: &StorePath, context: Context<'_>) -> Result<Option<String>, Failure> {
        let found = read_retrying(
            &*self.files,
            &narinfo_name(path),
            NARINFO_BYTES_MAX,
            context,
        )?;
        // What is no text cannot be parsed either.
        Ok(found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }
    /// Asks the server for many narinfos, some at a time; those that were not reached because one failed are missing.
    fn ask_all(&self, paths: &[&StorePath], context: Context<'_>) -> (Vec<Known>, Option<Failure>) {
        let threads = match self.files.parallel() {
            0 => LOOKUPS_MAX,
            some => some.min(LOOKUPS_MAX),
        };
        let next = AtomicUsize::new(0);
        let answers = Mutex::new(vec![None; paths.len()]);
        let failure = Mutex::new(None);
        let work = || {
            let _entered = context.cancel.enter();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(path) = paths.get(index) else {
                    return;
                };
                match self.ask(path, context) {
                    Ok(text) => {
                        answers.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(text);
                    }
                    Err(error) => {
                        next.store(paths.len(), Ordering::Relaxed);
                        failure
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .get_or_insert(error);
                        return;
                    }
                }
            }
        };
        let threads = threads.min(paths.len());
        if threads <= 1 {
            work();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(work);
                }
            });
        }
        let inner = |lock: Mutex<_>| lock.into_inner().unwrap_or_else(PoisonError::into_inner);
        (
            inner(answers),
            failure.into_inner().unwrap_or_else(PoisonError::into_inner),
        )
    }
    fn download(
        &self,
        file: &NarFile,
        nar_bytes_max: u64,
        progress: Progress<'_>,
        attempts: &Attempts,
        context: Context<'_>,
        receive: &mut Receive<'_>,
    ) -> Result<(), FetchOnce> {
        let place = self.files.place(&file.url);
        let transfer = Activity::start(
            context.reporter,
            Verbosity::Talkative,
            ActivityType::FileTransfer,
            &format!("downloading '{place}'"),
            vec![Field::Text(place.clone().into_bytes())],
            progress.copy.id(),
        );
        let body = self.files.open(&file.url, attempts, context)?;
        let Some(body) = body else {
            return Err(FetchOnce::Gone);
        };
        let broken = body.broken;
        progress.file_bytes.store(0, Ordering::Relaxed);
        let expected = body.bytes.or(file.bytes).unwrap_or(0);
        let at_end = AtomicBool::new(false);
        let counted = Counted {
            inner: body.reader,
            cancel: context.cancel,
            bytes: progress.file_bytes,
            expected,
            at_end: &at_end,
            transfer: &transfer,
            progress,
            nar_bytes: nar_bytes_max,
            told: Instant::now(),
        };
        let result = decompress::decompress(
            BufReader::with_capacity(BUFFER_BYTES, counted),
            &file.compression,
        )
        .and_then(|archive| {
            receive(&mut Limited {
                inner: archive,
                left: nar_bytes_max,
            })
        });
        let read = progress.file_bytes.load(Ordering::Relaxed);
        transfer.progress(read, expected.max(read), 0, 0);
        let Err(error) = result else {
            return Ok(());
        };
        if let Some(failure) = broken.take() {
            return Err(FetchOnce::Broken(failure));
        }
        let at_end = at_end.load(Ordering::Relaxed);
        Err(FetchOnce::Failed(match file.bytes {
            Some(bytes) if at_end && bytes != read => Error::corrupt(format!(
                "'{place}' has {read} bytes, its narinfo says {bytes}"
            ))
            .with_source(FlatError(error.chain())),
            _ => error,
        }))
    }
}

/// Why one attempt failed.
enum FetchOnce {
    Gone,
    /// The way from the server.
    Broken(Failure),
    /// What came.
    Failed(Error),
}

impl From<Failure> for FetchOnce {
    fn from(failure: Failure) -> Self {
        Self::Broken(failure)
    }
}

/// A text as a cause.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct FlatError(String);

impl Source for BinaryCache {
    fn open(&self, context: Context<'_>) -> Result<About, Failure> {
        if let Some(memory) = &self.memory
            && let Some((id, text)) = memory.cache.cache_info(&memory.url)
            && let Ok(info) = self.check(&text)
        {
            return Ok(About::new(&info, &self.store_dir, Some(id)));
        }
        let found = read_retrying(
            &*self.files,
            "nix-cache-info",
            SMALL_FILE_BYTES_MAX,
            context,
        )?;
        let Some(bytes) = found else {
            return Err(Failure::Final(Error::user(format!(
                "'{}' does not appear to be a binary cache",
                self.name
            ))));
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let info = self.check(&text).map_err(Failure::Final)?;
        let id = self
            .memory
            .as_ref()
            .and_then(|memory| memory.cache.set_cache_info(&memory.url, &text));
        Ok(About::new(&info, &self.store_dir, id))
    }

    fn lookup(
        &self,
        about: &About,
        paths: &[StorePath],
        context: Context<'_>,
    ) -> Result<Vec<Result<Option<Found>>>, Failure> {
        let memory = self.memory.as_ref().zip(about.id);
        let mut texts: Vec<Known> = match memory {
            Some((memory, id)) => {
                let hash_parts: Vec<&str> = paths.iter().map(StorePath::hash_part).collect();
                memory.cache.infos(id, &hash_parts, memory.ttl)
            }
            None => vec![None; paths.len()],
        };
        let unknown: Vec<usize> = (0..paths.len())
            .filter(|index| texts[*index].is_none())
            .collect();
        let asked: Vec<&StorePath> = unknown.iter().map(|index| &paths[*index]).collect();
        let (answers, failure) = self.ask_all(&asked, context);
        if let Some((memory, id)) = memory {
            // Also when some failed: what was learnt need not be asked again.
            let learnt: Vec<(&str, Option<String>)> = asked
                .iter()
                .zip(&answers)
                .filter_map(|(path, answer)| Some((path.hash_part(), answer.clone()?)))
                .filter(|(_, answer)| {
                    // What cannot be parsed is asked for again next time.
                    answer
                        .as_ref()
                        .is_none_or(|text| NarInfo::parse(&self.store_dir, "narinfo", text).is_ok())
                })
                .collect();
            for batch in learnt.chunks(REMEMBER_BATCH) {
                memory.cache.set_infos(id, batch);
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        for (index, answer) in unknown.into_iter().zip(answers) {
            texts[index] = answer;
        }
        Ok(paths
            .iter()
            .zip(texts)
            .map(|(path, text)| {
                text.flatten()
                    .map(|text| self.parse(path, &text))
                    .transpose()
            })
            .collect())
    }

    fn fetch(
        &self,
        found: &Found,
        progress: Progress<'_>,
        context: Context<'_>,
        receive: &mut Receive<'_>,
    ) -> Result<(), FetchError> {
        let Some(file) = &found.file else {
            return Err(FetchError::Gone);
        };
        let attempts = Attempts::new(self.files.attempts());
        let size = found.info.nar_size;
        loop {
            match self.download(file, size, progress, &attempts, context, receive) {
                Ok(()) => return Ok(()),
                Err(FetchOnce::Gone) => return Err(FetchError::Gone),
                Err(FetchOnce::Broken(failure)) => attempts.again(failure, context)?,
                Err(FetchOnce::Failed(_)) if context.cancel.is_set() => {
                    return Err(FetchError::Cancelled);
                }
                Err(FetchOnce::Failed(error)) => {
                    return Err(FetchError::Failed {
                        error,
                        unreachable: false,
                    });
                }
            }
        }
    }

    fn forget(&self, about: &About, path: &StorePath) {
        if let Some((memory, id)) = self.memory.as_ref().zip(about.id) {
            memory.cache.forget(id, path.hash_part());
        }
    }

    fn realisation(
        &self,
        about: &About,
        id: &DrvOutput,
        context: Context<'_>,
    ) -> Result<Option<WireRealisation>, Failure> {
        let key = id.id();
        let memory = self.memory.as_ref().zip(about.id);
        let known =
            memory.and_then(|(memory, cache)| memory.cache.realisation(cache, &key, memory.ttl));
        let text = match known {
            Some(known) => known,
            None => {
                let name = match id {
                    DrvOutput::Hash(id) => format!("{REALISATIONS}/{}.doi", escape(id)),
                    DrvOutput::Path { drv, output } => {
                        format!("{BUILD_TRACE}/{}/{}.doi", drv.base_name(), escape(output))
                    }
                };
                let found = read_retrying(&*self.files, &name, SMALL_FILE_BYTES_MAX, context)?;
                let text = found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
                if let Some((memory, cache)) = memory {
                    memory.cache.set_realisation(cache, &key, text.as_deref());
                }
                text
            }
        };
        let Some(text) = text else {
            return Ok(None);
        };
        let Some((out_path, signatures)) = crate::import::parse_realisation(&text) else {
            return Err(Failure::Final(Error::corrupt(format!(
                "'{}' has a malformed realisation of '{key}'",
                self.name
            ))));
        };
        Ok(Some(WireRealisation {
            id: id.clone(),
            out_path,
            signatures,
        }))
    }
}

fn narinfo_name(path: &StorePath) -> String {
    format!("{}.narinfo", path.hash_part())
}

/// What would lead a URL elsewhere is no part of an id.
fn escape(text: &str) -> String {
    text.replace(['/', '?', '#', '%'], "_")
}

/// Counts what is read and tells it now and then.
struct Counted<'a> {
    inner: Box<dyn Read + 'a>,
    cancel: &'a Cancel,
    bytes: &'a AtomicU64,
    expected: u64,
    /// All was read.
    at_end: &'a AtomicBool,
    transfer: &'a Activity<'a>,
    progress: Progress<'a>,
    nar_bytes: u64,
    told: Instant,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.cancel.is_set() {
            return Err(std::io::Error::other("interrupted by the user"));
        }
        let count = self.inner.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            self.at_end.store(true, Ordering::Relaxed);
        }
        let bytes = self.bytes.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
        if self.told.elapsed() >= TELL {
            self.told = Instant::now();
            self.transfer
                .progress(bytes, self.expected.max(bytes), 0, 0);
            let nar = self.progress.nar_bytes.load(Ordering::Relaxed);
            self.progress.copy.progress(nar, self.nar_bytes, 0, 0);
        }
        Ok(count)
    }
}

/// Ends with an error where the archive should have ended, so that a server cannot fill the disk.
struct Limited<R> {
    inner: R,
    left: u64,
}

impl<R: BufRead> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let piece = self.fill_buf()?;
        let count = piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&piece[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Limited<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let piece = self.inner.fill_buf()?;
        if left == 0 && !piece.is_empty() {
            return Err(std::io::Error::other(
                "the archive is longer than its narinfo says",
            ));
        }
        Ok(&piece[..piece.len().min(left)])
    }
    fn consume(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count as u64);
        self.inner.consume(count);
    }
}
