//! Ed25519 signatures as Nix writes them: `keyname:base64`.
//!
//! Checked against `nix key generate-secret` and `nix store sign` of Nix 2.34.8 and 2.26.3.

use data_encoding::BASE64;
use ed25519_dalek::Signer as _;
use std::collections::BTreeMap;
use std::fmt;

/// Longest key name accepted, in bytes. Nix has no limit; real names are host names with a number.
const KEY_NAME_BYTES_MAX: usize = 1024;

/// A signature: `keyname:base64(64 bytes)`. Kept verbatim, sorts as text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Signature(Box<str>);

impl Signature {
    /// Checks the form (name, colon, base64 of 64 bytes).
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        parse_named::<64>("signature", text)?;
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key's name.
    pub fn key_name(&self) -> &str {
        self.0.split_once(':').map_or("", |(name, _)| name)
    }
}
impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A public key: `name:base64(32 bytes)`, which is also how it displays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    /// The key's name.
    pub name: String,
    key: ed25519_dalek::VerifyingKey,
}
impl PublicKey {
    /// Parses the text form.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_named::<32>("public key", text)?;
        let key = ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| SignatureError {
            what: "public key",
            reason: "its bytes are not a point".to_owned(),
        })?;
        Ok(Self {
            name: name.to_owned(),
            key,
        })
    }

    /// True if this key made `signature` over `fingerprint`. Names are compared too.
    pub fn verify(&self, fingerprint: &[u8], signature: &Signature) -> bool {
        let Ok((name, bytes)) = parse_named::<64>("signature", &signature.0) else {
            return false;
        };
        name == self.name
            && self
                .key
                .verify_strict(fingerprint, &ed25519_dalek::Signature::from_bytes(&bytes))
                .is_ok()
    }
}
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(self.key.as_bytes()))
    }
}

/// Trusted public keys by name, parsed once. Of two keys with one name, the first counts, as in Nix.
#[derive(Debug, Clone, Default)]
pub struct PublicKeys(BTreeMap<String, PublicKey>);
impl PublicKeys {
    /// Parses white-space separated keys, as in nix.conf.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        text.split_whitespace().map(PublicKey::parse).collect()
    }

    /// True if a trusted key made `signature` over `fingerprint`.
    pub fn verify(&self, fingerprint: &[u8], signature: &Signature) -> bool {
        self.0
            .get(signature.key_name())
            .is_some_and(|key| key.verify(fingerprint, signature))
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys, by name.
    pub fn iter(&self) -> impl Iterator<Item = &PublicKey> {
        self.0.values()
    }
}
impl FromIterator<PublicKey> for PublicKeys {
    fn from_iter<I: IntoIterator<Item = PublicKey>>(keys: I) -> Self {
        let mut map = BTreeMap::new();
        for key in keys {
            map.entry(key.name.clone()).or_insert(key);
        }
        Self(map)
    }
}

/// A secret key: `name:base64(64 bytes: seed and public key)`. It does not print its secret by itself.
pub struct SecretKey {
    name: String,
    key: ed25519_dalek::SigningKey,
}
impl SecretKey {
    /// Parses the text form.
    ///
    /// # Errors
    /// Says what is wrong; never repeats the text.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_named::<64>("secret key", text.trim_end())?;
        let key =
            ed25519_dalek::SigningKey::from_keypair_bytes(&bytes).map_err(|_| SignatureError {
                what: "secret key",
                reason: "its public half does not belong to its seed".to_owned(),
            })?;
        Ok(Self {
            name: name.to_owned(),
            key,
        })
    }

    /// Makes a new key of the system's random numbers.
    ///
    /// # Errors
    /// The name cannot be one, or the system gives no random numbers.
    pub fn generate(name: &str) -> Result<Self, SignatureError> {
        check_name("secret key", name)?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| SignatureError {
            what: "secret key",
            reason: format!("no random numbers: {error}"),
        })?;
        Ok(Self {
            name: name.to_owned(),
            key: ed25519_dalek::SigningKey::from_bytes(&seed),
        })
    }

    /// Signs `fingerprint`.
    pub fn sign(&self, fingerprint: &[u8]) -> Signature {
        let bytes = self.key.sign(fingerprint).to_bytes();
        Signature(format!("{}:{}", self.name, BASE64.encode(&bytes)).into())
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey {
            name: self.name.clone(),
            key: self.key.verifying_key(),
        }
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text form, secret included.
    pub fn to_secret_text(&self) -> String {
        format!(
            "{}:{}",
            self.name,
            BASE64.encode(&self.key.to_keypair_bytes())
        )
    }
}
impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Why a key or signature is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what}: {reason}")]
pub struct SignatureError {
    /// `signature`, `public key` or `secret key`.
    pub what: &'static str,
    /// What is wrong.
    pub reason: String,
}

