//! Ways in, and what is left on disk: against `cp -a`, `nix copy` into a local store and `nix-store --optimise`.
//!
//! Both sides begin with the source in the page cache and an empty destination, and end with the destination
//! on disk (`sync -f` where the tool itself does not sync).

use super::environment::{self, Nix, Work, run, timed, understory};
use super::report::{Aim, Report, Row, Unit, median};
use crate::error::{CommandError, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A real Nix store.
pub(crate) struct Source {
    /// Its root directory.
    pub(crate) root: PathBuf,
    /// What it holds.
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) paths: u64,
}

impl Source {
    pub(crate) fn new(root: &Path) -> Result<Self> {
        let database = root.join("nix/var/nix/db/db.sqlite");
        if !database.exists() {
            return Err(CommandError::usage(format!(
                "{} is not the root of a Nix store: no {}",
                root.display(),
                database.display()
            ))
            .hint("`scripts/corpus medium DIR` makes one in DIR/root"));
        }
        let root = root
            .canonicalize()
            .map_err(|e| CommandError::io("finding", root.display(), &e))?;
        let mut source = Self {
            files: 0,
            bytes: 0,
            paths: 0,
            root,
        };
        let mut dirs = vec![(source.objects(), 0)];
        while let Some((dir, depth)) = dirs.pop() {
            let entries = std::fs::read_dir(&dir)
                .map_err(|e| CommandError::io("reading", dir.display(), &e))?;
            for entry in entries {
                let entry = entry.map_err(|e| CommandError::io("reading", dir.display(), &e))?;
                if depth == 0 && entry.file_name() == ".links" {
                    continue;
                }
                source.paths += u64::from(depth == 0);
                let meta = entry
                    .metadata()
                    .map_err(|e| CommandError::io("reading", entry.path().display(), &e))?;
                if meta.is_dir() {
                    dirs.push((entry.path(), depth + 1));
                } else if meta.is_file() {
                    source.files += 1;
                    source.bytes += meta.len();
                }
            }
        }
        Ok(source)
    }
    /// The directory with the store objects.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("nix/store")
    }
    pub(crate) fn describe(&self) -> String {
        format!(
            "{}: {} store paths, {} files, {}",
            self.root.display(),
            crate::ui::count(self.paths),
            crate::ui::count(self.files),
            crate::ui::bytes(self.bytes)
        )
    }
}

/// Imports everything into a new store `name`; returns its directory and the seconds.
pub(crate) fn import(work: &Work, source: &Source, name: &str) -> Result<(PathBuf, f64)> {
    work.remove(name)?;
    let store = work.path(name);
    let seconds = timed(
        understory(&store)?
            .arg("import")
            .arg(&source.root)
            .arg("--all"),
    )?;
    Ok((store, seconds))
}

/// Reads the source once, so that it is in the page cache as far as it fits.
fn warm(source: &Source) -> Result<()> {
    run(Command::new("bash")
        .args([
            "-c",
            "find \"$1\" -type f -print0 | xargs -0 cat > /dev/null",
            "-",
        ])
        .arg(source.objects()))
    .map(drop)
}

