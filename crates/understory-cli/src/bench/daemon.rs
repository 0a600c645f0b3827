//! The daemon against C++ `nix-daemon`, both with the same synthetic path infos: requests a second, a closure through
//! `local-overlay://`, time to the first answer, idle memory.
//!
//! The path infos name paths that nobody reads, so files are not needed: one empty file stands for all of
//! ours, and Nix registers its own with `nix-store --load-db`. Every request asks for another path, in an order
//! that is the same for both, so that neither side answers from what it has just answered.

use super::client::Client;
use super::environment::{Nix, Server, Work, run, understory};
use super::import::parse_interval;
use super::report::{Aim, Report, Row, Unit, median};
use crate::error::{CommandError, Result};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use understory::{Store, StoreOptions};
use understory_castore::tree::TreeBuilder;
use understory_nix::store_path::{StorePathHash, StorePathName};
use understory_nix::{NarHash, PathInfo, StoreDir, StorePath};

/// How much is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    /// Path infos in the store.
    pub(crate) infos: u32,
    /// Paths in the closure that is asked for through an overlay.
    pub(crate) closure: u32,
    /// Requests of one round on one connection.
    pub(crate) requests: u32,
}

/// Path infos published in one transaction.
const BATCH: usize = 10_000;
/// Branches of [`Shape::Tree`].
const TREE_FANOUT: u64 = 4;
/// References of one path at most.
const REFERENCES: u32 = 5;

/// The synthetic path infos: the first `closure` are a closure of the last of them; others refer to a few before.
pub(crate) struct Infos {
    pub(crate) scale: Scale,
    pub(crate) shape: Shape,
}

/// How the closure hangs together.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shape {
    /// Each refers to the one before it and to another.
    Chain,
    /// As deep and as dense as closures are: each refers to itself, to up to four others on the next
    /// level, and to some of a few that many refer to; 3.4 references in the mean.
    Tree,
}

impl Infos {
    fn path(number: u32) -> Result<StorePath> {
        let digest = Sha256::digest(format!("understory bench {number}"));
        let mut hash = [0; 20];
        hash.copy_from_slice(&digest[..20]);
        Ok(StorePath::from_parts(
            StorePathHash(hash),
            &StorePathName::new(&format!("synthetic-{number}"))?,
        ))
    }
    fn nar_hash(number: u32) -> NarHash {
        NarHash(Sha256::digest(number.to_le_bytes()).into())
    }
    fn references(&self, number: u32) -> Vec<u32> {
        let mut references = BTreeSet::new();
        if number == 0 {
        } else if number < self.scale.closure {
            match self.shape {
                Shape::Chain => {
                    references.insert(number - 1); // all of them are in the last one's closure
                    references.insert(number / 2);
                }
                Shape::Tree => {
                    let last = self.scale.closure - 1;
                    let from_last = u64::from(last - number);
                    let children = from_last * TREE_FANOUT + 1..=(from_last + 1) * TREE_FANOUT;
                    references
                        .extend(children.filter_map(|n| last.checked_sub(u32::try_from(n).ok()?)));
                    // Some that many need.
                    references.extend((1..=number % 4).map(|i| number / (16 << i)));
                    references.insert(number);
                }
            }
        } else {
            for i in 1..=number % (REFERENCES + 1) {
                references.insert(number - (number / (i * i + 1)).max(1));
            }
        }
        references.into_iter().collect()
    }
    pub(crate) fn top(&self) -> Result<String> {
        Ok(StoreDir::default().print(&Self::path(self.scale.closure - 1)?))
    }
    /// Requests of one round: a stride through all of them that meets each once.
    fn requests(&self, round: usize) -> Result<Vec<String>> {
        let count = u64::from(self.scale.infos);
        let start = round as u64 * u64::from(self.scale.requests);
        (start..start + u64::from(self.scale.requests))
            .map(|i| {
                let number = u32::try_from((i * 7_919 + 13) % count).unwrap_or_default();
                Ok(StoreDir::default().print(&Self::path(number)?))
            })
            .collect()
    }

    /// Registers them with us.
    pub(crate) fn publish(&self, dir: &Path) -> Result<()> {
        Store::create(dir, &StoreDir::default())?;
        let store = Store::open(dir, &StoreOptions::default())?;
        let mut tree = TreeBuilder::new(store.castore().writer()?);
        tree.file(None, false, 0)?.finish()?;
        let root = tree.finish()?;
        let mut batch = Vec::with_capacity(BATCH);
        for number in 0..self.scale.infos {
            let references = self
                .references(number)
                .into_iter()
                .map(Self::path)
                .collect::<Result<_>>()?;
            let info = PathInfo {
                path: Self::path(number)?,
                nar_hash: Self::nar_hash(number),
                nar_size: 1000 + u64::from(number),
                references,
                deriver: None,
                registration_time: 1_700_000_000,
                ultimate: false,
                signatures: BTreeSet::new(),
                ca: None,
            };
            batch.push((info, root.clone()));
            if batch.len() == BATCH {
                store.publish(std::mem::take(&mut batch))?;
            }
        }
        store.publish(batch)?;
        Ok(())
    }

