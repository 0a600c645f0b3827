//! Walks the frames of a pack by their headers.
//!
//! Where no frame begins although bytes follow, two things may be behind it: the tail of a pack was
//! torn by a crash (or is being written this moment), or stored bytes were damaged. The difference
//! is whether a sound frame follows: [`Tail`] says so, and only a torn tail may be cut.

use crate::error::{CastoreError, IoContext};
use crate::pack::{
    self, FRAME_FIXED_BYTES, FRAME_MAGIC, FrameHeader, PACK_HEADER_BYTES, PackId, Piece,
    TRAILER_BYTES, Trailer,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes read at once for a header: the fixed part and a table of 112 pieces.
const HEADER_READ_BYTES: usize = 4096;
/// Bytes read at once where the next frame is searched.
const SEARCH_BYTES: usize = 1 << 20;

/// What stands behind the last sound frame of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Nothing.
    Clean,
    /// Bytes that are no frame, and none after them.
    Torn(String),
    /// Bytes that are no frame, and a sound frame at this offset.
    Damaged { reason: String, next: u64 },
}

/// One frame as a scan sees it.
pub(crate) struct Scanned {
    pub(crate) offset: u64,
    pub(crate) header: FrameHeader,
    pub(crate) pieces: Vec<Piece>,
}

/// Reads a frame's header at `offset` of a pack of `end` bytes. `Err(Ok(reason))`: there is none.
pub(crate) fn header_at(
    file: &File,
    path: &Path,
    offset: u64,
    end: u64,
    buffer: &mut Vec<u8>,
) -> Result<Scanned, Result<String, CastoreError>> {
    let read = |buffer: &mut [u8], at: u64| {
        file.read_exact_at(buffer, at)
            .verb("reading", path)
            .map_err(Err)
    };
    if offset > u64::from(u32::MAX) {
        return Err(Ok("expected no frame behind 4 GiB".to_owned()));
    }
    let left = end.saturating_sub(offset);
    let first = left.min(HEADER_READ_BYTES as u64) as usize;
    buffer.resize(first, 0);
    read(buffer, offset)?;
    let header = FrameHeader::decode(buffer).map_err(Ok)?;
    if header.frame_len() as u64 > left {
        return Err(Ok(format!(
            "expected a frame of {} bytes, found {left}",
            header.frame_len()
        )));
    }
    let have = buffer.len();
    buffer.resize(header.header_len(), 0);
    if buffer.len() > have {
        read(&mut buffer[have..], offset + have as u64)?;
    }
    let pieces = pack::decode_frame_table(&header, buffer).map_err(Ok)?;
    Ok(Scanned {
        offset,
        header,
        pieces,
    })
}

/// Walks the frames from `from` up to `end`; returns where the sound ones end and what follows.
/// A frame that ends behind `payloads_from` is sound only if its payload's checksum is right.
pub(crate) fn frames(
    file: &File,
    path: &Path,
    from: u64,
    end: u64,
    payloads_from: u64,
    on_frame: &mut dyn FnMut(Scanned) -> Result<(), CastoreError>,
) -> Result<(u64, Tail), CastoreError> {
    let mut offset = from;
    let mut buffer = Vec::new();
    while offset < end {
        let frame = match header_at(file, path, offset, end, &mut buffer) {
            Ok(frame) => frame,
            Err(Err(error)) => return Err(error),
            Err(Ok(reason)) => return tail(file, path, offset, end, reason),
        };
        if offset + frame.header.frame_len() as u64 > payloads_from {
            let at = offset + frame.header.header_len() as u64;
            buffer.resize(frame.header.stored_len as usize, 0);
            file.read_exact_at(&mut buffer, at).verb("reading", path)?;
            if let Err(reason) = pack::check_payload(&frame.header, &buffer) {
                return tail(file, path, offset, end, reason);
            }
        }
        offset += frame.header.frame_len() as u64;
        on_frame(frame)?;
    }
    Ok((offset, Tail::Clean))
}

fn tail(
    file: &File,
    path: &Path,
    offset: u64,
    end: u64,
    reason: String,
) -> Result<(u64, Tail), CastoreError> {
    Ok((
        offset,
        match next_frame(file, path, offset + 1, end)? {
            Some(next) => Tail::Damaged { reason, next },
            None => Tail::Torn(reason),
        },
    ))
}

/// Searches the next sound frame header.
pub(crate) fn next_frame(
    file: &File,
    path: &Path,
    from: u64,
    end: u64,
) -> Result<Option<u64>, CastoreError> {
    let mut window = Vec::new();
    let mut buffer = Vec::new();
    let mut start = from;
    while start + (FRAME_FIXED_BYTES as u64) < end {
        window.resize((end - start).min(SEARCH_BYTES as u64) as usize, 0);
        file.read_exact_at(&mut window, start)
            .verb("reading", path)?;
        for (at, bytes) in window.windows(FRAME_MAGIC.len()).enumerate() {
            if bytes == FRAME_MAGIC {
                match header_at(file, path, start + at as u64, end, &mut buffer) {
                    Ok(frame) => return Ok(Some(frame.offset)),
                    Err(Ok(_)) => {}
                    Err(Err(error)) => return Err(error),
                }
            }
        }
        // The magic may lie across the border of two windows.
        let step = window.len() - (FRAME_MAGIC.len() - 1);
        start += step as u64;
    }
    Ok(None)
}

/// Reads and checks the header of a pack.
pub(crate) fn check_header(
    file: &File,
    path: &Path,
    id: PackId,
    len: u64,
) -> Result<Result<(), String>, CastoreError> {
    let mut header = vec![0; len.min(PACK_HEADER_BYTES as u64) as usize];
    file.read_exact_at(&mut header, 0).verb("reading", path)?;
    Ok(pack::check_pack_header(&header, id))
}

/// Reads the trailer of a pack of `len` bytes, if it is sealed.
pub(crate) fn trailer(file: &File, path: &Path, len: u64) -> Result<Option<Trailer>, CastoreError> {
    if len < (PACK_HEADER_BYTES + pack::FOOTER_HEADER_BYTES + TRAILER_BYTES) as u64 {
        return Ok(None);
    }
    let mut bytes = [0; TRAILER_BYTES];
    file.read_exact_at(&mut bytes, len - TRAILER_BYTES as u64)
        .verb("reading", path)?;
    Ok(Trailer::decode(&bytes, len))
}
