//! Operations that add something: uploads in their four transports, texts, logs.

use super::connection::{Connection, Failure, Input, Output, skip_nar};
use crate::add::{self, AddMethod, AddNarOptions};
use crate::nar::ReadOptions;
use crate::store::TempRootOwner;
use crate::{Error, Result, Store};
use std::collections::{BTreeSet, HashSet};
use std::io::{self, BufRead, Read};
use std::sync::Arc;
use understory_castore::Node;
use understory_nix::content_address::parse_method;
use understory_nix::wire::{Budget, WireError, WireRead};
use understory_nix::worker::{
    Body, Decoder, Encoder, LogMessage, Op, Protocol, read_add_multiple_item, write_path_info,
};
use understory_nix::{
    ContentAddressMethod, HashAlgorithm, PathInfo, PublicKeys, StorePath, StorePathName, nar,
};

/// Paths of an AddMultipleToStore that are published together: one sync of content and database for
/// all of them.
const BATCH_PATHS_MAX: usize = 2_000;
/// NAR bytes after which they are published even if they are fewer, so that an interrupted upload
/// of large paths is not for nothing.
const BATCH_NAR_BYTES_MAX: u64 = 1 << 30;
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
        let rules = self.rules(dont_check_sigs);
        let ready = self
            .require_writable()
            .and_then(|()| rules.check(self.store, &info))
            .and_then(|()| self.temp_roots());
        let owner = match ready {
            Ok(owner) => owner,
            Err(error) => return self.refuse_with_body(body, &error),
        };
        info.ultimate &= self.trusted;
        let options = AddNarOptions {
            repair: repair && self.trusted,
        };
        let store = self.store;
        match body {
            Body::Pulled => {
                let mut pull = PullReader::new(&mut self.decoder, &mut self.encoder);
                let added = add::add_nar(store, &owner, info, &mut pull, options);
                // Whatever happened, what the client was asked for is read to its end.
                pull.finish()?;
                added?;
            }
            _ => {
                self.framed(|framed| add::add_nar(store, &owner, info, framed, options))?;
            }
        }
        self.last()?;
        Ok(())
    }

    pub(super) fn add_multiple_to_store(
        &mut self,
        repair: bool,
        dont_check_sigs: bool,
    ) -> Result<(), Failure> {
        let rules = self.rules(dont_check_sigs);
        let ready = self.require_writable().and_then(|()| self.temp_roots());
        let owner = match ready {
            Ok(owner) => owner,
            Err(error) => return self.refuse_with_body(Body::Framed, &error),
        };
        let protocol = self.decoder.protocol();
        let budget = Arc::clone(&self.shared.budget);
        let store = self.store;
        let repair = repair && self.trusted;
        self.framed(|framed| {
            Batch::new(store, &owner, repair, &rules).read_all(framed, protocol, budget)
        })?;
        self.last()?;
        Ok(())
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
            Ok((AddMethod { method, algorithm }, self.temp_roots()?))
        })();
        let (how, owner) = match ready {
            Ok(ready) => ready,
            Err(error) => return self.refuse_with_body(Body::Framed, &error),
        };
        let store = self.store;
        let repair = repair && self.trusted;
        let info = self.framed(|framed| {
            add::add_from_dump(store, &owner, name, &how, references, repair, framed)
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
            let how = match (fixed, recursive) {
                (false, _) => AddMethod {
                    method: ContentAddressMethod::Nar,
                    algorithm: HashAlgorithm::Sha256,
                },
                (true, 0 | 1) => AddMethod {
                    method: if recursive == 1 {
                        ContentAddressMethod::Nar
                    } else {
                        ContentAddressMethod::Flat
                    },
                    algorithm: HashAlgorithm::from_name(algorithm).ok_or_else(|| {
                        Error::user(format!("unknown hash algorithm '{algorithm}'"))
                    })?,
                },
                (true, other) => {
                    return Err(Error::user(format!(
                        "unsupported file ingestion method {other}"
                    )));
                }
            };
            Ok((how, self.temp_roots()?))
        })();
        let (how, owner) = match ready {
            Ok(ready) => ready,
            Err(error) => return self.refuse_with_body(Body::RawNar, &error),
        };
        let none = BTreeSet::new();
        let input = self.decoder.reader();
        let added = if how.method == ContentAddressMethod::Flat {
            NarFile::open(input).and_then(|mut file| {
                let added =
                    add::add_from_dump(self.store, &owner, name, &how, &none, false, &mut file)?;
                file.finish()?;
                Ok(added)
            })
        } else {
            add::add_from_dump(self.store, &owner, name, &how, &none, false, input)
        };
        // Where the archive would have ended is unknown after a failure.
        let info = added.map_err(Failure::Fatal)?;
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
        let owner = self.temp_roots()?;
        let info = add::add_from_dump(
            self.store,
            &owner,
            name,
            &how,
            references,
            false,
            &mut &text[..],
        )?;
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
        let store = self.store;
        self.framed(|framed| store.add_build_log(drv, framed))?;
        self.reply_u64(1)
    }

    fn rules(&self, dont_check_sigs: bool) -> Rules {
        let options = &self.shared.options;
        Rules {
            trusted: self.trusted,
            check: if self.trusted {
                options.require_signatures && !dont_check_sigs
            } else {
                true
            },
            keys: options.trusted_public_keys.clone(),
        }
    }
}

/// Whose additions need a signature.
struct Rules {
    trusted: bool,
    check: bool,
    keys: PublicKeys,
}

