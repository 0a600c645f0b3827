//! `check`: looks for damage, names the store paths that it hurts, and makes derived files anew.

use crate::context::Context;
use crate::error::{Code, CommandError, Result};
use crate::progress::{Done, Progress};
use crate::ui;
use std::collections::{HashMap, HashSet};
use understory::Store;
use understory_castore::{Castore, CastoreError, Digest, Node};
use understory_nix::hash::Hasher;
use understory_nix::{HashAlgorithm, NarHash};

/// Look for damage
///
/// Reads every frame of every pack and verifies checksums and digests, and that every store path is
/// complete. Names the store paths that damage hurts. Exits with 4 if there is any.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also make the NAR of every path and compare its hash and size
    #[arg(long)]
    contents: bool,
    /// First drop the index files and make them anew from the packs
    #[arg(long)]
    rebuild_index: bool,
}

/// Rows fetched at a time.
const BATCH: usize = 1_000;

/// One finding.
struct Finding {
    what: String,
    reason: String,
    paths: Vec<String>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    if args.rebuild_index {
        rebuild_index(cx)?;
    }
    let store = cx.open()?;
    let mut findings = Vec::new();
    let mut damaged = HashSet::new();

    let progress = Progress::new(&cx.ui, "checking packs");
    store.castore().scrub(
        &mut |done, all| {
            progress.update(Done {
                bytes: (done, all),
                ..Done::default()
            });
        },
        &mut |damage| {
            damaged.extend(damage.lost);
            findings.push(Finding {
                what: damage.what,
                reason: damage.reason,
                paths: Vec::new(),
            });
        },
    )?;
    progress.finish();

    let progress = Progress::new(&cx.ui, "checking paths");
    let mut trees = TreeCheck {
        castore: store.castore(),
        known: HashMap::new(),
        thorough: !findings.is_empty(),
    };
    let total = store.stats()?.paths;
    let (mut after, mut paths, mut bytes) = (0, 0, 0);
    loop {
        let rows = store.list(after, BATCH)?;
        let Some(last) = rows.last() else { break };
        after = last.id;
        for row in &rows {
            let full = store.store_dir().print(&row.info.path);
            let broken = match trees.node(&row.root)? {
                Some(reason) => Some(reason),
                None if args.contents => wrong_nar(&store, row)?,
                None => None,
            };
            if let Some(reason) = broken {
                findings.push(Finding {
                    what: full.clone(),
                    reason,
                    paths: vec![full],
                });
            }
            paths += 1;
            bytes += row.info.nar_size;
            progress.update(Done {
                paths: (paths, total),
                bytes: (bytes, 0),
                new_bytes: 0,
            });
        }
    }
    let time = progress.finish();
    report(cx, &findings, paths, bytes, time)
}

fn rebuild_index(cx: &Context) -> Result<()> {
    let dir = cx.store_path()?.join("castore");
    // The castore alone: the store may refuse to open with a damaged index.
    let castore = Castore::open(&dir, &understory_castore::OpenOptions::default())?;
    castore.rebuild_index()?;
    cx.ui.say("the index was made anew from the packs");
    Ok(())
}

/// Compares the NAR of a path with its path info.
fn wrong_nar(store: &Store, row: &understory::store::StoredPath) -> Result<Option<String>> {
    let mut sink = Counting {
        hasher: Hasher::new(HashAlgorithm::Sha256),
        bytes: 0,
    };
    if let Err(error) = understory::nar::write_nar(store.castore(), &row.root, &mut sink) {
        return match error.kind() {
            understory::error::ErrorKind::Corrupt => Ok(Some(error.chain())),
            _ => Err(error.into()),
        };
    }
    let found = NarHash::try_from(sink.hasher.finish())?;
    if found == row.info.nar_hash && sink.bytes == row.info.nar_size {
        return Ok(None);
    }
    Ok(Some(format!(
        "expected NAR {} of {} bytes, found {found} of {} bytes",
        row.info.nar_hash, row.info.nar_size, sink.bytes
    )))
}

struct Counting {
    hasher: Hasher,
    bytes: u64,
}
impl std::io::Write for Counting {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.hasher.update(data);
        self.bytes += data.len() as u64;
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Walks trees, each directory and blob once, and remembers what is wrong with it.
struct TreeCheck<'a> {
    castore: &'a Castore,
    known: HashMap<Digest, Option<String>>,
    /// After damage was found in packs, blobs are read whole: which pieces a blob needs shows only so.
    thorough: bool,
}

impl TreeCheck<'_> {
    fn node(&mut self, node: &Node) -> Result<Option<String>> {
        let (Node::Directory { digest, .. } | Node::File { digest, .. }) = node else {
            return Ok(None);
        };
        if let Some(known) = self.known.get(digest) {
            return Ok(known.clone());
        }
        let found = match node {
            Node::File { digest, size, .. } if self.thorough => {
                damage(self.castore.verify_blob(digest, *size), "file")?.err()
            }
            Node::File { digest, size, .. } => {
                damage(self.castore.blob(digest, *size), "file")?.err()
            }
            _ => match damage(self.castore.directory(digest), "directory")? {
                Err(reason) => Some(reason),
                Ok(directory) => {
                    let mut first = None;
                    for entry in directory.entries() {
                        if let Some(reason) = self.node(&entry.node)? {
                            first = Some(format!(
                                "{}: {reason}",
                                String::from_utf8_lossy(&entry.name)
                            ));
                            break;
                        }
                    }
                    first
                }
            },
        };
        self.known.insert(*digest, found.clone());
        Ok(found)
    }
}

/// Sorts damage (inner error) from other trouble (outer error).
fn damage<T>(result: Result<T, CastoreError>, kind: &str) -> Result<Result<T, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error @ (CastoreError::Corrupt { .. } | CastoreError::Missing { .. })) => {
            Ok(Err(format!("{kind}: {error}")))
        }
        Err(error) => Err(error.into()),
    }
}

fn report(
    cx: &Context,
    findings: &[Finding],
    paths: u64,
    bytes: u64,
    time: std::time::Duration,
) -> Result<()> {
    if cx.json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| serde_json::json!({"what": f.what, "reason": f.reason, "paths": f.paths}))
            .collect();
        cx.ui.print_json(
            &serde_json::json!({"paths": paths, "narBytes": bytes, "findings": list}),
        )?;
    } else {
        for finding in findings {
            cx.ui
                .print(format!("{}: {}\n", finding.what, finding.reason))?;
        }
    }
    if findings.is_empty() {
        cx.ui.say(format_args!(
            "{} paths, {} of NARs: no damage found ({:.1} s)",
            ui::count(paths),
            ui::bytes(bytes),
            time.as_secs_f64()
        ));
        return Ok(());
    }
    let hurt = findings
        .iter()
        .flat_map(|f| &f.paths)
        .collect::<HashSet<_>>()
        .len();
    Err(CommandError::new(
        Code::Corrupt,
        format!(
            "{} findings; {} of {} paths are damaged",
            findings.len(),
            hurt,
            ui::count(paths)
        ),
    )
    .hint("delete damaged paths with `understory delete` and import them again"))
}
