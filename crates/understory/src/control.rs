//! The control socket of a running instance: JSON, one line each way, any number of requests on a
//! connection.
//!
//! Only the instance's own user and root are heard (mode 0600, and SO_PEERCRED). Requests:
//! ```text
//! {"op":"status"}                     -> {"status":{…}}
//! {"op":"metrics"}                    -> {"metrics":{"metrics":{…},"clients":[…]}}
//! {"op":"stop"}                       -> {"stopping":true}, then the connection is closed at the end
//! {"op":"upgrade","program":"…"}      -> {"upgrading":true}; without a program: what lies where the running one lay
//! {"op":"published","names":["…"]}    -> {"published":{"looked_up":n,"remounts":n}}
//! {"op":"collect","freed_bytes_max":n}        -> {"collected":{"paths":n,"freed_bytes":n}}
//! {"op":"mount-generation","generation":n}    -> {"mounted":{"route":"file","reason":null}}
//! {"op":"keep-generations","generations":[n]} -> {"kept":n}
//! anything else                       -> {"error":"…"}
//! ```
//! `published` is how a process that adds to the store tells the instance: overlayfs keeps negative
//! entries for names that were looked up before they appeared in the lower directory, and only a
//! remount by the process that lives in the mount's namespace clears them. The mount server alone mounts generations,
//! for the daemon (see `up::renewal`).

use crate::daemon::ClientStatus;
use crate::metrics::Snapshot;
use crate::mount::Route;
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest line: [`NAMES_MAX`] names of 255 bytes with quotes and commas.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Most names in one `published` request; more are sent in several.
const NAMES_MAX: usize = 4_000;
/// Connections at a time; clients are commands that ask once.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may stay silent.
const IDLE_MS_MAX: u64 = 30_000;
/// How long a client waits for an answer. A `published` of [`NAMES_MAX`] cold names takes below 1 s.
const ANSWER_MS_MAX: u64 = 30_000;

/// How long it waits for a collection: as long as that may take, and longer.
const COLLECT_MS_MAX: u64 = 660_000;

/// How often a client asks: the first process may be ending, and the second may be upgraded.
const TRIES_MAX: u32 = 3;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Status {},
    Metrics {},
    Stop {},
    Upgrade {
        #[serde(default)]
        program: Option<PathBuf>,
    },
    Published {
        names: Vec<String>,
    },
    Collect {
        freed_bytes_max: u64,
    },
    #[serde(rename = "mount-generation")]
    MountGeneration {
        generation: u64,
    },
    #[serde(rename = "keep-generations")]
    KeepGenerations {
        generations: Vec<u64>,
    },
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Response {
    Status(Box<Status>),
    Metrics(Box<Observed>),
    Stopping(bool),
    Upgrading(bool),
    Published(Published),
    Collected(Collected),
    Mounted(MountedAs),
    Kept(usize),
    Error(String),
}

/// What a running instance says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Unix seconds at which it was ready.
    pub started: u64,
    /// The store.
    pub store: PathBuf,
    /// The logical store directory.
    pub store_dir: String,
    /// The live mount.
    pub lower: PathBuf,
    /// The lower daemon's socket.
    pub socket: PathBuf,
    /// Overlay mounts, if it made any.
    pub overlays: Vec<PathBuf>,
    /// The upper directory.
    pub upper: Option<PathBuf>,
    /// The overlay store's URL, for stock Nix to open it by itself.
    pub url: Option<String>,
    /// The overlay store's socket.
    #[serde(default)]
    pub overlay_socket: Option<PathBuf>,
    /// What clients of the overlay store set `NIX_REMOTE` to.
    #[serde(default)]
    pub nix_remote: Option<String>,
    /// The stores below, uppermost first.
    #[serde(default)]
    pub lowers: Vec<String>,
    /// True if its mounts are in a namespace of its own.
    pub private: bool,
    /// Names it was told of.
    pub published: u64,
    /// Overlay remounts that were needed.
    pub remounts: u64,
    /// Where its metrics are served: a URL, or `unix:` and a path.
    #[serde(default)]
    pub metrics: Option<String>,
}

/// What a running instance has done, and for whom.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// All numbers, of all its processes.
    pub metrics: Snapshot,
    /// The clients of its daemons, those that have been there for longest first.
    pub clients: Vec<ClientStatus>,
    /// The generations of its store, by number.
    #[serde(default)]
    pub generations: Vec<GenerationStatus>,
}

