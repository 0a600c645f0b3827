//! The library's error: what went wrong, and a hint what to do about it.

use std::path::{Path, PathBuf};
use understory_castore::CastoreError;

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is: decides the exit code and how much is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request cannot be met: wrong argument, path not valid, not permitted.
    User,
    /// The machine or the configuration stands in the way: no FUSE, full disk, foreign mount.
    Environment,
    /// Stored data is damaged.
    Corrupt,
    /// A bug or something unforeseen.
    Internal,
}

/// An error with its kind and an optional hint.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    traces: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// The user's request cannot be met.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::User, message)
    }
    /// The machine stands in the way.
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Environment, message)
    }
    /// Stored data is damaged.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }
    /// A bug.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
    /// Any kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            traces: Vec::new(),
            source: None,
        }
    }
    /// An I/O error: `verb` as in `reading`, and the path.
    pub fn io(verb: &str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::environment(format!("{verb} {}", path.into().display())).with_source(source)
    }
    /// A file of a version that this program does not know.
    pub(crate) fn other_version(path: &Path, found: u32, known: u32) -> Self {
        let path = path.display();
        Self::environment(format!(
            "{path} has version {found}, this program knows version {known}"
        ))
        .with_hint("use a newer understory")
    }
    /// Adds the cause.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }
    /// Adds what the user may do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// Adds what Nix was doing when it failed, innermost first: it is passed on to clients as it came.
    #[must_use]
    pub fn with_traces(mut self, traces: Vec<String>) -> Self {
        self.traces = traces;
        self
    }
    /// Says where it happened: the path goes in front of the message.
    #[must_use]
    pub fn within(mut self, place: &std::path::Path) -> Self {
        self.message = format!("{}: {}", place.display(), self.message);
        self
    }
    /// Whose fault an error of SQLite is.
    pub(crate) fn from_sqlite_kind(error: &rusqlite::Error) -> ErrorKind {
        use rusqlite::ErrorCode;
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::Corrupt,
            Some(
                ErrorCode::ApiMisuse | ErrorCode::ParameterOutOfRange | ErrorCode::TypeMismatch,
            ) => ErrorKind::Internal,
            _ => ErrorKind::Environment,
        }
    }
    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
    /// The hint.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
    /// What Nix was doing, innermost first. Not part of [`Error::chain`].
    pub fn traces(&self) -> &[String] {
        &self.traces
    }
    /// Message and all causes, joined by `: `.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        text
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}
impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

impl From<CastoreError> for Error {
    fn from(error: CastoreError) -> Self {
        let kind = match &error {
            CastoreError::Io { .. }
            | CastoreError::Version { .. }
            | CastoreError::NotACastore { .. }
            | CastoreError::Busy { .. }
            // What the writer stumbled over was told to whoever met it first: a full disk, mostly.
            | CastoreError::Poisoned(_) => ErrorKind::Environment,
            CastoreError::Corrupt { .. } | CastoreError::Missing { .. } => ErrorKind::Corrupt,
            CastoreError::Invalid(_) => ErrorKind::User,
            _ => ErrorKind::Internal,
        };
        let hint = error.hint();
        let source = std::error::Error::source(&error).map(|s| s.to_string());
        let mut out = Self::new(kind, error.to_string());
        out.hint = hint;
        if let Some(source) = source {
            out.source = Some(source.into());
        }
        out
    }
}
impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let code = error.sqlite_error_code();
        let kind = Self::from_sqlite_kind(&error);
        let hint = match code {
            Some(ErrorCode::DiskFull) => Some("the disk is full: make room and try again"),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                Some("another process has held the store for minutes: see what it does, or end it")
            }
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
                Some("check that you may read and write the store's directory")
            }
            _ => None,
        };
        let out = Self::new(kind, "the store's database").with_source(error);
        match hint {
            Some(hint) => out.with_hint(hint),
            None => out,
        }
    }
}
macro_rules! user_errors {
    ($($t:ty),*) => {$(
        impl From<$t> for Error {
            fn from(error: $t) -> Self {
                Self::user(error.to_string())
            }
        }
    )*};
}
user_errors!(
    understory_nix::store_path::StorePathError,
    understory_nix::content_address::ContentAddressError,
    understory_nix::hash::HashError,
    understory_nix::signature::SignatureError
);
