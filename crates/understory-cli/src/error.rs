//! The command's error: an exit code, a message with its causes, and hints.

use understory::error::ErrorKind;

/// Exit codes; `docs/guide/exit-codes.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// The request cannot be met.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The machine or its configuration stands in the way; or nothing runs (`status`).
    Environment = 3,
    /// Stored data is damaged.
    Corrupt = 4,
    /// A bug.
    Internal = 70,
    /// Interrupted by SIGINT, as shells count it.
    Interrupted = 130,
}

/// What a command ends with when it does not succeed.
#[derive(Debug)]
pub(crate) struct CommandError {
    pub(crate) code: u8,
    /// Nothing is printed when empty: the command has said all.
    pub(crate) message: String,
    pub(crate) causes: Vec<String>,
    pub(crate) hints: Vec<String>,
}

impl CommandError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code: code as u8,
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
        }
    }
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message)
    }
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }
    pub(crate) fn environment(message: impl Into<String>) -> Self {
        Self::new(Code::Environment, message)
    }
    /// Ends with `code` and says nothing.
    pub(crate) fn silent(code: u8) -> Self {
        Self {
            code,
            message: String::new(),
            causes: Vec::new(),
            hints: Vec::new(),
        }
    }
    /// As the library has it, to be told to another process.
    pub(crate) fn to_library(&self) -> understory::Error {
        let kind = match self.code {
            code if code == Code::Environment as u8 => ErrorKind::Environment,
            code if code == Code::Corrupt as u8 => ErrorKind::Corrupt,
            code if code == Code::Internal as u8 => ErrorKind::Internal,
            _ => ErrorKind::User,
        };
        let mut message = self.message.clone();
        for cause in &self.causes {
            message.push_str(": ");
            message.push_str(cause);
        }
        let error = understory::Error::new(kind, message);
        match self.hints.first() {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
    pub(crate) fn interrupted() -> Self {
        Self::new(Code::Interrupted, "interrupted")
    }
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
    /// An I/O error with verb and object; a closed pipe ends the command quietly, as `… | head` expects.
    pub(crate) fn io(verb: &str, what: impl std::fmt::Display, source: &std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::silent(0);
        }
        let mut error = Self::environment(format!("{verb} {what}"));
        error.causes.push(source.to_string());
        error
    }
}

impl From<understory::Error> for CommandError {
    fn from(error: understory::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::User => Code::Failed,
            ErrorKind::Environment => Code::Environment,
            ErrorKind::Corrupt => Code::Corrupt,
            ErrorKind::Internal => Code::Internal,
        };
        let mut out = Self::new(code, error.to_string());
        let mut cause = std::error::Error::source(&error);
        let mut kinds = Vec::new();
        while let Some(inner) = cause {
            if let Some(io) = inner.downcast_ref::<std::io::Error>() {
                kinds.push(io.kind());
            }
            out.causes.push(inner.to_string());
            cause = inner.source();
        }
        if kinds.contains(&std::io::ErrorKind::BrokenPipe) {
            return Self::silent(0);
        }
        out.hints.extend(error.hint().map(str::to_owned));
        if out.hints.is_empty() {
            out.hints.extend(general_hint(&kinds, code));
        }
        out
    }
}
impl From<understory_castore::CastoreError> for CommandError {
    fn from(error: understory_castore::CastoreError) -> Self {
        understory::Error::from(error).into()
    }
}
macro_rules! through_library {
    ($($t:ty),*) => {$(
        impl From<$t> for CommandError {
            fn from(error: $t) -> Self {
                understory::Error::from(error).into()
            }
        }
    )*};
}
through_library!(
    understory_nix::store_path::StorePathError,
    understory_nix::content_address::ContentAddressError,
    understory_nix::hash::HashError,
    understory_nix::signature::SignatureError
);

fn general_hint(kinds: &[std::io::ErrorKind], code: Code) -> Option<String> {
    use std::io::ErrorKind as Io;
    if kinds.contains(&Io::PermissionDenied) {
        return Some("run as the owner of the store, or name another one with --store".into());
    }
    if kinds.contains(&Io::StorageFull) || kinds.contains(&Io::QuotaExceeded) {
        return Some("the disk is full: what was imported before is safe; free space and run the command again".into());
    }
    match code {
        Code::Corrupt => {
            Some("run `understory check` to see all damage and which store paths it hurts".into())
        }
        Code::Internal => {
            Some("this is a bug in understory; please report it with the output of -vv".into())
        }
        _ => None,
    }
}

/// Shorthand.
pub(crate) type Result<T, E = CommandError> = std::result::Result<T, E>;
