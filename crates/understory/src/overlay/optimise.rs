//! Optimising: upper copies of what a lower has go, equal files of the upper become one.
//!
//! Everything happens in the upper directory itself. Through overlayfs, a link to a file that only a lower has would
//! copy it up, and the upper would grow. What overlayfs has cached of a replaced file is stale then (it refuses to
//! remove it, ESTALE), so a remount is noted before.
//!
//! Equal files are found as stock Nix finds them, so that both may work on one store: `.links/<hash>`, SHA-256 of the
//! file's NAR in nix32; files that their owner may write are left alone. Source: `optimise-store.cc` of Nix 2.34.8. Two
//! things are more careful: contents are compared before a file is replaced, and an upper copy stays if it is not
//! the same as the lower's.
//!
//! Cost: one read of every file that has no link yet, two if it is replaced; one query to a lower for all objects of
//! the upper.

use super::Overlay;
use super::gc::upper_objects;
use crate::daemon::{Activity, Reporter, Silent};
use crate::files::remove_if_there;
use crate::local::restore::dump_path;
use crate::local::temp_roots::TempRoots;
use crate::nar::HashRequest;
use crate::{Error, Result};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::StorePath;
use understory_nix::worker::{ActivityType, Field, ResultType, Verbosity};

/// Paths that are looked at together: temporary roots are made and lowers asked for so many at once.
const BATCH_PATHS: usize = 1000;
/// Bytes that are compared at a time.
const COMPARED_BYTES: usize = 64 << 10;

/// Tells temporary names of this process apart.
static NEXT_LINK: AtomicU64 = AtomicU64::new(0);

impl Overlay {
    /// OptimiseStore.
    ///
    /// # Errors
    /// I/O; interrupted.
    pub(super) fn optimise_all(&self, reporter: &dyn Reporter) -> Result<()> {
        let done = self.optimise_objects(reporter);
        self.remount(reporter);
        done
    }
    /// Links the files of one upper object to equal ones in the upper's `.links`: for `auto-optimise-store`. Remounts if a
    /// file was replaced; where that is not possible it stays due.
    ///
    /// # Errors
    /// I/O.
    pub(super) fn optimise_object(&self, upper_object: &Path) -> Result<()> {
        let mut linker = Linker::new(self, &Silent)?;
        let done = linker.visit(upper_object);
        if linker.remount_noted
            && let Err(error) = self.inner.merged.remount_if_due()
        {
            tracing::warn!(error = %error.chain(), "remounting the merged store");
        }
        done
    }

    fn optimise_objects(&self, reporter: &dyn Reporter) -> Result<()> {
        let upper = upper_objects(&self.inner.upper)?;
        let mut paths = self.inner.db.all_paths()?;
        paths.retain(|path| upper.contains(path));
        let total = paths.len() as u64;
        let activity = Activity::start(
            reporter,
            Verbosity::Error,
            ActivityType::OptimiseStore,
            "",
            Vec::new(),
            0,
        );
        activity.progress(0, total, 0, 0);
        let roots = TempRoots::new(&self.local().state, self.store_dir());
        let mut linker = Linker::new(self, reporter)?;
        linker.activity = Some(&activity);
        let mut done = 0;
        for some in paths.chunks(BATCH_PATHS) {
            reporter.check()?;
            roots.add(some)?;
            // What was collected before that is gone.
            let valid = self.inner.db.valid(some)?;
            let mut some: Vec<StorePath> = some.to_vec();
            let mut valid = valid.into_iter();
            some.retain(|_| {
                let keep = valid.next() == Some(true);
                done += u64::from(!keep);
                keep
            });
            let duplicates = self.duplicates(&some, reporter)?;
            for (path, is_duplicate) in some.iter().zip(duplicates) {
                reporter.check()?;
                let object = self.inner.upper.join(path.base_name());
                if is_duplicate {
                    reporter.say(
                        Verbosity::Talkative,
                        &format!(
                            "removing the upper copy of '{}': a lower store has it",
                            self.store_dir().print(path)
                        ),
                    );
                    linker.bytes += self.delete_directly(&object)?;
                } else {
                    reporter.say(
                        Verbosity::Talkative,
                        &format!("optimising path '{}'", self.store_dir().print(path)),
                    );
                    linker.visit(&object)?;
                }
                done += 1;
                activity.progress(done, total, 0, 0);
            }
            self.remount(reporter);
            linker.remount_noted = false;
        }
        let (files, bytes) = (linker.files, linker.bytes);
        reporter.say(
            Verbosity::Info,
            &format!(
                "{:.1} MiB freed by hard-linking {files} files and removing copies of lower objects",
                bytes as f64 / f64::from(1 << 20)
            ),
        );
        Ok(())
    }

