//! Stock Nix as the builder: `nix-daemon --stdio` on the same overlay store.
//!
//! One child for each client that builds, started with the first request, kept for as long as the client stays, and
//! started anew when it has died. It opens our upper as `local-overlay://` with its own locks, so what it builds is
//! valid in U when it answers; nothing of ours caches U. It is a client of the lower store, never of the overlay's
//! own socket: its store is named on its command line, which wins over `NIX_REMOTE` and `nix.conf`.
//!
//! The rest of the system's `nix.conf` holds for it; ours goes into `NIX_CONFIG`. Clients without trust get a child
//! with `--force-untrusted`, which then filters their settings as Nix does (experimental feature
//! `daemon-trust-override`; checked with Nix 2.26.3 and 2.34.8 over `--stdio`).
//!
//! Activity ids need no translation: Nix has its process id in their upper half, and so have ours.

use super::child::{Child, Process};
use super::find::Nix;
use super::{Builder, BuilderSession};
use crate::daemon::{Client, ClientError, ClientInfo, ClientOptions, Reporter};
use crate::{Error, Result};
use std::cell::Cell;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use understory_nix::wire::WireError;
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, Decoder, DerivedPath, DrvOutput, Features,
    KeyedBuildResult, LogMessage, Request, SetOptions, Trust, Version,
};
use understory_nix::{StoreDir, StorePath};

/// How often a client is asked whether it is still there while its build runs.
const CANCEL_POLL_MS: u64 = 50;
/// Every so many times it is looked which builders run.
const SESSIONS_POLLS: u64 = 5;
/// Stack of the thread that asks.
const WATCHER_STACK_BYTES: usize = 256 << 10;
/// What the child needs beyond the user's `experimental-features`.
const FEATURES: &str = "local-overlay-store daemon-trust-override";
/// Variables that are about us, not about the child.
const OUR_VARIABLES: [&str; 6] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Runs one stock Nix for each client that builds.
#[derive(Debug, Clone)]
pub struct NixBuilder {
    /// The `nix` or `nix-daemon` program or the directory of one; `None` looks for one.
    pub program: Option<PathBuf>,
    /// The store that it works on: `local-overlay://…` with our upper and lower.
    pub store_url: String,
    /// Nix's settings for it, name and value: they win over its `nix.conf`.
    pub options: Vec<(String, String)>,
}

impl Builder for NixBuilder {
    fn describe(&self) -> Result<String> {
        check_url(&self.store_url)?;
        let nix = Nix::find(self.program.as_deref())?;
        Ok(format!("Nix {} ({})", nix.version, nix.program.display()))
    }

    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn BuilderSession>> {
        check_url(&self.store_url)?;
        // Now, so that the client is told before anything is done for it.
        Nix::find(self.program.as_deref())?;
        Ok(Box::new(NixSession {
            builder: self.clone(),
            trusted: client.trusted,
            options: None,
            connection: None,
        }))
    }
}

/// What replies are read from.
type Input = Decoder<BufReader<UnixStream>>;

/// How a request ended.
enum Outcome<T> {
    /// The child has answered, if only with an error.
    Answer(Result<T>),
    /// The child has died.
    Died {
        error: Error,
        /// It had something to say to this request before.
        heard: bool,
    },
}

/// One client's child.
struct NixSession {
    builder: NixBuilder,
    trusted: bool,
    options: Option<SetOptions>,
    connection: Option<Connection>,
}

/// A child and what was said to it.
struct Connection {
    child: Child,
    /// After the handshake.
    client: Option<Client>,
    /// It has the session's options.
    has_options: bool,
}

impl BuilderSession for NixSession {
    fn set_options(&mut self, options: &SetOptions) -> Result<()> {
        let mut options = options.clone();
        // The child hands its settings to its build hooks, which would open the client's store: our own socket.
        options.overrides.remove(b"store".as_slice());
        if self.options.as_ref() != Some(&options) {
            self.options = Some(options);
            if let Some(connection) = &mut self.connection {
                connection.has_options = false;
            }
        }
        Ok(())
    }

    fn build_paths(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        let request = Request::BuildPaths {
            paths: paths.to_vec(),
            mode,
        };
        self.request(&request, reporter, Decoder::u64).map(drop)
    }

