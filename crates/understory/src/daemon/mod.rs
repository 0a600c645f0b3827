//! The daemon: Nix's worker protocol over any [`Backend`]: the castore ([`CastoreBackend`]) or the overlay.
//!
//! Owns the sockets, who may do what, and the meaning of each operation; the bytes are
//! [`understory_nix::worker`]'s. Protocol 1.21 to 1.38, checked with clients of Nix 2.26.3 and
//! 2.34.8 and with Lix' order of the handshake.
//!
//! **Threads, not tasks.** The protocol allows one request at a time on a connection, and each
//! request is synchronous work on disk and CPU. A blocking thread answers a request in the buffer
//! with two system calls (read, write); an async runtime would add a third (epoll) and a hop between
//! threads, and would still need blocking threads for the work. There is one thread for each
//! connection and one more that accepts, notices clients that hang up, and ends what takes too long.
//!
//! **Bounds.** [`ServerOptions::connections_max`] connections, of which an eighth is kept for root and our own
//! user; some more are told so with a proper error, the rest waits in the kernel's queue. A stack of
//! `STACK_BYTES` and two buffers of `BUFFER_BYTES` each, of which only touched pages count. What
//! requests hold in memory beyond 64 KiB each comes out of one budget for all
//! ([`ServerOptions::request_bytes_max`]). A handshake and a request's arguments must be complete in time.
//!
//! **Errors.** A request that cannot be met is answered with an error and the connection goes on;
//! only bytes that cannot be understood end it. Arguments are read whole before they are judged. A
//! refused upload is answered at once and then read to its end. What an operation says meanwhile goes out
//! at once, from whichever thread; when the client hangs up, its operation is cancelled.
//!
//! Cost: `QueryPathInfo` is one read, one lookup in [`Store::path`](crate::Store::path)'s cache and
//! one write; it allocates the path and nothing else. About 1.3 µs in user space and 4.5 µs in the
//! kernel for each request of a mix of it and `IsValidPath` (300 paths of 10 references).

mod add;
pub mod backend;
mod build;
mod castore;
pub mod client;
mod connection;
mod listen;
mod queries;
mod reporter;
mod server;
mod status;
mod trust;

pub use backend::{
    Activity, AddOptions, Backend, ClientInfo, NarWriter, Operations, PathSource, Reporter, Silent,
};
pub use castore::{CastoreBackend, CastoreOptions};
pub use client::{Client, ClientError, ClientOptions};
pub(crate) use listen::Bound;
pub use listen::Listener;
pub use server::{Server, Shutdown};
pub use status::{CLIENTS_MAX, ClientStatus, clients};

pub(crate) use connection::refusal_text;
use understory_nix::PublicKeys;

/// Stack of a connection's thread. Release builds touch below 100 KiB of it; SQLite and debug builds
/// need more than the 512 KiB that would do otherwise.
const STACK_BYTES: usize = 1 << 20;
/// Each of a connection's two buffers. A request of a few hundred paths fits; twice this made no
/// upload faster.
const BUFFER_BYTES: usize = 32 << 10;
/// Connections beyond the limit that are told so at a time; each lives for a handshake only.
const REFUSALS_MAX: usize = 64;
/// How long a connection beyond the limit is kept to be told.
const REFUSAL_MS_MAX: u64 = 3_000;
/// How long a request's arguments may need to arrive: clients send them in one go.
const ARGUMENTS_MS_MAX: u64 = 120_000;
/// How much of a refused upload is read to keep the connection: clients since Nix 2.4 stop early, so
/// that this is for older ones.
const DRAIN_BYTES_MAX: u64 = 64 << 30;

/// The version that clients are told: the Nix whose behaviour ours is, then what we are. One word that sorts as that
/// Nix, because that is how versions of daemons are compared.
pub const VERSION: &str = concat!("2.34.8+understory-", env!("CARGO_PKG_VERSION"));

/// Who may connect, who is trusted, and the limits.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Users (`name`, `@group`, `*`) who may do everything.
    pub trusted_users: Vec<String>,
    /// Users who may connect.
    pub allowed_users: Vec<String>,
    /// Keys whose signatures make additions by others acceptable. For [`Server::new`], like the next one.
    pub trusted_public_keys: PublicKeys,
    /// True if trusted peers, too, need a signature unless they ask for none to be checked, as Nix'
    /// `require-sigs` has it.
    pub require_signatures: bool,
    /// Users with this primary group are builders and may never connect.
    pub build_users_group: Option<String>,
    /// Refuses all changes. Implied by a store that is open read-only. For [`Server::new`]; other backends
    /// know it themselves.
    pub read_only: bool,
    /// Why nothing may be deleted, if so: an overlay is mounted over the store, whose files would fail
    /// with ESTALE.
    pub deletions_refused: Option<String>,
    /// What clients are told that we are: [`VERSION`].
    pub version: String,
    /// Connections at a time.
    pub connections_max: usize,
    /// Bytes that the requests in flight of all connections may hold together.
    pub request_bytes_max: u64,
    /// How long a handshake may take.
    pub handshake_ms_max: u64,
    /// How long operations may go on after a shutdown has begun.
    pub grace_ms_max: u64,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            trusted_users: vec!["root".to_owned()],
            allowed_users: vec!["*".to_owned()],
            trusted_public_keys: PublicKeys::default(),
            require_signatures: false,
            build_users_group: None,
            read_only: false,
            deletions_refused: None,
            version: VERSION.to_owned(),
            connections_max: 1024,
            request_bytes_max: 256 << 20,
            handshake_ms_max: 10_000,
            grace_ms_max: 3_000,
        }
    }
}