fn check_name(what: &'static str, name: &str) -> Result<(), SignatureError> {
    let error = |reason: String| Err(SignatureError { what, reason });
    if name.is_empty() {
        return error("the key name is empty".to_owned());
    }
    if name.len() > KEY_NAME_BYTES_MAX {
        return error(format!(
            "the key name has {} bytes, expected at most {KEY_NAME_BYTES_MAX}",
            name.len()
        ));
    }
    // Signatures are kept in lists separated by spaces, and in lines.
    if name.contains(|c: char| c == ':' || c.is_whitespace() || c.is_control()) {
        return error("the key name has a colon, white space or a control character".to_owned());
    }
    Ok(())
}

fn parse_named<'a, const N: usize>(
    what: &'static str,
    text: &'a str,
) -> Result<(&'a str, [u8; N]), SignatureError> {
    let error = |reason: String| SignatureError { what, reason };
    let (name, base64) = text
        .split_once(':')
        .ok_or_else(|| error("expected <name>:<base64>, found no colon".to_owned()))?;
    check_name(what, name)?;
    if base64.len() != BASE64.encode_len(N) {
        return Err(error(format!(
            "expected {} base64 characters, found {}",
            BASE64.encode_len(N),
            base64.len()
        )));
    }
    let bytes = BASE64
        .decode(base64.as_bytes())
        .map_err(|cause| error(format!("invalid base64: {cause}")))?;
    let found = bytes.len();
    let bytes = bytes
        .try_into()
        .map_err(|_| error(format!("expected {N} bytes, found {found}")))?;
    Ok((name, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn signs_and_verifies() {
        let key = SecretKey::generate("a-1").unwrap();
        let signature = key.sign(b"text");
        assert_eq!(signature.key_name(), "a-1");
        let keys = PublicKeys::parse(&format!("  {}\n", key.public())).unwrap();
        assert!(keys.verify(b"text", &signature));
        assert!(!keys.verify(b"test", &signature));
        assert!(Signature::parse(signature.as_str()).is_ok());
        let again = SecretKey::parse(&key.to_secret_text()).unwrap();
        assert_eq!(again.sign(b"text"), signature);
        assert_eq!(format!("{again:?}"), "SecretKey { name: \"a-1\", .. }");
        let stranger = SecretKey::generate("a-1").unwrap();
        assert!(!keys.verify(b"text", &stranger.sign(b"text")));
        let renamed = Signature::parse(&signature.as_str().replace("a-1", "b")).unwrap();
        assert!(!keys.verify(b"text", &renamed));
    }

    #[test]
    fn first_key_of_a_name_counts() {
        let (first, second) = (
            SecretKey::generate("a").unwrap(),
            SecretKey::generate("a").unwrap(),
        );
        let keys = PublicKeys::parse(&format!("{} {}", first.public(), second.public())).unwrap();
        assert!(keys.verify(b"x", &first.sign(b"x")));
        assert!(!keys.verify(b"x", &second.sign(b"x")));
    }

    #[test]
    fn refuses() {
        let message = |text: &str| Signature::parse(text).unwrap_err().to_string();
        assert_eq!(
            message("x"),
            "invalid signature: expected <name>:<base64>, found no colon"
        );
        assert_eq!(message(":x"), "invalid signature: the key name is empty");
        assert_eq!(
            message("k:x"),
            "invalid signature: expected 88 base64 characters, found 1"
        );
        assert_eq!(
            message("k k:x"),
            "invalid signature: the key name has a colon, white space or a control character"
        );
        let short = format!("k:{}", BASE64.encode(&[0; 64]));
        assert_eq!(
            SecretKey::parse(&short).unwrap_err().to_string(),
            "invalid secret key: its public half does not belong to its seed"
        );
        assert_eq!(
            PublicKeys::parse(&short).unwrap_err().to_string(),
            "invalid public key: expected 44 base64 characters, found 88"
        );
    }

    proptest! {
        #[test]
        fn never_panics(text: String, bytes: [u8; 64], name in "[a-z.-]{1,8}") {
            let _ = Signature::parse(&text);
            let _ = PublicKey::parse(&text);
            let _ = SecretKey::parse(&text);
            let text = format!("{name}:{}", BASE64.encode(&bytes));
            let signature = Signature::parse(&text).unwrap();
            prop_assert_eq!(signature.key_name(), &name);
            prop_assert_eq!(signature.as_str(), &text);
        }
    }
}
