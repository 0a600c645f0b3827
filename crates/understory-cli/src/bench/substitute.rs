//! Substitution from a binary cache over HTTP, against C++ Nix into a plain local store: the same command, the same
//! cache, the same closure.
//!
//! The cache lies on the disk that is measured and is in the page cache; a server of our own, which does nothing but
//! hand out files, stands in for the network.

use super::environment::{self, Nix, Work, run};
use super::import::{Source, parse_interval};
use super::overlay::Instance;
use super::report::{Aim, Report, Row, Unit, median};
use crate::error::{CommandError, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

/// `bench substitute`: the largest closure of the source.
pub(crate) fn measure(
    work: &Work,
    source: &Source,
    nix: &Nix,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let cache = work.make("cache")?;
    let binds = [
        (source.root.as_path(), "/bench/source"),
        (cache.as_path(), "/bench/cache"),
    ];
    let script = "
        top=$(nix path-info --store local?root=/bench/source --all --closure-size | sort -n -k 2 | tail -n 1 | cut -f 1 | tr -d ' ')
        nix copy --no-check-sigs --from local?root=/bench/source --to 'file:///bench/cache?compression=zstd&parallel-compression=true' $top
        nix path-info --store local?root=/bench/source --closure-size $top";
    let output = run(&mut nix.command(&binds, script))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace();
    let (Some(top), Some(Ok(bytes))) = (words.next(), words.next().map(str::parse::<u64>)) else {
        return Err(CommandError::environment(format!(
            "expected a path and its closure's size, found {text:?}"
        )));
    };
    let address = serve(cache)?;
    let script = |store: &str| {
        format!(
            "start=$EPOCHREALTIME
            nix-store --store '{store}' --option substituters http://{address} --option require-sigs false --realise {top} > /dev/null
            sync -f /bench
            echo $start $EPOCHREALTIME"
        )
    };
    let (mut here, mut there) = (Vec::new(), Vec::new());
    let (mut our_bytes, mut their_bytes) = (0, 0);
    for _ in 0..rounds {
        work.remove("overlay")?;
        let ours = work.path("overlay");
        let url = format!("http://{address}");
        let instance = Instance::start_with(work, &ours, "substitute", &["--substituters", &url])?;
        let script_here = script("unix:///bench/run/overlay.sock?root=/bench/merged");
        let output = run(&mut nix.command(&[(&ours, "/bench")], &script_here))?;
        here.push(parse_interval(&output.stdout)?);
        instance.server.stop()?;
        our_bytes = environment::disk_bytes(&ours)?;

        work.remove("plain")?;
        let theirs = work.make("plain")?;
        let script_there = script("local?root=/bench");
        let output = run(&mut nix.command(&[(&theirs, "/bench")], &script_there))?;
        there.push(parse_interval(&output.stdout)?);
        their_bytes = environment::disk_bytes(&theirs)?;
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let (bytes, our_bytes, their_bytes) = (bytes as f64, our_bytes as f64, their_bytes as f64);
    let peer = |value| Some((format!("into a plain local store, {}", nix.version), value));
    report.rows.push(Row {
        group: "substitute",
        name: "a closure over HTTP, zstd".into(),
        unit: Unit::BytesPerSecond,
        here: bytes / median(&mut here),
        peer: peer(bytes / median(&mut there)),
        aim: Aim::Ratio(1.5),
    });
    report.rows.push(Row {
        group: "substitute",
        name: "disk after it".into(),
        unit: Unit::Bytes,
        here: our_bytes,
        peer: peer(their_bytes),
        aim: Aim::Part(1.0 / 3.0),
    });
    ["cache", "overlay", "plain"]
        .iter()
        .try_for_each(|name| work.remove(name))
}

/// Hands out the files of a directory over HTTP/1.1 on a loopback address, for as long as the process lives.
fn serve(dir: PathBuf) -> Result<SocketAddr> {
    let failed = |e: io::Error| CommandError::io("listening on", "127.0.0.1", &e);
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            std::thread::spawn(move || {
                // A client that goes away ends its connection.
                let _ = answer(&dir, &stream);
            });
        }
    });
    Ok(address)
}

fn answer(dir: &Path, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if requests.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let head_only = words.next() == Some("HEAD");
        let name = words
            .next()
            .unwrap_or("/")
            .trim_start_matches('/')
            .to_owned();
        while line.trim_end() != "" {
            line.clear();
            requests.read_line(&mut line)?;
        }
        let file = if name.split('/').any(|part| part == "..") {
            None
        } else {
            File::open(dir.join(&name)).ok()
        };
        let Some(mut file) = file else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let length = file.metadata()?.len();
        stream.write_all(
            format!("HTTP/1.1 200 OK\r\nAccept-Ranges: none\r\nContent-Length: {length}\r\n\r\n")
                .as_bytes(),
        )?;
        if !head_only {
            io::copy(&mut file, &mut stream)?;
        }
    }
}
