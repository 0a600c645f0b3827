//! Content addresses and the store paths they make.
//!
//! A store path's digest is `compress20(sha256("<type>:sha256:<inner hex>:<store dir>:<name>"))`;
//! what type and inner hash are depends on the method. Checked against `nix store add` of
//! Nix 2.34.8 and 2.26.3.

mod git;

pub use git::{GitEntry, GitMode, git_blob_hasher, git_hash_of_nar, git_tree_hash};

use crate::hash::{Hash, HashAlgorithm, HashError};
use crate::store_path::{StoreDir, StorePath, StorePathError, StorePathHash, StorePathName};
use std::collections::BTreeSet;
use std::fmt;

/// How the content was serialised before it was hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ContentAddressMethod {
    /// A file's bytes, as text; references allowed, SHA-256 only.
    Text,
    /// A file's bytes; no references.
    Flat,
    /// The NAR; references and self-references with SHA-256.
    Nar,
    /// Git's tree hash; no references.
    Git,
}

impl ContentAddressMethod {
    /// Returns what stands before the algorithm in a content address.
    const fn prefix(self) -> &'static str {
        match self {
            Self::Text => "text:",
            Self::Flat => "fixed:",
            Self::Nar => "fixed:r:",
            Self::Git => "fixed:git:",
        }
    }

    /// Returns what stands before the algorithm in a derivation output and in the inner
    /// fingerprint of fixed outputs.
    pub(crate) const fn output_prefix(self) -> &'static str {
        match self {
            Self::Text => "text:",
            Self::Flat => "",
            Self::Nar => "r:",
            Self::Git => "git:",
        }
    }

    /// Splits the prefix of a derivation output's `hashAlgo` off.
    pub(crate) fn split_output_prefix(text: &str) -> (Self, &str) {
        for method in [Self::Text, Self::Nar, Self::Git] {
            if let Some(rest) = text.strip_prefix(method.output_prefix()) {
                return (method, rest);
            }
        }
        (Self::Flat, text)
    }
}

/// A content address: `text:sha256:…`, `fixed:…`, `fixed:r:…`, `fixed:git:…` (displayed with nix32).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentAddress {
    /// The method.
    pub method: ContentAddressMethod,
    /// The hash of the serialisation (modulo self-references for `Nar`).
    pub hash: Hash,
}

impl ContentAddress {
    /// Parses the text form; any hash encoding. The empty text is not a content address:
    /// where Nix writes it for "none", use [`ContentAddress::parse_optional`].
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(text: &str) -> Result<Self, ContentAddressError> {
        let (method, algorithm, digest) = split(text, true)?;
        let hash = Hash::parse_unprefixed(digest, algorithm)
            .map_err(|error| parse_error(text, error.to_string()))?;
        let address = Self { method, hash };
        address
            .check_algorithm()
            .map_err(|error| parse_error(text, error.to_string()))?;
        Ok(address)
    }

    /// Parses the text form, where the empty text means that there is none.
    ///
    /// # Errors
    /// As [`ContentAddress::parse`].
    pub fn parse_optional(text: &str) -> Result<Option<Self>, ContentAddressError> {
        if text.is_empty() {
            Ok(None)
        } else {
            Self::parse(text).map(Some)
        }
    }

    /// Makes the store path of this content address.
    ///
    /// # Errors
    /// The method does not allow the references, or text is not SHA-256.
    pub fn make_path(
        &self,
        dir: &StoreDir,
        name: &StorePathName,
        references: &References,
    ) -> Result<StorePath, ContentAddressError> {
        self.check_algorithm()?;
        let is_source = self.method == ContentAddressMethod::Nar
            && self.hash.algorithm() == HashAlgorithm::Sha256;
        if is_source {
            return Ok(make_store_path(
                dir,
                &type_with_references(dir, "source", references),
                &self.hash,
                name,
            ));
        }
        if self.method == ContentAddressMethod::Text {
            if references.itself {
                return Err(ContentAddressError::Unsupported(format!(
                    "text path '{name}' must not refer to itself"
                )));
            }
            return Ok(make_store_path(
                dir,
                &type_with_references(dir, "text", references),
                &self.hash,
                name,
            ));
        }
        if references.itself || !references.others.is_empty() {
            return Err(ContentAddressError::Unsupported(format!(
                "path '{name}' with content address '{self}' must not have references, has {}",
                references.others.len() + usize::from(references.itself)
            )));
        }
        let inner = format!(
            "fixed:out:{}{}:{}:",
            self.method.output_prefix(),
            self.hash.algorithm(),
            self.hash.to_base16()
        );
        Ok(make_store_path(
            dir,
            "output:out",
            &Hash::of(HashAlgorithm::Sha256, inner.as_bytes()),
            name,
        ))
    }

