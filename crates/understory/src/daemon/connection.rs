//! One client: handshake, then one request after another.

use super::server::{Shared, State};
use super::trust::Decision;
use super::{BUFFER_BYTES, DRAIN_BYTES_MAX};
use crate::store::TempRootOwner;
use crate::{Error, Store};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use understory_nix::nar;
use understory_nix::wire::{FramedReader, SHORT_BYTES_MAX, WireError};
use understory_nix::worker::{
    Body, CLIENT_MAGIC, Decoder, Encoder, ErrorMessage, FEATURES_MAX, Features, LogMessage, Op,
    Protocol, Request, SERVER_MAGIC, Trust, Verbosity, Version,
};

/// What we speak at most.
const OFFERED: Protocol = Protocol {
    version: Version::NEWEST,
    features: Features {
        realisation_with_path: true,
        delete_dead_specific_referrers: false,
    },
};
/// Clients before this send no CPU affinity and no space to reserve; they are refused anyhow.
const AFFINITY_SINCE: u8 = 14;
const RESERVE_SINCE: u8 = 11;

/// The streams of a client.
pub(super) struct Endpoint {
    pub(super) reader: Box<dyn Read + Send>,
    pub(super) writer: Box<dyn Write + Send>,
    pub(super) state: Arc<State>,
}

pub(super) type Input = BufReader<Box<dyn Read + Send>>;
pub(super) type Output = BufWriter<Box<dyn Write + Send>>;

/// A connection that is being served.
pub(super) struct Connection<'a> {
    pub(super) shared: &'a Shared,
    pub(super) store: &'a Store,
    pub(super) state: Arc<State>,
    pub(super) decoder: Decoder<Input>,
    pub(super) encoder: Encoder<Output>,
    pub(super) trusted: bool,
    verbosity: Verbosity,
    temp_roots: Option<Arc<TempRootOwner>>,
}

/// Why a request was not answered with a reply.
pub(super) enum Failure {
    /// It cannot be met: the client is told, the connection goes on.
    Refused(Error),
    /// The client was told and the rest of its request was read.
    Answered,
    /// It cannot be met and the stream cannot be brought in step again: the client is told, then the
    /// connection ends.
    Fatal(Error),
    /// The stream is gone.
    Lost(WireError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}
impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        Self::Lost(error)
    }
}
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.into())
    }
}

impl<'a> Connection<'a> {
    pub(super) fn new(shared: &'a Shared, endpoint: Endpoint) -> Self {
        let protocol = Protocol::plain(Version::OLDEST);
        let dir = shared.store.store_dir();
        Self {
            shared,
            store: &shared.store,
            state: endpoint.state,
            decoder: Decoder::new(
                BufReader::with_capacity(BUFFER_BYTES, endpoint.reader),
                dir.clone(),
                protocol,
                Some(Arc::clone(&shared.budget)),
            ),
            encoder: Encoder::new(
                BufWriter::with_capacity(BUFFER_BYTES, endpoint.writer),
                dir.clone(),
                protocol,
            ),
            trusted: false,
            verbosity: Verbosity::Info,
            temp_roots: None,
        }
    }

