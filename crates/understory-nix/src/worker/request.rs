//! Operations and their arguments.

use super::types::{read_ca, read_signatures, read_unkeyed_path_info, write_ca, write_nar_hash};
use super::{
    BasicDerivation, BuildMode, Decoder, DerivedPath, DrvOutput, Encoder, GcRequest, Protocol,
    SetOptions, WireRealisation,
};
use crate::wire::{STRING_BYTES_MAX, WireError};
use crate::{ContentAddress, PathInfo, Signature, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, Write};

macro_rules! ops {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// An operation. The names are Nix's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are Nix's")]
        pub enum Op { $($name = $number,)* }
        impl Op {
            /// All that this crate knows.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
            /// The operation of that number.
            pub fn from_wire(value: u64) -> Option<Self> {
                match value { $($number => Some(Self::$name),)* _ => None }
            }
            /// The number on the wire.
            pub fn to_wire(self) -> u64 { self as u64 }
            /// Nix's name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

ops! {
    IsValidPath = 1,
    HasSubstitutes = 3,
    QueryPathHash = 4,
    QueryReferences = 5,
    QueryReferrers = 6,
    AddToStore = 7,
    AddTextToStore = 8,
    BuildPaths = 9,
    EnsurePath = 10,
    AddTempRoot = 11,
    AddIndirectRoot = 12,
    SyncWithGC = 13,
    FindRoots = 14,
    ExportPath = 16,
    QueryDeriver = 18,
    SetOptions = 19,
    CollectGarbage = 20,
    QuerySubstitutablePathInfo = 21,
    QueryDerivationOutputs = 22,
    QueryAllValidPaths = 23,
    QueryPathInfo = 26,
    ImportPaths = 27,
    QueryDerivationOutputNames = 28,
    QueryPathFromHashPart = 29,
    QuerySubstitutablePathInfos = 30,
    QueryValidPaths = 31,
    QuerySubstitutablePaths = 32,
    QueryValidDerivers = 33,
    OptimiseStore = 34,
    VerifyStore = 35,
    BuildDerivation = 36,
    AddSignatures = 37,
    NarFromPath = 38,
    AddToStoreNar = 39,
    QueryMissing = 40,
    QueryDerivationOutputMap = 41,
    RegisterDrvOutput = 42,
    QueryRealisation = 43,
    AddMultipleToStore = 44,
    AddBuildLog = 45,
    BuildPathsWithResults = 46,
    AddPermRoot = 47,
}

/// What follows the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    None,
    /// A framed stream.
    Framed,
    /// A NAR that the server pulls with `READ` messages.
    Pulled,
    /// A bare NAR.
    RawNar,
}

impl Op {
    /// True if the operation exists in this version.
    pub fn exists(self, protocol: Protocol) -> bool {
        match self {
            Self::QueryDerivationOutputMap => protocol.since(22),
            Self::RegisterDrvOutput | Self::QueryRealisation => protocol.since(27),
            Self::AddMultipleToStore | Self::AddBuildLog => protocol.since(32),
            Self::BuildPathsWithResults => protocol.since(34),
            Self::AddPermRoot => protocol.since(36),
            _ => true,
        }
    }
    /// What follows its arguments.
    pub fn body(self, protocol: Protocol) -> Body {
        match self {
            Self::AddToStore if protocol.since(25) => Body::Framed,
            Self::AddToStore => Body::RawNar,
            Self::AddToStoreNar if protocol.since(23) => Body::Framed,
            Self::AddToStoreNar => Body::Pulled,
            Self::AddMultipleToStore | Self::AddBuildLog => Body::Framed,
            _ => Body::None,
        }
    }
}

/// A request: the operation with its arguments, without the [`Body`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names are Nix's, the fields are the protocol's"
)]
pub enum Request {
    IsValidPath(StorePath),
    HasSubstitutes(StorePath),
    QueryPathHash(StorePath),
    QueryReferences(StorePath),
    QueryReferrers(StorePath),
    /// From 1.25 on; then the dump.
    AddToStore {
        name: String,
        method: String,
        references: BTreeSet<StorePath>,
        repair: bool,
    },
    /// Before 1.25; then a NAR.
    AddToStoreOld {
        name: String,
        fixed: bool,
        recursive: u64,
        algorithm: String,
    },
    AddTextToStore {
        name: String,
        text: Vec<u8>,
        references: BTreeSet<StorePath>,
    },
    BuildPaths {
        paths: Vec<DerivedPath>,
        mode: BuildMode,
    },
    EnsurePath(StorePath),
    AddTempRoot(StorePath),
    AddIndirectRoot(Vec<u8>),
    SyncWithGC,
    FindRoots,
    ExportPath {
        path: StorePath,
        sign: u64,
    },
    QueryDeriver(StorePath),
    SetOptions(Box<SetOptions>),
    CollectGarbage(GcRequest),
    QuerySubstitutablePathInfo(StorePath),
    QueryDerivationOutputs(StorePath),
    QueryAllValidPaths,
    QueryPathInfo(StorePath),
    ImportPaths,
    QueryDerivationOutputNames(StorePath),
    QueryPathFromHashPart(String),
    /// Before 1.22 without content addresses.
    QuerySubstitutablePathInfos(BTreeMap<StorePath, Option<ContentAddress>>),
    QueryValidPaths {
        paths: Vec<StorePath>,
        substitute: bool,
    },
    QuerySubstitutablePaths(Vec<StorePath>),
    QueryValidDerivers(StorePath),
    OptimiseStore,
    VerifyStore {
        check_contents: bool,
        repair: bool,
    },
    BuildDerivation {
        drv: StorePath,
        derivation: Box<BasicDerivation>,
        mode: BuildMode,
    },
    AddSignatures {
        path: StorePath,
        signatures: BTreeSet<Signature>,
    },
    NarFromPath(StorePath),
    /// Then the NAR.
    AddToStoreNar {
        info: Box<PathInfo>,
        repair: bool,
        dont_check_sigs: bool,
    },
    QueryMissing(Vec<DerivedPath>),
    QueryDerivationOutputMap(StorePath),
    RegisterDrvOutput(WireRealisation),
    QueryRealisation(DrvOutput),
    /// Then the count, and for each a path info and its NAR.
    AddMultipleToStore {
        repair: bool,
        dont_check_sigs: bool,
    },
    /// Then the log. The derivation comes as a base name.
    AddBuildLog(StorePath),
    BuildPathsWithResults {
        paths: Vec<DerivedPath>,
        mode: BuildMode,
    },
    AddPermRoot {
        path: StorePath,
        link: Vec<u8>,
    },
}

