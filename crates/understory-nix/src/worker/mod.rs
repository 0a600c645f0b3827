//! Nix's worker protocol: versions, operations, requests, replies and log messages.
//!
//! Pure: readers and writers are generic over streams, each type has both directions, so that a
//! server, a client and a proxy can be made of it. Protocol 1.21 to 1.38.
//! Checked against Nix 2.26.3 and 2.34.8 (1.38) on the wire and against Lix' order of the handshake.
//!
//! Two kinds of failure are kept apart. A [`WireError`](crate::wire::WireError) means that the
//! stream is lost. An [`Invalid`] argument means that the request was read to its end and cannot be
//! met: the connection goes on.

mod builds;
mod codec;
mod log;
mod request;
mod types;

pub use builds::{
    BasicDerivation, BuildResult, DerivationOutput, DerivedPath, DrvOutput, KeyedBuildResult,
    MissingInfo, OutputsSpec, WireRealisation, legacy_realisation_from_json,
    legacy_realisation_json,
};
pub use codec::{Decoder, Encoder, Invalid};
pub use log::{ActivityType, ErrorMessage, Field, LogMessage, ResultType, Verbosity};
pub use request::{Body, Op, Request};
pub use types::{
    BuildMode, BuildStatus, GcActionKind, GcRequest, SetOptions, SubstitutablePathInfo, Trust,
    read_add_multiple_item, read_path_info, read_unkeyed_path_info, write_path_info,
    write_unkeyed_path_info,
};

use std::fmt;

/// What a client sends first: `nixc`.
pub const CLIENT_MAGIC: u64 = 0x6e69_7863;
/// What a server sends first: `dxio`.
pub const SERVER_MAGIC: u64 = 0x6478_696f;
/// Most features in a handshake: upstream has five.
pub const FEATURES_MAX: u64 = 256;

/// A protocol version: major and minor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u16);

impl Version {
    /// The oldest that this crate speaks.
    pub const OLDEST: Self = Self::new(1, 21);
    /// The newest; upstream has frozen it and adds features instead.
    pub const NEWEST: Self = Self::new(1, 38);

    /// Makes a version.
    pub const fn new(major: u8, minor: u8) -> Self {
        Self(((major as u16) << 8) | minor as u16)
    }
    /// From the number on the wire; `None` if it has more than 16 bits.
    pub fn from_wire(value: u64) -> Option<Self> {
        u16::try_from(value).ok().map(Self)
    }
    /// The number on the wire.
    pub fn to_wire(self) -> u64 {
        u64::from(self.0)
    }
    /// The part before the dot.
    pub const fn major(self) -> u8 {
        (self.0 >> 8) as u8
    }
    /// The part after the dot.
    pub const fn minor(self) -> u8 {
        (self.0 & 0xff) as u8
    }
}
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}
impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The features of 1.38 that this crate knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Features {
    /// Realisations are keyed by derivation path and output name (Nix 2.35).
    pub realisation_with_path: bool,
    /// CollectGarbage can delete given paths with their referrers (Nix 2.35).
    pub delete_dead_specific_referrers: bool,
}

impl Features {
    /// Name of [`Features::realisation_with_path`].
    pub const REALISATION_WITH_PATH: &'static str = "realisation-with-path-not-hash";
    /// Name of [`Features::delete_dead_specific_referrers`].
    pub const DELETE_DEAD_SPECIFIC_REFERRERS: &'static str = "delete-dead-specific-referrers";

    /// Takes what is known of `names`.
    pub fn from_names<T: AsRef<[u8]>>(names: &[T]) -> Self {
        let has = |name: &str| names.iter().any(|n| n.as_ref() == name.as_bytes());
        Self {
            realisation_with_path: has(Self::REALISATION_WITH_PATH),
            delete_dead_specific_referrers: has(Self::DELETE_DEAD_SPECIFIC_REFERRERS),
        }
    }
    /// The names, sorted.
    pub fn names(self) -> Vec<&'static str> {
        let mut names = Vec::new();
        if self.delete_dead_specific_referrers {
            names.push(Self::DELETE_DEAD_SPECIFIC_REFERRERS);
        }
        if self.realisation_with_path {
            names.push(Self::REALISATION_WITH_PATH);
        }
        names
    }
    /// What both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            realisation_with_path: self.realisation_with_path && other.realisation_with_path,
            delete_dead_specific_referrers: self.delete_dead_specific_referrers
                && other.delete_dead_specific_referrers,
        }
    }
}

/// What two peers have agreed upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protocol {
    /// The smaller of both versions.
    pub version: Version,
    /// The features that both have.
    pub features: Features,
}

impl Protocol {
    /// A version without features.
    pub const fn plain(version: Version) -> Self {
        Self {
            version,
            features: Features {
                realisation_with_path: false,
                delete_dead_specific_referrers: false,
            },
        }
    }
    /// True from 1.`minor` on.
    pub fn since(&self, minor: u8) -> bool {
        self.version >= Version::new(1, minor)
    }
}
