//! All settings: their names, their forms, and where they go.

use super::Settings;
use crate::Error;
use crate::metrics::Address;
use std::path::{Path, PathBuf};
use std::time::Duration;
use understory_nix::PublicKeys;

/// Settings are at most this long; a guard against nonsense, not a limit anybody meets.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// A setting.
pub(super) struct Definition {
    pub(super) name: &'static str,
    /// Older names that Nix still takes.
    pub(super) aliases: &'static [&'static str],
    pub(super) kind: Kind,
    /// Nix has it, too.
    pub(super) nix: bool,
    pub(super) get: fn(&Settings) -> String,
    pub(super) set: fn(&mut Settings, &str) -> Result<(), Wrong>,
}

/// The form of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    List,
    Boolean,
    Number,
    Text,
}

impl Kind {
    pub(super) fn is_list(self) -> bool {
        self == Self::List
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::List => "a list of words",
            Self::Boolean => "true or false",
            Self::Number => "a number",
            Self::Text => "a string",
        })
    }
}

/// Why a text is no value.
pub(super) enum Wrong {
    Boolean,
    Number,
    Relative,
    Long,
    Other(String),
    /// An error that says all, with a hint.
    Error(Error),
}

impl Wrong {
    /// Nix's words where it has some.
    pub(super) fn of(self, name: &str, text: &str) -> Error {
        match self {
            Self::Boolean => Error::user(format!(
                "Boolean setting '{name}' has invalid value '{text}'"
            )),
            Self::Number => Error::user(format!("setting '{name}' has invalid value '{text}'")),
            Self::Relative => Error::user(format!(
                "setting '{name}': expected an absolute path, found '{text}'"
            )),
            Self::Long => Error::user(format!(
                "setting '{name}': expected at most {TEXT_BYTES_MAX} bytes, found {}",
                text.len()
            )),
            Self::Other(why) => Error::user(format!("setting '{name}': {why}")),
            Self::Error(error) => {
                let out = Error::user(format!("setting '{name}': {error}"));
                match error.hint() {
                    Some(hint) => out.with_hint(hint),
                    None => out,
                }
            }
        }
    }
}

/// The setting of that name or alias; true if it only adds to it (`extra-`).
pub(super) fn find(name: &str) -> Option<(&'static Definition, bool)> {
    let exact = |name: &str| {
        DEFINITIONS
            .iter()
            .find(|d| d.name == name || d.aliases.contains(&name))
    };
    exact(name).map(|d| (d, false)).or_else(|| {
        let definition = exact(name.strip_prefix("extra-")?)?;
        definition.kind.is_list().then_some((definition, true))
    })
}

fn words(text: &str) -> Result<Vec<String>, Wrong> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(Wrong::Long);
    }
    Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
}
fn boolean(text: &str) -> Result<bool, Wrong> {
    match text {
        "true" | "yes" | "1" => Ok(true),
        "false" | "no" | "0" => Ok(false),
        _ => Err(Wrong::Boolean),
    }
}
/// A number with `K`, `M`, `G` or `T` for powers of 1024, as Nix takes them.
fn number(text: &str) -> Result<u64, Wrong> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| Wrong::Number)?;
    number.checked_mul(1 << shift).ok_or(Wrong::Number)
}
fn seconds(text: &str) -> Result<Duration, Wrong> {
    number(text).map(Duration::from_secs)
}
fn path(text: &str) -> Result<Option<PathBuf>, Wrong> {
    match text {
        "" => Ok(None),
        _ if !Path::new(text).is_absolute() => Err(Wrong::Relative),
        _ => Ok(Some(text.into())),
    }
}
fn shown(path: Option<&PathBuf>) -> String {
    path.map_or_else(String::new, |path| path.display().to_string())
}

