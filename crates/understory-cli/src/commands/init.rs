//! `init`: creates an empty store.

use crate::context::Context;
use crate::error::Result;
use understory::Store;
use understory_nix::StoreDir;

/// Create an empty store
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Logical store directory: the prefix that store paths have
    #[arg(long, value_name = "DIR", default_value = "/nix/store")]
    store_dir: String,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let dir = cx.store_path()?;
    let store_dir = StoreDir::new(&args.store_dir)?;
    Store::create(&dir, &store_dir)?;
    if cx.json {
        return cx
            .ui
            .print_json(&serde_json::json!({"store": dir, "storeDir": store_dir.as_str()}));
    }
    cx.ui.say(format_args!(
        "created a store for {store_dir} in {}",
        dir.display()
    ));
    Ok(())
}
