//! What the bytes of a castore are: by kind of piece, uncompressed and on disk.
//!
//! Read from the indexes of the packs, one pack at a time: memory for the frames of one pack, no content.
//! A frame's bytes on disk are shared out among its pieces by their length, so that the sum is right and a
//! kind's part is an estimate (pieces of a frame need not compress alike).

use crate::core::{Core, lock};
use crate::error::CastoreError;
use crate::pack::{Kind, Location};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

/// Pieces of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindBytes {
    /// How many.
    pub pieces: u64,
    /// Their bytes, uncompressed.
    pub raw_bytes: u64,
    /// Their part of the frames on disk, headers included.
    pub stored_bytes: u64,
}

/// All pieces by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Breakdown {
    /// Contents: small files as a whole, and chunks of large ones.
    pub data: KindBytes,
    /// Directories.
    pub directories: KindBytes,
    /// Lists of chunks.
    pub recipes: KindBytes,
    /// Hash parts that are put back into masked contents.
    pub patches: KindBytes,
}

/// A frame: its bytes on disk, and the raw bytes of each kind in it.
#[derive(Default)]
struct FrameBytes {
    stored: u64,
    kinds: Vec<(Option<Kind>, u64)>,
}

impl Breakdown {
    fn kind(&mut self, kind: Option<Kind>) -> &mut KindBytes {
        match kind {
            Some(Kind::Directory) => &mut self.directories,
            Some(Kind::Recipe) => &mut self.recipes,
            Some(Kind::Patched) => &mut self.patches,
            _ => &mut self.data,
        }
    }

    /// Adds one pack's pieces.
    fn add(&mut self, pieces: impl Iterator<Item = Location>) {
        let mut frames: HashMap<u32, FrameBytes> = HashMap::new();
        for location in pieces {
            let raw = u64::from(location.len());
            let own = self.kind(location.kind());
            own.pieces += 1;
            own.raw_bytes += raw;
            let frame = frames.entry(location.frame_offset()).or_default();
            frame.stored = location.frame_len_hint() as u64;
            match frame.kinds.iter_mut().find(|(k, _)| *k == location.kind()) {
                Some((_, sum)) => *sum += raw,
                None => frame.kinds.push((location.kind(), raw)),
            }
        }
        for FrameBytes { stored, kinds } in frames.into_values() {
            let all = kinds.iter().map(|(_, raw)| raw).sum::<u64>().max(1);
            for (kind, raw) in kinds {
                // Both fit: a frame is below 4 GiB.
                self.kind(kind).stored_bytes += stored * raw / all;
            }
        }
    }
}

/// Reads the indexes of all packs. `progress` gets (packs done, packs in all).
pub(crate) fn breakdown(
    core: &Arc<Core>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Breakdown, CastoreError> {
    core.refresh()?;
    let state = core.state();
    let mut out = Breakdown::default();
    let all = state.packs.len() as u64;
    for (done, (id, pack)) in (1..).zip(&state.packs) {
        if let Some(open) = state.open.iter().find(|open| open.pack.id == *id) {
            let _scan = lock(&open.scan);
            let pieces = open.pieces.read().unwrap_or_else(PoisonError::into_inner);
            out.add(pieces.values().copied());
        } else if let Some(sealed) = core.open_sealed(pack)? {
            out.add(sealed.footer.entries().map(|(_, location)| location));
        }
        progress(done, all);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_shared_out_by_length() {
        let mut b = Breakdown::default();
        let at = |kind, offset, len| Location::new(64, 1024, kind, offset, len);
        b.add(
            [
                at(Kind::Data, 0, 3_000),
                at(Kind::Directory, 3_000, 1_000),
                Location::new(4096, 512, Kind::Recipe, 0, 500),
            ]
            .into_iter(),
        );
        assert_eq!(b.data.pieces, 1);
        assert_eq!(b.data.raw_bytes, 3_000);
        assert_eq!(b.data.stored_bytes, 3 * b.directories.stored_bytes);
        assert!(b.data.stored_bytes + b.directories.stored_bytes >= 1_000);
        assert!(b.recipes.stored_bytes >= 512 && b.patches.pieces == 0);
    }
}