macro_rules! definition {
    ($name:literal $(| $alias:literal)*, $kind:ident, $nix:literal, $get:expr, $set:expr) => {
        Definition {
            name: $name,
            aliases: &[$($alias),*],
            kind: Kind::$kind,
            nix: $nix,
            get: $get,
            set: $set,
        }
    };
}
macro_rules! flag {
    ($name:literal $(| $alias:literal)*, $field:ident) => {
        definition!($name $(| $alias)*, Boolean, true, |s| s.$field.to_string(), |s, t| {
            s.$field = boolean(t)?;
            Ok(())
        })
    };
}
macro_rules! count {
    ($name:literal $(| $alias:literal)*, $field:ident) => {
        definition!($name $(| $alias)*, Number, true, |s| s.$field.to_string(), |s, t| {
            s.$field = number(t)?.try_into().map_err(|_| Wrong::Number)?;
            Ok(())
        })
    };
}
macro_rules! time {
    ($name:literal, $field:ident) => {
        definition!(
            $name,
            Number,
            true,
            |s| s.$field.as_secs().to_string(),
            |s, t| {
                s.$field = seconds(t)?;
                Ok(())
            }
        )
    };
}
macro_rules! list {
    ($name:literal $(| $alias:literal)*, $nix:literal, $field:ident) => {
        definition!($name $(| $alias)*, List, $nix, |s| s.$field.join(" "), |s, t| {
            s.$field = words(t)?;
            Ok(())
        })
    };
}
macro_rules! file {
    ($name:literal, $nix:literal, $field:ident) => {
        definition!($name, Text, $nix, |s| shown(s.$field.as_ref()), |s, t| {
            s.$field = path(t)?;
            Ok(())
        })
    };
}

pub(super) static DEFINITIONS: &[Definition] = &[
    list!("allowed-users", true, allowed_users),
    flag!("auto-optimise-store", auto_optimise),
    definition!(
        "build-users-group",
        Text,
        true,
        |s| s.build_users_group.clone(),
        |s, t| {
            t.clone_into(&mut s.build_users_group);
            Ok(())
        }
    ),
    time!("connect-timeout", connect_timeout),
    count!("download-attempts", download_attempts),
    flag!("fallback" | "build-fallback", fallback),
    flag!("fsync-store-paths", fsync_store_paths),
    count!(
        "http-connections" | "binary-caches-parallel-connections",
        http_connections
    ),
    definition!(
        "image-newer-paths-max",
        Number,
        false,
        |s| s.image_newer_paths_max.to_string(),
        |s, t| {
            s.image_newer_paths_max = number(t)?;
            Ok(())
        }
    ),
    definition!(
        "image-paths-min",
        Number,
        false,
        |s| s.image_paths_min.to_string(),
        |s, t| {
            s.image_paths_min = number(t)?;
            Ok(())
        }
    ),
    definition!(
        "image-renew",
        Boolean,
        false,
        |s| s.image_renew.to_string(),
        |s, t| {
            s.image_renew = boolean(t)?;
            Ok(())
        }
    ),
    flag!("keep-derivations" | "gc-keep-derivations", keep_derivations),
    flag!("keep-outputs" | "gc-keep-outputs", keep_outputs),
    list!("lowers", false, lowers),
    definition!(
        "mask-hash-parts",
        Boolean,
        false,
        |s| s.mask_hash_parts.to_string(),
        |s, t| {
            s.mask_hash_parts = boolean(t)?;
            Ok(())
        }
    ),
    count!(
        "max-substitution-jobs" | "substitution-max-jobs",
        substitution_jobs
    ),
    definition!(
        "metrics",
        Text,
        false,
        |s| s.metrics.as_ref().map_or_else(String::new, Address::text),
        |s, t| {
            s.metrics = match t {
                "" => None,
                _ => Some(t.parse().map_err(Wrong::Error)?),
            };
            Ok(())
        }
    ),
    time!("narinfo-cache-negative-ttl", narinfo_negative_ttl),
    time!("narinfo-cache-positive-ttl", narinfo_positive_ttl),
    file!("netrc-file", true, netrc_file),
    file!("nix", false, nix),
    flag!("require-sigs", require_signatures),
    file!("ssl-cert-file", true, ssl_cert_file),
    time!("stalled-download-timeout", stalled_timeout),
    flag!("substitute" | "build-use-substitutes", substitute),
    list!("substituters" | "binary-caches", true, substituters),
    definition!(
        "trusted-public-keys" | "binary-cache-public-keys",
        List,
        true,
        // Only built-in values are shown from here, and none is built in.
        |s| s
            .trusted_public_keys
            .iter()
            .map(|key| key.name.as_str())
            .collect::<Vec<_>>()
            .join(" "),
        |s, t| {
            s.trusted_public_keys =
                PublicKeys::parse(t).map_err(|e| Wrong::Other(e.to_string()))?;
            Ok(())
        }
    ),
    definition!(
        "trusted-substituters" | "trusted-binary-caches",
        List,
        true,
        |s| s
            .trusted_substituters
            .iter()
            .cloned()
            .collect::<Vec<_>>()
            .join(" "),
        |s, t| {
            s.trusted_substituters = words(t)?.into_iter().collect();
            Ok(())
        }
    ),
    list!("trusted-users", true, trusted_users),
];
