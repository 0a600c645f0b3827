//! An HTTP server that does as it is told, good or bad.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a client asked.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Path and query.
    pub(crate) target: String,
    /// Headers, names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// How many requests for this target came before.
    pub(crate) earlier: usize,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }
    /// The first byte of `Range: bytes=N-`.
    pub(crate) fn from(&self) -> Option<usize> {
        self.header("range")?
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse()
            .ok()
    }
}

/// What to answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Send only so many bytes of the body.
    pub(crate) cut: Option<usize>,
    /// Then say nothing more, but stay.
    pub(crate) stall: bool,
    /// Send so many bytes at a time, with pauses.
    pub(crate) slow: Option<(usize, Duration)>,
    /// No `Content-Length`: the end of the connection is the end of the body.
    pub(crate) until_close: bool,
    /// Stall before the first byte of the answer.
    pub(crate) mute: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            cut: None,
            stall: false,
            slow: None,
            until_close: false,
            mute: false,
        }
    }
    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// Serves until it is dropped.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub(crate) fn new(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let handler: Arc<Handler> = Arc::new(handler);
        let (log, stopped) = (requests.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, log, stop) = (handler.clone(), log.clone(), stopped.clone());
                std::thread::spawn(move || {
                    // A client that goes away is no failure of the server's.
                    let _ = serve(stream.unwrap(), &*handler, &log, &stop);
                });
            }
        });
        Self {
            url,
            requests,
            stop,
        }
    }
    /// Serves a directory, except where `handler` has an answer.
    pub(crate) fn of(
        dir: PathBuf,
        handler: impl Fn(&Request, &[u8]) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |request| {
            let file = request.target.trim_start_matches('/').split('?').next();
            let found = std::fs::read(dir.join(file.unwrap_or_default()));
            let bytes = found.as_deref().unwrap_or_default();
            if let Some(reply) = handler(request, bytes) {
                return reply;
            }
            match found {
                Ok(bytes) => Reply::new(200, bytes),
                Err(_) => Reply::new(404, "not found"),
            }
        })
    }
    /// Targets that were asked for, in order.
    pub(crate) fn targets(&self) -> Vec<String> {
        self.requests()
            .into_iter()
            .map(|request| request.target)
            .collect()
    }
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
    }
}

fn serve(
    stream: TcpStream,
    handler: &Handler,
    log: &Mutex<Vec<Request>>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    let mut output = stream;
    output.set_nodelay(true)?;
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            input.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut request = Request {
            target,
            headers,
            earlier: 0,
        };
        {
            let mut log = log.lock().unwrap();
            request.earlier = log.iter().filter(|r| r.target == request.target).count();
            log.push(request.clone());
        }
        let reply = handler(&request);
        let stall = || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        if reply.mute {
            stall();
        }
        let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
        if !reply.until_close {
            head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
        }
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        output.write_all(format!("{head}\r\n").as_bytes())?;
        let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
        match reply.slow {
            None => output.write_all(body)?,
            Some((bytes, pause)) => {
                for piece in body.chunks(bytes) {
                    output.write_all(piece)?;
                    std::thread::sleep(pause);
                }
            }
        }
        output.flush()?;
        if reply.stall {
            stall();
        }
        if reply.cut.is_some() || reply.until_close {
            output.shutdown(Shutdown::Both)?;
            return Ok(());
        }
    }
}
