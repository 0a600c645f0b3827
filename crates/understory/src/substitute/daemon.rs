//! Other stores by the worker protocol: `unix://SOCKET`, `daemon`, `ssh-ng://HOST`.

use super::files::{Context, Failure};
use super::source::{About, FetchError, Found, Progress, Receive, Source};
use super::url::StoreUrl;
use crate::daemon::client::{Client, ClientError, ClientOptions};
use crate::{Error, Result};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{StoreDir, StorePath};

/// Connections kept for later.
const IDLE_MAX: usize = 16;
/// Where `daemon` listens.
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// Another store.
pub(super) struct DaemonSource {
    name: String,
    store_dir: StoreDir,
    way: Way,
    stalled_timeout: Duration,
    idle: Mutex<Vec<Connection>>,
}

/// How to get there.
enum Way {
    Socket(PathBuf),
    Ssh(Vec<String>),
}

struct Connection {
    client: Client,
    /// A second handle of the client's socket.
    socket: UnixStream,
    /// The `ssh`; ended with the connection.
    child: Option<Child>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Closed already, perhaps.
        let _ = self.client.close();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl DaemonSource {
    /// # Errors
    /// A host that cannot be one.
    pub(super) fn new(
        url: &StoreUrl,
        store_dir: StoreDir,
        stalled_timeout: Duration,
    ) -> Result<Self> {
        let way = match url.scheme.as_str() {
            "ssh-ng" => Way::Ssh(ssh_arguments(url)?),
            "unix" if !url.place.is_empty() => Way::Socket(PathBuf::from(url.path())),
            _ => Way::Socket(
                std::env::var_os("NIX_DAEMON_SOCKET_PATH")
                    .map_or_else(|| PathBuf::from(DAEMON_SOCKET), PathBuf::from),
            ),
        };
        Ok(Self {
            name: url.display(),
            store_dir,
            way,
            stalled_timeout,
            idle: Mutex::default(),
        })
    }

    fn connect(&self, context: Context<'_>) -> Result<Connection, Failure> {
        let unreachable = |why: std::io::Error| Failure::Passing {
            error: Error::environment(format!("cannot connect to '{}'", self.name))
                .with_source(why),
            wait: None,
            unreachable: true,
        };
        let (socket, child) = match &self.way {
            Way::Socket(path) => (UnixStream::connect(path).map_err(unreachable)?, None),
            Way::Ssh(arguments) => {
                let (ours, theirs) = UnixStream::pair().map_err(unreachable)?;
                let input = OwnedFd::from(theirs.try_clone().map_err(unreachable)?);
                let child = Command::new("ssh")
                    .args(arguments)
                    .stdin(Stdio::from(input))
                    .stdout(Stdio::from(OwnedFd::from(theirs)))
                    .spawn()
                    .map_err(unreachable)?;
                (ours, Some(child))
            }
        };
        let timeout = Some(self.stalled_timeout).filter(|timeout| !timeout.is_zero());
        socket.set_read_timeout(timeout).map_err(unreachable)?;
        let copy = socket.try_clone().map_err(unreachable)?;
        let _watch = context.cancel.watch(&socket).map_err(unreachable)?;
        let options = ClientOptions {
            store_dir: self.store_dir.clone(),
            ..ClientOptions::default()
        };
        let client = Client::handshake(socket, &options)
            .map_err(|error| self.failure(error, true, context))?;
        Ok(Connection {
            client,
            socket: copy,
            child,
        })
    }

    /// Does something with a connection that is kept if it stays usable. A kept connection that has died in the
    /// meantime is replaced once.
    fn with<T>(
        &self,
        context: Context<'_>,
        mut work: impl FnMut(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T, Failure> {
        loop {
            let (mut connection, was_kept) = self.connection(context)?;
            let watch = context.cancel.watch(&connection.socket).map_err(|e| {
                Failure::Final(
                    Error::environment(format!("talking to '{}'", self.name)).with_source(e),
                )
            })?;
            let result = work(&mut connection.client);
            drop(watch);
            // What the store has said is of no interest.
            connection.client.take_logs();
            match result {
                Ok(done) => {
                    self.keep(connection);
                    return Ok(done);
                }
                Err(error @ ClientError::Server(_)) => {
                    self.keep(connection);
                    return Err(self.failure(error, false, context));
                }
                Err(_) if was_kept && !context.cancel.is_set() => {}
                Err(error) => return Err(self.failure(error, true, context)),
            }
        }
    }

    /// A connection on which the archive of `path` follows.
    fn with_archive(&self, path: &StorePath, context: Context<'_>) -> Result<Connection, Failure> {
        loop {
            let (mut connection, was_kept) = self.connection(context)?;
            match connection.client.request_nar(path) {
                Ok(()) => return Ok(connection),
                Err(ClientError::Stream(_)) if was_kept && !context.cancel.is_set() => {}
                Err(error) => return Err(self.failure(error, false, context)),
            }
        }
    }

    /// A connection, and whether it was used before: then the store may have closed it meanwhile.
    fn connection(&self, context: Context<'_>) -> Result<(Connection, bool), Failure> {
        let kept = self.idle().pop();
        match kept {
            Some(connection) => Ok((connection, true)),
            None => Ok((self.connect(context)?, false)),
        }
    }
    fn keep(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < IDLE_MAX {
            idle.push(connection);
        }
    }
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn failure(&self, error: ClientError, unreachable: bool, context: Context<'_>) -> Failure {
        if context.cancel.is_set() {
            return Failure::Cancelled;
        }
        Failure::Passing {
            error: Error::environment(format!("store '{}'", self.name)).with_source(error),
            wait: None,
            unreachable,
        }
    }
}

impl Source for DaemonSource {
    fn open(&self, context: Context<'_>) -> Result<About, Failure> {
        let connection = self.connect(context)?;
        self.keep(connection);
        Ok(About {
            store_dir: self.store_dir.clone(),
            want_mass_query: true,
            priority: 0,
            id: None,
        })
    }

    fn lookup(
        &self,
        _about: &About,
        paths: &[StorePath],
        context: Context<'_>,
    ) -> Result<Vec<Result<Option<Found>>>, Failure> {
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        self.with(context, |client| {
            let valid = match paths {
                // One round trip less.
                [_] => None,
                _ => Some(client.query_valid_paths(paths.to_vec())?),
            };
            paths
                .iter()
                .map(|path| {
                    if valid.as_ref().is_some_and(|valid| !valid.contains(path)) {
                        return Ok(Ok(None));
                    }
                    let info = client.query_path_info(path)?;
                    Ok(Ok(info.map(|info| Found { info, file: None })))
                })
                .collect()
        })
    }

    fn fetch(
        &self,
        found: &Found,
        _progress: Progress<'_>,
        context: Context<'_>,
        receive: &mut Receive<'_>,
    ) -> Result<(), FetchError> {
        let failed = |error| FetchError::Failed {
            error,
            unreachable: false,
        };
        // Out of the pool meanwhile: what is left of an archive that was refused must not be read by anyone.
        let mut connection = self.with_archive(&found.info.path, context)?;
        let watch = context
            .cancel
            .watch(&connection.socket)
            .map_err(|e| failed(Error::environment("watching a socket").with_source(e)))?;
        let result = receive(connection.client.archive());
        drop(watch);
        if context.cancel.is_set() {
            return Err(FetchError::Cancelled);
        }
        result.map_err(failed)?;
        self.keep(connection);
        Ok(())
    }

    fn realisation(
        &self,
        _about: &About,
        id: &DrvOutput,
        context: Context<'_>,
    ) -> Result<Option<WireRealisation>, Failure> {
        self.with(context, |client| {
            let with_path = client.protocol().features.realisation_with_path;
            if matches!(id, DrvOutput::Path { .. }) != with_path {
                return Ok(None);
            }
            let found = client.query_realisation(id)?;
            Ok(found.into_iter().find(|found| found.id == *id))
        })
    }
}

/// `ssh`'s arguments.
fn ssh_arguments(url: &StoreUrl) -> Result<Vec<String>> {
    let host = url.path();
    if host.is_empty() || host.starts_with('-') || host.contains(char::is_whitespace) {
        return Err(Error::user(format!("invalid SSH host name '{host}'")));
    }
    let mut arguments: Vec<String> = ["-x", "-a", "-oBatchMode=yes"].map(str::to_owned).into();
    if let Ok(options) = std::env::var("NIX_SSHOPTS") {
        arguments.extend(options.split_whitespace().map(str::to_owned));
    }
    if let Some(key) = url.param("ssh-key").filter(|key| !key.is_empty()) {
        arguments.extend(["-i".to_owned(), key.to_owned()]);
    }
    if url.flag("compress")?.unwrap_or(false) {
        arguments.push("-C".to_owned());
    }
    arguments.extend([host, "--".to_owned()]);
    arguments.push(
        url.param("remote-program")
            .unwrap_or("nix-daemon")
            .to_owned(),
    );
    arguments.push("--stdio".to_owned());
    if let Some(store) = url.param("remote-store").filter(|store| !store.is_empty()) {
        // A shell on the other side reads it.
        let quoted = store.replace('\'', r"'\''");
        arguments.extend(["--store".to_owned(), format!("'{quoted}'")]);
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_is_told() {
        let of = |text| ssh_arguments(&StoreUrl::parse(text).unwrap());
        let plain = of("ssh-ng://me@host").unwrap();
        assert!(plain.ends_with(&["me@host", "--", "nix-daemon", "--stdio"].map(str::to_owned)));
        let all =
            of("ssh-ng://h?ssh-key=/k&compress=true&remote-program=/x&remote-store=/it's").unwrap();
        assert!(
            all.ends_with(
                &[
                    "-i",
                    "/k",
                    "-C",
                    "h",
                    "--",
                    "/x",
                    "--stdio",
                    "--store",
                    r"'/it'\''s'"
                ]
                .map(str::to_owned)
            )
        );
        assert_eq!(
            of("ssh-ng://-oProxyCommand=x").unwrap_err().to_string(),
            "invalid SSH host name '-oProxyCommand=x'"
        );
    }
}
