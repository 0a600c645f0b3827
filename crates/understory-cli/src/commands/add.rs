//! `add`: a file or directory as a content-addressed store path.

use crate::context::Context;
use crate::error::Result;
use crate::progress::{Done, Progress};
use crate::settings::MaskArgs;
use crate::ui;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use understory::StoreOptions;
use understory::add::{AddMethod, add_path};
use understory::up::Notifier;
use understory_nix::{ContentAddressMethod, HashAlgorithm};

/// Add a file or directory as a content-addressed store path
///
/// Gives the store path that `nix store add` gives, and prints it. Creates the store if there is none.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to add
    path: PathBuf,
    /// Name part of the store path [default: the last part of PATH]
    #[arg(short, long)]
    name: Option<String>,
    /// How the content is serialised for its hash
    #[arg(long, default_value = "nar")]
    mode: Mode,
    /// With which algorithm
    #[arg(long, value_name = "ALGORITHM", default_value = "sha256", value_parser = algorithm)]
    hash_algo: HashAlgorithm,
    #[command(flatten)]
    mask: MaskArgs,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// Any tree, as NAR
    Nar,
    /// One file, its bytes
    Flat,
    /// One file, as `builtins.toFile` makes it
    Text,
    /// Any tree, as git hashes it
    Git,
}

fn algorithm(name: &str) -> Result<HashAlgorithm, String> {
    HashAlgorithm::from_name(name)
        .ok_or_else(|| "expected md5, sha1, sha256, sha512 or blake3".into())
}

/// Between two looks at the writer's counters.
const TICK: Duration = Duration::from_millis(200);

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let mut options = StoreOptions::default();
    args.mask.apply(&mut options);
    let store = cx.open_or_create(&options)?;
    store.observe(std::sync::Arc::new(Notifier::new(store.dir())));
    let method = match args.mode {
        Mode::Nar => ContentAddressMethod::Nar,
        Mode::Flat => ContentAddressMethod::Flat,
        Mode::Text => ContentAddressMethod::Text,
        Mode::Git => ContentAddressMethod::Git,
    };
    let how = AddMethod {
        method,
        algorithm: args.hash_algo,
    };
    let owner = store.temp_root_owner()?;
    let writer = store.castore().writer()?;
    let progress = Progress::new(&cx.ui, "adding");
    let ended = AtomicBool::new(false);
    let added = std::thread::scope(|scope| {
        let ticker = scope.spawn(|| {
            while !ended.load(Ordering::Acquire) {
                let counters = writer.counters();
                progress.update(Done {
                    bytes: (counters.given_bytes, 0),
                    new_bytes: counters.new_bytes,
                    ..Done::default()
                });
                std::thread::park_timeout(TICK);
            }
        });
        let added = add_path(
            &store,
            &owner,
            &args.path,
            args.name.as_deref(),
            &how,
            &BTreeSet::new(),
        );
        ended.store(true, Ordering::Release);
        ticker.thread().unpark();
        added
    });
    let time = progress.finish();
    let info = added?;
    let path = store.store_dir().print(&info.path);
    let counters = writer.counters();
    if cx.json {
        return cx.ui.print_json(&serde_json::json!({
            "path": path,
            "narHash": info.nar_hash.to_hash().to_sri(),
            "narSize": info.nar_size,
            "ca": info.ca.map(|ca| ca.to_string()),
            "newBytes": counters.new_bytes,
            "storedBytes": counters.stored_bytes,
        }));
    }
    cx.ui.print(format!("{path}\n"))?;
    cx.ui.say(format_args!(
        "{} in {:.1} s ({}); {} new, {} on disk",
        ui::bytes(info.nar_size),
        time.as_secs_f64(),
        ui::rate(info.nar_size, time),
        ui::bytes(counters.new_bytes),
        ui::bytes(counters.stored_bytes)
    ));
    Ok(())
}
