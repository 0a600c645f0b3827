//! Registration in U, with the closures that its foreign keys want, in one transaction.
//!
//! Cost for a closure of n paths in d levels of which m are not in U: d lookups in U and d queries to a lower, m infos
//! in memory, one transaction. Two that sync the same closure at a time do the work twice and write the same.

use super::Overlay;
use crate::local::db::DrvOutputs;
use crate::{Error, Result};
use std::collections::{BTreeSet, HashMap, HashSet};
use understory_nix::{PathInfo, StorePath};

/// How often a registration is tried again when rows that it relies on were collected meanwhile.
const ATTEMPTS_MAX: u32 = 3;

impl Overlay {
    /// Registers paths in U. Infos of lower objects that they refer to, directly or not, are copied first: one query to
    /// a lower for each level of the closure, one transaction for everything. An object that a lower has, too, keeps
    /// the lower's info and gets the new signatures.
    ///
    /// # Errors
    /// `path '…' is not valid` for a reference that is valid nowhere.
    pub(super) fn register(&self, infos: &[PathInfo]) -> Result<()> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let gathered = self.gather(infos)?;
            match self.write(&gathered, infos) {
                // All of it was valid a moment ago: rows went while a lower was asked.
                Err(error) if attempt < ATTEMPTS_MAX && self.all_valid_below(&gathered)? => {
                    tracing::debug!(error = error.chain(), "registering again");
                }
                done => return done,
            }
        }
    }

    /// Copies the infos of these paths and their closures from the lowers to U, as far as they are not there.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    pub(super) fn sync(&self, paths: &[StorePath]) -> Result<()> {
        let mut gathered = Vec::new();
        self.gather_closure(
            paths.iter().cloned().collect(),
            &HashSet::new(),
            &mut gathered,
        )?;
        self.write(&gathered, &[])
    }

    /// `infos`, each as it shall be in U, and what of their closures is not in U yet.
    fn gather(&self, infos: &[PathInfo]) -> Result<Vec<PathInfo>> {
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        let rows = self.inner.db.valid(&paths)?;
        let below = self.lower_infos(&paths)?;
        let mut gathered = Vec::with_capacity(infos.len());
        for ((info, is_row), below) in infos.iter().zip(rows).zip(below) {
            gathered.push(match below {
                Some(below) if !is_row && !self.describes_upper(info, &below)? => {
                    let mut merged = PathInfo::clone(&below);
                    if below.nar_hash == info.nar_hash {
                        merged.signatures.extend(info.signatures.iter().cloned());
                    }
                    merged
                }
                _ => info.clone(),
            });
        }
        let given: HashSet<StorePath> = paths.into_iter().collect();
        let references: BTreeSet<StorePath> = gathered
            .iter()
            .flat_map(|info| &info.references)
            .filter(|reference| !given.contains(reference))
            .cloned()
            .collect();
        self.gather_closure(references, &given, &mut gathered)?;
        Ok(gathered)
    }

    /// True if the upper has an own copy with other contents, which is what is seen in the merged directory.
    fn describes_upper(&self, info: &PathInfo, below: &PathInfo) -> Result<bool> {
        Ok(info.nar_hash != below.nar_hash
            && super::merged::is_there(&self.inner.upper.join(info.path.base_name()))?)
    }

    /// Adds to `gathered` what of the closures of `level` is not a row, level by level.
    fn gather_closure(
        &self,
        mut level: BTreeSet<StorePath>,
        given: &HashSet<StorePath>,
        gathered: &mut Vec<PathInfo>,
    ) -> Result<()> {
        let mut seen: HashSet<StorePath> = level.iter().cloned().collect();
        while !level.is_empty() {
            let asked: Vec<StorePath> = level.into_iter().collect();
            let rows = self.inner.db.valid(&asked)?;
            let missing: Vec<StorePath> = asked
                .into_iter()
                .zip(rows)
                .filter(|(_, is_row)| !is_row)
                .map(|(path, _)| path)
                .collect();
            level = BTreeSet::new();
            let found = self.lower_infos(&missing)?;
            for (path, info) in missing.iter().zip(found) {
                let info = info.ok_or_else(|| self.not_valid(path))?;
                for reference in &info.references {
                    if !given.contains(reference) && seen.insert(reference.clone()) {
                        level.insert(reference.clone());
                    }
                }
                gathered.push(PathInfo::clone(&info));
            }
        }
        Ok(())
    }

    fn write(&self, gathered: &[PathInfo], given: &[PathInfo]) -> Result<()> {
        if gathered.is_empty() {
            return Ok(());
        }
        // Files are read before the transaction begins.
        let new: HashSet<&StorePath> = given.iter().map(|info| &info.path).collect();
        let mut outputs: HashMap<&StorePath, DrvOutputs> = HashMap::new();
        for info in gathered {
            if info.path.is_derivation() {
                let found = self.outputs_for(&info.path, new.contains(&info.path))?;
                outputs.insert(&info.path, found);
            }
        }
        self.inner.db.register(gathered, &|drv| {
            Ok(outputs.get(drv).cloned().unwrap_or_default())
        })
    }

    /// Statically known outputs of a derivation that is to be registered. A new one is checked as Nix does.
    fn outputs_for(&self, drv: &StorePath, is_new: bool) -> Result<DrvOutputs> {
        if !is_new {
            for lower in &self.inner.lowers {
                if let Some(store) = lower.castore()
                    && let Some(outputs) = store.derivation_outputs(drv)?
                {
                    let known = outputs.into_iter();
                    return Ok(known
                        .filter_map(|(name, path)| path.map(|path| (name, path)))
                        .collect());
                }
            }
        }
        let wrong = |error: &dyn std::fmt::Display| {
            Error::user(format!("'{}': {error}", self.store_dir().print(drv)))
        };
        let derivation = self.derivation(drv)?;
        if is_new {
            self.with_modulo(|modulo| modulo.check(drv, &derivation))
                .map_err(|e| wrong(&e))?;
        }
        let outputs = derivation
            .static_output_paths(self.store_dir())
            .map_err(|e| wrong(&e))?;
        Ok(outputs
            .into_iter()
            .filter_map(|(name, path)| path.map(|path| (name, path)))
            .collect())
    }

    /// True if everything that `infos` refer to is among them or valid: what failed may succeed now.
    fn all_valid_below(&self, infos: &[PathInfo]) -> Result<bool> {
        let among: HashSet<&StorePath> = infos.iter().map(|info| &info.path).collect();
        let outside: BTreeSet<&StorePath> = infos
            .iter()
            .flat_map(|info| &info.references)
            .filter(|reference| !among.contains(reference))
            .collect();
        let outside: Vec<StorePath> = outside.into_iter().cloned().collect();
        let rows = self.inner.db.valid(&outside)?;
        // If all are rows, it failed for another reason.
        Ok(rows.contains(&false) && !self.valid(&outside)?.contains(&false))
    }
}
