//! Making paths valid.
//!
//! Order, which is what durability rests on: the castore's writer is synced (content is on disk),
//! then one SQLite transaction registers everything (`synchronous=full`: its commit publishes), then
//! observers are told.

use super::db::{
    ROW_BY_ID, WriteTransaction, checksum, damaged, integer, lock, parse_signatures,
    realisation_checksum, root_columns, signatures_column, stored_path, unverified_path,
};
use super::queries::{id_of, realisation_of};
use super::{Realisation, Store};
use crate::nar::{HashRequest, hash_node};
use crate::{Error, Result};
use rusqlite::params;
use std::collections::{BTreeSet, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};
use understory_castore::{CastoreError, Node};
use understory_nix::{PathInfo, Signature, StorePath};

/// What becomes valid: a path, its content, and the outputs that it has if it is a derivation.
struct Candidate {
    info: PathInfo,
    root: Node,
    outputs: Vec<(String, Option<StorePath>)>,
}

impl Store {
    /// Makes paths valid in one transaction, after syncing the castore's writer. References must be
    /// valid or among `paths`. A path that is valid already gets the union of signatures, and
    /// `ultimate`/`ca` if it had none. Derivations get their outputs recorded.
    ///
    /// Durable on return.
    ///
    /// # Errors
    /// A reference is not valid (nothing is registered), I/O, full disk.
    pub fn publish(&self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        self.register(paths, false)
    }

    /// Like [`Store::publish`], but a path that is valid already gets the new content, NAR hash and
    /// size: for repairs.
    ///
    /// # Errors
    /// As [`Store::publish`].
    pub fn republish(&self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        self.register(paths, true)
    }

