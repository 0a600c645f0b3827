//! `roots`: lists and adds garbage collection roots.

use crate::context::Context;
use crate::error::Result;
use crate::resolve;
use std::ffi::OsString;
use std::path::PathBuf;

/// List or add garbage collection roots
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List all roots (what is done without a command)
    List,
    /// Make a symlink to a store path and keep the path as long as the link is there
    Add {
        /// A store path
        path: OsString,
        /// The symlink
        link: PathBuf,
    },
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    match &args.command {
        None | Some(Command::List) => list(cx),
        Some(Command::Add { path, link }) => {
            let store = cx.open_to_write()?;
            let path = resolve::path(&store, path)?.info.path.clone();
            let link = understory::config::absolute(link)?;
            store.add_perm_root(&path, &link)?;
            cx.ui.say(format_args!(
                "{} keeps {}",
                link.display(),
                store.store_dir().print(&path)
            ));
            Ok(())
        }
    }
}

fn list(cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let roots = store.roots()?;
    let dir = store.store_dir();
    if cx.json {
        let list: Vec<_> = roots
            .iter()
            .map(|(link, path)| serde_json::json!({"link": link, "path": dir.print(path)}))
            .collect();
        return cx.ui.print_json(&list);
    }
    let mut out = String::new();
    for (link, path) in &roots {
        out.push_str(&format!("{} -> {}\n", link.display(), dir.print(path)));
    }
    cx.ui.print(out)
}
