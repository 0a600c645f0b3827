//! Hash modulo: the hash of a derivation in which fixed outputs stand for how they are made.
//!
//! A fixed output hashes as `fixed:out:<[r:]algorithm>:<hex>:<path>`. Any other derivation hashes
//! as its text, in which each input derivation is replaced by its own hash modulo. With masked
//! outputs that hash makes the paths of input-addressed outputs; if any input, however far, is
//! floating or impure, those paths are not known yet ("deferred").
//!
//! Cost: each derivation of the closure is loaded, printed and hashed once, then remembered.

use super::{
    Derivation, DerivationError, DerivationKind, DerivationOutput, InputOutputs, aterm,
    output_path_name,
};
use crate::content_address::make_store_path;
use crate::hash::{Hash, HashAlgorithm};
use crate::store_path::{StoreDir, StorePath};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Hashes modulo of a derivation's outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DerivationHashes {
    /// By output name; all the same unless the derivation is fixed.
    pub outputs: BTreeMap<String, Hash>,
    /// True if paths of input-addressed outputs are not known before inputs are built.
    pub is_deferred: bool,
}

/// Computes hashes modulo, and remembers those of input derivations.
///
/// `load` returns the derivation at a store path, or says why it cannot.
pub struct HashModulo<L> {
    dir: StoreDir,
    load: L,
    known: HashMap<StorePath, Arc<DerivationHashes>>,
}

impl<L: FnMut(&StorePath) -> Result<Derivation, String>> HashModulo<L> {
    /// Starts without any knowledge.
    pub fn new(dir: StoreDir, load: L) -> Self {
        Self {
            dir,
            load,
            known: HashMap::new(),
        }
    }

    /// Starts with what another one has learnt: see [`HashModulo::into_known`].
    pub fn with_known(
        dir: StoreDir,
        load: L,
        known: HashMap<StorePath, Arc<DerivationHashes>>,
    ) -> Self {
        Self { dir, load, known }
    }

    /// Returns the hashes of all input derivations that were looked at. They never change: a derivation's path says
    /// what is in it.
    pub fn into_known(self) -> HashMap<StorePath, Arc<DerivationHashes>> {
        self.known
    }

    /// Returns the hashes of a derivation; with `mask_outputs` those that make its output paths
    /// and that name its realisations.
    ///
    /// # Errors
    /// An input derivation that cannot be loaded, is malformed, or lacks an output asked for.
    pub fn hashes(
        &mut self,
        derivation: &Derivation,
        mask_outputs: bool,
    ) -> Result<DerivationHashes, DerivationError> {
        // A fixed output's hash does not depend on its inputs.
        if derivation.kind()? != DerivationKind::Fixed {
            self.learn_inputs(derivation)?;
        }
        self.hash_one(derivation, mask_outputs)
    }

    /// Returns the paths of all outputs as the derivation's contents make them: `None` for
    /// floating, impure and deferred outputs.
    ///
    /// # Errors
    /// As [`HashModulo::hashes`].
    pub fn output_paths(
        &mut self,
        derivation: &Derivation,
    ) -> Result<BTreeMap<String, Option<StorePath>>, DerivationError> {
        if derivation.kind()? != DerivationKind::InputAddressed {
            return derivation.static_output_paths(&self.dir);
        }
        let hashes = self.hashes(derivation, true)?;
        let path = |(name, hash): (String, Hash)| {
            let path_name = output_path_name(&derivation.name, &name)?;
            let path = make_store_path(&self.dir, &format!("output:{name}"), &hash, &path_name);
            Ok((name, (!hashes.is_deferred).then_some(path)))
        };
        hashes.outputs.into_iter().map(path).collect()
    }

    /// Checks what must hold before a derivation is registered: its name is that of `path`, its
    /// outputs go together, their paths are the ones that it makes, and its environment says the
    /// same paths.
    ///
    /// # Errors
    /// [`DerivationError::Invalid`] for a broken rule, else as [`HashModulo::hashes`].
    pub fn check(
        &mut self,
        path: &StorePath,
        derivation: &Derivation,
    ) -> Result<(), DerivationError> {
        let invalid = |reason: String| {
            Err(DerivationError::Invalid(format!(
                "derivation '{path}' {reason}"
            )))
        };
        if path.name().strip_suffix(".drv") != Some(derivation.name.as_str()) {
            return invalid(format!("has the name '{}'", derivation.name));
        }
        for (name, expected) in self.output_paths(derivation)? {
            let found = derivation.outputs[&name].path(&self.dir, &derivation.name, &name)?;
            match (&derivation.outputs[&name], &expected) {
                (DerivationOutput::InputAddressed(_), None) => {
                    return invalid(format!(
                        "has a path for output '{name}', which depends on unbuilt inputs"
                    ));
                }
                (DerivationOutput::InputAddressed(_), Some(expected))
                    if found.as_ref() != Some(expected) =>
                {
                    let found = found.map(|path| path.to_string()).unwrap_or_default();
                    return invalid(format!(
                        "has incorrect output '{found}', should be '{expected}'"
                    ));
                }
                _ => {}
            }
            // An environment without the variable is fine: structured attributes have none.
            let (Some(expected), Some(value)) = (found, derivation.env.get(name.as_bytes())) else {
                continue;
            };
            if *value != self.dir.print(&expected).into_bytes() {
                let value = value.escape_ascii();
                return invalid(format!(
                    "has incorrect environment variable '{name}' = '{value}', should be '{expected}'"
                ));
            }
        }
        Ok(())
    }

