//! Answers HTTP requests for the numbers: `/metrics` in Prometheus's text format, `/metrics.json` as JSON.
//!
//! On a loopback address or a unix socket (mode 0600), nothing else: the numbers say what a machine does, and there
//! is no authentication. A `Host` that is no loopback name is refused, so that a web page cannot reach the port
//! by a name of its own that points here.
//!
//! Why our own responder: `tiny_http` and `rouille` have had no release since 2022 and have no limit on the time that a
//! client may take; `hyper` and `axum` need an async runtime for one GET in 15 seconds. Here a request is parsed by `httparse`
//! (which the HTTP client brings anyway), is at most [`HEAD_BYTES_MAX`] long, has [`REQUEST_MS_MAX`] to come and
//! as long to be answered, and every answer ends its connection. At most [`CONNECTIONS_MAX`] are served at a time, each
//! by a short-lived thread; others are closed at once.

use super::Snapshot;
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of a request up to its empty line; scrapers send some hundred.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Headers of a request.
const HEADERS_MAX: usize = 64;
/// How long a request may take to come, and its answer to go.
const REQUEST_MS_MAX: u64 = 5_000;
/// Connections at a time; a scraper makes one.
const CONNECTIONS_MAX: usize = 16;
/// Bytes that are read and dropped after an answer, so that what a client still sends does not make the kernel throw
/// the answer away.
const LINGER_BYTES_MAX: usize = 64 << 10;

/// Where the numbers are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A loopback address. Port 0 takes any that is free.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Error;
    /// `127.0.0.1:9464`, `[::1]:9464`, `localhost:9464`, `unix:/run/x.sock` or `/run/x.sock`.
    fn from_str(text: &str) -> Result<Self> {
        const HINT: &str = "use a loopback address, such as 127.0.0.1:9464 or [::1]:9464, or a socket, such as unix:/run/understory/metrics.sock; \
             to reach it from elsewhere put a server with authentication in front";
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let numeric = match text.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => text.to_owned(),
        };
        match numeric.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
            Ok(address) => Err(Error::user(format!(
                "metrics are not served on {address}: it is no loopback address"
            ))
            .with_hint(HINT)),
            Err(_) => {
                Err(Error::user(format!("'{text}' is no address for metrics")).with_hint(HINT))
            }
        }
    }
}

impl Address {
    /// As it is written in settings.
    pub fn text(&self) -> String {
        match self {
            Self::Tcp(address) => address.to_string(),
            Self::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

/// As clients use it.
impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Takes a snapshot to be served.
pub type Take = dyn Fn() -> Snapshot + Send + Sync;

/// A served address. Dropping it ends it.
pub struct Endpoint {
    address: Address,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client's connection.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Endpoint {
    /// Listens at `address` and serves what `take` gives. A dead socket file that is there is replaced.
    ///
    /// # Errors
    /// The address is in use, not permitted, I/O.
    pub fn start(address: &Address, take: Arc<Take>) -> Result<Self> {
        let (listener, address) = listen(address)?;
        let (wake, woken) = UnixStream::pair()
            .map_err(|e| Error::environment("making a socket pair for metrics").with_source(e))?;
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || serve(&listener, &woken, &take))
            .map_err(|e| Error::environment("starting the metrics thread").with_source(e))?;
        Ok(Self {
            address,
            wake,
            thread: Some(thread),
        })
    }
    /// Where it listens; with the port that was taken.
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Err(error) = self.wake.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "waking the metrics thread");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the metrics thread panicked");
        }
        if let Address::Unix(path) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "removing the metrics socket");
        }
    }
}

fn listen(address: &Address) -> Result<(Listener, Address)> {
    match address {
        Address::Tcp(wanted) => {
            let failed = |e| {
                Error::environment(format!("listening on {wanted} for metrics"))
                    .with_source(e)
                    .with_hint("choose another port with --metrics; port 0 takes any that is free")
            };
            let listener = TcpListener::bind(wanted).map_err(failed)?;
            let taken = listener.local_addr().map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Ok((Listener::Tcp(listener), Address::Tcp(taken)))
        }
        Address::Unix(path) => {
            remove_dead_socket(path)?;
            let listener =
                UnixListener::bind(path).map_err(|e| Error::io("listening on", path, e))?;
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))
                .map_err(|e| Error::io("setting the mode of", path, e))?;
            listener
                .set_nonblocking(true)
                .map_err(|e| Error::io("listening on", path, e))?;
            Ok((Listener::Unix(listener), address.clone()))
        }
    }
}

/// Removes a socket that nobody listens on; anything else stays.
fn remove_dead_socket(path: &Path) -> Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket
        && UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path).map_err(|e| Error::io("removing", path, e))?;
    }
    Ok(())
}

impl Listener {
    fn accept(&self) -> std::io::Result<Stream> {
        Ok(match self {
            Self::Tcp(listener) => Stream::Tcp(listener.accept()?.0),
            Self::Unix(listener) => Stream::Unix(listener.accept()?.0),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Stream {
    fn set_timeouts(&self, limit: Duration) -> std::io::Result<()> {
        // Accepted sockets may inherit it.
        match self {
            Self::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_read_timeout(Some(limit))?;
                s.set_write_timeout(Some(limit))
            }
            Self::Unix(s) => {
                s.set_nonblocking(false)?;
                s.set_read_timeout(Some(limit))?;
                s.set_write_timeout(Some(limit))
            }
        }
    }
    fn end_of_answer(&self) -> std::io::Result<()> {
        match self {
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Write),
        }
    }
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(out),
            Self::Unix(s) => s.read(out),
        }
    }
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(data),
            Self::Unix(s) => s.write(data),
        }
    }
}

