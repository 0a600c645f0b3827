//! What is missing for a request: what can be substituted, what must be built, what nobody has.
//!
//! The rules are Nix's (`queryMissing` of 2.34.8): a derivation whose wanted outputs are all valid needs nothing; one
//! whose missing outputs can all be substituted is not looked into; any other must be built, and so must what it
//! needs. The walk goes level by level, so that a level costs one question to U, one to each lower and one round of
//! parallel questions to the substituters, however wide it is.

use super::super::session::Session;
use crate::daemon::Reporter;
use crate::substitute::{Offer, Substituters};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use understory_nix::derivation::{Derivation, DerivationOutput, InputOutputs};
use understory_nix::worker::{DerivedPath, DrvOutput, MissingInfo, OutputsSpec, WireRealisation};
use understory_nix::{ContentAddress, StorePath};

/// What is missing.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// As clients ask for it.
    pub(super) missing: MissingInfo,
    /// What must be fetched, without what that refers to, with what makes the paths where that is known.
    pub(super) roots: BTreeMap<StorePath, Option<ContentAddress>>,
    /// Realisations by substituters of outputs among the roots.
    pub(super) realisations: Vec<WireRealisation>,
    /// What the substituters offer; `None` if they were asked in vain.
    offers: HashMap<StorePath, Option<Offer>>,
}

/// How to look.
pub(super) struct Question<'a> {
    pub(super) substituters: &'a Substituters,
    /// Settings `always-allow-substitutes`.
    pub(super) always_allow: bool,
    /// Derivations that are missing are fetched, not unknown.
    pub(super) fetch_derivations: bool,
    /// What has been tried in vain and counts as not offered.
    pub(super) given_up: &'a BTreeSet<StorePath>,
    /// What makes opaque paths, where that is known: those may come from a store with another directory.
    pub(super) addresses: &'a BTreeMap<StorePath, ContentAddress>,
}

/// A derivation of a level, not all of whose wanted outputs are valid.
struct Open {
    drv: StorePath,
    derivation: Derivation,
    /// Wanted outputs that are not valid, with what makes their paths.
    invalid: BTreeMap<StorePath, Option<ContentAddress>>,
    /// All paths of wanted outputs are known, and they may be substituted.
    substitutable: bool,
}

impl Session {
    /// Finds out what is missing for `paths`.
    ///
    /// # Errors
    /// Interrupted; a derivation that cannot be read; the store's.
    pub(super) fn plan(
        &self,
        paths: &[DerivedPath],
        question: &Question<'_>,
        reporter: &dyn Reporter,
    ) -> Result<Plan> {
        let mut plan = Plan::default();
        let mut seen: BTreeSet<DerivedPath> = paths.iter().cloned().collect();
        // Opaque paths of the first level are roots, those that follow are references.
        let address = |path: &StorePath| question.addresses.get(path).copied();
        let mut wanted: BTreeMap<StorePath, Option<ContentAddress>> = paths
            .iter()
            .filter_map(|path| match path {
                DerivedPath::Opaque(path) => Some((path.clone(), address(path))),
                DerivedPath::Built { .. } => None,
            })
            .collect();
        let mut level: Vec<DerivedPath> = seen.iter().cloned().collect();
        while !level.is_empty() {
            reporter.check()?;
            let mut next = Vec::new();
            let mut ask = BTreeMap::new();
            let mut opaque = self.invalid_opaque(&level)?;
            let mut open = Vec::new();
            for (drv, outputs) in self.whole_derivations(&level, &mut next)? {
                let Some(outputs) = outputs else {
                    if question.fetch_derivations {
                        wanted.insert(drv.clone(), None);
                        opaque.insert(drv);
                    } else {
                        plan.missing.unknown.insert(drv);
                    }
                    continue;
                };
                open.extend(self.open_derivation(drv, &outputs, question, &mut plan, reporter)?);
            }
            for path in &opaque {
                ask.insert(path.clone(), address(path));
            }
            for derivation in open.iter().filter(|open| open.substitutable) {
                ask.extend(derivation.invalid.clone());
            }
            plan.ask(ask, question, reporter)?;
            for path in opaque {
                match plan.offers.get(&path).and_then(Option::as_ref) {
                    None => {
                        plan.missing.unknown.insert(path);
                    }
                    Some(offer) => {
                        plan.missing.download_size += offer.download_size;
                        plan.missing.nar_size += offer.info.nar_size;
                        next.extend(
                            offer
                                .info
                                .references
                                .iter()
                                .cloned()
                                .map(DerivedPath::Opaque),
                        );
                        if let Some(ca) = wanted.get(&path) {
                            plan.roots.insert(path.clone(), *ca);
                        }
                        plan.missing.will_substitute.insert(path);
                    }
                }
            }
            for derivation in open {
                let offered = |path: &StorePath| matches!(plan.offers.get(path), Some(Some(_)));
                if derivation.substitutable && derivation.invalid.keys().all(offered) {
                    for (path, ca) in derivation.invalid {
                        wanted.insert(path.clone(), ca);
                        next.push(DerivedPath::Opaque(path));
                    }
                } else {
                    next.extend(inputs_of(&derivation.derivation));
                    plan.missing.will_build.insert(derivation.drv);
                }
            }
            // A reference that was seen as such may become a root, but is fetched in any case then.
            level = next
                .into_iter()
                .filter(|path| seen.insert(path.clone()))
                .collect();
        }
        Ok(plan)
    }