/// What a generation is to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationStatus {
    /// Its number.
    pub number: u64,
    /// Paths in it.
    pub paths: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Somebody has it mounted: the instance, or another process.
    pub is_mounted: bool,
    /// The overlay stands on it.
    pub has_overlay: bool,
    /// What the overlay waits for to be put on it.
    pub waits_for: Option<String>,
}

/// How a generation was mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountedAs {
    /// How the kernel reads it.
    pub route: Route,
    /// Why not in a better way.
    pub reason: Option<String>,
}

/// What was done about published names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Names looked up, times overlays.
    pub looked_up: u64,
    /// Overlays remounted.
    pub remounts: u64,
}

/// What a collection has deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Paths.
    pub paths: u64,
    /// Bytes of their NARs.
    pub freed_bytes: u64,
}

/// What the server asks of the instance.
pub trait Handler: Send + Sync {
    /// Describes the instance.
    fn status(&self) -> Status;
    /// Counts what it has done.
    fn metrics(&self) -> Observed;
    /// Begins to stop; returns at once.
    fn stop(&self);
    /// Begins to replace the processes that serve by those of `program`; returns at once.
    ///
    /// # Errors
    /// It cannot be done while it runs.
    fn upgrade(&self, _program: Option<PathBuf>) -> Result<()> {
        Err(Error::user(
            "this process serves by itself and cannot be upgraded while it runs",
        ))
    }
    /// Looks the names up through each overlay and remounts where one is hidden.
    ///
    /// # Errors
    /// A remount fails.
    fn published(&self, names: &[String]) -> Result<Published>;
    /// Deletes paths that are dead, as many as have about so many bytes, and takes their names from below the overlay.
    ///
    /// # Errors
    /// The overlay is in use; not by this process.
    fn collect(&self, _freed_bytes_max: u64) -> Result<Collected> {
        Err(Error::user("this process deletes nothing"))
    }
    /// Mounts a generation beside what is mounted already, for an overlay to stand on.
    ///
    /// # Errors
    /// It cannot be mounted, or not by this process.
    fn mount_generation(&self, _number: u64) -> Result<MountedAs> {
        Err(Error::user("this process mounts no generations"))
    }
    /// Unmounts the generations that are not among `numbers`; returns how many are served, with those that somebody still
    /// uses out of sight.
    ///
    /// # Errors
    /// Not by this process.
    fn keep_generations(&self, _numbers: &[u64]) -> Result<usize> {
        Err(Error::user("this process mounts no generations"))
    }
}

/// A served control socket. Dropping it removes the socket and closes all connections.
pub struct Server {
    path: PathBuf,
    /// The socket is ours.
    remove: bool,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `path`. A file that is there is replaced: hold the instance's lock.
    ///
    /// # Errors
    /// I/O.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("removing", path, e));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(|e| Error::io("listening on", path, e))?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))
            .map_err(|e| Error::io("setting the mode of", path, e))?;
        let mut server = Self::serve(listener, path, handler)?;
        server.remove = true;
        Ok(server)
    }

    /// Serves a socket that listens at `path` already, and stays there.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn serve(listener: UnixListener, path: &Path, handler: Arc<dyn Handler>) -> Result<Self> {
        let (wake, woken) =
            UnixStream::pair().map_err(|e| Error::io("making a socket pair for", path, e))?;
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&listener, &woken, &handler))
            .map_err(|e| Error::environment("starting the control thread").with_source(e))?;
        Ok(Self {
            path: path.to_owned(),
            remove: false,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.wake.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "waking the control thread");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread panicked");
        }
        if self.remove
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "removing the control socket");
        }
    }
}

