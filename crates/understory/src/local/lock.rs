//! Nix's lock files: one beside each object that is being made, and those of the whole store.
//!
//! All are flock(2), which belongs to an open file, so that threads of one process exclude each other as processes
//! do. Source: `pathlocks.cc` and `gc.cc` of Nix 2.34.8.
//!
//! Waiting polls: flock cannot be given up by another thread, and a client that has gone must not leave a thread
//! behind. The pause grows from 1 ms to [`PAUSE_MS_MAX`].

use crate::daemon::Reporter;
use crate::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use understory_nix::worker::Verbosity;

/// Longest pause between two attempts to lock: how late a waiter may notice that it may go on.
const PAUSE_MS_MAX: u64 = 50;
/// How long a wait for an object's lock may last before a line says so.
const QUIET: Duration = Duration::from_secs(1);

/// Locks on objects, held until it is dropped. The protocol is Nix's (`pathlocks.cc`): file `<object>.lock`, mode
/// 0600, exclusive flock, taken in sorted order; a file that is not empty was given up by its owner and is opened
/// anew.
#[derive(Debug)]
pub struct PathLocks {
    held: Vec<(PathBuf, File)>,
    delete: bool,
}

impl PathLocks {
    /// Locks all `objects` (physical paths), waiting for others; a line says so when it takes long.
    ///
    /// # Errors
    /// I/O; interrupted.
    pub fn lock(objects: &[PathBuf], reporter: &dyn Reporter) -> Result<Self> {
        let mut locks = Self::none();
        for lock in lock_files(objects) {
            let said = format!("waiting for lock on '{}'", lock.display());
            loop {
                let file = open_lock_file(&lock)?;
                let wait = Wait {
                    operation: FlockOperation::NonBlockingLockExclusive,
                    said: &said,
                    quiet: QUIET,
                };
                wait.take(&file, &lock, reporter)?;
                if !was_given_up(&file, &lock)? {
                    locks.held.push((lock, file));
                    break;
                }
            }
        }
        Ok(locks)
    }
    /// As [`PathLocks::lock`], but `None` if one is held by somebody else.
    ///
    /// # Errors
    /// I/O.
    pub fn try_lock(objects: &[PathBuf]) -> Result<Option<Self>> {
        let mut locks = Self::none();
        for lock in lock_files(objects) {
            loop {
                let file = open_lock_file(&lock)?;
                if !try_flock(&file, FlockOperation::NonBlockingLockExclusive, &lock)? {
                    return Ok(None);
                }
                if !was_given_up(&file, &lock)? {
                    locks.held.push((lock, file));
                    break;
                }
            }
        }
        Ok(Some(locks))
    }
    /// Removes the lock files when the locks are released: the objects are there now, nobody needs to wait.
    pub fn delete_on_release(&mut self) {
        self.delete = true;
    }

    fn none() -> Self {
        Self {
            held: Vec::new(),
            delete: false,
        }
    }
}

impl Drop for PathLocks {
    fn drop(&mut self) {
        if !self.delete {
            return;
        }
        for (path, file) in &mut self.held {
            // Whoever waits for this file sees the byte and opens the name anew. If it cannot be removed, the next
            // collection does it.
            if let Err(error) = std::fs::remove_file(&*path) {
                tracing::debug!(path = %path.display(), %error, "lock file stays");
                continue;
            }
            if let Err(error) = file.write_all(b"d") {
                tracing::warn!(path = %path.display(), %error, "marking a lock file as given up");
            }
        }
    }
}

/// `gc.lock` of a state directory, held exclusively (a collection) or shared, until it is dropped.
#[derive(Debug)]
pub struct GcLock {
    _file: File,
}

impl GcLock {
    /// Waits for it exclusively: only the collector does.
    ///
    /// # Errors
    /// I/O; interrupted.
    pub fn exclusive(state: &Path, reporter: &dyn Reporter) -> Result<Self> {
        Self::take(state, FlockOperation::NonBlockingLockExclusive, reporter)
    }
    /// Takes it shared, waiting for a collection to end.
    ///
    /// # Errors
    /// I/O; interrupted.
    pub fn shared(state: &Path, reporter: &dyn Reporter) -> Result<Self> {
        Self::take(state, FlockOperation::NonBlockingLockShared, reporter)
    }

    fn take(state: &Path, operation: FlockOperation, reporter: &dyn Reporter) -> Result<Self> {
        let path = gc_lock_path(state);
        let file = open_lock_file(&path)?;
        let wait = Wait {
            operation,
            said: "waiting for the big garbage collector lock...",
            quiet: Duration::ZERO,
        };
        wait.take(&file, &path, reporter)?;
        Ok(Self { _file: file })
    }
}

