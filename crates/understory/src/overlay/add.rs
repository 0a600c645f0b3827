//! Additions: to the castore what is copied in, to the upper what is added locally.
//!
//! An object of the upper is made under its lock (`<object>.lock`, Nix's protocol), checked, made canonical, and only
//! then registered; dropping it before removes it. It is made through the merged directory at its final name. Where a
//! lower directory has an entry of that name (what a lower left behind or is making; a damaged object that is repaired),
//! overlayfs could only replace it by way of a whiteout, and rename nothing over it. Then it is made in a `tmp-…`
//! directory, marked opaque, put in place in the upper directory itself, and a remount makes it seen: no whiteout
//! exists at any moment.
//!
//! Cost of one object: one lock file, the restore, one pass for metadata, one transaction.

use super::Overlay;
use super::merged::is_there;
use crate::add::{AddMethod, Batch, check_content, check_request, nar_of_file};
use crate::daemon::{AddOptions, PathSource, Reporter};
use crate::local::canonical::{canonicalise, make_opaque, sync_tree};
use crate::local::lock::PathLocks;
use crate::local::restore::{Restored, dump_path, hash_nar, remove_tree, restore_nar};
use crate::local::temp_roots::TempRoots;
use crate::nar::{HashRequest, skip_nar};
use crate::store::TempRootOwner;
use crate::{Error, Result};
use rustix::fs::FlockOperation;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use understory_nix::content_address::References;
use understory_nix::hash::Hasher;
use understory_nix::worker::Verbosity;
use understory_nix::{
    ContentAddress, ContentAddressMethod, PathInfo, PublicKeys, StorePath, StorePathName,
};

/// Dumps up to this are hashed in memory before anything is written, so that one whose object is valid already
/// writes nothing: Nix's `nar-buffer-size`.
const DUMP_IN_MEMORY_BYTES_MAX: usize = 32 << 20;
/// How often a temporary directory is made anew because a collection took it before it was locked.
const TEMPORARY_ATTEMPTS_MAX: u32 = 16;
/// What is made in a temporary directory.
const MADE: &str = "x";
/// What it replaces.
const REPLACED: &str = "old";

/// An object of the upper that is whole and locked, and not valid yet. Dropping it removes it.
pub(super) struct InUpper {
    overlay: Overlay,
    info: PathInfo,
    _locks: PathLocks,
    /// It is to stay, also when it is dropped.
    keep: bool,
}

impl Drop for InUpper {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let removed = self.overlay.delete_object(&self.info.path);
        let done = removed.and_then(|_| self.overlay.inner.merged.remount_if_due());
        if let Err(error) = done {
            tracing::warn!(path = %self.info.path, error = error.chain(), "removing what was not added");
        }
    }
}

impl Overlay {
    /// Reads exactly one NAR into the upper and registers the path. Signatures are the caller's concern; the path is
    /// locked and looked at again first. An object that a lower has is not written again. With `repair` a valid object
    /// is replaced by a fresh upper copy.
    ///
    /// # Errors
    /// In Nix's words: hash, size or `ca` differ. Nothing is left behind.
    pub(super) fn add_to_upper(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        repair: bool,
        roots: &TempRoots,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        match self.store_in_upper(info, archive, repair, roots, reporter)? {
            Some(stored) => self.publish_in_upper(vec![stored]),
            None => Ok(()),
        }
    }

    /// The first half of [`Overlay::add_to_upper`]: the object is there and locked. `None` if the path is valid; the
    /// archive was read then, too.
    ///
    /// # Errors
    /// As [`Overlay::add_to_upper`].
    pub(super) fn store_in_upper(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        repair: bool,
        roots: &TempRoots,
        reporter: &dyn Reporter,
    ) -> Result<Option<InUpper>> {
        roots.add(std::slice::from_ref(&info.path))?;
        let skip = |archive| skip_nar(archive).map(|_| None);
        if !repair && self.is_valid(&info.path)? {
            return skip(archive);
        }
        let locks = self.lock_object(&info.path, reporter)?;
        // Somebody else may have made it while we waited.
        if !repair && self.is_valid(&info.path)? {
            return skip(archive);
        }
        self.put(&info.path, reporter, |place| {
            let cancelled = || reporter.is_cancelled();
            let read = restore_nar(archive, place, check_request(&info), &cancelled)?;
            check_content(
                self.store_dir(),
                &info,
                &read.nar_hash,
                read.nar_size,
                read.content_hash.as_ref(),
            )
        })?;
        Ok(Some(InUpper {
            overlay: self.clone(),
            info,
            _locks: locks,
            keep: repair,
        }))
    }