    /// For each of `paths`, which are rows and have an upper copy, whether a lower has the same: it calls the path valid,
    /// agrees on its contents, and its directory shows it.
    fn duplicates(&self, paths: &[StorePath], reporter: &dyn Reporter) -> Result<Vec<bool>> {
        let ours = self.inner.db.infos(paths)?;
        let mut duplicates = vec![false; paths.len()];
        // A lower that another one hides does not count: what is seen without the upper copy is the uppermost entry.
        let mut decided = vec![false; paths.len()];
        for lower in &self.inner.lowers {
            let theirs = lower.infos(paths)?;
            for (i, path) in paths.iter().enumerate() {
                if decided[i] {
                    continue;
                }
                let place = lower.real_dir().join(path.base_name());
                let is_there = match fs::symlink_metadata(&place) {
                    Ok(_) => true,
                    Err(error) if error.kind() == ErrorKind::NotFound => false,
                    Err(error) => return Err(Error::io("reading", place, error)),
                };
                let (Some(ours), Some(theirs)) = (&ours[i], &theirs[i]) else {
                    decided[i] = is_there;
                    continue;
                };
                let shown = self.store_dir().print(path);
                if !is_there {
                    reporter.say(
                        Verbosity::Warn,
                        &format!(
                            "warning: the lower store '{}' calls path '{shown}' valid, but has no such file; \
                             the upper copy stays",
                            lower.describe()
                        ),
                    );
                    continue;
                }
                decided[i] = true;
                duplicates[i] = ours.nar_hash == theirs.nar_hash;
                if !duplicates[i] {
                    reporter.say(
                        Verbosity::Info,
                        &format!(
                            "path '{shown}' is not the same in the lower store '{}': the upper copy stays",
                            lower.describe()
                        ),
                    );
                }
            }
        }
        Ok(duplicates)
    }
}

/// Links files of the upper to equal ones.
struct Linker<'a> {
    overlay: &'a Overlay,
    reporter: &'a dyn Reporter,
    activity: Option<&'a Activity<'a>>,
    links: std::path::PathBuf,
    /// Inodes that are in `.links`.
    linked: HashSet<u64>,
    remount_noted: bool,
    files: u64,
    bytes: u64,
}

impl<'a> Linker<'a> {
    fn new(overlay: &'a Overlay, reporter: &'a dyn Reporter) -> Result<Self> {
        let links = overlay.inner.upper.join(".links");
        fs::create_dir_all(&links).map_err(|e| Error::io("creating", &links, e))?;
        let mut linked = HashSet::new();
        for entry in fs::read_dir(&links).map_err(|e| Error::io("reading", &links, e))? {
            let entry = entry.map_err(|e| Error::io("reading", &links, e))?;
            linked.insert(entry.ino());
        }
        Ok(Self {
            overlay,
            reporter,
            activity: None,
            links,
            linked,
            remount_noted: false,
            files: 0,
            bytes: 0,
        })
    }

