//! The protocol's data types, each with reader and writer.

use super::{Decoder, Encoder};
use crate::wire::{SETTING_BYTES_MAX, WireError};
use crate::{ContentAddress, Hash, HashAlgorithm, NarHash, PathInfo, Signature, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, Write};

macro_rules! wire_enum {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($(#[$vmeta:meta])* $variant:ident = $number:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vmeta])* $variant = $number,)*
        }
        impl $name {
            /// The value of that number.
            pub fn from_wire(value: u64) -> Option<Self> {
                match value { $($number => Some(Self::$variant),)* _ => None }
            }
            /// The number on the wire.
            pub fn to_wire(self) -> u64 {
                self as u64
            }
            /// Reads one; an unknown number is an invalid argument and yields `default`.
            ///
            /// # Errors
            /// The stream's.
            pub fn read_or<R: BufRead>(d: &mut Decoder<R>, default: Self) -> Result<Self, WireError> {
                let value = d.u64()?;
                Ok(Self::from_wire(value).unwrap_or_else(|| {
                    d.reject(format!(concat!("invalid ", $what, " {}"), value));
                    default
                }))
            }
        }
    };
}

wire_enum!(
    /// What the server thinks of the client.
    Trust, "trust" {
        /// It does not say.
        Unknown = 0,
        /// May do everything.
        Trusted = 1,
        /// May not.
        NotTrusted = 2,
    }
);
wire_enum!(
    /// How to build.
    BuildMode, "build mode" {
        /// What is missing.
        Normal = 0,
        /// What is damaged.
        Repair = 1,
        /// Once more, and compare.
        Check = 2,
    }
);
wire_enum!(
    /// How a build ended.
    BuildStatus, "build status" {
        /// Built.
        Built = 0,
        /// Fetched.
        Substituted = 1,
        /// Was there.
        AlreadyValid = 2,
        /// Failed for good.
        PermanentFailure = 3,
        /// The derivation was refused.
        InputRejected = 4,
        /// The outputs were refused.
        OutputRejected = 5,
        /// May succeed next time.
        TransientFailure = 6,
        /// Failed before.
        CachedFailure = 7,
        /// Took too long.
        TimedOut = 8,
        /// Failed otherwise.
        MiscFailure = 9,
        /// A dependency failed.
        DependencyFailed = 10,
        /// Said too much.
        LogLimitExceeded = 11,
        /// Differs each time.
        NotDeterministic = 12,
        /// Resolves to something that was there.
        ResolvesToAlreadyValid = 13,
        /// Nobody has it.
        NoSubstituters = 14,
    }
);
wire_enum!(
    /// What a garbage collection shall do.
    GcActionKind, "garbage collection action" {
        /// Name what is alive.
        ReturnLive = 0,
        /// Name what is dead.
        ReturnDead = 1,
        /// Delete what is dead.
        DeleteDead = 2,
        /// Delete these paths.
        DeleteSpecific = 3,
    }
);

impl BuildStatus {
    /// True for the four successes.
    pub fn is_success(self) -> bool {
        matches!(
            self,
            Self::Built | Self::Substituted | Self::AlreadyValid | Self::ResolvesToAlreadyValid
        )
    }
}

// -- path infos

/// Reads everything of a path info but the path (protocol ≥ 1.16).
///
/// # Errors
/// The stream's.
pub fn read_unkeyed_path_info<R: BufRead>(
    d: &mut Decoder<R>,
    path: StorePath,
) -> Result<PathInfo, WireError> {
    let deriver = d.opt_store_path()?;
    let nar_hash = read_nar_hash(d)?;
    let references = d.store_path_set()?;
    let registration_time = d.time()?;
    let nar_size = d.u64()?;
    let ultimate = d.bool()?;
    let signatures = read_signatures(d)?;
    let ca = read_ca(d)?;
    Ok(PathInfo {
        path,
        nar_hash,
        nar_size,
        references,
        deriver,
        registration_time,
        ultimate,
        signatures,
        ca,
    })
}

