//! `image`: closures as one EROFS file.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::progress::{Done, Progress};
use crate::{resolve, signals, ui};
use serde_json::json;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use understory::config;
use understory::image::{self, ImageOptions};
use understory_nix::StorePath;

/// Write closures as an EROFS image for VMs and containers
///
/// The image holds the paths and all that they need, uncompressed, equal files once. The same closure gives the
/// same bytes. Any Linux since 5.4 mounts it: `mount -t erofs -o loop,ro FILE DIR`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Store paths, base names or hash parts
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// The image; appears when it is whole
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Put the store directory into the image (/nix/store/…) instead of making it the image's root
    #[arg(long)]
    full_paths: bool,
    /// Add the file nix-path-registration to the image's root, for `nix-store --load-db`
    #[arg(long)]
    registration: bool,
    /// Also make a dm-verity hash tree FILE.verity and FILE.roothash, and print the root hash
    #[arg(long)]
    verity: bool,
    /// Replace what is there
    #[arg(short, long)]
    force: bool,
    /// Threads that read contents; 0 = by the number of cores
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    jobs: usize,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open_to_keep()?;
    let paths = resolve::paths(&store, &args.paths)?;
    let paths: Vec<StorePath> = paths.iter().map(|row| row.info.path.clone()).collect();
    let roots = store.temp_root_owner()?;
    store.add_temp_roots(&roots, &paths)?;
    let target = config::absolute(&args.output)?;
    let options = ImageOptions {
        full_paths: args.full_paths,
        registration: args.registration,
        replace: args.force,
        threads: args.jobs,
    };
    let cancel = signals::cancel_flag()?;
    let bar = Progress::new(&cx.ui, "writing");
    let update = |done, all| {
        bar.update(Done {
            bytes: (done, all),
            ..Done::default()
        });
    };
    let written = image::write(&store, &paths, &target, &options, &update, &cancel);
    let time = bar.finish();
    if cancel.load(Ordering::Relaxed) {
        return Err(CommandError::interrupted());
    }
    let written = written?;
    let verity = args
        .verity
        .then(|| image::add_verity(&written))
        .transpose()?;
    let report = written.persist()?;
    let root_hash = verity.as_ref().map(|verity| verity.root_hash.as_str());
    if cx.json {
        return cx.ui.print_json(&json!({
            "image": target,
            "imageBytes": report.image_bytes,
            "metadataBytes": u64::from(report.figures.metadata_blocks) * 4096,
            "paths": report.paths,
            "inodes": report.figures.inodes,
            "files": report.figures.files,
            "contents": report.contents,
            "contentBytes": report.content_bytes,
            "uuid": report.uuid(),
            "verityTree": verity.as_ref().map(|verity| &verity.tree),
            "rootHash": root_hash,
        }));
    }
    cx.ui.say(format_args!(
        "{} paths, {} files ({} different) in {} ({} metadata), {}",
        ui::count(report.paths),
        ui::count(report.figures.files),
        ui::count(report.contents),
        ui::bytes(report.image_bytes),
        ui::bytes(u64::from(report.figures.metadata_blocks) * 4096),
        ui::rate(report.content_bytes, time),
    ));
    match root_hash {
        Some(root_hash) => cx.ui.print(format!("{root_hash}\n")),
        None => Ok(()),
    }
}
