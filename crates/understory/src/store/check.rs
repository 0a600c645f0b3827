//! Checks that what the database says is there and whole, and names the store paths that are not.

use super::db::ROWS_AFTER;
use super::{Store, StoredPath};
use crate::nar::{HashRequest, hash_node};
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use understory_castore::{Digest, Node};
use understory_nix::StorePath;

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckFinding {
    /// What is wrong, where, expected and found.
    pub message: String,
    /// Store paths that it hurts; empty if it is the database or content that no path uses.
    pub paths: Vec<StorePath>,
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckProgress {
    /// Paths looked at, of all.
    Paths {
        /// Looked at.
        done: u64,
        /// All.
        total: u64,
    },
    /// Bytes of packs read, of all.
    Packs {
        /// Read.
        done: u64,
        /// All.
        total: u64,
    },
}

/// What a check saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Paths looked at.
    pub paths: u64,
    /// Of these, paths that are hurt.
    pub paths_hurt: u64,
    /// Findings.
    pub findings: u64,
}

/// Rows read at once.
const ROWS_MAX: usize = 1000;

impl Store {
    /// Checks the database (SQLite's own check, references), that each path's tree is complete, and
    /// with `contents` every byte: packs, pieces, and each path's NAR hash. `finding` gets what is
    /// wrong; the check goes on.
    ///
    /// # Errors
    /// I/O, cancelled; damage is told to `finding`.
    pub fn check(
        &self,
        contents: bool,
        progress: &mut dyn FnMut(CheckProgress),
        finding: &mut dyn FnMut(CheckFinding),
        cancel: &AtomicBool,
    ) -> Result<CheckReport> {
        let mut check = Check {
            store: self,
            contents,
            finding,
            report: CheckReport::default(),
            whole: HashSet::new(),
        };
        check.database()?;
        let lost = if contents {
            check.packs(progress, cancel)?
        } else {
            Lost::default()
        };
        check.paths(&lost, progress, cancel)?;
        Ok(check.report)
    }
}

/// What the scrub found.
#[derive(Default)]
struct Lost {
    messages: Vec<String>,
    /// Which damages, by their number, a piece is lost with.
    damage_of: HashMap<Digest, Vec<usize>>,
}

struct Check<'a> {
    store: &'a Store,
    contents: bool,
    finding: &'a mut dyn FnMut(CheckFinding),
    report: CheckReport,
    /// Directories that were found whole, with all below: equal ones are looked at once.
    whole: HashSet<Digest>,
}

