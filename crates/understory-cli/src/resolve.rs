//! Store path arguments: full paths, base names, hash parts, symlinks to them, and what is below.

use crate::error::{CommandError, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use understory::Store;
use understory::store::StoredPath;
use understory_castore::{Castore, Node};
use understory_nix::StorePath;

/// Length of a hash part in characters.
const HASH_PART_LEN: usize = 32;

/// A valid path, and perhaps something below it.
pub(crate) struct Target {
    pub(crate) stored: Arc<StoredPath>,
    /// Without slashes at either end.
    pub(crate) below: Vec<u8>,
}

/// Resolves an argument.
///
/// # Errors
/// Not a store path, or not valid.
pub(crate) fn target(store: &Store, argument: &OsStr) -> Result<Target> {
    let (path, below) = parse(store, argument)?;
    let stored = store.path(&path)?.ok_or_else(|| not_valid(store, &path))?;
    let below = trim_slashes(&below).to_vec();
    Ok(Target { stored, below })
}

/// Resolves an argument that must be a store path itself.
pub(crate) fn path(store: &Store, argument: &OsStr) -> Result<Arc<StoredPath>> {
    let target = target(store, argument)?;
    if target.below.is_empty() {
        return Ok(target.stored);
    }
    let text = argument.to_string_lossy();
    Err(CommandError::failed(format!(
        "{text} is below a store path; the store path itself is expected"
    ))
    .hint(format!(
        "use {}",
        store.store_dir().print(&target.stored.info.path)
    )))
}

/// Resolves several.
pub(crate) fn paths(
    store: &Store,
    arguments: &[std::ffi::OsString],
) -> Result<Vec<Arc<StoredPath>>> {
    arguments.iter().map(|a| path(store, a)).collect()
}

/// `path '…' is not valid`, as Nix says it.
pub(crate) fn not_valid(store: &Store, path: &StorePath) -> CommandError {
    CommandError::failed(format!(
        "path '{}' is not valid",
        store.store_dir().print(path)
    ))
    .hint("it is not in this store: add it with `understory import` or `understory add`")
}

fn parse(store: &Store, argument: &OsStr) -> Result<(StorePath, Vec<u8>)> {
    let bytes = argument.as_bytes();
    let dir = store.store_dir();
    if Path::new(argument).starts_with(dir.as_str()) {
        let (path, below) = dir.parse_below(bytes)?;
        return Ok((path, below.to_vec()));
    }
    let (first, below) = match bytes.iter().position(|b| *b == b'/') {
        Some(at) => bytes.split_at(at),
        None => (bytes, &[][..]),
    };
    if let Ok(text) = std::str::from_utf8(first) {
        if text.len() == HASH_PART_LEN
            && text
                .bytes()
                .all(|b| understory_nix::nix32::ALPHABET.contains(&b))
        {
            return match store.path_from_hash_part(text)? {
                Some(path) => Ok((path, below.to_vec())),
                None => Err(CommandError::failed(format!(
                    "no valid path has the hash part {text}"
                ))),
            };
        }
        if text.len() > HASH_PART_LEN
            && text.as_bytes()[HASH_PART_LEN] == b'-'
            && let Ok(path) = StorePath::from_base_name(text)
        {
            return Ok((path, below.to_vec()));
        }
    }
    // A symlink such as ./result, or a path through a mount of this store.
    if let Ok(real) = std::fs::canonicalize(argument) {
        if real.starts_with(dir.as_str()) {
            let (path, below) = dir.parse_below(real.as_os_str().as_bytes())?;
            return Ok((path, below.to_vec()));
        }
        if let Ok(rest) = real.strip_prefix(store.dir()) {
            let mut parts = rest.components().skip(1).map(|c| c.as_os_str());
            if let Some(path) =
                parts.find_map(|name| StorePath::from_base_name(name.to_str()?).ok())
            {
                let below: std::path::PathBuf = parts.collect();
                return Ok((path, below.into_os_string().into_encoded_bytes()));
            }
        }
    }
    let text = argument.to_string_lossy();
    Err(
        CommandError::failed(format!("{text} is not a store path")).hint(format!(
            "name it as {}/<hash>-<name>, as <hash>-<name> or by its hash part",
            dir.as_str()
        )),
    )
}

/// Walks from `root` down to `below`; symlinks are not followed.
///
/// # Errors
/// Nothing there; something on the way is not a directory.
pub(crate) fn node(castore: &Castore, root: &Node, path: &str, below: &[u8]) -> Result<Node> {
    let mut node = root.clone();
    let mut at = path.to_owned();
    for name in below
        .split(|b| *b == b'/')
        .filter(|n| !n.is_empty() && *n != b".")
    {
        let next = match &node {
            Node::Directory { digest, .. } => castore.directory(digest)?.get(name).cloned(),
            Node::Symlink { target } => {
                return Err(CommandError::failed(format!("{at} is a symlink"))
                    .hint(format!("it points to {}", String::from_utf8_lossy(target))));
            }
            Node::File { .. } => {
                return Err(CommandError::failed(format!("{at} is not a directory")));
            }
        };
        at.push('/');
        at.push_str(&String::from_utf8_lossy(name));
        node = next.ok_or_else(|| CommandError::failed(format!("{at} does not exist")))?;
    }
    Ok(node)
}

fn trim_slashes(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|b| *b != b'/').unwrap_or(bytes.len());
    let end = bytes
        .iter()
        .rposition(|b| *b != b'/')
        .map_or(start, |i| i + 1);
    &bytes[start..end]
}