impl Request {
    /// Which operation it is.
    pub fn op(&self) -> Op {
        match self {
            Self::IsValidPath(_) => Op::IsValidPath,
            Self::HasSubstitutes(_) => Op::HasSubstitutes,
            Self::QueryPathHash(_) => Op::QueryPathHash,
            Self::QueryReferences(_) => Op::QueryReferences,
            Self::QueryReferrers(_) => Op::QueryReferrers,
            Self::AddToStore { .. } | Self::AddToStoreOld { .. } => Op::AddToStore,
            Self::AddTextToStore { .. } => Op::AddTextToStore,
            Self::BuildPaths { .. } => Op::BuildPaths,
            Self::EnsurePath(_) => Op::EnsurePath,
            Self::AddTempRoot(_) => Op::AddTempRoot,
            Self::AddIndirectRoot(_) => Op::AddIndirectRoot,
            Self::SyncWithGC => Op::SyncWithGC,
            Self::FindRoots => Op::FindRoots,
            Self::ExportPath { .. } => Op::ExportPath,
            Self::QueryDeriver(_) => Op::QueryDeriver,
            Self::SetOptions(_) => Op::SetOptions,
            Self::CollectGarbage(_) => Op::CollectGarbage,
            Self::QuerySubstitutablePathInfo(_) => Op::QuerySubstitutablePathInfo,
            Self::QueryDerivationOutputs(_) => Op::QueryDerivationOutputs,
            Self::QueryAllValidPaths => Op::QueryAllValidPaths,
            Self::QueryPathInfo(_) => Op::QueryPathInfo,
            Self::ImportPaths => Op::ImportPaths,
            Self::QueryDerivationOutputNames(_) => Op::QueryDerivationOutputNames,
            Self::QueryPathFromHashPart(_) => Op::QueryPathFromHashPart,
            Self::QuerySubstitutablePathInfos(_) => Op::QuerySubstitutablePathInfos,
            Self::QueryValidPaths { .. } => Op::QueryValidPaths,
            Self::QuerySubstitutablePaths(_) => Op::QuerySubstitutablePaths,
            Self::QueryValidDerivers(_) => Op::QueryValidDerivers,
            Self::OptimiseStore => Op::OptimiseStore,
            Self::VerifyStore { .. } => Op::VerifyStore,
            Self::BuildDerivation { .. } => Op::BuildDerivation,
            Self::AddSignatures { .. } => Op::AddSignatures,
            Self::NarFromPath(_) => Op::NarFromPath,
            Self::AddToStoreNar { .. } => Op::AddToStoreNar,
            Self::QueryMissing(_) => Op::QueryMissing,
            Self::QueryDerivationOutputMap(_) => Op::QueryDerivationOutputMap,
            Self::RegisterDrvOutput(_) => Op::RegisterDrvOutput,
            Self::QueryRealisation(_) => Op::QueryRealisation,
            Self::AddMultipleToStore { .. } => Op::AddMultipleToStore,
            Self::AddBuildLog(_) => Op::AddBuildLog,
            Self::BuildPathsWithResults { .. } => Op::BuildPathsWithResults,
            Self::AddPermRoot { .. } => Op::AddPermRoot,
        }
    }

