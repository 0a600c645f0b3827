//! The Nix store that is adopted: its places, its database (read-only), its locks, and who uses it.
//!
//! Formats: schema 10, `big-lock` and `gc.lock` as in Nix 2.26.3 and 2.34.8. Every process that has the store open
//! holds `big-lock` shared for as long, so who gets it exclusively is alone. Under `gc.lock` nobody can add a
//! temporary root, which every addition begins with.
//!
//! Memory: about 150 bytes for each valid path.

use super::interrupted;
use crate::config::Layout;
use crate::files::open_or_create;
use crate::mount::mountinfo;
use crate::{Error, Result};
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use rustix::fs::{AtFlags, CWD, FlockOperation, StatxFlags};
use rustix::mount::OpenTreeFlags;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use understory_nix::{NarHash, StoreDir, StorePath};

/// The schema that Nix has had since 2.0.
const SCHEMA: &str = "10";
/// How long a writer of the database may be in the way.
const BUSY_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two attempts at a lock.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// Users of a store that a message names.
const USERS_NAMED_MAX: usize = 5;

/// A local Nix store.
#[derive(Debug, Clone)]
pub(super) struct NixStore {
    /// `root`'s store directory.
    pub(super) real: PathBuf,
    pub(super) state: PathBuf,
    pub(super) log: PathBuf,
}

/// A valid path.
#[derive(Debug, Clone)]
pub(super) struct Valid {
    pub(super) path: StorePath,
    pub(super) nar_hash: NarHash,
    /// 0 if it is not recorded.
    pub(super) nar_size: u64,
}

/// Held while nobody else may use the store.
pub(super) struct Locks {
    big: File,
    gc: File,
}

/// A process that uses something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its process id.
    pub pid: u32,
    /// Its name (`comm`).
    pub name: String,
}

/// The directory of originals, also while the overlay hides it.
pub(super) struct Original {
    pub(super) path: PathBuf,
    /// True if something is mounted over it.
    pub(super) is_hidden: bool,
    _tree: Option<OwnedFd>,
}

