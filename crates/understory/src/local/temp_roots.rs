//! Temporary roots as Nix has them: both sides of the protocol.
//!
//! A client's file `temproots/<pid>.<n>` (Nix reads the number before the dot) is held by flock for its life. Its
//! content is full store paths, each with a NUL after it; what has no NUL yet was never acknowledged. A file whose
//! lock is free has lost its owner; the collector removes it and writes a byte into it, so that somebody who has
//! opened it but not locked it yet sees that it is gone.
//!
//! To add a root, a client appends it, then makes sure that the collection that may run knows it: if `gc.lock` can be
//! had shared, none runs, and the next one reads the file. Else the root is handed to `gc-socket/socket` as a line,
//! and the collector answers `1`, after it has finished deleting that path if it was about to. Nix appends after
//! the hand-over instead; then a second collection that begins between the two misses the root.
//!
//! A collector and many clients may live in one process: each has its own open files, so that flock tells them apart.
//!
//! Source: `gc.cc` of Nix 2.34.8; the interplay with stock Nix is tested.

use super::lock::{gc_lock_path, open_lock_file, try_flock};
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use understory_nix::{StoreDir, StorePath};

/// Temporary roots that one client may have: ten times the largest store anybody has told of.
const ROOTS_MAX: usize = 4_000_000;
/// Roots that are handed over before their answers are read: fewer bytes than a socket holds in either direction.
const HANDED_OVER_MAX: usize = 256;
/// Pause while a collection has the lock but no socket yet, or no more.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest line that the collector reads: `PATH_MAX` and the line's end.
const LINE_BYTES_MAX: u64 = 4097;
/// Longest path of a socket: `sun_path` without its NUL. Longer ones are reached through `/proc/self/fd`.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Clients that hand over roots at a time: more than a machine has processes that use a store.
const CLIENTS_MAX: usize = 4096;

/// Tells the files of this process apart.
static NEXT_FILE: AtomicU64 = AtomicU64::new(0);

/// Keeps paths from being collected until it is dropped. One for each client of a daemon.
pub struct TempRoots {
    state: PathBuf,
    store_dir: StoreDir,
    inner: Mutex<Client>,
}

#[derive(Default)]
struct Client {
    /// Made with the first root.
    file: Option<(PathBuf, File)>,
    gc_lock: Option<File>,
    /// To the collection that runs.
    collector: Option<BufReader<UnixStream>>,
    known: HashSet<StorePath>,
}

impl TempRoots {
    /// Makes an empty set; the file is made with the first root.
    pub fn new(state: &Path, store_dir: &StoreDir) -> Self {
        Self {
            state: state.to_path_buf(),
            store_dir: store_dir.clone(),
            inner: Mutex::default(),
        }
    }
    /// Adds paths, valid or not. When this returns no collection takes them. A path that a collection is deleting
    /// at this moment is gone when this returns, and can be made anew.
    ///
    /// # Errors
    /// I/O; more roots than a client may have.
    pub fn add(&self, paths: &[StorePath]) -> Result<()> {
        let mut client = lock(&self.inner);
        let mut new: Vec<&StorePath> = paths
            .iter()
            .filter(|path| !client.known.contains(path))
            .collect();
        new.sort();
        new.dedup();
        if new.is_empty() {
            return Ok(());
        }
        if client.known.len() + new.len() > ROOTS_MAX {
            return Err(Error::user(format!(
                "more than {ROOTS_MAX} temporary roots"
            )));
        }
        let lines: Vec<String> = new.iter().map(|path| self.store_dir.print(path)).collect();
        self.append(&mut client, &lines)?;
        self.tell_collector(&mut client, &lines)?;
        client.known.extend(new.into_iter().cloned());
        Ok(())
    }

