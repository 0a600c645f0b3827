//! `delete`: deletes given paths.

use crate::context::Context;
use crate::error::Result;
use crate::{commands::gc, resolve};
use std::ffi::OsString;
use understory::store::GcAction;

/// Delete given paths
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Store paths that no root and no other path needs
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open_to_write()?;
    let paths = resolve::paths(&store, &args.paths)?
        .iter()
        .map(|p| p.info.path.clone())
        .collect();
    gc::refuse_while_mounted(cx)?;
    let report = store.collect(&GcAction::DeleteSpecific { paths })?;
    gc::show(cx, &store, &report, "deleted")
}
