//! Hashes in all of Nix's spellings: base16, nix32, base64 and SRI, with and without prefix.
//!
//! The length of a digest's text tells its encoding, as in Nix; only SRI (`algo-base64`) is
//! told by its dash. Checked against `nix hash` of Nix 2.34.8 and 2.26.3.

mod modulo;

pub use modulo::HashModuloSink;

use crate::nix32;
use data_encoding::{BASE64, BASE64_NOPAD, HEXLOWER, HEXLOWER_PERMISSIVE};
use sha2::Digest as _;
use std::fmt;
use std::io::{self, BufRead, Read, Write};

/// Longest digest, that of SHA-512.
const DIGEST_BYTES_MAX: usize = 64;

/// A hash algorithm that Nix knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HashAlgorithm {
    /// MD5, 16 bytes.
    Md5,
    /// SHA-1, 20 bytes.
    Sha1,
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
    /// BLAKE3, 32 bytes (experimental in Nix).
    Blake3,
}

impl HashAlgorithm {
    /// Returns the digest length in bytes.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 | Self::Blake3 => 32,
            Self::Sha512 => 64,
        }
    }

    /// Returns Nix's name: `md5`, `sha1`, `sha256`, `sha512`, `blake3`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Blake3 => "blake3",
        }
    }

    /// Returns the algorithm of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            Self::Md5,
            Self::Sha1,
            Self::Sha256,
            Self::Sha512,
            Self::Blake3,
        ]
        .into_iter()
        .find(|a| a.name() == name)
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A hash with its algorithm. Displays as `sha256:<nix32>`.
///
/// Bytes past the digest's length are zero, so that the derived comparisons are right.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash {
    algorithm: HashAlgorithm,
    bytes: [u8; DIGEST_BYTES_MAX],
}

impl Hash {
    /// Makes a hash of raw digest bytes; `None` if the length is not the algorithm's.
    pub fn new(algorithm: HashAlgorithm, digest: &[u8]) -> Option<Self> {
        if digest.len() != algorithm.digest_len() {
            return None;
        }
        let mut bytes = [0; DIGEST_BYTES_MAX];
        bytes[..digest.len()].copy_from_slice(digest);
        Some(Self { algorithm, bytes })
    }

    /// Hashes `data` at once.
    pub fn of(algorithm: HashAlgorithm, data: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finish()
    }

    /// Returns the algorithm.
    pub const fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    /// Returns the digest bytes.
    pub fn digest(&self) -> &[u8] {
        &self.bytes[..self.algorithm.digest_len()]
    }

    /// Parses any form: `algo:` prefix with base16, nix32 or base64; SRI `algo-base64`;
    /// without prefix only if `default` is given. If both are given, they must agree.
    ///
    /// # Errors
    /// Unknown algorithm, wrong length, bad character, missing prefix.
    pub fn parse(text: &str, default: Option<HashAlgorithm>) -> Result<Self, HashError> {
        Self::parse_any(text, default).map_err(|reason| HashError {
            text: text.to_owned(),
            reason,
        })
    }

    /// Parses base16, nix32 or base64 without prefix.
    ///
    /// # Errors
    /// Wrong length, bad character.
    pub fn parse_unprefixed(text: &str, algorithm: HashAlgorithm) -> Result<Self, HashError> {
        Self::parse_digest(text, algorithm).map_err(|reason| HashError {
            text: text.to_owned(),
            reason,
        })
    }

