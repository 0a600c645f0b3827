//! The overlayfs: that it is the right one, that it shows what is there, that it forgets what it must.
//!
//! Overlayfs remembers names that it has not found, and objects that were removed below it (`Stale file handle`). A
//! remount with mount(2) makes it forget. The memory belongs to the superblock, so one remount serves every mount
//! namespace in which the same overlay is mounted, bind mounts included. Seen on Linux 6.18 by hand: a private copy of
//! the namespace showed the removed object and hid the new one until the overlay was remounted in the first namespace.
//! An overlay that somebody mounted a second time from the same directories is another superblock; it is none of ours,
//! and the kernel forbids it to share our upper.
//!
//! A remount that is due is noted in a file of the state directory before anything is removed, so that the next open
//! makes up for a crash.
//!
//! Cost: [`Merged::show`] is one `lstat` for each name; a remount is well below a millisecond.

use super::Lower;
use crate::local::LocalPaths;
use crate::mount::mountinfo;
use crate::mount::{OverlayMount, overlay::unfit};
use crate::{Error, Result};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use understory_nix::StorePath;

/// The file in the state directory that says that a remount is due.
const DUE: &str = "understory-remount-is-due";
/// Entries of a lower that are looked for in the merged directory when options cannot tell whether it is the right one.
const PROBES_MAX: usize = 64;
/// How much of a hook's complaint is repeated.
const COMPLAINT_BYTES_MAX: usize = 2 << 10;

/// How overlayfs is made to forget stale entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remount {
    /// By mount(2), in our namespace. Where that is not permitted, clients are told.
    Ours,
    /// A program with the merged directory as its argument, as Nix's `remount-hook`; ours is tried if it fails.
    Hook(PathBuf),
    /// Somebody else does it; clients are told.
    Never,
}

/// The merged directory of an overlay store.
pub(super) struct Merged {
    /// Canonical.
    dir: PathBuf,
    upper: PathBuf,
    lowers: Vec<PathBuf>,
    remount: Remount,
    /// The file that says that a remount is due.
    due: PathBuf,
    /// Threads that have announced a removal and not remounted since.
    removing: Mutex<HashSet<ThreadId>>,
    /// Marks in the upper are `user.overlay.…`, not `trusted.overlay.…`.
    user_attributes: bool,
}

impl Merged {
    /// Looks at what is mounted; with `check` compares it with the layers.
    ///
    /// # Errors
    /// In Nix's words: mounted incorrectly, and how.
    pub(super) fn open(
        local: &LocalPaths,
        upper: &Path,
        lowers: &[Arc<dyn Lower>],
        remount: Remount,
        check: bool,
    ) -> Result<Self> {
        if check {
            let dirs: Vec<LowerDir> = lowers
                .iter()
                .flat_map(|lower| {
                    lower
                        .layers()
                        .into_iter()
                        .map(|dir| (lower.describe(), dir))
                })
                .collect();
            check_mount(&local.real, upper, &dirs)?;
        }
        let dir = std::fs::canonicalize(&local.real).unwrap_or_else(|_| local.real.clone());
        let entry = mountinfo::mount_at(&dir)?;
        let user_attributes = entry.is_some_and(|e| e.super_option("userxattr").is_some());
        Ok(Self {
            dir,
            upper: upper.to_path_buf(),
            lowers: lowers.iter().map(|l| l.real_dir().to_path_buf()).collect(),
            remount,
            due: local.state.join(DUE),
            removing: Mutex::default(),
            user_attributes,
        })
    }

    /// True if overlayfs keeps its marks in `user.` attributes.
    pub(super) fn has_user_attributes(&self) -> bool {
        self.user_attributes
    }

