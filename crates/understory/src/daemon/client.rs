//! A client of the worker protocol: for tests, benchmarks, and for asking another daemon.
//!
//! Synchronous; one request at a time. Log messages of the server are collected, or dropped beyond
//! [`LOGS_MAX`]. An error of the server leaves the client usable, an error of the stream does not.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use understory_nix::wire::{FramedWriter, SHORT_BYTES_MAX, WireError, WireWrite};
use understory_nix::worker::{
    Body, BuildResult, CLIENT_MAGIC, Decoder, DrvOutput, Encoder, ErrorMessage, FEATURES_MAX,
    Features, GcRequest, KeyedBuildResult, LogMessage, MissingInfo, Protocol, Request,
    SERVER_MAGIC, SetOptions, SubstitutablePathInfo, Trust, Version, WireRealisation,
    read_path_info, read_unkeyed_path_info, write_path_info,
};
use understory_nix::{PathInfo, StoreDir, StorePath, nar};

/// Log messages kept between two calls of [`Client::take_logs`].
pub const LOGS_MAX: usize = 10_000;
/// Requests that are under way at a time where many are sent at once. Together they must fit in a socket's buffers
/// (208 KiB by default): nobody reads replies while they are written. One is at most 300 bytes.
const PIPELINED_REQUESTS_MAX: usize = 128;
/// Size of a frame when something is uploaded.
const FRAME_BYTES: usize = 32 << 10;

/// How to connect.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The store directory.
    pub store_dir: StoreDir,
    /// The newest version to speak.
    pub version: Version,
    /// Features to ask for (1.38).
    pub features: Features,
    /// Waits for the server's greeting before it sends the version, and then sends version, CPU
    /// affinity and reserved space in one packet, as Lix does.
    pub lix_order: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            store_dir: StoreDir::default(),
            version: Version::NEWEST,
            features: Features::default(),
            lix_order: false,
        }
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server says so; the connection can be used further.
    #[error("{}", String::from_utf8_lossy(&.0.message))]
    Server(ErrorMessage),
    /// The stream is lost.
    #[error(transparent)]
    Stream(#[from] WireError),
    /// The server's reply makes no sense.
    #[error("the server's reply: {0}")]
    Reply(String),
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Stream(error.into())
    }
}

impl From<ClientError> for crate::Error {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Server(message) => {
                Self::user(String::from_utf8_lossy(&message.message).into_owned()).with_traces(
                    message
                        .traces
                        .iter()
                        .map(|trace| String::from_utf8_lossy(trace).into_owned())
                        .collect(),
                )
            }
            ClientError::Stream(_) => Self::environment("talking to a daemon").with_source(error),
            ClientError::Reply(_) => Self::environment(error.to_string()),
        }
    }
}

/// Shorthand.
type Result<T, E = ClientError> = std::result::Result<T, E>;

/// A connection to a daemon.
pub struct Client {
    decoder: Decoder<BufReader<UnixStream>>,
    encoder: Encoder<BufWriter<UnixStream>>,
    server: Version,
    daemon_version: Option<String>,
    trust: Trust,
    logs: Vec<LogMessage>,
}

impl Client {
    /// Connects to the socket `path`.
    ///
    /// # Errors
    /// Nobody listens, the handshake fails, the server refuses us.
    pub fn connect(path: &Path, options: &ClientOptions) -> Result<Self> {
        Self::handshake(UnixStream::connect(path)?, options)
    }

