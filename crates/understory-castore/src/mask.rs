//! Finds the hash parts of store paths in file contents. Pure.
//!
//! Two things are found, at any offset: the hash parts that are known to occur (those of the object
//! and of its references, as Nix's reference scanner finds them), and whatever looks like one
//! between a store directory and a dash. What is found is decided by the bytes around it alone, so it
//! does not depend on how a file is cut into buffers, and where two could be meant, the first one is.
//!
//! Cost: a window of 32 bytes is looked at from its end, and the first byte that is no nix32 character
//! skips all windows that hold it. Usual contents have one in three, so that a scan looks at one
//! byte in twenty or so: several GB/s by estimate (`examples/scan.rs` measures it).

use crate::patch::{HASH_PART_BYTES, HashPart, is_digit};

/// The longest store directory, with its last slash, behind which hash parts are found: bounds what
/// must stay in a buffer that streams through.
const PREFIX_BYTES_MAX: usize = 255;
/// What stands before the first byte of a window and decides with it, at most.
pub(crate) const CONTEXT_BYTES: usize = PREFIX_BYTES_MAX;
/// Bits of the filter that most windows of long runs are refused by: 512 bytes, for some hundred parts.
const FILTER_BITS: u32 = 12;

/// What is masked in the contents of a tree.
#[derive(Debug, Clone, Default)]
pub struct Masks {
    /// The store directory with a slash behind; empty if none is known.
    prefix: Box<[u8]>,
    /// Sorted.
    known: Vec<HashPart>,
    filter: Vec<u64>,
}

impl Masks {
    /// Masks `known` hash parts, and those that follow `store_dir` and a slash. Parts that have other
    /// than nix32 characters are never found.
    pub fn new(store_dir: &[u8], known: impl IntoIterator<Item = [u8; 32]>) -> Self {
        let mut prefix = store_dir.to_vec();
        prefix.push(b'/');
        if store_dir.is_empty() || prefix.len() > PREFIX_BYTES_MAX {
            prefix.clear();
        }
        let mut known: Vec<HashPart> = known.into_iter().collect();
        known.sort_unstable();
        known.dedup();
        let mut filter = vec![0; (1 << FILTER_BITS) / 64];
        for part in &known {
            let bit = filter_bit(part);
            filter[bit / 64] |= 1 << (bit % 64);
        }
        Self {
            prefix: prefix.into(),
            known,
            filter,
        }
    }

    /// Counts the hash parts in `bytes` that would be masked.
    pub fn count(&self, bytes: &[u8]) -> usize {
        let mut count = 0;
        self.scan(bytes, 0, true, &mut |_, _| count += 1);
        count
    }

    /// True if there is nothing that it could find.
    pub(crate) fn is_empty(&self) -> bool {
        self.prefix.is_empty() && self.known.is_empty()
    }

    /// Calls `found` with where each hash part stands in `bytes` that begins at `from` or behind, in
    /// order; they do not overlap. What stands before `from` ([`CONTEXT_BYTES`] of it) only decides.
    /// Without `is_end` more bytes follow, and what they decide is left. Returns from where to go on: what
    /// stands before that is settled.
    pub(crate) fn scan(
        &self,
        bytes: &[u8],
        from: usize,
        is_end: bool,
        found: &mut dyn FnMut(usize, &HashPart),
    ) -> usize {
        if self.is_empty() {
            return bytes.len();
        }
        // The byte behind a window decides, too, if there is one.
        let need = HASH_PART_BYTES + usize::from(!is_end);
        let mut at = from;
        'window: while at + need <= bytes.len() {
            let Some((window, behind)) = bytes[at..].split_first_chunk::<HASH_PART_BYTES>() else {
                break;
            };
            for (place, byte) in window.iter().enumerate().rev() {
                if !is_digit(*byte) {
                    at += place + 1;
                    continue 'window;
                }
            }
            let is_named = behind.first() == Some(&b'-') && self.is_behind_prefix(&bytes[..at]);
            if is_named || self.is_known(window) {
                found(at, window);
                at += HASH_PART_BYTES;
                continue;
            }
            // A long run of such characters (numbers, say) is walked without looking back. A prefix
            // stands only before its start: its last byte is a slash.
            at += 1;
            while at + need <= bytes.len() && is_digit(bytes[at + HASH_PART_BYTES - 1]) {
                if let Some(window) = bytes[at..].first_chunk::<HASH_PART_BYTES>()
                    && self.is_known(window)
                {
                    continue 'window;
                }
                at += 1;
            }
        }
        if is_end { bytes.len() } else { at }
    }

    fn is_behind_prefix(&self, before: &[u8]) -> bool {
        !self.prefix.is_empty() && before.ends_with(&self.prefix)
    }

    fn is_known(&self, window: &HashPart) -> bool {
        let bit = filter_bit(window);
        self.filter
            .get(bit / 64)
            .is_some_and(|bits| bits >> (bit % 64) & 1 == 1)
            && self.known.binary_search(window).is_ok()
    }
}

