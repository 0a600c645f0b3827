//! What can go wrong with an image.

use std::io;

/// An error of writing or reading an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// Writing failed; the caller knows the path.
    #[error("writing an EROFS image")]
    Write(#[source] io::Error),
    /// Reading failed; the caller knows the path.
    #[error("reading an EROFS image")]
    Read(#[source] io::Error),
    /// What was fed to the writer breaks a rule of the format.
    #[error("{0}")]
    Invalid(String),
    /// It does not fit: 32-bit block addresses, or the room before the first data block.
    #[error("{what}: expected at most {limit}, found {found}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What was found.
        found: u64,
    },
    /// Not an EROFS image.
    #[error("not an EROFS image: expected the magic number e0f5e1e2, found {found:08x}")]
    NotErofs {
        /// The number at its place.
        found: u32,
    },
    /// An image with a feature that this reader does not know; the kernel might.
    #[error("the image uses {0}, which this program does not read")]
    Unsupported(String),
    /// The image contradicts itself.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// Superblock, inode or directory, with its number.
        what: String,
        /// Expected and found.
        reason: String,
    },
}

impl ErofsError {
    /// True if the cause is a full disk or quota.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Write(source) if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            what: what.into(),
            reason: reason.into(),
        }
    }
}
