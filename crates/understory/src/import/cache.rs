//! A binary cache in a directory: `nix-cache-info`, `*.narinfo`, and the NAR files that they name.
//!
//! Paths come in reference order by a depth-first walk over narinfos, each read once. A path that is
//! valid here is not followed: its closure is valid too.

use super::local::other_store_dir_hint;
use super::pipeline::{Content, Job, Plan, Run, Step};
use super::{Selection, is_set};
use crate::store::Realisation;
use crate::{Error, Result, Store};
use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{ErrorKind as IoErrorKind, Read};
use std::path::{Component, Path, PathBuf};
use understory_nix::narinfo::{CacheInfo, NARINFO_BYTES_MAX, NarInfo};
use understory_nix::store_path::StorePathHash;
use understory_nix::{StoreDir, StorePath};

/// Longest `nix-cache-info` and realisation that is read: they have a few lines.
const SMALL_FILE_BYTES_MAX: usize = 64 << 10;

/// A binary cache in a directory.
#[derive(Debug, Clone)]
pub struct CacheSource {
    dir: PathBuf,
}

impl CacheSource {
    /// The binary cache in `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn import(&self, selection: &Selection, run: &mut Run<'_>) -> Result<()> {
        self.check_store_dir(run.store.store_dir())?;
        let mut plan = CachePlan::new(&self.dir, run.store);
        plan.select(selection, run)?;
        run.drive(&mut plan)?;
        plan.realisations(selection, run)
    }

    /// Refuses what is no binary cache, or one of another store directory.
    pub(super) fn check_store_dir(&self, ours: &StoreDir) -> Result<()> {
        let file = self.dir.join("nix-cache-info");
        let text = match read_text(&file, SMALL_FILE_BYTES_MAX)? {
            Some(text) => text,
            None => {
                return Err(Error::user(format!(
                    "{} does not appear to be a binary cache: it has no nix-cache-info",
                    self.dir.display()
                )));
            }
        };
        let info = CacheInfo::parse(&file.display().to_string(), &text)
            .map_err(|e| Error::corrupt(e.to_string()))?;
        match info.store_dir {
            Some(found) if found != *ours => Err(Error::user(format!(
                "binary cache {} is for stores with prefix '{found}', expected '{ours}'",
                self.dir.display()
            ))
            .with_hint(other_store_dir_hint(found.as_str()))),
            _ => Ok(()),
        }
    }
}

fn is_all(selection: &Selection) -> bool {
    matches!(selection, Selection::All)
}

/// The walk.
struct CachePlan<'a> {
    dir: &'a Path,
    store: &'a Store,
    store_dir: &'a StoreDir,
    /// Where the walk starts, last first.
    starts: Vec<StorePathHash>,
    /// References are followed.
    follows: bool,
    /// What the walk has come to.
    entered: HashSet<StorePathHash>,
    /// The narinfo that the walk is at and those above it, each with references still to be looked at.
    stack: Vec<(Box<NarInfo>, Vec<StorePath>)>,
    planned_paths: u64,
    planned_bytes: u64,
    skipped: u64,
    /// All there is was counted before the walk.
    counted: bool,
}

impl<'a> CachePlan<'a> {
    fn new(dir: &'a Path, store: &'a Store) -> Self {
        Self {
            dir,
            store,
            store_dir: store.store_dir(),
            starts: Vec::new(),
            follows: true,
            entered: HashSet::new(),
            stack: Vec::new(),
            planned_paths: 0,
            planned_bytes: 0,
            skipped: 0,
            counted: false,
        }
    }