impl NixStore {
    /// The store below `root`; checks that it is a store of the known kind.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let root = fs::canonicalize(root).map_err(|e| Error::io("resolving", root, e))?;
        let store = Self {
            real: root.join("nix/store"),
            state: root.join("nix/var/nix"),
            log: root.join("nix/var/log/nix"),
        };
        let database = store.database();
        if !database.exists() {
            return Err(Error::user(format!(
                "there is no local Nix store in {}: {} is not there",
                root.display(),
                database.display()
            ))
            .with_hint("name the directory that holds nix/store and nix/var/nix"));
        }
        for dir in [&store.real, &store.state] {
            let real = fs::canonicalize(dir).map_err(|e| Error::io("resolving", dir, e))?;
            if real != *dir {
                return Err(Error::user(format!(
                    "{} is reached through a symlink: it is {}",
                    dir.display(),
                    real.display()
                ))
                .with_hint("only a store whose directories are where their names say is adopted"));
            }
        }
        let schema_file = store.state.join("db/schema");
        let schema =
            fs::read_to_string(&schema_file).map_err(|e| Error::io("reading", &schema_file, e))?;
        if schema.trim() != SCHEMA {
            return Err(Error::user(format!(
                "{} has schema {}, expected {SCHEMA}",
                database.display(),
                schema.trim()
            ))
            .with_hint("open the store once with a current Nix, which brings it up to date"));
        }
        Ok(store)
    }

    pub(super) fn database(&self) -> PathBuf {
        self.state.join("db/db.sqlite")
    }

    fn connect(&self) -> Result<Connection> {
        let path = self.database();
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Connection::open_with_flags(&path, flags)
            .and_then(|connection| {
                connection.busy_timeout(BUSY_TIMEOUT)?;
                Ok(connection)
            })
            .map_err(|e| self.failed(e))
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        let kind = Error::from_sqlite_kind(&error);
        Error::new(kind, format!("reading {}", self.database().display())).with_source(error)
    }

    /// The store directory that its paths have; `None` without paths.
    pub(super) fn store_dir(&self) -> Result<Option<StoreDir>> {
        let path: Option<String> = self
            .connect()?
            .query_row("select path from ValidPaths limit 1", [], |row| row.get(0))
            .optional()
            .map_err(|e| self.failed(e))?;
        match path.as_deref().and_then(|path| path.rsplit_once('/')) {
            Some((dir, _)) => Ok(Some(StoreDir::new(dir)?)),
            None => Ok(None),
        }
    }

    /// All valid paths, in the order of their registration.
    pub(super) fn valid(&self, store_dir: &StoreDir) -> Result<Vec<Valid>> {
        let connection = self.connect()?;
        let mut statement = connection
            .prepare("select path, hash, narSize from ValidPaths order by id")
            .map_err(|e| self.failed(e))?;
        let rows = statement
            .query_map([], |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, Option<i64>>(2)?,
                ))
            })
            .map_err(|e| self.failed(e))?;
        let mut out = Vec::new();
        for row in rows {
            let (path, hash, size) = row.map_err(|e| self.failed(e))?;
            let bad = |e: String| {
                Error::corrupt(format!("{}: row of {path}: {e}", self.database().display()))
            };
            out.push(Valid {
                path: store_dir
                    .parse(path.as_bytes())
                    .map_err(|e| bad(e.to_string()))?,
                nar_hash: NarHash::parse(&hash).map_err(|e| bad(e.to_string()))?,
                nar_size: size.unwrap_or(0).max(0).unsigned_abs(),
            });
        }
        Ok(out)
    }

    /// Who owns the store's objects.
    pub(super) fn owner(&self) -> Result<super::tree::Owner> {
        let path = self.database();
        let found = fs::metadata(&path).map_err(|e| Error::io("examining", &path, e))?;
        Ok(super::tree::Owner {
            uid: found.uid(),
            gid: found.gid(),
        })
    }

    /// Refuses while a daemon waits for clients: it would open the store again, and its settings say that it is a
    /// plain one. A daemon of the processes `but` may.
    fn check_daemon(&self, but: &[u32]) -> Result<()> {
        match self.listening_daemon() {
            Some((socket, pid)) if pid.is_none_or(|pid| !but.contains(&pid)) => Err(Error::user(format!(
                "a Nix daemon listens on {}",
                socket.display()
            ))
            .with_hint(
                "stop it: `systemctl stop nix-daemon.socket nix-daemon.service`, then run the same command again",
            )),
            _ => Ok(()),
        }
    }

    /// The socket of a daemon that accepts connections, and its process.
    pub(super) fn listening_daemon(&self) -> Option<(PathBuf, Option<u32>)> {
        let socket = self.state.join("daemon-socket/socket");
        if !fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket()) {
            return None;
        }
        let stream = UnixStream::connect(&socket).ok()?;
        let pid = rustix::net::sockopt::socket_peercred(&stream)
            .ok()
            .and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
        Some((socket, pid))
    }

    /// Processes that have the store open.
    pub(super) fn users(&self) -> Vec<User> {
        let Ok(lock) = fs::metadata(self.state.join("db/big-lock")) else {
            return Vec::new();
        };
        processes(&|pid| {
            descriptors(pid).any(|fd| {
                fs::metadata(&fd).is_ok_and(|m| (m.dev(), m.ino()) == (lock.dev(), lock.ino()))
            })
        })
    }

    /// Takes the store for ourselves, waiting at most `wait`. The processes `but`, our own instance, may have it open
    /// until [`Locks::exclude`].
    ///
    /// # Errors
    /// Somebody uses it; interrupted.
    pub(super) fn lock(&self, wait: Duration, but: &[u32], cancel: &AtomicBool) -> Result<Locks> {
        self.check_daemon(but)?;
        let locks = Locks {
            big: open_or_create(&self.state.join("db/big-lock"))?,
            gc: open_or_create(&self.state.join("gc.lock"))?,
        };
        let until = Instant::now() + wait;
        // In the order in which Nix takes them.
        self.take(&locks.big, until, but, cancel)?;
        self.take(&locks.gc, until, &[], cancel)?;
        Ok(locks)
    }

    fn take(&self, file: &File, until: Instant, but: &[u32], cancel: &AtomicBool) -> Result<()> {
        while rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if cancel.load(Ordering::Relaxed) {
                return Err(interrupted());
            }
            let users = self.users();
            if !users.is_empty() && users.iter().all(|user| but.contains(&user.pid)) {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(self.in_use(&users));
            }
            std::thread::sleep(LOCK_POLL);
        }
        Ok(())
    }

    fn in_use(&self, users: &[User]) -> Error {
        let who = if users.is_empty() {
            "its locks are held".to_owned()
        } else {
            name(users)
        };
        Error::user(format!(
            "the Nix store in {} is in use: {who}",
            self.state.display()
        ))
        .with_hint(
            "let it finish or end it, then run the same command again; --wait SECONDS waits for it",
        )
    }

    /// The directory of originals.
    pub(super) fn original(&self, layout: &Layout) -> Result<Original> {
        let list = mountinfo::mounts()?;
        let visible = Original {
            path: self.real.clone(),
            is_hidden: false,
            _tree: None,
        };
        let ours =
            mountinfo::topmost_at(&list, &self.real).filter(|top| is_overlay(top, &layout.upper));
        if ours.is_none() {
            return Ok(visible);
        }
        if list.iter().filter(|m| m.mount_point == self.real).count() > 1 {
            return Err(Error::environment(format!(
                "{} is a mount of its own, hidden by the overlay on it",
                self.real.display()
            ))
            .with_hint("run `understory down` first, so that the originals show"));
        }
        let parent = self.real.parent().unwrap_or(Path::new("/"));
        let tree = rustix::mount::open_tree(
            CWD,
            parent,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(|e| Error::io("looking under the overlay on", &self.real, e.into()))?;
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
        path.push(self.real.file_name().unwrap_or_default());
        Ok(Original {
            path,
            is_hidden: true,
            _tree: Some(tree),
        })
    }

    /// Processes that use files of the mount with the id `overlay`, and names of originals that a process still
    /// uses: what was open before the overlay came.
    pub(super) fn uses(&self, overlay: Option<u64>) -> (Vec<User>, HashMap<OsString, User>) {
        let (mut of_overlay, mut of_originals) = (Vec::new(), HashMap::new());
        let us = std::process::id();
        for pid in pids().into_iter().filter(|pid| *pid != us) {
            let mut uses_overlay = false;
            for link in links(pid) {
                let Ok(target) = fs::read_link(&link) else {
                    continue;
                };
                let Ok(below) = target.strip_prefix(&self.real) else {
                    continue;
                };
                let mount = rustix::fs::statx(CWD, &link, AtFlags::empty(), StatxFlags::MNT_ID);
                if overlay.is_some() && mount.ok().map(|found| found.stx_mnt_id) == overlay {
                    uses_overlay = true;
                } else if let Some(name) = below.components().next() {
                    of_originals
                        .entry(name.as_os_str().to_owned())
                        .or_insert_with(|| user(pid));
                }
            }
            if uses_overlay {
                of_overlay.push(user(pid));
            }
        }
        (of_overlay, of_originals)
    }
}

