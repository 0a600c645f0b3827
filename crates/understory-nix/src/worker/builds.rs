//! Building: what to build, how it went, and which path an output is.

use super::{BuildStatus, Decoder, Encoder};
use crate::wire::{SETTING_BYTES_MAX, STRING_BYTES_MAX, WireError};
use crate::{Hash, StoreDir, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, Write};

// -- derived paths and builds

/// Which outputs of a derivation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum OutputsSpec {
    /// All.
    All,
    /// These.
    Names(BTreeSet<String>),
}

/// Something to make valid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum DerivedPath {
    /// This path itself.
    Opaque(StorePath),
    /// Outputs of a derivation.
    Built {
        /// The derivation.
        drv: StorePath,
        /// Outputs to go through (dynamic derivations); mostly empty.
        through: Vec<String>,
        /// The outputs.
        outputs: OutputsSpec,
    },
}

impl DerivedPath {
    /// Parses `<path>`, `<drv>!*`, `<drv>!out,dev`, `<drv>!out!*`. Before 1.30 (`legacy`) a bare
    /// `.drv` means all its outputs.
    ///
    /// # Errors
    /// A text for the user.
    pub fn parse(dir: &StoreDir, text: &str, legacy: bool) -> Result<Self, String> {
        let mut parts = text.split('!');
        let path = parts.next().unwrap_or_default();
        let path = dir
            .parse(path.as_bytes())
            .map_err(|e| format!("path '{}' {}", e.path, e.reason))?;
        let mut names: Vec<&str> = parts.collect();
        let Some(last) = names.pop() else {
            return Ok(if legacy && path.is_derivation() {
                Self::Built {
                    drv: path,
                    through: Vec::new(),
                    outputs: OutputsSpec::All,
                }
            } else {
                Self::Opaque(path)
            });
        };
        if names
            .iter()
            .copied()
            .chain(last.split(','))
            .any(str::is_empty)
        {
            return Err(format!("'{text}' names no output"));
        }
        let outputs = if last == "*" {
            OutputsSpec::All
        } else {
            OutputsSpec::Names(last.split(',').map(str::to_owned).collect())
        };
        Ok(Self::Built {
            drv: path,
            through: names.into_iter().map(str::to_owned).collect(),
            outputs,
        })
    }
    /// The text that [`DerivedPath::parse`] reads.
    pub fn print(&self, dir: &StoreDir) -> String {
        match self {
            Self::Opaque(path) => dir.print(path),
            Self::Built {
                drv,
                through,
                outputs,
            } => {
                let mut text = dir.print(drv);
                for name in through {
                    text.push('!');
                    text.push_str(name);
                }
                text.push('!');
                match outputs {
                    OutputsSpec::All => text.push('*'),
                    OutputsSpec::Names(names) => {
                        for (i, name) in names.iter().enumerate() {
                            if i > 0 {
                                text.push(',');
                            }
                            text.push_str(name);
                        }
                    }
                }
                text
            }
        }
    }
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        let legacy = !d.protocol().since(30);
        // Output names make it longer than a path.
        let text = d.text(SETTING_BYTES_MAX)?;
        Self::parse(d.store_dir(), &text, legacy).or_else(|message| {
            d.reject(message);
            let path = StorePath::from_base_name("00000000000000000000000000000000-invalid");
            Ok(Self::Opaque(path.expect("a constant store path")))
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        let text = match self {
            Self::Built {
                drv,
                through,
                outputs: OutputsSpec::All,
            } if through.is_empty() && drv.is_derivation() && !e.protocol().since(30) => {
                e.store_dir().print(drv)
            }
            _ => self.print(e.store_dir()),
        };
        e.bytes(text)
    }
}

/// A derivation's output as it is sent: kinds are told apart by what is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DerivationOutput {
    /// Full path, or empty.
    pub path: String,
    /// `[r:|git:|text:]<algorithm>`, or empty.
    pub hash_algo: String,
    /// Hex hash, `impure`, or empty.
    pub hash: String,
}