    fn register(&self, paths: Vec<(PathInfo, Node)>, replace: bool) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        for (info, _) in &paths {
            if info.ca.is_some() && !info.is_content_addressed(self.store_dir()) {
                return Err(Error::user(format!(
                    "cannot add path '{}' to the Nix store because it claims to be content-addressed but isn't",
                    self.store_dir().print(&info.path)
                )));
            }
        }
        for (info, root) in &paths {
            // Content that was found in the store and not built here may be under collection.
            self.castore()
                .secure(root)
                .map_err(|error| self.no_content(info, error))?;
        }
        self.writer()?.sync()?;
        let contents: Vec<_> = paths
            .iter()
            .map(|(info, root)| (&info.path, root))
            .collect();
        for (info, root) in &paths {
            self.check_content(info, root)?;
        }
        let outputs = self.derivation_outputs_of(&contents)?;
        let candidates: Vec<Candidate> = paths
            .into_iter()
            .zip(outputs)
            .map(|((info, root), outputs)| Candidate {
                info,
                root,
                outputs,
            })
            .collect();
        let fresh = self
            .db()
            .write(|transaction| self.insert(transaction, &candidates, replace))?;
        // The rows keep it from now on.
        for candidate in &candidates {
            self.castore().release(&candidate.root);
        }
        if !fresh.is_empty() {
            crate::metrics::published(fresh.len());
            self.tell_observers(|observer| observer.published(&fresh));
        }
        Ok(())
    }

    /// Registers `candidates`; returns those that were not valid before.
    fn insert(
        &self,
        transaction: &mut WriteTransaction<'_>,
        candidates: &[Candidate],
        replace: bool,
    ) -> Result<Vec<StorePath>> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        // Where each path that is not valid yet stands among the candidates.
        let mut fresh: HashMap<&StorePath, usize> = HashMap::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let path = &candidate.info.path;
            match id_of(transaction, path)? {
                None => {
                    if let Some(first) = fresh.get(path) {
                        // Named twice in one call.
                        let first = &candidates[*first].info;
                        if first.nar_hash != candidate.info.nar_hash {
                            return Err(Error::user(format!(
                                "path '{}' is to be registered twice with different contents",
                                self.store_dir().print(path)
                            )));
                        }
                    } else {
                        fresh.insert(path, index);
                    }
                }
                Some(id) => self.merge(transaction, id, candidate, replace)?,
            }
        }
        let order = self.references_first(candidates, &fresh)?;
        let mut ids: HashMap<&StorePath, i64> = HashMap::with_capacity(order.len());
        for &index in &order {
            let candidate = &candidates[index];
            let id = insert_row(transaction, candidate, now)?;
            ids.insert(&candidate.info.path, id);
            for reference in &candidate.info.references {
                let target = match ids.get(reference) {
                    Some(id) => Some(*id),
                    None => id_of(transaction, reference)?,
                };
                let target = target.ok_or_else(|| self.not_valid(reference))?;
                transaction
                    .prepare_cached("insert into refs (referrer, reference) values (?1, ?2)")?
                    .execute([id, target])?;
            }
            insert_outputs(transaction, id, &candidate.outputs)?;
        }
        // Signatures of a path that was named twice.
        for (index, candidate) in candidates.iter().enumerate() {
            let path = &candidate.info.path;
            if fresh.get(path).is_some_and(|first| *first != index)
                && let Some(id) = ids.get(path)
            {
                self.merge(transaction, *id, candidate, replace)?;
            }
        }
        Ok(order
            .into_iter()
            .map(|index| candidates[index].info.path.clone())
            .collect())
    }

    /// Brings a row up to date with what a second registration says.
    fn merge(
        &self,
        transaction: &mut WriteTransaction<'_>,
        id: i64,
        candidate: &Candidate,
        replace: bool,
    ) -> Result<()> {
        if !replace {
            verify(transaction, id)?;
        }
        let info = &candidate.info;
        let (nar_hash, column, ultimate, ca) = transaction
            .prepare_cached("select nar_hash, signatures, ultimate, ca from paths where id = ?1")?
            .query_row([id], |row| {
                Ok((
                    row.get::<_, Vec<u8>>(0)?,
                    row.get::<_, Option<String>>(1)?,
                    row.get::<_, bool>(2)?,
                    row.get::<_, Option<String>>(3)?,
                ))
            })?;
        let same_content = nar_hash == info.nar_hash.0;
        let mut signatures = parse_signatures(id, column.as_deref())?;
        if replace {
            transaction.will_change_rows();
            if !same_content {
                // Signatures cover the NAR hash.
                signatures.clear();
            }
            let (kind, root, size) = root_columns(&candidate.root)?;
            transaction
                .prepare_cached(
                    "update paths set nar_hash = ?2, nar_size = ?3, root_kind = ?4, root = ?5, root_size = ?6 \
                     where id = ?1",
                )?
                .execute(params![id, &info.nar_hash.0[..], integer(info.nar_size)?, kind, root, size])?;
        } else if !same_content {
            tracing::debug!(path = %info.path, "registered again with another NAR hash: the first one stays");
            return Ok(());
        }
        signatures.extend(info.signatures.iter().cloned());
        let new_column = signatures_column(&signatures);
        let new_ultimate = ultimate || info.ultimate;
        let new_ca = ca.clone().or_else(|| info.ca.map(|ca| ca.to_string()));
        if new_column != column || new_ultimate != ultimate || new_ca != ca {
            transaction.will_change_rows();
            transaction
                .prepare_cached(
                    "update paths set signatures = ?2, ultimate = ?3, ca = ?4 where id = ?1",
                )?
                .execute(params![id, new_column, new_ultimate, new_ca])?;
        } else if !replace {
            return Ok(());
        }
        seal(transaction, id)
    }

    /// Orders the fresh candidates so that references come first.
    fn references_first(
        &self,
        candidates: &[Candidate],
        fresh: &HashMap<&StorePath, usize>,
    ) -> Result<Vec<usize>> {
        #[derive(Clone, Copy, PartialEq)]
        enum State {
            New,
            Open,
            Done,
        }
        let mut states = vec![State::New; candidates.len()];
        let mut order = Vec::with_capacity(fresh.len());
        let mut stack: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut starts: Vec<usize> = fresh.values().copied().collect();
        starts.sort_unstable();
        let edges = |index: usize| -> Vec<usize> {
            let info = &candidates[index].info;
            let others = info
                .references
                .iter()
                .filter(|reference| **reference != info.path);
            others
                .rev()
                .filter_map(|reference| fresh.get(reference).copied())
                .collect()
        };
        for start in starts {
            if states[start] != State::New {
                continue;
            }
            states[start] = State::Open;
            stack.push((start, edges(start)));
            while let Some((index, rest)) = stack.last_mut() {
                let index = *index;
                let Some(next) = rest.pop() else {
                    states[index] = State::Done;
                    order.push(index);
                    stack.pop();
                    continue;
                };
                match states[next] {
                    State::Done => {}
                    State::New => {
                        states[next] = State::Open;
                        stack.push((next, edges(next)));
                    }
                    State::Open => {
                        return Err(Error::user(format!(
                            "cycle detected in the references of '{}' from '{}'",
                            self.store_dir().print(&candidates[next].info.path),
                            self.store_dir().print(&candidates[index].info.path)
                        )));
                    }
                }
            }
        }
        Ok(order)
    }

    /// Says that a path's content is not there; other errors stay what they are.
    fn no_content(&self, info: &PathInfo, error: CastoreError) -> Error {
        match error {
            CastoreError::Missing { .. } => Error::internal(format!(
                "path '{}' has no content",
                self.store_dir().print(&info.path)
            ))
            .with_source(error),
            other => other.into(),
        }
    }

    /// Checks that the root's content is stored: the last look before a path becomes visible.
    fn check_content(&self, info: &PathInfo, root: &Node) -> Result<()> {
        let castore = self.castore();
        let print = || self.store_dir().print(&info.path);
        let (kind, digest) = match root {
            // An empty file has nothing to store.
            Node::File { size: 0, .. } | Node::Symlink { .. } => return Ok(()),
            Node::Directory { digest, .. } => ("directory", digest),
            Node::File { digest, .. } => ("blob", digest),
        };
        let stored = castore.contains(digest) || (castore.refresh()? && castore.contains(digest));
        if !stored {
            let error = CastoreError::Missing {
                kind,
                digest: *digest,
            };
            return Err(self.no_content(info, error));
        }
        if lock(&self.inner.writer).was_replaced {
            // A writer failed earlier in this process: what it had taken may be lost in part.
            let found = hash_node(castore, root, HashRequest::None)?;
            if found.nar_hash != info.nar_hash {
                return Err(Error::corrupt(format!(
                    "path '{}': expected hash '{}', stored '{}'",
                    print(),
                    info.nar_hash,
                    found.nar_hash
                )));
            }
        }
        Ok(())
    }

    /// Adds signatures to a valid path.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    pub fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<()> {
        self.check_writable()?;
        self.db().write(|transaction| {
            let id = id_of(transaction, path)?.ok_or_else(|| self.not_valid(path))?;
            verify(transaction, id)?;
            let column: Option<String> = transaction
                .prepare_cached("select signatures from paths where id = ?1")?
                .query_row([id], |row| row.get(0))?;
            let mut all = parse_signatures(id, column.as_deref())?;
            all.extend(signatures.iter().cloned());
            let new_column = signatures_column(&all);
            if new_column != column {
                transaction.will_change_rows();
                transaction
                    .prepare_cached("update paths set signatures = ?2 where id = ?1")?
                    .execute(params![id, new_column])?;
                seal(transaction, id)?;
            }
            Ok(())
        })
    }

    /// Records a realisation. One that is recorded already with the same output path gets the union
    /// of signatures.
    ///
    /// # Errors
    /// Another output path is recorded already; the output path is not valid.
    pub fn add_realisation(&self, realisation: &Realisation) -> Result<()> {
        self.add_realisations(std::slice::from_ref(realisation))
    }

    /// [`Store::add_realisation`] for many: all or none.
    ///
    /// # Errors
    /// As [`Store::add_realisation`].
    pub fn add_realisations(&self, realisations: &[Realisation]) -> Result<()> {
        self.check_writable()?;
        for realisation in realisations {
            let odd = |s: &&String| s.is_empty() || s.contains(char::is_whitespace);
            if let Some(odd) = realisation.signatures.iter().find(odd) {
                return Err(Error::user(format!(
                    "invalid signature {odd:?} of realisation '{}'",
                    realisation.id
                )));
            }
        }
        if realisations.is_empty() {
            return Ok(());
        }
        self.db().write(|transaction| {
            for realisation in realisations {
                self.insert_realisation(transaction, realisation)?;
            }
            Ok(())
        })
    }

    fn insert_realisation(
        &self,
        transaction: &WriteTransaction<'_>,
        realisation: &Realisation,
    ) -> Result<()> {
        let path = &realisation.out_path;
        let out_path = id_of(transaction, path)?.ok_or_else(|| self.not_valid(path))?;
        let mut signatures = realisation.signatures.clone();
        if let Some(known) = realisation_of(transaction, &realisation.id)? {
            if known.out_path != *path {
                return Err(Error::user(format!(
                    "realisation '{}' is recorded already: expected output path '{}', found '{}'",
                    realisation.id,
                    self.store_dir().print(&known.out_path),
                    self.store_dir().print(path)
                )));
            }
            signatures.extend(known.signatures);
        }
        let column =
            (!signatures.is_empty()).then(|| signatures.into_iter().collect::<Vec<_>>().join(" "));
        let checksum = realisation_checksum(&realisation.id, path, column.as_deref());
        transaction
            .prepare_cached(
                "insert into realisations (id, out_path, signatures, checksum) values (?1, ?2, ?3, ?4) \
                 on conflict (id) do update set signatures = excluded.signatures, checksum = excluded.checksum",
            )?
            .execute(params![realisation.id, out_path, column, checksum])?;
        Ok(())
    }
}