impl Locks {
    /// Lets others open the store again; nobody can add to it before this is dropped.
    pub(super) fn share(&self) -> Result<()> {
        rustix::fs::flock(&self.big, FlockOperation::LockShared).map_err(|e| {
            Error::environment("sharing Nix's big-lock").with_source(std::io::Error::from(e))
        })
    }
    /// Takes the store for ourselves alone, now that our own instance is gone.
    pub(super) fn exclude(
        &self,
        store: &NixStore,
        wait: Duration,
        cancel: &AtomicBool,
    ) -> Result<()> {
        store.take(&self.big, Instant::now() + wait, &[], cancel)
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        // Closing the descriptors would do; this is for descriptors that a child has inherited.
        let _ = rustix::fs::flock(&self.gc, FlockOperation::Unlock);
        let _ = rustix::fs::flock(&self.big, FlockOperation::Unlock);
    }
}

/// True if it is the overlay with that upper directory.
pub(super) fn is_overlay(entry: &mountinfo::MountEntry, upper: &Path) -> bool {
    entry.fs_type == "overlay"
        && entry.super_option("upperdir").is_some_and(|dir| {
            let dir = Path::new(&dir);
            dir == upper || fs::canonicalize(upper).is_ok_and(|upper| dir == upper)
        })
}

/// Names processes in a message.
pub(super) fn name(users: &[User]) -> String {
    let mut text: Vec<String> = users
        .iter()
        .take(USERS_NAMED_MAX)
        .map(|user| format!("{} (process {})", user.name, user.pid))
        .collect();
    if users.len() > USERS_NAMED_MAX {
        text.push(format!("{} more", users.len() - USERS_NAMED_MAX));
    }
    text.join(", ")
}

fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn processes(which: &dyn Fn(u32) -> bool) -> Vec<User> {
    let us = std::process::id();
    pids()
        .into_iter()
        .filter(|pid| *pid != us && which(*pid))
        .map(user)
        .collect()
}

fn user(pid: u32) -> User {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    User {
        pid,
        name: name.trim().to_owned(),
    }
}

fn descriptors(pid: u32) -> impl Iterator<Item = PathBuf> {
    below(format!("/proc/{pid}/fd"))
}

/// Everything that keeps a file in use.
fn links(pid: u32) -> impl Iterator<Item = PathBuf> {
    ["exe", "cwd", "root"]
        .into_iter()
        .map(move |name| PathBuf::from(format!("/proc/{pid}/{name}")))
        .chain(descriptors(pid))
        .chain(below(format!("/proc/{pid}/map_files")))
}

fn below(dir: String) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}
