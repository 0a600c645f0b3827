//! Derivations in the store: what they need, what their outputs are called and where they are.
//!
//! Output paths that follow from the derivation are in the database. Those of content-addressing
//! derivations are known once somebody has registered a realisation; its key is made of the hash
//! modulo, for which the derivation and all its inputs are read.

use super::Session;
use crate::{Error, Result};
use std::collections::BTreeMap;
use understory_castore::Node;
use understory_nix::derivation::{DRV_BYTES_MAX, Derivation, HashModulo};
use understory_nix::worker::{DerivedPath, DrvOutput, OutputsSpec};
use understory_nix::{StorePath, StorePathName};

impl Session {
    /// Outputs of a valid derivation, with what realisations tell; `None` if it is not valid.
    pub(super) fn outputs_of(
        &self,
        drv: &StorePath,
    ) -> Result<Option<BTreeMap<String, Option<StorePath>>>> {
        let Some(mut outputs) = self.store.derivation_outputs(drv)? else {
            return Ok(None);
        };
        if outputs.values().any(Option::is_none) {
            let ids = self.output_ids(drv);
            for (name, path) in &mut outputs {
                if path.is_some() {
                    continue;
                }
                let by_path = DrvOutput::Path {
                    drv: drv.clone(),
                    output: name.clone(),
                };
                let keys = ids.get(name).cloned().into_iter().chain([by_path.id()]);
                for key in keys {
                    if let Some(realisation) = self.store.realisation(&key)? {
                        *path = Some(realisation.out_path);
                        break;
                    }
                }
            }
        }
        Ok(Some(outputs))
    }

    /// What a valid derivation needs of other derivations; nothing if it cannot be read.
    pub(super) fn inputs_of(&self, drv: &StorePath) -> Vec<DerivedPath> {
        let derivation = match self.derivation(drv) {
            Ok(derivation) => derivation,
            Err(error) => {
                tracing::info!(%drv, error = error.chain(), "a derivation that cannot be read");
                return Vec::new();
            }
        };
        derivation
            .input_derivations
            .into_iter()
            .filter(|(_, inputs)| !inputs.outputs.is_empty())
            .map(|(drv, inputs)| DerivedPath::Built {
                drv,
                through: Vec::new(),
                outputs: OutputsSpec::Names(inputs.outputs),
            })
            .collect()
    }

    /// Keys of its outputs' realisations up to Nix 2.34, by output; empty if it or an input of it
    /// cannot be read.
    pub(super) fn output_ids(&self, drv: &StorePath) -> BTreeMap<String, String> {
        let load = |path: &StorePath| self.derivation(path).map_err(|error| error.chain());
        let hashes = load(drv).and_then(|derivation| {
            HashModulo::new(self.store.store_dir().clone(), load)
                .hashes(&derivation, true)
                .map_err(|error| error.to_string())
        });
        match hashes {
            Ok(hashes) => hashes
                .outputs
                .into_iter()
                .map(|(name, hash)| {
                    let id = format!("{}:{}!{name}", hash.algorithm().name(), hash.to_base16());
                    (name, id)
                })
                .collect(),
            Err(error) => {
                tracing::debug!(%drv, error, "no hash modulo");
                BTreeMap::new()
            }
        }
    }

    fn derivation(&self, drv: &StorePath) -> Result<Derivation> {
        let row = self.store.path(drv)?.ok_or_else(|| self.not_valid(drv))?;
        let name = drv.name().strip_suffix(".drv");
        let (Node::File { digest, size, .. }, Some(name)) = (&row.root, name) else {
            return Err(Error::user(format!("{drv} is not a derivation")));
        };
        if *size > DRV_BYTES_MAX as u64 {
            return Err(Error::user(format!(
                "{drv} has {size} bytes, expected at most {DRV_BYTES_MAX}"
            )));
        }
        let mut text = vec![0; *size as usize];
        let blob = self.store.castore().blob(digest, *size)?;
        let mut at = 0;
        while at < text.len() {
            match blob.read_at(at as u64, &mut text[at..])? {
                0 => {
                    return Err(Error::corrupt(format!(
                        "{drv} ends after {at} of {size} bytes"
                    )));
                }
                count => at += count,
            }
        }
        Derivation::parse(self.store.store_dir(), &StorePathName::new(name)?, &text)
            .map_err(|error| Error::user(error.to_string()))
    }
}