/// A connection to a running instance.
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; `None` if nobody listens there.
    ///
    /// # Errors
    /// Not permitted, or I/O.
    pub fn connect(path: &Path) -> Result<Option<Self>> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Error::io("connecting to", path, e).with_hint(
                    "the instance belongs to another user: run the command as that user or as root",
                ));
            }
            Err(e) => return Err(Error::io("connecting to", path, e)),
        };
        stream
            .set_read_timeout(Some(Duration::from_millis(ANSWER_MS_MAX)))
            .and_then(|()| stream.set_write_timeout(Some(Duration::from_millis(ANSWER_MS_MAX))))
            .map_err(|e| Error::io("setting timeouts of", path, e))?;
        Ok(Some(Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
        }))
    }
    /// Asks what runs.
    ///
    /// # Errors
    /// I/O, a refusal.
    pub fn status(&mut self) -> Result<Status> {
        match self.ask(&Request::Status {})? {
            Response::Status(status) => Ok(*status),
            other => Err(self.unexpected(other)),
        }
    }
    /// Asks what it has done and who its clients are.
    ///
    /// # Errors
    /// I/O, a refusal; an instance of an older version does not know the question.
    pub fn metrics(&mut self) -> Result<Observed> {
        match self.ask(&Request::Metrics {})? {
            Response::Metrics(observed) => Ok(*observed),
            other => Err(self.unexpected(other)),
        }
    }
    /// Asks the instance to stop and waits until it closes the connection, which it does after
    /// its mounts are gone; at most `timeout`. True if it closed.
    ///
    /// # Errors
    /// I/O, a refusal.
    pub fn stop(mut self, timeout: Duration) -> Result<bool> {
        match self.ask(&Request::Stop {})? {
            Response::Stopping(_) => {}
            other => return Err(self.unexpected(other)),
        }
        let stream = self.stream.get_ref();
        stream
            .set_read_timeout(Some(timeout))
            .map_err(|e| Error::io("setting timeouts of", &self.path, e))?;
        let mut rest = [0; 64];
        match self.stream.read(&mut rest) {
            Ok(0) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(true),
            _ => Ok(false),
        }
    }
    /// Asks the instance to replace its processes by those of `program`; see [`crate::supervisor::Record`] for how far it is.
    ///
    /// # Errors
    /// I/O, a refusal.
    pub fn upgrade(&mut self, program: Option<PathBuf>) -> Result<()> {
        match self.ask(&Request::Upgrade { program })? {
            Response::Upgrading(_) => Ok(()),
            other => Err(self.unexpected(other)),
        }
    }
    /// Asks the mount server to mount a generation beside what is mounted already.
    ///
    /// # Errors
    /// I/O, a refusal.
    pub fn mount_generation(&mut self, number: u64) -> Result<MountedAs> {
        match self.ask(&Request::MountGeneration { generation: number })? {
            Response::Mounted(mounted) => Ok(mounted),
            other => Err(self.unexpected(other)),
        }
    }
    /// Asks the mount server to unmount all generations but these; returns how many are served.
    ///
    /// # Errors
    /// I/O, a refusal.
    pub fn keep_generations(&mut self, numbers: &[u64]) -> Result<usize> {
        let generations = numbers.to_vec();
        match self.ask(&Request::KeepGenerations { generations })? {
            Response::Kept(count) => Ok(count),
            other => Err(self.unexpected(other)),
        }
    }
    /// Asks the instance to delete paths that are dead, and waits.
    ///
    /// # Errors
    /// I/O; the overlay is in use.
    pub fn collect(&mut self, freed_bytes_max: u64) -> Result<Collected> {
        let patience = Some(Duration::from_millis(COLLECT_MS_MAX));
        self.stream
            .get_ref()
            .set_read_timeout(patience)
            .map_err(|e| Error::io("setting timeouts of", &self.path, e))?;
        match self.ask(&Request::Collect { freed_bytes_max })? {
            Response::Collected(collected) => Ok(collected),
            other => Err(self.unexpected(other)),
        }
    }
    /// Tells that names are new in the store.
    ///
    /// # Errors
    /// I/O, a refusal, a failed remount.
    pub fn published(&mut self, names: &[String]) -> Result<Published> {
        let mut sum = Published::default();
        for chunk in names.chunks(NAMES_MAX) {
            match self.ask(&Request::Published {
                names: chunk.to_vec(),
            })? {
                Response::Published(p) => {
                    sum.looked_up += p.looked_up;
                    sum.remounts += p.remounts;
                }
                other => return Err(self.unexpected(other)),
            }
        }
        Ok(sum)
    }

    /// A process that closes the connection without an answer is ending, and another one may go on with its socket: that
    /// one is asked then.
    fn ask(&mut self, request: &Request) -> Result<Response> {
        let line = encode(request);
        for _ in 0..TRIES_MAX {
            if let Some(answer) = self.try_ask(&line)? {
                return serde_json::from_str(&answer).map_err(|e| {
                    Error::internal(format!("answer from {}", self.path.display())).with_source(e)
                });
            }
            match Self::connect(&self.path)? {
                Some(next) => *self = next,
                None => break,
            }
        }
        Err(Error::environment(format!(
            "the instance at {} closed the connection without an answer",
            self.path.display()
        )))
    }
    fn try_ask(&mut self, line: &str) -> Result<Option<String>> {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
        let mut answer = String::new();
        let written = self.stream.get_mut().write_all(line.as_bytes());
        let read = written.map_err(|e| ("writing to", e)).and_then(|()| {
            let mut stream = (&mut self.stream).take(LINE_BYTES_MAX);
            let read = stream.read_line(&mut answer);
            read.map_err(|e| ("reading from", e))
        });
        match read {
            Ok(_) if answer.ends_with('\n') => Ok(Some(answer)),
            Ok(_) => Ok(None),
            Err((_, e)) if matches!(e.kind(), BrokenPipe | ConnectionReset) => Ok(None),
            Err((verb, e)) => Err(Error::io(verb, &self.path, e)),
        }
    }
    fn unexpected(&self, response: Response) -> Error {
        match response {
            Response::Error(message) => {
                Error::environment(format!("the running instance: {message}"))
            }
            other => Error::internal(format!(
                "unexpected answer from {}: {other:?}",
                self.path.display()
            )),
        }
    }
}

