//! Writing: registration and removal of paths, signatures, notes.

use super::{Database, DrvOutputs, Failure, Work, schema};
use crate::{Error, Result};
use rusqlite::Connection;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};
use understory_nix::{PathInfo, Signature, StorePath};

/// Gives the statically known outputs of a derivation.
type OutputsOf<'a> = &'a dyn Fn(&StorePath) -> Result<DrvOutputs>;

/// What a registration does with a path that is a row already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Sets NAR hash and size, ultimate, signatures, `ca`; adds references.
    Update,
    /// Leaves it as it is.
    Keep,
}

impl Database {
    /// Registers paths, in one transaction: new rows are inserted, known ones updated as Nix does (NAR hash and
    /// size, ultimate, signatures, `ca`; references are added). Every reference must be a row or in `infos`.
    /// `outputs` gives the statically known outputs of a new derivation. Order does not matter.
    ///
    /// # Errors
    /// `path '…' is not valid` for a missing reference; a cycle between different paths; a `ca` that does not
    /// make the path. Nothing is changed then.
    pub fn register(
        &self,
        infos: &[PathInfo],
        outputs: &dyn Fn(&StorePath) -> Result<DrvOutputs>,
    ) -> Result<()> {
        self.register_above(&[], infos, outputs)
    }

    /// As [`Database::register`], and in the same transaction registers `below` first: copies of what another store
    /// has. Of these, known rows are left as they are, whatever somebody has added to them since `below` was read.
    ///
    /// # Errors
    /// As [`Database::register`].
    pub fn register_above(
        &self,
        below: &[PathInfo],
        infos: &[PathInfo],
        outputs: &dyn Fn(&StorePath) -> Result<DrvOutputs>,
    ) -> Result<()> {
        if below.is_empty() && infos.is_empty() {
            return Ok(());
        }
        // Derivations are read before the database is locked.
        let mut prepared = BTreeMap::new();
        let derivations: Vec<StorePath> = below
            .iter()
            .chain(infos)
            .map(|info| &info.path)
            .filter(|path| path.is_derivation())
            .cloned()
            .collect();
        if !derivations.is_empty() {
            let known = self.valid(&derivations)?;
            for (drv, known) in derivations.into_iter().zip(known) {
                if !known {
                    let outputs = outputs(&drv)?;
                    prepared.insert(drv, outputs);
                }
            }
        }
        self.write(|connection| {
            let mut registration = Registration {
                database: self,
                connection,
                ids: HashMap::new(),
                now: now(),
                grown: Vec::new(),
            };
            let outputs = |drv: &StorePath| match prepared.get(drv) {
                Some(found) => Ok(found.clone()),
                None => outputs(drv),
            };
            let all = [(below, Known::Keep), (infos, Known::Update)];
            let mut changed = Vec::new();
            for (infos, known) in all {
                for info in infos {
                    if registration.put(info, known, &outputs)? {
                        changed.push(info);
                    }
                }
            }
            for info in &changed {
                registration.put_references(info)?;
            }
            registration.check_cycles(&changed)
        })
    }

    /// Removes rows, in one transaction. Rows that are not there are ignored. References between them do not
    /// matter.
    ///
    /// # Errors
    /// Another row refers to one: `cannot delete path '…' because it is in use by …`. Nothing is changed then.
    pub fn invalidate(&self, paths: &[StorePath]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        self.write(|connection| {
            let mut ids: HashMap<i64, &StorePath> = HashMap::new();
            for path in paths {
                if let Some(id) = self.id_of(connection, path)? {
                    ids.insert(id, path);
                }
            }
            let mut referrers =
                connection.prepare_cached("select referrer from Refs where reference = ?1")?;
            for (id, path) in &ids {
                let mut rows = referrers.query([id])?;
                while let Some(row) = rows.next()? {
                    if !ids.contains_key(&row.get(0)?) {
                        drop(rows);
                        return Err(self.in_use(connection, *id, path, &ids)?.into());
                    }
                }
            }
            let mut forget = connection.prepare_cached("delete from Refs where referrer = ?1")?;
            for id in ids.keys() {
                forget.execute([id])?;
            }
            let mut delete = connection.prepare_cached("delete from ValidPaths where id = ?1")?;
            for id in ids.keys() {
                delete.execute([id])?;
            }
            Ok(())
        })
    }