    /// The second half: makes objects valid, all together; their references are valid or among them.
    ///
    /// # Errors
    /// `path '…' is not valid` for a reference; the objects are removed then.
    pub(super) fn publish_in_upper(&self, mut stored: Vec<InUpper>) -> Result<()> {
        let infos: Vec<PathInfo> = stored.iter().map(|stored| stored.info.clone()).collect();
        self.register(&infos)?;
        for stored in &mut stored {
            stored.keep = true;
        }
        Ok(())
    }

    /// Adds a content-addressed object from a dump to the upper: for NAR and Git exactly one NAR is read, else all of
    /// `dump` is the contents of a file. Where the object is valid already, nothing is written.
    ///
    /// # Errors
    /// Malformed dump, stream error, a reference that is not valid or not allowed with this method.
    #[allow(
        clippy::too_many_arguments,
        reason = "those of the operation, and whose it is"
    )]
    pub(super) fn add_dump(
        &self,
        name: &str,
        how: &AddMethod,
        references: &BTreeSet<StorePath>,
        repair: bool,
        dump: &mut dyn BufRead,
        roots: &TempRoots,
        reporter: &dyn Reporter,
    ) -> Result<PathInfo> {
        let name = StorePathName::new(name)?;
        let taken = match how.method {
            ContentAddressMethod::Nar | ContentAddressMethod::Git => {
                self.take_nar(how, dump, reporter)?
            }
            ContentAddressMethod::Flat | ContentAddressMethod::Text => self.take_flat(how, dump)?,
        };
        let hash = taken.read.content_hash;
        let ca = ContentAddress {
            method: how.method,
            hash: hash.ok_or_else(|| Error::internal("the content hash was not made"))?,
        };
        let others = References {
            others: references.clone(),
            itself: false,
        };
        let path = ca.make_path(self.store_dir(), &name, &others)?;
        roots.add(std::slice::from_ref(&path))?;
        if !repair && let Some(info) = self.info(&path)? {
            self.rely_on(std::slice::from_ref(&path));
            return Ok(info);
        }
        let locks = self.lock_object(&path, reporter)?;
        if !repair && let Some(info) = self.info(&path)? {
            return Ok(info);
        }
        let info = PathInfo {
            path: path.clone(),
            nar_hash: taken.read.nar_hash,
            nar_size: taken.read.nar_size,
            references: references.clone(),
            deriver: None,
            registration_time: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: Some(ca),
        };
        match taken.content {
            Content::Disk(temporary) => self.put_made(&path, reporter, temporary)?,
            Content::Nar(bytes) => self.put(&path, reporter, |place| {
                restore_nar(&mut &bytes[..], place, HashRequest::None, &|| false).map(drop)
            })?,
            Content::File(bytes) => self.put(&path, reporter, |place| {
                let mut file =
                    File::create_new(place).map_err(|e| Error::io("creating", place, e))?;
                file.write_all(&bytes)
                    .map_err(|e| Error::io("writing", place, e))
            })?,
        }
        self.publish_in_upper(vec![InUpper {
            overlay: self.clone(),
            info,
            _locks: locks,
            keep: repair,
        }])?;
        // As it was registered: with its time, or as a lower has it.
        self.info(&path)?
            .ok_or_else(|| Error::internal("a path is gone that was just registered"))
    }

    /// Takes paths that are copied in: to the castore those whose references are there, the others to the upper. `keys`
    /// are those whose signatures count.
    ///
    /// # Errors
    /// A missing signature; as [`Overlay::add_to_upper`].
    pub(super) fn copy_in(
        &self,
        source: &mut dyn PathSource,
        options: AddOptions,
        keys: &PublicKeys,
        roots: &TempRoots,
        below: Option<&TempRootOwner>,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        let castore = self.castore().zip(below);
        let mut batch = castore.map(|(store, owner)| Batch::new(store, owner, options.repair));
        while let Some(info) = source.next()? {
            reporter.check()?;
            self.check_trust(&info, options, keys)?;
            roots.add(std::slice::from_ref(&info.path))?;
            let pending = batch
                .as_ref()
                .is_some_and(|batch| batch.is_pending(&info.path));
            if !options.repair && (pending || self.is_valid(&info.path)?) {
                skip_nar(source.archive())?;
                continue;
            }
            if let Some(batch) = &mut batch {
                if self.fits_below(&info, batch)? {
                    self.clear_upper(&info.path, reporter)?;
                    batch.add(info, source.archive())?;
                    if batch.is_full() && batch.publish_closed()? {
                        source.release();
                    }
                    continue;
                }
                // It may refer to what is still to be published.
                batch.publish_closed()?;
            }
            self.add_to_upper(info, source.archive(), options.repair, roots, reporter)?;
            if batch.is_none() {
                source.release();
            }
        }
        match batch {
            Some(batch) => batch.finish(),
            None => Ok(()),
        }
    }

    /// A content address is as good as a signature: that the content agrees is checked when it comes.
    ///
    /// # Errors
    /// In Nix's words: the signature is missing.
    fn check_trust(&self, info: &PathInfo, options: AddOptions, keys: &PublicKeys) -> Result<()> {
        let settings = &self.inner.settings;
        if !options.check_signatures
            || !settings.require_signatures
            || info.is_content_addressed(self.store_dir())
            || info.is_signed_by(self.store_dir(), keys)
        {
            return Ok(());
        }
        Err(Error::user(format!(
            "cannot add path '{}' because it lacks a signature by a trusted key",
            self.store_dir().print(&info.path)
        ))
        .with_hint(
            "sign it with a key of the daemon's trusted public keys, or add it as a trusted user",
        ))
    }

    /// True if the castore can take the path: everything it refers to is there, or goes there with it. What another
    /// lower or the upper has is repaired in the upper.
    fn fits_below(&self, info: &PathInfo, batch: &Batch<'_>) -> Result<bool> {
        let Some(store) = self.castore() else {
            return Ok(false);
        };
        if !store.is_valid(&info.path)? && self.is_valid(&info.path)? {
            return Ok(false);
        }
        let outside: Vec<StorePath> = info
            .references
            .iter()
            .filter(|reference| **reference != info.path && !batch.is_pending(reference))
            .cloned()
            .collect();
        Ok(store.valid_paths(&outside)?.len() == outside.len())
    }

    /// Removes what an interrupted addition left in the upper, which would hide what the castore gets. Waits for one
    /// that is under way.
    pub(super) fn clear_upper(&self, path: &StorePath, reporter: &dyn Reporter) -> Result<()> {
        if !is_there(&self.inner.upper.join(path.base_name()))? {
            return Ok(());
        }
        let _locks = self.lock_object(path, reporter)?;
        if !self
            .inner
            .db
            .valid(std::slice::from_ref(path))?
            .contains(&true)
        {
            self.delete_object(path)?;
        }
        self.settle(reporter);
        Ok(())
    }

    /// Locks an object. Whatever becomes of it, the lock file goes with the lock: who waits looks again.
    fn lock_object(&self, path: &StorePath, reporter: &dyn Reporter) -> Result<PathLocks> {
        let mut locks = PathLocks::lock(&[self.inner.local.object(path)], reporter)?;
        locks.delete_on_release();
        Ok(locks)
    }

    /// Remounts if that is due; a client is told where that is not possible.
    pub(super) fn settle(&self, reporter: &dyn Reporter) {
        if let Err(error) = self.inner.merged.remount_if_due() {
            tracing::warn!("{}", error.chain());
            reporter.say(Verbosity::Warn, &format!("warning: {error}"));
        }
    }

    /// Makes an object with `make`, at its final name if it can be. Its lock is held. What is there and not valid, or
    /// to be repaired, is replaced. Nothing is left behind when it fails.
    fn put(
        &self,
        path: &StorePath,
        reporter: &dyn Reporter,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let target = self.inner.local.object(path);
        if self.inner.merged.lower_has(path)? || is_there(&target)? && self.is_valid(path)? {
            let temporary = Temporary::new(self)?;
            make(&temporary.made())?;
            return self.put_made(path, reporter, temporary);
        }
        remove_tree(&target)?;
        let done = make(&target).and_then(|()| self.finish(&target, path.base_name().as_ref()));
        if done.is_err()
            && let Err(error) = remove_tree(&target)
        {
            tracing::warn!(%path, error = error.chain(), "removing what could not be made");
        }
        done
    }

    /// Moves what was made in a temporary directory to its final name.
    fn put_made(
        &self,
        path: &StorePath,
        reporter: &dyn Reporter,
        mut temporary: Temporary,
    ) -> Result<()> {
        let made = temporary.made();
        let below = Path::new(&temporary.name).join(MADE);
        self.finish(&made, &below)?;
        let rename = |from: &Path, to: &Path| {
            std::fs::rename(from, to).map_err(|e| Error::io("moving into place", to, e))
        };
        let target = self.inner.local.object(path);
        let lower_has = self.inner.merged.lower_has(path)?;
        let replaces = lower_has || (is_there(&target)? && self.is_valid(path)?);
        if !replaces {
            remove_tree(&target)?;
            return rename(&made, &target);
        }
        // In the upper directory itself. A crash in between leaves the path as the lower has it.
        temporary.is_below = true;
        let made = self.inner.upper.join(&below);
        let found = std::fs::symlink_metadata(&made);
        let is_dir = found
            .map_err(|e| Error::io("examining", &made, e))?
            .is_dir();
        if lower_has && is_dir {
            make_opaque(&made, self.inner.merged.has_user_attributes())?;
        }
        self.inner.merged.remount_is_due()?;
        let target = self.inner.upper.join(path.base_name());
        let done = (|| {
            if is_there(&target)? {
                let replaced = self.inner.upper.join(&temporary.name).join(REPLACED);
                rename(&target, &replaced)?;
            }
            rename(&made, &target)
        })();
        self.settle(reporter);
        done
    }

    /// What is done to an object before it is valid. `in_upper` is its name in the upper directory.
    fn finish(&self, made: &Path, in_upper: &Path) -> Result<()> {
        canonicalise(made)?;
        let settings = &self.inner.settings;
        if settings.auto_optimise {
            self.optimise_object(&self.inner.upper.join(in_upper))?;
        }
        if settings.fsync_store_paths {
            sync_tree(made)?;
        }
        Ok(())
    }

    /// Reads one NAR into memory, or into a temporary directory if it is long.
    fn take_nar(
        &self,
        how: &AddMethod,
        dump: &mut dyn BufRead,
        reporter: &dyn Reporter,
    ) -> Result<Taken> {
        let hash = match how.method {
            ContentAddressMethod::Git => HashRequest::Git(how.algorithm),
            _ => HashRequest::Nar(how.algorithm),
        };
        let mut recorder = Recorder {
            inner: dump,
            bytes: Vec::new(),
            is_full: false,
        };
        let skipped = skip_nar(&mut recorder);
        let Recorder { bytes, is_full, .. } = recorder;
        if !is_full {
            skipped?;
            return Ok(Taken {
                read: hash_nar(&mut &bytes[..], hash)?,
                content: Content::Nar(bytes),
            });
        }
        let temporary = Temporary::new(self)?;
        let cancelled = || reporter.is_cancelled();
        // The last piece that was recorded is what the recorder refused to go beyond.
        let mut whole = (&bytes[..]).chain(dump);
        let read = restore_nar(&mut whole, &temporary.made(), hash, &cancelled)?;
        Ok(Taken {
            read,
            content: Content::Disk(temporary),
        })
    }

    /// Reads a file's contents to the end of `dump`, into memory or into a temporary directory.
    fn take_flat(&self, how: &AddMethod, dump: &mut dyn BufRead) -> Result<Taken> {
        let stream = |e: std::io::Error| Error::environment("reading the dump").with_source(e);
        let mut hasher = Hasher::new(how.algorithm);
        let mut kept = Vec::new();
        let mut spilled: Option<(Temporary, File)> = None;
        loop {
            let piece = dump.fill_buf().map_err(stream)?;
            if piece.is_empty() {
                break;
            }
            hasher.update(piece);
            if spilled.is_none() && kept.len() + piece.len() > DUMP_IN_MEMORY_BYTES_MAX {
                let temporary = Temporary::new(self)?;
                let place = temporary.made();
                let mut file =
                    File::create_new(&place).map_err(|e| Error::io("creating", &place, e))?;
                file.write_all(&std::mem::take(&mut kept))
                    .map_err(|e| Error::io("writing", &place, e))?;
                spilled = Some((temporary, file));
            }
            match &mut spilled {
                None => kept.extend_from_slice(piece),
                Some((temporary, file)) => file
                    .write_all(piece)
                    .map_err(|e| Error::io("writing", temporary.made(), e))?,
            }
            let count = piece.len();
            dump.consume(count);
        }
        let content_hash = Some(hasher.finish());
        Ok(match spilled {
            None => {
                let (nar_hash, nar_size) = nar_of_file(&kept)?;
                Taken {
                    read: Restored {
                        nar_hash,
                        nar_size,
                        content_hash,
                    },
                    content: Content::File(kept),
                }
            }
            Some((temporary, file)) => {
                drop(file);
                // A NAR says a file's size before its contents.
                let made = temporary.made();
                let read = dump_path(&made, HashRequest::None, &mut std::io::sink())?;
                Taken {
                    read: Restored {
                        content_hash,
                        ..read
                    },
                    content: Content::Disk(temporary),
                }
            }
        })
    }
}

