//! HTTP: one client for all that share its settings, with a pool of connections; and binary caches over it.
//!
//! One request is one attempt; who tries again is in [`super::files`]. Statuses are taken as Nix does: 404, 410, 401 and
//! 403 say that there is no such file (S3 answers 403 for what is not there), 408, 429 and most of 5xx that another
//! attempt may help. A download that breaks goes on where it was, if the server has said that it can
//! (`Accept-Ranges: bytes`) and the file is still the same.

mod netrc;
mod transport;

use super::cancel::Cancel;
use super::files::{Attempts, Body, Broken, Context, Failure, Files};
use crate::import::decompress;
use crate::settings::Settings;
use crate::{Error, Result};
use netrc::Netrc;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use understory_nix::narinfo::Compression;
use ureq::http::{HeaderMap, Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, BodyReader, Timeout};
use url::Url;

/// Redirects that are followed.
const REDIRECTS_MAX: u32 = 10;
/// Bytes of an error's body that are read so that the connection can be used again.
const ERROR_BYTES_MAX: u64 = 16 << 10;
/// Connections kept for later, in all.
const IDLE_CONNECTIONS_MAX: usize = 64;
/// How long they are kept. Servers close theirs after 60 to 75 s, mostly.
const IDLE_AGE: Duration = Duration::from_secs(50);
/// Buffer between a connection and a decompressor.
const BUFFER_BYTES: usize = 64 << 10;
/// Encodings that we can undo; what `Accept-Encoding` says.
const ENCODINGS: &str = "zstd, br, gzip";
/// Where systems keep their certificate authorities: Debian and NixOS, Fedora, openSUSE, Alpine.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// What clients differ by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct HttpOptions {
    connect_timeout: Duration,
    stalled_timeout: Duration,
    attempts: u32,
    connections: usize,
    ssl_cert_file: Option<PathBuf>,
    netrc_file: Option<PathBuf>,
}

impl HttpOptions {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            connect_timeout: settings.connect_timeout,
            stalled_timeout: settings.stalled_timeout,
            attempts: settings.download_attempts.max(1),
            connections: settings.http_connections,
            ssl_cert_file: settings.ssl_cert_file.clone(),
            netrc_file: settings.netrc_file.clone(),
        }
    }
    pub(super) fn stalled_timeout(&self) -> Duration {
        self.stalled_timeout
    }
}

/// A client.
pub(super) struct Http {
    agent: Agent,
    netrc: Netrc,
    options: HttpOptions,
}

/// What a request asks for.
#[derive(Clone, Copy, Default)]
struct Ask<'a> {
    /// Ask for the rest from this byte on.
    from: u64,
    /// Only if the file still has this tag.
    if_range: Option<&'a str>,
    /// The server may compress.
    encodings: bool,
}

impl Http {
    pub(super) fn new(options: HttpOptions) -> Result<Self> {
        let some = |time: Duration| (!time.is_zero()).then_some(time);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("understory/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("")
            .max_redirects(REDIRECTS_MAX)
            .max_idle_connections(IDLE_CONNECTIONS_MAX)
            .max_idle_connections_per_host(match options.connections {
                0 => IDLE_CONNECTIONS_MAX,
                some => some,
            })
            .max_idle_age(IDLE_AGE)
            .timeout_connect(some(options.connect_timeout))
            .timeout_resolve(some(options.connect_timeout))
            .timeout_per_read(some(options.stalled_timeout))
            .timeout_per_write(some(options.stalled_timeout))
            .tls_config(
                TlsConfig::builder()
                    .root_certs(root_certs(options.ssl_cert_file.as_deref())?)
                    .build(),
            )
            .build();
        let netrc = match &options.netrc_file {
            Some(file) => Netrc::read(file)?,
            None => Netrc::default(),
        };
        let resolver = ureq::unversioned::resolver::DefaultResolver::default();
        Ok(Self {
            agent: Agent::with_parts(config, transport::connector(), resolver),
            netrc,
            options,
        })
    }

    pub(super) fn attempts(&self) -> u32 {
        self.options.attempts
    }
    pub(super) fn connections(&self) -> usize {
        self.options.connections
    }

    /// Makes one request; `None` if there is no such file. `name` stands for the URL in messages.
    fn get(
        &self,
        url: &Url,
        name: &str,
        ask: Ask<'_>,
        cancel: &Cancel,
    ) -> Result<Option<Response<ureq::Body>>, Failure> {
        let mut plain = url.clone();
        // Cannot fail for URLs with a host, which these are.
        let _ = plain.set_username("");
        let _ = plain.set_password(None);
        let mut request = self.agent.get(plain.as_str());
        if let Some(value) = self.authorization(url) {
            request = request.header(header::AUTHORIZATION, value);
        }
        if ask.encodings {
            request = request.header(header::ACCEPT_ENCODING, ENCODINGS);
        }
        if ask.from > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", ask.from));
            if let Some(tag) = ask.if_range {
                request = request.header(header::IF_RANGE, tag);
            }
        }
        let response = request
            .call()
            .map_err(|error| self.failure(name, &error, cancel))?;
        let status = response.status().as_u16();
        if matches!(status, 200 | 206) {
            return Ok(Some(response));
        }
        let wait = text(response.headers(), header::RETRY_AFTER)
            .and_then(|text| text.trim().parse().ok())
            .map(Duration::from_secs);
        // Read so that the connection can be used again; what it says does not matter.
        let _ = std::io::copy(
            &mut response.into_body().into_reader().take(ERROR_BYTES_MAX),
            &mut std::io::sink(),
        );
        let error = Error::environment(format!("unable to download '{name}': HTTP error {status}"));
        match status {
            401 | 403 | 404 | 410 => Ok(None),
            501 | 505 | 511 => Err(Failure::Final(error)),
            408 | 429 | 500.. => Err(Failure::Passing {
                error,
                wait,
                unreachable: false,
            }),
            _ => Err(Failure::Final(error)),
        }
    }

