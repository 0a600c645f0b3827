//! Verifies all that is stored.
//!
//! Every byte of a pack is covered: header, frame headers and tables, payloads by checksum; pieces
//! by their BLAKE3; recipes by their shape; patches by the BLAKE3 of the file that they make; footer and trailer by checksum and against the frames.
//! Derived index files are verified by their checksums. Memory: one frame and one pack's map.
//!
//! Cost: one read of everything, XXH3, zstd and BLAKE3: about 1 GB/s of uncompressed data a core.

use crate::blob::Blob;
use crate::core::{Core, Pack, index_frame};
use crate::error::{CastoreError, IoContext};
use crate::frames::{Frame, frame_name, read_frame};
use crate::index::{Footer, PieceMap};
use crate::log::read_mark;
use crate::pack::{
    FOOTER_ENTRY_BYTES, FOOTER_HEADER_BYTES, FOOTER_MAGIC, Kind, PACK_HEADER_BYTES, Piece,
    TRAILER_BYTES, encode_footer, u32_at,
};
use crate::patch::Patches;
use crate::recipe::RecipeNode;
use crate::scan::{self, Scanned, Tail};
use crate::{Digest, Directory};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Something that [`Castore::scrub`](crate::Castore::scrub) found.
#[derive(Debug, Clone)]
pub struct Damage {
    /// Which pack and offset, in words.
    pub what: String,
    /// Expected and found.
    pub reason: String,
    /// Digests of the pieces that are lost with it (chunks, blobs, directories, recipes).
    pub lost: Vec<Digest>,
}

pub(crate) fn scrub(
    core: &Arc<Core>,
    progress: &mut dyn FnMut(u64, u64),
    damaged: &mut dyn FnMut(Damage),
) -> Result<(), CastoreError> {
    core.refresh()?;
    let mut packs: Vec<Arc<Pack>> = core.state().packs.values().cloned().collect();
    packs.sort_by_key(|pack| pack.id);
    let mut opened = Vec::with_capacity(packs.len());
    let mut all = 0;
    for pack in packs {
        // Lengths as of now: what is appended meanwhile is for the next scrub.
        let len = match std::fs::metadata(&pack.path).verb("reading", &pack.path) {
            Ok(metadata) => metadata.len(),
            // Collected meanwhile.
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        all += len;
        opened.push((pack, len));
    }
    let mut done = 0;
    progress(0, all);
    for (pack, len) in opened {
        let file = match core.file(&pack) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        let mut scrub = PackScrub {
            core,
            pack: &pack,
            file: &file,
            len,
            damaged: &mut *damaged,
        };
        scrub.run(&mut |offset| progress(done + offset, all))?;
        done += len;
        progress(done, all);
    }
    core.scrub_indexes(damaged);
    Ok(())
}

struct PackScrub<'a> {
    core: &'a Arc<Core>,
    pack: &'a Pack,
    file: &'a File,
    len: u64,
    damaged: &'a mut dyn FnMut(Damage),
}

