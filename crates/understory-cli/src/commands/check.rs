//! `check`: looks for damage, names the store paths that it hurts, and makes derived files anew.

use super::gc::content_json;
use crate::context::Context;
use crate::error::{Code, CommandError, Result};
use crate::progress::{Done, Progress};
use crate::settings::FileArgs;
use crate::ui;
use std::collections::{BTreeSet, HashMap, HashSet};
use understory::Store;
use understory::daemon::Silent;
use understory::settings::Settings;
use understory::store::{CollectReport, Repaired};
use understory_castore::{Castore, CastoreError, Digest, Node};
use understory_nix::hash::CountingHasher;
use understory_nix::{HashAlgorithm, NarHash, StorePath};

/// Look for damage
///
/// Reads every frame of every pack and verifies checksums and digests, and that every store path is
/// complete. Names the store paths that damage hurts. Exits with 4 if there is any, unless all of it was
/// repaired.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also make the NAR of every path and compare its hash and size
    #[arg(long)]
    contents: bool,
    /// First drop the index files and make them anew from the packs
    #[arg(long)]
    rebuild_index: bool,
    /// Fetch damaged paths again from this binary cache, daemon or local store, and store what is damaged; may be
    /// given several times
    #[arg(long, value_name = "URL")]
    repair_from: Vec<String>,
    #[command(flatten)]
    files: FileArgs,
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
    let store = if args.repair_from.is_empty() {
        cx.open()?
    } else {
        cx.open_to_write()?
    };
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
    let mut hurt = BTreeSet::new();
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
                hurt.insert(row.info.path.clone());
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
    let repair = if findings.is_empty() || args.repair_from.is_empty() {
        None
    } else {
        hurt.append(&mut store.hurt_paths()?);
        Some(repair(args, &store, &hurt)?)
    };
    report(cx, &store, &findings, (paths, bytes, time), repair.as_ref())
}

/// What a repair came to.
struct Repair {
    paths: Repaired,
    /// The damaged packs were written anew; or why not.
    packs: std::result::Result<CollectReport, String>,
}

impl Repair {
    /// True if nothing is damaged any more.
    fn is_complete(&self) -> bool {
        self.paths.failed.is_empty()
            && self.packs.as_ref().is_ok_and(|packs| {
                packs.missing_pieces == 0
                    && packs.kept_damaged.packs + packs.kept_leased.packs + packs.kept_open.packs
                        == 0
            })
    }
}

fn repair(args: &Args, store: &Store, hurt: &BTreeSet<StorePath>) -> Result<Repair> {
    let settings = Settings {
        substituters: args.repair_from.clone(),
        ..args.files.resolve()?.settings
    };
    // Damaged indexes are made anew from the frames, sound ones as well: that costs little here.
    store.castore().rebuild_index()?;
    let paths = store.repair(hurt, &settings, &Silent)?;
    let packs = store
        .drop_damaged(&mut |_| Ok(()))
        .map_err(|error| error.chain());
    Ok(Repair { paths, packs })
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
    let mut sink = CountingHasher::new(HashAlgorithm::Sha256);
    if let Err(error) = understory::nar::write_nar(store.castore(), &row.root, &mut sink) {
        return match error.kind() {
            understory::error::ErrorKind::Corrupt => Ok(Some(error.chain())),
            _ => Err(error.into()),
        };
    }
    let (hash, bytes) = sink.finish();
    let found = NarHash::try_from(hash)?;
    if found == row.info.nar_hash && bytes == row.info.nar_size {
        return Ok(None);
    }
    Ok(Some(format!(
        "expected NAR {} of {} bytes, found {found} of {bytes} bytes",
        row.info.nar_hash, row.info.nar_size
    )))
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
    store: &Store,
    findings: &[Finding],
    (paths, bytes, time): (u64, u64, std::time::Duration),
    repair: Option<&Repair>,
) -> Result<()> {
    let print = |path: &StorePath| store.store_dir().print(path);
    if cx.json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| serde_json::json!({"what": f.what, "reason": f.reason, "paths": f.paths}))
            .collect();
        let mut value = serde_json::json!({"paths": paths, "narBytes": bytes, "findings": list});
        if let Some(repair) = repair {
            let failed: serde_json::Map<_, _> = repair
                .paths
                .failed
                .iter()
                .map(|(path, error)| (print(path), error.chain().into()))
                .collect();
            let repaired: Vec<_> = repair.paths.repaired.iter().map(print).collect();
            value["repair"] = serde_json::json!({
                "repaired": repaired,
                "failed": failed,
                "content": repair.packs.as_ref().ok().map(content_json),
                "complete": repair.is_complete(),
            });
        }
        cx.ui.print_json(&value)?;
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
    if let Some(repair) = repair {
        for (path, error) in &repair.paths.failed {
            cx.ui.warn(format_args!(
                "{} is damaged still: {}",
                print(path),
                error.chain()
            ));
        }
        match &repair.packs {
            Ok(packs) => cx.ui.say(format_args!(
                "{} findings; {} paths were fetched again and are right, {} are not; {} damaged packs written anew",
                ui::count(findings.len() as u64),
                ui::count(repair.paths.repaired.len() as u64),
                ui::count(repair.paths.failed.len() as u64),
                ui::count(packs.packs_deleted),
            )),
            Err(error) => cx
                .ui
                .warn(format_args!("the damaged packs stay as they are: {error}")),
        }
        if repair.is_complete() {
            return Ok(());
        }
        return Err(CommandError::new(
            Code::Corrupt,
            format!(
                "{} of {} paths are damaged still",
                repair.paths.failed.len(),
                ui::count(paths)
            ),
        )
        .hint("name another source, or delete damaged paths with `understory delete`"));
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
    .hint(
        "`understory check --repair-from URL` fetches them again; or delete damaged paths with \
         `understory delete` and import them again",
    ))
}
