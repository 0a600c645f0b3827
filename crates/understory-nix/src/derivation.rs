//! Derivations: what a `.drv` file says and which paths its outputs get.
//!
//! The file's form is in `aterm`, hashes and output paths are in `modulo`. Builder, arguments and
//! environment are raw bytes; names and paths are checked. Checked against
//! `nix-instantiate` and `nix derivation show` of Nix 2.34.8 and 2.26.3.

mod aterm;
mod modulo;

pub use modulo::{DerivationHashes, HashModulo};

use crate::content_address::{
    ContentAddress, ContentAddressError, ContentAddressMethod, References,
};
use crate::hash::{Hash, HashAlgorithm};
use crate::store_path::{StoreDir, StorePath, StorePathError, StorePathName};
use std::collections::{BTreeMap, BTreeSet};

/// Longest `.drv` accepted, in bytes: far above the largest of nixpkgs (a few MiB).
pub const DRV_BYTES_MAX: usize = 64 << 20;
/// Deepest nesting of dynamic inputs; each level is one derivation made by a derivation.
pub const DYNAMIC_DEPTH_MAX: usize = 64;
/// What stands in place of a hash for an impure output.
const IMPURE: &str = "impure";

/// A derivation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    /// Its name: that of its store path without `.drv`.
    pub name: StorePathName,
    /// Its outputs by name.
    pub outputs: BTreeMap<String, DerivationOutput>,
    /// Derivations that must be built first.
    pub input_derivations: BTreeMap<StorePath, InputOutputs>,
    /// Store paths that are needed as they are.
    pub input_sources: BTreeSet<StorePath>,
    /// The system it is built on.
    pub platform: Vec<u8>,
    /// The builder's path.
    pub builder: Vec<u8>,
    /// The builder's arguments.
    pub args: Vec<Vec<u8>>,
    /// The builder's environment.
    pub env: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What is needed of an input derivation.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct InputOutputs {
    /// Names of outputs.
    pub outputs: BTreeSet<String>,
    /// Outputs that are derivations themselves, and what is needed of those.
    pub dynamic: BTreeMap<String, InputOutputs>,
}

/// How an output gets its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DerivationOutput {
    /// The path follows from the derivation.
    InputAddressed(StorePath),
    /// The contents are known beforehand.
    Fixed(ContentAddress),
    /// The path follows from the contents, once they are built.
    Floating {
        /// How the contents are serialised.
        method: ContentAddressMethod,
        /// How they are hashed.
        algorithm: HashAlgorithm,
    },
    /// Input-addressed, but inputs must be built before the path is known.
    Deferred,
    /// Built anew each time.
    Impure {
        /// How the contents are serialised.
        method: ContentAddressMethod,
        /// How they are hashed.
        algorithm: HashAlgorithm,
    },
}

/// What all outputs of a derivation have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DerivationKind {
    /// Input-addressed or deferred.
    InputAddressed,
    /// One output with known contents.
    Fixed,
    /// Content-addressed outputs.
    Floating,
    /// Impure outputs.
    Impure,
}

impl Derivation {
    /// Parses a `.drv` file; `name` is that of its store path without `.drv`.
    ///
    /// # Errors
    /// Says at which byte what was expected.
    pub fn parse(
        dir: &StoreDir,
        name: &StorePathName,
        text: &[u8],
    ) -> Result<Self, DerivationError> {
        aterm::parse(dir, name, text)
    }

    /// Prints the `.drv` file.
    ///
    /// # Errors
    /// A fixed output whose name makes no store path.
    pub fn print(&self, dir: &StoreDir) -> Result<Vec<u8>, DerivationError> {
        aterm::print(self, dir, false, None)
    }

    /// Returns the references of the `.drv` file: sources and input derivations.
    pub fn references(&self) -> BTreeSet<StorePath> {
        self.input_sources
            .iter()
            .chain(self.input_derivations.keys())
            .cloned()
            .collect()
    }

