//! `ls`: what is in a store path.

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::resolve;
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::io::Write;
use understory_castore::{Castore, Node};

/// List what is in a store path
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A store path or something below it
    path: OsString,
    /// Show types, sizes and targets
    #[arg(short, long)]
    long: bool,
    /// List directories below, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Show the entry itself, not what is in it
    #[arg(short, long, conflicts_with = "recursive")]
    directory: bool,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let target = resolve::target(&store, &args.path)?;
    let full = store.store_dir().print(&target.stored.info.path);
    let node = resolve::node(store.castore(), &target.stored.root, &full, &target.below)?;
    if cx.json {
        let depth = if args.directory { 0 } else { 1 };
        return cx
            .ui
            .print_json(&to_json(store.castore(), &node, depth, args.recursive)?);
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match &node {
        Node::Directory { .. } if !args.directory => {
            list(store.castore(), &node, &mut Vec::new(), args, &mut out)?;
        }
        _ => line(&mut out, args, &node, b".")?,
    }
    out.flush().map_err(|e| stdout_error(&e))
}

/// Lists depth first. The stack is as deep as the tree, which NARs limit to 64.
fn list(
    castore: &Castore,
    node: &Node,
    prefix: &mut Vec<u8>,
    args: &Args,
    out: &mut dyn Write,
) -> Result<()> {
    let Node::Directory { digest, .. } = node else {
        return Ok(());
    };
    for entry in castore.directory(digest)?.entries() {
        let len = prefix.len();
        if len > 0 {
            prefix.push(b'/');
        }
        prefix.extend_from_slice(&entry.name);
        line(out, args, &entry.node, prefix)?;
        if args.recursive {
            list(castore, &entry.node, prefix, args, out)?;
        }
        prefix.truncate(len);
    }
    Ok(())
}

fn line(out: &mut dyn Write, args: &Args, node: &Node, name: &[u8]) -> Result<()> {
    let mut text = Vec::new();
    if args.long {
        let (mode, size) = match node {
            Node::Directory { .. } => ("dr-xr-xr-x", 0),
            Node::File {
                size,
                executable: true,
                ..
            } => ("-r-xr-xr-x", *size),
            Node::File { size, .. } => ("-r--r--r--", *size),
            Node::Symlink { target } => ("lrwxrwxrwx", target.len() as u64),
        };
        text.extend_from_slice(format!("{mode} {size:>12} ").as_bytes());
    }
    text.extend_from_slice(name);
    if let (true, Node::Symlink { target }) = (args.long, node) {
        text.extend_from_slice(b" -> ");
        text.extend_from_slice(target);
    }
    text.push(b'\n');
    out.write_all(&text).map_err(|e| stdout_error(&e))
}

fn stdout_error(e: &std::io::Error) -> CommandError {
    CommandError::io("writing to", "standard output", e)
}

/// The form of `nix store ls --json`.
fn to_json(castore: &Castore, node: &Node, depth: u32, recursive: bool) -> Result<Value> {
    Ok(match node {
        Node::File {
            size, executable, ..
        } => {
            let mut map = Map::new();
            map.insert("type".into(), "regular".into());
            map.insert("size".into(), (*size).into());
            if *executable {
                map.insert("executable".into(), true.into());
            }
            Value::Object(map)
        }
        Node::Symlink { target } => {
            json!({"type": "symlink", "target": String::from_utf8_lossy(target)})
        }
        Node::Directory { digest, .. } => {
            let mut map = Map::new();
            map.insert("type".into(), "directory".into());
            if depth > 0 || recursive {
                let mut entries = Map::new();
                for entry in castore.directory(digest)?.entries() {
                    let value = to_json(castore, &entry.node, depth.saturating_sub(1), recursive)?;
                    entries.insert(String::from_utf8_lossy(&entry.name).into_owned(), value);
                }
                map.insert("entries".into(), Value::Object(entries));
            }
            Value::Object(map)
        }
    })
}
