//! The file `adopt.json` in the castore's directory: how far an adoption is.
//!
//! Written to a temporary name, synced, renamed over, and the directory synced: it is the old or the new one,
//! whenever the machine stops. Each phase is recorded *before* its first effect that cannot be found by looking,
//! so a phase that is recorded may be begun, half done or done; every phase is made so that it can be run again.

use crate::config::{Layout, LayoutOptions};
use crate::files::open_or_create;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Its name in the castore's directory.
pub const FILE: &str = "adopt.json";
/// The lock that one adoption, reclaim or undo holds.
const LOCK_FILE: &str = "adopt.lock";
/// The version that this program writes.
const VERSION: u32 = 1;
/// More is not such a file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How far it is. Phases are in order; an undo may begin in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Paths are being copied into the castore. Nix's store is as it was.
    Importing,
    /// All paths were there when it looked; being verified. Nix's store is as it was.
    Verifying,
    /// Verified. Nix's store is as it was.
    Verified,
    /// The overlay is being mounted over the store directory, or is to be mounted by somebody else.
    Swapping,
    /// The overlay was mounted and was seen to work.
    Swapped,
    /// Everything is being brought back.
    Undoing,
}

impl Phase {
    /// For people.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Importing => "paths are being imported",
            Self::Verifying => "paths are imported and being verified",
            Self::Verified => "paths are verified, the overlay was not mounted yet",
            Self::Swapping => "the overlay is about to be mounted",
            Self::Swapped => "the store is adopted",
            Self::Undoing => "an undo was begun",
        }
    }
    /// True if the castore may hold what Nix's store needs and has nowhere else.
    pub const fn is_needed(self) -> bool {
        matches!(self, Self::Swapping | Self::Swapped | Self::Undoing)
    }
}

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    version: u32,
    /// How far it is.
    pub phase: Phase,
    /// Root directory of the store that is adopted.
    pub root: PathBuf,
    /// Its store directory in the file system.
    pub real: PathBuf,
    /// Its state directory.
    pub nix_state: PathBuf,
    /// Its log directory.
    pub nix_log: PathBuf,
    /// State directory of the instance that serves it.
    pub state: PathBuf,
    /// The overlay's upper directory.
    pub upper: PathBuf,
    /// The overlay's work directory.
    pub work: PathBuf,
    /// The castore's newest row when its contents were verified.
    #[serde(default)]
    pub verified_row: u64,
    /// True once an original may have been deleted: the store needs the castore from then on.
    pub reclaimed: bool,
}

impl State {
    pub(super) fn new(root: &Path, layout: &Layout) -> Self {
        Self {
            version: VERSION,
            phase: Phase::Importing,
            root: root.to_owned(),
            real: layout.merged.clone(),
            nix_state: layout.nix_state.clone(),
            nix_log: layout.nix_log.clone(),
            state: layout.state.clone(),
            upper: layout.upper.clone(),
            work: layout.work.clone(),
            verified_row: 0,
            reclaimed: false,
        }
    }

    /// Reads the file of the castore in `store`; `None` if nothing is adopted there.
    ///
    /// # Errors
    /// I/O; not such a file; of a newer version.
    pub fn load(store: &Path) -> Result<Option<Self>> {
        let path = store.join(FILE);
        let text = match fs::metadata(&path) {
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Ok(m) if m.len() > FILE_BYTES_MAX => {
                return Err(Error::corrupt(format!(
                    "{}: expected at most {FILE_BYTES_MAX} bytes, found {}",
                    path.display(),
                    m.len()
                )));
            }
            Ok(_) => fs::read(&path).map_err(|e| Error::io("reading", &path, e))?,
            Err(e) => return Err(Error::io("reading", &path, e)),
        };
        let wrong = |e: serde_json::Error| {
            Error::corrupt(format!("{} is not understood", path.display())).with_source(e)
        };
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(&text).map_err(wrong)?;
        if head.version != VERSION {
            return Err(Error::other_version(&path, head.version, VERSION));
        }
        Ok(Some(serde_json::from_slice(&text).map_err(wrong)?))
    }

    /// Writes the file, durably.
    pub(super) fn save(&self, store: &Path) -> Result<()> {
        let path = store.join(FILE);
        let new = store.join(format!("{FILE}.new"));
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::internal("writing the adoption's state").with_source(e))?;
        text.push(b'\n');
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|e| Error::io("writing", &path, e))?;
        sync_directory(store)
    }

    /// Removes the file, durably.
    pub(super) fn remove(store: &Path) -> Result<()> {
        let path = store.join(FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("removing", &path, e))
            }
            _ => sync_directory(store),
        }
    }

    /// The layout of the instance that serves it.
    pub(super) fn layout_options(&self) -> LayoutOptions {
        LayoutOptions {
            state: Some(self.state.clone()),
            upper: Some(self.upper.clone()),
            work: Some(self.work.clone()),
            merged: Some(self.real.clone()),
            nix_state: Some(self.nix_state.clone()),
            nix_log: Some(self.nix_log.clone()),
            socket: None,
            overlay_socket: None,
        }
    }
}

