//! A Nix store on this machine: its database, read-only, and the files in its store directory.
//!
//! Paths come in reference order by a depth-first walk over row numbers; what is to be done is a set
//! of row numbers, everything else is read when its turn comes.

mod database;

use super::id_set::IdSet;
use super::pipeline::{Content, Job, Plan, Run, Step};
use super::source::decode;
use super::{Selection, is_set};
use crate::store::Realisation;
use crate::{Error, Result, Store};
use database::{Database, Row};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use understory_nix::{StoreDir, StorePath};

/// Rows that are looked up together.
const CHUNK_ROWS: usize = 4096;

/// A Nix store on this machine.
#[derive(Debug, Clone)]
pub struct LocalSource {
    /// Where its paths really lie.
    pub real: PathBuf,
    /// Its state directory, which holds `db/db.sqlite`.
    pub state: PathBuf,
    /// Its store directory, if it was named; otherwise its database tells.
    pub store_dir: Option<StoreDir>,
}

impl LocalSource {
    /// The store whose root directory is `root`.
    pub fn at_root(root: &Path) -> Self {
        Self {
            real: root.join("nix/store"),
            state: root.join("nix/var/nix"),
            store_dir: None,
        }
    }

    /// Reads the parameters of a `local` store URL, with Nix's defaults.
    pub(super) fn from_query(root: Option<OsString>, query: &str) -> Result<Self> {
        let (mut root, mut real, mut state, mut store) = (root, None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = Some(decode(value)?).filter(|value| !value.is_empty());
            match key {
                "root" => root = value,
                "real" => real = value,
                "state" => state = value,
                "store" => store = value,
                // Settings of Nix that say nothing about where things are.
                "log"
                | "trusted"
                | "read-only"
                | "require-sigs"
                | "priority"
                | "want-mass-query"
                | "path-info-cache-size"
                | "system-features"
                | "build-dir" => {}
                other => {
                    return Err(Error::user(format!(
                        "unknown parameter `{other}` of a local store"
                    )));
                }
            }
        }
        let store_dir = match store {
            Some(dir) => Some(StoreDir::new(&dir.to_string_lossy())?),
            None => None,
        };
        let root = root.map(PathBuf::from);
        let default_real = match (&root, &store_dir) {
            (Some(root), _) => root.join("nix/store"),
            (None, Some(dir)) => PathBuf::from(dir.as_str()),
            (None, None) => PathBuf::from("/nix/store"),
        };
        let default_state = root
            .as_deref()
            .unwrap_or(Path::new("/"))
            .join("nix/var/nix");
        Ok(Self {
            real: real.map_or(default_real, PathBuf::from),
            state: state.map_or(default_state, PathBuf::from),
            store_dir,
        })
    }

    /// Its database.
    pub fn database(&self) -> PathBuf {
        self.state.join("db/db.sqlite")
    }

    pub(super) fn import(&self, selection: &Selection, run: &mut Run<'_>) -> Result<()> {
        let database = Database::open(&self.database())?;
        self.check_store_dir(&database, run.store.store_dir())?;
        let mut plan = LocalPlan::new(self, &database, run.store);
        plan.select(selection, run)?;
        run.drive(&mut plan)?;
        plan.realisations(run)
    }

    /// Refuses another store directory, if the source was given with one.
    pub(super) fn check_named_store_dir(&self, ours: &StoreDir) -> Result<()> {
        match &self.store_dir {
            Some(found) if found != ours => {
                Err(other_store_dir("the source", found.as_str(), ours))
            }
            _ => Ok(()),
        }
    }

    fn check_store_dir(&self, database: &Database, ours: &StoreDir) -> Result<()> {
        self.check_named_store_dir(ours)?;
        let path = database.any_path()?;
        match path.as_ref().and_then(|path| path.rsplit_once('/')) {
            Some((found, _)) if found != ours.as_str() => {
                let origin = format!("the store of {}", database.path().display());
                Err(other_store_dir(&origin, found, ours))
            }
            _ => Ok(()),
        }
    }
}

fn other_store_dir(origin: &str, found: &str, ours: &StoreDir) -> Error {
    Error::user(format!(
        "{origin} has store directory '{found}', expected '{ours}'"
    ))
    .with_hint(other_store_dir_hint(found))
}

/// What to do about a source of another store directory.
pub(super) fn other_store_dir_hint(found: &str) -> String {
    format!(
        "paths are valid in their own store directory only: import into a store that was made for {found}"
    )
}

/// The walk.
struct LocalPlan<'a> {
    source: &'a LocalSource,
    database: &'a Database,
    store_dir: &'a StoreDir,
    /// What was selected, valid or not.
    selected: IdSet,
    /// Of these, what is not valid here yet.
    todo: IdSet,
    todo_bytes: u64,
    /// Where the walk starts next.
    next_start: i64,
    /// What the walk has come to.
    entered: IdSet,
    /// The row that the walk is at and those above it, each with references still to be looked at.
    stack: Vec<(i64, Vec<i64>)>,
}

impl<'a> LocalPlan<'a> {
    fn new(source: &'a LocalSource, database: &'a Database, store: &'a Store) -> Self {
        Self {
            source,
            database,
            store_dir: store.store_dir(),
            selected: IdSet::default(),
            todo: IdSet::default(),
            todo_bytes: 0,
            next_start: i64::MIN,
            entered: IdSet::default(),
            stack: Vec::new(),
        }
    }

