//! Hashes that are made while an archive or a tree goes by.

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::content_address::{GitEntry, GitMode, git_blob_hasher, git_tree_hash};
use understory_nix::hash::{HashModuloSink, Hasher};
use understory_nix::{Hash, HashAlgorithm, NarHash};

/// Which hash to make besides the NAR's SHA-256.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HashRequest {
    /// None.
    #[default]
    None,
    /// Of the NAR.
    Nar(HashAlgorithm),
    /// Of the NAR, modulo occurrences of this hash part.
    NarModulo(HashAlgorithm, [u8; 32]),
    /// Of the contents of the file that the root must be.
    Flat(HashAlgorithm),
    /// Git's, of the tree.
    Git(HashAlgorithm),
}

/// Takes the bytes of a NAR.
pub(crate) struct NarSink<'a> {
    sha256: Sha256,
    bytes: u64,
    other: RawHasher,
    progress: Option<&'a AtomicU64>,
}

enum RawHasher {
    None,
    /// The NAR's own SHA-256 is what was asked for.
    Same,
    Plain(Box<Hasher>),
    Modulo(Box<HashModuloSink>),
}

impl<'a> NarSink<'a> {
    pub(crate) fn new(request: HashRequest, progress: Option<&'a AtomicU64>) -> Self {
        let other = match request {
            HashRequest::Nar(HashAlgorithm::Sha256) => RawHasher::Same,
            HashRequest::Nar(algorithm) => RawHasher::Plain(Box::new(Hasher::new(algorithm))),
            HashRequest::NarModulo(algorithm, hash_part) => {
                RawHasher::Modulo(Box::new(HashModuloSink::new(algorithm, &hash_part)))
            }
            HashRequest::None | HashRequest::Flat(_) | HashRequest::Git(_) => RawHasher::None,
        };
        Self {
            sha256: Sha256::new(),
            bytes: 0,
            other,
            progress,
        }
    }

    pub(crate) fn update(&mut self, data: &[u8]) {
        self.sha256.update(data);
        self.bytes += data.len() as u64;
        match &mut self.other {
            RawHasher::None | RawHasher::Same => {}
            RawHasher::Plain(hasher) => hasher.update(data),
            RawHasher::Modulo(sink) => sink.update(data),
        }
        if let Some(progress) = self.progress {
            progress.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }

    /// SHA-256 and size of the NAR, and the hash asked for if it is one of the NAR.
    pub(crate) fn finish(self) -> (NarHash, u64, Option<Hash>) {
        let nar_hash = NarHash(self.sha256.finalize().into());
        let other = match self.other {
            RawHasher::None => None,
            RawHasher::Same => Some(nar_hash.to_hash()),
            RawHasher::Plain(hasher) => Some(hasher.finish()),
            RawHasher::Modulo(sink) => Some(sink.finish().0),
        };
        (nar_hash, self.bytes, other)
    }
}

impl Write for NarSink<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Takes the events of a tree, for hashes that are not of the NAR.
pub(crate) enum TreeHasher {
    None,
    Flat {
        algorithm: HashAlgorithm,
        hasher: Option<Box<Hasher>>,
        is_file: bool,
    },
    Git(Box<GitHasher>),
}

/// Git's hash of a tree.
pub(crate) struct GitHasher {
    algorithm: HashAlgorithm,
    /// Directories that are open, each with its name and what it holds so far.
    open: Vec<(Box<[u8]>, Vec<GitEntry>)>,
    file: Option<(Box<[u8]>, GitMode, Hasher)>,
    root: Option<Hash>,
}

impl GitHasher {
    fn add(&mut self, name: Box<[u8]>, mode: GitMode, hash: Hash) {
        match self.open.last_mut() {
            Some((_, entries)) => entries.push(GitEntry { name, mode, hash }),
            None => self.root = Some(hash),
        }
    }
}

fn owned(name: Option<&[u8]>) -> Box<[u8]> {
    name.unwrap_or_default().into()
}

impl TreeHasher {
    pub(crate) fn new(request: HashRequest) -> Self {
        match request {
            HashRequest::Flat(algorithm) => Self::Flat {
                algorithm,
                hasher: None,
                is_file: false,
            },
            HashRequest::Git(algorithm) => Self::Git(Box::new(GitHasher {
                algorithm,
                open: Vec::new(),
                file: None,
                root: None,
            })),
            _ => Self::None,
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        !matches!(self, Self::None)
    }

    pub(crate) fn directory_begin(&mut self, name: Option<&[u8]>) {
        if let Self::Git(git) = self {
            git.open.push((owned(name), Vec::new()));
        }
    }

    pub(crate) fn directory_end(&mut self) {
        if let Self::Git(git) = self
            && let Some((name, mut entries)) = git.open.pop()
        {
            let hash = git_tree_hash(git.algorithm, &mut entries);
            git.add(name, GitMode::Directory, hash);
        }
    }

    pub(crate) fn symlink(&mut self, name: Option<&[u8]>, target: &[u8]) {
        if let Self::Git(git) = self {
            let mut hasher = git_blob_hasher(git.algorithm, target.len() as u64);
            hasher.update(target);
            git.add(owned(name), GitMode::Symlink, hasher.finish());
        }
    }

    pub(crate) fn file_begin(&mut self, name: Option<&[u8]>, executable: bool, size: u64) {
        match self {
            Self::None => {}
            Self::Flat {
                algorithm,
                hasher,
                is_file,
            } => {
                *is_file = name.is_none();
                *hasher = Some(Box::new(Hasher::new(*algorithm)));
            }
            Self::Git(git) => {
                let mode = if executable {
                    GitMode::Executable
                } else {
                    GitMode::Regular
                };
                git.file = Some((owned(name), mode, git_blob_hasher(git.algorithm, size)));
            }
        }
    }

    pub(crate) fn contents(&mut self, data: &[u8]) {
        match self {
            Self::Flat {
                hasher: Some(hasher),
                is_file: true,
                ..
            } => hasher.update(data),
            Self::Git(git) => {
                if let Some((_, _, hasher)) = &mut git.file {
                    hasher.update(data);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn file_end(&mut self) {
        if let Self::Git(git) = self
            && let Some((name, mode, hasher)) = git.file.take()
        {
            git.add(name, mode, hasher.finish());
        }
    }

    pub(crate) fn finish(self) -> Result<Option<Hash>> {
        match self {
            Self::None => Ok(None),
            Self::Flat {
                hasher: Some(hasher),
                is_file: true,
                ..
            } => Ok(Some(hasher.finish())),
            Self::Flat { .. } => Err(Error::user(
                "a flat or text content address needs a regular file, found something else",
            )),
            Self::Git(git) => Ok(git.root),
        }
    }
}
