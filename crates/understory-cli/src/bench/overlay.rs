//! Our overlay store against C++ Nix's on the same lower store: a closure asked for, garbage collected.
//!
//! The lower stores hold synthetic path infos. `up` serves everything; C++ Nix's `local-overlay://` uses the lower
//! daemon of the same instance.

use super::client::Client;
use super::daemon::{Infos, Shape};
use super::environment::{Nix, Server, Work, run, understory};
use super::import::parse_interval;
use super::report::{Aim, Report, Row, Unit, median};
use crate::error::{CommandError, Result};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    /// Path infos in the lower store.
    pub(crate) infos: u32,
    /// Paths of the closure.
    pub(crate) closure: u32,
    /// Garbage in the upper store.
    pub(crate) garbage: u32,
}

const ADD_TO_STORE: u64 = 7;
const COLLECT_GARBAGE: u64 = 20;
const RETURN_DEAD: u64 = 1;
const DELETE_DEAD: u64 = 2;
/// Collections in one round.
const COLLECTIONS: usize = 5;
/// How long the temporary roots of a client that has gone may stay.
const ROOTS_GONE: Duration = Duration::from_secs(60);

/// `bench overlay`.
pub(crate) fn measure(
    work: &Work,
    nix: Option<&Nix>,
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let infos = |infos, closure| Infos {
        scale: super::daemon::Scale {
            rounds: 0,
            infos,
            closure,
            requests: 0,
        },
        shape: Shape::Tree,
    };
    let full = infos(scale.infos, scale.closure);
    let (full_store, empty_store) = (work.path("full"), work.path("empty"));
    full.publish(&full_store)?;
    infos(0, 0).publish(&empty_store)?;

    let mut above_full = Instance::start(work, &full_store, "full")?;
    let mut above_empty = Instance::start(work, &empty_store, "empty")?;
    let (mut here, mut there) = (Vec::new(), Vec::new());
    // A collection takes some milliseconds: many rounds, and both sides first in turn.
    for round in 0..scale.rounds * COLLECTIONS {
        let (one, two) = (&mut above_full, &mut above_empty);
        if round % 2 == 0 {
            here.push(one.collect(round, scale.garbage)?);
            there.push(two.collect(round, scale.garbage)?);
        } else {
            there.push(two.collect(round, scale.garbage)?);
            here.push(one.collect(round, scale.garbage)?);
        }
    }
    above_empty.server.stop()?;
    report.rows.push(Row {
        group: "overlay",
        name: format!(
            "collecting {} paths above {}",
            scale.garbage,
            crate::ui::count(scale.infos.into())
        ),
        unit: Unit::Seconds,
        here: median(&mut here),
        peer: Some(("the same above an empty lower".into(), median(&mut there))),
        aim: Aim::Ratio(0.9), // as fast, within what repetitions differ by
    });
    match nix {
        Some(nix) => closure(&full, &full_store, nix, scale, report)?,
        None => report
            .missing
            .push("a closure through C++ local-overlay: no Nix".to_owned()),
    }
    above_full.server.stop()
}

/// `nix path-info -r` through our overlay store and through `local-overlay://` on our lower daemon; the latter each
/// time with an empty database above.
fn closure(
    infos: &Infos,
    store: &Path,
    nix: &Nix,
    scale: Scale,
    report: &mut Report,
) -> Result<()> {
    let (top, count) = (infos.top()?, scale.closure);
    // Both databases of the upper are on the disk that is measured. The mount check is left out, as the client never
    // looks at files.
    let script = |url: &str| {
        format!(
            "dir=$(mktemp -d)
            rm -rf /bench/peer /bench/peer-upper
            mkdir -p $dir/top/nix/store /bench/peer/nix/store /bench/peer-upper
            start=$EPOCHREALTIME
            nix path-info --store \"{url}\" -r {top} > $dir/list
            end=$EPOCHREALTIME
            found=$(wc -l < $dir/list)
            [[ $found == {count} ]] || {{ echo expected {count} paths, found $found >&2; exit 1; }}
            echo $start $end"
        )
    };
    let ours = script("unix:///bench/run/overlay.sock?root=$dir/top");
    let theirs = script(
        "local-overlay://?root=/bench/peer&check-mount=false&upper-layer=/bench/peer-upper&lower-store=unix%3A///bench/run/daemon.sock%3Froot%3D$dir/lower",
    );
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        for (script, times) in [(&ours, &mut here), (&theirs, &mut there)] {
            let output = run(&mut nix.command(&[(store, "/bench")], script))?;
            times.push(parse_interval(&output.stdout)?);
        }
    }
    report.rows.push(Row {
        group: "overlay",
        name: format!("nix path-info -r of {}", crate::ui::count(count.into())),
        unit: Unit::Seconds,
        here: median(&mut here),
        peer: Some((
            format!("local-overlay, {}, same lower", nix.version),
            median(&mut there),
        )),
        aim: Aim::Ratio(10.0),
    });
    Ok(())
}

