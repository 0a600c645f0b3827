//! What several modules do with files.

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

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