/// Fills what `options` leave open with the places of the store that the castore in `store` has adopted, so that
/// `up`, `down` and the others need no flags. Nothing if none is.
///
/// # Errors
/// As [`State::load`].
pub fn complete_layout(store: &Path, options: &mut LayoutOptions) -> Result<()> {
    let Some(state) = State::load(store)?.filter(|state| state.phase.is_needed()) else {
        return Ok(());
    };
    // Somebody who names another place for the overlay or its state wants something else.
    if options.merged.as_ref().is_some_and(|m| *m != state.real)
        || options.state.as_ref().is_some_and(|s| *s != state.state)
    {
        return Ok(());
    }
    let ours = state.layout_options();
    let fill = |to: &mut Option<PathBuf>, from: Option<PathBuf>| {
        if to.is_none() {
            *to = from;
        }
    };
    // Work belongs to upper: an upper of one's own gets its own work directory.
    if options.upper.is_none() {
        fill(&mut options.work, ours.work);
    }
    fill(&mut options.upper, ours.upper);
    fill(&mut options.state, ours.state);
    fill(&mut options.merged, ours.merged);
    fill(&mut options.nix_state, ours.nix_state);
    fill(&mut options.nix_log, ours.nix_log);
    Ok(())
}

/// Refuses deletions from a castore that an adopted store needs: its paths have their roots in Nix's database and
/// state directory, which a collection of the castore does not see.
///
/// # Errors
/// There is one.
pub(crate) fn refuse_deletion(store: &Path) -> Result<()> {
    match State::load(store)?.filter(|state| state.phase.is_needed()) {
        None => Ok(()),
        Some(state) => Err(Error::user(format!(
            "the Nix store at {} needs what is in {}: nothing is deleted",
            state.real.display(),
            store.display()
        ))
        .with_hint("`understory adopt --undo` gives that store its own files back")),
    }
}

/// Held by one adoption, reclaim or undo at a time.
pub(super) fn lock(store: &Path) -> Result<File> {
    let path = store.join(LOCK_FILE);
    let file = open_or_create(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::user(format!(
            "another `understory adopt` works on {}",
            store.display()
        ))),
        Err(fs::TryLockError::Error(e)) => Err(Error::io("locking", &path, e)),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io("syncing", dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dir: &Path) -> State {
        let options = LayoutOptions {
            merged: Some("/r/nix/store".into()),
            nix_state: Some("/r/nix/var/nix".into()),
            nix_log: Some("/r/nix/var/log/nix".into()),
            ..LayoutOptions::default()
        };
        State::new(Path::new("/r"), &Layout::new(dir, &options).unwrap())
    }

    #[test]
    fn written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(State::load(dir.path()).unwrap(), None);
        let mut state = state(dir.path());
        for phase in [Phase::Importing, Phase::Swapped, Phase::Undoing] {
            state.phase = phase;
            state.save(dir.path()).unwrap();
            assert_eq!(State::load(dir.path()).unwrap().as_ref(), Some(&state));
        }
        State::remove(dir.path()).unwrap();
        State::remove(dir.path()).unwrap();
        assert_eq!(State::load(dir.path()).unwrap(), None);
    }

    #[test]
    fn what_is_no_such_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        fs::write(&file, r#"{"version": 2, "phase": "melting"}"#).unwrap();
        let error = State::load(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{} has version 2, this program knows version 1",
                file.display()
            )
        );
        fs::write(&file, "{").unwrap();
        let error = State::load(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{} is not understood", file.display())
        );
        fs::write(&file, r#"{"version": 1}"#).unwrap();
        assert!(State::load(dir.path()).is_err());
    }

    #[test]
    fn an_adopted_store_gives_the_layout_and_keeps_the_castore() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = LayoutOptions::default();
        complete_layout(dir.path(), &mut options).unwrap();
        assert_eq!(options.merged, None);
        refuse_deletion(dir.path()).unwrap();
        let mut state = state(dir.path());
        state.save(dir.path()).unwrap();
        complete_layout(dir.path(), &mut options).unwrap();
        assert_eq!(options.merged, None, "not before the overlay is mounted");
        state.phase = Phase::Swapped;
        state.save(dir.path()).unwrap();
        complete_layout(dir.path(), &mut options).unwrap();
        assert_eq!(options.merged.as_deref(), Some(Path::new("/r/nix/store")));
        assert_eq!(
            options.nix_state.as_deref(),
            Some(Path::new("/r/nix/var/nix"))
        );
        let mut other = LayoutOptions {
            merged: Some("/else".into()),
            ..LayoutOptions::default()
        };
        complete_layout(dir.path(), &mut other).unwrap();
        assert_eq!(other.nix_state, None);
        let error = refuse_deletion(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the Nix store at /r/nix/store needs what is in {}: nothing is deleted",
                dir.path().display()
            )
        );
    }

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "another `understory adopt` works on {}",
                dir.path().display()
            )
        );
        drop(held);
        lock(dir.path()).unwrap();
    }
}
