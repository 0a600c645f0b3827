//! One client: handshake, then one request after another.

use super::backend::{ClientInfo, Operations, Reporter};
use super::reporter::ToClient;
use super::server::{Shared, State};
use super::trust::{Decision, Peer};
use super::{BUFFER_BYTES, DRAIN_BYTES_MAX};
use crate::{Error, metrics};
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
        delete_dead_specific_referrers: true,
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
    pub(super) operations: Box<dyn Operations>,
    pub(super) state: Arc<State>,
    pub(super) decoder: Decoder<Input>,
    pub(super) encoder: Encoder<Output>,
    pub(super) trusted: bool,
    verbosity: Verbosity,
}

/// A connection whose client is not known yet.
struct Greeting<'a> {
    shared: &'a Shared,
    decoder: Decoder<Input>,
    encoder: Encoder<Output>,
    trusted: bool,
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

/// Serves a client to its end; `peer` is known of sockets.
pub(super) fn serve(shared: &Shared, endpoint: Endpoint, decision: &Decision, peer: Option<&Peer>) {
    let protocol = Protocol::plain(Version::OLDEST);
    let dir = shared.backend.store_dir();
    let mut greeting = Greeting {
        shared,
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
        trusted: *decision == Decision::Trusted,
    };
    let operations = match greeting.handshake(decision, peer) {
        Ok(Some(operations)) => operations,
        Ok(None) => return,
        Err(error) => return log_end(&error),
    };
    endpoint.state.clear_deadline();
    let mut connection = Connection {
        shared,
        operations,
        state: endpoint.state,
        decoder: greeting.decoder,
        encoder: greeting.encoder,
        trusted: greeting.trusted,
        verbosity: Verbosity::Info,
    };
    if let Err(error) = connection.requests() {
        log_end(&error);
    }
}

impl Greeting<'_> {
    /// Returns the store's operations for this client, or nothing if it was sent away.
    fn handshake(
        &mut self,
        decision: &Decision,
        peer: Option<&Peer>,
    ) -> Result<Option<Box<dyn Operations>>, WireError> {
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
            metrics::worker_refused(self.shared.counted_as);
            write_error(&mut self.encoder, message)?;
            return Ok(None);
        }
        let client = ClientInfo {
            trusted: self.trusted,
            uid: peer.map(|peer| peer.uid),
            pid: peer.map(|peer| peer.pid),
        };
        let operations = match self.shared.backend.connect(&client) {
            Ok(operations) => operations,
            Err(error) => {
                tracing::error!(error = error.chain(), "a client cannot be served");
                write_refusal(&mut self.encoder, &error)?;
                return Ok(None);
            }
        };
        LogMessage::Last.write(&mut self.encoder)?;
        self.encoder.flush()?;
        Ok(Some(operations))
    }
}

impl Connection<'_> {
    fn requests(&mut self) -> Result<(), WireError> {
        loop {
            self.state.set_busy(false);
            self.state.doing.end();
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
        let began = self.state.doing.begin(op);
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
        metrics::worker_operation(self.shared.counted_as, op, began, answer.is_err());
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

    pub(super) fn set_verbosity(&mut self, verbosity: Verbosity) {
        self.verbosity = verbosity;
    }

    fn refuse(&mut self, error: &Error) -> Result<(), WireError> {
        write_refusal(&mut self.encoder, error)
    }

    fn error(&mut self, message: impl Into<Vec<u8>>) -> Result<(), WireError> {
        write_error(&mut self.encoder, message)
    }

    // -- work

    /// Runs an operation that may say something meanwhile.
    pub(super) fn run<T>(
        &mut self,
        work: impl FnOnce(&dyn Operations, &dyn Reporter) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let reporter = ToClient::new(&mut self.encoder, &self.state, self.verbosity);
        let done = work(&*self.operations, &reporter);
        if reporter.is_lost() {
            return Err(gone());
        }
        Ok(done?)
    }

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

    /// Runs an operation that reads a framed stream. On failure the client is told at once; in any case
    /// the stream is read to its end.
    pub(super) fn framed<T>(
        &mut self,
        work: impl FnOnce(
            &dyn Operations,
            &mut FramedReader<&mut Input>,
            &dyn Reporter,
        ) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let mut framed = FramedReader::new(self.decoder.reader());
        let reporter = ToClient::new(&mut self.encoder, &self.state, self.verbosity);
        let done = work(&*self.operations, &mut framed, &reporter);
        if reporter.is_lost() {
            return Err(gone());
        }
        if let Err(error) = &done {
            // The frame's rest is counted in the reader that borrows the decoder; the refusal only
            // needs the encoder.
            write_refusal(&mut self.encoder, error)?;
        }
        framed.drain(DRAIN_BYTES_MAX)?;
        done.map_err(|_| Failure::Answered)
    }

    /// Runs an operation that reads the stream as it comes, up to the end of a NAR.
    pub(super) fn unframed<T>(
        &mut self,
        work: impl FnOnce(&dyn Operations, &mut Input, &ToClient<'_>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let reporter = ToClient::new(&mut self.encoder, &self.state, self.verbosity);
        let done = work(&*self.operations, self.decoder.reader(), &reporter);
        if reporter.is_lost() {
            return Err(gone());
        }
        done
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

    pub(super) fn require_writable(&self) -> Result<(), Error> {
        if !self.shared.backend.is_read_only() {
            return Ok(());
        }
        Err(Error::user("this store is read-only"))
    }
}

fn gone() -> Failure {
    io::Error::from(io::ErrorKind::BrokenPipe).into()
}

fn write_error(
    encoder: &mut Encoder<Output>,
    message: impl Into<Vec<u8>>,
) -> Result<(), WireError> {
    LogMessage::Error(ErrorMessage::new(message)).write(encoder)?;
    Ok(encoder.flush()?)
}

fn write_refusal(encoder: &mut Encoder<Output>, error: &Error) -> Result<(), WireError> {
    let message = refusal_text(error);
    tracing::debug!(message, "refused");
    let mut answer = ErrorMessage::new(message);
    // What another Nix was doing when it failed for us.
    answer.traces = error.traces().iter().map(|t| t.clone().into()).collect();
    LogMessage::Error(answer).write(encoder)?;
    Ok(encoder.flush()?)
}

/// Message, causes and hint.
pub(crate) fn refusal_text(error: &Error) -> String {
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
