//! dm-verity for an image: a hash tree in a file beside it, and the root hash that says whether image and tree are
//! what they were.
//!
//! `veritysetup format` (cryptsetup) makes the tree. Salt and UUID follow from the image's own UUID, which is a hash of
//! what is in it, so that equal images have equal trees and root hashes.
//!
//! Cost: the image is read once and hashed with SHA-256; the tree takes 1/128 of the image.

use super::{UnnamedImage, directory_of, persist};
use crate::{Error, Result};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `veritysetup` is when `PATH` of a user does not have it.
const PLACES: [&str; 2] = ["/usr/sbin/veritysetup", "/sbin/veritysetup"];
/// Hexadecimal digits of a root hash.
const ROOT_HASH_CHARS: usize = 64;

/// What dm-verity needs beside the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// The root hash in hexadecimal digits, also in the file beside the image that ends in `.roothash`.
    pub root_hash: String,
    /// The hash tree.
    pub tree: PathBuf,
}

/// Makes the hash tree `TARGET.verity` and `TARGET.roothash` of an image. Both are durable on return, before the image
/// gets its name.
///
/// # Errors
/// `veritysetup` is not installed or fails, a file is there already.
pub fn add_verity(image: &UnnamedImage) -> Result<Verity> {
    let beside = |suffix: &str| {
        let mut name = OsString::from(&image.target);
        name.push(suffix);
        PathBuf::from(name)
    };
    let (tree, root_file) = (beside(".verity"), beside(".roothash"));
    let dir = directory_of(&image.target);
    let temporary = || {
        tempfile::Builder::new()
            .prefix(".understory-verity-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(&dir)
            .map_err(|e| Error::io("creating a file in", &dir, e))
    };
    let hashes = temporary()?;
    let root_hash = format(image, hashes.path())?;
    hashes
        .as_file()
        .sync_all()
        .map_err(|e| Error::io("syncing", &tree, e))?;
    let mut root = temporary()?;
    std::io::Write::write_all(&mut root, format!("{root_hash}\n").as_bytes())
        .and_then(|()| root.as_file().sync_all())
        .map_err(|e| Error::io("writing", &root_file, e))?;
    persist(hashes, &tree, image.replace)?;
    persist(root, &root_file, image.replace)?;
    Ok(Verity { root_hash, tree })
}

fn format(image: &UnnamedImage, hashes: &Path) -> Result<String> {
    let salt = blake3::derive_key(
        "understory 2026-11 dm-verity salt",
        &image.report.figures.uuid,
    );
    let program = program();
    let output = Command::new(&program)
        .args(["format", "--hash=sha256", "--data-block-size=4096"])
        .args(["--hash-block-size=4096", "--format=1"])
        .arg(format!("--salt={}", data_encoding::HEXLOWER.encode(&salt)))
        .arg(format!("--uuid={}", image.report.uuid()))
        .arg(image.path())
        .arg(hashes)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            let missing = error.kind() == ErrorKind::NotFound;
            let error = Error::io("running", &program, error);
            match missing {
                true => error.with_hint(
                    "it comes with cryptsetup: `apt install cryptsetup-bin`, or leave out --verity",
                ),
                false => error,
            }
        })?;
    if !output.status.success() {
        return Err(Error::environment(format!(
            "{} format failed: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    root_hash(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
        Error::environment(format!(
            "{} format did not say `Root hash:` with {ROOT_HASH_CHARS} digits",
            program.display()
        ))
    })
}

fn program() -> PathBuf {
    let in_path = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| dir.join("veritysetup").is_file())
    });
    let place = PLACES
        .into_iter()
        .map(PathBuf::from)
        .find(|at| at.is_file());
    match place {
        Some(place) if !in_path => place,
        _ => PathBuf::from("veritysetup"),
    }
}

fn root_hash(output: &str) -> Option<String> {
    let value = output
        .lines()
        .find_map(|line| line.strip_prefix("Root hash:"))?
        .trim();
    let valid = value.len() == ROOT_HASH_CHARS && value.bytes().all(|b| b.is_ascii_hexdigit());
    valid.then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_hash_is_found_or_nothing_is() {
        let digits = "0f".repeat(32);
        let said = format!("VERITY header\nRoot hash:      \t{digits}\n");
        assert_eq!(root_hash(&said), Some(digits));
        assert_eq!(root_hash("Root hash: 00"), None);
        assert_eq!(root_hash(""), None);
    }
}