/// Where the collector's lock is.
pub(super) fn gc_lock_path(state: &Path) -> PathBuf {
    state.join("gc.lock")
}

/// Opens a lock file, made if it is not there.
pub(super) fn open_lock_file(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io("opening lock file", path, e))
}

/// Tries a non-blocking operation; false if somebody else holds the lock.
pub(crate) fn try_flock(file: impl AsFd, operation: FlockOperation, path: &Path) -> Result<bool> {
    loop {
        match flock(&file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("locking", path, error.into())),
        }
    }
}

/// How to wait for a lock.
struct Wait<'a> {
    /// One of the non-blocking ones.
    operation: FlockOperation,
    /// What is said when it takes longer than `quiet`.
    said: &'a str,
    quiet: Duration,
}

impl Wait<'_> {
    fn take(&self, file: &File, path: &Path, reporter: &dyn Reporter) -> Result<()> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        let mut silent = true;
        while !try_flock(file, self.operation, path)? {
            if silent && begun.elapsed() >= self.quiet {
                reporter.say(Verbosity::Error, self.said);
                silent = false;
            }
            reporter.check()?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(PAUSE_MS_MAX));
        }
        Ok(())
    }
}

/// The lock files of `objects` in the order in which they are taken.
fn lock_files(objects: &[PathBuf]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = objects
        .iter()
        .map(|object| {
            let mut name = OsString::from(object);
            name.push(".lock");
            PathBuf::from(name)
        })
        .collect();
    files.sort();
    files.dedup();
    files
}

/// True if the owner before us has removed the file's name: it is another one's now.
fn was_given_up(file: &File, path: &Path) -> Result<bool> {
    let metadata = file
        .metadata()
        .map_err(|e| Error::io("reading lock file", path, e))?;
    Ok(metadata.len() != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::Silent;
    use std::sync::atomic::{AtomicBool, Ordering};
    use understory_nix::worker::LogMessage;

    /// Goes away when told to, and keeps what is said.
    #[derive(Default)]
    struct Client {
        gone: AtomicBool,
        heard: std::sync::Mutex<Vec<u8>>,
    }
    impl Reporter for Client {
        fn verbosity(&self) -> Verbosity {
            Verbosity::Info
        }
        fn is_cancelled(&self) -> bool {
            self.gone.load(Ordering::SeqCst)
        }
        fn send(&self, message: &LogMessage) {
            if let LogMessage::Next(text) = message {
                self.heard.lock().unwrap().extend(text);
                self.gone.store(true, Ordering::SeqCst);
            }
        }
    }

    #[test]
    fn a_lock_excludes_others_and_its_file_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut held = PathLocks::lock(&[b.clone(), a.clone()], &Silent).unwrap();
        assert!(
            PathLocks::try_lock(std::slice::from_ref(&a))
                .unwrap()
                .is_none()
        );
        assert!(dir.path().join("a.lock").exists());
        held.delete_on_release();
        drop(held);
        assert!(!dir.path().join("a.lock").exists());
        assert!(!dir.path().join("b.lock").exists());
        // Without it the file stays, as after a failed build, and can be locked again.
        drop(
            PathLocks::try_lock(std::slice::from_ref(&a))
                .unwrap()
                .unwrap(),
        );
        assert!(dir.path().join("a.lock").exists());
        assert!(PathLocks::try_lock(&[a]).unwrap().is_some());
    }

    #[test]
    fn a_file_that_was_given_up_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let object = dir.path().join("a");
        std::thread::scope(|scope| {
            let mut held = PathLocks::lock(std::slice::from_ref(&object), &Silent).unwrap();
            let waiters: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let mut mine =
                            PathLocks::lock(std::slice::from_ref(&object), &Silent).unwrap();
                        assert!(!object.exists(), "two hold it");
                        std::fs::write(&object, "").unwrap();
                        std::thread::yield_now();
                        std::fs::remove_file(&object).unwrap();
                        mine.delete_on_release();
                    })
                })
                .collect();
            held.delete_on_release();
            drop(held);
            waiters.into_iter().for_each(|w| w.join().unwrap());
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn who_waits_says_so_and_can_be_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        let held = GcLock::exclusive(dir.path(), &Silent).unwrap();
        let client = Client::default();
        let error = GcLock::shared(dir.path(), &client).unwrap_err();
        assert_eq!(error.to_string(), "interrupted by the user");
        assert_eq!(
            client.heard.into_inner().unwrap(),
            b"waiting for the big garbage collector lock...\n"
        );
        drop(held);
        let one = GcLock::shared(dir.path(), &Silent).unwrap();
        let two = GcLock::shared(dir.path(), &Silent).unwrap();
        drop((one, two));
        assert!(GcLock::exclusive(dir.path(), &Silent).is_ok());
    }
}
