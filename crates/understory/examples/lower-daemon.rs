//! Serves a store on a socket, for trying clients: `lower-daemon STORE SOCKET [OPTION=VALUE]...`
//!
//! Makes the store if there is none. Options: `store-dir`, `trusted-users`, `allowed-users`,
//! `trusted-public-keys`. The socket `-` is standard input and output.

#![allow(clippy::print_stderr, reason = "a program for the terminal")]

use std::path::Path;
use understory::daemon::{Listener, Server, ServerOptions, Shutdown};
use understory::{Error, Result, Store, StoreOptions};
use understory_nix::{PublicKeys, StoreDir};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, socket, rest @ ..] = &arguments[..] else {
        return Err(Error::user(
            "usage: lower-daemon STORE SOCKET [OPTION=VALUE]...",
        ));
    };
    let mut options = ServerOptions::default();
    let mut store_dir = StoreDir::default();
    for option in rest {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let words = || value.split_whitespace().map(str::to_owned).collect();
        match name {
            "store-dir" => store_dir = StoreDir::new(value)?,
            "trusted-users" => options.trusted_users = words(),
            "allowed-users" => options.allowed_users = words(),
            "trusted-public-keys" => options.trusted_public_keys = PublicKeys::parse(value)?,
            _ => return Err(Error::user(format!("unknown option {name}"))),
        }
    }
    let store = Path::new(store);
    if !store.join("format").exists() {
        Store::create(store, &store_dir)?;
    }
    let server = Server::new(Store::open(store, &StoreOptions::default())?, options);
    if socket == "-" {
        return server.serve_stdio();
    }
    let listener = Listener::bind(Path::new(socket))?;
    let shutdown = Shutdown::new()?;
    let switch = shutdown.clone();
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
    ])
    .map_err(|error| Error::environment("catching signals").with_source(error))?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            switch.trigger();
        }
    });
    eprintln!("listening on {socket}");
    server.serve(&[listener], &shutdown)
}
