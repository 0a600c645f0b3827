//! A worker-protocol client with nothing between it and the socket, so that a benchmark measures the server.
//!
//! Speaks 1.37 (no features), one write and as few reads as possible for each request. The format is the
//! worker protocol of Nix 2.26 and 2.34.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const MAGIC_CLIENT: u64 = 0x6e69_7863;
const MAGIC_SERVER: u64 = 0x6478_696f;
const VERSION: u64 = 1 << 8 | 37;
const LOG_LAST: u64 = 0x616c_7473;
const LOG_ERROR: u64 = 0x6378_7470;
const LOG_NEXT: u64 = 0x6f6c_6d67;
const LOG_START_ACTIVITY: u64 = 0x5354_5254;
const LOG_STOP_ACTIVITY: u64 = 0x5354_4f50;
const LOG_RESULT: u64 = 0x5253_4c54;
const QUERY_PATH_INFO: u64 = 26;
const SET_OPTIONS: u64 = 19;
/// Longest string that an answer may hold; store paths and messages are far below.
const STRING_BYTES_MAX: u64 = 1 << 20;
/// A server that is silent for this long is broken.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A connection after its handshake.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    request: Vec<u8>,
}

impl Client {
    /// Connects, shakes hands and sends the options that every real client begins with.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut client = Self {
            stream: BufReader::with_capacity(64 << 10, stream),
            request: Vec::new(),
        };
        client.put(MAGIC_CLIENT);
        client.put(VERSION);
        client.send()?;
        let magic = client.number()?;
        if magic != MAGIC_SERVER {
            return Err(io::Error::other(format!(
                "expected the magic {MAGIC_SERVER:#x}, found {magic:#x}"
            )));
        }
        let server = client.number()?;
        client.put(0); // no CPU affinity
        client.put(0); // no reserved space
        client.send()?;
        let negotiated = server.min(VERSION) & 0xff;
        if negotiated >= 33 {
            client.string()?; // the server's version
        }
        if negotiated >= 35 {
            client.number()?; // whether we are trusted
        }
        client.log()?;

        client.put(SET_OPTIONS);
        // keep-failed, keep-going, try-fallback, verbosity, max-jobs, max-silent, use-build-hook, verbose-build,
        // log-type, print-trace, cores, use-substitutes, number of overrides
        for value in [0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0] {
            client.put(value);
        }
        client.send()?;
        client.log()?;
        Ok(client)
    }

    /// Asks for a path info and reads it whole; the NAR size, or `None` if the path is not valid.
    pub(crate) fn query_path_info(&mut self, path: &str) -> io::Result<Option<u64>> {
        self.put(QUERY_PATH_INFO);
        self.put_string(path);
        self.send()?;
        self.log()?;
        if self.number()? == 0 {
            return Ok(None);
        }
        self.skip_unkeyed_path_info().map(Some)
    }

    /// Reads a path info without its path; the NAR size.
    pub(crate) fn skip_unkeyed_path_info(&mut self) -> io::Result<u64> {
        self.string()?; // deriver
        self.string()?; // NAR hash
        for _ in 0..self.number()? {
            self.string()?; // a reference
        }
        self.number()?; // registration time
        let nar_size = self.number()?;
        self.number()?; // ultimate
        for _ in 0..self.number()? {
            self.string()?; // a signature
        }
        self.string()?; // content address
        Ok(nar_size)
    }

    /// Adds a number to the request.
    pub(crate) fn put(&mut self, value: u64) {
        self.request.extend_from_slice(&value.to_le_bytes());
    }
    /// Adds a padded string to the request.
    pub(crate) fn put_string(&mut self, text: &str) {
        self.put(text.len() as u64);
        self.request.extend_from_slice(text.as_bytes());
        self.request
            .resize(self.request.len().next_multiple_of(8), 0);
    }
    /// Adds a frame of a framed stream to the request; the empty one ends the stream.
    pub(crate) fn put_frame(&mut self, data: &[u8]) {
        self.put(data.len() as u64);
        self.request.extend_from_slice(data);
    }
    /// Writes the request.
    pub(crate) fn send(&mut self) -> io::Result<()> {
        self.stream.get_mut().write_all(&self.request)?;
        self.request.clear();
        Ok(())
    }
    /// Reads log messages up to the one that ends them.
    ///
    /// # Errors
    /// The server's error message, or the stream's error.
    pub(crate) fn log(&mut self) -> io::Result<()> {
        loop {
            match self.number()? {
                LOG_LAST => return Ok(()),
                LOG_NEXT => {
                    self.string()?;
                }
                LOG_START_ACTIVITY => {
                    for _ in 0..3 {
                        self.number()?; // id, level, type
                    }
                    self.string()?;
                    self.fields()?;
                    self.number()?; // parent
                }
                LOG_STOP_ACTIVITY => {
                    self.number()?;
                }
                LOG_RESULT => {
                    self.number()?; // id
                    self.number()?; // type
                    self.fields()?;
                }
                LOG_ERROR => {
                    self.string()?; // "Error"
                    self.number()?; // level
                    self.string()?; // name
                    let message = String::from_utf8_lossy(&self.string()?).into_owned();
                    self.number()?; // position
                    for _ in 0..self.number()? {
                        self.number()?;
                        self.string()?;
                    }
                    return Err(io::Error::other(message));
                }
                other => {
                    return Err(io::Error::other(format!(
                        "unexpected log message {other:#x}"
                    )));
                }
            }
        }
    }
    /// Reads the fields of an activity or result.
    fn fields(&mut self) -> io::Result<()> {
        for _ in 0..self.number()? {
            if self.number()? == 0 {
                self.number()?;
            } else {
                self.string()?;
            }
        }
        Ok(())
    }
    /// Reads a number.
    pub(crate) fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
    /// Reads a padded string.
    pub(crate) fn string(&mut self) -> io::Result<Vec<u8>> {
        let length = self.number()?;
        if length > STRING_BYTES_MAX {
            return Err(io::Error::other(format!("a string of {length} bytes")));
        }
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut bytes = vec![0; length.next_multiple_of(8)];
        self.stream.read_exact(&mut bytes)?;
        bytes.truncate(length);
        Ok(bytes)
    }
}
