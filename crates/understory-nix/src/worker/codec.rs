//! Decoder and encoder: the primitives with a store directory and a protocol version.

use super::Protocol;
use crate::wire::{Budget, SHORT_BYTES_MAX, WireError, WireRead, WireWrite, padding};
use crate::{StoreDir, StorePath};
use std::collections::BTreeSet;
use std::io::{self, BufRead, Write};
use std::sync::Arc;

/// What a request may hold without asking the shared budget.
const FREE_BYTES: u64 = 64 << 10;
/// Step in which the shared budget is asked.
const BUDGET_STEP_BYTES: u64 = 256 << 10;
/// What an item of a list costs in memory beside its bytes.
const ITEM_BYTES: u64 = 48;

/// An argument that was read whole but is not valid: not a store path, an unknown mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Reads typed values.
///
/// Values that are well-formed on the wire but not valid (a path outside of the store) do not fail
/// at once: the first is remembered, a placeholder is returned, and reading goes on, so that the
/// stream stays in step. [`Decoder::message`] never lets a placeholder out.
pub struct Decoder<R> {
    reader: R,
    store_dir: StoreDir,
    protocol: Protocol,
    invalid: Option<Invalid>,
    used: u64,
    taken: u64,
    budget: Option<Arc<Budget>>,
}