    fn parse_any(text: &str, default: Option<HashAlgorithm>) -> Result<Self, String> {
        let (prefix, rest, is_sri) = match (text.split_once(':'), text.split_once('-')) {
            (Some((prefix, rest)), _) => (Some(prefix), rest, false),
            (None, Some((prefix, rest))) => (Some(prefix), rest, true),
            (None, None) => (None, text, false),
        };
        let algorithm = match (prefix, default) {
            (Some(name), _) => HashAlgorithm::from_name(name)
                .ok_or_else(|| format!("unknown hash algorithm {name:?}"))?,
            (None, Some(default)) => default,
            (None, None) => return Err("it has no algorithm prefix".to_owned()),
        };
        if let Some(default) = default
            && default != algorithm
        {
            return Err(format!("expected algorithm {default}, found {algorithm}"));
        }
        if !is_sri {
            return Self::parse_digest(rest, algorithm);
        }
        let digest = BASE64_NOPAD
            .decode(rest.trim_end_matches('=').as_bytes())
            .map_err(|error| format!("invalid base64: {error}"))?;
        Self::new(algorithm, &digest).ok_or_else(|| {
            format!(
                "expected {} bytes for {algorithm}, found {}",
                algorithm.digest_len(),
                digest.len()
            )
        })
    }

    fn parse_digest(text: &str, algorithm: HashAlgorithm) -> Result<Self, String> {
        let len = algorithm.digest_len();
        let mut bytes = [0; DIGEST_BYTES_MAX];
        if text.len() == len * 2 {
            HEXLOWER_PERMISSIVE
                .decode_mut(text.as_bytes(), &mut bytes[..len])
                .map_err(|partial| format!("invalid base16: {}", partial.error))?;
        } else if text.len() == nix32::encoded_len(len) {
            nix32::decode_into(text.as_bytes(), &mut bytes[..len])
                .map_err(|error| error.to_string())?;
        } else if text.len() == BASE64.encode_len(len) {
            let digest = BASE64
                .decode(text.as_bytes())
                .map_err(|error| format!("invalid base64: {error}"))?;
            return Self::new(algorithm, &digest).ok_or_else(|| {
                format!(
                    "expected {len} bytes for {algorithm}, found {}",
                    digest.len()
                )
            });
        } else {
            return Err(format!(
                "expected {}, {} or {} characters (base16, nix32, base64) for {algorithm}, found {}",
                len * 2,
                nix32::encoded_len(len),
                BASE64.encode_len(len),
                text.len()
            ));
        }
        Ok(Self { algorithm, bytes })
    }

    /// Digest as lower-case hex, no prefix.
    pub fn to_base16(&self) -> String {
        HEXLOWER.encode(self.digest())
    }

    /// Digest as nix32, no prefix.
    pub fn to_nix32(&self) -> String {
        nix32::encode(self.digest())
    }

    /// Digest as padded base64, no prefix.
    pub fn to_base64(&self) -> String {
        BASE64.encode(self.digest())
    }

    /// `algo-base64`.
    pub fn to_sri(&self) -> String {
        format!("{}-{}", self.algorithm, self.to_base64())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.to_nix32())
    }
}

/// Why a text is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid hash {text:?}: {reason}")]
pub struct HashError {
    /// The text as it was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The SHA-256 of a NAR. Displays as `sha256:<nix32>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NarHash(pub [u8; 32]);

impl NarHash {
    /// Parses any spelling of [`Hash::parse`]; a text without prefix is taken as SHA-256.
    ///
    /// # Errors
    /// Not a SHA-256 hash.
    pub fn parse(text: &str) -> Result<Self, HashError> {
        Hash::parse(text, Some(HashAlgorithm::Sha256))?.try_into()
    }

    /// As a general hash.
    pub fn to_hash(&self) -> Hash {
        let mut bytes = [0; DIGEST_BYTES_MAX];
        bytes[..32].copy_from_slice(&self.0);
        Hash {
            algorithm: HashAlgorithm::Sha256,
            bytes,
        }
    }

    /// 64 hex digits without prefix: the worker protocol's spelling.
    pub fn to_base16(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}
impl TryFrom<Hash> for NarHash {
    type Error = HashError;
    fn try_from(hash: Hash) -> Result<Self, HashError> {
        match hash.algorithm {
            HashAlgorithm::Sha256 => {
                let mut bytes = [0; 32];
                bytes.copy_from_slice(hash.digest());
                Ok(Self(bytes))
            }
            other => Err(HashError {
                text: hash.to_string(),
                reason: format!("expected algorithm sha256 for a NAR, found {other}"),
            }),
        }
    }
}
impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl fmt::Display for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_hash(), f)
    }
}

