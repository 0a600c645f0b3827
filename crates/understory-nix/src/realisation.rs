//! Realisations: which path an output of a content-addressing derivation became.
//!
//! The JSON form of Nix up to 2.34: `{"dependentRealisations":{},"id":"sha256:<hex>!<output>",
//! "outPath":"<base name>","signatures":[…]}`, keys sorted, no white space. The text that
//! signatures cover is the same without `signatures`.

use crate::hash::{Hash, HashAlgorithm, HashError};
use crate::signature::{Signature, SignatureError};
use crate::store_path::{StorePath, StorePathError, StorePathName};
use crate::{PublicKeys, SecretKey};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// An output of a derivation, named by the derivation's hash modulo: `sha256:<hex>!<output>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DrvOutput {
    /// The hash modulo, always SHA-256.
    hash: Hash,
    /// The output's name.
    output_name: StorePathName,
}

impl DrvOutput {
    /// Makes an id of its parts.
    ///
    /// # Errors
    /// The hash is not SHA-256.
    pub fn new(hash: Hash, output_name: StorePathName) -> Result<Self, RealisationError> {
        if hash.algorithm() != HashAlgorithm::Sha256 {
            return Err(RealisationError::Malformed(format!(
                "expected a sha256 hash, found {}",
                hash.algorithm()
            )));
        }
        Ok(Self { hash, output_name })
    }

    /// Parses `<algo>:<hash>!<output>`.
    ///
    /// # Errors
    /// No `!`, not a SHA-256 hash, or an output name that cannot be one.
    pub fn parse(text: &str) -> Result<Self, RealisationError> {
        let (hash, output_name) = text.split_once('!').ok_or_else(|| {
            RealisationError::Malformed(format!(
                "invalid derivation output id '{text}': expected <hash>!<output>"
            ))
        })?;
        Self::new(Hash::parse(hash, None)?, StorePathName::new(output_name)?)
    }

    /// The derivation's hash modulo.
    pub fn hash(&self) -> &Hash {
        &self.hash
    }

    /// The output's name.
    pub fn output_name(&self) -> &str {
        self.output_name.as_str()
    }
}
impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}!{}",
            self.hash.algorithm(),
            self.hash.to_base16(),
            self.output_name
        )
    }
}

/// What an output became.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: DrvOutput,
    /// Its path.
    pub out_path: StorePath,
    /// Signatures over [`Realisation::fingerprint`].
    pub signatures: BTreeSet<Signature>,
    /// Realisations that it was made with. Nix 2.34 always writes none.
    pub dependent_realisations: BTreeMap<DrvOutput, StorePath>,
}

impl Realisation {
    /// Parses the JSON. Unknown keys are ignored; signatures may be texts or, as Nix 2.35 writes
    /// them, objects of `keyName` and `sig`.
    ///
    /// # Errors
    /// Not JSON, a missing key, or a value that cannot be what it should.
    pub fn parse(json: &str) -> Result<Self, RealisationError> {
        let value: Value = serde_json::from_str(json)?;
        let signatures = match value.get("signatures") {
            None | Some(Value::Null) => BTreeSet::new(),
            Some(Value::Array(items)) => items
                .iter()
                .map(parse_signature)
                .collect::<Result<_, _>>()?,
            Some(other) => return Err(unexpected("signatures", "a list", other)),
        };
        let dependent_realisations = match value.get("dependentRealisations") {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(Value::Object(items)) => items
                .iter()
                .map(|(id, path)| {
                    let path = path
                        .as_str()
                        .ok_or_else(|| unexpected("dependentRealisations", "texts", path))?;
                    Ok((DrvOutput::parse(id)?, StorePath::from_base_name(path)?))
                })
                .collect::<Result<_, RealisationError>>()?,
            Some(other) => return Err(unexpected("dependentRealisations", "an object", other)),
        };
        Ok(Self {
            id: DrvOutput::parse(text_of(&value, "id")?)?,
            out_path: StorePath::from_base_name(text_of(&value, "outPath")?)?,
            signatures,
            dependent_realisations,
        })
    }

    /// Prints the JSON.
    pub fn print(&self) -> String {
        let mut object = self.unsigned();
        object.insert(
            "signatures".into(),
            self.signatures
                .iter()
                .map(|s| Value::from(s.as_str()))
                .collect(),
        );
        Value::Object(object).to_string()
    }

    /// Returns the text that signatures cover.
    pub fn fingerprint(&self) -> String {
        Value::Object(self.unsigned()).to_string()
    }

    /// True if a key of `keys` made one of the signatures.
    pub fn is_signed_by(&self, keys: &PublicKeys) -> bool {
        if keys.is_empty() || self.signatures.is_empty() {
            return false;
        }
        let fingerprint = self.fingerprint();
        self.signatures
            .iter()
            .any(|signature| keys.verify(fingerprint.as_bytes(), signature))
    }

    /// Adds a signature made with `key`.
    pub fn sign(&mut self, key: &SecretKey) {
        let signature = key.sign(self.fingerprint().as_bytes());
        self.signatures.insert(signature);
    }