/// Accepts until `woken` is closed. Connections that are being served end by their time limit.
fn serve(listener: &Listener, woken: &UnixStream, take: &Arc<Take>) {
    let busy = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(woken, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                tracing::error!(%error, "polling the metrics address");
                return;
            }
            Ok(_) => {}
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(error) => {
                // Out of descriptors, say: not in a tight loop.
                tracing::warn!(%error, "accepting on the metrics address");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if busy.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            busy.fetch_sub(1, Ordering::AcqRel);
            tracing::debug!("too many connections for metrics");
            continue;
        }
        let guard = Guard(Arc::clone(&busy));
        let take = Arc::clone(take);
        let spawned = std::thread::Builder::new()
            .name("metrics-client".into())
            .spawn(move || {
                let _guard = guard;
                if let Err(error) = connection(stream, &*take) {
                    tracing::debug!(%error, "a client of the metrics");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "starting a thread for metrics");
        }
    }
}

/// Counts a connection's end, however it ends.
struct Guard(Arc<AtomicUsize>);
impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What is said to a request.
struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: String,
    /// The body is not sent (HEAD).
    head_only: bool,
}

impl Answer {
    fn text(status: &'static str, body: &str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: format!("{body}\n"),
            head_only: false,
        }
    }
}

fn connection(mut stream: Stream, take: &Take) -> std::io::Result<()> {
    let deadline = Instant::now() + Duration::from_millis(REQUEST_MS_MAX);
    let answer = match read_head(&mut stream, deadline)? {
        Head::Whole(head) => answer(&head, take),
        Head::TooLong => Answer::text("431 Request Header Fields Too Large", "request too long"),
        Head::Late => Answer::text("408 Request Timeout", "the request took too long"),
        Head::Gone => return Ok(()),
    };
    let mut message = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n",
        answer.status,
        answer.content_type,
        answer.body.len()
    );
    if !answer.head_only {
        message.push_str(&answer.body);
    }
    let deadline = Instant::now() + Duration::from_millis(REQUEST_MS_MAX);
    let mut rest = message.as_bytes();
    while !rest.is_empty() {
        let Some(left) = left_until(deadline) else {
            return Err(ErrorKind::TimedOut.into());
        };
        stream.set_timeouts(left)?;
        match stream.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.end_of_answer()?;
    let mut dropped = 0;
    let mut buffer = [0; 4096];
    while dropped < LINGER_BYTES_MAX
        && let Some(left) = left_until(deadline)
    {
        stream.set_timeouts(left)?;
        match stream.read(&mut buffer)? {
            0 => break,
            count => dropped += count,
        }
    }
    Ok(())
}

fn left_until(deadline: Instant) -> Option<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| *left > Duration::from_millis(1))
}

enum Head {
    Whole(Vec<u8>),
    TooLong,
    Late,
    Gone,
}

/// Reads up to the empty line that ends a request without a body.
fn read_head(stream: &mut Stream, deadline: Instant) -> std::io::Result<Head> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let Some(left) = left_until(deadline) else {
            return Ok(Head::Late);
        };
        stream.set_timeouts(left)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(Head::Gone),
            Ok(count) => head.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(Head::Late);
            }
            Err(error) => return Err(error),
        }
        let is_whole = head.windows(4).any(|w| w == b"\r\n\r\n");
        match is_whole {
            true => return Ok(Head::Whole(head)),
            false if head.len() > HEAD_BYTES_MAX => return Ok(Head::TooLong),
            false => {}
        }
    }
}

/// What is said to a request's head. Pure but for taking the snapshot.
fn answer(head: &[u8], take: &Take) -> Answer {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => {
            return Answer::text("431 Request Header Fields Too Large", "too many headers");
        }
        Ok(httparse::Status::Partial) | Err(_) => {
            return Answer::text("400 Bad Request", "not a request of HTTP/1");
        }
    }
    let host = request
        .headers
        .iter()
        .find(|h| h.name.eq_ignore_ascii_case("host"));
    if host.is_some_and(|host| !is_local_host(host.value)) {
        return Answer::text(
            "403 Forbidden",
            "the Host of the request is no loopback name",
        );
    }
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Answer::text("405 Method Not Allowed", "only GET and HEAD"),
    };
    let target = request.path.unwrap_or_default();
    let path = target.split(['?', '#']).next().unwrap_or_default();
    let mut answer = match path {
        "/metrics" => Answer {
            status: "200 OK",
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            body: take().to_prometheus(),
            head_only: false,
        },
        "/metrics.json" => match serde_json::to_string(&take()) {
            Ok(body) => Answer {
                status: "200 OK",
                content_type: "application/json",
                body,
                head_only: false,
            },
            Err(error) => Answer::text("500 Internal Server Error", &error.to_string()),
        },
        _ => Answer::text("404 Not Found", "there are /metrics and /metrics.json"),
    };
    answer.head_only = head_only;
    answer
}

/// True for names of this machine that nobody else can give out. An empty one comes over unix sockets.
fn is_local_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.is_empty()
        || name.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests;