/// Hashes what is written, and counts it.
pub struct CountingHasher {
    hasher: Hasher,
    bytes: u64,
}

impl CountingHasher {
    /// Starts a hash.
    pub fn new(algorithm: HashAlgorithm) -> Self {
        Self {
            hasher: Hasher::new(algorithm),
            bytes: 0,
        }
    }
    /// Returns the hash and the number of bytes.
    pub fn finish(self) -> (Hash, u64) {
        (self.hasher.finish(), self.bytes)
    }
}

impl std::io::Write for CountingHasher {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.hasher.update(data);
        self.bytes += data.len() as u64;
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An incremental hasher of any algorithm; also a [`std::io::Write`] sink.
#[derive(Clone)]
pub struct Hasher {
    state: State,
}

#[derive(Clone)]
enum State {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    /// Starts a hash.
    pub fn new(algorithm: HashAlgorithm) -> Self {
        let state = match algorithm {
            HashAlgorithm::Md5 => State::Md5(md5::Md5::new()),
            HashAlgorithm::Sha1 => State::Sha1(sha1::Sha1::new()),
            HashAlgorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            HashAlgorithm::Sha512 => State::Sha512(sha2::Sha512::new()),
            HashAlgorithm::Blake3 => State::Blake3(Box::new(blake3::Hasher::new())),
        };
        Self { state }
    }

    /// Feeds bytes.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.state {
            State::Md5(hasher) => hasher.update(data),
            State::Sha1(hasher) => hasher.update(data),
            State::Sha256(hasher) => hasher.update(data),
            State::Sha512(hasher) => hasher.update(data),
            State::Blake3(hasher) => {
                hasher.update(data);
            }
        }
    }

    /// Ends the hash.
    pub fn finish(self) -> Hash {
        let mut bytes = [0; DIGEST_BYTES_MAX];
        let algorithm = match self.state {
            State::Md5(hasher) => {
                bytes[..16].copy_from_slice(&hasher.finalize());
                HashAlgorithm::Md5
            }
            State::Sha1(hasher) => {
                bytes[..20].copy_from_slice(&hasher.finalize());
                HashAlgorithm::Sha1
            }
            State::Sha256(hasher) => {
                bytes[..32].copy_from_slice(&hasher.finalize());
                HashAlgorithm::Sha256
            }
            State::Sha512(hasher) => {
                bytes.copy_from_slice(&hasher.finalize());
                HashAlgorithm::Sha512
            }
            State::Blake3(hasher) => {
                bytes[..32].copy_from_slice(hasher.finalize().as_bytes());
                HashAlgorithm::Blake3
            }
        };
        Hash { algorithm, bytes }
    }
}
impl Write for Hasher {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that hashes and counts exactly the bytes that are consumed through it.
///
/// It adds no buffer of its own, so nothing past what was asked for is taken from the stream.
pub struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
    byte_count: u64,
}

impl<R> HashingReader<R> {
    /// Starts a hash over what will be read from `inner`.
    pub fn new(inner: R, algorithm: HashAlgorithm) -> Self {
        Self {
            inner,
            hasher: Hasher::new(algorithm),
            byte_count: 0,
        }
    }

    /// Returns the number of bytes consumed so far.
    pub fn byte_count(&self) -> u64 {
        self.byte_count
    }

    /// Returns the stream, the hash of the bytes consumed, and their number.
    pub fn finish(self) -> (R, Hash, u64) {
        (self.inner, self.hasher.finish(), self.byte_count)
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.hasher.update(&out[..count]);
        self.byte_count += count as u64;
        Ok(count)
    }
}

