//! Measures a daemon, ours or another: `daemon-requests SOCKET [CONNECTIONS] [SECONDS]` asks for the
//! infos of all its valid paths again and again and prints the requests per second.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use understory::daemon::{Client, ClientOptions};
use understory::{Error, Result};
use understory_nix::StorePath;
use understory_nix::worker::SetOptions;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(socket) = arguments.first().map(PathBuf::from) else {
        return Err(Error::user(
            "usage: daemon-requests SOCKET [CONNECTIONS] [SECONDS]",
        ));
    };
    let number = |index: usize, default: u64| {
        arguments
            .get(index)
            .and_then(|n| n.parse().ok())
            .unwrap_or(default)
    };
    let (connections, seconds) = (number(1, 1), number(2, 3));
    let mut client = connect(&socket)?;
    let paths: Vec<StorePath> = client.query_all_valid_paths()?.into_iter().collect();
    if paths.is_empty() {
        return Err(Error::user("the store is empty"));
    }
    for kind in ["QueryPathInfo", "IsValidPath"] {
        let threads: Vec<_> = (0..connections)
            .map(|offset| {
                let (socket, paths) = (socket.clone(), paths.clone());
                std::thread::spawn(move || ask(&socket, &paths, offset as usize, seconds, kind))
            })
            .collect();
        let mut per_second = 0.0;
        for thread in threads {
            per_second += thread
                .join()
                .map_err(|_| Error::internal("a client panicked"))??;
        }
        println!(
            "{kind}: {per_second:.0} requests/s on {connections} connections, {} paths",
            paths.len()
        );
    }
    Ok(())
}

fn connect(socket: &Path) -> Result<Client> {
    let mut client = Client::connect(socket, &ClientOptions::default())?;
    client.set_options(SetOptions::default())?;
    Ok(client)
}

fn ask(socket: &Path, paths: &[StorePath], offset: usize, seconds: u64, kind: &str) -> Result<f64> {
    let mut client = connect(socket)?;
    let start = Instant::now();
    let mut count = 0_u64;
    for path in paths.iter().cycle().skip(offset * 7) {
        let found = match kind {
            "IsValidPath" => client.is_valid_path(path)?,
            _ => client.query_path_info(path)?.is_some(),
        };
        if !found {
            return Err(Error::user(format!("{path} is gone")));
        }
        count += 1;
        if count.is_multiple_of(64) && start.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}
