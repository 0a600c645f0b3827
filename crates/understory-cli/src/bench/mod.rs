//! `bench`: measures this machine against real peers in one run, and says where the aims are met.
//!
//! Every measurement names its peer and prints the ratio to it; what both sides have in common (data, cache
//! state, machine, versions) stands above the table. Aims are those of the design.

mod client;
mod daemon;
mod dense;
mod environment;
mod gc;
mod import;
mod index;
mod mount;
mod overlay;
mod rebuild;
mod report;
mod sample;
mod substitute;

use crate::context::Context;
use crate::error::{CommandError, Result};
use clap::ValueEnum;
use environment::{Nix, Work};
use import::Source;
use report::Report;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Measure this machine against real peers
///
/// `mount` and cold caches need root. The peers of the rest are real Nix in a root file system
/// (`scripts/nix-root 2.34` prints one) on a real Nix store (`scripts/corpus medium DIR` makes one).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to measure
    #[arg(value_enum, default_value_t = What::All)]
    what: What,
    /// How much data and how many rounds
    #[arg(long, value_enum, default_value_t = Size::Medium)]
    size: Size,
    /// Root directory of a real Nix store: the data [default: / if it has one]
    #[arg(long, value_name = "DIR")]
    store_root: Option<PathBuf>,
    /// Root file system with Nix: the peer
    #[arg(long, value_name = "DIR")]
    nix_root: Option<PathBuf>,
    /// Where to work: the disk that is measured [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// `mkfs.erofs` 1.8 or newer, a peer of the image mount
    #[arg(long, value_name = "FILE", default_value = "mkfs.erofs")]
    mkfs_erofs: OsString,
    /// Set in the mount namespace that the command makes for itself
    #[arg(long, hide = true)]
    in_namespace: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Import speed
    Import,
    /// Size on disk, also when written anew, and what reads cost then: ten minutes on 3 GB
    Size,
    /// What a rebuild of every path adds on disk
    Rebuild,
    /// Collection of half of the store beside a reader
    Gc,
    /// The index and the database at a size that no test machine has content for
    Index,
    /// Live and image mount under overlayfs
    Mount,
    /// Requests to the daemon
    Daemon,
    /// Time to the first answer, idle memory
    Startup,
    /// The overlay store
    Overlay,
    /// Substitution over HTTP
    Substitute,
    /// All of these
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    /// A minute: shows that it works, not how fast
    Smoke,
    /// Half an hour on 3 GB
    Medium,
    /// As medium, and the index with 100 million pieces and 10 million paths: half an hour more, 20 GB of disk
    Large,
}

impl Size {
    const fn import_rounds(self) -> usize {
        match self {
            Self::Smoke => 1,
            Self::Medium | Self::Large => 3,
        }
    }
    const fn mount(self) -> sample::Scale {
        match self {
            Self::Smoke => sample::Scale {
                rounds: 1,
                small_files: 500,
                sequential_bytes: 20 << 20,
                random_reads: 200,
            },
            Self::Medium | Self::Large => sample::Scale {
                rounds: 5,
                small_files: 20_000,
                sequential_bytes: 700 << 20,
                random_reads: 4_000,
            },
        }
    }
    const fn index(self) -> index::Scale {
        match self {
            Self::Smoke => index::Scale {
                pieces: 5_000_000,
                paths: 3_000,
                lookups: 20_000,
            },
            Self::Medium => index::Scale {
                pieces: 20_000_000,
                paths: 300_000,
                lookups: 300_000,
            },
            Self::Large => index::Scale {
                pieces: 100_000_000,
                paths: 10_000_000,
                lookups: 200_000,
            },
        }
    }
    const fn overlay(self) -> overlay::Scale {
        match self {
            Self::Smoke => overlay::Scale {
                rounds: 1,
                infos: 3_000,
                closure: 200,
                garbage: 10,
            },
            Self::Medium | Self::Large => overlay::Scale {
                rounds: 5,
                infos: 100_000,
                closure: 5_000,
                garbage: 100,
            },
        }
    }
    const fn daemon(self) -> daemon::Scale {
        match self {
            Self::Smoke => daemon::Scale {
                rounds: 1,
                infos: 3_000,
                closure: 200,
                requests: 500,
            },
            Self::Medium | Self::Large => daemon::Scale {
                rounds: 5,
                infos: 100_000,
                closure: 2_000,
                requests: 10_000,
            },
        }
    }
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let wants = |what| args.what == What::All || args.what == what;
    let mounts =
        wants(What::Mount) || wants(What::Gc) || wants(What::Overlay) || wants(What::Substitute);
    if mounts && !args.in_namespace {
        return enter_namespace();
    }
    let work = Work::new(args.work.as_deref())?;
    let mut report = Report {
        smoke: args.size == Size::Smoke,
        ..Report::default()
    };
    report.condition("machine", environment::machine(&work.path("")));
    report.condition("here", format!("understory {}", env!("CARGO_PKG_VERSION")));
    let nix = args
        .nix_root
        .as_deref()
        .map(|root| Nix::new(root, &work))
        .transpose()?;
    match &nix {
        Some(nix) => report.condition("peer", nix.version.clone()),
        None => report
            .missing
            .push("what needs real Nix as the peer: name one with --nix-root".to_owned()),
    }

