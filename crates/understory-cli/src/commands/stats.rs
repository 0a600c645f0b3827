//! `stats`: counts and measures the store, and says by what each byte was saved.

mod analysis;
mod chart;

use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::plot::Format;
use crate::progress::{Done, Progress};
use crate::ui::{self, Style};
use analysis::{Analysis, analyse};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use understory::Store;
use understory_castore::{Castore, Digest, Node};

/// Count and measure the store
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what the database and the castore know at once: do not walk the trees
    #[arg(long, conflicts_with = "plot")]
    quick: bool,
    /// Draw where the bytes go into FILE, which ends in .svg or .png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
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

/// An analysis and the sizes around it.
pub(crate) struct Figures {
    store: String,
    paths: u64,
    /// Packs, merged index and database.
    disk_bytes: u64,
    index_bytes: u64,
    database_bytes: u64,
    analysis: Analysis,
}

/// By what bytes were saved, one after the other.
struct Steps {
    apparent: u64,
    file_duplicates: u64,
    masked_duplicates: u64,
    chunk_duplicates: u64,
    compression: u64,
    /// Everything on disk that is no content.
    overhead: u64,
}

impl Figures {
    fn steps(&self) -> Steps {
        let analysis = &self.analysis;
        let data = &analysis.kinds.data;
        let unique = analysis.unique_bytes;
        let masked = analysis.masked_duplicate_bytes.min(unique);
        let rest = unique - masked;
        // A store may hold more than its paths need; then nothing is left to ascribe to chunks.
        let chunks = rest.saturating_sub(data.raw_bytes);
        let cut = rest - chunks;
        Steps {
            apparent: analysis.trees.bytes,
            file_duplicates: analysis.trees.bytes.saturating_sub(unique),
            masked_duplicates: masked,
            chunk_duplicates: chunks,
            compression: cut.saturating_sub(data.stored_bytes),
            overhead: self.disk_bytes.saturating_sub(data.stored_bytes.min(cut)),
        }
    }
    /// What of the packs is in no frame that an index knows.
    fn rest_bytes(&self) -> u64 {
        let kinds = &self.analysis.kinds;
        let frames = [kinds.data, kinds.directories, kinds.recipes, kinds.patches];
        let frames: u64 = frames.iter().map(|kind| kind.stored_bytes).sum();
        self.disk_bytes
            .saturating_sub(self.index_bytes + self.database_bytes + frames)
    }
    fn json(&self) -> serde_json::Value {
        let analysis = &self.analysis;
        let steps = self.steps();
        let kind = |kind: &understory_castore::breakdown::KindBytes| {
            serde_json::json!({
                "pieces": kind.pieces,
                "rawBytes": kind.raw_bytes,
                "storedBytes": kind.stored_bytes,
            })
        };
        let classes = analysis.classes.iter().map(|(name, class)| {
            serde_json::json!({
                "class": name,
                "files": class.files,
                "bytes": class.bytes,
                "uniqueBytes": class.unique_bytes,
            })
        });
        let growth = analysis.growth.iter().map(|point| {
            serde_json::json!({
                "paths": point.paths,
                "registered": point.registered,
                "bytes": point.bytes,
                "uniqueBytes": point.unique_bytes,
            })
        });
        let closures = analysis.closures.as_ref().map(|closures| {
            let named = closures.iter();
            let named =
                named.map(|(name, bytes)| serde_json::json!({"path": name, "narBytes": bytes}));
            named.collect::<Vec<_>>()
        });
        serde_json::json!({
            "saved": {
                "fileDuplicateBytes": steps.file_duplicates,
                "maskedDuplicateBytes": steps.masked_duplicates,
                "chunkDuplicateBytes": steps.chunk_duplicates,
                "compressionBytes": steps.compression,
                "overheadBytes": steps.overhead,
            },
            "kinds": {
                "data": kind(&analysis.kinds.data),
                "directories": kind(&analysis.kinds.directories),
                "recipes": kind(&analysis.kinds.recipes),
                "patches": kind(&analysis.kinds.patches),
            },
            "classes": classes.collect::<Vec<_>>(),
            "largestClosures": closures,
            "growth": growth.collect::<Vec<_>>(),
            "isEstimate": analysis.is_estimate,
        })
    }
}

/// Analyses the store and shows how far it is.
fn analyse_shown(store: &Store, cx: &Context) -> Result<Analysis> {
    let progress = Progress::new(&cx.ui, "analysing");
    let analysis = analyse(store, &mut |done, all, bytes| {
        progress.update(Done {
            paths: (done, all),
            bytes: (bytes, 0),
            ..Done::default()
        });
    });
    progress.finish();
    analysis
}

fn plot(figures: &Figures, format: Format, file: &Path) -> Result<()> {
    let bytes = chart::draw(figures)
        .encode(format)
        .map_err(|e| CommandError::failed(format!("drawing {}: {e}", file.display())))?;
    std::fs::write(file, bytes).map_err(|e| CommandError::io("writing", file.display(), &e))
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let plotted = match &args.plot {
        None => None,
        Some(file) => {
            let format = Format::of(file).ok_or_else(|| {
                CommandError::usage(format!(
                    "{}: expected a name that ends in .svg or .png",
                    file.display()
                ))
            })?;
            Some((format, file))
        }
    };
    let store = cx.open()?;
    let stats = store.stats()?;
    let disk = stats.castore.disk_bytes + stats.database_bytes;
    let figures = if args.quick || plotted.is_none() && !cx.json {
        None
    } else {
        Some(Figures {
            store: store.dir().display().to_string(),
            paths: stats.paths,
            disk_bytes: disk,
            index_bytes: stats.castore.index_bytes,
            database_bytes: stats.database_bytes,
            analysis: analyse_shown(&store, cx)?,
        })
    };
    if let (Some((format, file)), Some(figures)) = (plotted, &figures) {
        plot(figures, format, file)?;
        cx.ui.say(format_args!("drew {}", file.display()));
        if !cx.json {
            return Ok(());
        }
    }
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
        if let (Some(figures), Some(map)) = (&figures, value.as_object_mut()) {
            let (analysis, sum) = (&figures.analysis, figures.analysis.trees);
            map.insert("files".into(), sum.files.into());
            map.insert("directories".into(), sum.directories.into());
            map.insert("symlinks".into(), sum.symlinks.into());
            map.insert("apparentBytes".into(), sum.bytes.into());
            map.insert("uniqueFiles".into(), analysis.unique_files.into());
            map.insert("uniqueBytes".into(), analysis.unique_bytes.into());
            if let serde_json::Value::Object(more) = figures.json() {
                map.extend(more);
            }
        }
        return cx.ui.print_json(&value);
    }
    let trees = if args.quick {
        None
    } else {
        Some(walk(&store)?)
    };
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