    /// Links what is at or below `path`. Directories are left as they were.
    fn visit(&mut self, path: &Path) -> Result<()> {
        self.reporter.check()?;
        let Some(metadata) = look(path)? else {
            return Ok(());
        };
        if !metadata.is_dir() {
            return self.link(path, &metadata, None);
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(|e| Error::io("reading", path, e))? {
            let entry = entry.map_err(|e| Error::io("reading", path, e))?;
            // The inode is in the directory: no system call for what is linked already.
            if !self.linked.contains(&entry.ino()) {
                names.push(entry.path());
            }
        }
        let parent = Parent {
            path,
            metadata: &metadata,
        };
        for child in names {
            match look(&child)? {
                Some(found) if found.is_dir() => self.visit(&child)?,
                Some(found) => self.link(&child, &found, Some(&parent))?,
                None => {}
            }
        }
        Ok(())
    }

    fn link(&mut self, path: &Path, metadata: &Metadata, parent: Option<&Parent>) -> Result<()> {
        let is_file = metadata.is_file();
        if !is_file && !metadata.is_symlink() {
            return Ok(());
        }
        if is_file && metadata.permissions().mode() & 0o200 != 0 {
            self.reporter.say(
                Verbosity::Warn,
                &format!(
                    "warning: skipping suspicious writable file '{}'",
                    path.display()
                ),
            );
            return Ok(());
        }
        if metadata.nlink() > 1 && self.linked.contains(&metadata.ino()) {
            return Ok(());
        }
        let hash = dump_path(path, HashRequest::None, &mut std::io::sink())?;
        let link = self.links.join(hash.nar_hash.to_hash().to_nix32());
        if let Some(found) = look(&link)?
            && found.ino() != metadata.ino()
            && !is_same(path, metadata, &link, &found)?
        {
            self.reporter.say(
                Verbosity::Warn,
                &format!(
                    "warning: removing corrupted link '{}'\n\
                     There may be more corrupted paths.\n\
                     You should run `nix-store --verify --check-contents --repair` to fix them all",
                    link.display()
                ),
            );
            remove_if_there(&link)?;
        }
        match fs::hard_link(path, &link) {
            Ok(()) => {
                self.linked.insert(metadata.ino());
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            // The file system has no room in the directory, or the file has all the links it may have: it stays alone.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::StorageFull | ErrorKind::TooManyLinks
                ) =>
            {
                self.reporter.say(
                    Verbosity::Info,
                    &format!(
                        "cannot link '{}' to '{}': {error}",
                        link.display(),
                        path.display()
                    ),
                );
                return Ok(());
            }
            Err(error) => return Err(Error::io("linking", link, error)),
        }
        let Some(found) = look(&link)? else {
            // A collection took it just now: next time.
            return Ok(());
        };
        if found.ino() == metadata.ino() {
            return Ok(());
        }
        self.replace(path, metadata, &link, parent)
    }

    /// Puts a link to `link` in the place of `path`.
    fn replace(
        &mut self,
        path: &Path,
        metadata: &Metadata,
        link: &Path,
        parent: Option<&Parent>,
    ) -> Result<()> {
        self.reporter.say(
            Verbosity::Talkative,
            &format!("linking '{}' to '{}'", path.display(), link.display()),
        );
        if !std::mem::replace(&mut self.remount_noted, true) {
            self.overlay.inner.merged.remount_is_due()?;
        }
        // In `.links`: a collection would take a strange name at the top. What a crash leaves here goes with its
        // last link.
        let number = NEXT_LINK.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .links
            .join(format!(".tmp-link-{}-{number}", std::process::id()));
        remove_if_there(&temporary)?;
        match fs::hard_link(link, &temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::TooManyLinks => {
                if metadata.size() > 0 {
                    self.reporter.say(
                        Verbosity::Info,
                        &format!("'{}' has maximum number of links", link.display()),
                    );
                }
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("linking", temporary, error)),
        }
        let renamed = match fs::rename(&temporary, path) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied && parent.is_some() => {
                parent.map_or(Ok(()), Parent::make_writable)?;
                fs::rename(&temporary, path)
            }
            other => other,
        };
        let restored = parent.map_or(Ok(()), Parent::restore);
        if let Err(error) = renamed {
            remove_if_there(&temporary)?;
            return match error.kind() {
                // Some file systems count the links before and after the rename together.
                ErrorKind::TooManyLinks | ErrorKind::NotFound => restored,
                _ => Err(Error::io("replacing", path, error)),
            };
        }
        restored?;
        self.linked.extend(look(path)?.map(|m| m.ino()));
        self.files += 1;
        self.bytes += metadata.size();
        if let Some(activity) = self.activity {
            activity.result(
                ResultType::FileLinked,
                vec![Field::Int(metadata.size()), Field::Int(metadata.blocks())],
            );
        }
        Ok(())
    }
}

/// A directory whose entries are replaced, as it was before.
struct Parent<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
}

impl Parent<'_> {
    fn make_writable(&self) -> Result<()> {
        let mode = self.metadata.permissions().mode() | 0o200;
        fs::set_permissions(self.path, fs::Permissions::from_mode(mode))
            .map_err(|e| Error::io("changing the mode of", self.path, e))
    }
    fn restore(&self) -> Result<()> {
        fs::set_permissions(self.path, self.metadata.permissions())
            .map_err(|e| Error::io("changing the mode of", self.path, e))?;
        let time = |seconds, nanoseconds| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        };
        let times = Timestamps {
            last_access: time(self.metadata.atime(), self.metadata.atime_nsec()),
            last_modification: time(self.metadata.mtime(), self.metadata.mtime_nsec()),
        };
        utimensat(CWD, self.path, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| Error::io("changing the times of", self.path, e.into()))
    }
}

/// `None` if nothing is there.
fn look(path: &Path) -> Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("reading", path, error)),
    }
}

/// True if both have the same kind, the same contents and the same execute bit.
fn is_same(one: &Path, metadata: &Metadata, two: &Path, found: &Metadata) -> Result<bool> {
    if metadata.file_type() != found.file_type() || metadata.size() != found.size() {
        return Ok(false);
    }
    if metadata.is_symlink() {
        let read = |path: &Path| fs::read_link(path).map_err(|e| Error::io("reading", path, e));
        return Ok(read(one)? == read(two)?);
    }
    if (metadata.permissions().mode() ^ found.permissions().mode()) & 0o100 != 0 {
        return Ok(false);
    }
    let open = |path: &Path| fs::File::open(path).map_err(|e| Error::io("opening", path, e));
    let (mut first, mut second) = (open(one)?, open(two)?);
    let (mut a, mut b) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    loop {
        let count = first
            .read(&mut a)
            .map_err(|e| Error::io("reading", one, e))?;
        match second.read_exact(&mut b[..count]) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(Error::io("reading", two, error)),
        }
        if a[..count] != b[..count] {
            return Ok(false);
        }
        if count == 0 {
            return Ok(true);
        }
    }
}
