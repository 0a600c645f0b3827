//! The pull parser. Between two calls it has consumed exactly what it has understood.

use super::{
    ARCHIVE, CLOSE, CONTENTS, DIRECTORY, ENTRY, ENTRY_NAME, ENTRY_NODE, EXECUTABLE, Event,
    NAME_BYTES_MAX, NODE_BEGIN, NarError, OpenDirectories, REGULAR, SYMLINK, TARGET,
    TARGET_BYTES_MAX, check_target, padding,
};
use std::io::{self, BufRead};

/// Most bytes that [`Reader::read_contents_to_end`] reserves on the word of a header.
const RESERVE_BYTES_MAX: u64 = 1 << 20;
/// Longest string that is quoted in an error: no tag of the format has more bytes.
const TAG_BYTES_MAX: u64 = 32;

/// A pull parser that never consumes a byte past the end of the archive.
///
/// After an error every further call fails.
pub struct Reader<R> {
    stream: Stream<R>,
    state: State,
    directories: OpenDirectories,
    /// Scratch for names with what follows them, and for targets.
    scratch: Vec<u8>,
}

/// Where the reader stands: what the next byte of the stream is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The archive's first byte.
    Start,
    /// A choice in a directory: an entry or the end.
    InDirectory,
    /// Contents of a file.
    InFile {
        /// Bytes left in the stream.
        remaining: u64,
        /// NUL bytes that follow them.
        padding: usize,
        /// Bytes handed out, to be consumed at the next call.
        lent: usize,
    },
    /// The end of a node whose own strings are read, but for the closing bracket.
    NodeEnd,
    /// Past the archive.
    End,
    /// An error was returned.
    Failed,
}

impl<R: BufRead> Reader<R> {
    /// Starts at the archive's first byte.
    pub fn new(inner: R) -> Self {
        Self {
            stream: Stream { inner, offset: 0 },
            state: State::Start,
            directories: OpenDirectories::default(),
            scratch: Vec::new(),
        }
    }

    /// Returns the next event. Unread contents of the file before are skipped.
    ///
    /// # Errors
    /// Malformed archive ([`NarError::Malformed`]), or the stream's error or early end.
    pub fn next_event(&mut self) -> Result<Event, NarError> {
        let event = self.step();
        if event.is_err() {
            self.state = State::Failed;
        }
        event
    }

    /// Returns the next piece of the current file's contents, empty at its end. The returned
    /// slice is at most what the stream has buffered.
    ///
    /// # Errors
    /// The stream's error or early end, or non-zero padding.
    pub fn read_contents(&mut self) -> Result<&[u8], NarError> {
        let remaining = match self.advance() {
            Ok(remaining) => remaining,
            Err(error) => {
                self.state = State::Failed;
                return Err(error);
            }
        };
        if remaining == 0 {
            return Ok(&[]);
        }
        let State::InFile { lent, .. } = &mut self.state else {
            return Ok(&[]);
        };
        let buffer = match self.stream.fill() {
            Ok(buffer) => buffer,
            Err(error) => {
                self.state = State::Failed;
                return Err(error);
            }
        };
        let count = buffer
            .len()
            .min(usize::try_from(remaining).unwrap_or(usize::MAX));
        *lent = count;
        Ok(&buffer[..count])
    }

    /// Reads the current file's remaining contents to the end of `out`.
    ///
    /// # Errors
    /// As [`Reader::read_contents`].
    pub fn read_contents_to_end(&mut self, out: &mut Vec<u8>) -> Result<(), NarError> {
        if let State::InFile {
            remaining, lent, ..
        } = self.state
        {
            let expected = (remaining - lent as u64).min(RESERVE_BYTES_MAX);
            out.reserve(usize::try_from(expected).unwrap_or(0));
        }
        loop {
            let piece = self.read_contents()?;
            if piece.is_empty() {
                return Ok(());
            }
            out.extend_from_slice(piece);
        }
    }

    /// Returns the number of bytes consumed from the stream so far; the archive's size after
    /// [`Event::End`].
    pub fn offset(&self) -> u64 {
        self.stream.offset
    }

    /// Gives the stream back.
    pub fn into_inner(self) -> R {
        self.stream.inner
    }

    fn step(&mut self) -> Result<Event, NarError> {
        loop {
            match self.state {
                State::Start => {
                    self.stream
                        .expect(&concat::<56>(&[&ARCHIVE, &NODE_BEGIN]))?;
                    return self.node(None);
                }
                State::InDirectory => return self.directory_step(),
                State::InFile { .. } => while !self.read_contents()?.is_empty() {},
                State::NodeEnd => {
                    self.stream.expect(&CLOSE)?;
                    if self.directories.depth == 0 {
                        self.state = State::End;
                    } else {
                        self.stream.expect(&CLOSE)?;
                        self.state = State::InDirectory;
                    }
                }
                State::End => return Ok(Event::End),
                State::Failed => {
                    return Err(self
                        .stream
                        .malformed("the archive was already found to be bad".to_owned()));
                }
            }
        }
    }