    pub(crate) fn check_algorithm(&self) -> Result<(), ContentAddressError> {
        check_algorithm(self.method, self.hash.algorithm())
    }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.method.prefix(), self.hash)
    }
}

/// Makes a store path of any type: `compress20(sha256("<type>:<inner>:<store dir>:<name>"))`.
///
/// `inner` is printed as `sha256:<hex>`; `kind` holds the references, if the type has any.
pub fn make_store_path(
    dir: &StoreDir,
    kind: &str,
    inner: &Hash,
    name: &StorePathName,
) -> StorePath {
    let fingerprint = format!(
        "{kind}:{}:{}:{dir}:{name}",
        inner.algorithm(),
        inner.to_base16()
    );
    let digest = Hash::of(HashAlgorithm::Sha256, fingerprint.as_bytes());
    StorePath::from_parts(StorePathHash(compress(digest.digest())), name)
}

/// Folds a hash to 20 bytes: byte `i` is xor-ed into position `i mod 20`.
pub(crate) fn compress(digest: &[u8]) -> [u8; 20] {
    let mut out = [0; 20];
    for (index, byte) in digest.iter().enumerate() {
        out[index % 20] ^= byte;
    }
    out
}

/// Parses `text:sha256`, `fixed:sha256`, `fixed:r:sha256`, `fixed:git:sha1` (worker operation 7).
///
/// # Errors
/// Says what is wrong.
pub fn parse_method(
    text: &str,
) -> Result<(ContentAddressMethod, HashAlgorithm), ContentAddressError> {
    let (method, algorithm, _) = split(text, false)?;
    check_algorithm(method, algorithm).map_err(|error| parse_error(text, error.to_string()))?;
    Ok((method, algorithm))
}

/// Prints what [`parse_method`] parses.
pub fn print_method(method: ContentAddressMethod, algorithm: HashAlgorithm) -> String {
    format!("{}{algorithm}", method.prefix())
}

/// References of a content-addressed object: others, and whether it refers to itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Other store paths.
    pub others: BTreeSet<StorePath>,
    /// True if the object contains its own hash part.
    pub itself: bool,
}

impl References {
    /// Splits the references of `path`, which may hold itself.
    pub fn of(path: &StorePath, references: &BTreeSet<StorePath>) -> Self {
        let mut others = references.clone();
        let itself = others.remove(path);
        Self { others, itself }
    }
}

