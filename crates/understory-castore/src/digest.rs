//! BLAKE3 digests.

use std::fmt;

/// A BLAKE3 digest. Displays as `b3:<base64>`, as snix does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// Characters of a padded base64 of 32 bytes.
const BASE64_CHARS: usize = 44;
const BASE64_ALPHABET: &[u8; 64] =
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl Digest {
    /// The digest of no bytes: the empty file and the empty directory.
    pub const EMPTY: Self = Self([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9,
        0x49, 0x9b, 0xcb, 0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f,
        0x32, 0x62,
    ]);

    /// Hashes `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    /// Parses `b3:<base64>` or 64 hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("b3:") {
            Some(base64) => from_base64(base64.as_bytes()).map(Self),
            None => from_hex(text.as_bytes()).map(Self),
        }
    }

    /// Returns the 64 lower-case hex digits.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [b'='; BASE64_CHARS];
        for (group, out) in self.0.chunks(3).zip(text.chunks_mut(4)) {
            let bits = group
                .iter()
                .fold(0_u32, |bits, byte| (bits << 8) | u32::from(*byte))
                << (8 * (3 - group.len()));
            for (place, char) in out.iter_mut().take(group.len() + 1).enumerate() {
                *char = BASE64_ALPHABET[(bits >> (18 - 6 * place)) as usize & 63];
            }
        }
        f.write_str("b3:")?;
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lower-case hex of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// Reads exactly `2 * N` hex digits of either case.
pub(crate) fn from_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    if text.len() != 2 * N {
        return None;
    }
    let digit = |char: u8| char::from(char).to_digit(16);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

/// Reads canonical padded base64 of 32 bytes: unused bits must be zero.
fn from_base64(text: &[u8]) -> Option<[u8; 32]> {
    if text.len() != BASE64_CHARS || text[BASE64_CHARS - 1] != b'=' {
        return None;
    }
    let mut bytes = [0_u8; 33];
    for (out, group) in bytes.chunks_exact_mut(3).zip(text.chunks_exact(4)) {
        let mut bits = 0_u32;
        for char in group {
            let value = BASE64_ALPHABET.iter().position(|known| known == char);
            // Only the last character may be padding, checked above.
            bits = bits << 6 | u32::try_from(value.unwrap_or(0)).ok()?;
            if value.is_none() && *char != b'=' {
                return None;
            }
        }
        out.copy_from_slice(&bits.to_be_bytes()[1..]);
    }
    let digest: [u8; 32] = bytes[..32].try_into().ok()?;
    // Rejects padding in the middle and unused bits that are set: one text per digest.
    (bytes[32] == 0 && Digest(digest).to_string().as_bytes()[3..] == *text).then_some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_empty_digest_reads_as_in_snix() {
        assert_eq!(Digest::of(b""), Digest::EMPTY);
        assert_eq!(
            Digest::EMPTY.to_string(),
            "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI="
        );
        assert_eq!(
            Digest::EMPTY.to_hex(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
    }

    #[test]
    fn text_that_is_not_canonical_is_refused() {
        for text in [
            "",
            "b3:",
            "rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=",
            "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI",
            "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmJ=",
            "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMm==",
            "b3:=xNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=",
            "b3:rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfM\u{e9}I=",
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f326",
            "gf1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        ] {
            assert_eq!(Digest::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn both_forms_round_trip(bytes: [u8; 32]) {
            let digest = Digest(bytes);
            prop_assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
            prop_assert_eq!(Digest::parse(&digest.to_hex()), Some(digest));
        }
        #[test]
        fn any_text_is_safe(text: String) {
            let _ = Digest::parse(&text);
            let _ = Digest::parse(&format!("b3:{text}"));
        }
    }
}
