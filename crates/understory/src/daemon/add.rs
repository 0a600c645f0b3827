//! Operations that add something: uploads in their four transports, texts, logs.

use super::backend::{AddOptions, PathSource};
use super::connection::{Connection, Failure, Input, skip_nar};
use super::reporter::ToClient;
use crate::add::AddMethod;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::io::{self, BufRead, Read};
use std::sync::Arc;
use understory_nix::content_address::parse_method;
use understory_nix::wire::{Budget, WireError, WireRead};
use understory_nix::worker::{
    Body, Decoder, Op, Protocol, read_add_multiple_item, write_path_info,
};
use understory_nix::{
    ContentAddressMethod, HashAlgorithm, PathInfo, StoreDir, StorePath, StorePathName, nar,
};

/// What is asked for with one READ message: our buffer.
const PULL_BYTES: u64 = super::BUFFER_BYTES as u64;

impl Connection<'_> {
    pub(super) fn add_to_store_nar(
        &mut self,
        mut info: PathInfo,
        repair: bool,
        dont_check_sigs: bool,
    ) -> Result<(), Failure> {
        let body = Op::AddToStoreNar.body(self.decoder.protocol());
        if let Err(error) = self.require_writable() {
            return self.refuse_with_body(body, &error);
        }
        info.ultimate &= self.trusted;
        let options = self.add_options(repair, dont_check_sigs);
        match body {
            Body::Pulled => self.unframed(|store, input, reporter| {
                let mut pull = PullReader::new(input, reporter);
                let added = store.add_nar(info, &mut pull, options, reporter);
                // Whatever happened, what the client was asked for is read to its end.
                pull.finish()?;
                Ok(added?)
            })?,
            _ => self
                .framed(|store, framed, reporter| store.add_nar(info, framed, options, reporter))?,
        }
        Ok(self.last()?)
    }

    pub(super) fn add_multiple_to_store(
        &mut self,
        repair: bool,
        dont_check_sigs: bool,
    ) -> Result<(), Failure> {
        if let Err(error) = self.require_writable() {
            return self.refuse_with_body(Body::Framed, &error);
        }
        let options = self.add_options(repair, dont_check_sigs);
        let dir = self.decoder.store_dir().clone();
        let protocol = self.decoder.protocol();
        let budget = Arc::clone(&self.shared.budget);
        self.framed(|store, framed, reporter| {
            let mut upload = Upload::begin(framed, dir, protocol, budget)?;
            store.add_multiple(&mut upload, options, reporter)
        })?;
        Ok(self.last()?)
    }

    pub(super) fn add_to_store(
        &mut self,
        name: &str,
        method: &str,
        references: &BTreeSet<StorePath>,
        repair: bool,
    ) -> Result<(), Failure> {
        let ready = (|| {
            self.require_writable()?;
            StorePathName::new(name)?;
            let (method, algorithm) = parse_method(method)?;
            Ok(AddMethod { method, algorithm })
        })();
        let how = match ready {
            Ok(how) => how,
            Err(error) => return self.refuse_with_body(Body::Framed, &error),
        };
        let repair = repair && self.trusted;
        let info = self.framed(|store, framed, reporter| {
            store.add_dump(name, &how, references, repair, framed, reporter)
        })?;
        self.last()?;
        Ok(write_path_info(&mut self.encoder, &info)?)
    }

    /// Before 1.25: always a NAR, whatever is to be hashed.
    pub(super) fn add_to_store_old(
        &mut self,
        name: &str,
        fixed: bool,
        recursive: u64,
        algorithm: &str,
    ) -> Result<(), Failure> {
        let ready = (|| {
            self.require_writable()?;
            StorePathName::new(name)?;
            old_method(fixed, recursive, algorithm)
        })();
        let how = match ready {
            Ok(how) => how,
            Err(error) => return self.refuse_with_body(Body::RawNar, &error),
        };
        let none = BTreeSet::new();
        let info = self.unframed(|store, input, reporter| {
            let added = if how.method == ContentAddressMethod::Flat {
                NarFile::open(input).and_then(|mut file| {
                    let added = store.add_dump(name, &how, &none, false, &mut file, reporter)?;
                    file.finish()?;
                    Ok(added)
                })
            } else {
                store.add_dump(name, &how, &none, false, input, reporter)
            };
            // Where the archive would have ended is unknown after a failure.
            added.map_err(Failure::Fatal)
        })?;
        self.last()?;
        Ok(self.encoder.store_path(&info.path)?)
    }

    pub(super) fn add_text_to_store(
        &mut self,
        name: &str,
        text: &[u8],
        references: &BTreeSet<StorePath>,
    ) -> Result<(), Failure> {
        self.require_writable()?;
        let how = AddMethod {
            method: ContentAddressMethod::Text,
            algorithm: HashAlgorithm::Sha256,
        };
        let info = self.run(|store, reporter| {
            store.add_dump(name, &how, references, false, &mut &text[..], reporter)
        })?;
        self.last()?;
        Ok(self.encoder.store_path(&info.path)?)
    }

    pub(super) fn add_build_log(&mut self, drv: &StorePath) -> Result<(), Failure> {
        let ready = self
            .require_trust("adding a build log")
            .and_then(|()| self.require_writable());
        if let Err(error) = ready {
            return self.refuse_with_body(Body::Framed, &error);
        }
        self.framed(|store, framed, _| store.add_build_log(drv, framed))?;
        self.reply_u64(1)
    }

    fn add_options(&self, repair: bool, dont_check_sigs: bool) -> AddOptions {
        AddOptions {
            repair: repair && self.trusted,
            check_signatures: !(dont_check_sigs && self.trusted),
        }
    }
}

