//! Build logs: `log/drvs/<first two characters>/<rest of the derivation's base name>.zst`, one zstd
//! frame each. A log is whole or not there.

use super::Store;
use super::create::{log_name, sync_dir};
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Read;
use understory_nix::StorePath;

/// Longest log that is taken, before compression. Nix has no limit; logs beyond this are runaways.
pub const BUILD_LOG_BYTES_MAX: u64 = 4 << 30;
/// zstd level: logs are written once and rarely read.
const LEVEL: i32 = 9;

impl Store {
    /// Records a build log (`drv` is the derivation), compressed. Replaces an older one.
    ///
    /// # Errors
    /// Reading `log` fails, it is longer than [`BUILD_LOG_BYTES_MAX`], I/O.
    pub fn add_build_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<()> {
        self.check_writable()?;
        let (folder, name) = log_name(drv);
        let folder = self.dir().join(folder);
        fs::create_dir_all(&folder).map_err(|e| Error::io("creating", &folder, e))?;
        let mut draft = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempfile_in(&folder)
            .map_err(|e| Error::io("creating a file in", &folder, e))?;
        let path = folder.join(name);
        let mut write = |draft: &mut File| -> std::io::Result<u64> {
            let mut encoder = zstd::Encoder::new(draft, LEVEL)?;
            let bytes = std::io::copy(&mut log.take(BUILD_LOG_BYTES_MAX + 1), &mut encoder)?;
            encoder.finish()?.sync_all()?;
            Ok(bytes)
        };
        let bytes = write(draft.as_file_mut()).map_err(|e| Error::io("writing", &path, e))?;
        if bytes > BUILD_LOG_BYTES_MAX {
            return Err(Error::user(format!(
                "the build log of '{drv}' is longer than {BUILD_LOG_BYTES_MAX} bytes"
            )));
        }
        draft
            .persist(&path)
            .map_err(|e| Error::io("writing", &path, e.error))?;
        sync_dir(&folder)
    }

    /// Opens the build log of `drv`, uncompressed; `None` if there is none.
    ///
    /// # Errors
    /// I/O.
    pub fn build_log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>> {
        let (folder, name) = log_name(drv);
        let path = self.dir().join(folder).join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("opening", path, error)),
        };
        let decoder = zstd::Decoder::new(file).map_err(|e| Error::io("reading", path, e))?;
        Ok(Some(Box::new(decoder)))
    }
}