    let of_data = [
        What::Import,
        What::Size,
        What::Rebuild,
        What::Gc,
        What::Mount,
        What::Substitute,
    ];
    if of_data.into_iter().any(wants) {
        let root = match &args.store_root {
            Some(root) => root.clone(),
            None => PathBuf::from("/"),
        };
        let source = Source::new(&root)?;
        report.condition("data", source.describe());
        if wants(What::Import) || wants(What::Size) {
            cx.ui.say("measuring imports");
            let with = (wants(What::Import), wants(What::Size));
            import::measure(
                &work,
                &source,
                nix.as_ref(),
                args.size.import_rounds(),
                with,
                &mut report,
            )?;
        }
        if wants(What::Size) {
            cx.ui.say("measuring denser stores");
            dense::measure(&work, &source, args.size.mount(), &mut report)?;
        }
        if wants(What::Rebuild) {
            cx.ui.say("measuring a rebuild");
            rebuild::measure(&work, &source, &mut report)?;
        }
        if wants(What::Gc) {
            cx.ui.say("measuring a collection");
            gc::measure(&work, &source, &mut report)?;
        }
        if wants(What::Mount) {
            cx.ui.say("measuring the mount");
            let scale = args.size.mount();
            mount::measure(&work, &source, scale, &args.mkfs_erofs, &mut report)?;
        }
        work.remove("store")?;
        if wants(What::Substitute) {
            cx.ui.say("measuring substitution");
            match &nix {
                Some(nix) => substitute::measure(
                    &work,
                    &source,
                    nix,
                    args.size.import_rounds(),
                    &mut report,
                )?,
                None => report.missing.push("substitution: no Nix".to_owned()),
            }
        }
    }
    if wants(What::Index) {
        cx.ui.say("measuring the index");
        index::measure(&work, args.size.index(), &mut report)?;
    }
    if wants(What::Overlay) {
        cx.ui.say("measuring the overlay store");
        overlay::measure(&work, nix.as_ref(), args.size.overlay(), &mut report)?;
    }
    if wants(What::Daemon) || wants(What::Startup) {
        cx.ui.say("measuring the daemon");
        let with = (wants(What::Daemon), wants(What::Startup));
        daemon::measure(&work, nix.as_ref(), args.size.daemon(), with, &mut report)?;
    }
    report.condition(
        "caches",
        "imports: source in the page cache; cold: kernel caches dropped; warm: second pass; size: packs in the page \
         cache, frame cache empty",
    );
    if cx.json {
        return cx.ui.print_json(&report.to_json());
    }
    cx.ui.print(report.to_text(&cx.ui))
}

/// Starts this command again in a mount namespace of its own, where its mounts end with it.
fn enter_namespace() -> Result<()> {
    let exe =
        std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?;
    let error = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(exe)
        .args(std::env::args_os().skip(1))
        .arg("--in-namespace")
        .exec();
    Err(CommandError::io("running", "unshare", &error)
        .hint("bench mount needs root and util-linux"))
}
