//! Leases: what a writing process stands on and has not published yet.
//!
//! A writer leaves out pieces that are stored, and writes pieces that nothing refers to until its rows
//! commit. A collection must take neither away. So before a writer relies on a pack (a piece in it was
//! found, or is appended to it) it notes the pack in its *lease file*, and the collector deletes no
//! pack that a living lease names.
//!
//! ```text
//! writer                               collector
//! 1. note the pack in the lease        1. publish the list of condemned packs
//! 2. read the list of condemned packs  2. read the leases
//!    condemned: do not rely on it         named: wait, or leave the pack alone
//! 3. see that the pack is there        3. delete packs
//!                                      4. take the list away
//! ```
//! Whichever comes first, one of the two sees the other; a writer that finds no list because all is over
//! finds no pack either. What is noted is remembered per pack, so
//! that a lookup costs one comparison.
//!
//! **Operations and epochs.** An *operation* begins with a tree builder and ends when its root is
//! published, is given up, or waits longer than [`UNPUBLISHED_MAX`] (whoever publishes it later has it
//! verified anew: [`Core::secure`](crate::gc)). A lease file belongs to an epoch; a new one begins when
//! the list of condemned packs has changed. A file goes when no operation is left that began in its
//! epoch or before. So a collector waits only for operations that began before it condemned anything,
//! however busy the process is.
//!
//! A lease file is locked (`flock`) as long as its process lives; nobody needs one that is not locked.
//!
//! Cost: a few small writes per operation, one read of 32 bytes per pack and epoch.

use crate::condemned::Condemned;
use crate::core::{Core, Pack, lock, random_id};
use crate::directory::Node;
use crate::error::{CastoreError, IoContext};
use crate::pack::{Class, Key, PackId};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where lease files lie.
pub(crate) const LEASES_DIR: &str = "leases";
const ID_BYTES: usize = 16;
/// How long a finished tree may wait for its publication before it does not hold up collections any
/// more. An import publishes every second; a path that waits for a reference waits for its download.
const UNPUBLISHED_MAX: Duration = Duration::from_secs(900);
/// How often unpublished trees are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// The leases of this process on one castore.
#[derive(Default)]
pub(crate) struct Leases {
    state: std::sync::Mutex<State>,
    /// Number of the current epoch; what [`Pack::relied`] is compared with.
    current: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The oldest first; the last is current.
    epochs: VecDeque<Epoch>,
    /// Epochs of finished trees that are not published, by their root.
    unpublished: HashMap<Key, Vec<(u64, Instant)>>,
    swept: Option<Instant>,
}

struct Epoch {
    number: u64,
    /// The list of condemned packs when it began.
    condemned: Option<[u8; ID_BYTES]>,
    operations: u64,
    file: Option<LeaseFile>,
}

struct LeaseFile {
    file: File,
    path: PathBuf,
    len: u64,
}

/// An operation that has not ended.
pub(crate) struct Operation {
    core: Arc<Core>,
    /// `None` once it has become an unpublished tree.
    epoch: Option<u64>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(epoch) = self.epoch.take() {
            self.core.leases.end(epoch);
        }
    }
}

impl Operation {
    pub(crate) fn begin(core: &Arc<Core>) -> Self {
        // What cannot be read now is looked at again before anything is relied on.
        let now = core
            .look_at_condemned()
            .unwrap_or_else(|_| core.condemned().name());
        let mut state = lock(&core.leases.state);
        state.sweep();
        let fits = state
            .epochs
            .back()
            .is_some_and(|epoch| epoch.condemned == now);
        if !fits {
            core.leases.new_epoch(&mut state, now);
        }
        let mut number = 0;
        if let Some(epoch) = state.epochs.back_mut() {
            epoch.operations += 1;
            number = epoch.number;
        }
        Self {
            core: Arc::clone(core),
            epoch: Some(number),
        }
    }

