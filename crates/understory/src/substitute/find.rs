//! Who may provide what: substituters in order, what they say, and whether it may be used.

use super::cancel::interrupted;
use super::files::{Context, Failure};
use super::source::{About, Found};
use super::substituter::Substituter;
use super::{Offer, Substituters};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use understory_nix::content_address::References;
use understory_nix::realisation::Realisation;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{ContentAddress, PathInfo, PublicKeys, Signature, StorePath};

/// A path and who may provide it.
#[derive(Clone)]
pub(super) struct Candidate {
    /// The path's metadata here.
    pub(super) info: Arc<PathInfo>,
    /// What the substituter says, with the path as it is there.
    pub(super) found: Arc<Found>,
    pub(super) opened: Opened,
    /// Where the substituter stands in the order.
    pub(super) rank: usize,
}

impl Candidate {
    pub(super) fn download_size(&self) -> u64 {
        self.found
            .file
            .as_ref()
            .and_then(|file| file.bytes)
            .unwrap_or(0)
    }
    pub(super) fn offer(self) -> Offer {
        Offer {
            download_size: self.download_size(),
            from: self.opened.substituter.name.clone(),
            info: self.info,
        }
    }
}

/// A substituter that has been reached.
#[derive(Clone)]
pub(super) struct Opened {
    pub(super) substituter: Arc<Substituter>,
    pub(super) about: Arc<About>,
}

/// Whether a client is told why an offer is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Say {
    /// Only asked whether there is one.
    Nothing,
    /// It is wanted.
    Why,
}

/// The substituters that can be used now, in order of priority.
pub(super) struct Finder<'a> {
    all: &'a Substituters,
    order: Vec<Opened>,
}

impl Substituters {
    /// Reaches those that have not been reached yet, all at once.
    pub(super) fn finder(&self, context: Context<'_>) -> Finder<'_> {
        std::thread::scope(|scope| {
            for substituter in self.list.iter().filter(|one| one.is_new()) {
                scope.spawn(move || {
                    let _entered = context.cancel.enter();
                    substituter.open(context);
                });
            }
        });
        let mut order: Vec<Opened> = self
            .list
            .iter()
            .filter_map(|substituter| {
                // Those that failed just now say nothing more.
                Some(Opened {
                    about: substituter.open(context)?,
                    substituter: substituter.clone(),
                })
            })
            .collect();
        order.sort_by_key(|opened| opened.about.priority);
        Finder { all: self, order }
    }
}

impl Finder<'_> {
    pub(super) fn retain(&mut self, keep: impl Fn(&About) -> bool) {
        self.order.retain(|opened| keep(&opened.about));
    }