    /// Finds what is selected and which of it is not valid here yet.
    fn select(&mut self, selection: &Selection, run: &mut Run<'_>) -> Result<()> {
        let _snapshot = self.database.snapshot()?;
        match selection {
            Selection::All => {
                let mut after = i64::MIN;
                loop {
                    let chunk = self.database.rows_after(after, CHUNK_ROWS)?;
                    let Some(last) = chunk.last() else { break };
                    after = last.id;
                    for row in &chunk {
                        self.selected.insert(row.id);
                    }
                    self.sift(chunk, run)?;
                    if is_set(run.cancel) {
                        break;
                    }
                }
            }
            Selection::Paths { paths, closure } => {
                let mut open = Vec::new();
                for path in paths {
                    let text = self.store_dir.print(path);
                    let id = self.database.id_of(&text)?.ok_or_else(|| {
                        Error::user(format!(
                            "path '{text}' is not valid in the store of {}",
                            self.database.path().display()
                        ))
                    })?;
                    if self.selected.insert(id) {
                        open.push(id);
                    }
                }
                let mut chunk = Vec::new();
                while let Some(id) = open.pop() {
                    if *closure {
                        for reference in self.database.references(id)? {
                            if self.selected.insert(reference) {
                                open.push(reference);
                            }
                        }
                    }
                    chunk.extend(self.database.brief_row(id)?);
                    if chunk.len() == CHUNK_ROWS || open.is_empty() {
                        self.sift(std::mem::take(&mut chunk), run)?;
                        if is_set(run.cancel) {
                            break;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes what is not valid here into `todo`.
    fn sift(&mut self, rows: Vec<database::BriefRow>, run: &mut Run<'_>) -> Result<()> {
        let paths: Vec<StorePath> = rows
            .iter()
            .filter_map(|row| self.store_dir.parse(row.path.as_bytes()).ok())
            .collect();
        let valid = run.store.valid_paths(&paths)?;
        run.skip(valid.len() as u64);
        let mut valid = valid.iter().map(StorePath::base_name).peekable();
        for row in rows {
            // Both are in the same order. What is no store path fails when its turn comes.
            let is_valid = valid
                .peek()
                .is_some_and(|name| row.path.rsplit('/').next() == Some(*name));
            if is_valid {
                valid.next();
            } else if self.todo.insert(row.id) {
                self.todo_bytes += row.nar_size.unwrap_or(0);
            }
        }
        run.planned(self.planned());
        Ok(())
    }

    /// Goes on with the walk; the next row whose references have all come before it.
    fn walk(&mut self) -> Result<Option<i64>> {
        loop {
            let Some((id, references)) = self.stack.last_mut() else {
                let Some(start) = self.todo.next(self.next_start) else {
                    return Ok(None);
                };
                self.next_start = start.saturating_add(1);
                if self.entered.insert(start) {
                    self.stack.push((start, self.database.references(start)?));
                }
                if start == i64::MAX {
                    return Ok(None);
                }
                continue;
            };
            match references.pop() {
                Some(reference) => {
                    if self.todo.contains(reference) && self.entered.insert(reference) {
                        let next = self.database.references(reference)?;
                        self.stack.push((reference, next));
                    }
                }
                None => {
                    let id = *id;
                    self.stack.pop();
                    return Ok(Some(id));
                }
            }
        }
    }

    fn job(&self, row: Row) -> Result<Job> {
        let base_name = row.path.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(Job {
            info: row.into_path_info(self.store_dir)?,
            content: Content::Disk(self.source.real.join(base_name)),
        })
    }

    /// Imports the realisations whose outputs are selected and valid here.
    fn realisations(&self, run: &mut Run<'_>) -> Result<()> {
        let store = run.store;
        let ours = |path: &str| match self.store_dir.parse(path.as_bytes()) {
            Ok(path) => Ok(store.is_valid(&path)?.then_some(path)),
            Err(error) => {
                tracing::warn!(%error, "output path of a realisation");
                Ok::<_, Error>(None)
            }
        };
        self.database.for_each_realisation(|row| {
            if run.is_cancelled() {
                return Ok(());
            }
            let Some(id) = self.database.id_of(&row.out_path)? else {
                return Ok(());
            };
            if !self.selected.contains(id) {
                return Ok(());
            }
            let Some(out_path) = ours(&row.out_path)? else {
                return Ok(());
            };
            run.add_realisation(&Realisation {
                id: row.id,
                out_path,
                signatures: row.signatures,
            })
        })
    }
}

impl Plan for LocalPlan<'_> {
    fn next(&mut self) -> Result<Step> {
        let Some(id) = self.walk()? else {
            return Ok(Step::End);
        };
        let Some(row) = self.database.row(id)? else {
            // Deleted since it was selected.
            return Ok(Step::Failed {
                path: None,
                error: Error::user(format!(
                    "row {id} of {} was deleted during the import",
                    self.database.path().display()
                )),
            });
        };
        let text = row.path.clone();
        match self.job(row) {
            Ok(job) => Ok(Step::Job(Box::new(job))),
            Err(error) => Ok(Step::Failed {
                path: self.store_dir.parse(text.as_bytes()).ok(),
                error: Error::new(error.kind(), text.clone()).with_source(error.chain()),
            }),
        }
    }

    fn planned(&self) -> (u64, u64) {
        (self.todo.len(), self.todo_bytes)
    }
}
