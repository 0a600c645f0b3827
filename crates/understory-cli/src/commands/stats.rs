//! `stats`: counts and measures the store, and says by what each byte was saved.

use crate::context::Context;
use crate::error::Result;
use crate::ui::{self, Style};
use std::collections::{HashMap, HashSet};
use understory::Store;
use understory_castore::{Castore, Digest, Node};

/// Count and measure the store
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what the database and the castore know at once: do not walk the trees
    #[arg(long)]
    quick: bool,
}

/// Rows fetched at a time.
const BATCH: usize = 1_000;
/// Most directories remembered while walking; 48 bytes each. Beyond it shared ones are walked again.
const DIRECTORIES_MAX: usize = 4_000_000;

/// What trees hold when every path is looked at by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Trees {
    pub(crate) files: u64,
    pub(crate) directories: u64,
    pub(crate) symlinks: u64,
    pub(crate) bytes: u64,
}

impl Trees {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.directories += other.directories;
        self.symlinks += other.symlinks;
        self.bytes += other.bytes;
    }
}

/// Walks trees and counts; equal directories are walked once.
#[derive(Default)]
pub(crate) struct Walk {
    known: HashMap<Digest, Trees>,
    files: HashSet<Digest>,
    /// Bytes of files that differ.
    pub(crate) unique_bytes: u64,
    /// Files that differ.
    pub(crate) unique_files: u64,
}

impl Walk {
    pub(crate) fn node(&mut self, castore: &Castore, node: &Node) -> Result<Trees> {
        Ok(match node {
            Node::Symlink { .. } => Trees {
                symlinks: 1,
                ..Trees::default()
            },
            Node::File { digest, size, .. } => {
                if self.files.insert(*digest) {
                    self.unique_bytes += size;
                    self.unique_files += 1;
                }
                Trees {
                    files: 1,
                    bytes: *size,
                    ..Trees::default()
                }
            }
            Node::Directory { digest, .. } => {
                if let Some(trees) = self.known.get(digest) {
                    return Ok(*trees);
                }
                let mut sum = Trees {
                    directories: 1,
                    ..Trees::default()
                };
                for entry in castore.directory(digest)?.entries() {
                    sum.add(self.node(castore, &entry.node)?);
                }
                if self.known.len() < DIRECTORIES_MAX {
                    self.known.insert(*digest, sum);
                }
                sum
            }
        })
    }
}

/// Walks all paths of the store.
pub(crate) fn walk(store: &Store) -> Result<(Trees, Walk)> {
    let mut walk = Walk::default();
    let mut sum = Trees::default();
    let mut after = 0;
    loop {
        let rows = store.list(after, BATCH)?;
        let Some(last) = rows.last() else {
            return Ok((sum, walk));
        };
        after = last.id;
        for row in &rows {
            sum.add(walk.node(store.castore(), &row.root)?);
        }
    }
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let stats = store.stats()?;
    let trees = if args.quick {
        None
    } else {
        Some(walk(&store)?)
    };
    let disk = stats.castore.disk_bytes + stats.database_bytes;
    if cx.json {
        let mut value = serde_json::json!({
            "store": store.dir(),
            "storeDir": store.store_dir().as_str(),
            "paths": stats.paths,
            "derivations": stats.derivations,
            "references": stats.references,
            "realisations": stats.realisations,
            "narBytes": stats.nar_bytes,
            "rawBytes": stats.castore.raw_bytes,
            "storedBytes": stats.castore.stored_bytes,
            "packBytes": stats.castore.disk_bytes.saturating_sub(stats.castore.index_bytes),
            "indexBytes": stats.castore.index_bytes,
            "databaseBytes": stats.database_bytes,
            "diskBytes": disk,
            "packs": stats.castore.packs,
            "frames": stats.castore.frames,
            "pieces": stats.castore.data_pieces,
            "recipes": stats.castore.recipes,
            "storedDirectories": stats.castore.directories,
        });
        if let (Some((sum, walk)), Some(map)) = (&trees, value.as_object_mut()) {
            map.insert("files".into(), sum.files.into());
            map.insert("directories".into(), sum.directories.into());
            map.insert("symlinks".into(), sum.symlinks.into());
            map.insert("apparentBytes".into(), sum.bytes.into());
            map.insert("uniqueFiles".into(), walk.unique_files.into());
            map.insert("uniqueBytes".into(), walk.unique_bytes.into());
        }
        return cx.ui.print_json(&value);
    }
    let mut out = format!(
        "{}\n",
        cx.ui.style(Style::Bold, &store.dir().display().to_string())
    );
    let mut line = |name: &str, value: String, note: String| {
        let text = format!("  {name:<22} {value:>12}  {note}");
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line("store paths", ui::count(stats.paths), String::new());
    if let Some((sum, walk)) = &trees {
        let whole = sum.bytes;
        let note = format!(
            "{} directories, {} symlinks",
            ui::count(sum.directories),
            ui::count(sum.symlinks)
        );
        line("files", ui::count(sum.files), note);
        line("apparent size", ui::bytes(whole), String::new());
        let saved = |a: u64, b: u64| {
            format!(
                "{} of the apparent size; saved {}",
                ui::percent(b, whole),
                ui::bytes(a.saturating_sub(b))
            )
        };
        line(
            "equal files once",
            ui::bytes(walk.unique_bytes),
            saved(whole, walk.unique_bytes),
        );
        // Raw bytes hold directories and chunk lists, too.
        let raw = stats.castore.raw_bytes;
        line(
            "equal chunks once",
            ui::bytes(raw),
            saved(walk.unique_bytes, raw),
        );
        line(
            "compressed",
            ui::bytes(stats.castore.stored_bytes),
            saved(raw, stats.castore.stored_bytes),
        );
        line(
            "on disk",
            ui::bytes(disk),
            format!("{} of the apparent size", ui::percent(disk, whole)),
        );
    } else {
        line("NAR size", ui::bytes(stats.nar_bytes), String::new());
        line(
            "without duplicates",
            ui::bytes(stats.castore.raw_bytes),
            String::new(),
        );
        line(
            "compressed",
            ui::bytes(stats.castore.stored_bytes),
            String::new(),
        );
        let note = format!("{} of the NAR size", ui::percent(disk, stats.nar_bytes));
        line("on disk", ui::bytes(disk), note);
    }
    let packs = stats
        .castore
        .disk_bytes
        .saturating_sub(stats.castore.index_bytes);
    line(
        "  packs",
        ui::bytes(packs),
        format!(
            "{} packs, {} frames",
            stats.castore.packs,
            ui::count(stats.castore.frames)
        ),
    );
    line(
        "  index",
        ui::bytes(stats.castore.index_bytes),
        String::new(),
    );
    line("  database", ui::bytes(stats.database_bytes), String::new());
    cx.ui.print(out)
}
