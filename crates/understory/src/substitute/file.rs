//! `file://`: a binary cache in a directory.

use super::files::{Attempts, Body, Broken, Context, Failure, Files};
use crate::Error;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

/// Lookups at a time: they wait for a disk or a network file system.
const PARALLEL: usize = 8;

/// The files of a directory.
pub(super) struct DirFiles {
    dir: PathBuf,
}

impl DirFiles {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }
    /// The file of a relative URL. One that leads out of the directory is refused.
    fn file(&self, url: &str) -> Result<PathBuf, Failure> {
        let path = Path::new(url);
        let is_plain = !url.contains("://")
            && path
                .components()
                .all(|component| matches!(component, Component::Normal(_)));
        if is_plain && !url.is_empty() {
            return Ok(self.dir.join(path));
        }
        Err(Failure::Final(Error::corrupt(format!(
            "the URL '{url}' does not lead into the binary cache {}",
            self.dir.display()
        ))))
    }
    fn open_file(&self, url: &str) -> Result<Option<(File, PathBuf)>, Failure> {
        let file = self.file(url)?;
        match File::open(&file) {
            Ok(open) => Ok(Some((open, file))),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(e) => Err(Failure::Final(Error::io("opening", file, e))),
        }
    }
}

impl Files for DirFiles {
    fn read(
        &self,
        name: &str,
        bytes_max: usize,
        _context: Context<'_>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let Some((open, file)) = self.open_file(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        open.take(bytes_max as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Failure::Final(Error::io("reading", &file, e)))?;
        if bytes.len() > bytes_max {
            return Err(Failure::Final(Error::corrupt(format!(
                "{}: expected at most {bytes_max} bytes",
                file.display()
            ))));
        }
        Ok(Some(bytes))
    }
    fn open<'a>(
        &'a self,
        url: &str,
        _attempts: &'a Attempts,
        _context: Context<'a>,
    ) -> Result<Option<Body<'a>>, Failure> {
        let Some((open, file)) = self.open_file(url)? else {
            return Ok(None);
        };
        let meta = open
            .metadata()
            .map_err(|e| Failure::Final(Error::io("reading", &file, e)))?;
        if !meta.is_file() {
            return Err(Failure::Final(Error::corrupt(format!(
                "{} is not a file",
                file.display()
            ))));
        }
        Ok(Some(Body {
            reader: Box::new(open),
            bytes: Some(meta.len()),
            broken: Broken::default(),
        }))
    }
    fn place(&self, url: &str) -> String {
        format!("file://{}", self.dir.join(url).display())
    }
    fn parallel(&self) -> usize {
        PARALLEL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_is_read() {
        let files = DirFiles::new(PathBuf::from("/cache"));
        for url in ["../x", "/etc/passwd", "a/../../x", "file:///x", "", "./x"] {
            assert!(files.file(url).is_err(), "{url}");
        }
        assert_eq!(
            files.file("nar/x.nar").unwrap(),
            Path::new("/cache/nar/x.nar")
        );
    }
}
