//! The stream of `nix-store --export`: NARs, each with a trailer.
//!
//! ```text
//! export  = { u64 1, NAR, trailer } u64 0
//! trailer = u64 0x4558494e ("NIXE"), string path, u64 count, count × string reference,
//!           string deriver (empty: none), u64 0 (1: a signature of old follows, a string)
//! ```
//! Paths are full paths. Checked against Nix 2.34.8 and 2.26.3.

use crate::store_path::{StoreDir, StorePath, StorePathError};
use std::collections::BTreeSet;
use std::io::{self, Read, Write};

/// Stands between a NAR and the rest of its trailer.
pub const MAGIC: u64 = 0x4558_494e;
/// Longest path in bytes: Linux' `PATH_MAX`.
const PATH_BYTES_MAX: u64 = 4096;
/// Most references of one path: ten times what the largest closures of nixpkgs have.
const REFERENCES_MAX: u64 = 1 << 20;
/// Longest signature of old in bytes; it is read and thrown away.
const SIGNATURE_BYTES_MAX: u64 = 1 << 20;

/// What follows a NAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trailer {
    /// The path.
    pub path: StorePath,
    /// Its references, itself included if it refers to itself.
    pub references: BTreeSet<StorePath>,
    /// The derivation that made it.
    pub deriver: Option<StorePath>,
}

impl Trailer {
    /// Reads what follows a NAR, and not a byte more.
    ///
    /// # Errors
    /// The stream's, a wrong magic number, a path that is none, a limit passed.
    pub fn read(mut stream: impl Read, dir: &StoreDir) -> Result<Self, ExportError> {
        let magic = read_u64(&mut stream)?;
        if magic != MAGIC {
            return Err(ExportError::Malformed(format!(
                "expected magic number {MAGIC:#x} after a NAR, found {magic:#x}"
            )));
        }
        let path = dir.parse(&read_string(&mut stream, "a path", PATH_BYTES_MAX)?)?;
        let count = read_u64(&mut stream)?;
        if count > REFERENCES_MAX {
            return Err(ExportError::Malformed(format!(
                "expected at most {REFERENCES_MAX} references of '{path}', found {count}"
            )));
        }
        let mut references = BTreeSet::new();
        for _ in 0..count {
            references.insert(dir.parse(&read_string(
                &mut stream,
                "a reference",
                PATH_BYTES_MAX,
            )?)?);
        }
        let deriver = match &read_string(&mut stream, "a deriver", PATH_BYTES_MAX)?[..] {
            [] => None,
            text => Some(dir.parse(text)?),
        };
        if read_u64(&mut stream)? == 1 {
            read_string(&mut stream, "a signature", SIGNATURE_BYTES_MAX)?;
        }
        Ok(Self {
            path,
            references,
            deriver,
        })
    }

    /// Writes what follows a NAR.
    ///
    /// # Errors
    /// The stream's.
    pub fn write(&self, mut stream: impl Write, dir: &StoreDir) -> io::Result<()> {
        let mut out = MAGIC.to_le_bytes().to_vec();
        put_string(&mut out, &dir.print(&self.path));
        out.extend_from_slice(&(self.references.len() as u64).to_le_bytes());
        for reference in &self.references {
            put_string(&mut out, &dir.print(reference));
        }
        put_string(
            &mut out,
            &self
                .deriver
                .as_ref()
                .map(|path| dir.print(path))
                .unwrap_or_default(),
        );
        out.extend_from_slice(&0_u64.to_le_bytes());
        stream.write_all(&out)
    }
}

/// Reads what stands before a NAR; false at the end of the export.
///
/// # Errors
/// The stream's, or neither 0 nor 1.
pub fn read_begin(mut stream: impl Read) -> Result<bool, ExportError> {
    match read_u64(&mut stream)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(ExportError::Malformed(format!(
            "input doesn't look like something created by 'nix-store --export': expected 0 or 1, found {other}"
        ))),
    }
}

/// Writes what stands before a NAR.
///
/// # Errors
/// The stream's.
pub fn write_begin(mut stream: impl Write) -> io::Result<()> {
    stream.write_all(&1_u64.to_le_bytes())
}

/// Writes the end of the export.
///
/// # Errors
/// The stream's.
pub fn write_end(mut stream: impl Write) -> io::Result<()> {
    stream.write_all(&0_u64.to_le_bytes())
}