    /// Name and password in the URL, or of the host in the netrc file.
    fn authorization(&self, url: &Url) -> Option<String> {
        let (user, password) = match (url.username(), url.password()) {
            ("", None) => {
                let (user, password) = self.netrc.find(url.host_str()?)?;
                (user.to_owned(), password.to_owned())
            }
            (user, password) => (
                super::url::percent_decode(user),
                super::url::percent_decode(password.unwrap_or_default()),
            ),
        };
        let pair = format!("{user}:{password}");
        Some(format!(
            "Basic {}",
            data_encoding::BASE64.encode(pair.as_bytes())
        ))
    }

    /// What an error of the client means.
    fn failure(&self, name: &str, error: &ureq::Error, cancel: &Cancel) -> Failure {
        use std::io::ErrorKind;
        use ureq::Error as E;
        if cancel.is_set() {
            return Failure::Cancelled;
        }
        let unable = |why: &str| Error::environment(format!("unable to download '{name}': {why}"));
        let passing = |why: &str, unreachable| Failure::Passing {
            error: unable(why),
            wait: None,
            unreachable,
        };
        match error {
            E::HostNotFound => passing("could not resolve the host's name", true),
            E::ConnectionFailed => passing("could not connect to the server", true),
            E::ConnectProxyFailed(why) => {
                passing(&format!("the proxy does not connect: {why}"), true)
            }
            E::Timeout(Timeout::Connect | Timeout::Resolve) => passing(
                &format!(
                    "no connection after {} s",
                    self.options.connect_timeout.as_secs_f64()
                ),
                true,
            ),
            E::Timeout(_) => passing(
                &format!(
                    "the server has sent nothing for {} s",
                    self.options.stalled_timeout.as_secs_f64()
                ),
                false,
            ),
            E::Io(io) => match io.kind() {
                ErrorKind::ConnectionRefused => passing("connection refused", true),
                ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::NetworkDown
                | ErrorKind::AddrNotAvailable => passing(&io.to_string(), true),
                ErrorKind::UnexpectedEof => {
                    passing("the server closed the connection too early", false)
                }
                // What TLS makes of a certificate that it does not like.
                ErrorKind::InvalidData => Failure::Final(unable(&io.to_string())),
                _ => {
                    let why = io.to_string();
                    // The C library's resolver has no kind of its own.
                    let unknown = why.starts_with("failed to lookup address");
                    passing(&why, unknown)
                }
            },
            E::Protocol(_) => passing(&error.to_string(), false),
            E::TooManyRedirects => {
                Failure::Final(unable(&format!("more than {REDIRECTS_MAX} redirects")))
            }
            _ => Failure::Final(unable(&error.to_string())),
        }
    }