    /// Reads the arguments of `op`. Use it inside [`Decoder::message`].
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(op: Op, d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(match op {
            Op::IsValidPath => Self::IsValidPath(d.store_path()?),
            Op::HasSubstitutes => Self::HasSubstitutes(d.store_path()?),
            Op::QueryPathHash => Self::QueryPathHash(d.store_path()?),
            Op::QueryReferences => Self::QueryReferences(d.store_path()?),
            Op::QueryReferrers => Self::QueryReferrers(d.store_path()?),
            Op::AddToStore if d.protocol().since(25) => Self::AddToStore {
                name: d.short()?,
                method: d.short()?,
                references: d.store_path_set()?,
                repair: d.bool()?,
            },
            Op::AddToStore => Self::AddToStoreOld {
                name: d.short()?,
                fixed: d.bool()?,
                recursive: d.u64()?,
                algorithm: d.short()?,
            },
            Op::AddTextToStore => Self::AddTextToStore {
                name: d.short()?,
                text: d.bytes(STRING_BYTES_MAX)?,
                references: d.store_path_set()?,
            },
            Op::BuildPaths => Self::BuildPaths {
                paths: d.list(DerivedPath::read)?,
                mode: BuildMode::read_or(d, BuildMode::Normal)?,
            },
            Op::EnsurePath => Self::EnsurePath(d.store_path()?),
            Op::AddTempRoot => Self::AddTempRoot(d.store_path()?),
            Op::AddIndirectRoot => Self::AddIndirectRoot(d.bytes(crate::wire::SHORT_BYTES_MAX)?),
            Op::SyncWithGC => Self::SyncWithGC,
            Op::FindRoots => Self::FindRoots,
            Op::ExportPath => Self::ExportPath {
                path: d.store_path()?,
                sign: d.u64()?,
            },
            Op::QueryDeriver => Self::QueryDeriver(d.store_path()?),
            Op::SetOptions => Self::SetOptions(Box::new(SetOptions::read(d)?)),
            Op::CollectGarbage => Self::CollectGarbage(GcRequest::read(d)?),
            Op::QuerySubstitutablePathInfo => Self::QuerySubstitutablePathInfo(d.store_path()?),
            Op::QueryDerivationOutputs => Self::QueryDerivationOutputs(d.store_path()?),
            Op::QueryAllValidPaths => Self::QueryAllValidPaths,
            Op::QueryPathInfo => Self::QueryPathInfo(d.store_path()?),
            Op::ImportPaths => Self::ImportPaths,
            Op::QueryDerivationOutputNames => Self::QueryDerivationOutputNames(d.store_path()?),
            Op::QueryPathFromHashPart => Self::QueryPathFromHashPart(d.short()?),
            Op::QuerySubstitutablePathInfos if d.protocol().since(22) => {
                Self::QuerySubstitutablePathInfos(
                    d.list(|d| Ok((d.store_path()?, read_ca(d)?)))?
                        .into_iter()
                        .collect(),
                )
            }
            Op::QuerySubstitutablePathInfos => Self::QuerySubstitutablePathInfos(
                d.store_paths()?
                    .into_iter()
                    .map(|path| (path, None))
                    .collect(),
            ),
            Op::QueryValidPaths => Self::QueryValidPaths {
                paths: d.store_paths()?,
                substitute: if d.protocol().since(27) {
                    d.bool()?
                } else {
                    false
                },
            },
            Op::QuerySubstitutablePaths => Self::QuerySubstitutablePaths(d.store_paths()?),
            Op::QueryValidDerivers => Self::QueryValidDerivers(d.store_path()?),
            Op::OptimiseStore => Self::OptimiseStore,
            Op::VerifyStore => Self::VerifyStore {
                check_contents: d.bool()?,
                repair: d.bool()?,
            },
            Op::BuildDerivation => Self::BuildDerivation {
                drv: d.store_path()?,
                derivation: Box::new(BasicDerivation::read(d)?),
                mode: BuildMode::read_or(d, BuildMode::Normal)?,
            },
            Op::AddSignatures => Self::AddSignatures {
                path: d.store_path()?,
                signatures: read_signatures(d)?,
            },
            Op::NarFromPath => Self::NarFromPath(d.store_path()?),
            Op::AddToStoreNar => {
                let path = d.store_path()?;
                Self::AddToStoreNar {
                    info: Box::new(read_unkeyed_path_info(d, path)?),
                    repair: d.bool()?,
                    dont_check_sigs: d.bool()?,
                }
            }
            Op::QueryMissing => Self::QueryMissing(d.list(DerivedPath::read)?),
            Op::QueryDerivationOutputMap => Self::QueryDerivationOutputMap(d.store_path()?),
            Op::RegisterDrvOutput if d.protocol().since(31) => {
                Self::RegisterDrvOutput(WireRealisation::read(d)?)
            }
            Op::RegisterDrvOutput => {
                let id = DrvOutput::read(d)?;
                let out_path = read_base_name(d)?;
                Self::RegisterDrvOutput(WireRealisation {
                    id,
                    out_path,
                    signatures: BTreeSet::new(),
                })
            }
            Op::QueryRealisation => Self::QueryRealisation(DrvOutput::read(d)?),
            Op::AddMultipleToStore => Self::AddMultipleToStore {
                repair: d.bool()?,
                dont_check_sigs: d.bool()?,
            },
            Op::AddBuildLog => Self::AddBuildLog(read_base_name(d)?),
            Op::BuildPathsWithResults => Self::BuildPathsWithResults {
                paths: d.list(DerivedPath::read)?,
                mode: BuildMode::read_or(d, BuildMode::Normal)?,
            },
            Op::AddPermRoot => Self::AddPermRoot {
                path: d.store_path()?,
                link: d.bytes(crate::wire::SHORT_BYTES_MAX)?,
            },
        })
    }

