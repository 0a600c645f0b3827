//! NAR, Nix's archive format, streamed: nothing holds a whole file in memory.
//!
//! Limits (Nix 2.34): depth < 64, names 1 to 255 bytes, symlink targets 1 to 4095 bytes without NUL.
//! Names are raw bytes, strictly increasing. Both the reader and the writer enforce all of it.
//!
//! A string is its length (u64, little endian), its bytes, and NUL up to a multiple of 8:
//!
//! ```text
//! archive   = "nix-archive-1" node
//! node      = "(" "type" ( regular | symlink | directory ) ")"
//! regular   = "regular" [ "executable" "" ] "contents" <bytes>
//! symlink   = "symlink" "target" <bytes>
//! directory = "directory" { "entry" "(" "name" <bytes> "node" node ")" }
//! ```
//!
//! Cost of an entry: the strings between two variable parts always follow each other, so they
//! are read and compared (or copied out) as one block; a small file costs five reads of the
//! stream's buffer, and one allocation for its name. Contents are never copied by the reader.

mod reader;
mod writer;

pub use reader::Reader;
pub use writer::Writer;

use std::io::{self, BufRead, Write};

/// Greatest depth of a node, exclusive; the root's is 0.
pub const DEPTH_MAX: usize = 64;
/// Longest name in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest symlink target in bytes.
pub const TARGET_BYTES_MAX: usize = 4095;

/// One step of an archive. Names are `None` for the root node only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A directory begins; its entries follow, then [`Event::DirectoryEnd`].
    DirectoryBegin {
        /// Its name in the directory around it.
        name: Option<Box<[u8]>>,
    },
    /// The innermost open directory ends.
    DirectoryEnd,
    /// A regular file begins; its `size` bytes must be read before the next event.
    File {
        /// Its name.
        name: Option<Box<[u8]>>,
        /// The executable bit.
        executable: bool,
        /// Bytes of contents.
        size: u64,
    },
    /// A symlink.
    Symlink {
        /// Its name.
        name: Option<Box<[u8]>>,
        /// Its target.
        target: Box<[u8]>,
    },
    /// The archive is complete; nothing past it was consumed from the stream.
    End,
}

/// Why an archive cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NarError {
    /// The archive breaks a rule.
    #[error("malformed NAR at byte {offset}: {reason}")]
    Malformed {
        /// Offset in the archive.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The stream failed.
    #[error("NAR stream")]
    Io(#[from] io::Error),
}

/// Reads one archive and writes it again, which checks it. Returns the writer's stream.
///
/// # Errors
/// Malformed archive, or an error of either stream.
pub fn copy<R: BufRead, W: Write>(from: R, to: W) -> Result<W, NarError> {
    let mut reader = Reader::new(from);
    let mut writer = Writer::new(to);
    loop {
        match reader.next_event()? {
            Event::DirectoryBegin { name } => writer.directory_begin(name.as_deref())?,
            Event::DirectoryEnd => writer.directory_end()?,
            Event::Symlink { name, target } => writer.symlink(name.as_deref(), &target)?,
            Event::File {
                name,
                executable,
                size,
            } => {
                writer.file(name.as_deref(), executable, size)?;
                loop {
                    let piece = reader.read_contents()?;
                    if piece.is_empty() {
                        break;
                    }
                    writer.contents(piece)?;
                }
            }
            Event::End => return writer.finish(),
        }
    }
}

/// Returns how many NUL bytes follow `len` bytes of a string.
const fn padding(len: u64) -> usize {
    ((8 - len % 8) % 8) as usize
}

/// Lays strings out as they stand in an archive; `N` is the sum of their sizes.
const fn block<const N: usize>(tags: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    let mut at = 0;
    let mut index = 0;
    while index < tags.len() {
        let tag = tags[index];
        out[at] = tag.len() as u8;
        let mut byte = 0;
        while byte < tag.len() {
            out[at + 8 + byte] = tag[byte];
            byte += 1;
        }
        at += 8 + tag.len() + padding(tag.len() as u64);
        index += 1;
    }
    assert!(at == N, "the size of a block of strings is wrong");
    out
}

// The blocks of strings that an archive is made of. Where the grammar leaves a choice, the
// blocks' first 16 bytes differ.
const ARCHIVE: [u8; 24] = block(&[b"nix-archive-1"]);
const NODE_BEGIN: [u8; 32] = block(&[b"(", b"type"]);
const REGULAR: [u8; 16] = block(&[b"regular"]);
const SYMLINK: [u8; 16] = block(&[b"symlink"]);
const DIRECTORY: [u8; 24] = block(&[b"directory"]);
const EXECUTABLE: [u8; 32] = block(&[b"executable", b""]);
const CONTENTS: [u8; 16] = block(&[b"contents"]);
const TARGET: [u8; 16] = block(&[b"target"]);
const ENTRY: [u8; 16] = block(&[b"entry"]);
const ENTRY_NAME: [u8; 32] = block(&[b"(", b"name"]);
const ENTRY_NODE: [u8; 16] = block(&[b"node"]);
const CLOSE: [u8; 16] = block(&[b")"]);

/// Says what is wrong with a name, if anything is.
fn check_name(name: &[u8]) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!(
            "expected a name of 1 to {NAME_BYTES_MAX} bytes, found {}",
            name.len()
        ));
    }
    if matches!(name, b"." | b"..") || name.iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err(format!("invalid file name '{}'", name.escape_ascii()));
    }
    Ok(())
}

/// Says what is wrong with a symlink's target, if anything is.
fn check_target(target: &[u8]) -> Result<(), String> {
    if target.is_empty() || target.len() > TARGET_BYTES_MAX {
        return Err(format!(
            "expected a symlink target of 1 to {TARGET_BYTES_MAX} bytes, found {}",
            target.len()
        ));
    }
    if target.contains(&0) {
        return Err("a symlink target holds a NUL byte".to_owned());
    }
    Ok(())
}

/// The open directories: for each the name last seen in it. Keeps its buffers for reuse.
#[derive(Default)]
struct OpenDirectories {
    names: Vec<Vec<u8>>,
    depth: usize,
}

impl OpenDirectories {
    /// Opens one. Its depth was checked with its name.
    fn push(&mut self) {
        match self.names.get_mut(self.depth) {
            Some(name) => name.clear(),
            None => self.names.push(Vec::new()),
        }
        self.depth += 1;
    }

    /// Checks the next name of the innermost directory and remembers it.
    fn next_name(&mut self, name: &[u8]) -> Result<(), String> {
        check_name(name)?;
        if self.depth >= DEPTH_MAX {
            return Err(format!(
                "directory nesting exceeds the maximum depth of {DEPTH_MAX}"
            ));
        }
        let last = &mut self.names[self.depth - 1];
        // An empty buffer stands for "none yet": it sorts before every name.
        if name <= &last[..] {
            return Err(format!(
                "names are not sorted: '{}' comes after '{}'",
                name.escape_ascii(),
                last.escape_ascii()
            ));
        }
        last.clear();
        last.extend_from_slice(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
