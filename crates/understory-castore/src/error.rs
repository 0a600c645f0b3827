//! What can go wrong in the castore.

use crate::Digest;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// An error of the castore.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CastoreError {
    /// A system call failed; says the verb and the path.
    #[error("{verb} {}", path.display())]
    Io {
        /// What was done: `reading`, `writing`, `opening`, …
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Stored bytes are not what they should be. Never served.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// Which object: pack, frame at offset, directory, blob.
        what: String,
        /// Expected and found.
        reason: String,
    },
    /// Something that is referred to is not in the castore.
    #[error("{kind} {digest} is not in the castore")]
    Missing {
        /// `blob`, `directory` or `chunk`.
        kind: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// The caller's input breaks a rule (names, sizes, order of events).
    #[error("{0}")]
    Invalid(String),
    /// The castore on disk is of a version that this program does not know.
    #[error("castore {} has format {found}, this program knows up to {known}", path.display())]
    Version {
        /// The castore's directory.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Newest known.
        known: u32,
    },
    /// There is no castore.
    #[error("{} is not a castore", path.display())]
    NotACastore {
        /// The directory.
        path: PathBuf,
    },
    /// Another collection of the same castore is at work.
    #[error("a collection of {} is at work already", path.display())]
    Busy {
        /// The castore's directory.
        path: PathBuf,
    },
    /// Written data could not be made durable earlier; this writer takes nothing more.
    #[error("the castore's writer failed before: {0}")]
    Poisoned(PoisonCause),
}

/// Why a writer takes nothing more. Displays the first failure with its cause.
#[derive(Debug, Clone)]
pub struct PoisonCause {
    reason: String,
    no_space: bool,
}

impl fmt::Display for PoisonCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl CastoreError {
    /// Says what the user may do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        if self.is_no_space() {
            return Some(
                "the file system or quota is full: free some space and try again; \
                 what was acknowledged before is intact"
                    .to_owned(),
            );
        }
        match self {
            Self::Io { path, source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Some(format!(
                    "check who owns {} and who you are",
                    path.display()
                )),
                io::ErrorKind::ReadOnlyFilesystem => {
                    Some("open the store read-only, or remount its file system".to_owned())
                }
                _ => None,
            },
            Self::Corrupt { .. } => {
                Some("run `understory check` to see all that is damaged".to_owned())
            }
            Self::Missing { .. } => Some(
                "run `understory check --rebuild-index`; if it is still missing, add the path again"
                    .to_owned(),
            ),
            Self::Version { .. } => {
                Some("a newer understory made it: use that version or a later one".to_owned())
            }
            Self::NotACastore { path } => Some(format!(
                "`understory up --store {}` creates a store",
                path.display()
            )),
            Self::Poisoned(_) => Some("mend the cause, then start the program again".to_owned()),
            Self::Busy { .. } => Some("wait for it to end".to_owned()),
            Self::Invalid(_) => None,
        }
    }

    /// True if a file is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// True if the cause is a full disk or quota.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::Poisoned(cause) => cause.no_space,
            _ => false,
        }
    }

    pub(crate) fn io(verb: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            verb,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            what: what.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn poison_cause(&self) -> PoisonCause {
        let mut reason = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            reason.push_str(": ");
            reason.push_str(&error.to_string());
            cause = error.source();
        }
        PoisonCause {
            no_space: self.is_no_space(),
            reason,
        }
    }
}

/// Puts the verb and the path on an I/O error.
pub(crate) trait IoContext<T> {
    fn verb(self, verb: &'static str, path: &Path) -> Result<T, CastoreError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn verb(self, verb: &'static str, path: &Path) -> Result<T, CastoreError> {
        self.map_err(|source| CastoreError::io(verb, path, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_known_as_such_also_after_poisoning() {
        let full = CastoreError::io(
            "writing",
            Path::new("/s/packs/0.pack"),
            io::Error::from_raw_os_error(28),
        );
        assert!(full.is_no_space());
        let poisoned = CastoreError::Poisoned(full.poison_cause());
        assert!(poisoned.is_no_space());
        assert_eq!(
            poisoned.to_string(),
            "the castore's writer failed before: writing /s/packs/0.pack: \
             No space left on device (os error 28)"
        );
        assert!(poisoned.hint().unwrap().contains("free some space"));
        let quota = CastoreError::io(
            "writing",
            Path::new("/s"),
            io::Error::from_raw_os_error(122),
        );
        assert!(quota.is_no_space());
        assert!(!CastoreError::Invalid("x".into()).is_no_space());
    }
}