fn filter_bit(part: &HashPart) -> usize {
    let mut head = [0; 8];
    head.copy_from_slice(&part[..8]);
    let mixed = u64::from_le_bytes(head).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> (64 - FILTER_BITS)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::FILLER;
    use proptest::prelude::*;

    const PART: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    const OTHER: &[u8; 32] = b"zyxwvsrqpnmlkjihgfdcba9876543210";

    fn masks() -> Masks {
        Masks::new(b"/nix/store", [*PART])
    }

    /// Where hash parts are found, by trying every offset.
    fn by_definition(bytes: &[u8]) -> Vec<usize> {
        let (mut found, mut at) = (Vec::new(), 0);
        while at + 32 <= bytes.len() {
            let window = &bytes[at..at + 32];
            let named = window.iter().all(|byte| is_digit(*byte))
                && bytes[..at].ends_with(b"/nix/store/")
                && bytes.get(at + 32) == Some(&b'-');
            if named || window == PART {
                found.push(at);
                at += 32;
            } else {
                at += 1;
            }
        }
        found
    }

    fn found(masks: &Masks, text: &[u8]) -> Vec<usize> {
        let mut places = Vec::new();
        let end = masks.scan(text, 0, true, &mut |at, part| {
            assert_eq!(text[at..at + 32], part[..]);
            places.push(at);
        });
        assert_eq!(end, text.len());
        places
    }

    #[test]
    fn known_parts_are_found_anywhere_and_others_behind_the_store_directory() {
        let text = |before: &str, part: &[u8], after: &str| {
            [before.as_bytes(), part, after.as_bytes()].concat()
        };
        for (text, expected) in [
            (text("", PART, ""), vec![0]),
            (text("x", PART, "y"), vec![1]),
            (text("0123", PART, "4567"), vec![4]),
            (text("/nix/store/", OTHER, "-name"), vec![11]),
            (text("/nix/store/", OTHER, ""), vec![]),
            (text("/nix/store/", OTHER, "/name"), vec![]),
            (text("/gnu/store/", OTHER, "-name"), vec![]),
            (text("/nix/store/0", OTHER, "-name"), vec![]),
            (text("/nix/store/", OTHER, "0-name"), vec![]),
            (text("/nix/store/", &FILLER, "-name"), vec![]),
            ([PART.as_slice(), PART].concat(), vec![0, 32]),
            (text("", &PART[..31], ""), vec![]),
        ] {
            assert_eq!(found(&masks(), &text), expected, "{}", text.escape_ascii());
            assert_eq!(by_definition(&text), expected);
        }
        let nothing = Masks::new(b"", []);
        assert!(found(&nothing, &text("/nix/store/", PART, "-name")).is_empty());
        assert!(found(&Masks::default(), PART).is_empty());
    }

    fn any_text() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just(PART.to_vec()),
            Just(OTHER.to_vec()),
            Just(b"/nix/store/".to_vec()),
            Just(b"-".to_vec()),
            (0_usize..40).prop_map(|len| vec![b'7'; len]),
            (0_usize..40).prop_map(|len| PART[..len.min(32)].to_vec()),
            proptest::collection::vec(any::<u8>(), 0..20),
        ];
        proptest::collection::vec(part, 0..20).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn all_that_is_defined_is_found(text in any_text()) {
            prop_assert_eq!(found(&masks(), &text), by_definition(&text));
        }

        /// As a stream does it: bytes come in parts, and only the context stays.
        #[test]
        fn borders_of_buffers_change_nothing(
            text in any_text(),
            cuts in proptest::collection::vec(1_usize..60, 1..40),
        ) {
            let (mut places, mut buffer, mut dropped, mut from) = (Vec::new(), Vec::new(), 0, 0);
            let mut rest = &text[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                buffer.extend_from_slice(now);
                rest = later;
                let (start, is_end) = (places.len(), rest.is_empty());
                from = masks().scan(&buffer, from, is_end, &mut |at, _| places.push(dropped + at));
                for place in &places[start..] {
                    buffer[place - dropped..][..32].copy_from_slice(&FILLER);
                }
                if rest.is_empty() {
                    break;
                }
                let gone = from.saturating_sub(b"/nix/store/".len());
                buffer.drain(..gone);
                (dropped, from) = (dropped + gone, from - gone);
            }
            prop_assert_eq!(places, by_definition(&text));
        }
    }
}
