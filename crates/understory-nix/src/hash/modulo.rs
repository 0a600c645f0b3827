//! Hash modulo self-references: what makes a self-referring object content-addressable.
//!
//! Every occurrence of the object's own 32-character digest is hashed as 32 NUL bytes, and that
//! is all. Nix's sources mean to hash `|<decimal offset>` of each occurrence after the data too,
//! but Nix 2.26.3 and 2.34.8 never note an offset, so that paths made with them do not have it.
//! A golden vector from both holds us to what they do.
//!
//! Cost: one copy of the data into a window, one Horspool search (most steps skip 32 bytes), and
//! the hash itself.

use super::{Hash, HashAlgorithm, Hasher};
use std::io::{self, Write};

/// Characters of a store path's digest.
const DIGEST_CHARS: usize = 32;
/// Bytes searched at once: large enough to make the copied border of 31 bytes cheap.
const WINDOW_BYTES: usize = 64 * 1024;

/// A [`Write`] sink that hashes modulo occurrences of one store path digest, wherever the
/// borders between the pieces fall.
pub struct HashModuloSink {
    hasher: Hasher,
    digest: [u8; DIGEST_CHARS],
    /// How far the search may move on, by the last byte of the window compared.
    skips: [u8; 256],
    /// Bytes that may begin an occurrence: at most `DIGEST_CHARS - 1` between calls.
    window: Vec<u8>,
    /// Offset of the window's first byte in the data.
    window_offset: u64,
    match_count: u64,
}

impl HashModuloSink {
    /// Starts a hash modulo `digest`, the 32 characters of the object's own hash part.
    pub fn new(algorithm: HashAlgorithm, digest: &[u8; DIGEST_CHARS]) -> Self {
        let mut skips = [DIGEST_CHARS as u8; 256];
        for (index, &byte) in digest[..DIGEST_CHARS - 1].iter().enumerate() {
            skips[usize::from(byte)] = (DIGEST_CHARS - 1 - index) as u8;
        }
        Self {
            hasher: Hasher::new(algorithm),
            digest: *digest,
            skips,
            window: Vec::new(),
            window_offset: 0,
            match_count: 0,
        }
    }

    /// Feeds bytes.
    pub fn update(&mut self, data: &[u8]) {
        for piece in data.chunks(WINDOW_BYTES) {
            self.window.extend_from_slice(piece);
            self.mask_window();
            let done = self.window.len().saturating_sub(DIGEST_CHARS - 1);
            self.hasher.update(&self.window[..done]);
            self.window.drain(..done);
            self.window_offset += done as u64;
        }
    }

    /// Replaces every occurrence in the window by NUL bytes and counts it.
    fn mask_window(&mut self) {
        let mut start = 0;
        while let Some(candidate) = self.window.get_mut(start..start + DIGEST_CHARS) {
            if candidate == self.digest {
                candidate.fill(0);
                self.match_count += 1;
                start += DIGEST_CHARS;
            } else {
                start += usize::from(self.skips[usize::from(candidate[DIGEST_CHARS - 1])]);
            }
        }
    }

    /// Ends the hash. Also returns how many bytes were fed and how many occurrences there were.
    pub fn finish(mut self) -> (Hash, u64, u64) {
        self.hasher.update(&self.window);
        let byte_count = self.window_offset + self.window.len() as u64;
        (self.hasher.finish(), byte_count, self.match_count)
    }
}

impl Write for HashModuloSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &[u8; 32] = b"00bgd045z0d4icpbc2yyz4gx48ak44la";

    /// The definition, word by word.
    fn reference(data: &[u8]) -> (Hash, u64, u64) {
        let mut masked = data.to_vec();
        let mut match_count = 0;
        let mut index = 0;
        while index + 32 <= masked.len() {
            if &masked[index..index + 32] == DIGEST {
                masked[index..index + 32].fill(0);
                match_count += 1;
            }
            index += 1;
        }
        (
            Hash::of(HashAlgorithm::Sha256, &masked),
            masked.len() as u64,
            match_count,
        )
    }

    proptest! {
        #[test]
        fn finds_digests_over_borders(
            parts in proptest::collection::vec((proptest::collection::vec(prop_oneof![Just(b'0'), Just(b'a'), any::<u8>()], 0..80), any::<bool>(), 0..33_usize), 0..8),
            pieces in proptest::collection::vec(1..70_usize, 1..20),
        ) {
            let mut data = Vec::new();
            for (noise, whole, part) in parts {
                data.extend(noise);
                data.extend(if whole { &DIGEST[..] } else { &DIGEST[..part.min(32)] });
            }
            let mut sink = HashModuloSink::new(HashAlgorithm::Sha256, DIGEST);
            let (mut rest, mut piece) = (&data[..], pieces.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*piece.next().unwrap()));
                sink.update(now);
                rest = later;
            }
            prop_assert_eq!(sink.finish(), reference(&data));
        }
    }

    #[test]
    fn bytes_masked_before_are_not_found_again() {
        let data = [&DIGEST[..], &DIGEST[..31], b"x", &DIGEST[..]].concat();
        let mut sink = HashModuloSink::new(HashAlgorithm::Sha256, DIGEST);
        for byte in &data {
            sink.update(std::slice::from_ref(byte));
        }
        assert_eq!(sink.finish(), reference(&data));
    }
}