    /// Shakes hands on a stream.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn handshake(stream: UnixStream, options: &ClientOptions) -> Result<Self> {
        let protocol = Protocol::plain(options.version);
        let mut client = Self {
            decoder: Decoder::new(
                BufReader::new(stream.try_clone()?),
                options.store_dir.clone(),
                protocol,
                None,
            ),
            encoder: Encoder::new(BufWriter::new(stream), options.store_dir.clone(), protocol),
            server: options.version,
            daemon_version: None,
            trust: Trust::Unknown,
            logs: Vec::new(),
        };
        client.greet(options)?;
        Ok(client)
    }

    fn greet(&mut self, options: &ClientOptions) -> Result<()> {
        let (d, e) = (&mut self.decoder, &mut self.encoder);
        e.u64(CLIENT_MAGIC)?;
        if !options.lix_order {
            e.u64(options.version.to_wire())?;
        }
        e.flush()?;
        let magic = d.u64()?;
        if magic != SERVER_MAGIC {
            return Err(ClientError::Reply(format!(
                "expected the worker protocol's greeting, found {magic:#x}"
            )));
        }
        let raw = d.u64()?;
        self.server = Version::from_wire(raw)
            .filter(|version| version.major() == 1)
            .ok_or_else(|| ClientError::Reply(format!("expected protocol 1.x, found {raw:#x}")))?;
        let mut protocol = Protocol::plain(self.server.min(options.version));
        if options.lix_order {
            e.u64(options.version.to_wire())?;
        }
        if protocol.since(38) {
            e.strings(options.features.names())?;
            e.flush()?;
            let count = d.count()?;
            if count > FEATURES_MAX {
                return Err(WireError::TooLong {
                    what: "list of features",
                    max: FEATURES_MAX,
                    found: count,
                }
                .into());
            }
            let mut names = Vec::new();
            for _ in 0..count {
                names.push(d.bytes(SHORT_BYTES_MAX)?);
            }
            protocol.features = options.features.and(Features::from_names(&names));
        }
        d.set_protocol(protocol);
        e.set_protocol(protocol);
        // No CPU affinity, no reserved space.
        e.u64(0)?;
        e.u64(0)?;
        e.flush()?;
        if protocol.since(33) {
            self.daemon_version = Some(d.text(SHORT_BYTES_MAX)?);
        }
        if protocol.since(35) {
            self.trust = Trust::from_wire(d.u64()?).unwrap_or(Trust::Unknown);
        }
        self.finish_log()
    }

    /// What was agreed upon.
    pub fn protocol(&self) -> Protocol {
        self.decoder.protocol()
    }
    /// The server's own version of the protocol.
    pub fn server_version(&self) -> Version {
        self.server
    }
    /// What the daemon says that it is (from 1.33 on).
    pub fn daemon_version(&self) -> Option<&str> {
        self.daemon_version.as_deref()
    }
    /// Whether the daemon trusts us (from 1.35 on).
    pub fn trust(&self) -> Trust {
        self.trust
    }
    /// Log messages since the last call.
    pub fn take_logs(&mut self) -> Vec<LogMessage> {
        std::mem::take(&mut self.logs)
    }
    /// Closes the connection in both directions.
    ///
    /// # Errors
    /// The stream's.
    pub fn close(&mut self) -> io::Result<()> {
        self.encoder.writer().get_ref().shutdown(Shutdown::Both)
    }
    /// Sends `bytes` as a request and reads up to its reply: for tests that send what no client would.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.encoder.writer().write_all(bytes)?;
        self.encoder.flush()?;
        self.finish_log()
    }
    /// The raw stream, for tests that send what no client would.
    pub fn stream(&mut self) -> &mut UnixStream {
        self.encoder.writer().get_mut()
    }

    // -- the cycle

    /// Sends a request without a body; log messages go to `log` as they come, not to [`Client::take_logs`]. `read`
    /// reads the reply.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn call<T>(
        &mut self,
        request: &Request,
        log: &mut dyn FnMut(LogMessage),
        read: impl FnOnce(&mut Decoder<BufReader<UnixStream>>) -> Result<T, WireError>,
    ) -> Result<T> {
        request.write(&mut self.encoder)?;
        self.encoder.flush()?;
        loop {
            match LogMessage::read(&mut self.decoder)? {
                LogMessage::Last => break,
                LogMessage::Error(error) => return Err(ClientError::Server(error)),
                message => log(message),
            }
        }
        self.decoder.release();
        self.reply(read)
    }

    /// Reads log messages up to the reply.
    fn finish_log(&mut self) -> Result<()> {
        read_answer(&mut self.decoder, &mut self.logs)
    }

    /// Sends a request without a body and reads up to its reply.
    fn send(&mut self, request: &Request) -> Result<()> {
        request.write(&mut self.encoder)?;
        self.encoder.flush()?;
        self.finish_log()
    }

    fn reply<T>(
        &mut self,
        read: impl FnOnce(&mut Decoder<BufReader<UnixStream>>) -> Result<T, WireError>,
    ) -> Result<T> {
        self.decoder
            .message(read)?
            .map_err(|invalid| ClientError::Reply(invalid.0))
    }

    /// Sends a request whose reply is a number (most are just 1).
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn number(&mut self, request: &Request) -> Result<u64> {
        self.send(request)?;
        self.reply(Decoder::u64)
    }
    /// Sends a request whose reply is a set of store paths.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn paths(&mut self, request: &Request) -> Result<BTreeSet<StorePath>> {
        self.send(request)?;
        self.reply(Decoder::store_path_set)
    }
    /// Sends a request whose reply is a string.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn text(&mut self, request: &Request) -> Result<String> {
        self.send(request)?;
        self.reply(|d| d.text(SHORT_BYTES_MAX))
    }
    /// Sends a request whose reply is a set of strings.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn texts(&mut self, request: &Request) -> Result<BTreeSet<String>> {
        self.send(request)?;
        self.reply(|d| Ok(d.list(Decoder::short)?.into_iter().collect()))
    }
    /// Sends a request whose reply is a store path or nothing.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn path(&mut self, request: &Request) -> Result<Option<StorePath>> {
        self.send(request)?;
        self.reply(Decoder::opt_store_path)
    }

    // -- queries

    /// SetOptions with default values.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn set_options(&mut self, options: SetOptions) -> Result<()> {
        self.send(&Request::SetOptions(Box::new(options)))
    }
    /// IsValidPath.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn is_valid_path(&mut self, path: &StorePath) -> Result<bool> {
        Ok(self.number(&Request::IsValidPath(path.clone()))? != 0)
    }
    /// QueryPathInfo.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>> {
        if self.number(&Request::QueryPathInfo(path.clone()))? == 0 {
            return Ok(None);
        }
        let path = path.clone();
        self.reply(|d| read_unkeyed_path_info(d, path)).map(Some)
    }
    /// QueryPathInfo for each of `paths`, in order, with many requests under way at a time. After an error of the
    /// server there may be replies that nobody has read: the client is of no use then.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_path_infos(&mut self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>> {
        let mut found = Vec::with_capacity(paths.len());
        let mut sent = 0;
        for path in paths {
            if sent - found.len() <= PIPELINED_REQUESTS_MAX / 2 && sent < paths.len() {
                let end = paths.len().min(found.len() + PIPELINED_REQUESTS_MAX);
                for path in &paths[sent..end] {
                    Request::QueryPathInfo(path.clone()).write(&mut self.encoder)?;
                }
                self.encoder.flush()?;
                sent = end;
            }
            self.finish_log()?;
            let is_valid = self.reply(Decoder::u64)? != 0;
            let path = path.clone();
            found.push(if is_valid {
                Some(self.reply(|d| read_unkeyed_path_info(d, path))?)
            } else {
                None
            });
        }
        Ok(found)
    }
    /// QueryValidPaths without substitution.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_valid_paths(&mut self, paths: Vec<StorePath>) -> Result<BTreeSet<StorePath>> {
        self.paths(&Request::QueryValidPaths {
            paths,
            substitute: false,
        })
    }
    /// QueryAllValidPaths.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_all_valid_paths(&mut self) -> Result<BTreeSet<StorePath>> {
        self.paths(&Request::QueryAllValidPaths)
    }
    /// QueryReferrers.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_referrers(&mut self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.paths(&Request::QueryReferrers(path.clone()))
    }
    /// QueryPathFromHashPart.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_path_from_hash_part(&mut self, hash_part: &str) -> Result<Option<StorePath>> {
        self.path(&Request::QueryPathFromHashPart(hash_part.to_owned()))
    }
    /// QueryDerivationOutputMap.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_derivation_output_map(
        &mut self,
        drv: &StorePath,
    ) -> Result<BTreeMap<String, Option<StorePath>>> {
        self.send(&Request::QueryDerivationOutputMap(drv.clone()))?;
        self.reply(|d| {
            Ok(d.list(|d| Ok((d.short()?, d.opt_store_path()?)))?
                .into_iter()
                .collect())
        })
    }
    /// QueryRealisation: output paths before 1.31, realisations since.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_realisation(&mut self, id: &DrvOutput) -> Result<Vec<WireRealisation>> {
        self.send(&Request::QueryRealisation(id.clone()))?;
        let protocol = self.protocol();
        self.reply(|d| {
            d.list(|d| {
                if protocol.features.realisation_with_path {
                    WireRealisation::read_unkeyed(d, id.clone())
                } else if protocol.since(31) {
                    WireRealisation::read(d)
                } else {
                    let out_path = d.store_path()?;
                    Ok(WireRealisation {
                        id: id.clone(),
                        out_path,
                        signatures: BTreeSet::new(),
                    })
                }
            })
        })
    }
    /// RegisterDrvOutput.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn register_drv_output(&mut self, realisation: &WireRealisation) -> Result<()> {
        self.send(&Request::RegisterDrvOutput(realisation.clone()))
    }
    /// QueryMissing.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_missing(&mut self, request: &Request) -> Result<MissingInfo> {
        self.send(request)?;
        self.reply(MissingInfo::read)
    }
    /// QuerySubstitutablePathInfos.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn query_substitutable_path_infos(
        &mut self,
        request: &Request,
    ) -> Result<Vec<(StorePath, SubstitutablePathInfo)>> {
        self.send(request)?;
        self.reply(|d| d.list(|d| Ok((d.store_path()?, SubstitutablePathInfo::read(d)?))))
    }
    /// NarFromPath: writes the archive to `out`.
    ///
    /// # Errors
    /// The server's, the stream's, an archive that is malformed.
    pub fn nar_from_path(&mut self, path: &StorePath, out: &mut dyn Write) -> Result<()> {
        self.send(&Request::NarFromPath(path.clone()))?;
        nar::copy(self.decoder.reader(), out).map_err(io::Error::other)?;
        Ok(())
    }
    /// NarFromPath: the archive follows in [`Client::archive`].
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn request_nar(&mut self, path: &StorePath) -> Result<()> {
        self.send(&Request::NarFromPath(path.clone()))
    }
    /// The archive after [`Client::request_nar`]: exactly one NAR must be read before the next request.
    pub fn archive(&mut self) -> &mut BufReader<UnixStream> {
        self.decoder.reader()
    }
    /// FindRoots: links and targets.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn find_roots(&mut self) -> Result<Vec<(Vec<u8>, StorePath)>> {
        self.send(&Request::FindRoots)?;
        self.reply(|d| d.list(|d| Ok((d.bytes(SHORT_BYTES_MAX)?, d.store_path()?))))
    }
    /// CollectGarbage: paths and bytes freed.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn collect_garbage(&mut self, request: GcRequest) -> Result<(BTreeSet<StorePath>, u64)> {
        self.send(&Request::CollectGarbage(request))?;
        self.reply(|d| {
            let paths = d.store_path_set()?;
            let freed = d.u64()?;
            d.u64()?;
            Ok((paths, freed))
        })
    }
    /// BuildDerivation.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn build_derivation(&mut self, request: &Request) -> Result<BuildResult> {
        self.send(request)?;
        self.reply(BuildResult::read)
    }
    /// BuildPathsWithResults.
    ///
    /// # Errors
    /// The server's, the stream's.
    pub fn build_paths_with_results(&mut self, request: &Request) -> Result<Vec<KeyedBuildResult>> {
        self.send(request)?;
        self.reply(|d| d.list(KeyedBuildResult::read))
    }

    // -- additions

    /// AddToStoreNar in the transport of the version; exactly one NAR is read from `archive`.
    ///
    /// # Errors
    /// The server's, the stream's; reading `archive`.
    pub fn add_to_store_nar(
        &mut self,
        info: &PathInfo,
        archive: &mut dyn Read,
        repair: bool,
        dont_check_sigs: bool,
    ) -> Result<()> {
        let request = Request::AddToStoreNar {
            info: Box::new(info.clone()),
            repair,
            dont_check_sigs,
        };
        match request.op().body(self.protocol()) {
            Body::Pulled => {
                request.write(&mut self.encoder)?;
                self.encoder.flush()?;
                loop {
                    match LogMessage::read(&mut self.decoder)? {
                        LogMessage::Last => return Ok(()),
                        LogMessage::Error(error) => return Err(ClientError::Server(error)),
                        LogMessage::Read(length) => {
                            let mut piece = vec![
                                0;
                                usize::try_from(length)
                                    .unwrap_or(usize::MAX)
                                    .min(FRAME_BYTES)
                            ];
                            let count = archive.read(&mut piece)?;
                            self.encoder.bytes(&piece[..count])?;
                            self.encoder.flush()?;
                        }
                        message => self.logs.push(message),
                    }
                }
            }
            _ => {
                self.upload(&request, |frames| io::copy(archive, frames).map(drop))?;
                Ok(())
            }
        }
    }
    /// AddMultipleToStore: `write` gets the stream behind the count and writes an info and a NAR for
    /// each, with [`write_info`].
    ///
    /// # Errors
    /// The server's, the stream's, `write`'s.
    pub fn add_multiple_to_store(
        &mut self,
        count: u64,
        repair: bool,
        dont_check_sigs: bool,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let request = Request::AddMultipleToStore {
            repair,
            dont_check_sigs,
        };
        self.upload(&request, |frames| {
            frames.write_u64(count)?;
            write(frames)
        })
    }
    /// AddToStore since 1.25: `dump` is a NAR or a file's contents, by `method`.
    ///
    /// # Errors
    /// The server's, the stream's; reading `dump`.
    pub fn add_to_store(
        &mut self,
        name: &str,
        method: &str,
        references: BTreeSet<StorePath>,
        dump: &mut dyn Read,
    ) -> Result<PathInfo> {
        let request = Request::AddToStore {
            name: name.to_owned(),
            method: method.to_owned(),
            references,
            repair: false,
        };
        self.upload(&request, |frames| io::copy(dump, frames).map(drop))?;
        self.reply(read_path_info)
    }
    /// AddToStore before 1.25: `dump` is a NAR whatever the method.
    ///
    /// # Errors
    /// The server's, the stream's; reading `dump`.
    pub fn add_to_store_old(
        &mut self,
        request: &Request,
        dump: &mut dyn Read,
    ) -> Result<Option<StorePath>> {
        request.write(&mut self.encoder)?;
        io::copy(dump, self.encoder.writer())?;
        self.encoder.flush()?;
        self.finish_log()?;
        self.reply(Decoder::opt_store_path)
    }
    /// AddBuildLog.
    ///
    /// # Errors
    /// The server's, the stream's; reading `log`.
    pub fn add_build_log(&mut self, drv: &StorePath, log: &mut dyn Read) -> Result<()> {
        self.upload(&Request::AddBuildLog(drv.clone()), |frames| {
            io::copy(log, frames).map(drop)
        })?;
        self.reply(Decoder::u64).map(drop)
    }

    /// Sends a framed body. If the server has answered before all was sent, the rest is not sent. What it
    /// says meanwhile is read by another thread, as Nix' clients do it: else both might wait for the other.
    fn upload(
        &mut self,
        request: &Request,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        request.write(&mut self.encoder)?;
        self.encoder.flush()?;
        let answered = AtomicBool::new(false);
        let (decoder, encoder, logs) = (&mut self.decoder, &mut self.encoder, &mut self.logs);
        std::thread::scope(|scope| {
            let hearing = std::thread::Builder::new()
                .name("upload's messages".to_owned())
                .spawn_scoped(scope, || {
                    let answer = read_answer(decoder, logs);
                    answered.store(true, Ordering::Release);
                    answer
                })?;
            let sent = send_frames(encoder, &answered, write);
            if let Err(error) = &sent {
                tracing::debug!(%error, "an upload has failed");
                // Nothing more will come, or else this waits for ever.
                encoder.writer().get_ref().shutdown(Shutdown::Both)?;
            }
            let answer = hearing
                .join()
                .map_err(|_| ClientError::Reply("reading it failed".to_owned()))?;
            match (answer, sent) {
                (Err(error @ ClientError::Server(_)), _) => Err(error),
                (_, Err(error)) => Err(error.into()),
                (answer, Ok(())) => answer,
            }
        })
    }
}