fn encode<T: Serialize>(value: &T) -> String {
    // Plain data with string keys: serialising cannot fail.
    let mut line =
        serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
    line.push('\n');
    line
}

/// Accepts until `woken` is closed, then closes all connections and waits for their threads.
fn serve(listener: &UnixListener, woken: &UnixStream, handler: &Arc<dyn Handler>) {
    // Another process may listen on it, too, and be quicker to accept.
    if let Err(error) = listener.set_nonblocking(true) {
        tracing::warn!(%error, "the control socket blocks");
    }
    let busy = Arc::new(AtomicUsize::new(0));
    let mut open: Vec<(UnixStream, JoinHandle<()>)> = Vec::new();
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(woken, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                tracing::error!(%error, "polling the control socket");
                break;
            }
            Ok(_) => {}
        }
        if !fds[1].revents().is_empty() {
            break;
        }
        open.retain(|(_, thread)| !thread.is_finished());
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                tracing::warn!(%error, "accepting on the control socket");
                continue;
            }
        };
        if busy.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            tracing::warn!("too many control connections");
            continue;
        }
        let Ok(closer) = stream.try_clone() else {
            continue;
        };
        let (handler, counted) = (handler.clone(), busy.clone());
        busy.fetch_add(1, Ordering::Relaxed);
        let spawned = std::thread::Builder::new()
            .name("control-client".into())
            .spawn(move || {
                if let Err(error) = connection(stream, &*handler) {
                    tracing::debug!(error = %error.chain(), "control connection");
                }
                counted.fetch_sub(1, Ordering::Relaxed);
            });
        match spawned {
            Ok(thread) => open.push((closer, thread)),
            Err(error) => {
                busy.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(%error, "starting a control thread");
            }
        }
    }
    for (stream, thread) in open {
        if let Err(error) = stream.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "closing a control connection");
        }
        drop(stream);
        if thread.join().is_err() {
            tracing::error!("a control connection panicked");
        }
    }
}