    /// Reads an entry up to its node's own strings, or the end of the directory.
    fn directory_step(&mut self) -> Result<Event, NarError> {
        let choice = self.stream.array::<16>()?;
        if choice == CLOSE {
            self.directories.depth -= 1;
            if self.directories.depth == 0 {
                self.state = State::End;
            } else {
                self.stream.expect(&CLOSE)?;
            }
            return Ok(Event::DirectoryEnd);
        }
        if choice != ENTRY {
            return Err(self.stream.unexpected("\"entry\" or \")\"", &choice));
        }
        let head = self.stream.array::<40>()?;
        self.stream.compare(&ENTRY_NAME, &head[..32])?;
        let len = length(&head[32..]);
        if len == 0 || len > NAME_BYTES_MAX as u64 {
            return Err(self.stream.malformed(format!(
                "expected a name of 1 to {NAME_BYTES_MAX} bytes, found {len}"
            )));
        }
        // The strings after a name are always the same, so they are fetched along with it.
        let name_len = len as usize;
        let padded_len = name_len + padding(len);
        self.stream.fetch(
            &mut self.scratch,
            padded_len + ENTRY_NODE.len() + NODE_BEGIN.len(),
        )?;
        let (name, rest) = self.scratch.split_at(name_len);
        let (pad, rest) = rest.split_at(padded_len - name_len);
        if pad.iter().any(|&byte| byte != 0) {
            return Err(self
                .stream
                .malformed("non-zero padding after a name".to_owned()));
        }
        self.directories
            .next_name(name)
            .map_err(|reason| self.stream.malformed(reason))?;
        self.stream
            .compare(&concat::<48>(&[&ENTRY_NODE, &NODE_BEGIN]), rest)?;
        let name = name.into();
        self.node(Some(name))
    }

    /// Reads a node from its type on.
    fn node(&mut self, name: Option<Box<[u8]>>) -> Result<Event, NarError> {
        let kind = self.stream.array::<16>()?;
        if kind == REGULAR {
            self.regular(name)
        } else if kind == SYMLINK {
            self.symlink(name)
        } else if kind == DIRECTORY[..16] {
            self.stream.expect(&DIRECTORY[16..])?;
            self.directories.push();
            self.state = State::InDirectory;
            Ok(Event::DirectoryBegin { name })
        } else {
            Err(self
                .stream
                .unexpected("\"regular\", \"symlink\" or \"directory\"", &kind))
        }
    }

    fn regular(&mut self, name: Option<Box<[u8]>>) -> Result<Event, NarError> {
        let mut choice = self.stream.array::<16>()?;
        let executable = choice == EXECUTABLE[..16];
        if executable {
            let rest = self.stream.array::<16>()?;
            if rest[..8] != EXECUTABLE[16..24] {
                return Err(self
                    .stream
                    .malformed("expected tag \"executable\", found another".to_owned()));
            }
            if rest[8..] != EXECUTABLE[24..] {
                return Err(self
                    .stream
                    .malformed("the executable marker has a value".to_owned()));
            }
            choice = self.stream.array::<16>()?;
        }
        if choice != CONTENTS {
            let expected = if executable {
                "\"contents\""
            } else {
                "\"contents\" or \"executable\""
            };
            return Err(self.stream.unexpected(expected, &choice));
        }
        let size = length(&self.stream.array::<8>()?);
        self.state = State::InFile {
            remaining: size,
            padding: padding(size),
            lent: 0,
        };
        Ok(Event::File {
            name,
            executable,
            size,
        })
    }

    fn symlink(&mut self, name: Option<Box<[u8]>>) -> Result<Event, NarError> {
        let head = self.stream.array::<24>()?;
        self.stream.compare(&TARGET, &head[..16])?;
        let len = length(&head[16..]);
        if len == 0 || len > TARGET_BYTES_MAX as u64 {
            let reason =
                format!("expected a symlink target of 1 to {TARGET_BYTES_MAX} bytes, found {len}");
            return Err(self.stream.malformed(reason));
        }
        self.stream
            .fetch(&mut self.scratch, len as usize + padding(len))?;
        let (target, pad) = self.scratch.split_at(len as usize);
        if pad.iter().any(|&byte| byte != 0) {
            return Err(self
                .stream
                .malformed("non-zero padding after a symlink target".to_owned()));
        }
        check_target(target).map_err(|reason| self.stream.malformed(reason))?;
        self.state = State::NodeEnd;
        Ok(Event::Symlink {
            name,
            target: target.into(),
        })
    }

