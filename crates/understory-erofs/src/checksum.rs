//! CRC-32C (Castagnoli) as EROFS uses it: reflected, begun with all ones, not inverted at the end.
//!
//! One table of 256 words: an image has 3 KiB to sum.

/// The reflected polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ if value & 1 == 1 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

/// Returns the checksum of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (sum >> 8) ^ TABLE[usize::from(sum.to_le_bytes()[0] ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C, which inverts at the end.
    #[test]
    fn the_check_value_is_that_of_the_catalogue() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
