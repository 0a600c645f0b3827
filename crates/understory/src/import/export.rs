//! A stream of `nix-store --export`: NARs, each followed by what is known of its path.
//!
//! There is no NAR hash in it, so what is read is what becomes valid; signatures, registration time
//! and content address are not in it either. The stream is read by one thread; the castore hashes,
//! cuts and compresses on others.

use super::Selection;
use super::pipeline::{Finished, Message, Run, Shared};
use crate::nar::{self, ReadOptions};
use crate::{Error, Result};
use crossbeam_channel::Sender;
use std::io::{BufRead, BufReader, Read};
use understory_nix::export::{ExportError, Trailer, read_begin};
use understory_nix::{PathInfo, StoreDir};

/// Buffer in front of the stream: the size of a pipe.
const STREAM_BUFFER_BYTES: usize = 64 << 10;

/// Imports all that `stream` has.
pub(super) fn import(
    stream: Box<dyn Read + Send>,
    selection: &Selection,
    run: &mut Run<'_>,
) -> Result<()> {
    if *selection != Selection::All {
        return Err(Error::user(
            "a stream of `nix-store --export` can only be imported as a whole",
        )
        .with_hint("name the paths to `nix-store --export` instead"));
    }
    let dir = run.store.store_dir().clone();
    run.read_stream("import-export", move |shared, messages| {
        let mut stream = BufReader::with_capacity(STREAM_BUFFER_BYTES, stream);
        read_all(&mut stream, &dir, shared, messages)
    })
}

/// Reads paths until the end of the export or of the run.
fn read_all(
    stream: &mut dyn BufRead,
    dir: &StoreDir,
    shared: &Shared,
    messages: &Sender<Message>,
) -> Result<()> {
    let mut stream = Counting {
        inner: stream,
        bytes: 0,
    };
    while !shared.is_stopping() {
        let start = stream.bytes;
        let at = |error: Error| match shared.is_stopping() {
            // The cancelled archive.
            true => None,
            false => Some(
                Error::new(
                    error.kind(),
                    format!("reading the export, object at byte {start}"),
                )
                .with_source(error.chain()),
            ),
        };
        match read_one(&mut stream, dir, shared) {
            Ok(Some(finished)) => {
                if messages
                    .send(Message::Streamed(Box::new(finished)))
                    .is_err()
                {
                    return Ok(());
                }
            }
            Ok(None) => return Ok(()),
            Err(error) => return at(error).map_or(Ok(()), Err),
        }
    }
    Ok(())
}

fn read_one(
    stream: &mut Counting<'_>,
    dir: &StoreDir,
    shared: &Shared,
) -> Result<Option<Finished>> {
    if !read_begin(&mut *stream).map_err(export_error)? {
        return Ok(None);
    }
    // Path and references come behind the archive.
    let options = ReadOptions {
        masks: Some(&shared.masks),
        cancel: Some(&shared.stop),
        bytes: Some(&shared.bytes),
        ..ReadOptions::default()
    };
    let read = nar::read_nar_with(&shared.writer, stream, &options)?;
    let trailer = Trailer::read(&mut *stream, dir).map_err(export_error)?;
    let info = PathInfo {
        path: trailer.path,
        nar_hash: read.nar_hash,
        nar_size: read.nar_size,
        references: trailer.references,
        deriver: trailer.deriver,
        registration_time: 0,
        ultimate: false,
        signatures: Default::default(),
        ca: None,
    };
    Ok(Some(Finished {
        info,
        root: read.root,
    }))
}

fn export_error(error: ExportError) -> Error {
    let out = match &error {
        ExportError::Io(_) => Error::environment("the stream"),
        _ => return Error::user(error.to_string()),
    };
    out.with_source(error)
}

/// Counts what is consumed.
struct Counting<'a> {
    inner: &'a mut dyn BufRead,
    bytes: u64,
}

impl Read for Counting<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(out)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

impl BufRead for Counting<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        self.bytes += count as u64;
        self.inner.consume(count);
    }
}