    fn select(&mut self, selection: &Selection, run: &mut Run<'_>) -> Result<()> {
        match selection {
            Selection::All => {
                let entries =
                    std::fs::read_dir(self.dir).map_err(|e| Error::io("reading", self.dir, e))?;
                for entry in entries {
                    let entry = entry.map_err(|e| Error::io("reading", self.dir, e))?;
                    let name = entry.file_name();
                    let stem = name.to_str().and_then(|name| name.strip_suffix(".narinfo"));
                    let Some(hash) = stem.and_then(|stem| StorePathHash::parse(stem).ok()) else {
                        continue;
                    };
                    if self
                        .store
                        .path_from_hash_part(stem.unwrap_or_default())?
                        .is_some()
                    {
                        run.skip(1);
                    } else {
                        self.starts.push(hash);
                    }
                    if is_set(run.cancel) {
                        break;
                    }
                }
                self.counted = true;
                // Directories list their entries in no order; this one is the same each time.
                self.starts
                    .sort_unstable_by_key(|hash| std::cmp::Reverse(*hash));
            }
            Selection::Paths { paths, closure } => {
                self.follows = *closure;
                let given: Vec<StorePath> = paths.iter().cloned().collect();
                let valid: BTreeSet<StorePath> =
                    run.store.valid_paths(&given)?.into_iter().collect();
                run.skip(valid.len() as u64);
                for path in paths.iter().rev().filter(|path| !valid.contains(*path)) {
                    if !self.narinfo_file(path.hash_part()).exists() {
                        return Err(Error::user(format!(
                            "path '{}' is not in the binary cache {}",
                            self.store_dir.print(path),
                            self.dir.display()
                        )));
                    }
                    self.starts.push(path.hash());
                }
            }
        }
        self.planned_paths = self.starts.len() as u64;
        Ok(())
    }

    fn narinfo_file(&self, hash_part: &str) -> PathBuf {
        self.dir.join(format!("{hash_part}.narinfo"))
    }

    /// Reads a narinfo; `None` if there is none.
    fn narinfo(&self, hash_part: &str) -> Result<Option<NarInfo>> {
        let file = self.narinfo_file(hash_part);
        let Some(text) = read_text(&file, NARINFO_BYTES_MAX)? else {
            return Ok(None);
        };
        let narinfo = NarInfo::parse(self.store_dir, &file.display().to_string(), &text)
            .map_err(|e| Error::corrupt(e.to_string()))?;
        let found = narinfo.info.path.hash_part();
        if found != hash_part {
            return Err(Error::corrupt(format!(
                "{}: expected the hash part {hash_part}, found {found}",
                file.display()
            )));
        }
        Ok(Some(narinfo))
    }

    /// Comes to a path. `wanted` is its name, if a reference gave it.
    fn enter(&mut self, hash: StorePathHash, wanted: Option<&StorePath>) -> Option<Step> {
        let hash_part = hash.to_string();
        let failed = |error: Error| {
            Some(Step::Failed {
                path: wanted.cloned(),
                error,
            })
        };
        let narinfo = match self.narinfo(&hash_part) {
            Ok(Some(narinfo)) => narinfo,
            Ok(None) => {
                let name = match wanted {
                    Some(path) => self.store_dir.print(path),
                    None => hash_part,
                };
                return failed(Error::user(format!(
                    "path '{name}' is not valid here and not in the binary cache {}",
                    self.dir.display()
                )));
            }
            Err(error) => return failed(error),
        };
        if let Some(wanted) = wanted
            && *wanted != narinfo.info.path
        {
            return failed(Error::corrupt(format!(
                "{}: expected '{wanted}', found '{}'",
                self.narinfo_file(&hash_part).display(),
                narinfo.info.path
            )));
        }
        self.planned_bytes += narinfo.info.nar_size;
        let references = if self.follows {
            narinfo.info.references.iter().rev().cloned().collect()
        } else {
            Vec::new()
        };
        self.stack.push((Box::new(narinfo), references));
        None
    }

    fn job(&self, narinfo: NarInfo) -> Result<Job> {
        let file = relative_file(&narinfo.url)
            .map(|relative| self.dir.join(relative))
            .ok_or_else(|| {
                Error::user(format!(
                    "{}: the URL '{}' of its NAR does not lead into the binary cache {}",
                    self.store_dir.print(&narinfo.info.path),
                    narinfo.url,
                    self.dir.display()
                ))
            })?;
        Ok(Job {
            info: narinfo.info,
            content: Content::NarFile {
                file,
                compression: narinfo.compression,
            },
        })
    }

    /// Imports the realisations of Nix up to 2.34 (`realisations/<id>.doi`) and of 2.35 on
    /// (`build-trace-v2/<derivation>/<output>.doi`) whose outputs are valid here and, unless
    /// everything is imported, were looked at.
    fn realisations(&self, selection: &Selection, run: &mut Run<'_>) -> Result<()> {
        let wanted = |path: &StorePath| {
            is_all(selection)
                || self.entered.contains(&path.hash())
                || matches!(selection, Selection::Paths { paths, .. } if paths.contains(path))
        };
        for (file, id) in realisation_files(self.dir)? {
            if run.is_cancelled() {
                break;
            }
            let found = read_text(&file, SMALL_FILE_BYTES_MAX)?;
            let Some(parsed) = found.as_deref().and_then(parse_realisation) else {
                tracing::warn!(file = %file.display(), "not a realisation");
                continue;
            };
            let (out_path, signatures) = parsed;
            if wanted(&out_path) && run.store.is_valid(&out_path)? {
                run.add_realisation(&Realisation {
                    id,
                    out_path,
                    signatures,
                })?;
            }
        }
        Ok(())
    }
}