    /// Reads a small file once, undoing its content encoding.
    pub(super) fn read(
        &self,
        url: &Url,
        name: &str,
        bytes_max: usize,
        context: Context<'_>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let ask = Ask {
            encodings: true,
            ..Ask::default()
        };
        let Some(response) = self.get(url, name, ask, context.cancel)? else {
            return Ok(None);
        };
        let encoding = content_encoding(response.headers());
        let broken = |error: std::io::Error| match error.downcast::<ureq::Error>() {
            Ok(error) => self.failure(name, &error, context.cancel),
            Err(error) => self.failure(name, &ureq::Error::Io(error), context.cancel),
        };
        let raw = response.into_body().into_reader();
        let mut bytes = Vec::new();
        let limit = bytes_max as u64 + 1;
        match encoding {
            None => raw.take(limit).read_to_end(&mut bytes).map_err(broken)?,
            Some(encoding) => decode(raw, &encoding, name)?
                .take(limit)
                .read_to_end(&mut bytes)
                .map_err(broken)?,
        };
        if bytes.len() > bytes_max {
            return Err(Failure::Final(Error::corrupt(format!(
                "'{name}': expected at most {bytes_max} bytes"
            ))));
        }
        Ok(Some(bytes))
    }

    /// Opens a file once. `url` is asked for the address before each request, since signed ones expire.
    pub(super) fn open<'a>(
        &'a self,
        url: impl Fn() -> Url + 'a,
        name: &str,
        attempts: &'a Attempts,
        context: Context<'a>,
    ) -> Result<Option<Body<'a>>, Failure> {
        let Some(response) = self.get(&url(), name, Ask::default(), context.cancel)? else {
            return Ok(None);
        };
        let headers = response.headers();
        let encoding = content_encoding(headers);
        let can_resume = encoding.is_none()
            && text(headers, header::ACCEPT_RANGES)
                .is_some_and(|units| units.trim().eq_ignore_ascii_case("bytes"));
        let tag = text(headers, header::ETAG)
            .filter(|tag| tag.starts_with('"'))
            .map(str::to_owned);
        let bytes = text(headers, header::CONTENT_LENGTH).and_then(|text| text.trim().parse().ok());
        let broken = Broken::default();
        let stream = Stream {
            http: self,
            url: Box::new(url),
            name: name.to_owned(),
            attempts,
            context,
            reader: response.into_body().into_reader(),
            position: 0,
            bytes,
            can_resume,
            tag,
            broken: broken.clone(),
        };
        let reader: Box<dyn Read + 'a> = match &encoding {
            None => Box::new(stream),
            Some(encoding) => decode(stream, encoding, name)?,
        };
        Ok(Some(Body {
            reader,
            bytes: bytes.filter(|_| encoding.is_none()),
            broken,
        }))
    }
}

/// A body that goes on where it broke.
struct Stream<'a> {
    http: &'a Http,
    url: Box<dyn Fn() -> Url + 'a>,
    name: String,
    attempts: &'a Attempts,
    context: Context<'a>,
    reader: BodyReader<'static>,
    /// Bytes read.
    position: u64,
    bytes: Option<u64>,
    can_resume: bool,
    tag: Option<String>,
    broken: Broken,
}

impl Stream<'_> {
    /// Asks for the rest.
    fn resume(&mut self, mut failure: Failure) -> Result<(), Failure> {
        loop {
            if !self.can_resume {
                return Err(failure);
            }
            self.attempts.again(failure, self.context)?;
            let ask = Ask {
                from: self.position,
                if_range: self.tag.as_deref(),
                encodings: false,
            };
            let cancel = self.context.cancel;
            match self.http.get(&(self.url)(), &self.name, ask, cancel) {
                Ok(Some(response)) => {
                    let range = text(response.headers(), header::CONTENT_RANGE);
                    if response.status().as_u16() == 206 && self.is_rest(range) {
                        self.reader = response.into_body().into_reader();
                        return Ok(());
                    }
                    // Not what was asked for: only from the beginning.
                    self.can_resume = false;
                    failure = Failure::passing(Error::environment(format!(
                        "unable to download '{}': the server does not continue at byte {}",
                        self.name, self.position
                    )));
                }
                Ok(None) => {
                    return Err(Failure::Final(Error::environment(format!(
                        "'{}' vanished while it was downloaded",
                        self.name
                    ))));
                }
                Err(again @ Failure::Passing { .. }) => failure = again,
                Err(last) => return Err(last),
            }
        }
    }
    /// True if `Content-Range` is `bytes POSITION-…/…` of a file of the same size.
    fn is_rest(&self, range: Option<&str>) -> bool {
        let Some(range) = range.and_then(|text| text.trim().strip_prefix("bytes ")) else {
            return false;
        };
        let Some((span, total)) = range.split_once('/') else {
            return false;
        };
        let starts = span
            .split_once('-')
            .and_then(|(from, _)| from.trim().parse().ok())
            == Some(self.position);
        let same = match (total.trim().parse::<u64>(), self.bytes) {
            (Ok(total), Some(bytes)) => total == bytes,
            _ => true,
        };
        starts && same
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Ok(count) => {
                    self.position += count as u64;
                    return Ok(count);
                }
                Err(error) => {
                    let error = match error.downcast::<ureq::Error>() {
                        Ok(error) => error,
                        Err(error) => ureq::Error::Io(error),
                    };
                    let failure = self.http.failure(&self.name, &error, self.context.cancel);
                    self.resume(failure)
                        .map_err(|failure| self.broken.set(failure))?;
                }
            }
        }
    }
}