fn insert_row(transaction: &WriteTransaction<'_>, candidate: &Candidate, now: u64) -> Result<i64> {
    let info = &candidate.info;
    let (kind, root, root_size) = root_columns(&candidate.root)?;
    let time = if info.registration_time == 0 {
        now
    } else {
        info.registration_time
    };
    let checksum = checksum(
        &PathInfo {
            registration_time: time,
            ..info.clone()
        },
        &candidate.root,
    )?;
    transaction
        .prepare_cached(
            "insert into paths (base_name, nar_hash, nar_size, registration_time, deriver, ultimate, ca, \
             signatures, root_kind, root, root_size, checksum) \
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        )?
        .execute(params![
            info.path.base_name(),
            &info.nar_hash.0[..],
            integer(info.nar_size)?,
            integer(time)?,
            info.deriver.as_ref().map(StorePath::base_name),
            info.ultimate,
            info.ca.map(|ca| ca.to_string()),
            signatures_column(&info.signatures),
            kind,
            root,
            root_size,
            checksum,
        ])?;
    Ok(transaction.last_insert_rowid())
}

/// Writes the checksum of a row that was changed.
fn seal(transaction: &WriteTransaction<'_>, id: i64) -> Result<()> {
    let row = {
        let mut statement = transaction.prepare_cached(&ROW_BY_ID)?;
        let mut rows = statement.query([id])?;
        let row = rows.next()?.ok_or_else(|| damaged(id, "it is gone"))?;
        unverified_path(row)?
    };
    transaction
        .prepare_cached("update paths set checksum = ?2 where id = ?1")?
        .execute([id, checksum(&row.info, &row.root)?])?;
    Ok(())
}

/// Refuses to change a row that is damaged: its new checksum would hide that.
fn verify(transaction: &WriteTransaction<'_>, id: i64) -> Result<()> {
    let mut statement = transaction.prepare_cached(&ROW_BY_ID)?;
    let mut rows = statement.query([id])?;
    stored_path(rows.next()?.ok_or_else(|| damaged(id, "it is gone"))?)?;
    Ok(())
}

fn insert_outputs(
    transaction: &WriteTransaction<'_>,
    id: i64,
    outputs: &[(String, Option<StorePath>)],
) -> Result<()> {
    for (name, path) in outputs {
        transaction
            .prepare_cached("insert into derivation_outputs (drv, name, path) values (?1, ?2, ?3)")?
            .execute(params![id, name, path.as_ref().map(StorePath::base_name)])?;
    }
    Ok(())
}
