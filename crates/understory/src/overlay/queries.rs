//! Reading: U, then the lowers. Writes nothing.
//!
//! Clients see the union of U and the lowers in every query, in the list of all valid paths too; C++ Nix lists U only
//! there. What collects or verifies asks U itself.

use super::Overlay;
use super::session::lock;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use understory_nix::derivation::{DRV_BYTES_MAX, Derivation, HashModulo};
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{PathInfo, StorePath, StorePathName};

/// Derivations whose hashes are kept: some hundred bytes each, and more than an evaluation of a whole system needs.
const KNOWN_HASHES_MAX: usize = 100_000;

/// Reads an input derivation.
type Load<'a> = Box<dyn FnMut(&StorePath) -> std::result::Result<Derivation, String> + 'a>;
/// Computes hashes modulo.
pub(super) type Modulo<'a> = HashModulo<Load<'a>>;

impl Overlay {
    /// The path info: U's, else the first lower's that has it.
    pub(super) fn info(&self, path: &StorePath) -> Result<Option<PathInfo>> {
        let mut found = None;
        self.with_info(path, &mut |info| found = Some(info.clone()))?;
        Ok(found)
    }

    /// Shows the path info to `visit`; false if the path is not valid.
    pub(super) fn with_info(
        &self,
        path: &StorePath,
        visit: &mut dyn FnMut(&PathInfo),
    ) -> Result<bool> {
        if let Some(info) = self.inner.db.info(path)? {
            visit(&info);
            return Ok(true);
        }
        for lower in &self.inner.lowers {
            if lower.with_info(path, visit)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Which of `paths` are valid, in the order given.
    pub(super) fn valid(&self, paths: &[StorePath]) -> Result<Vec<bool>> {
        let mut valid = self.inner.db.valid(paths)?;
        for lower in &self.inner.lowers {
            let open: Vec<usize> = (0..paths.len()).filter(|&index| !valid[index]).collect();
            if open.is_empty() {
                break;
            }
            let asked: Vec<StorePath> = open.iter().map(|&index| paths[index].clone()).collect();
            for (index, found) in open.into_iter().zip(lower.valid(&asked)?) {
                valid[index] = found;
            }
        }
        Ok(valid)
    }

    /// True if the path is valid.
    pub(super) fn is_valid(&self, path: &StorePath) -> Result<bool> {
        Ok(self.valid(std::slice::from_ref(path))? == [true])
    }

    /// Those of `paths` that a lower has, with the uppermost one's infos, in the order given: one query to each lower.
    pub(super) fn lower_infos(&self, paths: &[StorePath]) -> Result<Vec<Option<Arc<PathInfo>>>> {
        let mut infos: Vec<Option<Arc<PathInfo>>> = vec![None; paths.len()];
        for lower in &self.inner.lowers {
            let open: Vec<usize> = (0..paths.len())
                .filter(|&index| infos[index].is_none())
                .collect();
            if open.is_empty() {
                break;
            }
            let asked: Vec<StorePath> = open.iter().map(|&index| paths[index].clone()).collect();
            for (index, found) in open.into_iter().zip(lower.infos(&asked)?) {
                infos[index] = found;
            }
        }
        Ok(infos)
    }

    /// `path '…' is not valid`.
    pub(super) fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.store_dir().print(path)
        ))
    }

    /// All valid paths of U and the lowers, sorted.
    pub(super) fn all_valid(&self) -> Result<Vec<StorePath>> {
        let mut all: BTreeSet<StorePath> = self.inner.db.all_paths()?.into_iter().collect();
        for lower in &self.inner.lowers {
            all.extend(lower.all_paths()?);
        }
        Ok(all.into_iter().collect())
    }

    /// Valid paths that refer to `path`, in U and the lowers.
    pub(super) fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        let mut all = self.inner.db.referrers(path)?;
        for lower in &self.inner.lowers {
            all.extend(lower.referrers(path)?);
        }
        Ok(all)
    }

    /// Valid derivations that have `path` as a statically known output, in U and the lowers.
    pub(super) fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        let mut all = self.inner.db.valid_derivers(path)?;
        for lower in &self.inner.lowers {
            all.extend(lower.valid_derivers(path)?);
        }
        Ok(all)
    }

    /// The valid path with that hash part.
    pub(super) fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        if let Some(path) = self.inner.db.path_from_hash_part(hash_part)? {
            return Ok(Some(path));
        }
        for lower in &self.inner.lowers {
            if let Some(path) = lower.path_from_hash_part(hash_part)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// What an output became: U's word, else a lower's.
    pub(super) fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        if let Some(found) = self.inner.db.realisation(id)? {
            return Ok(Some(found));
        }
        self.lower_realisation(id)
    }

    /// What an output became, by the lowers.
    pub(super) fn lower_realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        for lower in &self.inner.lowers {
            if let Some(found) = lower.realisation(id)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The derivation at a valid path, read from the merged directory.
    pub(super) fn derivation(&self, drv: &StorePath) -> Result<Derivation> {
        let text = match self.read_derivation(drv) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if !self.is_valid(drv)? {
                    return Err(self.not_valid(drv));
                }
                self.inner.merged.show(std::slice::from_ref(drv))?;
                self.read_derivation(drv)
            }
            other => other,
        }
        .map_err(|e| Error::io("reading", self.inner.local.object(drv), e))?;
        let name = drv.name().strip_suffix(".drv").unwrap_or(drv.name());
        Derivation::parse(self.store_dir(), &StorePathName::new(name)?, &text).map_err(|error| {
            // Nix's words.
            Error::user(format!(
                "error parsing derivation '{}': {error}",
                self.store_dir().print(drv)
            ))
        })
    }

    fn read_derivation(&self, drv: &StorePath) -> std::io::Result<Vec<u8>> {
        let path: PathBuf = self.inner.local.object(drv);
        let size = std::fs::symlink_metadata(&path)?.len();
        if size > DRV_BYTES_MAX as u64 {
            return Err(std::io::Error::other(format!(
                "expected at most {DRV_BYTES_MAX} bytes, found {size}"
            )));
        }
        std::fs::read(&path)
    }

    /// Outputs of a valid derivation: where they are, as far as the derivation or a realisation says.
    ///
    /// # Errors
    /// `path '…' is not valid`; the derivation cannot be read.
    pub(super) fn output_map(
        &self,
        drv: &StorePath,
    ) -> Result<BTreeMap<String, Option<StorePath>>> {
        if !self.is_valid(drv)? {
            return Err(self.not_valid(drv));
        }
        let derivation = self.derivation(drv)?;
        let fixed = derivation
            .static_output_paths(self.store_dir())
            .map_err(|e| Error::user(format!("'{}': {e}", self.store_dir().print(drv))))?;
        let mut outputs: BTreeMap<String, Option<StorePath>> = fixed.into_iter().collect();
        if outputs.values().all(Option::is_some) {
            return Ok(outputs);
        }
        let hashed = self.output_ids(drv, &derivation);
        for (name, path) in &mut outputs {
            if path.is_some() {
                continue;
            }
            let by_path = DrvOutput::Path {
                drv: drv.clone(),
                output: name.clone(),
            };
            for id in hashed.get(name).cloned().into_iter().chain([by_path]) {
                if let Some(found) = self.realisation(&id)? {
                    *path = Some(found.out_path);
                    break;
                }
            }
        }
        Ok(outputs)
    }

    /// Keys of a derivation's realisations up to Nix 2.34, by output; empty if an input cannot be read.
    pub(super) fn output_ids(
        &self,
        drv: &StorePath,
        derivation: &Derivation,
    ) -> BTreeMap<String, DrvOutput> {
        match self.with_modulo(|modulo| modulo.hashes(derivation, true)) {
            Ok(hashes) => hashes
                .outputs
                .into_iter()
                .map(|(name, hash)| {
                    let id = format!("{}:{}!{name}", hash.algorithm().name(), hash.to_base16());
                    (name, DrvOutput::Hash(id))
                })
                .collect(),
            Err(error) => {
                tracing::debug!(%drv, %error, "no hash modulo");
                BTreeMap::new()
            }
        }
    }

    /// Lends what computes hashes modulo, with all that is known already.
    pub(super) fn with_modulo<T>(&self, work: impl FnOnce(&mut Modulo<'_>) -> T) -> T {
        let mut known = lock(&self.inner.hashes);
        if known.len() > KNOWN_HASHES_MAX {
            known.clear();
        }
        let load: Load<'_> = Box::new(|path| self.derivation(path).map_err(|error| error.chain()));
        let before = std::mem::take(&mut *known);
        let mut modulo = HashModulo::with_known(self.store_dir().clone(), load, before);
        let done = work(&mut modulo);
        *known = modulo.into_known();
        done
    }

    /// Those of `paths` that are valid, in the order given.
    pub(super) fn only_valid(&self, paths: &[StorePath]) -> Result<Vec<StorePath>> {
        let valid = self.valid(paths)?;
        let both = paths.iter().zip(valid);
        Ok(both
            .filter(|(_, valid)| *valid)
            .map(|(path, _)| path.clone())
            .collect())
    }

    /// Those of `paths` that are not valid.
    pub(super) fn invalid(&self, paths: &BTreeSet<StorePath>) -> Result<HashSet<StorePath>> {
        let all: Vec<StorePath> = paths.iter().cloned().collect();
        let valid = self.valid(&all)?;
        let both = all.into_iter().zip(valid);
        Ok(both
            .filter(|(_, valid)| !valid)
            .map(|(path, _)| path)
            .collect())
    }
}