/// A binary cache over HTTP.
pub(super) struct HttpFiles {
    http: Arc<Http>,
    /// Ends with a slash.
    base: Url,
}

impl HttpFiles {
    /// # Errors
    /// Not a URL.
    pub(super) fn new(http: Arc<Http>, scheme: &str, place: &str) -> Result<Self> {
        let text = format!("{scheme}://{place}/");
        let base = Url::parse(&text)
            .map_err(|e| Error::user(format!("invalid URL '{text}'")).with_source(e))?;
        Ok(Self { http, base })
    }
    fn url(&self, relative: &str) -> Result<Url, Failure> {
        self.base
            .join(relative)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| {
                Failure::Final(Error::corrupt(format!(
                    "the URL '{relative}' does not lead to a server"
                )))
            })
    }
    /// Credentials are for the cache's own server.
    fn with_credentials(&self, mut url: Url) -> Url {
        let same = url.host() == self.base.host()
            && url.port_or_known_default() == self.base.port_or_known_default();
        if same && url.username().is_empty() {
            // As above.
            let _ = url.set_username(self.base.username());
            let _ = url.set_password(self.base.password());
        }
        url
    }
}

impl Files for HttpFiles {
    fn read(
        &self,
        name: &str,
        bytes_max: usize,
        context: Context<'_>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let url = self.with_credentials(self.url(name)?);
        self.http.read(&url, &plain(&url), bytes_max, context)
    }
    fn open<'a>(
        &'a self,
        url: &str,
        attempts: &'a Attempts,
        context: Context<'a>,
    ) -> Result<Option<Body<'a>>, Failure> {
        let url = self.with_credentials(self.url(url)?);
        let name = plain(&url);
        self.http
            .open(move || url.clone(), &name, attempts, context)
    }
    fn place(&self, url: &str) -> String {
        self.url(url)
            .map_or_else(|_| url.to_owned(), |url| plain(&url))
    }
    fn parallel(&self) -> usize {
        self.http.connections()
    }
    fn attempts(&self) -> u32 {
        self.http.attempts()
    }
}

/// The URL without name and password.
fn plain(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.into()
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn content_encoding(headers: &HeaderMap) -> Option<String> {
    text(headers, header::CONTENT_ENCODING)
        .map(|text| text.trim().to_ascii_lowercase())
        .filter(|text| !text.is_empty() && text != "identity")
}

/// Undoes a content encoding.
fn decode<'a>(
    raw: impl Read + 'a,
    encoding: &str,
    name: &str,
) -> Result<Box<dyn Read + 'a>, Failure> {
    let compression = match encoding {
        "x-gzip" => Compression::Gzip,
        other => Compression::from_name(other),
    };
    let raw = BufReader::with_capacity(BUFFER_BYTES, raw);
    match decompress::decompress(raw, &compression) {
        Ok(reader) => Ok(Box::new(reader)),
        Err(error) => Err(Failure::Final(
            Error::environment(format!(
                "unable to download '{name}': content encoding '{encoding}'"
            ))
            .with_source(error),
        )),
    }
}

/// The certificate authorities that are trusted: of the setting, else of the environment, else of the system, else
/// those that are built in.
fn root_certs(setting: Option<&Path>) -> Result<RootCerts> {
    let from_environment = || {
        ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"]
            .iter()
            .find_map(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
            .map(PathBuf::from)
    };
    let named = setting.map(Path::to_path_buf).or_else(from_environment);
    let file = match named {
        Some(file) => file,
        None => match CA_BUNDLES.iter().map(Path::new).find(|file| file.exists()) {
            Some(file) => file.to_path_buf(),
            None => return Ok(RootCerts::WebPki),
        },
    };
    let pem = std::fs::read(&file).map_err(|e| {
        Error::io("reading the certificate authorities", &file, e).with_hint(
            "see the setting ssl-cert-file and the variables NIX_SSL_CERT_FILE and SSL_CERT_FILE",
        )
    })?;
    let certs: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(cert)) => Some(cert),
            _ => None,
        })
        .collect();
    if certs.is_empty() {
        return Err(Error::environment(format!(
            "{} holds no certificates",
            file.display()
        )));
    }
    Ok(RootCerts::from(certs))
}