    /// Writes them as `nix-store --load-db` reads them.
    fn write_registration(&self, file: &Path) -> Result<()> {
        let dir = StoreDir::default();
        let mut text = String::new();
        for number in 0..self.scale.infos {
            let references = self.references(number);
            let path = dir.print(&Self::path(number)?);
            let hash = Self::nar_hash(number).to_base16();
            text.push_str(&format!(
                "{path}\n{hash}\n{}\n\n{}\n",
                1000 + u64::from(number),
                references.len()
            ));
            for reference in references {
                text.push_str(&dir.print(&Self::path(reference)?));
                text.push('\n');
            }
        }
        let write = || std::fs::File::create(file)?.write_all(text.as_bytes());
        write().map_err(|e| CommandError::io("writing", file.display(), &e))
    }
}

/// `bench daemon` and `bench startup`.
pub(crate) fn measure(
    work: &Work,
    nix: Option<&Nix>,
    scale: Scale,
    with: (bool, bool),
    report: &mut Report,
) -> Result<()> {
    let (requests, startup) = with;
    let infos = Infos {
        scale,
        shape: Shape::Chain,
    };
    let store = work.path("infos");
    infos.publish(&store)?;
    let peer_dir = work.make("peer")?;
    if let Some(nix) = nix {
        infos.write_registration(&peer_dir.join("registration"))?;
        run(&mut nix.command(
            &[(&peer_dir, "/bench")],
            "nix-store --store /bench/store --load-db < /bench/registration",
        ))?;
    }
    if startup {
        measure_startup(
            work,
            &infos,
            &store,
            nix.map(|nix| (nix, peer_dir.as_path())),
            report,
        )?;
    }
    if requests {
        measure_requests(
            work,
            &infos,
            &store,
            nix.map(|nix| (nix, peer_dir.as_path())),
            report,
        )?;
        match nix {
            Some(nix) => measure_overlay(work, &infos, &store, nix, &peer_dir, report)?,
            None => report
                .missing
                .push("a closure through local-overlay: no Nix".to_owned()),
        }
    }
    Ok(())
}

fn ours(work: &Work, store: &Path, socket: &Path) -> Result<Server> {
    let log = work.path("daemon.log");
    Server::start(
        understory(store)?
            .arg("serve")
            .arg("--socket")
            .arg(socket)
            .args(["--trusted-users", "*"]),
        &log,
    )
}

fn theirs(work: &Work, nix: &Nix, dir: &Path) -> Result<(Server, PathBuf)> {
    let script = "export NIX_DAEMON_SOCKET_PATH=/bench/socket; rm -f $NIX_DAEMON_SOCKET_PATH; exec nix daemon --store /bench/store";
    let server = Server::start(
        &mut nix.command(&[(dir, "/bench")], script),
        &work.path("nix-daemon.log"),
    )?;
    Ok((server, dir.join("socket")))
}

/// Connects as soon as it is possible.
fn connect(server: &mut Server, socket: &Path) -> Result<Client> {
    server.wait_for("an answer", || Client::connect(socket).ok())
}

fn first_answer(server: &mut Server, socket: &Path, path: &str) -> Result<f64> {
    let start = Instant::now();
    let mut client = connect(server, socket)?;
    ask(&mut client, path)?;
    Ok(start.elapsed().as_secs_f64())
}

fn ask(client: &mut Client, path: &str) -> Result<()> {
    match client.query_path_info(path) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(CommandError::environment(format!(
            "the server does not know {path}"
        ))),
        Err(error) => Err(CommandError::io("asking for", path, &error)),
    }
}

fn measure_startup(
    work: &Work,
    infos: &Infos,
    store: &Path,
    nix: Option<(&Nix, &Path)>,
    report: &mut Report,
) -> Result<()> {
    let path = infos.top()?;
    let socket = work.path("startup.sock");
    let (mut here, mut there, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..infos.scale.rounds {
        let mut server = ours(work, store, &socket)?;
        here.push(first_answer(&mut server, &socket, &path)?);
        #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
        resident.extend(server.resident_bytes().map(|bytes| bytes as f64));
        server.stop()?;
        let _ = std::fs::remove_file(&socket);
        if let Some((nix, dir)) = nix {
            let _ = std::fs::remove_file(dir.join("socket"));
            let (mut server, socket) = theirs(work, nix, dir)?;
            there.push(first_answer(&mut server, &socket, &path)?);
            server.stop()?;
        }
    }
    let peer = nix.filter(|_| !there.is_empty()).map(|(nix, _)| {
        (
            format!("nix daemon and its namespace, {}", nix.version),
            median(&mut there),
        )
    });
    let count = crate::ui::count(infos.scale.infos.into());
    let name = format!("first answer, {count} path infos");
    report.rows.push(Row {
        group: "start",
        name,
        unit: Unit::Seconds,
        here: median(&mut here),
        peer,
        aim: Aim::Below(0.1),
    });
    let name = format!("resident memory then, {count} path infos");
    let aim = Aim::Below(64.0 * 1024.0 * 1024.0);
    report.rows.push(Row {
        group: "start",
        name,
        unit: Unit::Bytes,
        here: median(&mut resident),
        peer: None,
        aim,
    });
    Ok(())
}

/// Requests a second on `connections` connections at once.
fn request_rate(socket: &Path, infos: &Infos, round: usize, connections: usize) -> Result<f64> {
    let lists = (0..connections)
        .map(|connection| infos.requests(round * connections + connection))
        .collect::<Result<Vec<_>>>()?;
    let mut clients = (0..connections)
        .map(|_| {
            Client::connect(socket)
                .map_err(|e| CommandError::io("connecting to", socket.display(), &e))
        })
        .collect::<Result<Vec<_>>>()?;
    let total: usize = lists.iter().map(Vec::len).sum();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .zip(&lists)
            .map(|(client, list)| {
                scope.spawn(move || list.iter().try_for_each(|path| ask(client, path)))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(CommandError::failed("a client panicked")))
        })
    })?;
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let rate = total as f64 / start.elapsed().as_secs_f64();
    Ok(rate)
}