    /// True if a lower directory has an entry of that name.
    ///
    /// # Errors
    /// I/O.
    pub(super) fn lower_has(&self, path: &StorePath) -> Result<bool> {
        for lower in &self.lowers {
            if is_there(&lower.join(path.base_name()))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes sure that these names, which a lower has got or the upper has lost, are seen as they are: looks them up,
    /// remounts if one is hidden or stale.
    ///
    /// # Errors
    /// Hidden even after a remount.
    pub(super) fn show(&self, paths: &[StorePath]) -> Result<()> {
        let Some(first) = self.first_hidden(paths)? else {
            return Ok(());
        };
        tracing::debug!(path = %first, "hidden by the overlay: remounting");
        self.remount()?;
        match self.first_hidden(paths)? {
            None => Ok(()),
            Some(path) => {
                let mut places = self.lowers.iter().chain([&self.upper]);
                let has = places.find(|dir| is_there(&dir.join(path.base_name())).unwrap_or(false));
                let dir = self.dir.display();
                Err(match has {
                    Some(place) => Error::environment(format!(
                        "'{path}' is in {} but cannot be seen in {dir}, even after a remount",
                        place.display()
                    )),
                    None => Error::corrupt(format!(
                        "'{path}' is valid but cannot be seen in {dir}: neither the upper directory nor a lower one has it"
                    )),
                })
            }
        }
    }

    /// Notes on disk that a remount is due, before an upper object is removed below the overlayfs. Survives a crash:
    /// the next open remounts.
    ///
    /// # Errors
    /// I/O.
    pub(super) fn remount_is_due(&self) -> Result<()> {
        let mut removing = self.removing.lock().unwrap_or_else(PoisonError::into_inner);
        // Not synced: a machine that goes down takes the mount with it.
        std::fs::write(&self.due, b"").map_err(|e| Error::io("writing", &self.due, e))?;
        removing.insert(std::thread::current().id());
        Ok(())
    }

    /// Remounts if it is due. Also to be called when the operation failed.
    ///
    /// # Errors
    /// The hook failed, or not permitted: a warning for the user, with a hint.
    pub(super) fn remount_if_due(&self) -> Result<()> {
        // Held meanwhile: what another thread announces later is not covered by this remount.
        let mut removing = self.removing.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_there(&self.due)? {
            return Ok(());
        }
        self.remount()?;
        removing.remove(&std::thread::current().id());
        if removing.is_empty() {
            match std::fs::remove_file(&self.due) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("removing", &self.due, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn first_hidden<'p>(&self, paths: &'p [StorePath]) -> Result<Option<&'p StorePath>> {
        for path in paths {
            let place = self.dir.join(path.base_name());
            match rustix::fs::lstat(&place) {
                Ok(_) => {}
                Err(Errno::NOENT | Errno::STALE) => return Ok(Some(path)),
                Err(error) => return Err(Error::io("looking up", place, error.into())),
            }
        }
        Ok(None)
    }

    /// Remounts, whether it is due or not: what somebody else did to the layers is seen then.
    ///
    /// # Errors
    /// As [`Merged::remount_if_due`].
    pub(super) fn remount(&self) -> Result<()> {
        let hook = match &self.remount {
            Remount::Never => return Err(self.needs_remounting()),
            Remount::Ours => None,
            Remount::Hook(program) => match self.run_hook(program) {
                Ok(()) => return Ok(()),
                Err(error) => Some(error),
            },
        };
        let ours = OverlayMount::find(&self.dir).and_then(|mount| match mount {
            Some(mount) => mount.remount(),
            None => Err(Error::environment(format!(
                "no overlay is mounted on {}",
                self.dir.display()
            ))),
        });
        match (hook, ours) {
            (None, Ok(())) => Ok(()),
            (Some(error), Ok(())) => {
                tracing::warn!(
                    error = error.chain(),
                    "the remount hook failed, remounted without it"
                );
                Ok(())
            }
            (Some(error), Err(_)) => Err(error),
            (None, Err(error)) => Err(self.needs_remounting().with_source(error.chain())),
        }
    }

    /// In Nix's words.
    fn needs_remounting(&self) -> Error {
        Error::environment(format!(
            "'{}' needs remounting, set remount-hook to do this automatically",
            self.dir.display()
        ))
        .with_hint("until then files may fail with \"Stale file handle\"; or let understory mount the overlay itself")
    }

    fn run_hook(&self, program: &Path) -> Result<()> {
        let mut command = Command::new(program);
        command.arg(&self.dir).stdin(Stdio::null());
        // With the new mount interface `mount -o remount` of an overlay does nothing, or fails.
        if std::env::var_os("LIBMOUNT_FORCE_MOUNT2").is_none() {
            command.env("LIBMOUNT_FORCE_MOUNT2", "always");
        }
        let done = command
            .output()
            .map_err(|e| Error::io("running the remount hook", program, e))?;
        if done.status.success() {
            return Ok(());
        }
        let end = done.stderr.len();
        let said = &done.stderr[end - end.min(COMPLAINT_BYTES_MAX)..];
        Err(Error::environment(format!(
            "the remount hook {} failed with {}: {}",
            program.display(),
            done.status,
            String::from_utf8_lossy(said).trim()
        )))
    }
}

/// Nix's words, and what is wrong.
fn incorrect(real: &Path, what: &str) -> Error {
    Error::environment(format!(
        "overlay filesystem \"{}\" mounted incorrectly: {what}",
        real.display()
    ))
}

fn how_to_mount(real: &Path, upper: &Path, lowers: &[LowerDir]) -> String {
    let kind = rustix::fs::statfs(upper).ok();
    if let Some(name) = kind.and_then(|kind| unfit(kind.f_type.cast_unsigned())) {
        return format!(
            "the upper directory {} lies on {name}, which overlayfs does not take: use ext4, xfs, btrfs or tmpfs",
            upper.display()
        );
    }
    let lowers: Vec<String> = lowers
        .iter()
        .map(|(_, dir)| dir.display().to_string())
        .collect();
    format!(
        "mount it with `mount -t overlay overlay -o lowerdir={},upperdir={},workdir=WORK,redirect_dir=off,metacopy=off,index=off {}`",
        lowers.join(":"),
        upper.display(),
        real.display()
    )
}

/// What a lower store is called, and where it has its objects.
pub type LowerDir = (String, PathBuf);

/// Compares what is mounted on `real` with the layers, by device and inode. [`Overlay::open`](super::Overlay::open) does it; earlier
/// it is worth more than what a store says that is opened at a wrong place.
///
/// # Errors
/// In Nix's words: mounted incorrectly, and how; with a hint.
pub fn check_mount(real: &Path, upper: &Path, lowers: &[LowerDir]) -> Result<()> {
    let hint = || how_to_mount(real, upper, lowers);
    let dir = &std::fs::canonicalize(real).map_err(|error| {
        incorrect(real, &format!("it cannot be found: {error}")).with_hint(hint())
    })?;
    let entry = mountinfo::mount_at(dir)?;
    let wrong = |what: &str| incorrect(dir, what).with_hint(hint());
    let Some(entry) = &entry else {
        return Err(wrong("nothing is mounted there"));
    };
    if !matches!(&*entry.fs_type, "overlay" | "fuse.fuse-overlayfs") {
        return Err(wrong(&format!(
            "a file system of type {} is mounted there",
            entry.fs_type
        )));
    }
    // Of a bind mount only a part is seen.
    let below = entry.root.strip_prefix("/").unwrap_or(&entry.root);
    let dirs: Vec<PathBuf> = entry
        .overlay_lower_dirs()
        .iter()
        .map(|dir| dir.join(below))
        .collect();
    let names = |dirs: &[PathBuf]| {
        let names: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        names.join(", ")
    };
    let unknown = dirs.is_empty() || dirs.iter().any(|dir| id(dir).is_none());
    for (name, expected) in lowers {
        let Some(wanted) = id(expected) else {
            return Err(wrong(&format!(
                "{}, where {} has its objects, cannot be examined",
                expected.display(),
                name
            )));
        };
        if dirs.iter().any(|dir| id(dir) == Some(wanted))
            || (unknown && shows(dir, upper, expected)?)
        {
            continue;
        }
        return Err(wrong(&format!(
            "expected {} of {} as a lower directory, found {}",
            expected.display(),
            name,
            if dirs.is_empty() {
                "none that can be told".into()
            } else {
                names(&dirs)
            }
        )));
    }
    if dirs.len() > lowers.len() {
        tracing::warn!(
            "the overlay on {} has more lower directories ({}) than there are lower stores",
            dir.display(),
            names(&dirs)
        );
    }
    let found = entry
        .super_option("upperdir")
        .map(|found| unescaped(Path::new(&found)).join(below));
    match found.as_deref().map(|found| (found, id(found))) {
        Some((_, Some(found))) if Some(found) == id(upper) => Ok(()),
        Some((found, Some(_))) => Err(wrong(&format!(
            "expected {} as the upper directory, found {}",
            upper.display(),
            found.display()
        ))),
        None if entry.fs_type == "overlay" => Err(wrong("it has no upper directory")),
        _ if takes(dir, upper)? => Ok(()),
        _ => Err(wrong(&format!(
            "what is written to it does not appear in {}",
            upper.display()
        ))),
    }
}

/// The kernel shows this option as it was given, with the backslashes that mount(2) wants before commas, but without
/// where the new mount interface was used.
fn unescaped(dir: &Path) -> PathBuf {
    if id(dir).is_some() {
        return dir.to_path_buf();
    }
    let mut out = Vec::new();
    let mut bytes = dir.as_os_str().as_bytes().iter().copied();
    while let Some(byte) = bytes.next() {
        out.extend(if byte == b'\\' {
            bytes.next()
        } else {
            Some(byte)
        });
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Device and inode.
fn id(dir: &Path) -> Option<(u64, u64)> {
    // Relative to what, nobody knows.
    if !dir.is_absolute() {
        return None;
    }
    std::fs::metadata(dir)
        .ok()
        .map(|found| (found.dev(), found.ino()))
}

/// True if entries of `lower` are seen in `merged`, also if there are none to be seen.
fn shows(merged: &Path, upper: &Path, lower: &Path) -> Result<bool> {
    let entries = std::fs::read_dir(lower).map_err(|e| Error::io("reading", lower, e))?;
    for entry in entries.take(PROBES_MAX) {
        let name = entry
            .map_err(|e| Error::io("reading", lower, e))?
            .file_name();
        if !is_there(&upper.join(&name))? && !is_there(&merged.join(&name))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// True if what is made in `merged` appears in `upper`.
fn takes(merged: &Path, upper: &Path) -> Result<bool> {
    let probe = tempfile::Builder::new()
        .prefix("tmp-understory-probe-")
        .tempfile_in(merged)
        .map_err(|e| Error::io("creating a file in", merged, e))?;
    match probe.path().file_name() {
        Some(name) => is_there(&upper.join(name)),
        None => Ok(false),
    }
}

pub(super) fn is_there(path: &Path) -> Result<bool> {
    match rustix::fs::lstat(path) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::STALE) => Ok(false),
        Err(error) => Err(Error::io("looking up", path, error.into())),
    }
}