/// Why a content address is not valid or cannot make a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContentAddressError {
    /// The text cannot be parsed.
    #[error("invalid content address {text:?}: {reason}")]
    Parse {
        /// The text.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// References where the method has none, or a wrong algorithm.
    #[error("{0}")]
    Unsupported(String),
    /// The hash cannot be parsed.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// The name is not a store path name.
    #[error(transparent)]
    Path(#[from] StorePathError),
}

fn parse_error(text: &str, reason: impl Into<String>) -> ContentAddressError {
    ContentAddressError::Parse {
        text: text.to_owned(),
        reason: reason.into(),
    }
}

/// Splits into method, algorithm and, if `has_digest`, the digest's text.
fn split(
    text: &str,
    has_digest: bool,
) -> Result<(ContentAddressMethod, HashAlgorithm, &str), ContentAddressError> {
    use ContentAddressMethod::{Flat, Git, Nar, Text};
    // The longer prefixes first: `fixed:` begins them all.
    let (method, rest) = [Text, Nar, Git, Flat]
        .into_iter()
        .find_map(|method| Some((method, text.strip_prefix(method.prefix())?)))
        .ok_or_else(|| parse_error(text, "expected it to begin with 'text:' or 'fixed:'"))?;
    let (name, digest) = match (has_digest, rest.split_once(':')) {
        (true, Some((name, digest))) => (name, digest),
        (true, None) => {
            return Err(parse_error(
                text,
                "expected <algorithm>:<digest> after the method",
            ));
        }
        (false, _) => (rest, ""),
    };
    let algorithm = HashAlgorithm::from_name(name)
        .ok_or_else(|| parse_error(text, format!("unknown hash algorithm {name:?}")))?;
    Ok((method, algorithm, digest))
}

fn check_algorithm(
    method: ContentAddressMethod,
    algorithm: HashAlgorithm,
) -> Result<(), ContentAddressError> {
    let allowed: &[HashAlgorithm] = match method {
        ContentAddressMethod::Text => &[HashAlgorithm::Sha256],
        ContentAddressMethod::Git => &[HashAlgorithm::Sha1, HashAlgorithm::Sha256],
        ContentAddressMethod::Flat | ContentAddressMethod::Nar => return Ok(()),
    };
    if allowed.contains(&algorithm) {
        return Ok(());
    }
    let method = if method == ContentAddressMethod::Text {
        "text"
    } else {
        "git"
    };
    let allowed = allowed
        .iter()
        .map(|algorithm| algorithm.name())
        .collect::<Vec<_>>()
        .join(" or ");
    Err(ContentAddressError::Unsupported(format!(
        "method {method} needs {allowed}, found {algorithm}"
    )))
}

/// `<kind>:<ref>…[:self]`, references sorted.
fn type_with_references(dir: &StoreDir, kind: &str, references: &References) -> String {
    let mut text = kind.to_owned();
    for reference in &references.others {
        text.push(':');
        text.push_str(&dir.print(reference));
    }
    if references.itself {
        text.push_str(":self");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EMPTY: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    #[test]
    fn empty_is_none() {
        assert_eq!(ContentAddress::parse_optional("").unwrap(), None);
        assert_eq!(
            ContentAddress::parse("").unwrap_err().to_string(),
            "invalid content address \"\": expected it to begin with 'text:' or 'fixed:'"
        );
    }

    #[test]
    fn text_round_trips() {
        for text in [
            format!("text:sha256:{EMPTY}"),
            format!("fixed:sha256:{EMPTY}"),
            format!("fixed:r:sha256:{EMPTY}"),
            format!("fixed:git:sha256:{EMPTY}"),
        ] {
            assert_eq!(ContentAddress::parse(&text).unwrap().to_string(), text);
        }
        for text in [
            "text:sha256",
            "fixed:md5",
            "fixed:r:sha512",
            "fixed:git:sha1",
        ] {
            let (method, algorithm) = parse_method(text).unwrap();
            assert_eq!(print_method(method, algorithm), text);
        }
    }

    #[test]
    fn refuses() {
        for (text, reason) in [
            (
                "text:sha1:x".to_owned(),
                "invalid hash \"x\": expected 40, 32 or 28 characters (base16, nix32, base64) for sha1, found 1",
            ),
            (
                format!("text:blake3:{EMPTY}"),
                "method text needs sha256, found blake3",
            ),
            (
                format!("fixed:git:blake3:{EMPTY}"),
                "method git needs sha1 or sha256, found blake3",
            ),
            (
                "fixed:r:".to_owned(),
                "expected <algorithm>:<digest> after the method",
            ),
            ("fixed:x:y".to_owned(), "unknown hash algorithm \"x\""),
        ] {
            let expected = format!("invalid content address {text:?}: {reason}");
            assert_eq!(
                ContentAddress::parse(&text).unwrap_err().to_string(),
                expected
            );
        }
        let flat = ContentAddress::parse(&format!("fixed:sha256:{EMPTY}")).unwrap();
        let name = StorePathName::new("x").unwrap();
        let references = References {
            itself: true,
            ..References::default()
        };
        assert_eq!(
            flat.make_path(&StoreDir::default(), &name, &references)
                .unwrap_err()
                .to_string(),
            format!(
                "path 'x' with content address 'fixed:sha256:{EMPTY}' must not have references, has 1"
            )
        );
    }

    proptest! {
        #[test]
        fn round_trip(method in 0..4_usize, digest: [u8; 32]) {
            use ContentAddressMethod::{Flat, Git, Nar, Text};
            let hash = Hash::new(HashAlgorithm::Sha256, &digest).unwrap();
            let address = ContentAddress { method: [Text, Flat, Nar, Git][method], hash };
            prop_assert_eq!(ContentAddress::parse(&address.to_string()).unwrap(), address);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = ContentAddress::parse(&text);
            let _ = ContentAddress::parse(&format!("fixed:r:{text}"));
            let _ = parse_method(&text);
        }
    }
}