/// Reads log messages up to the reply.
fn read_answer(
    decoder: &mut Decoder<BufReader<UnixStream>>,
    logs: &mut Vec<LogMessage>,
) -> Result<()> {
    loop {
        match LogMessage::read(decoder)? {
            LogMessage::Last => {
                decoder.release();
                return Ok(());
            }
            LogMessage::Error(error) => return Err(ClientError::Server(error)),
            message if logs.len() < LOGS_MAX => logs.push(message),
            _ => {}
        }
    }
}

fn send_frames(
    encoder: &mut Encoder<BufWriter<UnixStream>>,
    answered: &AtomicBool,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut frames = FramedWriter::new(encoder.writer());
    let mut buffered = BufWriter::with_capacity(
        FRAME_BYTES,
        StopWhenAnswered {
            frames: &mut frames,
            answered,
        },
    );
    let written = write(&mut buffered).and_then(|()| buffered.flush());
    // What a stopped upload has left must not be written behind the end.
    let _unsent = buffered.into_parts();
    if !answered.load(Ordering::Acquire) {
        written?;
    }
    frames.finish()?;
    encoder.flush()
}

/// Writes the path info that stands before each NAR of an AddMultipleToStore.
///
/// # Errors
/// The stream's.
pub fn write_info(out: &mut dyn Write, dir: &StoreDir, info: &PathInfo) -> io::Result<()> {
    write_path_info(
        &mut Encoder::new(out, dir.clone(), Protocol::plain(Version::OLDEST)),
        info,
    )
}

/// Ends an upload when the server has answered.
struct StopWhenAnswered<'a, W: Write> {
    frames: &'a mut FramedWriter<W>,
    answered: &'a AtomicBool,
}

impl<W: Write> Write for StopWhenAnswered<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.answered.load(Ordering::Acquire) {
            return Err(io::Error::other("the server has answered already"));
        }
        self.frames.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.frames.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_what_the_server_was_doing() {
        let message = ErrorMessage {
            message: b"no".to_vec(),
            traces: vec![b"while looking".to_vec()],
            exit_status: 1,
        };
        let error = crate::Error::from(ClientError::Server(message));
        assert_eq!(error.chain(), "no");
        assert_eq!(error.traces(), ["while looking"]);
    }
}