    fn append(&self, client: &mut Client, paths: &[String]) -> Result<()> {
        if client.file.is_none() {
            client.file = Some(create_file(&self.state.join("temproots"))?);
        }
        let mut bytes = Vec::new();
        for path in paths {
            bytes.extend_from_slice(path.as_bytes());
            bytes.push(0);
        }
        if let Some((path, file)) = client.file.as_mut() {
            file.write_all(&bytes)
                .map_err(|e| Error::io("writing", path.clone(), e))?;
        }
        Ok(())
    }

    /// Returns when no collection runs that does not know the paths.
    fn tell_collector(&self, client: &mut Client, paths: &[String]) -> Result<()> {
        let lock_path = gc_lock_path(&self.state);
        if client.gc_lock.is_none() {
            client.gc_lock = Some(open_lock_file(&lock_path)?);
        }
        loop {
            if let Some(file) = &client.gc_lock
                && try_flock(file, FlockOperation::NonBlockingLockShared, &lock_path)?
            {
                // The next collection reads the file.
                client.collector = None;
                try_flock(file, FlockOperation::Unlock, &lock_path)?;
                return Ok(());
            }
            let mut collector = match client.collector.take() {
                Some(collector) => collector,
                None => match connect(&socket_path(&self.state))? {
                    Some(stream) => BufReader::new(stream),
                    None => {
                        std::thread::sleep(PAUSE);
                        continue;
                    }
                },
            };
            match hand_over(&mut collector, paths) {
                Ok(()) => {
                    client.collector = Some(collector);
                    return Ok(());
                }
                // That collection has ended. The next one, if there is one, reads the file or is told.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::BrokenPipe
                            | ErrorKind::ConnectionReset
                            | ErrorKind::UnexpectedEof
                            | ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    return Err(Error::io(
                        "handing a temporary root to",
                        socket_path(&self.state),
                        error,
                    ));
                }
            }
        }
    }
}

impl Drop for TempRoots {
    fn drop(&mut self) {
        if let Some((path, _)) = &lock(&self.inner).file {
            // If that fails, the lock goes with the file's closing and a collection removes it.
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(path = %path.display(), %error, "file of temporary roots stays");
            }
        }
    }
}

/// Makes a file of temporary roots and locks it. A name that is taken is left alone: it may belong to a process with
/// our number in another pid namespace.
fn create_file(dir: &Path) -> Result<(PathBuf, File)> {
    loop {
        let number = NEXT_FILE.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}.{number}", std::process::id()));
        let opened = File::options()
            .append(true)
            .read(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) if error.kind() == ErrorKind::NotFound && !dir.exists() => {
                fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
                continue;
            }
            Err(error) => return Err(Error::io("creating", path, error)),
        };
        // A collector that came in between holds it for a moment only, and marks it.
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("locking", path, error.into())),
            }
        }
        let metadata = file
            .metadata()
            .map_err(|e| Error::io("reading", &path, e))?;
        if metadata.len() == 0 {
            return Ok((path, file));
        }
    }
}

fn hand_over(collector: &mut BufReader<UnixStream>, paths: &[String]) -> std::io::Result<()> {
    for some in paths.chunks(HANDED_OVER_MAX) {
        let mut lines = String::new();
        for path in some {
            lines.push_str(path);
            lines.push('\n');
        }
        // `send` without a signal: a broken pipe is an answer here.
        let mut bytes = lines.as_bytes();
        while !bytes.is_empty() {
            let sent =
                rustix::net::send(collector.get_ref(), bytes, rustix::net::SendFlags::NOSIGNAL)?;
            bytes = &bytes[sent..];
        }
        let mut answers = vec![0; some.len()];
        collector.read_exact(&mut answers)?;
        if answers.iter().any(|answer| *answer != b'1') {
            return Err(std::io::Error::new(
                ErrorKind::InvalidData,
                "the garbage collector's answer is not '1'",
            ));
        }
    }
    Ok(())
}

fn socket_path(state: &Path) -> PathBuf {
    state.join("gc-socket/socket")
}