fn old_method(fixed: bool, recursive: u64, algorithm: &str) -> Result<AddMethod> {
    let algorithm = if fixed {
        HashAlgorithm::from_name(algorithm)
            .ok_or_else(|| Error::user(format!("unknown hash algorithm '{algorithm}'")))?
    } else {
        HashAlgorithm::Sha256
    };
    let method = match (fixed, recursive) {
        (false, _) | (true, 1) => ContentAddressMethod::Nar,
        (true, 0) => ContentAddressMethod::Flat,
        (true, other) => {
            return Err(Error::user(format!(
                "unsupported file ingestion method {other}"
            )));
        }
    };
    Ok(AddMethod { method, algorithm })
}

/// The stream of an AddMultipleToStore: a count, then for each path its info and its NAR.
struct Upload<R: BufRead> {
    decoder: Decoder<Touched<R>>,
    left: u64,
    /// The archive of the last path is still in the stream, unless somebody began to read it.
    archive_due: bool,
}

impl<R: BufRead> Upload<R> {
    fn begin(stream: R, dir: StoreDir, protocol: Protocol, budget: Arc<Budget>) -> Result<Self> {
        let stream = Touched {
            inner: stream,
            touched: false,
        };
        let mut decoder = Decoder::new(stream, dir, protocol, Some(budget));
        let left = decoder.count().map_err(broken)?;
        Ok(Self {
            decoder,
            left,
            archive_due: false,
        })
    }
}

fn broken(error: WireError) -> Error {
    Error::user("reading the upload").with_source(error)
}

impl<R: BufRead> PathSource for Upload<R> {
    fn next(&mut self) -> Result<Option<PathInfo>> {
        if self.archive_due && !self.decoder.reader().touched {
            skip_nar(self.decoder.reader()).map_err(broken)?;
        }
        self.archive_due = false;
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        let mut info = self
            .decoder
            .message(read_add_multiple_item)
            .map_err(broken)?
            .map_err(|invalid| Error::user(invalid.0))?;
        // What is copied was not built here.
        info.ultimate = false;
        self.decoder.reader().touched = false;
        self.archive_due = true;
        Ok(Some(info))
    }
    fn archive(&mut self) -> &mut dyn BufRead {
        self.decoder.reader()
    }
    fn release(&mut self) {
        self.decoder.release();
    }
}

/// Knows whether something was read.
struct Touched<R> {
    inner: R,
    touched: bool,
}

impl<R: BufRead> Read for Touched<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.touched = true;
        self.inner.read(out)
    }
}

impl<R: BufRead> BufRead for Touched<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        self.touched |= count > 0;
        self.inner.consume(count);
    }
}

/// A NAR that is asked for piece by piece: protocol 1.21 and 1.22.
struct PullReader<'a, 'c> {
    input: &'a mut Input,
    client: &'a ToClient<'c>,
    /// Bytes of the current piece that are still to come, without its padding.
    left: u64,
    /// The piece's length, if its padding is still to come.
    piece: Option<u64>,
}

impl<'a, 'c> PullReader<'a, 'c> {
    fn new(input: &'a mut Input, client: &'a ToClient<'c>) -> Self {
        Self {
            input,
            client,
            left: 0,
            piece: None,
        }
    }

    /// Reads what is left of a piece that was sent.
    fn finish(mut self) -> Result<(), WireError> {
        while self.left > 0 {
            let count = self.fill_buf()?.len();
            self.consume(count);
        }
        self.end_piece()
    }

    fn end_piece(&mut self) -> Result<(), WireError> {
        match self.piece.take() {
            None => Ok(()),
            Some(length) => self.input.read_padding(length),
        }
    }
}

impl Read for PullReader<'_, '_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

impl BufRead for PullReader<'_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            self.end_piece().map_err(io::Error::other)?;
            self.client.pull(PULL_BYTES)?;
            let length = self.input.read_u64().map_err(io::Error::other)?;
            if length == 0 || length > PULL_BYTES {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("asked for 1 to {PULL_BYTES} bytes, got {length}"),
                ));
            }
            self.left = length;
            self.piece = Some(length);
        }
        let buffer = self.input.fill_buf()?;
        if buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        Ok(&buffer[..count])
    }
    fn consume(&mut self, count: usize) {
        self.left -= count as u64;
        self.input.consume(count);
    }
}

/// The contents of a NAR that is one regular file.
struct NarFile<R> {
    reader: nar::Reader<R>,
    piece: Vec<u8>,
    at: usize,
}

impl<R: BufRead> NarFile<R> {
    fn open(stream: R) -> Result<Self> {
        let mut reader = nar::Reader::new(stream);
        match reader.next_event()? {
            // Nix' words otherwise.
            nar::Event::File { .. } => Ok(Self {
                reader,
                piece: Vec::new(),
                at: 0,
            }),
            _ => Err(Error::user("regular file expected")),
        }
    }

    /// Reads the archive's end.
    fn finish(mut self) -> Result<()> {
        match self.reader.next_event()? {
            nar::Event::End => Ok(()),
            _ => Err(Error::user("regular file expected")),
        }
    }
}

impl<R: BufRead> BufRead for NarFile<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.piece.len() {
            self.piece.clear();
            self.at = 0;
            self.piece
                .extend_from_slice(self.reader.read_contents().map_err(io::Error::other)?);
        }
        Ok(&self.piece[self.at..])
    }
    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl<R: BufRead> Read for NarFile<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

fn read_buffered(stream: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
    let buffer = stream.fill_buf()?;
    let count = buffer.len().min(out.len());
    out[..count].copy_from_slice(&buffer[..count]);
    stream.consume(count);
    Ok(count)
}
