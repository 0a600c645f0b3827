//! The closure of what is wanted: a breadth-first walk over narinfos, one batch of questions for each level.

use super::Sink;
use super::files::Context;
use super::find::{Candidate, Finder, Say};
use crate::Result;
use std::collections::{BTreeMap, HashMap, HashSet};
use understory_nix::{ContentAddress, StorePath};

/// What is known of paths.
#[derive(Default)]
pub(super) struct Plan {
    /// Those that can be fetched.
    pub(super) candidates: HashMap<StorePath, Candidate>,
    /// Those that are valid.
    pub(super) valid: HashSet<StorePath>,
    /// Those that nobody has.
    pub(super) missing: HashSet<StorePath>,
}

impl Plan {
    fn knows(&self, path: &StorePath) -> bool {
        self.candidates.contains_key(path)
            || self.valid.contains(path)
            || self.missing.contains(path)
    }

    /// Adds paths and what they refer to. Returns the new candidates.
    ///
    /// # Errors
    /// Interrupted; the sink's.
    pub(super) fn extend<S: Sink>(
        &mut self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        finder: &Finder<'_>,
        sink: &S,
        context: Context<'_>,
    ) -> Result<Vec<StorePath>> {
        let mut fresh = Vec::new();
        let mut level = paths.clone();
        level.retain(|path, _| !self.knows(path));
        while !level.is_empty() {
            context.cancel.check()?;
            let all: Vec<StorePath> = level.keys().cloned().collect();
            let valid = sink.valid(&all)?;
            level.retain(|path, _| !valid.contains(path));
            self.valid.extend(valid);
            let mut found = finder.find(&level, Say::Why, context)?;
            let mut next = BTreeMap::new();
            for path in std::mem::take(&mut level).into_keys() {
                match found.remove(&path) {
                    None => {
                        self.missing.insert(path);
                    }
                    Some(candidate) => {
                        for reference in &candidate.info.references {
                            next.insert(reference.clone(), None);
                        }
                        fresh.push(path.clone());
                        self.candidates.insert(path, candidate);
                    }
                }
            }
            next.retain(|path, _| !self.knows(path));
            level = next;
        }
        Ok(fresh)
    }
}