    /// The tree is complete: keeps what it needs until it is published or given up.
    pub(crate) fn finished(mut self, root: &Node) {
        let Some(key) = root_key(root) else { return };
        if let Some(epoch) = self.epoch.take() {
            lock(&self.core.leases.state)
                .unpublished
                .entry(key)
                .or_default()
                .push((epoch, Instant::now()));
        }
    }
}

/// How a root is known; `None` if nothing is stored for it.
fn root_key(root: &Node) -> Option<Key> {
    match root {
        Node::Symlink { .. } | Node::File { size: 0, .. } => None,
        Node::File { digest, .. } => Some(Key::new(digest, Class::Blob)),
        Node::Directory { digest, .. } if *digest == crate::Digest::EMPTY => None,
        Node::Directory { digest, .. } => Some(Key::new(digest, Class::Directory)),
    }
}

impl State {
    /// Ends operations whose trees have waited too long.
    fn sweep(&mut self) {
        if self.swept.is_some_and(|at| at.elapsed() < SWEEP_EVERY) {
            return;
        }
        self.swept = Some(Instant::now());
        let mut ended = Vec::new();
        self.unpublished.retain(|_, waiting| {
            waiting.retain(|(epoch, since)| {
                let stays = since.elapsed() < UNPUBLISHED_MAX;
                if !stays {
                    ended.push(*epoch);
                }
                stays
            });
            !waiting.is_empty()
        });
        for epoch in ended {
            self.end(epoch);
        }
    }

    fn end(&mut self, number: u64) {
        if let Some(epoch) = self.epochs.iter_mut().find(|epoch| epoch.number == number) {
            epoch.operations -= 1;
        }
        while self
            .epochs
            .front()
            .is_some_and(|epoch| epoch.operations == 0)
        {
            if let Some(Epoch {
                file: Some(file), ..
            }) = self.epochs.pop_front()
            {
                // First the name, then the lock: nobody finds a file that is not locked.
                let _ = std::fs::remove_file(&file.path);
            }
        }
    }
}

impl Leases {
    fn new_epoch(&self, state: &mut State, condemned: Option<[u8; ID_BYTES]>) {
        let number = self.current.fetch_add(1, Ordering::AcqRel) + 1;
        state.epochs.push_back(Epoch {
            number,
            condemned,
            operations: 0,
            file: None,
        });
    }

    fn end(&self, epoch: u64) {
        lock(&self.state).end(epoch);
    }

    /// Ends one operation whose tree has this root; false if there is none.
    fn take(&self, root: &Node) -> bool {
        let Some(key) = root_key(root) else {
            return true;
        };
        let mut state = lock(&self.state);
        let Some(waiting) = state.unpublished.get_mut(&key) else {
            return false;
        };
        let epoch = waiting.pop().map(|(epoch, _)| epoch);
        if waiting.is_empty() {
            state.unpublished.remove(&key);
        }
        if let Some(epoch) = epoch {
            state.end(epoch);
        }
        epoch.is_some()
    }

    /// True if a finished tree with this root keeps what it needs.
    pub(crate) fn keeps(&self, root: &Node) -> bool {
        root_key(root).is_none_or(|key| lock(&self.state).unpublished.contains_key(&key))
    }

    /// True if no operation is going on.
    pub(crate) fn is_idle(&self) -> bool {
        lock(&self.state)
            .epochs
            .iter()
            .all(|epoch| epoch.operations == 0)
    }
}

impl Core {
    /// The tree is published, or never will be.
    pub(crate) fn release(&self, root: &Node) {
        self.leases.take(root);
    }

    /// Notes that our writer stands on a pack. False: it must not, as the pack is condemned, or as it
    /// cannot be noted.
    pub(crate) fn rely(&self, pack: &Pack) -> bool {
        if pack.relied.load(Ordering::Acquire) == self.leases.current.load(Ordering::Acquire) {
            return true;
        }
        // In this order: see above.
        let noted = self
            .note(pack)
            .and_then(|number| self.look_at_condemned().map(|_| number));
        match noted {
            Ok(_) if self.condemned().has(&pack.id) => {
                pack.condemned.store(true, Ordering::Release);
                false
            }
            // Last: what was condemned until a moment ago is deleted by now.
            Ok(_) if !pack.path.exists() => {
                pack.condemned.store(true, Ordering::Release);
                false
            }
            Ok(number) => {
                pack.relied.store(number, Ordering::Release);
                true
            }
            Err(error) => {
                tracing::warn!(%error, pack = %pack.id, "cannot note that a pack is needed");
                false
            }
        }
    }