impl Plan for CachePlan<'_> {
    fn next(&mut self) -> Result<Step> {
        loop {
            if let Some((_, references)) = self.stack.last_mut() {
                if let Some(reference) = references.pop() {
                    let hash = reference.hash();
                    if self.entered.contains(&hash) {
                        continue;
                    }
                    self.entered.insert(hash);
                    // With everything selected, what is there was counted at the start.
                    if self.store.is_valid(&reference)? {
                        self.skipped += u64::from(!self.counted);
                        continue;
                    }
                    self.planned_paths += u64::from(!self.counted);
                    if let Some(step) = self.enter(hash, Some(&reference)) {
                        return Ok(step);
                    }
                    continue;
                }
                let Some((narinfo, _)) = self.stack.pop() else {
                    continue;
                };
                let path = narinfo.info.path.clone();
                return Ok(match self.job(*narinfo) {
                    Ok(job) => Step::Job(Box::new(job)),
                    Err(error) => Step::Failed {
                        path: Some(path),
                        error,
                    },
                });
            }
            let Some(start) = self.starts.pop() else {
                return Ok(Step::End);
            };
            if self.entered.insert(start)
                && let Some(step) = self.enter(start, None)
            {
                return Ok(step);
            }
        }
    }

    fn planned(&self) -> (u64, u64) {
        (self.planned_paths, self.planned_bytes)
    }

    fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }
}

/// The URL of a NAR as a path below the cache; `None` if it leads elsewhere.
fn relative_file(url: &str) -> Option<&Path> {
    let path = Path::new(url);
    let is_plain = !url.contains("://")
        && path
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
    is_plain.then_some(path)
}

/// Reads a file of text; `None` if there is none.
fn read_text(file: &Path, bytes_max: usize) -> Result<Option<String>> {
    let open = match File::open(file) {
        Ok(open) => open,
        Err(e) if e.kind() == IoErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("opening", file, e)),
    };
    let mut bytes = Vec::new();
    open.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io("reading", file, e))?;
    if bytes.len() > bytes_max {
        return Err(Error::corrupt(format!(
            "{}: expected at most {bytes_max} bytes",
            file.display()
        )));
    }
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::corrupt(format!("{} is not UTF-8", file.display())).with_source(e))?;
    Ok(Some(text))
}

/// Files of realisations, and the realisations' ids.
fn realisation_files(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut out = Vec::new();
    for file in list(&dir.join("realisations"))? {
        if let Some(id) = doi_stem(&file) {
            out.push((file.clone(), id.to_owned()));
        }
    }
    for derivation in list(&dir.join("build-trace-v2"))? {
        let Some(drv) = derivation.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        for file in list(&derivation)? {
            if let Some(output) = doi_stem(&file) {
                out.push((file.clone(), format!("{drv}!{output}")));
            }
        }
    }
    Ok(out)
}

fn doi_stem(file: &Path) -> Option<&str> {
    file.file_name()?.to_str()?.strip_suffix(".doi")
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), IoErrorKind::NotFound | IoErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(Error::io("reading", dir, e)),
    };
    let mut out = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(|e| Error::io("reading", dir, e))?;
    out.sort_unstable();
    Ok(out)
}

/// The output path and the signatures, which are texts or objects of `keyName` and `sig`.
pub(crate) fn parse_realisation(text: &str) -> Option<(StorePath, BTreeSet<String>)> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let out_path = StorePath::from_base_name(value.get("outPath")?.as_str()?).ok()?;
    let mut signatures = BTreeSet::new();
    for signature in value
        .get("signatures")
        .and_then(|s| s.as_array())
        .into_iter()
        .flatten()
    {
        let text = match signature.as_str() {
            Some(text) => text.to_owned(),
            None => format!(
                "{}:{}",
                signature.get("keyName")?.as_str()?,
                signature.get("sig")?.as_str()?
            ),
        };
        signatures.insert(text);
    }
    Some((out_path, signatures))
}