impl PackScrub<'_> {
    fn tell(&mut self, what: String, reason: impl Into<String>, lost: Vec<Digest>) {
        (self.damaged)(Damage {
            what,
            reason: reason.into(),
            lost,
        });
    }

    fn run(&mut self, progress: &mut dyn FnMut(u64)) -> Result<(), CastoreError> {
        let (file, path, id) = (self.file, &self.pack.path, self.pack.id);
        if let Err(reason) = scan::check_header(file, path, id, self.len)? {
            self.tell(format!("header of pack {id}"), reason, Vec::new());
        }
        let trailer = scan::trailer(file, path, self.len)?;
        let end = trailer.map_or(self.len, |trailer| trailer.footer_offset);
        let marked = match trailer {
            Some(_) => 0,
            None => read_mark(self.core, id),
        };
        if self.len < marked {
            self.tell(
                format!("pack {id}"),
                format!("expected at least {marked} bytes, found {}", self.len),
                Vec::new(),
            );
        }
        // What the footer says is in the pack, to name what is lost with a damaged header.
        let footer = match &trailer {
            Some(trailer) => Some(Footer::map(file, path, trailer)?),
            None => None,
        };
        let mut pieces = PieceMap::default();
        let mut from = PACK_HEADER_BYTES as u64;
        let mut sound = true;
        loop {
            let (stop, tail) = scan::frames(file, path, from, end, u64::MAX, &mut |frame| {
                index_frame(&mut pieces, &frame);
                self.frame(&frame)?;
                progress(frame.offset);
                Ok(())
            })?;
            let (reason, next) = match tail {
                Tail::Clean => break,
                Tail::Damaged { reason, next } => (reason, Some(next)),
                // A crash leaves such a tail, and a writer at work may: nothing that was
                // acknowledged is in it. Behind a seal there is no such excuse.
                Tail::Torn(reason)
                    if trailer.is_some() || stop < marked || self.is_footer(stop)? =>
                {
                    (reason, None)
                }
                Tail::Torn(_) => break,
            };
            sound = false;
            self.core.set_bad(self.pack, stop as u32);
            let what = frame_name(self.pack, stop as u32);
            self.tell(what, reason, Vec::new());
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        if let (Some(trailer), Some(footer)) = (trailer, footer) {
            if !footer.is_sound() {
                self.tell(
                    format!("footer of pack {id}"),
                    format!("expected the checksum {:016x}", trailer.footer_checksum),
                    Vec::new(),
                );
            } else if sound {
                let expected = encode_footer(pieces.into_iter().collect());
                if xxhash_rust::xxh3::xxh3_64(&expected) != trailer.footer_checksum {
                    self.tell(
                        format!("footer of pack {id}"),
                        "it does not list the pieces that the frames have",
                        Vec::new(),
                    );
                }
            }
        }
        Ok(())
    }

    /// True if a whole footer and something in the place of a trailer stand there: then the trailer
    /// is damaged. A seal that was interrupted leaves less.
    fn is_footer(&self, offset: u64) -> Result<bool, CastoreError> {
        let mut head = [0; FOOTER_HEADER_BYTES];
        if offset + head.len() as u64 > self.len {
            return Ok(false);
        }
        self.file
            .read_exact_at(&mut head, offset)
            .verb("reading", &self.pack.path)?;
        let pieces = u64::from(u32_at(&head, FOOTER_HEADER_BYTES - 4));
        let end = offset
            + (FOOTER_HEADER_BYTES + TRAILER_BYTES) as u64
            + pieces * FOOTER_ENTRY_BYTES as u64;
        Ok(head[..8] == FOOTER_MAGIC && end == self.len)
    }

    fn frame(&mut self, scanned: &Scanned) -> Result<(), CastoreError> {
        let offset = scanned.offset as u32;
        match read_frame(self.file, self.pack, offset, scanned.header.frame_len()) {
            Ok(frame) => self.pieces(offset, &frame),
            Err(CastoreError::Corrupt { what, reason }) => {
                self.core.set_bad(self.pack, offset);
                let lost = scanned.pieces.iter().map(|piece| piece.digest).collect();
                self.tell(what, reason, lost);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn pieces(&mut self, offset: u32, frame: &Frame) -> Result<(), CastoreError> {
        for (piece, bytes) in frame.pieces() {
            let mut checked = check_piece(piece, bytes);
            if piece.kind == Kind::Patched
                && let Ok(patches) = Patches::decode(bytes)
            {
                checked = Blob::check_patches(self.core, &piece.digest, patches)?;
            }
            if let Err(reason) = checked {
                self.core.set_bad(self.pack, offset);
                self.tell(
                    format!(
                        "{:?} {} in {}",
                        piece.kind,
                        piece.digest,
                        frame_name(self.pack, offset)
                    ),
                    reason,
                    vec![piece.digest],
                );
            }
        }
        Ok(())
    }
}

/// Verifies what can be said about a piece by itself.
fn check_piece(piece: &Piece, bytes: &[u8]) -> Result<(), String> {
    // The others' digest is of the file that they stand for.
    if !matches!(piece.kind, Kind::Recipe | Kind::Patched) {
        let found = Digest::of(bytes);
        if found != piece.digest {
            return Err(format!("its bytes have the digest {found}"));
        }
    }
    match piece.kind {
        Kind::Data => Ok(()),
        Kind::Directory => Directory::decode(bytes)
            .map(drop)
            .map_err(|error| error.to_string()),
        Kind::Recipe | Kind::RecipeNode => RecipeNode::new(bytes)?.check_ends(),
        Kind::Patched => Patches::decode(bytes).map(drop),
    }
}