    /// Opaque paths of a level that are not valid.
    fn invalid_opaque(&self, level: &[DerivedPath]) -> Result<BTreeSet<StorePath>> {
        let paths = level.iter().filter_map(|path| match path {
            DerivedPath::Opaque(path) => Some(path.clone()),
            DerivedPath::Built { .. } => None,
        });
        let invalid = self.overlay.invalid(&paths.collect())?;
        Ok(invalid.into_iter().collect())
    }

    /// Derivations of a level with the outputs wanted; `None` for those that are not valid. A derivation that is to be
    /// made by another one first is replaced by that, or by itself if it is there already.
    #[allow(clippy::type_complexity, reason = "a list of pairs")]
    fn whole_derivations(
        &self,
        level: &[DerivedPath],
        next: &mut Vec<DerivedPath>,
    ) -> Result<Vec<(StorePath, Option<OutputsSpec>)>> {
        let built: Vec<(&StorePath, &[String], &OutputsSpec)> = level
            .iter()
            .filter_map(|path| match path {
                DerivedPath::Opaque(_) => None,
                DerivedPath::Built {
                    drv,
                    through,
                    outputs,
                } => Some((drv, &through[..], outputs)),
            })
            .collect();
        let drvs = built.iter().map(|(drv, ..)| (*drv).clone()).collect();
        let invalid = self.overlay.invalid(&drvs)?;
        let mut found = Vec::new();
        for (drv, through, outputs) in built {
            if invalid.contains(drv) {
                found.push((drv.clone(), None));
                continue;
            }
            let Some((first, rest)) = through.split_first() else {
                found.push((drv.clone(), Some(outputs.clone())));
                continue;
            };
            let made = self.overlay.output_map(drv)?.remove(first).flatten();
            next.push(match made {
                Some(made) if self.overlay.is_valid(&made)? => DerivedPath::Built {
                    drv: made,
                    through: rest.to_vec(),
                    outputs: outputs.clone(),
                },
                _ => DerivedPath::Built {
                    drv: drv.clone(),
                    through: Vec::new(),
                    outputs: OutputsSpec::Names([first.clone()].into()),
                },
            });
        }
        Ok(found)
    }

    /// Looks at a valid derivation; `None` if all outputs that are wanted are valid.
    fn open_derivation(
        &self,
        drv: StorePath,
        wanted: &OutputsSpec,
        question: &Question<'_>,
        plan: &mut Plan,
        reporter: &dyn Reporter,
    ) -> Result<Option<Open>> {
        let mut outputs = self.overlay.output_map(&drv)?;
        if let OutputsSpec::Names(names) = wanted {
            outputs.retain(|name, _| names.contains(name));
        }
        let known = outputs.values().flatten().cloned().collect();
        let invalid = self.overlay.invalid(&known)?;
        if invalid.is_empty() && outputs.values().all(Option::is_some) {
            return Ok(None);
        }
        let derivation = self.overlay.derivation(&drv)?;
        let mut substitutable = !question.substituters.is_empty()
            && (question.always_allow || allows_substitutes(&derivation.env));
        let mut open = BTreeMap::new();
        let mut realisations = Vec::new();
        if substitutable {
            let ids = if outputs.values().all(Option::is_some) {
                BTreeMap::new()
            } else {
                self.overlay.output_ids(&drv, &derivation)
            };
            for (name, path) in outputs {
                let path = match path {
                    Some(path) if !invalid.contains(&path) => continue,
                    Some(path) => path,
                    None => {
                        let by_path = DrvOutput::Path {
                            drv: drv.clone(),
                            output: name.clone(),
                        };
                        let ids = ids.get(&name).cloned().into_iter().chain([by_path]);
                        let Some(found) = first_realisation(question.substituters, ids, reporter)?
                        else {
                            substitutable = false;
                            break;
                        };
                        let path = found.out_path.clone();
                        realisations.push(found);
                        if self.overlay.is_valid(&path)? {
                            continue;
                        }
                        path
                    }
                };
                let ca = match derivation.outputs.get(&name) {
                    Some(DerivationOutput::Fixed(ca)) => Some(*ca),
                    _ => None,
                };
                open.insert(path, ca);
            }
        }
        if substitutable {
            plan.realisations.extend(realisations);
        }
        Ok(Some(Open {
            drv,
            derivation,
            invalid: open,
            substitutable,
        }))
    }
}