    /// Notes that our writer appends to a pack of its own.
    pub(crate) fn rely_on_own(&self, pack: &Pack) -> Result<(), CastoreError> {
        if pack.relied.load(Ordering::Acquire) != self.leases.current.load(Ordering::Acquire) {
            let number = self.note(pack)?;
            pack.relied.store(number, Ordering::Release);
        }
        Ok(())
    }

    fn note(&self, pack: &Pack) -> Result<u64, CastoreError> {
        let mut state = lock(&self.leases.state);
        let Some(epoch) = state.epochs.back_mut() else {
            // What is appended now nobody waits for any more: its builder was given up.
            return Ok(self.leases.current.load(Ordering::Acquire));
        };
        let lease = match &mut epoch.file {
            Some(lease) => lease,
            none => none.insert(LeaseFile::create(&self.dir)?),
        };
        lease
            .file
            .write_all_at(&pack.id.0, lease.len)
            .verb("writing", &lease.path)?;
        lease.len += ID_BYTES as u64;
        Ok(epoch.number)
    }

    /// Takes over the list of condemned packs if it has changed; returns its name.
    pub(crate) fn look_at_condemned(&self) -> Result<Option<[u8; ID_BYTES]>, CastoreError> {
        let name = Condemned::read_name(&self.dir)?;
        if name == self.condemned().name() {
            return Ok(name);
        }
        let now = Condemned::read(&self.dir)?;
        let name = now.name();
        self.set_condemned(now);
        Ok(name)
    }
}

impl LeaseFile {
    fn create(castore: &Path) -> Result<Self, CastoreError> {
        let dir = castore.join(LEASES_DIR);
        loop {
            let name = format!(
                "{}-{}",
                std::process::id(),
                &crate::digest::hex(&random_id()?)[..16]
            );
            let path = dir.join(name);
            let made = File::options().write(true).create_new(true).open(&path);
            let file = match made {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    std::fs::create_dir_all(&dir).verb("creating", &dir)?;
                    continue;
                }
                made => made.verb("creating", &path)?,
            };
            file.lock().verb("locking", &path)?;
            // A collector that came before the lock took it for a dead one's.
            if file.metadata().verb("reading", &path)?.nlink() > 0 {
                return Ok(Self { file, path, len: 0 });
            }
        }
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        let state = self
            .state
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for file in state.epochs.iter().filter_map(|epoch| epoch.file.as_ref()) {
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

/// What the living leases of all processes name, with the process of each.
pub(crate) fn living(castore: &Path) -> Result<Vec<Lease>, CastoreError> {
    let dir = castore.join(LEASES_DIR);
    let mut leases = Vec::new();
    for name in crate::core::list_names(&dir)? {
        let path = dir.join(&name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(CastoreError::io("opening", &path, error)),
        };
        match file.try_lock_shared() {
            Ok(()) => {
                // Its process is gone.
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(CastoreError::io("removing", &path, error));
                    }
                    _ => continue,
                }
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(CastoreError::io("locking", &path, error));
            }
        }
        let bytes = std::fs::read(&path);
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(CastoreError::io("reading", &path, error)),
        };
        let process = name
            .split('-')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or_default();
        leases.push(Lease {
            process,
            packs: bytes
                .chunks_exact(ID_BYTES)
                .filter_map(|id| Some(PackId(id.try_into().ok()?)))
                .collect(),
        });
    }
    Ok(leases)
}

/// A living lease.
pub(crate) struct Lease {
    pub(crate) process: u32,
    pub(crate) packs: HashSet<PackId>,
}