    /// The object without signatures. Keys are inserted in the order of their bytes, because
    /// signatures depend on it.
    fn unsigned(&self) -> Map<String, Value> {
        let dependent = self.dependent_realisations.iter();
        let dependent: BTreeMap<_, _> = dependent
            .map(|(id, path)| (id.to_string(), path.base_name()))
            .collect();
        let dependent = dependent
            .into_iter()
            .map(|(id, path)| (id, Value::from(path)))
            .collect();
        let mut object = Map::new();
        object.insert("dependentRealisations".into(), Value::Object(dependent));
        object.insert("id".into(), self.id.to_string().into());
        object.insert("outPath".into(), self.out_path.base_name().into());
        object
    }
}

/// Why a realisation or an output's id cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RealisationError {
    /// Not JSON.
    #[error("invalid realisation: it is not JSON")]
    Json(#[from] serde_json::Error),
    /// JSON of another form, or an id that is none.
    #[error("{0}")]
    Malformed(String),
    /// A hash that is none.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// A path or name that is none.
    #[error(transparent)]
    Path(#[from] StorePathError),
    /// A signature that is none.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

fn text_of<'a>(value: &'a Value, key: &str) -> Result<&'a str, RealisationError> {
    match value.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(unexpected(key, "a text", other)),
        None => Err(RealisationError::Malformed(format!(
            "invalid realisation: '{key}' is missing"
        ))),
    }
}

fn parse_signature(value: &Value) -> Result<Signature, RealisationError> {
    match value {
        Value::String(text) => Ok(Signature::parse(text)?),
        Value::Object(_) => Ok(Signature::parse(&format!(
            "{}:{}",
            text_of(value, "keyName")?,
            text_of(value, "sig")?
        ))?),
        other => Err(unexpected("signatures", "texts", other)),
    }
}

fn unexpected(key: &str, expected: &str, found: &Value) -> RealisationError {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    RealisationError::Malformed(format!(
        "invalid realisation: '{key}': expected {expected}, found {found}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855!out";
    const PATH: &str = "00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools";

    fn realisation() -> Realisation {
        Realisation {
            id: DrvOutput::parse(ID).unwrap(),
            out_path: StorePath::from_base_name(PATH).unwrap(),
            signatures: BTreeSet::new(),
            dependent_realisations: BTreeMap::new(),
        }
    }

    #[test]
    fn json_is_compact_and_sorted() {
        let mut realisation = realisation();
        let unsigned =
            format!("{{\"dependentRealisations\":{{}},\"id\":\"{ID}\",\"outPath\":\"{PATH}\"");
        assert_eq!(realisation.fingerprint(), format!("{unsigned}}}"));
        assert_eq!(
            realisation.print(),
            format!("{unsigned},\"signatures\":[]}}")
        );
        let key = SecretKey::generate("k").unwrap();
        realisation.sign(&key);
        assert!(realisation.is_signed_by(&PublicKeys::from_iter([key.public()])));
        assert_eq!(
            Realisation::parse(&realisation.print()).unwrap(),
            realisation
        );
    }

    #[test]
    fn other_spellings() {
        let json = format!("{{\"outPath\":\"{PATH}\",\"id\":\"{ID}\",\"new\":1}}");
        assert_eq!(Realisation::parse(&json).unwrap(), realisation());
        let key = SecretKey::generate("k").unwrap().sign(b"");
        let sig = &key.as_str()[2..];
        let json = format!(
            "{{\"outPath\":\"{PATH}\",\"id\":\"{ID}\",\"signatures\":[{{\"keyName\":\"k\",\"sig\":\"{sig}\"}}]}}"
        );
        assert_eq!(
            Realisation::parse(&json).unwrap().signatures,
            BTreeSet::from([key])
        );
    }

    #[test]
    fn refuses() {
        for (json, expected) in [
            (
                "x".to_owned(),
                "invalid realisation: it is not JSON".to_owned(),
            ),
            (
                "{}".to_owned(),
                "invalid realisation: 'id' is missing".to_owned(),
            ),
            (
                "{\"id\":1}".to_owned(),
                "invalid realisation: 'id': expected a text, found a number".to_owned(),
            ),
            (
                "{\"id\":\"x\"}".to_owned(),
                "invalid derivation output id 'x': expected <hash>!<output>".to_owned(),
            ),
            (
                format!("{{\"id\":\"{ID}\",\"outPath\":\"x\"}}"),
                "path 'x' is too short to be a valid store path".to_owned(),
            ),
        ] {
            assert_eq!(Realisation::parse(&json).unwrap_err().to_string(), expected);
        }
        let sha1 = format!("{}!out", Hash::of(HashAlgorithm::Sha1, b""));
        assert_eq!(
            DrvOutput::parse(&sha1).unwrap_err().to_string(),
            "expected a sha256 hash, found sha1"
        );
    }

    proptest! {
        #[test]
        fn round_trip(digest: [u8; 32], output in "[a-z]{1,9}", dependent in proptest::collection::btree_set("[a-z]{1,9}", 0..4)) {
            let hash = Hash::new(HashAlgorithm::Sha256, &digest).unwrap();
            let id = |name: &str| DrvOutput::new(hash, StorePathName::new(name).unwrap()).unwrap();
            let mut realisation = Realisation { id: id(&output), ..realisation() };
            realisation.dependent_realisations =
                dependent.iter().map(|name| (id(name), realisation.out_path.clone())).collect();
            realisation.sign(&SecretKey::generate("k").unwrap());
            prop_assert_eq!(Realisation::parse(&realisation.print()).unwrap(), realisation);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = Realisation::parse(&text);
            let _ = DrvOutput::parse(&text);
        }
    }
}