/// A derivation without its input derivations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BasicDerivation {
    /// Outputs by name.
    pub outputs: BTreeMap<String, DerivationOutput>,
    /// Input sources.
    pub input_sources: BTreeSet<StorePath>,
    /// The system.
    pub platform: Vec<u8>,
    /// The builder.
    pub builder: Vec<u8>,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Its environment.
    pub environment: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl BasicDerivation {
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        let outputs = d.list(|d| {
            Ok((
                d.short()?,
                DerivationOutput {
                    path: d.short()?,
                    hash_algo: d.short()?,
                    hash: d.short()?,
                },
            ))
        })?;
        Ok(Self {
            outputs: outputs.into_iter().collect(),
            input_sources: d.store_path_set()?,
            platform: d.bytes(STRING_BYTES_MAX)?,
            builder: d.bytes(STRING_BYTES_MAX)?,
            arguments: d.list(|d| d.bytes(STRING_BYTES_MAX))?,
            environment: d
                .list(|d| Ok((d.bytes(STRING_BYTES_MAX)?, d.bytes(STRING_BYTES_MAX)?)))?
                .into_iter()
                .collect(),
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.u64(self.outputs.len() as u64)?;
        for (name, output) in &self.outputs {
            for text in [name, &output.path, &output.hash_algo, &output.hash] {
                e.bytes(text)?;
            }
        }
        e.store_paths(&self.input_sources)?;
        e.bytes(&self.platform)?;
        e.bytes(&self.builder)?;
        e.strings(&self.arguments)?;
        e.u64(self.environment.len() as u64)?;
        for (name, value) in &self.environment {
            e.bytes(name)?;
            e.bytes(value)?;
        }
        Ok(())
    }
}

// -- realisations

/// The key of a realisation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrvOutput {
    /// `sha256:<hex>!<output>`, up to Nix 2.34.
    Hash(String),
    /// With the feature `realisation-with-path-not-hash`.
    Path {
        /// The derivation.
        drv: StorePath,
        /// The output's name.
        output: String,
    },
}

impl DrvOutput {
    /// One text for both: `sha256:<hex>!<output>` or `<drv base name>!<output>`.
    pub fn id(&self) -> String {
        match self {
            Self::Hash(id) => id.clone(),
            Self::Path { drv, output } => format!("{drv}!{output}"),
        }
    }
    /// The output's name.
    pub fn output(&self) -> &str {
        match self {
            Self::Hash(id) => id
                .rsplit_once('!')
                .map_or(id.as_str(), |(_, output)| output),
            Self::Path { output, .. } => output,
        }
    }
    /// Reads one in the form of the protocol.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        if d.protocol().features.realisation_with_path {
            return Ok(Self::Path {
                drv: d.store_path()?,
                output: d.short()?,
            });
        }
        let id = d.short()?;
        if let Err(message) = check_legacy_id(&id) {
            d.reject(message);
        }
        Ok(Self::Hash(id))
    }
    /// Writes it; the kind must be the protocol's.
    ///
    /// # Errors
    /// The stream's, or the wrong kind.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        match (self, e.protocol().features.realisation_with_path) {
            (Self::Path { drv, output }, true) => {
                e.store_path(drv)?;
                e.bytes(output)
            }
            (Self::Hash(id), false) => e.bytes(id),
            _ => Err(wrong_kind()),
        }
    }
}

fn wrong_kind() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "the key of this realisation is not of the negotiated kind",
    )
}

fn check_legacy_id(id: &str) -> Result<(), String> {
    let Some((hash, output)) = id.split_once('!') else {
        return Err(format!("invalid derivation output id {id}"));
    };
    if output.is_empty() {
        return Err(format!("invalid derivation output id {id}"));
    }
    Hash::parse(hash, None)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// A realisation as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireRealisation {
    /// The key.
    pub id: DrvOutput,
    /// The output's path.
    pub out_path: StorePath,
    /// Signatures, verbatim.
    pub signatures: BTreeSet<String>,
}