    /// Consumes what was lent; at the end of the contents reads the padding. Returns how many
    /// bytes are left, 0 if there is no file open.
    fn advance(&mut self) -> Result<u64, NarError> {
        let State::InFile {
            remaining,
            padding,
            lent,
        } = &mut self.state
        else {
            return if self.state == State::Failed {
                Err(self
                    .stream
                    .malformed("the archive was already found to be bad".to_owned()))
            } else {
                Ok(0)
            };
        };
        self.stream.consume(*lent);
        *remaining -= *lent as u64;
        *lent = 0;
        let left = *remaining;
        if left == 0 {
            let mut pad = [0; 8];
            let pad = &mut pad[..*padding];
            self.stream.read_exact(pad)?;
            if pad.iter().any(|&byte| byte != 0) {
                return Err(self
                    .stream
                    .malformed("non-zero padding after a file's contents".to_owned()));
            }
            self.state = State::NodeEnd;
        }
        Ok(left)
    }
}

/// The stream with the number of bytes consumed.
struct Stream<R> {
    inner: R,
    offset: u64,
}

impl<R: BufRead> Stream<R> {
    /// Returns the buffered bytes; never none.
    fn fill(&mut self) -> Result<&[u8], NarError> {
        // Asked twice because the first borrow cannot be returned from a loop.
        loop {
            match self.inner.fill_buf() {
                Ok([]) => return Err(early_end(self.offset).into()),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.inner.fill_buf()?)
    }

    fn consume(&mut self, count: usize) {
        self.inner.consume(count);
        self.offset += count as u64;
    }

    fn read_exact(&mut self, out: &mut [u8]) -> Result<(), NarError> {
        let mut done = 0;
        while done < out.len() {
            let buffer = match self.inner.fill_buf() {
                Ok([]) => return Err(early_end(self.offset).into()),
                Ok(buffer) => buffer,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let count = buffer.len().min(out.len() - done);
            out[done..done + count].copy_from_slice(&buffer[..count]);
            self.consume(count);
            done += count;
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NarError> {
        let mut out = [0; N];
        self.read_exact(&mut out)?;
        Ok(out)
    }

    /// Reads exactly `len` bytes into `scratch`. The caller has checked `len`.
    fn fetch(&mut self, scratch: &mut Vec<u8>, len: usize) -> Result<(), NarError> {
        scratch.resize(len, 0);
        self.read_exact(scratch)
    }

    fn expect(&mut self, expected: &[u8]) -> Result<(), NarError> {
        let mut found = [0; 64];
        let found = &mut found[..expected.len()];
        self.read_exact(found)?;
        self.compare(expected, found)
    }

    /// Compares strings just read with those expected; on a difference names the first.
    fn compare(&self, expected: &[u8], found: &[u8]) -> Result<(), NarError> {
        if expected == found {
            return Ok(());
        }
        let mut at = 0;
        while at + 8 <= expected.len() {
            let len = length(&expected[at..]);
            let end = at + 8 + len as usize + padding(len);
            if end > expected.len() || expected[at..end] != found[at..end] {
                let tag = &expected[at + 8..expected.len().min(at + 8 + len as usize)];
                return Err(self.unexpected(&format!("\"{}\"", tag.escape_ascii()), &found[at..]));
            }
            at = end;
        }
        Err(self.unexpected("another tag", found))
    }

    /// Makes an error of the string at the start of `found`, which may be cut off.
    fn unexpected(&self, expected: &str, found: &[u8]) -> NarError {
        let len = length(found);
        let tag = &found[8..];
        if len <= TAG_BYTES_MAX && len as usize <= tag.len() {
            let (tag, pad) = tag.split_at(len as usize);
            let note = if pad.iter().take(padding(len)).any(|&byte| byte != 0) {
                " with non-zero padding"
            } else {
                ""
            };
            return self.malformed(format!(
                "expected tag {expected}, found \"{}\"{note}",
                tag.escape_ascii()
            ));
        }
        self.malformed(format!(
            "expected tag {expected}, found a string of {len} bytes"
        ))
    }

    fn malformed(&self, reason: String) -> NarError {
        NarError::Malformed {
            offset: self.offset,
            reason,
        }
    }
}

fn early_end(offset: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the archive ends early, at byte {offset}"),
    )
}

/// Reads the length at the start of a string of at least 8 bytes.
fn length(bytes: &[u8]) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(out)
}

/// Joins blocks into one of `N` bytes.
fn concat<const N: usize>(blocks: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    let mut at = 0;
    for block in blocks {
        out[at..at + block.len()].copy_from_slice(block);
        at += block.len();
    }
    out
}