/// Why an export cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// It breaks a rule.
    #[error("malformed export: {0}")]
    Malformed(String),
    /// A path that is none.
    #[error(transparent)]
    Path(#[from] StorePathError),
    /// The stream failed or ended early.
    #[error("export stream")]
    Io(#[from] io::Error),
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn read_string(stream: &mut impl Read, what: &str, bytes_max: u64) -> Result<Vec<u8>, ExportError> {
    let len = read_u64(stream)?;
    if len > bytes_max {
        return Err(ExportError::Malformed(format!(
            "expected at most {bytes_max} bytes for {what}, found {len}"
        )));
    }
    // Both limits are far below the address space.
    let mut bytes = vec![0; len.next_multiple_of(8) as usize];
    stream.read_exact(&mut bytes)?;
    if bytes[len as usize..].iter().any(|&byte| byte != 0) {
        return Err(ExportError::Malformed(format!(
            "non-zero padding after {what}"
        )));
    }
    bytes.truncate(len as usize);
    Ok(bytes)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{StorePathHash, StorePathName};
    use proptest::prelude::*;

    fn trailer() -> Trailer {
        let path = StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools").unwrap();
        Trailer {
            references: [path.clone()].into(),
            deriver: None,
            path,
        }
    }

    #[test]
    fn a_whole_export() {
        let dir = StoreDir::default();
        let mut out = Vec::new();
        for _ in 0..2 {
            write_begin(&mut out).unwrap();
            let mut nar = crate::nar::Writer::new(&mut out);
            nar.symlink(None, b"t").unwrap();
            nar.finish().unwrap();
            trailer().write(&mut out, &dir).unwrap();
        }
        write_end(&mut out).unwrap();
        out.extend_from_slice(b"rest");
        let mut rest = &out[..];
        for _ in 0..2 {
            assert!(read_begin(&mut rest).unwrap());
            crate::nar::copy(&mut rest, io::sink()).unwrap();
            assert_eq!(Trailer::read(&mut rest, &dir).unwrap(), trailer());
        }
        assert!(!read_begin(&mut rest).unwrap());
        assert_eq!(rest, b"rest");
    }

    #[test]
    fn a_signature_of_old_is_skipped() {
        let mut out = Vec::new();
        trailer().write(&mut out, &StoreDir::default()).unwrap();
        let len = out.len();
        out[len - 8] = 1;
        put_string(&mut out, "signature");
        let mut rest = &out[..];
        assert_eq!(
            Trailer::read(&mut rest, &StoreDir::default()).unwrap(),
            trailer()
        );
        assert!(rest.is_empty());
    }

    #[test]
    fn refuses() {
        assert_eq!(
            read_begin(&b"nix-archive-1"[..]).unwrap_err().to_string(),
            "malformed export: input doesn't look like something created by 'nix-store --export': \
             expected 0 or 1, found 7521981564339120494"
        );
        let message = |bytes: &[u8]| {
            Trailer::read(bytes, &StoreDir::default())
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            message(&[0; 8]),
            "malformed export: expected magic number 0x4558494e after a NAR, found 0x0"
        );
        let huge = [MAGIC.to_le_bytes(), [0xff; 8]].concat();
        assert_eq!(
            message(&huge),
            "malformed export: expected at most 4096 bytes for a path, found 18446744073709551615"
        );
        assert_eq!(message(&MAGIC.to_le_bytes()), "export stream");
    }

    proptest! {
        #[test]
        fn round_trip(hashes in proptest::collection::vec(any::<[u8; 20]>(), 1..5), with_deriver: bool) {
            let path = |hash: &[u8; 20]| StorePath::from_parts(StorePathHash(*hash), &StorePathName::new("n").unwrap());
            let trailer = Trailer {
                path: path(&hashes[0]),
                references: hashes[1..].iter().map(path).collect(),
                deriver: with_deriver.then(|| path(&hashes[0])),
            };
            let dir = StoreDir::new("/some/store").unwrap();
            let mut out = Vec::new();
            trailer.write(&mut out, &dir).unwrap();
            prop_assert_eq!(Trailer::read(&out[..], &dir).unwrap(), trailer);
        }

        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let bytes = [&MAGIC.to_le_bytes()[..], &bytes].concat();
            let _ = Trailer::read(&bytes[..], &StoreDir::default());
        }
    }
}