/// Writes everything of a path info but the path.
///
/// # Errors
/// The stream's.
pub fn write_unkeyed_path_info<W: Write>(e: &mut Encoder<W>, info: &PathInfo) -> io::Result<()> {
    e.opt_store_path(info.deriver.as_ref())?;
    write_nar_hash(e, &info.nar_hash)?;
    e.store_paths(&info.references)?;
    e.u64(info.registration_time)?;
    e.u64(info.nar_size)?;
    e.bool(info.ultimate)?;
    e.strings(info.signatures.iter().map(Signature::as_str))?;
    write_ca(e, info.ca.as_ref())
}

/// Reads a path info that begins with its path.
///
/// # Errors
/// The stream's.
pub fn read_path_info<R: BufRead>(d: &mut Decoder<R>) -> Result<PathInfo, WireError> {
    let path = d.store_path()?;
    read_unkeyed_path_info(d, path)
}

/// Writes a path info that begins with its path.
///
/// # Errors
/// The stream's.
pub fn write_path_info<W: Write>(e: &mut Encoder<W>, info: &PathInfo) -> io::Result<()> {
    e.store_path(&info.path)?;
    write_unkeyed_path_info(e, info)
}

/// Reads what comes before each NAR in AddMultipleToStore: a path info as of 1.16.
///
/// # Errors
/// The stream's.
pub fn read_add_multiple_item<R: BufRead>(d: &mut Decoder<R>) -> Result<PathInfo, WireError> {
    read_path_info(d)
}

pub(super) fn read_nar_hash<R: BufRead>(d: &mut Decoder<R>) -> Result<NarHash, WireError> {
    let hash = d.parsed(|text| {
        Hash::parse(text, Some(HashAlgorithm::Sha256)).and_then(NarHash::try_from)
    })?;
    Ok(hash.unwrap_or(NarHash([0; 32])))
}

pub(super) fn write_nar_hash<W: Write>(e: &mut Encoder<W>, hash: &NarHash) -> io::Result<()> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut hex = [0; 64];
    for (pair, byte) in hex.chunks_exact_mut(2).zip(hash.0) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    e.bytes(hex)
}

pub(super) fn read_signatures<R: BufRead>(
    d: &mut Decoder<R>,
) -> Result<BTreeSet<Signature>, WireError> {
    let signatures = d.list(|d| d.parsed(Signature::parse))?;
    Ok(signatures.into_iter().flatten().collect())
}

pub(super) fn read_ca<R: BufRead>(d: &mut Decoder<R>) -> Result<Option<ContentAddress>, WireError> {
    let ca = d.parsed(|text| {
        if text.is_empty() {
            Ok(None)
        } else {
            ContentAddress::parse(text).map(Some)
        }
    })?;
    Ok(ca.flatten())
}

pub(super) fn write_ca<W: Write>(
    e: &mut Encoder<W>,
    ca: Option<&ContentAddress>,
) -> io::Result<()> {
    match ca {
        None => e.bytes(""),
        Some(ca) => e.bytes(ca.to_string()),
    }
}

/// What a substituter says about a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubstitutablePathInfo {
    /// The derivation that made it.
    pub deriver: Option<StorePath>,
    /// Its references.
    pub references: BTreeSet<StorePath>,
    /// Bytes to download.
    pub download_size: u64,
    /// Bytes of its NAR.
    pub nar_size: u64,
}

