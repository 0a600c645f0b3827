//! `repack`: writes packs anew, denser.

use super::gc::{content_json, parse_bytes, reclaim, say_content};
use crate::context::Context;
use crate::error::Result;
use std::collections::BTreeSet;
use understory::store::CollectOptions;

/// The level of a dense repack: higher ones take many times as long for little more.
const DENSE_LEVEL: i32 = 9;

/// Write packs anew: joined, without dead content, at another level
///
/// Joins small packs, which many short-lived writers leave, and leaves out what no path needs. With a level,
/// everything is compressed anew; with --dense, content of all paths is ordered by likeness first. Reads, imports and
/// mounts go on meanwhile.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Compress everything anew with this zstd level
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=19))]
    level: Option<i32>,
    /// Put what is alike together, in frames of BYTES (256KiB to 4MiB): the smallest store, at the expense of cold
    /// reads; at level 9 unless told otherwise
    #[arg(
        long,
        value_name = "BYTES",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "256KiB",
        value_parser = frame_bytes,
    )]
    dense: Option<usize>,
    /// Write all packs anew, also those in which nothing is dead
    #[arg(long)]
    all: bool,
}

fn frame_bytes(text: &str) -> std::result::Result<usize, String> {
    let bytes = parse_bytes(text)?;
    let range = CollectOptions::DENSE_FRAME_BYTES..=CollectOptions::DENSE_FRAME_BYTES_MAX;
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| range.contains(bytes))
        .ok_or_else(|| "expected 256KiB to 4MiB".to_owned())
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open_to_write()?;
    let level = args.level.or(args.dense.map(|_| DENSE_LEVEL));
    let options = CollectOptions {
        dead_permille_min: 1,
        all: args.all || level.is_some(),
        level,
        dense: args.dense,
        join_small: true,
        ..CollectOptions::default()
    };
    let report = reclaim(cx, &store, &options, &BTreeSet::new(), "repacking")?;
    if cx.json {
        return cx.ui.print_json(&content_json(&report));
    }
    say_content(cx, &report, false);
    Ok(())
}
