//! Build logs, where and as Nix keeps them: `LOG/drvs/<first two characters>/<rest of the base name>[.bz2]`. The old
//! flat `LOG/drvs/<base name>` is read, too.

use super::Overlay;
use crate::{Error, Result};
use bzip2::Compression;
use bzip2::read::BzDecoder;
use bzip2::write::BzEncoder;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use understory_nix::StorePath;

/// Longest log that is taken, before compression: as the castore has it.
const LOG_BYTES_MAX: u64 = crate::store::BUILD_LOG_BYTES_MAX;
/// Characters of the derivation's name that are the folder's.
const FOLDER_CHARS: usize = 2;

impl Overlay {
    /// Keeps the log of a build, as Nix does: one that is there stays.
    ///
    /// # Errors
    /// Reading `log` fails, it is too long, I/O.
    pub fn add_build_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<()> {
        let (folder, name) = self.log_place(drv);
        let path = folder.join(format!("{name}.bz2"));
        if super::merged::is_there(&path)? {
            // All of it is read, as from a client.
            std::io::copy(log, &mut std::io::sink())
                .map_err(|e| Error::environment("reading the build log").with_source(e))?;
            return Ok(());
        }
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("creating", &folder, e))?;
        let mut draft = tempfile::Builder::new()
            .prefix(&format!("{name}.bz2.tmp."))
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(&folder)
            .map_err(|e| Error::io("creating a file in", &folder, e))?;
        let mut encoder = BzEncoder::new(draft.as_file_mut(), Compression::default());
        let bytes = std::io::copy(&mut log.take(LOG_BYTES_MAX + 1), &mut encoder)
            .and_then(|bytes| encoder.finish().map(|_| bytes))
            .map_err(|e| Error::io("writing", &path, e))?;
        if bytes > LOG_BYTES_MAX {
            return Err(Error::user(format!(
                "the build log of '{drv}' is longer than {LOG_BYTES_MAX} bytes"
            )));
        }
        draft
            .persist(&path)
            .map_err(|e| Error::io("writing", &path, e.error))?;
        Ok(())
    }

    /// Opens the build log of `drv`, uncompressed: ours, else one of a castore below; `None` if there is none.
    ///
    /// # Errors
    /// I/O.
    pub fn build_log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>> {
        let (folder, name) = self.log_place(drv);
        let flat = self.inner.local.log.join("drvs").join(drv.base_name());
        let open = |path: PathBuf| match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("opening", path, error)),
        };
        for plain in [folder.join(&name), flat.clone()] {
            if let Some(file) = open(plain)? {
                return Ok(Some(Box::new(file)));
            }
        }
        let flat = PathBuf::from(format!("{}.bz2", flat.display()));
        for packed in [folder.join(format!("{name}.bz2")), flat] {
            if let Some(file) = open(packed)? {
                return Ok(Some(Box::new(BzDecoder::new(file))));
            }
        }
        for lower in &self.inner.lowers {
            if let Some(store) = lower.castore()
                && let Some(log) = store.build_log(drv)?
            {
                return Ok(Some(log));
            }
        }
        Ok(None)
    }

    fn log_place(&self, drv: &StorePath) -> (PathBuf, String) {
        let (folder, name) = drv.base_name().split_at(FOLDER_CHARS);
        let folder = self.inner.local.log.join("drvs").join(folder);
        (folder, name.to_owned())
    }
}