/// Runs `work` with a name of the socket that fits into an address.
fn with_socket_name<T>(
    path: &Path,
    work: impl FnOnce(&Path) -> std::io::Result<T>,
) -> std::io::Result<T> {
    if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return work(path);
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return work(path);
    };
    let dir = File::open(dir)?;
    let short = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    work(&short)
}

/// `None` if nobody listens.
fn connect(path: &Path) -> Result<Option<UnixStream>> {
    match with_socket_name(path, |name| UnixStream::connect(name)) {
        Ok(stream) => Ok(Some(stream)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(Error::io("connecting to", path, error)),
    }
}

/// Temporary roots of living owners, with the number of the process. Files of dead ones are removed.
///
/// # Errors
/// I/O; a file whose name is no number.
pub fn read_all(state: &Path, store_dir: &StoreDir) -> Result<Vec<(u64, StorePath)>> {
    let dir = state.join("temproots");
    let mut roots = Vec::new();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(roots),
        Err(error) => return Err(Error::io("reading", dir, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("reading", &dir, e))?;
        let (path, name) = (entry.path(), entry.file_name());
        if name.as_bytes().starts_with(b".") {
            continue;
        }
        let Some(pid) = leading_number(name.as_bytes()) else {
            return Err(Error::corrupt(format!(
                "{}: expected the number of a process",
                path.display()
            ))
            .with_hint("remove the file if it is not Nix's"));
        };
        let mut file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            // Its owner ended just now.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("opening", path, error)),
        };
        if try_flock(&file, FlockOperation::NonBlockingLockExclusive, &path)? {
            tracing::info!("removing stale temporary roots file '{}'", path.display());
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("removing", path, error)),
            }
            // Marked for somebody who has opened it but not locked it yet.
            file.write_all(b"d")
                .map_err(|e| Error::io("writing", path, e))?;
            continue;
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(|e| Error::io("reading", &path, e))?;
        for root in bytes
            .split_inclusive(|byte| *byte == 0)
            .filter_map(|root| root.strip_suffix(&[0]))
        {
            roots.push((pid, store_dir.parse(root)?));
        }
    }
    Ok(roots)
}

/// The number that a name begins with, as `std::stoi` reads it.
fn leading_number(name: &[u8]) -> Option<u64> {
    let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&name[..digits]).ok()?.parse().ok()
}

/// The collector's ear: takes new roots while a collection runs, and makes who adds a path that is being deleted wait
/// for the end of it. Only the hash part counts, so that `<path>.lock` and the like are kept with their path.
///
/// To be made while `gc.lock` is held exclusively, and dropped before it is released.
pub struct RootServer {
    shared: Arc<Shared>,
    socket: PathBuf,
    /// Wakes the acceptor when it is closed.
    end: Option<UnixStream>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    store_dir: StoreDir,
    stopping: AtomicBool,
    roots: Mutex<Roots>,
    /// Something is not being deleted any more, or the collection ends.
    changed: Condvar,
    clients: Mutex<Vec<(u64, UnixStream)>>,
}

#[derive(Default)]
struct Roots {
    /// Hash parts of temporary roots.
    kept: HashSet<Box<str>>,
    /// Hash parts that are being deleted, and by how many names.
    going: HashMap<Box<str>, u32>,
}