/// A dump that was read.
struct Taken {
    read: Restored,
    content: Content,
}

enum Content {
    Nar(Vec<u8>),
    File(Vec<u8>),
    Disk(Temporary),
}

/// Keeps what is consumed, up to a limit; beyond it fails without consuming.
struct Recorder<'a> {
    inner: &'a mut dyn BufRead,
    bytes: Vec<u8>,
    is_full: bool,
}

impl BufRead for Recorder<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.bytes.len() >= DUMP_IN_MEMORY_BYTES_MAX {
            self.is_full = true;
            return Err(std::io::Error::other("too long to be kept in memory"));
        }
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        // What was not read to its end is still in the buffer, so this reads nothing.
        if count > 0
            && let Ok(buffer) = self.inner.fill_buf()
        {
            self.bytes.extend_from_slice(&buffer[..count]);
        }
        self.inner.consume(count);
    }
}

impl Read for Recorder<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let buffer = self.fill_buf()?;
        let count = buffer.len().min(out.len());
        out[..count].copy_from_slice(&buffer[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// A directory `tmp-…` in the store, locked while it is used, as Nix has them: a collection leaves it alone then.
struct Temporary {
    /// In the store directory.
    name: String,
    merged: PathBuf,
    upper: PathBuf,
    /// What is in it was changed in the upper directory itself.
    is_below: bool,
    _lock: File,
}

impl Temporary {
    fn new(overlay: &Overlay) -> Result<Self> {
        let inner = &overlay.inner;
        for _ in 0..TEMPORARY_ATTEMPTS_MAX {
            let mut random = [0; 8];
            getrandom::fill(&mut random).map_err(|e| {
                Error::environment("reading random bytes").with_source(e.to_string())
            })?;
            let name = format!(
                "tmp-{}-{}",
                std::process::id(),
                data_encoding::HEXLOWER.encode(&random)
            );
            let merged = inner.local.real.join(&name);
            std::fs::create_dir(&merged).map_err(|e| Error::io("creating", &merged, e))?;
            let lock = match File::open(&merged) {
                Ok(lock) => lock,
                // A collection was faster.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("opening", &merged, error)),
            };
            rustix::fs::flock(&lock, FlockOperation::LockExclusive)
                .map_err(|e| Error::io("locking", &merged, e.into()))?;
            if is_there(&merged)? {
                return Ok(Self {
                    upper: inner.upper.join(&name),
                    name,
                    merged,
                    is_below: false,
                    _lock: lock,
                });
            }
        }
        Err(Error::environment(format!(
            "a temporary directory in {} was removed {TEMPORARY_ATTEMPTS_MAX} times before it could be locked",
            inner.local.real.display()
        )))
    }

    fn made(&self) -> PathBuf {
        self.merged.join(MADE)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Overlayfs would take what was moved away below it for stale.
        let dir = if self.is_below {
            &self.upper
        } else {
            &self.merged
        };
        if let Err(error) = remove_tree(dir) {
            tracing::warn!(error = error.chain(), "removing a temporary directory");
        }
    }
}
