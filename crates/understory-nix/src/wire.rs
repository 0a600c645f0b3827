//! The primitives of Nix's worker protocol: integers, strings and framed streams.
//!
//! Everything is an unsigned 64-bit little-endian integer or a string (length, bytes, zero padding
//! to a multiple of 8). Upstream sets no limit on any length; here every length has one, nothing is
//! allocated from an announced length or count, and non-zero padding is refused.
//! Checked against Nix 2.26.3 and 2.34.8 (protocol 1.38).
//!
//! Cost: a request that lies in the reader's buffer is parsed without a copy or a system call.

use std::io::{self, BufRead, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Longest string anywhere: a text file, a derivation's environment value, a log line. The largest
/// real ones (`AddTextToStore` of generated expressions) are a few MiB.
pub const STRING_BYTES_MAX: u64 = 64 << 20;
/// Longest path, name, signature, hash or other short text: Linux' `PATH_MAX`.
pub const SHORT_BYTES_MAX: u64 = 4096;
/// Longest value of a setting: lists of keys and substituters stay far below.
pub const SETTING_BYTES_MAX: u64 = 1 << 20;
/// Most items of a list, set or map: ten million paths is the largest store that is designed for.
pub const COUNT_MAX: u64 = 16 << 20;
/// Longest frame of a framed stream: upstream keeps the length in a C `int`.
pub const FRAME_BYTES_MAX: u64 = i32::MAX as u64;
/// Strings are read in steps of at most this, so that memory follows what has really arrived.
const READ_STEP_BYTES: usize = 64 << 10;

/// What can go wrong below the level of requests. The stream cannot be used afterwards.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream's error, its early end included.
    #[error("worker protocol stream: {0}")]
    Io(#[from] io::Error),
    /// A length or count is beyond its limit.
    #[error("{what} is too long: expected at most {max}, found {found}")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// The limit.
        max: u64,
        /// What was announced.
        found: u64,
    },
    /// An integer does not fit its type. The text is Nix's.
    #[error("serialised integer {0} is too large")]
    IntegerTooLarge(u64),
    /// The padding of a string holds something.
    #[error("non-zero padding")]
    Padding,
    /// A tag, a marker or a text is not what the protocol has at this place.
    #[error("{what}: expected {expected}, found {found}")]
    Unexpected {
        /// What was read.
        what: &'static str,
        /// What would be right.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The peer asks for more memory than is left for all requests together.
    #[error(
        "the request needs more memory than the {max} bytes that all requests may use together"
    )]
    Budget {
        /// The limit in bytes.
        max: u64,
    },
}

impl WireError {
    /// True if the peer has gone: end of stream, reset, broken pipe.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Io(error) if matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::NotConnected
        ))
    }
}

/// Returns the number of padding bytes after `length` bytes.
pub const fn padding(length: u64) -> usize {
    ((8 - length % 8) % 8) as usize
}

/// Reads the primitives.
pub trait WireRead: Read {
    /// Reads an integer.
    ///
    /// # Errors
    /// The stream's.
    fn read_u64(&mut self) -> Result<u64, WireError> {
        let mut bytes = [0; 8];
        self.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads an integer that must fit in 32 bits.
    ///
    /// # Errors
    /// Too large, or the stream's.
    fn read_u32(&mut self) -> Result<u32, WireError> {
        let value = self.read_u64()?;
        u32::try_from(value).map_err(|_| WireError::IntegerTooLarge(value))
    }

    /// Reads a boolean: anything but 0 is true.
    ///
    /// # Errors
    /// The stream's.
    fn read_bool(&mut self) -> Result<bool, WireError> {
        Ok(self.read_u64()? != 0)
    }

    /// Reads a count of items.
    ///
    /// # Errors
    /// More than [`COUNT_MAX`], or the stream's.
    fn read_count(&mut self) -> Result<u64, WireError> {
        let count = self.read_u64()?;
        if count > COUNT_MAX {
            return Err(WireError::TooLong {
                what: "list",
                max: COUNT_MAX,
                found: count,
            });
        }
        Ok(count)
    }

    /// Reads a string of at most `bytes_max` bytes; memory grows with what arrives.
    ///
    /// # Errors
    /// Too long, bad padding, or the stream's.
    fn read_bytes(&mut self, bytes_max: u64) -> Result<Vec<u8>, WireError> {
        let length = self.read_u64()?;
        if length > bytes_max {
            return Err(WireError::TooLong {
                what: "string",
                max: bytes_max,
                found: length,
            });
        }
        let mut bytes = Vec::new();
        let mut left = usize::try_from(length).map_err(|_| WireError::IntegerTooLarge(length))?;
        while left > 0 {
            let step = left.min(READ_STEP_BYTES);
            let start = bytes.len();
            bytes.resize(start + step, 0);
            self.read_exact(&mut bytes[start..])?;
            left -= step;
        }
        self.read_padding(length)?;
        Ok(bytes)
    }

    /// Reads the zero bytes after a string of `length` bytes.
    ///
    /// # Errors
    /// Not zero, or the stream's.
    fn read_padding(&mut self, length: u64) -> Result<(), WireError> {
        let mut bytes = [0; 8];
        let pad = &mut bytes[..padding(length)];
        self.read_exact(pad)?;
        if pad.iter().any(|byte| *byte != 0) {
            return Err(WireError::Padding);
        }
        Ok(())
    }
}
impl<R: Read + ?Sized> WireRead for R {}

/// Writes the primitives.
pub trait WireWrite: Write {
    /// Writes an integer.
    ///
    /// # Errors
    /// The stream's.
    fn write_u64(&mut self, value: u64) -> io::Result<()> {
        self.write_all(&value.to_le_bytes())
    }