    /// The first substituter for each path whose offer may be used.
    ///
    /// # Errors
    /// Interrupted.
    pub(super) fn find(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        say: Say,
        context: Context<'_>,
    ) -> Result<HashMap<StorePath, Candidate>> {
        let mut found = HashMap::new();
        let mut left: Vec<(&StorePath, Option<&ContentAddress>)> =
            paths.iter().map(|(path, ca)| (path, ca.as_ref())).collect();
        for rank in 0..self.order.len() {
            if left.is_empty() {
                break;
            }
            let answers = self.ask(rank, &left, say, context)?;
            left.retain(|(path, _)| !answers.contains_key(*path));
            found.extend(answers);
        }
        Ok(found)
    }
    /// The next substituter for a path after the one of that rank.
    ///
    /// # Errors
    /// Interrupted.
    pub(super) fn next(
        &self,
        path: &StorePath,
        ca: Option<&ContentAddress>,
        after: usize,
        context: Context<'_>,
    ) -> Result<Option<Candidate>> {
        for rank in after + 1..self.order.len() {
            let mut answers = self.ask(rank, &[(path, ca)], Say::Why, context)?;
            if let Some(candidate) = answers.remove(path) {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// Asks one substituter.
    fn ask(
        &self,
        rank: usize,
        paths: &[(&StorePath, Option<&ContentAddress>)],
        say: Say,
        context: Context<'_>,
    ) -> Result<HashMap<StorePath, Candidate>> {
        let opened = &self.order[rank];
        if !opened.substituter.is_usable() {
            return Ok(HashMap::new());
        }
        // Its paths and ours.
        let asked: Vec<(StorePath, &StorePath)> = paths
            .iter()
            .filter_map(|(path, ca)| Some((self.path_there(path, *ca, &opened.about)?, *path)))
            .collect();
        let there: Vec<StorePath> = asked.iter().map(|(there, _)| there.clone()).collect();
        let answers = match opened
            .substituter
            .source
            .lookup(&opened.about, &there, context)
        {
            Ok(answers) => answers,
            Err(Failure::Cancelled) => return Err(interrupted()),
            Err(failure) => {
                opened.substituter.disable(&failure.into_error(), context);
                return Ok(HashMap::new());
            }
        };
        context.cancel.check()?;
        let mut out = HashMap::new();
        for ((_, path), answer) in asked.into_iter().zip(answers) {
            let found = match answer {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) => {
                    context.warn(&error.chain());
                    continue;
                }
            };
            let info = if found.info.path == *path {
                sanitized(found.info.clone())
            } else if found.info.references.is_empty() {
                PathInfo {
                    path: path.clone(),
                    deriver: None,
                    ..sanitized(found.info.clone())
                }
            } else {
                continue;
            };
            if let Err(why) = self.may_use(&info, opened) {
                if say == Say::Why {
                    context.warn(&why);
                }
                continue;
            }
            out.insert(
                path.clone(),
                Candidate {
                    info: Arc::new(info),
                    found: Arc::new(found),
                    opened: opened.clone(),
                    rank,
                },
            );
        }
        Ok(out)
    }

    /// A path as it is in a store with perhaps another directory; `None` if it cannot be there.
    fn path_there(
        &self,
        path: &StorePath,
        ca: Option<&ContentAddress>,
        about: &About,
    ) -> Option<StorePath> {
        if about.store_dir == self.all.shared.store_dir {
            return Some(path.clone());
        }
        ca?.make_path(&about.store_dir, &path.to_name(), &References::default())
            .ok()
    }

    /// Whether an offer may be used; else why not, as Nix says it.
    fn may_use(&self, info: &PathInfo, opened: &Opened) -> Result<(), String> {
        let dir = &self.all.shared.store_dir;
        let settings = &self.all.settings;
        let verified = info.is_content_addressed(dir);
        if info.ca.is_some() && !verified {
            return Err(format!(
                "ignoring substitute for '{}' from '{}', because it claims to be content-addressed but isn't",
                dir.print(&info.path),
                opened.substituter.name
            ));
        }
        if !settings.require_signatures
            || opened.substituter.trusted
            || verified
            || info.is_signed_by(dir, &settings.trusted_public_keys)
        {
            return Ok(());
        }
        Err(format!(
            "ignoring substitute for '{}' from '{}', as it's not signed by any of the keys in 'trusted-public-keys'",
            dir.print(&info.path),
            opened.substituter.name
        ))
    }

    /// What an output became, as the first says whose word may be believed.
    ///
    /// # Errors
    /// Interrupted.
    pub(super) fn realisation(
        &self,
        id: &DrvOutput,
        context: Context<'_>,
    ) -> Result<Option<WireRealisation>> {
        for opened in &self.order {
            let substituter = &opened.substituter;
            if opened.about.store_dir != self.all.shared.store_dir || !substituter.is_usable() {
                continue;
            }
            let found = match substituter.source.realisation(&opened.about, id, context) {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(Failure::Cancelled) => return Err(interrupted()),
                Err(failure @ Failure::Passing { .. }) => {
                    substituter.disable(&failure.into_error(), context);
                    continue;
                }
                Err(failure) => {
                    context.warn(&failure.into_error().chain());
                    continue;
                }
            };
            let settings = &self.all.settings;
            if !settings.require_signatures
                || substituter.trusted
                || found.signatures.is_empty()
                || is_signed(&found, &settings.trusted_public_keys)
            {
                return Ok(Some(found));
            }
            context.warn(&format!(
                "ignoring realisation of '{}' from '{}', as it's not signed by any of the keys in 'trusted-public-keys'",
                id.id(),
                substituter.name
            ));
        }
        Ok(None)
    }
}

/// Without what only the other store can know.
fn sanitized(info: PathInfo) -> PathInfo {
    PathInfo {
        registration_time: 0,
        ultimate: false,
        ..info
    }
}

/// True if a trusted key has signed the realisation.
fn is_signed(realisation: &WireRealisation, keys: &PublicKeys) -> bool {
    let signatures = realisation
        .signatures
        .iter()
        .filter_map(|text| Signature::parse(text).ok());
    match &realisation.id {
        DrvOutput::Hash(id) => understory_nix::realisation::DrvOutput::parse(id).is_ok_and(|id| {
            Realisation {
                id,
                out_path: realisation.out_path.clone(),
                signatures: signatures.collect(),
                dependent_realisations: BTreeMap::new(),
            }
            .is_signed_by(keys)
        }),
        DrvOutput::Path { drv, output } => {
            // Keys in the order of their bytes; `serde_json` keeps the order given.
            let text = serde_json::json!({
                "key": { "drvPath": drv.base_name(), "outputName": output },
                "value": { "outPath": realisation.out_path.base_name() },
            })
            .to_string();
            let mut signatures = signatures;
            signatures.any(|signature| keys.verify(text.as_bytes(), &signature))
        }
    }
}

/// The error of a path that nobody offers, in Nix's words.
pub(super) fn nobody(all: &Substituters, path: &StorePath) -> Error {
    Error::user(format!(
        "path '{}' is required, but there is no substituter that can build it",
        all.shared.store_dir.print(path)
    ))
}
