//! Git's object hashes, for content addresses of method `git`.
//!
//! A blob is `blob <size>\0<contents>`; a tree is `tree <size>\0` and for each entry
//! `<octal mode> <name>\0<raw hash>`, sorted as if directory names ended in a slash.

use crate::hash::{Hash, HashAlgorithm, Hasher};
use crate::nar::{Event, NarError, Reader};
use std::io::BufRead;

/// What a tree entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GitMode {
    /// A file.
    Regular,
    /// An executable file.
    Executable,
    /// A symlink: a blob of its target.
    Symlink,
    /// A directory.
    Directory,
}

impl GitMode {
    /// Returns the mode as it stands in a tree.
    pub const fn as_octal(self) -> &'static str {
        match self {
            Self::Regular => "100644",
            Self::Executable => "100755",
            Self::Symlink => "120000",
            Self::Directory => "40000",
        }
    }
}

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitEntry {
    /// Raw bytes of its name.
    pub name: Box<[u8]>,
    /// What it is.
    pub mode: GitMode,
    /// Its object's hash.
    pub hash: Hash,
}

/// Returns a hasher that has seen the header of a blob of `size` bytes; feed it the contents
/// of a file or the target of a symlink.
pub fn git_blob_hasher(algorithm: HashAlgorithm, size: u64) -> Hasher {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(format!("blob {size}\0").as_bytes());
    hasher
}

/// Returns the hash of a tree. Sorts `entries` into Git's order.
pub fn git_tree_hash(algorithm: HashAlgorithm, entries: &mut [GitEntry]) -> Hash {
    entries.sort_by(|left, right| sort_key(left).cmp(sort_key(right)));
    let size: usize = entries
        .iter()
        .map(|entry| entry.mode.as_octal().len() + entry.name.len() + 2 + entry.hash.digest().len())
        .sum();
    let mut hasher = Hasher::new(algorithm);
    hasher.update(format!("tree {size}\0").as_bytes());
    for entry in entries {
        hasher.update(entry.mode.as_octal().as_bytes());
        hasher.update(b" ");
        hasher.update(&entry.name);
        hasher.update(b"\0");
        hasher.update(entry.hash.digest());
    }
    hasher.finish()
}

/// A directory of a NAR whose end was not seen: its name and its entries so far.
type OpenDirectory = (Option<Box<[u8]>>, Vec<GitEntry>);

/// Returns the Git hash of what a NAR holds, reading exactly the NAR from `stream`.
///
/// Memory: the entries of the directories that are open.
///
/// # Errors
/// Malformed archive, or the stream's error or early end.
pub fn git_hash_of_nar(stream: impl BufRead, algorithm: HashAlgorithm) -> Result<Hash, NarError> {
    let mut reader = Reader::new(stream);
    let mut open: Vec<OpenDirectory> = Vec::new();
    let mut root = Hash::of(algorithm, b"");
    loop {
        let (name, mode, hash) = match reader.next_event()? {
            Event::DirectoryBegin { name } => {
                open.push((name, Vec::new()));
                continue;
            }
            Event::DirectoryEnd => {
                let (name, mut entries) = open.pop().unwrap_or_default();
                (
                    name,
                    GitMode::Directory,
                    git_tree_hash(algorithm, &mut entries),
                )
            }
            Event::File {
                name,
                executable,
                size,
            } => {
                let mut hasher = git_blob_hasher(algorithm, size);
                loop {
                    let piece = reader.read_contents()?;
                    if piece.is_empty() {
                        break;
                    }
                    hasher.update(piece);
                }
                let mode = if executable {
                    GitMode::Executable
                } else {
                    GitMode::Regular
                };
                (name, mode, hasher.finish())
            }
            Event::Symlink { name, target } => {
                let mut hasher = git_blob_hasher(algorithm, target.len() as u64);
                hasher.update(&target);
                (name, GitMode::Symlink, hasher.finish())
            }
            Event::End => return Ok(root),
        };
        match (open.last_mut(), name) {
            (Some((_, entries)), Some(name)) => entries.push(GitEntry { name, mode, hash }),
            _ => root = hash,
        }
    }
}

fn sort_key(entry: &GitEntry) -> impl Iterator<Item = &u8> {
    let slash: &[u8] = if entry.mode == GitMode::Directory {
        b"/"
    } else {
        b""
    };
    entry.name.iter().chain(slash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_and_tree_are_as_git_makes_them() {
        let mut hasher = git_blob_hasher(HashAlgorithm::Sha1, 6);
        hasher.update(b"hello\n");
        let blob = hasher.finish();
        assert_eq!(blob.to_base16(), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(
            git_tree_hash(HashAlgorithm::Sha1, &mut []).to_base16(),
            "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
        );
    }

    #[test]
    fn directories_sort_as_if_they_ended_in_a_slash() {
        let hash = Hash::of(HashAlgorithm::Sha1, b"");
        let entry = |name: &[u8], mode| GitEntry {
            name: name.into(),
            mode,
            hash,
        };
        let mut entries = [
            entry(b"a", GitMode::Directory),
            entry(b"a.b", GitMode::Regular),
            entry(b"a0", GitMode::Executable),
        ];
        git_tree_hash(HashAlgorithm::Sha1, &mut entries);
        assert_eq!(
            entries.map(|entry| entry.name.to_vec()),
            [b"a.b".to_vec(), b"a".to_vec(), b"a0".to_vec()]
        );
    }
}
