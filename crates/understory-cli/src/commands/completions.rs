//! `completions`: writes a completion script.

use crate::Cli;
use crate::context::Context;
use crate::error::Result;
use clap::CommandFactory;

/// Write a completion script
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// For which shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "understory", &mut script);
    cx.ui.print(script)
}
