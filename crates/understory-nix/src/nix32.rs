//! nix32: Nix's base-32, least significant bits first, alphabet without `e o u t`.
//!
//! Character `k`, counted from the *end* of the text, holds bits `5k … 5k+4` of the bytes
//! read as one little-endian number. Checked against `nix hash convert` of Nix 2.34.8 and 2.26.3.

/// The alphabet, by value.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Marks a byte that is not in the alphabet.
const INVALID: u8 = 0xff;

/// Value of each byte, or [`INVALID`].
const VALUES: [u8; 256] = {
    let mut values = [INVALID; 256];
    let mut value = 0;
    while value < 32 {
        values[ALPHABET[value as usize] as usize] = value;
        value += 1;
    }
    values
};

/// Returns the number of characters that `byte_count` bytes take.
pub const fn encoded_len(byte_count: usize) -> usize {
    (byte_count * 8).div_ceil(5)
}

/// Returns true if `byte` is in the alphabet.
pub const fn is_digit(byte: u8) -> bool {
    VALUES[byte as usize] != INVALID
}

/// Encodes `bytes`.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(encoded_len(bytes.len()));
    for position in (0..encoded_len(bytes.len())).rev() {
        let bit = position * 5;
        let (index, shift) = (bit / 8, bit % 8);
        let low = u16::from(bytes[index]);
        let high = u16::from(bytes.get(index + 1).copied().unwrap_or(0));
        let value = ((low | high << 8) >> shift) & 0x1f;
        text.push(char::from(ALPHABET[usize::from(value)]));
    }
    text
}

/// Decodes `text` into `out`, whose length says how many bytes are expected.
///
/// # Errors
/// A wrong length, a character outside the alphabet, or non-zero unused bits.
pub fn decode_into(text: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let expected = encoded_len(out.len());
    if text.len() != expected {
        return Err(DecodeError::Length {
            expected,
            found: text.len(),
        });
    }
    out.fill(0);
    for (position, &byte) in text.iter().rev().enumerate() {
        let value = VALUES[usize::from(byte)];
        if value == INVALID {
            return Err(DecodeError::Character(char::from(byte)));
        }
        let bit = position * 5;
        let (index, shift) = (bit / 8, bit % 8);
        let spread = u16::from(value) << shift;
        let [low, high] = spread.to_le_bytes();
        out[index] |= low;
        match out.get_mut(index + 1) {
            Some(next) => *next |= high,
            None if high != 0 => return Err(DecodeError::UnusedBits),
            None => {}
        }
    }
    Ok(())
}

/// Why a text is not nix32.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The text is too short or too long.
    #[error("expected {expected} nix32 characters, found {found}")]
    Length {
        /// Characters expected.
        expected: usize,
        /// Characters found.
        found: usize,
    },
    /// A character is not in the alphabet.
    #[error("invalid nix32 character {0:?}")]
    Character(char),
    /// Bits beyond the last byte are set.
    #[error("unused bits of the nix32 text are not zero")]
    UnusedBits,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_value() {
        // nix hash convert of the SHA-256 of the empty string
        let digest = *crate::Hash::of(crate::HashAlgorithm::Sha256, b"")
            .digest()
            .first_chunk::<32>()
            .unwrap();
        assert_eq!(
            encode(&digest),
            "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
        );
    }

    #[test]
    fn refuses() {
        let mut out = [0; 20];
        assert_eq!(
            decode_into(b"abc", &mut out).unwrap_err().to_string(),
            "expected 32 nix32 characters, found 3"
        );
        assert_eq!(
            decode_into(b"0000000000000000000000000000000e", &mut out)
                .unwrap_err()
                .to_string(),
            "invalid nix32 character 'e'"
        );
        let mut out = [0; 32];
        assert_eq!(
            decode_into(&[b'z'; 52], &mut out).unwrap_err(),
            DecodeError::UnusedBits
        );
    }

    proptest! {
        #[test]
        fn round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let text = encode(&bytes);
            let mut out = vec![0; bytes.len()];
            decode_into(text.as_bytes(), &mut out).unwrap();
            prop_assert_eq!(out, bytes);
        }
    }
}
