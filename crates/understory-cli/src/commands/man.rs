//! `man`: writes the manual pages.

use crate::Cli;
use crate::context::Context;
use crate::error::{CommandError, Result};
use clap::CommandFactory;
use std::path::PathBuf;

/// Write the manual pages
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write one page per command into this directory instead of the main page to stdout
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|e| CommandError::io("writing", "the manual page", &e))?;
        return cx.ui.print(page);
    };
    std::fs::create_dir_all(dir).map_err(|e| CommandError::io("creating", dir.display(), &e))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|e| CommandError::io("writing to", dir.display(), &e))?;
    cx.ui
        .say(format_args!("wrote manual pages to {}", dir.display()));
    Ok(())
}