impl RootServer {
    /// Listens on `gc-socket/socket`, then reads the files of temporary roots, which are returned.
    ///
    /// # Errors
    /// I/O.
    pub fn start(state: &Path, store_dir: &StoreDir) -> Result<(Self, Vec<(u64, StorePath)>)> {
        let socket = socket_path(state);
        let listener = listen(&socket)?;
        let shared = Arc::new(Shared {
            store_dir: store_dir.clone(),
            stopping: AtomicBool::new(false),
            roots: Mutex::default(),
            changed: Condvar::new(),
            clients: Mutex::default(),
        });
        let (end, ended) =
            UnixStream::pair().map_err(|e| Error::environment("making a socket").with_source(e))?;
        let acceptor = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("gc-roots".into())
                .spawn(move || accept(&shared, &listener, &ended))
                .map_err(|e| Error::environment("starting a thread").with_source(e))?
        };
        let server = Self {
            shared,
            socket,
            end: Some(end),
            acceptor: Some(acceptor),
        };
        let roots = read_all(state, store_dir)?;
        lock(&server.shared.roots)
            .kept
            .extend(roots.iter().map(|(_, path)| path.hash_part().into()));
        Ok((server, roots))
    }

    /// Claims a path for deletion, to be given back by [`RootServer::release`]. False if it is a temporary root: then
    /// it must stay.
    pub fn claim(&self, path: &StorePath) -> bool {
        let mut roots = lock(&self.shared.roots);
        if roots.kept.contains(path.hash_part()) {
            return false;
        }
        *roots.going.entry(path.hash_part().into()).or_default() += 1;
        true
    }
    /// Says that a claimed path is deleted, or stays after all.
    pub fn release(&self, path: &StorePath) {
        let mut roots = lock(&self.shared.roots);
        if let Some(count) = roots.going.get_mut(path.hash_part()) {
            *count -= 1;
            if *count == 0 {
                roots.going.remove(path.hash_part());
            }
        }
        drop(roots);
        self.shared.changed.notify_all();
    }
    /// True if a path with that hash part is a temporary root.
    pub fn is_root(&self, path: &StorePath) -> bool {
        lock(&self.shared.roots).kept.contains(path.hash_part())
    }
}

impl Drop for RootServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        if let Err(error) = fs::remove_file(&self.socket) {
            tracing::debug!(path = %self.socket.display(), %error, "the collector's socket stays");
        }
        // Nobody waits for a deletion any more.
        lock(&self.shared.roots).going.clear();
        self.shared.changed.notify_all();
        drop(self.end.take());
        if let Some(acceptor) = self.acceptor.take()
            && acceptor.join().is_err()
        {
            tracing::error!("the thread that takes temporary roots has panicked");
        }
    }
}

/// Listens, with mode 0666; a socket that a dead collector left is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(|e| Error::io("creating", dir, e))?;
    }
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("removing", path, error)),
    }
    let listener = with_socket_name(path, |name| UnixListener::bind(name))
        .map_err(|e| Error::io("binding", path, e))?;
    fs::set_permissions(path, Permissions::from_mode(0o666))
        .and_then(|()| listener.set_nonblocking(true))
        .map_err(|e| Error::io("binding", path, e))?;
    Ok(listener)
}

/// Takes connections until the collection ends, then ends theirs.
fn accept(shared: &Arc<Shared>, listener: &UnixListener, ended: &UnixStream) {
    let mut workers: HashMap<u64, JoinHandle<()>> = HashMap::new();
    let mut next = 0_u64;
    while !shared.stopping.load(Ordering::SeqCst) {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(ended, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "waiting for temporary roots");
            break;
        }
        workers.retain(|_, worker| !worker.is_finished());
        if workers.len() >= CLIENTS_MAX {
            // They wait in the socket's queue.
            std::thread::sleep(PAUSE);
            continue;
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::warn!(%error, "taking a connection for temporary roots");
                    std::thread::sleep(PAUSE);
                }
                continue;
            }
        };
        next += 1;
        match serve(shared, next, stream) {
            Ok(worker) => {
                workers.insert(next, worker);
            }
            // The client tries again.
            Err(error) => tracing::warn!(%error, "serving a connection for temporary roots"),
        }
    }
    for (_, stream) in lock(&shared.clients).iter() {
        let _ = stream.shutdown(std::net::Shutdown::Both); // it may be gone already
    }
    for (_, worker) in workers {
        if worker.join().is_err() {
            tracing::error!("a thread that takes temporary roots has panicked");
        }
    }
}

