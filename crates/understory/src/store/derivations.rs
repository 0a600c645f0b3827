//! Derivations among the paths that are published: their outputs are recorded, as Nix does, after
//! the same checks.

use super::Store;
use crate::{Error, Result};
use std::collections::HashMap;
use understory_castore::Node;
use understory_nix::derivation::{Derivation, HashModulo};
use understory_nix::{StorePath, StorePathName};

/// Longest `.drv` that is read. The largest of nixpkgs are a few MiB.
const DERIVATION_BYTES_MAX: u64 = 256 << 20;

/// An output's name and its path, if the derivation says it.
pub(super) type Output = (String, Option<StorePath>);

impl Store {
    /// Outputs of the derivations among `paths`, in their order; empty for other paths. Contents must
    /// be readable; inputs must be valid or among `paths`.
    ///
    /// # Errors
    /// Malformed derivation; one whose output paths are not those that it makes.
    pub(super) fn derivation_outputs_of(
        &self,
        paths: &[(&StorePath, &Node)],
    ) -> Result<Vec<Vec<Output>>> {
        let mut outputs = vec![Vec::new(); paths.len()];
        if !paths.iter().any(|(path, _)| path.is_derivation()) {
            return Ok(outputs);
        }
        let roots: HashMap<&StorePath, &Node> = paths
            .iter()
            .filter(|(path, _)| path.is_derivation())
            .copied()
            .collect();
        let load = |path: &StorePath| -> std::result::Result<Derivation, String> {
            let stored;
            let root = match roots.get(path) {
                Some(root) => *root,
                None => match self.path(path).map_err(|e| e.chain())? {
                    Some(row) => {
                        stored = row;
                        &stored.root
                    }
                    None => return Err(self.not_valid(path).to_string()),
                },
            };
            self.read_derivation(path, root).map_err(|e| e.chain())
        };
        let mut modulo = HashModulo::new(self.store_dir().clone(), load);
        for (index, (path, root)) in paths.iter().enumerate() {
            if !path.is_derivation() {
                continue;
            }
            let derivation = self.read_derivation(path, root)?;
            let wrong = |error: understory_nix::derivation::DerivationError| {
                Error::user(format!("'{}': {error}", self.store_dir().print(path)))
            };
            modulo.check(path, &derivation).map_err(wrong)?;
            let paths = derivation
                .static_output_paths(self.store_dir())
                .map_err(wrong)?;
            outputs[index] = paths.into_iter().collect();
        }
        Ok(outputs)
    }

    /// Reads and parses the derivation `path`, whose content is `root`.
    ///
    /// # Errors
    /// Not a file, malformed, castore error.
    pub(crate) fn read_derivation(&self, path: &StorePath, root: &Node) -> Result<Derivation> {
        let wrong = |reason: &str| {
            Error::user(format!(
                "derivation '{}' {reason}",
                self.store_dir().print(path)
            ))
        };
        let Node::File { digest, size, .. } = root else {
            return Err(wrong("is not a regular file"));
        };
        if *size > DERIVATION_BYTES_MAX {
            return Err(wrong(&format!(
                "has {size} bytes, expected at most {DERIVATION_BYTES_MAX}"
            )));
        }
        let mut text = Vec::new();
        crate::nar::read_blob(self.castore(), digest, *size, &mut Vec::new(), |piece| {
            text.extend_from_slice(piece);
            Ok(())
        })?;
        let name = path.name().strip_suffix(".drv").unwrap_or(path.name());
        let name = StorePathName::new(name)?;
        Derivation::parse(self.store_dir(), &name, &text)
            .map_err(|e| wrong(&format!("cannot be read: {e}")))
    }
}