    fn build_paths_with_results(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
        _realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>> {
        let request = Request::BuildPathsWithResults {
            paths: paths.to_vec(),
            mode,
        };
        let mut results = self.request(&request, reporter, |d| {
            let with_path = d.protocol().features.realisation_with_path;
            Ok((with_path, d.list(KeyedBuildResult::read)?))
        })?;
        if results.0 {
            for KeyedBuildResult { path, result } in &mut results.1 {
                let (DerivedPath::Opaque(drv) | DerivedPath::Built { drv, .. }) = path;
                key_by_path(result, drv);
            }
        }
        Ok(results.1)
    }

    fn build_derivation(
        &mut self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        _realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<BuildResult> {
        let request = Request::BuildDerivation {
            drv: drv.clone(),
            derivation: Box::new(derivation.clone()),
            mode,
        };
        let (with_path, mut result) = self.request(&request, reporter, |d| {
            let with_path = d.protocol().features.realisation_with_path;
            Ok((with_path, BuildResult::read(d)?))
        })?;
        if with_path {
            key_by_path(&mut result, drv);
        }
        Ok(result)
    }
}

impl NixSession {
    /// Sends a request to the child, which is started if there is none, and passes on what it says until it replies.
    fn request<T>(
        &mut self,
        request: &Request,
        reporter: &dyn Reporter,
        read: impl Fn(&mut Input) -> Result<T, WireError>,
    ) -> Result<T> {
        reporter.check()?;
        if let Some(connection) = self.connection.take() {
            match self.converse(connection, request, reporter, &read)? {
                Outcome::Answer(answer) => return answer,
                Outcome::Died { error, heard: true } => return Err(error),
                // It has ended while it had nothing to do.
                Outcome::Died { error, .. } => {
                    tracing::info!(error = error.chain(), "starting another builder");
                }
            }
        }
        let connection = Connection {
            child: Child::start(self.command()?)?,
            client: None,
            has_options: false,
        };
        match self.converse(connection, request, reporter, &read)? {
            Outcome::Answer(answer) => answer,
            Outcome::Died { error, .. } => Err(error),
        }
    }

    /// One request, watched. The connection is kept unless it is lost.
    ///
    /// # Errors
    /// Interrupted; what the child says makes no sense.
    fn converse<T>(
        &mut self,
        mut connection: Connection,
        request: &Request,
        reporter: &dyn Reporter,
        read: &dyn Fn(&mut Input) -> Result<T, WireError>,
    ) -> Result<Outcome<T>> {
        let process = connection.child.process();
        let heard = Cell::new(false);
        let answer = std::thread::scope(|scope| {
            let (working, finished) = crossbeam_channel::bounded::<()>(0);
            let watched = &*process;
            std::thread::Builder::new()
                .name("builder-watch".to_owned())
                .stack_size(WATCHER_STACK_BYTES)
                .spawn_scoped(scope, move || watch(&finished, reporter, watched))
                .map_err(|e| Error::environment("starting a thread").with_source(e))?;
            let mut say = |message| {
                heard.set(true);
                reporter.send(&message);
            };
            let answer = self.talk(&mut connection, request, &mut say, read);
            drop(working);
            Ok::<_, Error>(answer)
        })?;
        match answer {
            Ok(answer) => {
                self.connection = Some(connection);
                Ok(Outcome::Answer(Ok(answer)))
            }
            Err(ClientError::Server(message)) => {
                self.connection = Some(connection);
                Ok(Outcome::Answer(Err(ClientError::Server(message).into())))
            }
            // The child goes with the connection.
            Err(error) => {
                reporter.check()?;
                match error {
                    ClientError::Stream(error) if error.is_disconnect() => Ok(Outcome::Died {
                        error: process.obituary(),
                        heard: heard.get(),
                    }),
                    ClientError::Stream(error) => {
                        Err(Error::environment("talking to the builder").with_source(error))
                    }
                    error => Err(Error::environment(format!("the builder: {error}"))),
                }
            }
        }
    }

    fn talk<T>(
        &self,
        connection: &mut Connection,
        request: &Request,
        say: &mut dyn FnMut(LogMessage),
        read: &dyn Fn(&mut Input) -> Result<T, WireError>,
    ) -> Result<T, ClientError> {
        let client = match &mut connection.client {
            Some(client) => client,
            none => {
                let options = ClientOptions {
                    store_dir: self.builder.store_dir(),
                    version: Version::NEWEST,
                    features: Features {
                        realisation_with_path: true,
                        ..Features::default()
                    },
                    lix_order: false,
                };
                let client = Client::handshake(connection.child.socket()?, &options)?;
                if !self.trusted && client.trust() != Trust::NotTrusted {
                    return Err(ClientError::Reply(
                        "it trusts a client that it was told not to trust".to_owned(),
                    ));
                }
                none.insert(client)
            }
        };
        if let Some(options) = &self.options
            && !connection.has_options
        {
            let options = Request::SetOptions(Box::new(options.clone()));
            client.call(&options, say, |_| Ok(()))?;
            connection.has_options = true;
        }
        client.call(request, say, read)
    }

    /// The child's command line and environment.
    fn command(&self) -> Result<std::process::Command> {
        let nix = Nix::find(self.builder.program.as_deref())?;
        let url = self.builder.child_url();
        let (mut command, needs_nix_command) = nix.daemon();
        if !self.trusted {
            command.arg("--force-untrusted");
        }
        command
            .args(["--store", &url])
            .env("NIX_REMOTE", &url)
            .current_dir("/");
        for name in OUR_VARIABLES {
            command.env_remove(name);
        }
        let inherited = std::env::var_os("NIX_CONFIG");
        let mut config = inherited
            .map(|text| text.to_string_lossy().into_owned())
            .unwrap_or_default();
        if !config.is_empty() && !config.ends_with('\n') {
            config.push('\n');
        }
        config.push_str(&self.builder.config(needs_nix_command)?);
        command.env("NIX_CONFIG", config);
        Ok(command)
    }
}

impl NixBuilder {
    /// What is added to the child's configuration.
    fn config(&self, needs_nix_command: bool) -> Result<String> {
        let mut config = format!("extra-experimental-features = {FEATURES}");
        if needs_nix_command {
            config.push_str(" nix-command");
        }
        config.push('\n');
        // Nix's collector and optimiser would do to an overlay what ours avoid: see docs/overlay-store.md.
        config.push_str("min-free = 0\nauto-optimise-store = false\n");
        if self.is_diverted() {
            // Without a sandbox it would build against another store's files.
            config.push_str("sandbox-fallback = false\n");
        }
        for (name, value) in &self.options {
            if name.contains(['\n', '=', '#']) || value.contains(['\n', '#']) {
                return Err(Error::user(format!(
                    "the builder's setting '{name}' holds a character that nix.conf cannot hold"
                )));
            }
            config.push_str(&format!("{name} = {value}\n"));
        }
        Ok(config)
    }

    /// The URL with the mount check left to us, as we have compared the overlayfs already, and better; and without a
    /// cache of what the lower store lacks: what is substituted into it during the child's life would stay missing
    /// for an hour.
    fn child_url(&self) -> String {
        let Some((head, query)) = self.store_url.split_once('?') else {
            return self.store_url.clone();
        };
        if !head.starts_with("local-overlay:") {
            return self.store_url.clone();
        }
        let mut parameters: Vec<String> = query.split('&').map(str::to_owned).collect();
        for parameter in &mut parameters {
            let Some(lower) = parameter.strip_prefix("lower-store=") else {
                continue;
            };
            let decoded = percent_decode(lower);
            // Other kinds of store look each time.
            let asks = decoded.starts_with("unix:") || decoded.starts_with("daemon");
            if asks && !decoded.contains("path-info-cache-size=") {
                let separator = if decoded.contains('?') { "%26" } else { "%3F" };
                *parameter = format!("{parameter}{separator}path-info-cache-size%3D0");
            }
        }
        if self.parameter("check-mount").is_none() {
            parameters.push("check-mount=false".to_owned());
        }
        format!("{head}?{}", parameters.join("&"))
    }

    fn store_dir(&self) -> StoreDir {
        self.parameter("store")
            .and_then(|dir| StoreDir::new(&dir).ok())
            .unwrap_or_default()
    }

    /// True if the objects are not at the store directory itself.
    fn is_diverted(&self) -> bool {
        if let Some(real) = self.parameter("real") {
            return real.trim_end_matches('/') != self.store_dir().as_str();
        }
        let authority = self
            .store_url
            .split_once("://")
            .map_or("", |(_, rest)| rest.split('?').next().unwrap_or_default());
        self.parameter("root")
            .is_some_and(|root| !root.trim_end_matches('/').is_empty())
            || !authority.trim_end_matches('/').is_empty()
    }

    /// A parameter of the store's URL, decoded.
    fn parameter(&self, name: &str) -> Option<String> {
        let (_, query) = self.store_url.split_once('?')?;
        let value = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)?
            .1;
        Some(percent_decode(value))
    }
}

fn percent_decode(text: &str) -> String {
    let mut rest = text.as_bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some((first, behind)) = rest.split_first() {
        let hex = behind
            .first_chunk::<2>()
            .filter(|_| *first == b'%')
            .and_then(|pair| std::str::from_utf8(pair).ok())
            .and_then(|pair| u8::from_str_radix(pair, 16).ok());
        out.push(hex.unwrap_or(*first));
        rest = if hex.is_some() { &behind[2..] } else { behind };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Only a store in the file system may be the child's: any other might be our own daemon.
fn check_url(url: &str) -> Result<()> {
    let scheme = url.split(['?', ':', '/']).next().unwrap_or_default();
    if matches!(scheme, "local-overlay" | "local") {
        return Ok(());
    }
    Err(Error::internal(format!(
        "the builder's store must be a local-overlay:// URL, found '{url}'"
    )))
}

/// Ends the child when the client has gone, unless the request ends first.
fn watch(finished: &crossbeam_channel::Receiver<()>, reporter: &dyn Reporter, process: &Process) {
    let wait = Duration::from_millis(CANCEL_POLL_MS);
    for tick in 0_u64.. {
        if finished.recv_timeout(wait) != Err(crossbeam_channel::RecvTimeoutError::Timeout) {
            return;
        }
        if tick % SESSIONS_POLLS == 0 {
            process.note_sessions();
        }
        if reporter.is_cancelled() {
            tracing::debug!("the client has gone: stopping its builder");
            return process.stop();
        }
    }
}

/// With the feature, a result's outputs come with their names only.
fn key_by_path(result: &mut BuildResult, drv: &StorePath) {
    for (output, realisation) in &mut result.built_outputs {
        realisation.id = DrvOutput::Path {
            drv: drv.clone(),
            output: output.clone(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(url: &str) -> NixBuilder {
        NixBuilder {
            program: None,
            store_url: url.to_owned(),
            options: Vec::new(),
        }
    }

    #[test]
    fn only_stores_in_the_file_system_are_built_in() {
        for url in ["", "auto", "daemon", "unix:///run/u.sock", "ssh-ng://h"] {
            assert_eq!(
                builder(url).describe().unwrap_err().to_string(),
                format!("the builder's store must be a local-overlay:// URL, found '{url}'")
            );
        }
        for url in [
            "local?root=/r",
            "local-overlay://?root=/r",
            "local-overlay:///r",
        ] {
            check_url(url).unwrap();
        }
    }

    #[test]
    fn the_mount_is_not_checked_twice_and_the_lower_store_is_asked_each_time() {
        for (url, expected) in [
            ("local?root=/r", "local?root=/r"),
            (
                "local-overlay://?root=/r",
                "local-overlay://?root=/r&check-mount=false",
            ),
            (
                "local-overlay:///r?check-mount=true",
                "local-overlay:///r?check-mount=true",
            ),
            (
                "local-overlay://?lower-store=unix%3A%2F%2F%2Fs%3Freal%3D%2Fl&upper-layer=/u",
                "local-overlay://?lower-store=unix%3A%2F%2F%2Fs%3Freal%3D%2Fl%26path-info-cache-size%3D0\
                 &upper-layer=/u&check-mount=false",
            ),
            (
                "local-overlay://?lower-store=daemon",
                "local-overlay://?lower-store=daemon%3Fpath-info-cache-size%3D0&check-mount=false",
            ),
            (
                "local-overlay://?lower-store=/l",
                "local-overlay://?lower-store=/l&check-mount=false",
            ),
        ] {
            assert_eq!(builder(url).child_url(), expected);
        }
    }

    #[test]
    fn a_diverted_store_is_never_built_in_without_a_sandbox() {
        for (url, diverted) in [
            ("local-overlay://?real=/nix/store&state=/s", false),
            ("local-overlay://?real=/nix/store/&state=/s", false),
            ("local-overlay://?real=%2Fnix%2Fstore", false),
            ("local-overlay://?real=/m/nix/store", true),
            ("local-overlay://?store=/m/store&real=/m/store", false),
            ("local-overlay://?root=/m", true),
            ("local-overlay:///m?x=y", true),
            ("local-overlay://?upper-layer=/u", false),
            ("local?root=/", false),
        ] {
            let builder = builder(url);
            assert_eq!(builder.is_diverted(), diverted, "{url}");
            let config = builder.config(false).unwrap();
            assert_eq!(config.contains("sandbox-fallback = false\n"), diverted);
        }
    }

    #[test]
    fn settings_are_lines_of_nix_conf() {
        let mut builder = builder("local-overlay://?real=/nix/store");
        builder.options = vec![("cores".to_owned(), "3".to_owned())];
        assert_eq!(
            builder.config(true).unwrap(),
            "extra-experimental-features = local-overlay-store daemon-trust-override nix-command\n\
             min-free = 0\nauto-optimise-store = false\ncores = 3\n"
        );
        builder.options[0].1 = "3\nstore = auto".to_owned();
        assert_eq!(
            builder.config(true).unwrap_err().to_string(),
            "the builder's setting 'cores' holds a character that nix.conf cannot hold"
        );
    }

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(percent_decode("a%2Fb%zz%4"), "a/b%zz%4");
    }
}