fn serve(shared: &Arc<Shared>, id: u64, stream: UnixStream) -> std::io::Result<JoinHandle<()>> {
    stream.set_nonblocking(false)?;
    lock(&shared.clients).push((id, stream.try_clone()?));
    let worker = {
        let shared = shared.clone();
        std::thread::Builder::new()
            .name("gc-root".into())
            .spawn(move || {
                if let Err(error) = take_roots(&shared, stream) {
                    tracing::debug!(%error, "a client that handed over temporary roots");
                }
                lock(&shared.clients).retain(|(other, _)| *other != id);
            })
    };
    if worker.is_err() {
        lock(&shared.clients).retain(|(other, _)| *other != id);
    }
    worker
}

fn take_roots(shared: &Shared, stream: UnixStream) -> std::io::Result<()> {
    let mut answers = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        (&mut lines)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)?;
        let Some(path) = line.strip_suffix(b"\n") else {
            return Ok(());
        };
        if let Ok(path) = shared.store_dir.parse(path) {
            keep(shared, &path);
        } else {
            tracing::warn!("received garbage instead of a root from a client");
        }
        if shared.stopping.load(Ordering::SeqCst) {
            // Not kept for sure: the client asks the next collection.
            return Ok(());
        }
        answers.write_all(b"1")?;
    }
}