    /// Returns the store path of the `.drv` file.
    ///
    /// # Errors
    /// As [`Derivation::print`].
    pub fn make_path(&self, dir: &StoreDir) -> Result<StorePath, DerivationError> {
        let hash = Hash::of(HashAlgorithm::Sha256, &self.print(dir)?);
        let address = ContentAddress {
            method: ContentAddressMethod::Text,
            hash,
        };
        let name = StorePathName::new(&format!("{}.drv", self.name))?;
        Ok(address.make_path(
            dir,
            &name,
            &References {
                others: self.references(),
                itself: false,
            },
        )?)
    }

    /// Returns what the outputs have in common.
    ///
    /// # Errors
    /// No outputs, or outputs that do not go together.
    pub fn kind(&self) -> Result<DerivationKind, DerivationError> {
        let invalid =
            |reason: &str| DerivationError::Invalid(format!("derivation '{}' {reason}", self.name));
        let mut outputs = self.outputs.values();
        let first = outputs
            .next()
            .ok_or_else(|| invalid("must have at least one output"))?;
        let kind = first.kind();
        for output in outputs {
            if output.kind() != kind {
                return Err(invalid("mixes types of outputs"));
            }
            if output.algorithm() != first.algorithm() {
                return Err(invalid("has outputs with different hash algorithms"));
            }
        }
        if kind == DerivationKind::Fixed {
            if self.outputs.len() > 1 {
                return Err(invalid("has more than one fixed output"));
            }
            if !self.outputs.contains_key("out") {
                return Err(invalid("has a fixed output that is not named 'out'"));
            }
        }
        Ok(kind)
    }

    /// Returns the paths of all outputs as far as the derivation itself says them: none for
    /// floating, deferred and impure outputs.
    ///
    /// # Errors
    /// A fixed output whose name makes no store path.
    pub fn static_output_paths(
        &self,
        dir: &StoreDir,
    ) -> Result<BTreeMap<String, Option<StorePath>>, DerivationError> {
        let paths = self.outputs.iter();
        paths
            .map(|(name, output)| Ok((name.clone(), output.path(dir, &self.name, name)?)))
            .collect()
    }
}

impl DerivationOutput {
    /// Parses the three texts of an output: path, `[r:|git:|text:]algorithm`, hash.
    ///
    /// # Errors
    /// A text that cannot be what it should, or a path where there must be none.
    pub fn parse(
        dir: &StoreDir,
        path: &str,
        hash_algorithm: &str,
        hash: &str,
    ) -> Result<Self, DerivationError> {
        let invalid = |reason: String| DerivationError::Invalid(reason);
        if hash_algorithm.is_empty() {
            if !hash.is_empty() {
                return Err(invalid(format!(
                    "derivation output has a hash '{hash}' without an algorithm"
                )));
            }
            return match path {
                "" => Ok(Self::Deferred),
                path => Ok(Self::InputAddressed(dir.parse(path.as_bytes())?)),
            };
        }
        let (method, name) = ContentAddressMethod::split_output_prefix(hash_algorithm);
        let algorithm = HashAlgorithm::from_name(name)
            .ok_or_else(|| invalid(format!("unknown hash algorithm '{name}'")))?;
        ContentAddress {
            method,
            hash: Hash::of(algorithm, b""),
        }
        .check_algorithm()?;
        if matches!(hash, "" | IMPURE) && !path.is_empty() {
            return Err(invalid(format!(
                "content-addressing derivation output must not have a path, has '{path}'"
            )));
        }
        match hash {
            "" => Ok(Self::Floating { method, algorithm }),
            IMPURE => Ok(Self::Impure { method, algorithm }),
            hash => {
                // Nix looks at it no closer: the path follows from the hash.
                if !path.starts_with('/') {
                    return Err(invalid(format!("bad path '{path}' in derivation")));
                }
                let hash =
                    Hash::parse_unprefixed(hash, algorithm).map_err(ContentAddressError::from)?;
                Ok(Self::Fixed(ContentAddress { method, hash }))
            }
        }
    }

