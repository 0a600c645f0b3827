//! `cat`: a file of a store path.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::resolve;
use std::ffi::OsString;
use std::io::Write;
use understory_castore::Node;

/// Write a file of a store path to stdout
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A file in a store path
    path: OsString,
}

/// Bytes read at a time: some chunks of a large file.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let target = resolve::target(&store, &args.path)?;
    let full = store.store_dir().print(&target.stored.info.path);
    let node = resolve::node(store.castore(), &target.stored.root, &full, &target.below)?;
    let name = args.path.to_string_lossy();
    let (digest, size) = match &node {
        Node::File { digest, size, .. } => (digest, *size),
        Node::Directory { .. } => {
            return Err(CommandError::failed(format!("{name} is a directory"))
                .hint("list it with `understory ls`"));
        }
        Node::Symlink { target } => {
            return Err(CommandError::failed(format!("{name} is a symlink"))
                .hint(format!("it points to {}", String::from_utf8_lossy(target))));
        }
    };
    let blob = store.castore().blob(digest, size)?;
    let mut out = std::io::stdout().lock();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut offset = 0;
    while offset < size {
        let n = blob.read_at(offset, &mut buffer)?;
        if n == 0 {
            return Err(CommandError::failed(format!(
                "{name}: expected {size} bytes, found {offset}"
            )));
        }
        out.write_all(&buffer[..n])
            .map_err(|e| CommandError::io("writing to", "standard output", &e))?;
        offset += n as u64;
    }
    out.flush()
        .map_err(|e| CommandError::io("writing to", "standard output", &e))
}