impl WireRealisation {
    /// Reads key and value: JSON, or binary with the feature.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        if d.protocol().features.realisation_with_path {
            let id = DrvOutput::read(d)?;
            return Self::read_unkeyed(d, id);
        }
        let json = d.text(SETTING_BYTES_MAX)?;
        match legacy_realisation_from_json(&json) {
            Ok(realisation) => Ok(realisation),
            Err(message) => {
                d.reject(message);
                let path = StorePath::from_base_name("00000000000000000000000000000000-invalid");
                Ok(Self {
                    id: DrvOutput::Hash(String::new()),
                    out_path: path.expect("a constant store path"),
                    signatures: BTreeSet::new(),
                })
            }
        }
    }
    /// Reads the value (feature form).
    ///
    /// # Errors
    /// The stream's.
    pub fn read_unkeyed<R: BufRead>(d: &mut Decoder<R>, id: DrvOutput) -> Result<Self, WireError> {
        Ok(Self {
            id,
            out_path: d.store_path()?,
            signatures: d.list(Decoder::short)?.into_iter().collect(),
        })
    }
    /// Writes key and value.
    ///
    /// # Errors
    /// The stream's, or a key of the wrong kind.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        if e.protocol().features.realisation_with_path {
            self.id.write(e)?;
            return self.write_unkeyed(e);
        }
        let json = legacy_realisation_json(self)?;
        e.bytes(json)
    }
    /// Writes the value (feature form).
    ///
    /// # Errors
    /// The stream's.
    pub fn write_unkeyed<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.store_path(&self.out_path)?;
        e.strings(&self.signatures)
    }
}

/// The JSON of Nix up to 2.34; keys sorted as Nix sorts them.
///
/// # Errors
/// The key is of the other kind.
pub fn legacy_realisation_json(realisation: &WireRealisation) -> io::Result<String> {
    let DrvOutput::Hash(id) = &realisation.id else {
        return Err(wrong_kind());
    };
    Ok(serde_json::json!({
        "dependentRealisations": {},
        "id": id,
        "outPath": realisation.out_path.base_name(),
        "signatures": realisation.signatures,
    })
    .to_string())
}

/// Reads that JSON; dependent realisations are accepted and dropped.
///
/// # Errors
/// A text for the user.
pub fn legacy_realisation_from_json(json: &str) -> Result<WireRealisation, String> {
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|error| format!("invalid realisation: {error}"))?;
    let text = |key: &str| {
        value
            .get(key)
            .and_then(|v| v.as_str())
            .ok_or_else(|| format!("invalid realisation: no text '{key}'"))
    };
    let id = text("id")?;
    check_legacy_id(id)?;
    let out_path = StorePath::from_base_name(text("outPath")?).map_err(|error| {
        format!(
            "invalid realisation: path '{}' {}",
            error.path, error.reason
        )
    })?;
    let mut signatures = BTreeSet::new();
    if let Some(list) = value.get("signatures").and_then(|v| v.as_array()) {
        for signature in list {
            let signature = signature
                .as_str()
                .ok_or("invalid realisation: a signature is not a text")?;
            signatures.insert(signature.to_owned());
        }
    }
    Ok(WireRealisation {
        id: DrvOutput::Hash(id.to_owned()),
        out_path,
        signatures,
    })
}

// -- build results

/// How a build went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildResult {
    /// How it ended.
    pub status: BuildStatus,
    /// Why it failed.
    pub error_message: Vec<u8>,
    /// How often it was built.
    pub times_built: u32,
    /// True if it differed.
    pub non_deterministic: bool,
    /// Unix seconds.
    pub start_time: u64,
    /// Unix seconds.
    pub stop_time: u64,
    /// Microseconds of CPU time in user mode.
    pub cpu_user_us: Option<i64>,
    /// Microseconds of CPU time in the kernel.
    pub cpu_system_us: Option<i64>,
    /// Outputs of a success, by name.
    pub built_outputs: BTreeMap<String, WireRealisation>,
}