impl Plan {
    /// Asks the substituters for what they were not asked for yet.
    fn ask(
        &mut self,
        mut paths: BTreeMap<StorePath, Option<ContentAddress>>,
        question: &Question<'_>,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        paths.retain(|path, _| !self.offers.contains_key(path));
        let given_up = paths.keys().filter(|path| question.given_up.contains(path));
        let given_up: Vec<StorePath> = given_up.cloned().collect();
        for path in given_up {
            paths.remove(&path);
            self.offers.insert(path, None);
        }
        let mut found = question.substituters.query(&paths, false, reporter)?;
        for path in paths.into_keys() {
            let offer = found.remove(&path);
            self.offers.insert(path, offer);
        }
        Ok(())
    }

    /// Those of the roots that refer, directly or not, to something that nobody has: they cannot be fetched.
    pub(super) fn incomplete(&self) -> BTreeSet<StorePath> {
        let mut referrers: HashMap<&StorePath, Vec<&StorePath>> = HashMap::new();
        for (path, offer) in &self.offers {
            for reference in offer.iter().flat_map(|offer| &offer.info.references) {
                referrers.entry(reference).or_default().push(path);
            }
        }
        let mut open: Vec<&StorePath> = self.missing.unknown.iter().collect();
        let mut found: HashSet<&StorePath> = open.iter().copied().collect();
        while let Some(path) = open.pop() {
            for referrer in referrers.remove(path).unwrap_or_default() {
                if found.insert(referrer) {
                    open.push(referrer);
                }
            }
        }
        let roots = self.roots.keys();
        roots.filter(|root| found.contains(root)).cloned().collect()
    }
}

fn first_realisation(
    substituters: &Substituters,
    ids: impl Iterator<Item = DrvOutput>,
    reporter: &dyn Reporter,
) -> Result<Option<WireRealisation>> {
    for id in ids {
        if let Some(found) = substituters.realisation(&id, reporter)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// What a derivation needs of other derivations.
fn inputs_of(derivation: &Derivation) -> Vec<DerivedPath> {
    let mut found = Vec::new();
    for (drv, inputs) in &derivation.input_derivations {
        let mut open: Vec<(Vec<String>, &InputOutputs)> = vec![(Vec::new(), inputs)];
        while let Some((through, inputs)) = open.pop() {
            if !inputs.outputs.is_empty() {
                found.push(DerivedPath::Built {
                    drv: drv.clone(),
                    through: through.clone(),
                    outputs: OutputsSpec::Names(inputs.outputs.clone()),
                });
            }
            for (output, inputs) in &inputs.dynamic {
                let mut through = through.clone();
                through.push(output.clone());
                open.push((through, inputs));
            }
        }
    }
    found
}

/// The attribute `allowSubstitutes` of a derivation's environment, structured or not; true by default.
pub(super) fn allows_substitutes(env: &BTreeMap<Vec<u8>, Vec<u8>>) -> bool {
    if let Some(json) = env.get(b"__json".as_slice()) {
        let attributes = serde_json::from_slice::<serde_json::Value>(json);
        let allowed = attributes
            .ok()
            .and_then(|attributes| attributes.get("allowSubstitutes")?.as_bool());
        return allowed.unwrap_or(true);
    }
    env.get(b"allowSubstitutes".as_slice())
        .is_none_or(|value| value == b"1")
}

/// `path '…' is required, but there is no substituter that can build it`, as Nix says it.
pub(super) fn no_substituter(session: &Session, path: &StorePath) -> Error {
    Error::user(format!(
        "path '{}' is required, but there is no substituter that can build it",
        session.overlay.store_dir().print(path)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn substitution_can_be_forbidden() {
        let env = |name: &str, value: &str| {
            BTreeMap::from([(name.as_bytes().to_vec(), value.as_bytes().to_vec())])
        };
        for (env, allowed) in [
            (BTreeMap::new(), true),
            (env("allowSubstitutes", "1"), true),
            (env("allowSubstitutes", ""), false),
            (env("__json", "{\"allowSubstitutes\":false}"), false),
            (env("__json", "{\"allowSubstitutes\":true}"), true),
            (env("__json", "{}"), true),
        ] {
            assert_eq!(allows_substitutes(&env), allowed, "{env:?}");
        }
    }

    #[test]
    fn dynamic_inputs_are_walked() {
        let outputs = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let drv = StorePath::from_base_name("00000000000000000000000000000000-a.drv").unwrap();
        let mut derivation = Derivation {
            name: understory_nix::StorePathName::new("x").unwrap(),
            outputs: BTreeMap::new(),
            input_derivations: BTreeMap::new(),
            input_sources: BTreeSet::new(),
            platform: Vec::new(),
            builder: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
        };
        let inner = InputOutputs {
            outputs: outputs(&["dev"]),
            dynamic: BTreeMap::new(),
        };
        derivation.input_derivations.insert(
            drv.clone(),
            InputOutputs {
                outputs: outputs(&["out"]),
                dynamic: BTreeMap::from([("made".to_owned(), inner)]),
            },
        );
        let built = |through: &[&str], names: &[&str]| DerivedPath::Built {
            drv: drv.clone(),
            through: through.iter().map(|n| (*n).to_owned()).collect(),
            outputs: OutputsSpec::Names(outputs(names)),
        };
        assert_eq!(
            inputs_of(&derivation),
            [built(&[], &["out"]), built(&["made"], &["dev"])]
        );
    }
}
