//! The writer: gathers strings and small contents in one buffer, passes large contents through.

use super::{
    ARCHIVE, CLOSE, CONTENTS, DIRECTORY, ENTRY, ENTRY_NAME, ENTRY_NODE, EXECUTABLE, NODE_BEGIN,
    NarError, OpenDirectories, REGULAR, SYMLINK, TARGET, check_target, padding,
};
use std::io::Write;

/// The buffer is written out when it holds this much: well above an entry's strings (at most
/// about 4.5 KiB), small enough for the processor's cache.
const BUFFER_BYTES: usize = 32 * 1024;
/// Contents of at least this many bytes are not copied into the buffer.
const DIRECT_BYTES: usize = 8 * 1024;

/// A writer that takes the same events. It checks order, names, depth and sizes.
///
/// The stream has seen everything only after [`Writer::finish`]. After an error
/// the writer must be dropped.
pub struct Writer<W> {
    inner: W,
    buffer: Vec<u8>,
    /// Bytes of the archive before the buffer's first.
    written: u64,
    directories: OpenDirectories,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    InDirectory,
    InFile { remaining: u64, padding: usize },
    End,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            buffer: Vec::with_capacity(BUFFER_BYTES + DIRECT_BYTES),
            written: 0,
            directories: OpenDirectories::default(),
            state: State::Start,
        }
    }

    /// Begins a directory; `name` is `None` for the root only.
    ///
    /// # Errors
    /// The stream's, or a name out of order.
    pub fn directory_begin(&mut self, name: Option<&[u8]>) -> Result<(), NarError> {
        self.begin_node(name)?;
        self.directories.push();
        self.buffer.extend_from_slice(&DIRECTORY);
        self.state = State::InDirectory;
        self.flush_if_full()
    }

    /// Ends the innermost directory.
    ///
    /// # Errors
    /// The stream's.
    pub fn directory_end(&mut self) -> Result<(), NarError> {
        if self.state != State::InDirectory {
            return Err(self.malformed("a directory ends where none is open".to_owned()));
        }
        self.directories.depth -= 1;
        self.end_node()
    }

    /// Begins a file of exactly `size` bytes, to be given by [`Writer::contents`].
    ///
    /// # Errors
    /// The stream's, or a name out of order.
    pub fn file(
        &mut self,
        name: Option<&[u8]>,
        executable: bool,
        size: u64,
    ) -> Result<(), NarError> {
        self.begin_node(name)?;
        self.buffer.extend_from_slice(&REGULAR);
        if executable {
            self.buffer.extend_from_slice(&EXECUTABLE);
        }
        self.buffer.extend_from_slice(&CONTENTS);
        self.buffer.extend_from_slice(&size.to_le_bytes());
        if size == 0 {
            return self.end_node();
        }
        self.state = State::InFile {
            remaining: size,
            padding: padding(size),
        };
        self.flush_if_full()
    }

    /// Adds contents of the current file; the padding follows by itself.
    ///
    /// # Errors
    /// The stream's, or more bytes than announced.
    pub fn contents(&mut self, data: &[u8]) -> Result<(), NarError> {
        if data.is_empty() {
            return Ok(());
        }
        let State::InFile { remaining, padding } = self.state else {
            return Err(self.malformed(format!(
                "{} bytes of contents where no file is open",
                data.len()
            )));
        };
        let Some(left) = remaining.checked_sub(data.len() as u64) else {
            return Err(self.malformed(format!(
                "expected {remaining} more bytes of contents, found {}",
                data.len()
            )));
        };
        if data.len() >= DIRECT_BYTES {
            self.flush()?;
            self.inner.write_all(data)?;
            self.written += data.len() as u64;
        } else {
            self.buffer.extend_from_slice(data);
        }
        self.state = State::InFile {
            remaining: left,
            padding,
        };
        if left > 0 {
            return self.flush_if_full();
        }
        self.buffer.extend_from_slice(&[0; 8][..padding]);
        self.end_node()
    }

    /// Adds a symlink.
    ///
    /// # Errors
    /// The stream's, or a name out of order.
    pub fn symlink(&mut self, name: Option<&[u8]>, target: &[u8]) -> Result<(), NarError> {
        check_target(target).map_err(|reason| self.malformed(reason))?;
        self.begin_node(name)?;
        self.buffer.extend_from_slice(&SYMLINK);
        self.buffer.extend_from_slice(&TARGET);
        self.string(target);
        self.end_node()
    }

    /// Returns the bytes of the archive so far; its size when it is complete.
    pub fn offset(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Checks that the archive is complete and gives the stream back.
    ///
    /// # Errors
    /// The archive is not complete.
    pub fn finish(mut self) -> Result<W, NarError> {
        match self.state {
            State::End => {}
            State::Start => return Err(self.malformed("the archive is empty".to_owned())),
            State::InDirectory => {
                return Err(self.malformed(format!(
                    "{} directories are still open",
                    self.directories.depth
                )));
            }
            State::InFile { remaining, .. } => {
                return Err(self.malformed(format!(
                    "{remaining} bytes of a file's contents are missing"
                )));
            }
        }
        self.flush()?;
        self.inner.flush()?;
        Ok(self.inner)
    }

    /// Writes what stands before a node's type.
    fn begin_node(&mut self, name: Option<&[u8]>) -> Result<(), NarError> {
        match (self.state, name) {
            (State::Start, None) => self.buffer.extend_from_slice(&ARCHIVE),
            (State::InDirectory, Some(name)) => {
                self.directories
                    .next_name(name)
                    .map_err(|reason| self.malformed(reason))?;
                self.buffer.extend_from_slice(&ENTRY);
                self.buffer.extend_from_slice(&ENTRY_NAME);
                self.string(name);
                self.buffer.extend_from_slice(&ENTRY_NODE);
            }
            (State::Start, Some(_)) => {
                return Err(self.malformed("the root must not have a name".to_owned()));
            }
            (State::InDirectory, None) => {
                return Err(self.malformed("a directory's entry has no name".to_owned()));
            }
            (State::InFile { remaining, .. }, _) => {
                return Err(self.malformed(format!(
                    "{remaining} bytes of a file's contents are missing"
                )));
            }
            (State::End, _) => {
                return Err(self.malformed("a node after the end of the archive".to_owned()));
            }
        }
        self.buffer.extend_from_slice(&NODE_BEGIN);
        Ok(())
    }

    /// Writes what stands after a node's own strings.
    fn end_node(&mut self) -> Result<(), NarError> {
        self.buffer.extend_from_slice(&CLOSE);
        if self.directories.depth == 0 {
            self.state = State::End;
        } else {
            self.buffer.extend_from_slice(&CLOSE);
            self.state = State::InDirectory;
        }
        self.flush_if_full()
    }

    fn string(&mut self, bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.buffer.extend_from_slice(&len.to_le_bytes());
        self.buffer.extend_from_slice(bytes);
        self.buffer.extend_from_slice(&[0; 8][..padding(len)]);
    }

    fn flush_if_full(&mut self) -> Result<(), NarError> {
        if self.buffer.len() < BUFFER_BYTES {
            Ok(())
        } else {
            self.flush()
        }
    }

    fn flush(&mut self) -> Result<(), NarError> {
        self.inner.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn malformed(&self, reason: String) -> NarError {
        NarError::Malformed {
            offset: self.offset(),
            reason,
        }
    }
}