impl Check<'_> {
    fn tell(&mut self, message: String, paths: Vec<StorePath>) {
        self.report.findings += 1;
        (self.finding)(CheckFinding { message, paths });
    }

    fn database(&mut self) -> Result<()> {
        let contents = self.contents;
        let messages = self.store.db().read(|connection| {
            // The full check also compares every index with its table.
            let pragma = if contents {
                "pragma integrity_check"
            } else {
                "pragma quick_check"
            };
            let mut messages = Vec::new();
            let mut statement = connection.prepare(pragma)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let message: String = row.get(0)?;
                if message != "ok" {
                    messages.push(format!("database: {message}"));
                }
            }
            let mut statement = connection.prepare("pragma foreign_key_check")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
                messages.push(format!(
                    "database: a row of {table} refers to a row of {parent} that is not there"
                ));
            }
            Ok(messages)
        });
        match messages {
            Ok(messages) => messages
                .into_iter()
                .for_each(|message| self.tell(message, Vec::new())),
            Err(error) if error.kind() == crate::error::ErrorKind::Corrupt => {
                self.tell(error.chain(), Vec::new());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn packs(
        &mut self,
        progress: &mut dyn FnMut(CheckProgress),
        cancel: &AtomicBool,
    ) -> Result<Lost> {
        let mut lost = Lost::default();
        self.store.castore().scrub(
            &mut |done, total| progress(CheckProgress::Packs { done, total }),
            &mut |damage| {
                for digest in damage.lost {
                    lost.damage_of
                        .entry(digest)
                        .or_default()
                        .push(lost.messages.len());
                }
                lost.messages
                    .push(format!("{}: {}", damage.what, damage.reason));
            },
        )?;
        check_cancel(cancel)?;
        Ok(lost)
    }

    fn paths(
        &mut self,
        lost: &Lost,
        progress: &mut dyn FnMut(CheckProgress),
        cancel: &AtomicBool,
    ) -> Result<()> {
        let total = self.store.count()?;
        let mut after = 0;
        // Which paths a damage hurts, by its number.
        let mut hurt: HashMap<usize, Vec<StorePath>> = HashMap::new();
        loop {
            let (rows, damaged, last) = self.rows(after)?;
            for message in damaged {
                self.tell(message, Vec::new());
            }
            for row in rows {
                check_cancel(cancel)?;
                self.report.paths += 1;
                let findings = self.path(&row);
                if !lost.damage_of.is_empty() {
                    self.uses(&row, findings.as_deref(), lost, &mut hurt);
                }
                if let Some(message) = findings {
                    self.report.paths_hurt += 1;
                    self.tell(message, vec![row.info.path.clone()]);
                }
                progress(CheckProgress::Paths {
                    done: self.report.paths,
                    total,
                });
            }
            match last {
                Some(last) => after = last,
                None => break,
            }
        }
        for (number, message) in lost.messages.iter().enumerate() {
            let paths = hurt.remove(&number).unwrap_or_default();
            self.tell(message.clone(), paths);
        }
        Ok(())
    }

    /// Rows after a number, those that cannot be read as messages, and the last number.
    fn rows(&self, after: i64) -> Result<(Vec<StoredPath>, Vec<String>, Option<i64>)> {
        self.store.db().read(|connection| {
            let mut statement = connection.prepare_cached(&ROWS_AFTER)?;
            let mut rows = statement.query([after, i64::try_from(ROWS_MAX).unwrap_or(i64::MAX)])?;
            let (mut good, mut bad, mut last) = (Vec::new(), Vec::new(), None);
            while let Some(row) = rows.next()? {
                last = Some(row.get(0)?);
                match super::db::stored_path(row) {
                    Ok(row) => good.push(row),
                    Err(error) => bad.push(error.chain()),
                }
            }
            Ok((good, bad, last))
        })
    }

    /// What is wrong with a path.
    fn path(&mut self, row: &StoredPath) -> Option<String> {
        let path = self.store.store_dir().print(&row.info.path);
        if let Err(error) = self.tree(&row.root) {
            return Some(format!("path '{path}': {}", error.chain()));
        }
        if row.info.ca.is_some() && !row.info.is_content_addressed(self.store.store_dir()) {
            return Some(format!(
                "path '{path}' claims to be content-addressed but isn't"
            ));
        }
        if !self.contents {
            return None;
        }
        match hash_node(self.store.castore(), &row.root, HashRequest::None) {
            Err(error) => Some(format!("path '{path}': {}", error.chain())),
            Ok(found) if found.nar_hash != row.info.nar_hash => Some(format!(
                "path '{path}' was modified! expected hash '{}', got '{}'",
                row.info.nar_hash, found.nar_hash
            )),
            Ok(found) if found.nar_size != row.info.nar_size => Some(format!(
                "path '{path}': expected a NAR of {} bytes, found {}",
                row.info.nar_size, found.nar_size
            )),
            Ok(_) => self
                .outputs(row)
                .err()
                .map(|error| format!("path '{path}': {}", error.chain())),
        }
    }

    /// Compares the recorded outputs of a derivation with what it says.
    fn outputs(&self, row: &StoredPath) -> Result<()> {
        let path = &row.info.path;
        if !path.is_derivation() {
            return Ok(());
        }
        let said = self
            .store
            .read_derivation(path, &row.root)?
            .static_output_paths(self.store.store_dir())
            .map_err(|error| Error::corrupt(error.to_string()))?;
        if self.store.derivation_outputs(path)? == Some(said) {
            return Ok(());
        }
        Err(Error::corrupt(
            "the recorded outputs are not those of the derivation",
        ))
    }

    /// Checks that all of a tree is stored.
    fn tree(&mut self, node: &Node) -> Result<()> {
        match node {
            Node::Symlink { .. } | Node::File { size: 0, .. } => Ok(()),
            Node::File { digest, size, .. } => {
                self.store.castore().blob(digest, *size)?;
                Ok(())
            }
            Node::Directory { digest, size } => {
                let directory = self.store.castore().directory(digest)?;
                if directory.size() != *size {
                    return Err(Error::corrupt(format!(
                        "directory {digest}: expected {size} nodes, found {}",
                        directory.size()
                    )));
                }
                if !self.whole.contains(digest) {
                    for entry in directory.entries() {
                        self.tree(&entry.node).map_err(|error| {
                            error.within(std::path::Path::new(&*String::from_utf8_lossy(
                                &entry.name,
                            )))
                        })?;
                    }
                    self.whole.insert(*digest);
                }
                Ok(())
            }
        }
    }

    /// Notes which damages hurt a path: those of pieces that its tree needs, and those of pieces that
    /// the path's own error names (chunks of large files).
    fn uses(
        &self,
        row: &StoredPath,
        error: Option<&str>,
        lost: &Lost,
        hurt: &mut HashMap<usize, Vec<StorePath>>,
    ) {
        let mut numbers = HashSet::new();
        let mut seen = HashSet::new();
        let mut open = vec![row.root.clone()];
        while let Some(node) = open.pop() {
            let (Node::Directory { digest, .. } | Node::File { digest, .. }) = &node else {
                continue;
            };
            if let Some(found) = lost.damage_of.get(digest) {
                numbers.extend(found);
            }
            if matches!(node, Node::Directory { .. })
                && seen.insert(*digest)
                && let Ok(directory) = self.store.castore().directory(digest)
            {
                open.extend(directory.entries().iter().map(|entry| entry.node.clone()));
            }
        }
        if let Some(error) = error {
            let named = lost
                .damage_of
                .iter()
                .filter(|(digest, _)| error.contains(&digest.to_string()));
            numbers.extend(named.flat_map(|(_, found)| found));
        }
        for number in numbers {
            hurt.entry(number).or_default().push(row.info.path.clone());
        }
    }
}

fn check_cancel(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) {
        return Err(Error::user("interrupted"));
    }
    Ok(())
}
