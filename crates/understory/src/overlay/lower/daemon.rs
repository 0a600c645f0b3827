//! Another daemon as a lower store: worker protocol over a Unix socket, with a pool of connections.
//!
//! Works with the daemons of C++ Nix and with ours. Nothing is cached. A connection that has died since it was last used
//! is replaced by a new one, once; an error of a new one is an error.
//!
//! Cost: one round trip for a question, one for any number of validity tests; path infos are asked for in a pipeline
//! ([`Client::query_path_infos`]), about 20 µs each with either daemon.

use super::{Identity, Lower};
use crate::daemon::client::{Client, ClientError, ClientOptions};
use crate::pool::Pool;
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_nix::worker::{DrvOutput, Features, Request, WireRealisation};
use understory_nix::{PathInfo, StoreDir, StorePath};

/// Connections at a time; who comes later waits. Nix's daemon makes a process for each.
const CONNECTIONS_MAX: usize = 8;
/// Since this version there is QueryRealisation.
const REALISATIONS_SINCE: u8 = 27;

/// See the module.
pub struct DaemonLower {
    socket: PathBuf,
    real: PathBuf,
    store_dir: StoreDir,
    connections: Pool<Client>,
    /// Connections that speak of realisations as Nix 2.35 does.
    newer: Pool<Client>,
}

impl DaemonLower {
    /// Connects to the daemon at `socket`, whose objects are in `real`.
    ///
    /// # Errors
    /// Nobody listens, the handshake fails, we are refused.
    pub fn connect(socket: &Path, real: &Path, store_dir: &StoreDir) -> Result<Self> {
        let lower = Self {
            socket: socket.to_path_buf(),
            real: real.to_path_buf(),
            store_dir: store_dir.clone(),
            connections: Pool::new(CONNECTIONS_MAX),
            newer: Pool::new(CONNECTIONS_MAX),
        };
        // That it answers is told here and not in the middle of something.
        let connection = lower
            .connections
            .lend(|| lower.new_connection(Features::default()))?;
        tracing::debug!(
            socket = %socket.display(),
            version = connection.daemon_version().unwrap_or("unknown"),
            "connected to a lower daemon"
        );
        drop(connection);
        Ok(lower)
    }

    fn new_connection(&self, features: Features) -> Result<Client> {
        let options = ClientOptions {
            store_dir: self.store_dir.clone(),
            features,
            ..ClientOptions::default()
        };
        Client::connect(&self.socket, &options).map_err(|error| {
            self.failed("connecting to", error)
                .with_hint("start the lower store's daemon, or correct its URL")
        })
    }

    fn ask<T>(&self, ask: impl Fn(&mut Client) -> Result<T, ClientError>) -> Result<T> {
        self.ask_over(&self.connections, Features::default(), ask)
    }

    fn ask_over<T>(
        &self,
        connections: &Pool<Client>,
        features: Features,
        ask: impl Fn(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T> {
        loop {
            let mut connection = connections.lend(|| self.new_connection(features))?;
            let error = match ask(&mut connection) {
                Ok(answer) => {
                    drop(connection.take_logs());
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let has_died = matches!(error, ClientError::Stream(_)) && !connection.is_fresh();
            connection.discard();
            if !has_died {
                return Err(self.failed("asking", error));
            }
            // The daemon was restarted, mostly: the others are dead too.
            tracing::debug!(socket = %self.socket.display(), %error, "connecting again");
            connections.clear();
        }
    }

    fn failed(&self, doing: &str, error: ClientError) -> Error {
        let what = format!("{doing} the lower daemon at {}", self.socket.display());
        match error {
            ClientError::Stream(error) => Error::environment(what).with_source(error),
            // Lower errors are the client's to see, in their own words.
            error => {
                let error = Error::from(error);
                Error::new(error.kind(), format!("{what}: {error}"))
            }
        }
    }
}

impl Lower for DaemonLower {
    fn describe(&self) -> String {
        format!("unix://{}", self.socket.display())
    }
    fn real_dir(&self) -> &Path {
        &self.real
    }
    fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }
    fn identity(&self) -> Result<Identity> {
        Ok(Identity {
            id: None,
            generation: None,
        })
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        let found = self.ask(|client| match paths {
            [] => Ok(Vec::new()),
            [path] => Ok(vec![client.query_path_info(path)?]),
            paths => client.query_path_infos(paths),
        })?;
        Ok(found.into_iter().map(|info| info.map(Arc::new)).collect())
    }
    fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let valid = self.ask(|client| client.query_valid_paths(paths.to_vec()))?;
        Ok(paths.iter().map(|path| valid.contains(path)).collect())
    }
    fn all_paths(&self) -> Result<Vec<StorePath>> {
        let all = self.ask(Client::query_all_valid_paths)?;
        Ok(all.into_iter().collect())
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.ask(|client| client.query_referrers(path))
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.ask(|client| client.paths(&Request::QueryValidDerivers(path.clone())))
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        self.ask(|client| client.query_path_from_hash_part(hash_part))
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        let (connections, with_path) = match id {
            DrvOutput::Hash(_) => (&self.connections, false),
            DrvOutput::Path { .. } => (&self.newer, true),
        };
        let features = Features {
            realisation_with_path: with_path,
            ..Features::default()
        };
        let found = self.ask_over(connections, features, |client| {
            let protocol = client.protocol();
            if !protocol.since(REALISATIONS_SINCE)
                || protocol.features.realisation_with_path != with_path
            {
                return Ok(Vec::new());
            }
            client.query_realisation(id)
        })?;
        Ok(found.into_iter().next())
    }
}