impl<R: BufRead> Decoder<R> {
    /// Starts to read; `budget` bounds what a request holds beyond 64 KiB.
    pub fn new(
        reader: R,
        store_dir: StoreDir,
        protocol: Protocol,
        budget: Option<Arc<Budget>>,
    ) -> Self {
        Self {
            reader,
            store_dir,
            protocol,
            invalid: None,
            used: 0,
            taken: 0,
            budget,
        }
    }
    /// Version and features.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }
    /// Sets what the handshake has found.
    pub fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }
    /// The store directory.
    pub fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }
    /// The stream, just behind what was decoded.
    pub fn reader(&mut self) -> &mut R {
        &mut self.reader
    }
    /// True if the stream ends here. Waits for the next byte.
    ///
    /// # Errors
    /// The stream's.
    pub fn at_end(&mut self) -> io::Result<bool> {
        Ok(self.reader.fill_buf()?.is_empty())
    }

    /// Runs `read` over a whole message and returns its value, or the first argument that was not
    /// valid. In both cases the message has been consumed.
    ///
    /// # Errors
    /// The stream is lost.
    pub fn message<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Result<T, Invalid>, WireError> {
        self.invalid = None;
        let value = read(self)?;
        Ok(match self.invalid.take() {
            None => Ok(value),
            Some(invalid) => Err(invalid),
        })
    }

    /// Gives back what the last message took of the budget.
    pub fn release(&mut self) {
        if let Some(budget) = &self.budget
            && self.taken > 0
        {
            budget.give_back(self.taken);
        }
        self.taken = 0;
        self.used = 0;
    }

    /// Counts `bytes` that the message holds in memory.
    ///
    /// # Errors
    /// The budget is used up.
    pub fn charge(&mut self, bytes: u64) -> Result<(), WireError> {
        self.used = self.used.saturating_add(bytes);
        let over = self.used.saturating_sub(FREE_BYTES);
        if over > self.taken
            && let Some(budget) = &self.budget
        {
            let want = (over - self.taken).next_multiple_of(BUDGET_STEP_BYTES);
            if !budget.take(want) {
                return Err(WireError::Budget { max: budget.max() });
            }
            self.taken += want;
        }
        Ok(())
    }

    /// Remembers that an argument is not valid, if it is the first.
    pub fn reject(&mut self, message: impl Into<String>) {
        if self.invalid.is_none() {
            self.invalid = Some(Invalid(message.into()));
        }
    }

    /// Reads an integer.
    ///
    /// # Errors
    /// The stream's.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        let buffer = self.reader.fill_buf()?;
        if let Some(bytes) = buffer.first_chunk::<8>() {
            let value = u64::from_le_bytes(*bytes);
            self.reader.consume(8);
            return Ok(value);
        }
        self.reader.read_u64()
    }
    /// Reads an integer of at most 32 bits.
    ///
    /// # Errors
    /// Too large, or the stream's.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        let value = self.u64()?;
        u32::try_from(value).map_err(|_| WireError::IntegerTooLarge(value))
    }
    /// Reads an integer of at most 8 bits.
    ///
    /// # Errors
    /// Too large, or the stream's.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        let value = self.u64()?;
        u8::try_from(value).map_err(|_| WireError::IntegerTooLarge(value))
    }
    /// Reads a time; one that does not fit in 63 bits is not valid.
    ///
    /// # Errors
    /// The stream's.
    pub fn time(&mut self) -> Result<u64, WireError> {
        let value = self.u64()?;
        if i64::try_from(value).is_err() {
            self.reject(format!("time {value} does not fit in 63 bits"));
            return Ok(0);
        }
        Ok(value)
    }
    /// Reads a boolean.
    ///
    /// # Errors
    /// The stream's.
    pub fn bool(&mut self) -> Result<bool, WireError> {
        Ok(self.u64()? != 0)
    }
    /// Reads a count.
    ///
    /// # Errors
    /// Too large, or the stream's.
    pub fn count(&mut self) -> Result<u64, WireError> {
        self.reader.read_count()
    }

    /// Reads a string and hands it to `parse` without a copy where it lies in the buffer.
    fn with_bytes<T>(
        &mut self,
        bytes_max: u64,
        parse: impl FnOnce(&StoreDir, &[u8]) -> T,
    ) -> Result<T, WireError> {
        let buffer = self.reader.fill_buf()?;
        if let Some(head) = buffer.first_chunk::<8>() {
            let length = u64::from_le_bytes(*head);
            if length > bytes_max {
                return Err(WireError::TooLong {
                    what: "string",
                    max: bytes_max,
                    found: length,
                });
            }
            let end = 8 + usize::try_from(length).unwrap_or(usize::MAX - 16);
            let whole = end + padding(length);
            if buffer.len() >= whole {
                if buffer[end..whole].iter().any(|byte| *byte != 0) {
                    return Err(WireError::Padding);
                }
                let value = parse(&self.store_dir, &buffer[8..end]);
                self.reader.consume(whole);
                return Ok(value);
            }
        }
        let bytes = self.reader.read_bytes(bytes_max)?;
        Ok(parse(&self.store_dir, &bytes))
    }

    /// Reads a string of bytes.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn bytes(&mut self, bytes_max: u64) -> Result<Vec<u8>, WireError> {
        let length = self.u64()?;
        if length > bytes_max {
            return Err(WireError::TooLong {
                what: "string",
                max: bytes_max,
                found: length,
            });
        }
        let mut bytes = Vec::new();
        let mut left = length;
        while left > 0 {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let count = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            bytes.extend_from_slice(&buffer[..count]);
            self.reader.consume(count);
            left -= count as u64;
            self.charge(count as u64)?;
        }
        self.reader.read_padding(length)?;
        self.charge(ITEM_BYTES)?;
        Ok(bytes)
    }
    /// Reads a string of UTF-8; other bytes are not valid.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn text(&mut self, bytes_max: u64) -> Result<String, WireError> {
        let bytes = self.bytes(bytes_max)?;
        String::from_utf8(bytes).or_else(|error| {
            self.reject(format!(
                "{:?} is not UTF-8",
                String::from_utf8_lossy(error.as_bytes())
            ));
            Ok(String::new())
        })
    }
    /// Reads a text of at most 4 KiB.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn short(&mut self) -> Result<String, WireError> {
        self.text(SHORT_BYTES_MAX)
    }
    /// Reads a short text and parses it; failure is an invalid argument and yields `None`.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn parsed<T, E: std::fmt::Display>(
        &mut self,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, WireError> {
        let text = self.short()?;
        Ok(match parse(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.reject(error.to_string());
                None
            }
        })
    }

    /// Reads a store path.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn store_path(&mut self) -> Result<StorePath, WireError> {
        self.charge(ITEM_BYTES + 64)?;
        let parsed = self.with_bytes(SHORT_BYTES_MAX, |dir, bytes| dir.parse(bytes))?;
        Ok(parsed.unwrap_or_else(|error| {
            self.reject(format!("path '{}' {}", error.path, error.reason));
            placeholder()
        }))
    }
    /// Reads an optional store path: the empty string is none.
    ///
    /// # Errors
    /// Too long, or the stream's.
    pub fn opt_store_path(&mut self) -> Result<Option<StorePath>, WireError> {
        self.charge(ITEM_BYTES + 64)?;
        let parsed = self.with_bytes(SHORT_BYTES_MAX, |dir, bytes| {
            if bytes.is_empty() {
                Ok(None)
            } else {
                dir.parse(bytes).map(Some)
            }
        })?;
        Ok(parsed.unwrap_or_else(|error| {
            self.reject(format!("path '{}' {}", error.path, error.reason));
            None
        }))
    }
    /// Reads a list with `item` for each.
    ///
    /// # Errors
    /// Too many, the items', or the stream's.
    pub fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.count()?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }
    /// Reads a list of store paths, in the order of the wire.
    ///
    /// # Errors
    /// As [`Decoder::list`].
    pub fn store_paths(&mut self) -> Result<Vec<StorePath>, WireError> {
        self.list(Self::store_path)
    }
    /// Reads a set of store paths.
    ///
    /// # Errors
    /// As [`Decoder::list`].
    pub fn store_path_set(&mut self) -> Result<BTreeSet<StorePath>, WireError> {
        Ok(self.store_paths()?.into_iter().collect())
    }
}