/// A running `up`.
pub(crate) struct Instance {
    pub(crate) server: Server,
    socket: PathBuf,
}

impl Instance {
    /// Starts `up` for a store.
    pub(crate) fn start(work: &Work, store: &Path, name: &str) -> Result<Self> {
        Self::start_with(work, store, name, &[])
    }
    /// Starts `up` with more arguments.
    pub(crate) fn start_with(
        work: &Work,
        store: &Path,
        name: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        let socket = store.join("run/overlay.sock");
        let mut server = Server::start(
            understory(store)?
                .arg("up")
                .args(["--trusted-users", "*"])
                .args(arguments),
            &work.path(&format!("{name}.log")),
        )?;
        server.wait_for("an answer", || Client::connect(&socket).ok())?;
        Ok(Self { server, socket })
    }
    /// Adds garbage, then collects it on a new connection; seconds of the collection.
    fn collect(&mut self, round: usize, garbage: u32) -> Result<f64> {
        let failed = |e: std::io::Error| CommandError::io("using", self.socket.display(), &e);
        let mut client = Client::connect(&self.socket).map_err(failed)?;
        for number in 0..garbage {
            add_text(&mut client, &format!("garbage {round} {number}")).map_err(failed)?;
        }
        // Its temporary roots go with it, a moment later.
        drop(client);
        let mut client = Client::connect(&self.socket).map_err(failed)?;
        let start = Instant::now();
        loop {
            let dead = collect(&mut client, RETURN_DEAD).map_err(failed)?;
            if dead == u64::from(garbage) {
                break;
            }
            if start.elapsed() > ROOTS_GONE {
                return Err(CommandError::failed(format!(
                    "expected {garbage} dead paths, found {dead}"
                )));
            }
        }
        let start = Instant::now();
        let deleted = collect(&mut client, DELETE_DEAD).map_err(failed)?;
        let seconds = start.elapsed().as_secs_f64();
        if deleted != u64::from(garbage) {
            return Err(CommandError::failed(format!(
                "expected {garbage} paths to be deleted, found {deleted}"
            )));
        }
        Ok(seconds)
    }
}

fn add_text(client: &mut Client, text: &str) -> std::io::Result<()> {
    client.put(ADD_TO_STORE);
    client.put_string("garbage");
    client.put_string("text:sha256");
    client.put(0); // references
    client.put(0); // no repair
    client.put_frame(text.as_bytes());
    client.put_frame(&[]);
    client.send()?;
    client.log()?;
    client.string()?; // path
    client.skip_unkeyed_path_info().map(drop)
}

/// Lists or deletes what is dead; the number of paths.
fn collect(client: &mut Client, action: u64) -> std::io::Result<u64> {
    client.put(COLLECT_GARBAGE);
    client.put(action);
    // no paths, no ignoring of liveness, no limit, three obsolete numbers
    for value in [0, 0, u64::MAX, 0, 0, 0] {
        client.put(value);
    }
    client.send()?;
    client.log()?;
    let count = client.number()?;
    for _ in 0..count {
        client.string()?;
    }
    client.number()?; // bytes
    client.number()?; // obsolete
    Ok(count)
}