    /// Adds signatures to a row.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    pub fn add_signatures(&self, path: &StorePath, new: &BTreeSet<Signature>) -> Result<()> {
        self.write(|connection| {
            let Some(id) = self.id_of(connection, path)? else {
                return Err(self.not_valid(path).into());
            };
            let known: Option<String> = connection
                .prepare_cached("select sigs from ValidPaths where id = ?1")?
                .query_row([id], |row| row.get(0))?;
            let known = known.unwrap_or_default();
            let mut all: BTreeSet<&str> = known.split_ascii_whitespace().collect();
            let count = all.len();
            all.extend(new.iter().map(Signature::as_str));
            if all.len() > count {
                connection
                    .prepare_cached("update ValidPaths set sigs = ?2 where id = ?1")?
                    .execute((id, join(all)))?;
            }
            Ok(())
        })
    }

    /// Sets it; `None` removes it.
    pub fn set_note(&self, name: &str, value: Option<&str>) -> Result<()> {
        self.write(|connection| {
            connection.execute_batch(schema::CREATE_NOTES)?;
            match value {
                Some(value) => connection
                    .prepare_cached(
                        "insert or replace into Understory (name, value) values (?1, ?2)",
                    )?
                    .execute([name, value])?,
                None => connection
                    .prepare_cached("delete from Understory where name = ?1")?
                    .execute([name])?,
            };
            Ok(())
        })
    }

    /// `cannot delete path …`, naming all that is in the way.
    fn in_use(
        &self,
        connection: &Connection,
        id: i64,
        path: &StorePath,
        deleted: &HashMap<i64, &StorePath>,
    ) -> Work<Error> {
        let mut statement = connection.prepare_cached(
            "select ValidPaths.id, path from Refs join ValidPaths on ValidPaths.id = referrer \
             where reference = ?1 order by path",
        )?;
        let mut rows = statement.query([id])?;
        let mut names = Vec::new();
        while let Some(row) = rows.next()? {
            if !deleted.contains_key(&row.get(0)?) {
                names.push(format!("'{}'", row.get::<_, String>(1)?));
            }
        }
        Ok(Error::user(format!(
            "cannot delete path '{}' because it is in use by {}",
            self.store_dir.print(path),
            names.join(", ")
        )))
    }
}

/// A registration in its transaction.
struct Registration<'a> {
    database: &'a Database,
    connection: &'a Connection,
    /// Row numbers of paths that were met.
    ids: HashMap<StorePath, i64>,
    now: i64,
    /// Rows that were there and have been given references.
    grown: Vec<StorePath>,
}