impl SubstitutablePathInfo {
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(Self {
            deriver: d.opt_store_path()?,
            references: d.store_path_set()?,
            download_size: d.u64()?,
            nar_size: d.u64()?,
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.opt_store_path(self.deriver.as_ref())?;
        e.store_paths(&self.references)?;
        e.u64(self.download_size)?;
        e.u64(self.nar_size)
    }
}

// -- options and collection

/// The client's options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SetOptions {
    /// Keep build directories of failed builds.
    pub keep_failed: bool,
    /// Go on after a failure.
    pub keep_going: bool,
    /// Build if fetching fails.
    pub try_fallback: bool,
    /// How much to say.
    pub verbosity: u64,
    /// Builds at once.
    pub max_build_jobs: u64,
    /// Seconds.
    pub max_silent_time: u64,
    /// Always 1.
    pub use_build_hook: u64,
    /// How much of builds to show: 0 all, 7 nothing.
    pub build_verbosity: u64,
    /// Always 0.
    pub log_type: u64,
    /// Always 0.
    pub print_build_trace: u64,
    /// Cores of a build.
    pub build_cores: u64,
    /// Fetch at all.
    pub use_substitutes: bool,
    /// Settings that the user has overridden.
    pub overrides: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl SetOptions {
    /// Reads them.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(Self {
            keep_failed: d.bool()?,
            keep_going: d.bool()?,
            try_fallback: d.bool()?,
            verbosity: d.u64()?,
            max_build_jobs: d.u64()?,
            max_silent_time: d.u64()?,
            use_build_hook: d.u64()?,
            build_verbosity: d.u64()?,
            log_type: d.u64()?,
            print_build_trace: d.u64()?,
            build_cores: d.u64()?,
            use_substitutes: d.bool()?,
            overrides: d
                .list(|d| Ok((d.bytes(SETTING_BYTES_MAX)?, d.bytes(SETTING_BYTES_MAX)?)))?
                .into_iter()
                .collect(),
        })
    }
    /// Writes them.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.bool(self.keep_failed)?;
        e.bool(self.keep_going)?;
        e.bool(self.try_fallback)?;
        for value in [
            self.verbosity,
            self.max_build_jobs,
            self.max_silent_time,
            self.use_build_hook,
            self.build_verbosity,
            self.log_type,
            self.print_build_trace,
            self.build_cores,
        ] {
            e.u64(value)?;
        }
        e.bool(self.use_substitutes)?;
        e.u64(self.overrides.len() as u64)?;
        for (name, value) in &self.overrides {
            e.bytes(name)?;
            e.bytes(value)?;
        }
        Ok(())
    }
}

/// What a garbage collection is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcRequest {
    /// What to do.
    pub action: GcActionKind,
    /// Only these; `None` is the whole store (so is the empty set without the feature).
    pub paths: Option<BTreeSet<StorePath>>,
    /// What refers to them too (feature only).
    pub delete_referrers: bool,
    /// Delete what is alive; nobody may.
    pub ignore_liveness: bool,
    /// Stop after about so many bytes.
    pub freed_bytes_max: u64,
}

impl GcRequest {
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        let action = GcActionKind::read_or(d, GcActionKind::ReturnDead)?;
        let mut delete_referrers = false;
        let paths = if d.protocol().features.delete_dead_specific_referrers {
            if d.bool()? {
                None
            } else {
                let paths = d.store_path_set()?;
                delete_referrers = d.bool()?;
                Some(paths)
            }
        } else {
            let paths = d.store_path_set()?;
            (!paths.is_empty() || action == GcActionKind::DeleteSpecific).then_some(paths)
        };
        let ignore_liveness = d.bool()?;
        let freed_bytes_max = d.u64()?;
        for _ in 0..3 {
            d.u64()?;
        }
        Ok(Self {
            action,
            paths,
            delete_referrers,
            ignore_liveness,
            freed_bytes_max,
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.u64(self.action.to_wire())?;
        if e.protocol().features.delete_dead_specific_referrers {
            e.bool(self.paths.is_none())?;
            if let Some(paths) = &self.paths {
                e.store_paths(paths)?;
                e.bool(self.delete_referrers)?;
            }
        } else {
            match &self.paths {
                None => e.u64(0)?,
                Some(paths) => e.store_paths(paths)?,
            }
        }
        e.bool(self.ignore_liveness)?;
        e.u64(self.freed_bytes_max)?;
        for _ in 0..3 {
            e.u64(0)?;
        }
        Ok(())
    }
}