    /// Serves the client to its end.
    pub(super) fn run(mut self, decision: &Decision) {
        self.trusted = *decision == Decision::Trusted;
        match self.handshake(decision) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return log_end(&error),
        }
        self.state.clear_deadline();
        if let Err(error) = self.requests() {
            log_end(&error);
        }
    }

    /// Returns false if the client is to be sent away.
    fn handshake(&mut self, decision: &Decision) -> Result<bool, WireError> {
        let magic = self.decoder.u64()?;
        if magic != CLIENT_MAGIC {
            return Err(WireError::Unexpected {
                what: "greeting",
                expected: "the worker protocol's",
                found: format!("{magic:#x}"),
            });
        }
        // Before the version is read: Lix and old clients wait for this.
        self.encoder.u64(SERVER_MAGIC)?;
        self.encoder.u64(OFFERED.version.to_wire())?;
        self.encoder.flush()?;
        let raw = self.decoder.u64()?;
        let client = Version::from_wire(raw).unwrap_or(Version::new(u8::MAX, u8::MAX));
        let mut protocol = Protocol::plain(client.min(OFFERED.version));
        self.decoder.set_protocol(protocol);
        self.encoder.set_protocol(protocol);
        if protocol.since(38) {
            let count = self.decoder.count()?;
            if count > FEATURES_MAX {
                return Err(WireError::TooLong {
                    what: "list of features",
                    max: FEATURES_MAX,
                    found: count,
                });
            }
            let mut names = Vec::new();
            for _ in 0..count {
                names.push(self.decoder.bytes(SHORT_BYTES_MAX)?);
            }
            protocol.features = OFFERED.features.and(Features::from_names(&names));
            self.encoder.strings(OFFERED.features.names())?;
            self.encoder.flush()?;
            self.decoder.set_protocol(protocol);
            self.encoder.set_protocol(protocol);
        }
        if protocol.since(AFFINITY_SINCE) && self.decoder.bool()? {
            let _affinity = self.decoder.u64()?;
        }
        if protocol.since(RESERVE_SINCE) {
            let _reserve_space = self.decoder.bool()?;
        }
        if protocol.since(33) {
            let version = self.shared.options.version.clone();
            self.encoder.bytes(version)?;
        }
        if protocol.since(35) {
            self.encoder.u64(
                if self.trusted {
                    Trust::Trusted
                } else {
                    Trust::NotTrusted
                }
                .to_wire(),
            )?;
        }
        let refusal = if client.major() != 1 || client < Version::OLDEST {
            Some(format!(
                "the client speaks version {client} of the worker protocol, this daemon speaks {} to {}",
                Version::OLDEST,
                Version::NEWEST
            ))
        } else if let Decision::Refused(message) = decision {
            Some(message.clone())
        } else {
            None
        };
        if let Some(message) = refusal {
            tracing::info!(message, "refused a client");
            self.error(message)?;
            return Ok(false);
        }
        LogMessage::Last.write(&mut self.encoder)?;
        self.encoder.flush()?;
        Ok(true)
    }

    fn requests(&mut self) -> Result<(), WireError> {
        loop {
            self.state.set_busy(false);
            if self.shared.stopping.load(Ordering::SeqCst) || self.decoder.at_end()? {
                return Ok(());
            }
            self.state.set_busy(true);
            let go_on = self.request();
            self.decoder.release();
            if !go_on? {
                return Ok(());
            }
        }
    }

    /// Reads and answers one request; false if the connection must end.
    fn request(&mut self) -> Result<bool, WireError> {
        let number = self.decoder.u64()?;
        let protocol = self.decoder.protocol();
        let Some(op) = Op::from_wire(number).filter(|op| op.exists(protocol)) else {
            // How long its arguments are is unknown.
            self.error(format!("invalid operation {number}"))?;
            return Ok(false);
        };
        self.shared.limit_arguments(&self.state);
        let request = self.decoder.message(|decoder| Request::read(op, decoder));
        self.state.clear_deadline();
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                if !error.is_disconnect() {
                    self.error(format!("reading the arguments of {}: {error}", op.name()))?;
                }
                return Err(error);
            }
        };
        let _span = tracing::debug_span!("request", op = op.name()).entered();
        let answer = match request {
            Err(invalid) => self.refuse_with_body(op.body(protocol), &Error::user(invalid.0)),
            Ok(request) => self.handle(request),
        };
        match answer {
            Ok(()) => self.encoder.flush()?,
            Err(Failure::Answered) => {}
            Err(Failure::Refused(error)) => self.refuse(&error)?,
            Err(Failure::Fatal(error)) => {
                self.refuse(&error)?;
                return Ok(false);
            }
            Err(Failure::Lost(error)) => return Err(error),
        }
        Ok(true)
    }

    // -- replies

    /// Says that the reply follows. Nothing may be refused after it.
    pub(super) fn last(&mut self) -> io::Result<()> {
        LogMessage::Last.write(&mut self.encoder)
    }

    /// A reply of one integer.
    pub(super) fn reply_u64(&mut self, value: u64) -> Result<(), Failure> {
        self.last()?;
        Ok(self.encoder.u64(value)?)
    }

    /// Says something to the user at the other end.
    pub(super) fn say(&mut self, level: Verbosity, text: &str) -> io::Result<()> {
        if level > self.verbosity {
            return Ok(());
        }
        LogMessage::Next(format!("{text}\n").into_bytes()).write(&mut self.encoder)?;
        self.encoder.flush()
    }

    pub(super) fn set_verbosity(&mut self, verbosity: Verbosity) {
        self.verbosity = verbosity;
    }

    fn refuse(&mut self, error: &Error) -> Result<(), WireError> {
        write_refusal(&mut self.encoder, error)
    }

    fn error(&mut self, message: impl Into<Vec<u8>>) -> Result<(), WireError> {
        LogMessage::Error(ErrorMessage::new(message)).write(&mut self.encoder)?;
        Ok(self.encoder.flush()?)
    }

    // -- uploads

    /// Tells the client at once, then reads what it still sends for this request.
    pub(super) fn refuse_with_body(&mut self, body: Body, error: &Error) -> Result<(), Failure> {
        self.refuse(error)?;
        match body {
            // Pulled: nothing was asked for, so nothing comes.
            Body::None | Body::Pulled => {}
            Body::Framed => {
                FramedReader::new(self.decoder.reader()).drain(DRAIN_BYTES_MAX)?;
            }
            Body::RawNar => skip_nar(self.decoder.reader())?,
        }
        Err(Failure::Answered)
    }

    /// Hands a framed stream to `work`. On failure the client is told at once; in any case the
    /// stream is read to its end.
    pub(super) fn framed<T>(
        &mut self,
        work: impl FnOnce(&mut FramedReader<&mut Input>) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let mut framed = FramedReader::new(self.decoder.reader());
        let done = work(&mut framed);
        if let Err(error) = &done {
            // The frame's rest is counted in the reader that borrows the decoder; the refusal only
            // needs the encoder.
            write_refusal(&mut self.encoder, error)?;
        }
        framed.drain(DRAIN_BYTES_MAX)?;
        done.map_err(|_| Failure::Answered)
    }

    // -- rights

    pub(super) fn require_trust(&self, what: &str) -> Result<(), Error> {
        if self.trusted {
            return Ok(());
        }
        Err(Error::user(format!(
            "{what} is not allowed because you are not in 'trusted-users'"
        )))
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.shared.options.read_only || self.store.is_read_only()
    }

    pub(super) fn require_writable(&self) -> Result<(), Error> {
        if !self.is_read_only() {
            return Ok(());
        }
        Err(Error::user("this store is read-only"))
    }

    /// The connection's group of temporary roots.
    pub(super) fn temp_roots(&mut self) -> Result<Arc<TempRootOwner>, Error> {
        let owner = match self.temp_roots.take() {
            Some(owner) => owner,
            None => Arc::new(self.store.temp_root_owner()?),
        };
        self.temp_roots = Some(Arc::clone(&owner));
        Ok(owner)
    }
}

fn write_refusal(encoder: &mut Encoder<Output>, error: &Error) -> Result<(), WireError> {
    let message = refusal_text(error);
    tracing::debug!(message, "refused");
    LogMessage::Error(ErrorMessage::new(message)).write(encoder)?;
    Ok(encoder.flush()?)
}

/// Message, causes and hint.
pub(super) fn refusal_text(error: &Error) -> String {
    let mut message = error.chain();
    if let Some(hint) = error.hint() {
        message.push_str("\nhint: ");
        message.push_str(hint);
    }
    message
}

/// Reads a NAR and drops it.
pub(super) fn skip_nar(stream: &mut dyn io::BufRead) -> Result<(), WireError> {
    let mut reader = nar::Reader::new(stream);
    loop {
        match reader.next_event() {
            Ok(nar::Event::End) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error).into()),
        }
    }
}

fn log_end(error: &WireError) {
    if error.is_disconnect() {
        tracing::debug!(%error, "client has gone");
    } else {
        tracing::info!(%error, "connection ended");
    }
}
