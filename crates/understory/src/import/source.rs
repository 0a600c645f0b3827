//! Where paths come from, and how that is written.

use super::{CacheSource, LocalSource};
use crate::{Error, Result, Store};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A source of paths.
pub enum Source {
    /// A Nix store on this machine.
    Local(LocalSource),
    /// A binary cache on this machine.
    Cache(CacheSource),
    /// What `nix-store --export` writes.
    Export(Box<dyn Read + Send>),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(local) => local.fmt(f),
            Self::Cache(cache) => cache.fmt(f),
            Self::Export(_) => f.write_str("Export"),
        }
    }
}

impl Source {
    /// Reads a source as a user gives it:
    /// - `/` or a directory with `nix/var/nix/db/db.sqlite` below it: a local store;
    /// - `local`, `local?root=…`, with `root`, `real`, `state` and `store`: the same as a Nix URL;
    /// - `file://DIR`, or a directory with `nix-cache-info`: a binary cache;
    /// - `-` (stdin) or a regular file: a stream of `nix-store --export`.
    ///
    /// # Errors
    /// It is none of that.
    pub fn parse(text: &str) -> Result<Self> {
        if text == "-" {
            return Ok(Self::Export(Box::new(std::io::stdin())));
        }
        let (address, query) = text.split_once('?').unwrap_or((text, ""));
        if address == "local" {
            return Ok(Self::Local(LocalSource::from_query(None, query)?));
        }
        if let Some((scheme, rest)) = address.split_once("://") {
            return match scheme {
                "local" => {
                    let root = (!rest.is_empty()).then(|| decode(rest)).transpose()?;
                    Ok(Self::Local(LocalSource::from_query(root, query)?))
                }
                "file" => {
                    let dir = PathBuf::from(decode(rest)?);
                    if !dir.is_absolute() {
                        return Err(Error::user(format!("the path in '{text}' is not absolute")));
                    }
                    Ok(Self::Cache(CacheSource::new(dir)))
                }
                _ => Err(unsupported(&format!(
                    "{text}: scheme `{scheme}` is not supported"
                ))),
            };
        }
        if matches!(text, "auto" | "daemon") {
            return Err(unsupported(text));
        }
        Self::of_path(Path::new(text))
    }

    /// [`Source::parse`], and refuses what cannot go into `store` as early as possible.
    ///
    /// # Errors
    /// As [`Source::parse`]; another store directory.
    pub fn open(text: &str, store: &Store) -> Result<Self> {
        let source = Self::parse(text)?;
        match &source {
            Self::Local(local) => local.check_named_store_dir(store.store_dir())?,
            Self::Cache(cache) => cache.check_store_dir(store.store_dir())?,
            Self::Export(_) => {}
        }
        Ok(source)
    }

    fn of_path(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io("opening", path, e))?;
        if metadata.is_dir() {
            if path.join("nix-cache-info").exists() {
                return Ok(Self::Cache(CacheSource::new(path.to_owned())));
            }
            let local = LocalSource::at_root(path);
            if local.database().exists() {
                return Ok(Self::Local(local));
            }
            return Err(Error::user(format!(
                "there is no local Nix store here: {} is not there",
                local.database().display()
            ))
            .with_hint(
                "a binary cache has a file nix-cache-info; `local?real=DIR&state=DIR` names a Nix store that is laid out otherwise",
            ));
        }
        let file = File::open(path).map_err(|e| Error::io("opening", path, e))?;
        Ok(Self::Export(Box::new(file)))
    }
}

fn unsupported(text: &str) -> Error {
    Error::user(format!("cannot import from {text}")).with_hint(
        "sources are a local Nix store (`/`, a root directory, `local?root=DIR`), a `file://` binary cache \
         and `nix-store --export` on stdin (`-`); from elsewhere, `nix copy --to` a daemon of this store",
    )
}

/// Undoes percent-encoding.
pub(crate) fn decode(text: &str) -> Result<OsString> {
    let bad = || Error::user(format!("invalid percent-encoding in '{text}'"));
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || -> Result<u8> {
            let digit = bytes.next().and_then(|b| char::from(b).to_digit(16));
            // Below 16.
            digit.map(|d| d as u8).ok_or_else(bad)
        };
        out.push(digit()? << 4 | digit()?);
    }
    Ok(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(text: &str) -> LocalSource {
        match Source::parse(text).unwrap() {
            Source::Local(local) => local,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn local_stores() {
        let l = local("local");
        assert_eq!(
            (l.real.to_str().unwrap(), l.state.to_str().unwrap()),
            ("/nix/store", "/nix/var/nix")
        );
        let l = local("local?root=/a%20b&trusted=true");
        assert_eq!(l.real, Path::new("/a b/nix/store"));
        assert_eq!(l.database(), Path::new("/a b/nix/var/nix/db/db.sqlite"));
        assert_eq!(local("local:///a%20b").state, l.state);
        let l = local("local?store=/t/store&real=/r&state=/s");
        assert_eq!(l.store_dir.as_ref().unwrap().as_str(), "/t/store");
        assert_eq!((l.real, l.state), ("/r".into(), "/s".into()));
        assert_eq!(
            local("local?store=/t/store").real,
            Path::new("/t/store"),
            "as in Nix"
        );
        assert_eq!(
            local("local?root=/x&store=/t/store").real,
            Path::new("/x/nix/store"),
            "as in Nix"
        );
    }

    #[test]
    fn directories_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().to_str().unwrap();
        let error = Source::parse(text).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "there is no local Nix store here: {text}/nix/var/nix/db/db.sqlite is not there"
            )
        );
        std::fs::create_dir_all(dir.path().join("nix/var/nix/db")).unwrap();
        std::fs::write(dir.path().join("nix/var/nix/db/db.sqlite"), "").unwrap();
        assert_eq!(local(text).real, dir.path().join("nix/store"));
        std::fs::write(dir.path().join("nix-cache-info"), "").unwrap();
        assert!(matches!(Source::parse(text).unwrap(), Source::Cache(_)));
        assert!(matches!(
            Source::parse(&format!("file://{text}?priority=3")).unwrap(),
            Source::Cache(_)
        ));
        let file = dir.path().join("nix-cache-info");
        assert!(matches!(
            Source::parse(file.to_str().unwrap()).unwrap(),
            Source::Export(_)
        ));
    }

    #[test]
    fn what_is_no_source() {
        let message = |text| Source::parse(text).unwrap_err().to_string();
        assert_eq!(message("daemon"), "cannot import from daemon");
        assert_eq!(
            message("https://x"),
            "cannot import from https://x: scheme `https` is not supported"
        );
        assert_eq!(
            message("local?root=%x1"),
            "invalid percent-encoding in '%x1'"
        );
        assert_eq!(
            message("file://x"),
            "the path in 'file://x' is not absolute"
        );
        assert_eq!(message("/does/not/exist"), "opening /does/not/exist");
    }
}