    /// Prints the three texts.
    ///
    /// # Errors
    /// A fixed output whose name makes no store path.
    pub fn print(
        &self,
        dir: &StoreDir,
        derivation_name: &StorePathName,
        output_name: &str,
    ) -> Result<(String, String, String), DerivationError> {
        let path = self
            .path(dir, derivation_name, output_name)?
            .map(|path| dir.print(&path))
            .unwrap_or_default();
        let algorithm = |method: &ContentAddressMethod, algorithm: HashAlgorithm| {
            format!("{}{algorithm}", method.output_prefix())
        };
        Ok(match self {
            Self::InputAddressed(_) | Self::Deferred => (path, String::new(), String::new()),
            Self::Fixed(ca) => (
                path,
                algorithm(&ca.method, ca.hash.algorithm()),
                ca.hash.to_base16(),
            ),
            Self::Floating {
                method,
                algorithm: name,
            } => (path, algorithm(method, *name), String::new()),
            Self::Impure {
                method,
                algorithm: name,
            } => (path, algorithm(method, *name), IMPURE.to_owned()),
        })
    }

    /// Returns the path, if the output says it.
    ///
    /// # Errors
    /// A fixed output whose name makes no store path.
    pub fn path(
        &self,
        dir: &StoreDir,
        derivation_name: &StorePathName,
        output_name: &str,
    ) -> Result<Option<StorePath>, DerivationError> {
        match self {
            Self::InputAddressed(path) => Ok(Some(path.clone())),
            Self::Fixed(ca) => {
                let name = output_path_name(derivation_name, output_name)?;
                Ok(Some(ca.make_path(dir, &name, &References::default())?))
            }
            Self::Floating { .. } | Self::Deferred | Self::Impure { .. } => Ok(None),
        }
    }

    const fn kind(&self) -> DerivationKind {
        match self {
            Self::InputAddressed(_) | Self::Deferred => DerivationKind::InputAddressed,
            Self::Fixed(_) => DerivationKind::Fixed,
            Self::Floating { .. } => DerivationKind::Floating,
            Self::Impure { .. } => DerivationKind::Impure,
        }
    }

    const fn algorithm(&self) -> Option<HashAlgorithm> {
        match self {
            Self::InputAddressed(_) | Self::Deferred => None,
            Self::Fixed(ca) => Some(ca.hash.algorithm()),
            Self::Floating { algorithm, .. } | Self::Impure { algorithm, .. } => Some(*algorithm),
        }
    }
}

/// Returns the name of an output's store path: `<name>` for `out`, else `<name>-<output>`.
///
/// # Errors
/// The two make no store path name.
pub fn output_path_name(
    derivation_name: &StorePathName,
    output_name: &str,
) -> Result<StorePathName, StorePathError> {
    match output_name {
        "out" => Ok(derivation_name.clone()),
        other => StorePathName::new(&format!("{derivation_name}-{other}")),
    }
}

/// Why a derivation cannot be read or hashed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DerivationError {
    /// The text breaks the form.
    #[error("error parsing derivation '{name}': {reason} at byte {offset}")]
    Syntax {
        /// The derivation's name.
        name: String,
        /// Byte of the text.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// The form is right, what it says is not.
    #[error("{0}")]
    Invalid(String),
    /// A path or name that is none.
    #[error(transparent)]
    Path(#[from] StorePathError),
    /// A content address that is none or makes no path.
    #[error(transparent)]
    ContentAddress(#[from] ContentAddressError),
    /// An input derivation cannot be loaded.
    #[error("loading input derivation '{path}': {reason}")]
    Input {
        /// The derivation.
        path: StorePath,
        /// What the loader said.
        reason: String,
    },
}

#[cfg(test)]
mod tests;