    /// Writes operation and arguments.
    ///
    /// # Errors
    /// The stream's, or a realisation's key of the wrong kind.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.u64(self.op().to_wire())?;
        match self {
            Self::IsValidPath(path)
            | Self::HasSubstitutes(path)
            | Self::QueryPathHash(path)
            | Self::QueryReferences(path)
            | Self::QueryReferrers(path)
            | Self::EnsurePath(path)
            | Self::AddTempRoot(path)
            | Self::QueryDeriver(path)
            | Self::QuerySubstitutablePathInfo(path)
            | Self::QueryDerivationOutputs(path)
            | Self::QueryPathInfo(path)
            | Self::QueryDerivationOutputNames(path)
            | Self::QueryValidDerivers(path)
            | Self::NarFromPath(path)
            | Self::QueryDerivationOutputMap(path) => e.store_path(path),
            Self::AddToStore {
                name,
                method,
                references,
                repair,
            } => {
                e.bytes(name)?;
                e.bytes(method)?;
                e.store_paths(references)?;
                e.bool(*repair)
            }
            Self::AddToStoreOld {
                name,
                fixed,
                recursive,
                algorithm,
            } => {
                e.bytes(name)?;
                e.bool(*fixed)?;
                e.u64(*recursive)?;
                e.bytes(algorithm)
            }
            Self::AddTextToStore {
                name,
                text,
                references,
            } => {
                e.bytes(name)?;
                e.bytes(text)?;
                e.store_paths(references)
            }
            Self::BuildPaths { paths, mode } | Self::BuildPathsWithResults { paths, mode } => {
                write_derived_paths(e, paths)?;
                e.u64(mode.to_wire())
            }
            Self::AddIndirectRoot(link) => e.bytes(link),
            Self::SyncWithGC
            | Self::FindRoots
            | Self::QueryAllValidPaths
            | Self::ImportPaths
            | Self::OptimiseStore => Ok(()),
            Self::ExportPath { path, sign } => {
                e.store_path(path)?;
                e.u64(*sign)
            }
            Self::SetOptions(options) => options.write(e),
            Self::CollectGarbage(request) => request.write(e),
            Self::QueryPathFromHashPart(hash_part) => e.bytes(hash_part),
            Self::QuerySubstitutablePathInfos(paths) => {
                let with_ca = e.protocol().since(22);
                e.u64(paths.len() as u64)?;
                for (path, ca) in paths {
                    e.store_path(path)?;
                    if with_ca {
                        write_ca(e, ca.as_ref())?;
                    }
                }
                Ok(())
            }
            Self::QueryValidPaths { paths, substitute } => {
                e.store_paths(paths)?;
                if e.protocol().since(27) {
                    e.bool(*substitute)?;
                }
                Ok(())
            }
            Self::QuerySubstitutablePaths(paths) => e.store_paths(paths),
            Self::VerifyStore {
                check_contents,
                repair,
            } => {
                e.bool(*check_contents)?;
                e.bool(*repair)
            }
            Self::BuildDerivation {
                drv,
                derivation,
                mode,
            } => {
                e.store_path(drv)?;
                derivation.write(e)?;
                e.u64(mode.to_wire())
            }
            Self::AddSignatures { path, signatures } => {
                e.store_path(path)?;
                e.strings(signatures.iter().map(Signature::as_str))
            }
            Self::AddToStoreNar {
                info,
                repair,
                dont_check_sigs,
            } => {
                e.store_path(&info.path)?;
                e.opt_store_path(info.deriver.as_ref())?;
                write_nar_hash(e, &info.nar_hash)?;
                e.store_paths(&info.references)?;
                e.u64(info.registration_time)?;
                e.u64(info.nar_size)?;
                e.bool(info.ultimate)?;
                e.strings(info.signatures.iter().map(Signature::as_str))?;
                write_ca(e, info.ca.as_ref())?;
                e.bool(*repair)?;
                e.bool(*dont_check_sigs)
            }
            Self::QueryMissing(paths) => write_derived_paths(e, paths),
            Self::RegisterDrvOutput(realisation) if e.protocol().since(31) => realisation.write(e),
            Self::RegisterDrvOutput(realisation) => {
                realisation.id.write(e)?;
                e.bytes(realisation.out_path.base_name())
            }
            Self::QueryRealisation(id) => id.write(e),
            Self::AddMultipleToStore {
                repair,
                dont_check_sigs,
            } => {
                e.bool(*repair)?;
                e.bool(*dont_check_sigs)
            }
            Self::AddBuildLog(drv) => e.bytes(drv.base_name()),
            Self::AddPermRoot { path, link } => {
                e.store_path(path)?;
                e.bytes(link)
            }
        }
    }
}

fn read_base_name<R: BufRead>(d: &mut Decoder<R>) -> Result<StorePath, WireError> {
    let parsed = d.parsed(|text| {
        StorePath::from_base_name(text)
            .map_err(|error| format!("path '{}' {}", error.path, error.reason))
    })?;
    Ok(parsed.unwrap_or_else(|| {
        StorePath::from_base_name("00000000000000000000000000000000-invalid")
            .expect("a constant store path")
    }))
}

fn write_derived_paths<W: Write>(e: &mut Encoder<W>, paths: &[DerivedPath]) -> io::Result<()> {
    e.u64(paths.len() as u64)?;
    for path in paths {
        path.write(e)?;
    }
    Ok(())
}
