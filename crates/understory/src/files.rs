//! What several modules do with files.

use crate::{Error, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes written at once where a file system cannot reserve room.
const FILL_BYTES: u64 = 64 << 10;

/// Opens a file to read and write, made empty if it is not there: a lock, or what grows.
///
/// # Errors
/// I/O.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| Error::io("opening", path, e))
}

/// Keeps at least `bytes` of the disk in the file at `path`, to be given up when the disk is full. Where that cannot be had,
/// what is free stays free.
pub(crate) fn reserve(path: &Path, bytes: u64) {
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() >= bytes) {
        return;
    }
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path);
    let mut file = match file {
        Ok(file) => file,
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "no room is reserved");
            return;
        }
    };
    let before = file.metadata().map_or(0, |metadata| metadata.len());
    if let Err(error) = fill(&mut file, bytes) {
        tracing::debug!(%error, path = %path.display(), "no more room is reserved");
        let _ = match before {
            0 => fs::remove_file(path),
            len => file.set_len(len),
        };
    }
}

fn fill(file: &mut File, bytes: u64) -> std::io::Result<()> {
    match fallocate(&*file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    // Not zeros: a file system that compresses would keep none of them.
    let filler = [b'X'; FILL_BYTES as usize];
    let mut at = file.seek(SeekFrom::End(0))?;
    while at < bytes {
        let count = FILL_BYTES.min(bytes - at);
        file.write_all(&filler[..count as usize])?;
        at += count;
    }
    Ok(())
}

/// Removes a file; it need not be there.
///
/// # Errors
/// I/O.
pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("removing", path, error))
        }
        _ => Ok(()),
    }
}