    /// Learns the hashes of all inputs, however far. A stack of its own, because closures can be
    /// deeper than a thread's stack allows.
    fn learn_inputs(&mut self, derivation: &Derivation) -> Result<(), DerivationError> {
        let mut open = HashSet::new();
        let mut stack: Vec<(StorePath, Option<Derivation>)> = derivation
            .input_derivations
            .keys()
            .map(|path| (path.clone(), None))
            .collect();
        while let Some((path, loaded)) = stack.pop() {
            if self.known.contains_key(&path) {
                continue;
            }
            if let Some(loaded) = loaded {
                let hashes = self.hash_one(&loaded, false)?;
                open.remove(&path);
                self.known.insert(path, Arc::new(hashes));
                continue;
            }
            if !open.insert(path.clone()) {
                return Err(DerivationError::Input {
                    path,
                    reason: "it is its own input".to_owned(),
                });
            }
            let loaded = (self.load)(&path).map_err(|reason| DerivationError::Input {
                path: path.clone(),
                reason,
            })?;
            let inputs: Vec<_> = if loaded.kind()? == DerivationKind::Fixed {
                Vec::new()
            } else {
                loaded
                    .input_derivations
                    .keys()
                    .filter(|input| !self.known.contains_key(*input))
                    .cloned()
                    .collect()
            };
            if let Some(input) = inputs.iter().find(|input| open.contains(*input)) {
                let reason = "it is its own input".to_owned();
                return Err(DerivationError::Input {
                    path: input.clone(),
                    reason,
                });
            }
            stack.push((path, Some(loaded)));
            stack.extend(inputs.into_iter().map(|input| (input, None)));
        }
        Ok(())
    }

    /// Hashes one derivation whose inputs are known.
    fn hash_one(
        &self,
        derivation: &Derivation,
        mask_outputs: bool,
    ) -> Result<DerivationHashes, DerivationError> {
        let kind = derivation.kind()?;
        if kind == DerivationKind::Fixed {
            let outputs = derivation.outputs.iter().map(|(name, output)| {
                let (path, algorithm, hash) = output.print(&self.dir, &derivation.name, name)?;
                let text = format!("fixed:out:{algorithm}:{hash}:{path}");
                Ok((
                    name.clone(),
                    Hash::of(HashAlgorithm::Sha256, text.as_bytes()),
                ))
            });
            let outputs = outputs.collect::<Result<_, DerivationError>>()?;
            return Ok(DerivationHashes {
                outputs,
                is_deferred: false,
            });
        }
        let mut is_deferred = kind != DerivationKind::InputAddressed;
        let mut inputs: BTreeMap<String, InputOutputs> = BTreeMap::new();
        for (path, needed) in &derivation.input_derivations {
            let Some(known) = self.known.get(path) else {
                return Err(DerivationError::Input {
                    path: path.clone(),
                    reason: "its hash is not known".to_owned(),
                });
            };
            is_deferred |= known.is_deferred || !needed.dynamic.is_empty();
            for name in &needed.outputs {
                let Some(hash) = known.outputs.get(name) else {
                    let reason = format!("it has no output '{name}'");
                    return Err(DerivationError::Input {
                        path: path.clone(),
                        reason,
                    });
                };
                inputs
                    .entry(hash.to_base16())
                    .or_default()
                    .outputs
                    .insert(name.clone());
            }
        }
        let text = aterm::print(derivation, &self.dir, mask_outputs, Some(&inputs))?;
        let hash = Hash::of(HashAlgorithm::Sha256, &text);
        let outputs = derivation
            .outputs
            .keys()
            .map(|name| (name.clone(), hash))
            .collect();
        Ok(DerivationHashes {
            outputs,
            is_deferred,
        })
    }
}