fn measure_requests(
    work: &Work,
    infos: &Infos,
    store: &Path,
    nix: Option<(&Nix, &Path)>,
    report: &mut Report,
) -> Result<()> {
    let socket = work.path("requests.sock");
    let mut server = ours(work, store, &socket)?;
    connect(&mut server, &socket)?;
    let mut peer = match nix {
        Some((nix, dir)) => {
            let _ = std::fs::remove_file(dir.join("socket"));
            let (mut server, socket) = theirs(work, nix, dir)?;
            connect(&mut server, &socket)?;
            Some((nix, server, socket))
        }
        None => None,
    };
    for connections in [1, 8] {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for round in 0..infos.scale.rounds {
            here.push(request_rate(&socket, infos, round, connections)?);
            if let Some((_, _, socket)) = &peer {
                there.push(request_rate(socket, infos, round, connections)?);
            }
        }
        report.rows.push(Row {
            group: "daemon",
            name: format!(
                "QueryPathInfo, {connections} connection{}",
                if connections == 1 { "" } else { "s" }
            ),
            unit: Unit::PerSecond,
            here: median(&mut here),
            peer: peer
                .as_ref()
                .map(|(nix, _, _)| (format!("nix-daemon, {}", nix.version), median(&mut there))),
            aim: Aim::Ratio(4.0),
        });
    }
    if let Some(resident) = server.resident_bytes() {
        #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
        let here = resident as f64;
        let name = "resident memory after these".to_owned();
        report.rows.push(Row {
            group: "daemon",
            name,
            unit: Unit::Bytes,
            here,
            peer: None,
            aim: Aim::Below(64.0 * 1024.0 * 1024.0),
        });
    }
    server.stop()?;
    peer.take().map_or(Ok(()), |(_, server, _)| server.stop())
}

/// `nix path-info -r` of a closure through `local-overlay://`, each time with an empty database above.
fn measure_overlay(
    work: &Work,
    infos: &Infos,
    store: &Path,
    nix: &Nix,
    peer_dir: &Path,
    report: &mut Report,
) -> Result<()> {
    let our_dir = work.make("ours")?;
    let socket = our_dir.join("socket");
    let mut server = ours(work, store, &socket)?;
    connect(&mut server, &socket)?;
    let _ = std::fs::remove_file(peer_dir.join("socket"));
    let (mut peer, peer_socket) = theirs(work, nix, peer_dir)?;
    connect(&mut peer, &peer_socket)?;
    // On tmpfs, so that it is not the client's own disk that is measured. The mount check is left out as
    // nothing is mounted; the client never looks at files.
    let script = |count: u32, top: &str| {
        format!(
            "dir=$(mktemp -d)
            mkdir -p $dir/top/nix/store $dir/upper
            url=\"local-overlay://?root=$dir/top&check-mount=false&upper-layer=$dir/upper&lower-store=unix%3A///bench/socket%3Froot%3D$dir/lower\"
            start=$EPOCHREALTIME
            nix path-info --store \"$url\" -r {top} > $dir/list
            end=$EPOCHREALTIME
            found=$(wc -l < $dir/list)
            [[ $found == {count} ]] || {{ echo expected {count} paths, found $found >&2; exit 1; }}
            echo $start $end"
        )
    };
    let script = script(infos.scale.closure, &infos.top()?);
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for _ in 0..infos.scale.rounds {
        for (dir, times) in [(our_dir.as_path(), &mut here), (peer_dir, &mut there)] {
            let output = run(&mut nix.command(&[(dir, "/bench")], &script))?;
            times.push(parse_interval(&output.stdout)?);
        }
    }
    report.rows.push(Row {
        group: "daemon",
        name: format!(
            "nix path-info -r of {} through an overlay",
            crate::ui::count(infos.scale.closure.into())
        ),
        unit: Unit::Seconds,
        here: median(&mut here),
        peer: Some((
            format!("nix-daemon as lower, {}", nix.version),
            median(&mut there),
        )),
        aim: Aim::None,
    });
    server.stop()?;
    peer.stop()
}