impl<R: BufRead> BufRead for HashingReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, amount: usize) {
        if amount == 0 {
            return;
        }
        // A buffered reader whose buffer is not empty returns it again without reading.
        if let Ok(buffer) = self.inner.fill_buf() {
            self.hasher.update(&buffer[..amount]);
        }
        self.byte_count += amount as u64;
        self.inner.consume(amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EMPTY_HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn all_spellings_agree() {
        let empty = Hash::of(HashAlgorithm::Sha256, b"");
        for text in [
            format!("sha256:{EMPTY_HEX}"),
            format!("sha256:{}", EMPTY_HEX.to_uppercase()),
            "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73".to_owned(),
            "sha256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=".to_owned(),
            "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=".to_owned(),
            "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU".to_owned(),
        ] {
            assert_eq!(Hash::parse(&text, None).unwrap(), empty, "{text}");
        }
        assert_eq!(
            Hash::parse(EMPTY_HEX, Some(HashAlgorithm::Sha256)).unwrap(),
            empty
        );
        assert_eq!(NarHash::parse(EMPTY_HEX).unwrap().to_base16(), EMPTY_HEX);
    }

    #[test]
    fn refuses() {
        let message = |text, default| Hash::parse(text, default).unwrap_err().to_string();
        assert_eq!(
            message(EMPTY_HEX, None),
            format!("invalid hash {EMPTY_HEX:?}: it has no algorithm prefix")
        );
        assert_eq!(
            message("sha3:00", None),
            "invalid hash \"sha3:00\": unknown hash algorithm \"sha3\""
        );
        assert_eq!(
            message("sha256:00", None),
            "invalid hash \"sha256:00\": expected 64, 52 or 44 characters (base16, nix32, base64) for sha256, found 2"
        );
        assert_eq!(
            message("sha1:00", Some(HashAlgorithm::Sha256)),
            "invalid hash \"sha1:00\": expected algorithm sha256, found sha1"
        );
        assert_eq!(
            message("sha256-AAAA", None),
            "invalid hash \"sha256-AAAA\": expected 32 bytes for sha256, found 3"
        );
        let sha1 = Hash::of(HashAlgorithm::Sha1, b"");
        assert!(NarHash::try_from(sha1).is_err());
    }

    #[test]
    fn hashing_reader_counts_only_what_is_consumed() {
        let mut reader = HashingReader::new(&b"hello world"[..], HashAlgorithm::Sha256);
        assert_eq!(reader.fill_buf().unwrap(), b"hello world");
        reader.consume(5);
        let (rest, hash, count) = reader.finish();
        assert_eq!(
            (rest, hash, count),
            (&b" world"[..], Hash::of(HashAlgorithm::Sha256, b"hello"), 5)
        );
    }

    fn algorithms() -> impl Strategy<Value = HashAlgorithm> {
        prop_oneof![
            Just(HashAlgorithm::Md5),
            Just(HashAlgorithm::Sha1),
            Just(HashAlgorithm::Sha256),
            Just(HashAlgorithm::Sha512),
            Just(HashAlgorithm::Blake3)
        ]
    }

    proptest! {
        #[test]
        fn round_trip(algorithm in algorithms(), data: Vec<u8>) {
            let hash = Hash::of(algorithm, &data);
            prop_assert_eq!(Hash::parse(&hash.to_string(), None).unwrap(), hash);
            prop_assert_eq!(Hash::parse(&hash.to_sri(), None).unwrap(), hash);
            prop_assert_eq!(Hash::parse(&hash.to_base16(), Some(algorithm)).unwrap(), hash);
            prop_assert_eq!(Hash::parse(&hash.to_base64(), Some(algorithm)).unwrap(), hash);
            prop_assert_eq!(Hash::new(algorithm, hash.digest()).unwrap(), hash);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = Hash::parse(&text, None);
            let _ = Hash::parse(&text, Some(HashAlgorithm::Md5));
        }
    }
}