impl BuildResult {
    /// A result without times.
    pub fn new(status: BuildStatus, error_message: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            error_message: error_message.into(),
            times_built: 0,
            non_deterministic: false,
            start_time: 0,
            stop_time: 0,
            cpu_user_us: None,
            cpu_system_us: None,
            built_outputs: BTreeMap::new(),
        }
    }
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        let status = BuildStatus::read_or(d, BuildStatus::MiscFailure)?;
        let mut result = Self::new(status, d.bytes(STRING_BYTES_MAX)?);
        if d.protocol().since(29) {
            result.times_built = d.u32()?;
            result.non_deterministic = d.bool()?;
            result.start_time = d.time()?;
            result.stop_time = d.time()?;
        }
        if d.protocol().since(37) {
            result.cpu_user_us = read_opt_microseconds(d)?;
            result.cpu_system_us = read_opt_microseconds(d)?;
        }
        if d.protocol().features.realisation_with_path {
            let outputs = d.list(|d| {
                let output = d.short()?;
                // The key's derivation is the one that was asked for; the reply does not repeat it.
                let id = DrvOutput::Hash(output.clone());
                Ok((output, WireRealisation::read_unkeyed(d, id)?))
            })?;
            result.built_outputs = outputs.into_iter().collect();
        } else if d.protocol().since(28) {
            let outputs = d.list(|d| {
                let id = d.short()?;
                let realisation = WireRealisation::read(d)?;
                Ok((DrvOutput::Hash(id).output().to_owned(), realisation))
            })?;
            result.built_outputs = outputs.into_iter().collect();
        }
        Ok(result)
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's, or realisations with keys of the wrong kind.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.u64(self.status.to_wire())?;
        e.bytes(&self.error_message)?;
        if e.protocol().since(29) {
            e.u64(u64::from(self.times_built))?;
            e.bool(self.non_deterministic)?;
            e.u64(self.start_time)?;
            e.u64(self.stop_time)?;
        }
        if e.protocol().since(37) {
            write_opt_microseconds(e, self.cpu_user_us)?;
            write_opt_microseconds(e, self.cpu_system_us)?;
        }
        if e.protocol().features.realisation_with_path {
            e.u64(self.built_outputs.len() as u64)?;
            for (output, realisation) in &self.built_outputs {
                e.bytes(output)?;
                realisation.write_unkeyed(e)?;
            }
        } else if e.protocol().since(28) {
            e.u64(self.built_outputs.len() as u64)?;
            for realisation in self.built_outputs.values() {
                e.bytes(realisation.id.id())?;
                realisation.write(e)?;
            }
        }
        Ok(())
    }
}

fn read_opt_microseconds<R: BufRead>(d: &mut Decoder<R>) -> Result<Option<i64>, WireError> {
    match d.u64()? {
        0 => Ok(None),
        1 => Ok(Some(d.u64()?.cast_signed())),
        tag => Err(WireError::Unexpected {
            what: "optional time",
            expected: "0 or 1",
            found: tag.to_string(),
        }),
    }
}

fn write_opt_microseconds<W: Write>(e: &mut Encoder<W>, time: Option<i64>) -> io::Result<()> {
    match time {
        None => e.u64(0),
        Some(time) => {
            e.u64(1)?;
            e.u64(time.cast_unsigned())
        }
    }
}

/// A build result with what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedBuildResult {
    /// What was asked for.
    pub path: DerivedPath,
    /// How it went.
    pub result: BuildResult,
}

impl KeyedBuildResult {
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(Self {
            path: DerivedPath::read(d)?,
            result: BuildResult::read(d)?,
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// As [`BuildResult::write`].
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        self.path.write(e)?;
        self.result.write(e)
    }
}

/// The reply to QueryMissing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MissingInfo {
    /// Derivations to build.
    pub will_build: BTreeSet<StorePath>,
    /// Paths to fetch.
    pub will_substitute: BTreeSet<StorePath>,
    /// Paths that nobody has.
    pub unknown: BTreeSet<StorePath>,
    /// Bytes to download.
    pub download_size: u64,
    /// Bytes after unpacking.
    pub nar_size: u64,
}

impl MissingInfo {
    /// Reads one.
    ///
    /// # Errors
    /// The stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(Self {
            will_build: d.store_path_set()?,
            will_substitute: d.store_path_set()?,
            unknown: d.store_path_set()?,
            download_size: d.u64()?,
            nar_size: d.u64()?,
        })
    }
    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        e.store_paths(&self.will_build)?;
        e.store_paths(&self.will_substitute)?;
        e.store_paths(&self.unknown)?;
        e.u64(self.download_size)?;
        e.u64(self.nar_size)
    }
}