impl Registration<'_> {
    /// Inserts or updates a row; false if it was left as it is.
    fn put(&mut self, info: &PathInfo, known: Known, outputs: OutputsOf<'_>) -> Work<bool> {
        let dir = &self.database.store_dir;
        let path = dir.print(&info.path);
        let hash = format!("sha256:{}", info.nar_hash.to_base16());
        let nar_size = signed(info.nar_size).filter(|&size| size > 0);
        let ultimate = info.ultimate.then_some(1);
        let signatures = join(info.signatures.iter().map(Signature::as_str).collect());
        let signatures = Some(signatures).filter(|text| !text.is_empty());
        let ca = info.ca.as_ref().map(ToString::to_string);
        if let Some(id) = self.database.id_of(self.connection, &info.path)? {
            self.ids.insert(info.path.clone(), id);
            if known == Known::Keep {
                return Ok(false);
            }
            self.connection
                .prepare_cached(
                    "update ValidPaths set narSize = ?2, hash = ?3, ultimate = ?4, sigs = ?5, ca = ?6 where id = ?1",
                )?
                .execute((id, nar_size, hash, ultimate, signatures, ca))?;
            self.grown.push(info.path.clone());
            return Ok(true);
        }
        if info.ca.is_some() && !info.is_content_addressed(dir) {
            return Err(Failure::Other(Error::user(format!(
                "cannot add path '{path}' to the Nix store because it claims to be content-addressed but isn't"
            ))));
        }
        let time = match signed(info.registration_time) {
            None | Some(0) => self.now,
            Some(time) => time,
        };
        self.connection
            .prepare_cached(
                "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca) \
                 values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute((
                path,
                hash,
                time,
                info.deriver.as_ref().map(|deriver| dir.print(deriver)),
                nar_size,
                ultimate,
                signatures,
                ca,
            ))?;
        let id = self.connection.last_insert_rowid();
        self.ids.insert(info.path.clone(), id);
        if info.path.is_derivation() {
            let mut statement = self.connection.prepare_cached(
                "insert or replace into DerivationOutputs (drv, id, path) values (?1, ?2, ?3)",
            )?;
            for (name, path) in outputs(&info.path)? {
                statement.execute((id, name, dir.print(&path)))?;
            }
        }
        Ok(true)
    }

    fn put_references(&mut self, info: &PathInfo) -> Work<()> {
        let referrer = self.id(&info.path)?;
        for reference in &info.references {
            let reference = self.id(reference)?;
            self.connection
                .prepare_cached(
                    "insert or replace into Refs (referrer, reference) values (?1, ?2)",
                )?
                .execute([referrer, reference])?;
        }
        Ok(())
    }

    fn id(&mut self, path: &StorePath) -> Work<i64> {
        if let Some(id) = self.ids.get(path) {
            return Ok(*id);
        }
        let id = self
            .database
            .id_of(self.connection, path)?
            .ok_or_else(|| self.database.not_valid(path))?;
        self.ids.insert(path.clone(), id);
        Ok(id)
    }

    /// Refuses a cycle between different paths of `infos`: depth-first, no recursion.
    fn check_cycles(&self, infos: &[&PathInfo]) -> Work<()> {
        let mut edges: HashMap<&StorePath, Vec<StorePath>> = HashMap::new();
        for info in infos {
            let references = edges.entry(&info.path).or_default();
            references.extend(info.references.iter().cloned());
        }
        // Rows that were there have references of their own.
        for path in &self.grown {
            let Some((id, references)) = self.ids.get(path).zip(edges.get_mut(path)) else {
                continue;
            };
            let mut statement = self.connection.prepare_cached(
                "select path from Refs join ValidPaths on ValidPaths.id = reference where referrer = ?1",
            )?;
            let mut rows = statement.query([id])?;
            while let Some(row) = rows.next()? {
                references.push(self.database.parse(super::queries::text(row, 0)?)?);
            }
        }
        let mut done: HashSet<&StorePath> = HashSet::new();
        let mut entered: HashSet<&StorePath> = HashSet::new();
        for info in infos {
            if !entered.insert(&info.path) {
                continue;
            }
            let mut stack = vec![(&info.path, edges[&info.path].iter())];
            while let Some((path, references)) = stack.last_mut() {
                let path = *path;
                let Some(reference) = references.next() else {
                    done.insert(path);
                    stack.pop();
                    continue;
                };
                if reference == path {
                    continue;
                }
                let Some((reference, next)) = edges.get_key_value(reference) else {
                    continue;
                };
                if entered.insert(reference) {
                    stack.push((reference, next.iter()));
                } else if !done.contains(reference) {
                    let dir = &self.database.store_dir;
                    return Err(Failure::Other(Error::user(format!(
                        "cycle detected in the references of '{}' from '{}'",
                        dir.print(reference),
                        dir.print(path)
                    ))));
                }
            }
        }
        Ok(())
    }
}

fn join(signatures: BTreeSet<&str>) -> String {
    Vec::from_iter(signatures).join(" ")
}

/// SQLite's integers have a sign.
fn signed(value: u64) -> Option<i64> {
    i64::try_from(value).ok()
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.ok()
        .and_then(|since| signed(since.as_secs()))
        .unwrap_or(1)
}