    /// Writes a boolean.
    ///
    /// # Errors
    /// The stream's.
    fn write_bool(&mut self, value: bool) -> io::Result<()> {
        self.write_u64(u64::from(value))
    }

    /// Writes a string.
    ///
    /// # Errors
    /// The stream's.
    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_u64(bytes.len() as u64)?;
        self.write_all(bytes)?;
        self.write_padding(bytes.len() as u64)
    }

    /// Writes the string that `parts` make together, without joining them first.
    ///
    /// # Errors
    /// The stream's.
    fn write_parts(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.write_u64(length as u64)?;
        for part in parts {
            self.write_all(part)?;
        }
        self.write_padding(length as u64)
    }

    /// Writes the zero bytes after a string of `length` bytes.
    ///
    /// # Errors
    /// The stream's.
    fn write_padding(&mut self, length: u64) -> io::Result<()> {
        self.write_all(&[0; 8][..padding(length)])
    }
}
impl<W: Write + ?Sized> WireWrite for W {}

/// Reads a framed stream: frames of a length and that many bytes, ended by a frame of length 0.
///
/// Hands out the inner reader's buffer, so nothing is copied. At the 0 frame it reports the end of
/// file and leaves the inner reader just behind it.
pub struct FramedReader<R> {
    inner: R,
    left: u64,
    ended: bool,
    /// A length was wrong: where the next frame would begin is unknown.
    broken: bool,
}

impl<R: BufRead> FramedReader<R> {
    /// Starts before the first frame's length.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            ended: false,
            broken: false,
        }
    }

    /// True if the 0 frame has been read.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Reads and drops everything up to and with the 0 frame; returns how many bytes it dropped.
    ///
    /// # Errors
    /// The stream's, or more than `bytes_max` bytes.
    pub fn drain(&mut self, bytes_max: u64) -> Result<u64, WireError> {
        let mut dropped = 0;
        loop {
            let count = self.fill_buf()?.len();
            if count == 0 {
                return Ok(dropped);
            }
            dropped += count as u64;
            if dropped > bytes_max {
                return Err(WireError::TooLong {
                    what: "rest of a refused upload",
                    max: bytes_max,
                    found: dropped,
                });
            }
            self.consume(count);
        }
    }

    fn next_frame(&mut self) -> io::Result<()> {
        while self.left == 0 && !self.ended {
            if self.broken {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut bytes = [0; 8];
            self.inner.read_exact(&mut bytes)?;
            let length = u64::from_le_bytes(bytes);
            if length > FRAME_BYTES_MAX {
                self.broken = true;
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    WireError::TooLong {
                        what: "frame",
                        max: FRAME_BYTES_MAX,
                        found: length,
                    },
                ));
            }
            self.left = length;
            self.ended = length == 0;
        }
        Ok(())
    }
}

impl<R: BufRead> BufRead for FramedReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.next_frame()?;
        if self.ended {
            return Ok(&[]);
        }
        let buffer = self.inner.fill_buf()?;
        if buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        Ok(&buffer[..count])
    }
    fn consume(&mut self, count: usize) {
        debug_assert!(count as u64 <= self.left, "consumed past the frame");
        self.left -= count as u64;
        self.inner.consume(count);
    }
}

impl<R: BufRead> Read for FramedReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let buffer = self.fill_buf()?;
        let count = buffer.len().min(out.len());
        out[..count].copy_from_slice(&buffer[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// Writes a framed stream; each `write` is one frame. [`FramedWriter::finish`] ends it.
pub struct FramedWriter<W> {
    inner: W,
}

impl<W: Write> FramedWriter<W> {
    /// Starts a stream.
    pub fn new(inner: W) -> Self {
        Self { inner }
    }
    /// Writes the 0 frame and returns the inner writer.
    ///
    /// # Errors
    /// The stream's.
    pub fn finish(mut self) -> io::Result<W> {
        self.inner.write_u64(0)?;
        Ok(self.inner)
    }
}

impl<W: Write> Write for FramedWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // An empty frame would end the stream.
        if data.is_empty() {
            return Ok(0);
        }
        let data = &data[..data.len().min(FRAME_BYTES_MAX as usize)];
        self.inner.write_u64(data.len() as u64)?;
        self.inner.write_all(data)?;
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The bytes that all requests in flight may hold together.
#[derive(Debug)]
pub struct Budget {
    max: u64,
    used: AtomicU64,
}

impl Budget {
    /// Makes a budget of `bytes_max`.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            max: bytes_max,
            used: AtomicU64::new(0),
        })
    }
    /// The limit in bytes.
    pub fn max(&self) -> u64 {
        self.max
    }
    /// Bytes taken now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
    /// Takes `bytes` if they are left.
    pub fn take(&self, bytes: u64) -> bool {
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= self.max)
            })
            .is_ok()
    }
    /// Gives `bytes` back that were taken.
    pub fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}