/// `bench import` and `bench size`, which look at the same destinations. Leaves our store in `store`.
pub(crate) fn measure(
    work: &Work,
    source: &Source,
    nix: Option<&Nix>,
    rounds: usize,
    with: (bool, bool),
    report: &mut Report,
) -> Result<()> {
    let (speed, size) = with;
    let rounds = if speed { rounds } else { 1 };
    warm(source)?;
    let (mut ours, mut copies, mut nixes) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (_, seconds) = import(work, source, "store")?;
        ours.push(seconds);
        if speed {
            work.remove("copy")?;
            copies.push(timed(
                Command::new("bash")
                    .args(["-euc", "cp -a \"$1\" \"$2\"; sync -f \"$2\"", "-"])
                    .arg(source.objects())
                    .arg(work.path("copy")),
            )?);
            work.remove("copy")?;
        }
        // minutes for a large store: once is enough to compare with
        if let (Some(nix), 0) = (nix, round) {
            nixes.push(nix_copy(work, source, nix)?);
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let bytes = source.bytes as f64;
    let here = bytes / median(&mut ours);
    let row = |name: &str, peer: Option<(String, f64)>, aim| Row {
        group: "import",
        name: name.to_owned(),
        unit: Unit::BytesPerSecond,
        here,
        peer,
        aim,
    };
    if speed {
        report.rows.push(row(
            "import, against cp -a",
            Some(("cp -a; sync -f".into(), bytes / median(&mut copies))),
            Aim::None,
        ));
        if let (Some(nix), false) = (nix, nixes.is_empty()) {
            let peer = (
                format!("nix copy into a local store, {}", nix.version),
                bytes / median(&mut nixes),
            );
            report
                .rows
                .push(row("import, against nix copy", Some(peer), Aim::Ratio(3.0)));
        }
        let again = timed(
            understory(&work.path("store"))?
                .arg("import")
                .arg(&source.root)
                .arg("--all"),
        )?;
        let mut row = row("import of what is there", None, Aim::None);
        (row.unit, row.here) = (Unit::Seconds, again);
        report.rows.push(row);
    }
    if size {
        sizes(work, source, nix, report)?;
    }
    work.remove("nix")
}

/// Everything into a local store by real Nix, in its root file system; seconds without entering it.
fn nix_copy(work: &Work, source: &Source, nix: &Nix) -> Result<f64> {
    work.remove("nix")?;
    let destination = work.make("nix")?;
    let script = "
        start=$EPOCHREALTIME
        nix copy --all --no-check-sigs --from local?root=/bench/source --to local?root=/bench/destination
        sync -f /bench/destination
        echo \"$start $EPOCHREALTIME\"";
    let binds = [
        (source.root.as_path(), "/bench/source"),
        (destination.as_path(), "/bench/destination"),
    ];
    let output = run(&mut nix.command(&binds, script))?;
    parse_interval(&output.stdout)
}

/// The seconds between two times that Bash printed.
pub(crate) fn parse_interval(output: &[u8]) -> Result<f64> {
    let text = String::from_utf8_lossy(output);
    let mut times = text.split_whitespace().rev().take(2).map(str::parse::<f64>);
    match (times.next(), times.next()) {
        (Some(Ok(end)), Some(Ok(start))) => Ok(end - start),
        _ => Err(CommandError::environment(format!(
            "expected two times, found {text:?}"
        ))),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn sizes(work: &Work, source: &Source, nix: Option<&Nix>, report: &mut Report) -> Result<()> {
    let here = environment::disk_bytes(&work.path("store"))? as f64;
    let row = |name: &str, peer: (String, f64), aim| Row {
        group: "size on disk",
        name: name.to_owned(),
        unit: Unit::Bytes,
        here,
        peer: Some(peer),
        aim,
    };
    report.rows.push(row(
        "store, against apparent size",
        ("apparent size of all files".into(), source.bytes as f64),
        Aim::Part(0.24),
    ));
    let Some(nix) = nix else { return Ok(()) };
    let destination = work.path("nix");
    if !destination.join("nix/store").is_dir() {
        nix_copy(work, source, nix)?;
    }
    let plain = environment::disk_bytes(&destination)? as f64;
    run(&mut nix.command(
        &[(&destination, "/bench/destination")],
        "nix-store --store /bench/destination --optimise",
    ))?;
    let optimised = environment::disk_bytes(&destination)? as f64;
    report.rows.push(row(
        "store, against a Nix store",
        (format!("local store, {}", nix.version), plain),
        Aim::None,
    ));
    report.rows.push(row(
        "store, against --optimise",
        (format!("nix-store --optimise, {}", nix.version), optimised),
        Aim::None,
    ));
    Ok(())
}