impl Rules {
    /// A content address is as good as a signature: that the content agrees is checked when it comes.
    fn check(&self, store: &Store, info: &PathInfo) -> Result<()> {
        if !self.check || (info.ca.is_some() && info.is_content_addressed(store.store_dir())) {
            return Ok(());
        }
        let fingerprint = info.fingerprint(store.store_dir());
        if info
            .signatures
            .iter()
            .any(|signature| self.keys.verify(fingerprint.as_bytes(), signature))
        {
            return Ok(());
        }
        // Nix' words.
        let error = Error::user(format!(
            "cannot add path '{}' because it lacks a signature by a trusted key",
            store.store_dir().print(&info.path)
        ));
        Err(if self.trusted {
            error
        } else {
            error.with_hint("sign it with a key of the daemon's trusted public keys, or add it as a trusted user")
        })
    }
}

/// An AddMultipleToStore: reads archives one after another, publishes many at once.
struct Batch<'a> {
    store: &'a Store,
    owner: &'a TempRootOwner,
    repair: bool,
    rules: &'a Rules,
    pending: Vec<(PathInfo, Node)>,
    pending_nar_bytes: u64,
}

impl<'a> Batch<'a> {
    fn new(store: &'a Store, owner: &'a TempRootOwner, repair: bool, rules: &'a Rules) -> Self {
        Self {
            store,
            owner,
            repair,
            rules,
            pending: Vec::new(),
            pending_nar_bytes: 0,
        }
    }

    fn read_all<R: BufRead>(
        mut self,
        stream: R,
        protocol: Protocol,
        budget: Arc<Budget>,
    ) -> Result<()> {
        let broken = |error: WireError| Error::user("reading the upload").with_source(error);
        let mut decoder = Decoder::new(
            stream,
            self.store.store_dir().clone(),
            protocol,
            Some(budget),
        );
        let count = decoder.count().map_err(broken)?;
        for _ in 0..count {
            let info = decoder
                .message(read_add_multiple_item)
                .map_err(broken)?
                .map_err(|invalid| Error::user(invalid.0))?;
            self.read_one(info, decoder.reader())?;
            if self.pending.len() >= BATCH_PATHS_MAX
                || self.pending_nar_bytes >= BATCH_NAR_BYTES_MAX
            {
                self.publish_closed()?;
                if self.pending.is_empty() {
                    decoder.release();
                }
            }
        }
        self.publish(std::mem::take)
    }

    fn read_one(&mut self, mut info: PathInfo, stream: &mut dyn BufRead) -> Result<()> {
        self.rules.check(self.store, &info)?;
        info.ultimate = false;
        self.store.add_temp_root(self.owner, &info.path)?;
        if !self.repair && self.store.is_valid(&info.path)? {
            return skip_nar(stream)
                .map_err(|error| Error::user("reading the upload").with_source(error));
        }
        let root = add::ingest_nar_with(self.store, &info, stream, &ReadOptions::default())?;
        self.pending_nar_bytes += info.nar_size;
        self.pending.push((info, root));
        Ok(())
    }

    /// Publishes what refers only to what is valid or published with it. Clients send references
    /// first, so that mostly nothing stays behind.
    fn publish_closed(&mut self) -> Result<()> {
        let pending: HashSet<&StorePath> =
            self.pending.iter().map(|(info, _)| &info.path).collect();
        let outside: BTreeSet<&StorePath> = self
            .pending
            .iter()
            .flat_map(|(info, _)| &info.references)
            .filter(|reference| !pending.contains(reference))
            .collect();
        let outside: Vec<StorePath> = outside.into_iter().cloned().collect();
        let mut there: HashSet<StorePath> = self.store.valid_paths(&outside)?.into_iter().collect();
        there.extend(pending.into_iter().cloned());
        loop {
            let before = there.len();
            for (info, _) in &self.pending {
                if there.contains(&info.path) && !info.references.iter().all(|r| there.contains(r))
                {
                    there.remove(&info.path);
                }
            }
            if there.len() == before {
                break;
            }
        }
        self.publish(|pending| {
            let (ready, rest) = std::mem::take(pending)
                .into_iter()
                .partition(|(info, _)| there.contains(&info.path));
            *pending = rest;
            ready
        })
    }

    fn publish(
        &mut self,
        take: impl FnOnce(&mut Vec<(PathInfo, Node)>) -> Vec<(PathInfo, Node)>,
    ) -> Result<()> {
        let paths = take(&mut self.pending);
        self.pending_nar_bytes = self.pending.iter().map(|(info, _)| info.nar_size).sum();
        if self.repair {
            self.store.republish(paths)
        } else {
            self.store.publish(paths)
        }
    }
}

/// A NAR that is asked for piece by piece: protocol 1.21 and 1.22.
struct PullReader<'a> {
    decoder: &'a mut Decoder<Input>,
    encoder: &'a mut Encoder<Output>,
    /// Bytes of the current piece that are still to come, without its padding.
    left: u64,
    /// The piece's length, if its padding is still to come.
    piece: Option<u64>,
}

impl<'a> PullReader<'a> {
    fn new(decoder: &'a mut Decoder<Input>, encoder: &'a mut Encoder<Output>) -> Self {
        Self {
            decoder,
            encoder,
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
            Some(length) => self.decoder.reader().read_padding(length),
        }
    }
}

impl Read for PullReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

impl BufRead for PullReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            self.end_piece().map_err(io::Error::other)?;
            LogMessage::Read(PULL_BYTES).write(self.encoder)?;
            self.encoder.flush()?;
            let length = self.decoder.reader().read_u64().map_err(io::Error::other)?;
            if length == 0 || length > PULL_BYTES {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("asked for 1 to {PULL_BYTES} bytes, got {length}"),
                ));
            }
            self.left = length;
            self.piece = Some(length);
        }
        let buffer = self.decoder.reader().fill_buf()?;
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
        self.decoder.reader().consume(count);
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