/// Makes the path a root; returns when it is not being deleted.
fn keep(shared: &Shared, path: &StorePath) {
    let mut roots = lock(&shared.roots);
    roots.kept.insert(path.hash_part().into());
    while roots.going.contains_key(path.hash_part()) {
        roots = shared
            .changed
            .wait(roots)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// A panicking thread leaves nothing half-done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::lock::GcLock;
    use super::*;
    use crate::daemon::Silent;
    use std::sync::mpsc;

    const A: &str = "00000000000000000000000000000000-a";
    const B: &str = "11111111111111111111111111111111-b";

    fn path(name: &str) -> StorePath {
        StorePath::from_base_name(name).unwrap()
    }
    fn all(state: &Path) -> Vec<String> {
        let mut roots: Vec<String> = read_all(state, &StoreDir::default())
            .unwrap()
            .into_iter()
            .map(|(pid, path)| {
                assert_eq!(pid, u64::from(std::process::id()));
                path.to_string()
            })
            .collect();
        roots.sort();
        roots
    }
    fn files(state: &Path) -> usize {
        fs::read_dir(state.join("temproots")).unwrap().count()
    }

    #[test]
    fn roots_last_as_long_as_their_owner() {
        let dir = tempfile::tempdir().unwrap();
        let one = TempRoots::new(dir.path(), &StoreDir::default());
        let two = TempRoots::new(dir.path(), &StoreDir::default());
        one.add(&[path(A), path(A)]).unwrap();
        one.add(&[path(A)]).unwrap();
        two.add(&[path(B)]).unwrap();
        assert_eq!(all(dir.path()), [A, B]);
        assert_eq!(files(dir.path()), 2);
        drop(one);
        assert_eq!(all(dir.path()), [B]);
        assert_eq!(files(dir.path()), 1);
    }

    #[test]
    fn a_dead_owners_file_is_removed_and_marked() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("temproots")).unwrap();
        let name = dir.path().join("temproots/12345");
        fs::write(&name, format!("/nix/store/{A}\0")).unwrap();
        let mut opened = File::open(&name).unwrap();
        assert!(
            read_all(dir.path(), &StoreDir::default())
                .unwrap()
                .is_empty()
        );
        assert!(!name.exists());
        let mut bytes = Vec::new();
        opened.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes[0], b'd');
    }

    #[test]
    fn a_root_without_its_end_was_not_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("temproots")).unwrap();
        let name = dir.path().join("temproots/77.3");
        fs::write(&name, format!("/nix/store/{A}\0/nix/store/1111")).unwrap();
        let held = File::open(&name).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        let roots = read_all(dir.path(), &StoreDir::default()).unwrap();
        assert_eq!(roots, [(77, path(A))]);
    }

    #[test]
    fn a_root_added_during_a_collection_of_this_process_reaches_it() {
        let dir = tempfile::tempdir().unwrap();
        let before = TempRoots::new(dir.path(), &StoreDir::default());
        before.add(&[path(A)]).unwrap();
        let gc = GcLock::exclusive(dir.path(), &Silent).unwrap();
        let (server, found) = RootServer::start(dir.path(), &StoreDir::default()).unwrap();
        assert_eq!(found.len(), 1);
        let during = TempRoots::new(dir.path(), &StoreDir::default());
        during.add(&[path(B)]).unwrap();
        before.add(&[path(B)]).unwrap();
        let lock_file = path(&format!("{B}.lock"));
        assert!(!server.claim(&path(A)));
        assert!(!server.claim(&path(B)));
        assert!(!server.claim(&lock_file));
        assert!(server.claim(&path("22222222222222222222222222222222-c")));
        drop(server);
        drop(gc);
        assert!(!socket_path(dir.path()).exists());
        assert_eq!(all(dir.path()), [A, B, B]);
    }

    #[test]
    fn who_adds_a_path_that_is_being_deleted_waits_for_the_end_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let gc = GcLock::exclusive(dir.path(), &Silent).unwrap();
        let (server, _) = RootServer::start(dir.path(), &StoreDir::default()).unwrap();
        assert!(server.claim(&path(A)));
        assert!(server.claim(&path(A)), "and its lock file, say");
        let (sender, added) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let roots = TempRoots::new(dir.path(), &StoreDir::default());
                roots.add(&[path(A)]).unwrap();
                sender.send(()).unwrap();
            });
            while !server.is_root(&path(A)) {
                std::thread::yield_now();
            }
            server.release(&path(A));
            assert!(added.recv_timeout(Duration::from_millis(20)).is_err());
            server.release(&path(A));
            added.recv().unwrap();
        });
        drop(server);
        drop(gc);
    }

    #[test]
    fn a_collection_that_ends_answers_nobody_and_the_root_is_added_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("long".repeat(40)).join("state");
        fs::create_dir_all(&state).unwrap();
        let gc = GcLock::exclusive(&state, &Silent).unwrap();
        let (server, _) = RootServer::start(&state, &StoreDir::default()).unwrap();
        assert!(server.claim(&path(A)));
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                let roots = TempRoots::new(&state, &StoreDir::default());
                roots.add(&[path(A)]).unwrap();
                roots
            });
            while !server.is_root(&path(A)) {
                std::thread::yield_now();
            }
            drop(server);
            drop(gc);
            let roots = client.join().unwrap();
            assert_eq!(all(&state), [A]);
            drop(roots);
        });
    }

    #[test]
    fn nothing_that_was_acknowledged_is_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<StorePath> = (0..200).map(|n| path(&format!("{n:032}-x"))).collect();
        let deleted = Mutex::new(HashSet::new());
        std::thread::scope(|scope| {
            let clients: Vec<_> = names
                .chunks(50)
                .map(|mine| {
                    let (dir, deleted) = (dir.path(), &deleted);
                    scope.spawn(move || {
                        let roots = TempRoots::new(dir, &StoreDir::default());
                        for path in mine {
                            roots.add(std::slice::from_ref(path)).unwrap();
                            // What was deleted before is made anew.
                            lock(deleted).remove(path);
                        }
                        roots
                    })
                })
                .collect();
            while clients.iter().any(|client| !client.is_finished()) {
                let gc = GcLock::exclusive(dir.path(), &Silent).unwrap();
                let (server, _) = RootServer::start(dir.path(), &StoreDir::default()).unwrap();
                for path in &names {
                    if server.claim(path) {
                        lock(&deleted).insert(path.clone());
                        server.release(path);
                    }
                }
                drop(server);
                drop(gc);
            }
            for client in clients {
                drop(client.join().unwrap());
            }
        });
        assert!(lock(&deleted).is_empty(), "{deleted:?}");
    }
}