fn connection(stream: UnixStream, handler: &dyn Handler) -> Result<()> {
    let io = |e: std::io::Error| Error::environment("control connection").with_source(e);
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|e| io(e.into()))?;
    stream
        .set_read_timeout(Some(Duration::from_millis(IDLE_MS_MAX)))
        .map_err(io)?;
    stream
        .set_write_timeout(Some(Duration::from_millis(IDLE_MS_MAX)))
        .map_err(io)?;
    let mut writer = stream.try_clone().map_err(io)?;
    let mut reader = BufReader::new(stream);
    let permitted = peer.uid.is_root() || peer.uid == rustix::process::geteuid();
    loop {
        let mut line = String::new();
        (&mut reader)
            .take(LINE_BYTES_MAX)
            .read_line(&mut line)
            .map_err(io)?;
        if line.is_empty() {
            return Ok(());
        }
        let mut stopping = false;
        let response = if !permitted {
            Response::Error(format!(
                "user {} may not control this instance",
                peer.uid.as_raw()
            ))
        } else if !line.ends_with('\n') {
            Response::Error(format!(
                "a request is one line of at most {LINE_BYTES_MAX} bytes"
            ))
        } else {
            match serde_json::from_str::<Request>(&line) {
                Err(e) => Response::Error(format!("unknown request: {e}")),
                Ok(Request::Status {}) => Response::Status(Box::new(handler.status())),
                Ok(Request::Metrics {}) => Response::Metrics(Box::new(handler.metrics())),
                Ok(Request::Published { names }) => match handler.published(&names) {
                    Ok(done) => Response::Published(done),
                    Err(error) => Response::Error(error.chain()),
                },
                Ok(Request::Collect { freed_bytes_max }) => {
                    match handler.collect(freed_bytes_max) {
                        Ok(collected) => Response::Collected(collected),
                        Err(error) => Response::Error(error.chain()),
                    }
                }
                Ok(Request::MountGeneration { generation }) => {
                    match handler.mount_generation(generation) {
                        Ok(mounted) => Response::Mounted(mounted),
                        Err(error) => Response::Error(error.chain()),
                    }
                }
                Ok(Request::KeepGenerations { generations }) => {
                    match handler.keep_generations(&generations) {
                        Ok(count) => Response::Kept(count),
                        Err(error) => Response::Error(error.chain()),
                    }
                }
                Ok(Request::Upgrade { program }) => match handler.upgrade(program) {
                    Ok(()) => Response::Upgrading(true),
                    Err(error) => Response::Error(error.chain()),
                },
                Ok(Request::Stop {}) => {
                    stopping = true;
                    Response::Stopping(true)
                }
            }
        };
        let bad = matches!(response, Response::Error(_));
        writer.write_all(encode(&response).as_bytes()).map_err(io)?;
        if stopping {
            // The answer is on its way before anything is torn down. The connection stays open: its
            // end tells the client that the instance is gone.
            handler.stop();
            writer.set_read_timeout(None).map_err(io)?;
        } else if bad {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Fake {
        names: Mutex<Vec<String>>,
        stopped: std::sync::atomic::AtomicBool,
    }
    impl Handler for Fake {
        fn status(&self) -> Status {
            Status {
                pid: 7,
                version: "1".into(),
                started: 0,
                store: "/s".into(),
                store_dir: "/nix/store".into(),
                lower: "/s/mnt".into(),
                socket: "/s/run/daemon.sock".into(),
                overlays: vec![],
                upper: None,
                url: None,
                overlay_socket: None,
                nix_remote: None,
                lowers: vec![],
                private: false,
                published: 0,
                remounts: 0,
                metrics: None,
            }
        }
        fn metrics(&self) -> Observed {
            let mut observed = Observed::default();
            let metrics = &mut observed.metrics;
            metrics.counter("understory_a_total", "A.", &[("kind", "x")], 3);
            observed
        }
        fn stop(&self) {
            self.stopped.store(true, Ordering::SeqCst);
        }
        fn published(&self, names: &[String]) -> Result<Published> {
            if names.iter().any(|n| n == "bad") {
                return Err(Error::environment("remounting /m"));
            }
            self.names.lock().unwrap().extend_from_slice(names);
            Ok(Published {
                looked_up: names.len() as u64,
                remounts: 1,
            })
        }
    }

    fn control_metrics(fake: &Fake) -> Observed {
        Handler::metrics(fake)
    }

    #[test]
    fn a_conversation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        assert!(Client::connect(&path).unwrap().is_none());
        let fake = Arc::new(Fake::default());
        let server = Server::start(&path, fake.clone()).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );

        let mut client = Client::connect(&path).unwrap().unwrap();
        assert_eq!(client.status().unwrap().pid, 7);
        assert_eq!(client.metrics().unwrap(), control_metrics(&fake));
        let names: Vec<String> = (0..NAMES_MAX + 1).map(|i| format!("{i:0200}")).collect();
        assert_eq!(
            client.published(&names).unwrap(),
            Published {
                looked_up: 4001,
                remounts: 2
            }
        );
        assert_eq!(fake.names.lock().unwrap().len(), NAMES_MAX + 1);
        let error = client.published(&["bad".into()]).unwrap_err();
        assert_eq!(error.to_string(), "the running instance: remounting /m");

        let stopper = Client::connect(&path).unwrap().unwrap();
        let waiter = std::thread::spawn(move || stopper.stop(Duration::from_secs(20)).unwrap());
        while !fake.stopped.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        drop(server);
        assert!(waiter.join().unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn rubbish_is_answered_and_the_server_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let _server = Server::start(&path, Arc::new(Fake::default())).unwrap();
        for (rubbish, expected) in [
            ("{}\n".to_owned(), "unknown request: missing field `op`"),
            ("x\n".to_owned(), "unknown request: expected value"),
            (
                "x".repeat(1 << 20),
                "a request is one line of at most 1048576 bytes",
            ),
        ] {
            let mut raw = UnixStream::connect(&path).unwrap();
            raw.write_all(rubbish.as_bytes()).unwrap();
            let mut answer = String::new();
            BufReader::new(raw).read_line(&mut answer).unwrap();
            assert!(answer.contains(expected), "{answer}");
        }
        assert_eq!(
            Client::connect(&path)
                .unwrap()
                .unwrap()
                .status()
                .unwrap()
                .version,
            "1"
        );
    }
}