impl<R> Drop for Decoder<R> {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget
            && self.taken > 0
        {
            budget.give_back(self.taken);
        }
    }
}

fn placeholder() -> StorePath {
    StorePath::from_base_name("00000000000000000000000000000000-invalid")
        .expect("a constant store path")
}

/// Writes typed values.
pub struct Encoder<W> {
    writer: W,
    store_dir: StoreDir,
    protocol: Protocol,
}

impl<W: Write> Encoder<W> {
    /// Starts to write.
    pub fn new(writer: W, store_dir: StoreDir, protocol: Protocol) -> Self {
        Self {
            writer,
            store_dir,
            protocol,
        }
    }
    /// Version and features.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }
    /// Sets what the handshake has found.
    pub fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }
    /// The store directory.
    pub fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }
    /// The stream.
    pub fn writer(&mut self) -> &mut W {
        &mut self.writer
    }
    /// Ends and returns the stream.
    pub fn into_inner(self) -> W {
        self.writer
    }
    /// Writes an integer.
    ///
    /// # Errors
    /// The stream's.
    pub fn u64(&mut self, value: u64) -> io::Result<()> {
        self.writer.write_u64(value)
    }
    /// Writes a boolean.
    ///
    /// # Errors
    /// The stream's.
    pub fn bool(&mut self, value: bool) -> io::Result<()> {
        self.writer.write_bool(value)
    }
    /// Writes a string.
    ///
    /// # Errors
    /// The stream's.
    pub fn bytes(&mut self, value: impl AsRef<[u8]>) -> io::Result<()> {
        self.writer.write_bytes(value.as_ref())
    }
    /// Writes a store path.
    ///
    /// # Errors
    /// The stream's.
    pub fn store_path(&mut self, path: &StorePath) -> io::Result<()> {
        self.writer.write_parts(&[
            self.store_dir.as_str().as_bytes(),
            b"/",
            path.base_name().as_bytes(),
        ])
    }
    /// Writes an optional store path.
    ///
    /// # Errors
    /// The stream's.
    pub fn opt_store_path(&mut self, path: Option<&StorePath>) -> io::Result<()> {
        match path {
            None => self.u64(0),
            Some(path) => self.store_path(path),
        }
    }
    /// Writes store paths as a list or set; `paths` must be sorted where the protocol has a set.
    ///
    /// # Errors
    /// The stream's.
    pub fn store_paths<'a, I>(&mut self, paths: I) -> io::Result<()>
    where
        I: IntoIterator<Item = &'a StorePath>,
        I::IntoIter: ExactSizeIterator,
    {
        let paths = paths.into_iter();
        self.u64(paths.len() as u64)?;
        for path in paths {
            self.store_path(path)?;
        }
        Ok(())
    }
    /// Writes strings as a list or set.
    ///
    /// # Errors
    /// The stream's.
    pub fn strings<I, T>(&mut self, strings: I) -> io::Result<()>
    where
        T: AsRef<[u8]>,
        I: IntoIterator<Item = T>,
        I::IntoIter: ExactSizeIterator,
    {
        let strings = strings.into_iter();
        self.u64(strings.len() as u64)?;
        for string in strings {
            self.bytes(string)?;
        }
        Ok(())
    }
    /// Sends what is buffered.
    ///
    /// # Errors
    /// The stream's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}
