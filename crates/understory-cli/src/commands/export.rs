//! `export`: a store path as NAR.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::resolve;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};

/// Write a store path as NAR to stdout
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A store path or something below it
    path: OsString,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    if std::io::stdout().is_terminal() {
        return Err(
            CommandError::usage("a NAR is binary and is not written to a terminal")
                .hint("redirect it: `understory export PATH > path.nar`"),
        );
    }
    let store = cx.open()?;
    let target = resolve::target(&store, &args.path)?;
    let full = store.store_dir().print(&target.stored.info.path);
    let node = resolve::node(store.castore(), &target.stored.root, &full, &target.below)?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    understory::nar::write_nar(store.castore(), &node, &mut out)?;
    out.flush()
        .map_err(|e| CommandError::io("writing to", "standard output", &e))
}
