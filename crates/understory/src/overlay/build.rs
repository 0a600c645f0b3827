//! Builds: what must be built, what can be substituted first, and the builder for the rest.
//!
//! A request goes through three steps. First everything that it really needs and that substituters have is
//! substituted, into the castore where there is one: what is wanted itself, else what is needed to build it. If all is
//! valid then, it is answered. Else it goes to the builder whole, because only that knows what it needs; what it builds
//! is written through the merged directory and registered in U by itself, so it is valid when the builder answers. The
//! builder may substitute, too: what only a build in progress can know to be needed (content-addressed and dynamic
//! derivations) lands in the upper.
//!
//! Messages are those of Nix 2.34.8.

mod plan;

use super::session::{Session, lock};
use crate::builder::BuilderSession;
use crate::daemon::{Operations, Reporter};
use crate::error::ErrorKind;
use crate::{Error, Result};
use plan::{Plan, Question, allows_substitutes, no_substituter};
use std::collections::{BTreeMap, BTreeSet};
use understory_nix::derivation::DerivationOutput;
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, BuildStatus, DerivedPath, DrvOutput, KeyedBuildResult,
    MissingInfo, OutputsSpec, Verbosity, WireRealisation,
};
use understory_nix::{ContentAddress, StoreDir, StorePath};

/// Stands for a hash modulo that cannot be computed, as in Nix 2.35: clients use the output's name only.
const NO_HASH: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// Outputs by name: what they are and what they became.
type Outputs = BTreeMap<String, StorePath>;

/// What became of a request before anything is built.
enum State {
    /// All of it is valid: the derivation and its outputs (none for an opaque path).
    Valid(StorePath, Outputs),
    /// It must be built.
    Missing,
    /// It cannot be had.
    Failed(BuildStatus, Error),
}

/// What substitution has done for requests.
#[derive(Default)]
struct Prepared {
    /// Valid since.
    substituted: BTreeSet<StorePath>,
    /// What substituters offered and could not deliver.
    failed: BTreeMap<StorePath, Error>,
    /// What substituters offer, but not what it refers to.
    incomplete: BTreeSet<StorePath>,
}

impl Session {
    /// QueryMissing.
    pub(super) fn missing(
        &self,
        paths: &[DerivedPath],
        reporter: &dyn Reporter,
    ) -> Result<MissingInfo> {
        let substituters = self.substituters(reporter)?;
        let question = Question {
            substituters: &substituters,
            always_allow: self.always_allow_substitutes(),
            fetch_derivations: false,
            given_up: &BTreeSet::new(),
            addresses: &BTreeMap::new(),
        };
        Ok(self.plan(paths, &question, reporter)?.missing)
    }

    /// EnsurePath.
    pub(super) fn ensure(&self, path: &StorePath, reporter: &dyn Reporter) -> Result<()> {
        let request = DerivedPath::Opaque(path.clone());
        let mut prepared = self.prepare(std::slice::from_ref(&request), reporter)?;
        match self.state(&request, &mut prepared, reporter)? {
            State::Failed(_, error) => Err(error),
            State::Valid(..) | State::Missing => Ok(()),
        }
    }

    /// BuildPaths: substitutes what it can, then lets the builder do the rest, if there is a rest.
    pub(super) fn build(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        if mode == BuildMode::Normal {
            let mut prepared = self.prepare(paths, reporter)?;
            let mut failed: Vec<(&DerivedPath, Error)> = Vec::new();
            let mut to_build = false;
            for path in paths {
                match self.state(path, &mut prepared, reporter)? {
                    State::Valid(..) => {}
                    State::Missing => to_build = true,
                    State::Failed(_, error) => failed.push((path, error)),
                }
            }
            // One that fails stops the others, unless the client wants all of it done; then the builder reports all.
            if !to_build || !(failed.is_empty() || self.keep_going()) {
                return self.one_error(failed, reporter);
            }
        }
        self.with_builder(|builder| builder.build_paths(paths, mode, reporter))
            .map_err(|error| self.cannot_build(paths, error))
    }

    /// BuildPathsWithResults.
    pub(super) fn build_with_results(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>> {
        let mut prepared = Prepared::default();
        let mut to_build = mode != BuildMode::Normal;
        let mut results = Vec::new();
        if mode == BuildMode::Normal {
            prepared = self.prepare(paths, reporter)?;
            let mut failed = false;
            for path in paths {
                let result = match self.state(path, &mut prepared, reporter)? {
                    State::Valid(drv, outputs) => {
                        self.valid_result(&drv, outputs, &prepared, realisation_with_path)?
                    }
                    State::Missing => {
                        to_build = true;
                        continue;
                    }
                    State::Failed(status, error) => {
                        failed = true;
                        BuildResult::new(status, error.chain())
                    }
                };
                let path = path.clone();
                results.push(KeyedBuildResult { path, result });
            }
            if !to_build || (failed && !self.keep_going()) {
                // As Nix: what was never begun has no result.
                return Ok(results);
            }
        }
        let mut built = self
            .with_builder(|builder| {
                builder.build_paths_with_results(paths, mode, realisation_with_path, reporter)
            })
            .map_err(|error| self.cannot_build(paths, error))?;
        for KeyedBuildResult { path, result } in &mut built {
            let (DerivedPath::Opaque(drv) | DerivedPath::Built { drv, .. }) = &*path;
            self.finish_result(drv, result, &prepared, realisation_with_path);
        }
        Ok(built)
    }

    /// BuildDerivation.
    pub(super) fn build_one(
        &self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<BuildResult> {
        let mut prepared = Prepared::default();
        if mode == BuildMode::Normal {
            if let Some(outputs) = self.outputs_of_basic(derivation)? {
                let substituters = self.substituters(reporter)?;
                let allowed =
                    self.always_allow_substitutes() || allows_substitutes(&derivation.environment);
                let wanted: Vec<StorePath> = outputs.values().cloned().collect();
                self.roots.add(&wanted)?;
                if allowed && !substituters.is_empty() {
                    // All or none: with one missing it is built in any case.
                    let missing = self.overlay.invalid(&wanted.iter().cloned().collect())?;
                    let addresses = addresses_of_basic(self.overlay.store_dir(), derivation);
                    let asked = missing.into_iter().map(|path| {
                        let ca = addresses.get(&path).copied();
                        (path, ca)
                    });
                    let asked = asked.collect();
                    let offers = substituters.query(&asked, false, reporter)?;
                    if offers.len() == asked.len() {
                        let paths = opaque(asked.into_keys());
                        prepared = self.prepare_addressed(&paths, &addresses, reporter)?;
                    }
                }
                let lost = wanted
                    .iter()
                    .find(|path| prepared.failed.contains_key(path));
                if let Some(lost) = lost
                    && !self.fallback(reporter)?
                {
                    let cause = prepared.failed.remove(lost);
                    let error = self.substitutes_failed(drv, cause);
                    return Ok(BuildResult::new(
                        BuildStatus::TransientFailure,
                        error.chain(),
                    ));
                }
                if self.overlay.valid(&wanted)?.into_iter().all(|valid| valid) {
                    return self.valid_result(drv, outputs, &prepared, realisation_with_path);
                }
            }
            self.prepare(&opaque(derivation.input_sources.iter().cloned()), reporter)?;
        }
        let mut result = self
            .with_builder(|builder| {
                builder.build_derivation(drv, derivation, mode, realisation_with_path, reporter)
            })
            .map_err(|error| self.cannot_build(&opaque([drv.clone()]), error))?;
        self.finish_result(drv, &mut result, &prepared, realisation_with_path);
        Ok(result)
    }

    // -- substitution

    /// Substitutes what the requests need, as far as it can be had.
    fn prepare(&self, paths: &[DerivedPath], reporter: &dyn Reporter) -> Result<Prepared> {
        self.prepare_addressed(paths, &BTreeMap::new(), reporter)
    }

    /// [`Session::prepare`] with what makes opaque paths among them, where that is known.
    fn prepare_addressed(
        &self,
        paths: &[DerivedPath],
        addresses: &BTreeMap<StorePath, ContentAddress>,
        reporter: &dyn Reporter,
    ) -> Result<Prepared> {
        // Before anybody looks whether they are valid: what a client is told to be there stays while it is connected.
        let named: Vec<StorePath> = paths
            .iter()
            .map(|(DerivedPath::Opaque(path) | DerivedPath::Built { drv: path, .. })| path.clone())
            .collect();
        self.roots.add(&named)?;
        let substituters = self.substituters(reporter)?;
        let mut prepared = Prepared::default();
        let mut given_up = BTreeSet::new();
        // Each round fetches or gives up something new; more than one is needed after failures and for derivations
        // that are substituted themselves.
        while !substituters.is_empty() {
            let question = Question {
                substituters: &substituters,
                always_allow: self.always_allow_substitutes(),
                fetch_derivations: true,
                given_up: &given_up,
                addresses,
            };
            let plan = self.plan(paths, &question, reporter)?;
            let incomplete = plan.incomplete();
            let Plan {
                mut roots,
                realisations,
                ..
            } = plan;
            if roots.is_empty() {
                self.register_realisations(&realisations)?;
                break;
            }
            roots.retain(|root, _| !incomplete.contains(root));
            given_up.extend(incomplete.iter().cloned());
            prepared.incomplete.extend(incomplete);
            if roots.is_empty() {
                continue;
            }
            let outcome = self.overlay.substitute(
                &roots,
                &substituters,
                &self.roots,
                self.roots_below.as_ref(),
                reporter,
            )?;
            prepared.substituted.extend(outcome.substituted);
            let all: Vec<StorePath> = roots.into_keys().collect();
            let valid = self.overlay.valid(&all)?;
            let mut failed = outcome.failed;
            for (root, valid) in all.into_iter().zip(valid) {
                if !valid {
                    let error = failed
                        .remove(&root)
                        .unwrap_or_else(|| no_substituter(self, &root));
                    given_up.insert(root.clone());
                    prepared.failed.insert(root, error);
                }
            }
            self.register_realisations(&realisations)?;
        }
        Ok(prepared)
    }

    /// Registers what substituters say of outputs whose paths are valid.
    fn register_realisations(&self, realisations: &[WireRealisation]) -> Result<()> {
        for realisation in realisations {
            if self.overlay.is_valid(&realisation.out_path)?
                && self.overlay.realisation(&realisation.id)?.is_none()
            {
                self.register_realisation(realisation)?;
            }
        }
        Ok(())
    }

    /// What became of a request.
    fn state(
        &self,
        path: &DerivedPath,
        prepared: &mut Prepared,
        reporter: &dyn Reporter,
    ) -> Result<State> {
        let DerivedPath::Built {
            drv,
            through,
            outputs: wanted,
        } = path
        else {
            let DerivedPath::Opaque(path) = path else {
                return Ok(State::Missing);
            };
            if self.overlay.is_valid(path)? {
                return Ok(State::Valid(path.clone(), Outputs::new()));
            }
            let (status, error) = if let Some(error) = prepared.failed.remove(path) {
                (BuildStatus::TransientFailure, error)
            } else if prepared.incomplete.contains(path) {
                let path = self.overlay.store_dir().print(path);
                let text = format!("some references of path '{path}' could not be realised");
                (BuildStatus::DependencyFailed, Error::user(text))
            } else {
                (BuildStatus::NoSubstituters, no_substituter(self, path))
            };
            return Ok(State::Failed(status, error));
        };
        let mut drv = drv.clone();
        for output in through {
            if !self.overlay.is_valid(&drv)? {
                return Ok(State::Missing);
            }
            match self.overlay.output_map(&drv)?.remove(output).flatten() {
                Some(made) => drv = made,
                None => return Ok(State::Missing),
            }
        }
        if !self.overlay.is_valid(&drv)? {
            if through.is_empty() {
                let mut error = Error::user(format!(
                    "failed to obtain derivation of '{}'",
                    path.print(self.overlay.store_dir())
                        .split('!')
                        .next()
                        .unwrap_or_default()
                ));
                if let Some(cause) = prepared.failed.remove(&drv) {
                    error = error.with_source(cause.chain());
                }
                return Ok(State::Failed(BuildStatus::MiscFailure, error));
            }
            return Ok(State::Missing);
        }
        let mut outputs = self.overlay.output_map(&drv)?;
        if let OutputsSpec::Names(names) = wanted {
            if let Some(unknown) = names.iter().find(|name| !outputs.contains_key(*name)) {
                return Ok(State::Failed(
                    BuildStatus::MiscFailure,
                    Error::user(format!(
                        "derivation '{}' does not have output '{unknown}'",
                        self.overlay.store_dir().print(&drv)
                    )),
                ));
            }
            outputs.retain(|name, _| names.contains(name));
        }
        let lost = outputs
            .values()
            .flatten()
            .find(|path| prepared.failed.contains_key(*path))
            .cloned();
        if let Some(lost) = lost
            && !self.fallback(reporter)?
        {
            let cause = prepared.failed.remove(&lost);
            return Ok(State::Failed(
                BuildStatus::TransientFailure,
                self.substitutes_failed(&drv, cause),
            ));
        }
        let known: BTreeMap<String, StorePath> = outputs
            .iter()
            .filter_map(|(name, path)| Some((name.clone(), path.clone()?)))
            .collect();
        self.roots
            .add(&known.values().cloned().collect::<Vec<_>>())?;
        if known.len() < outputs.len()
            || !self
                .overlay
                .invalid(&known.values().cloned().collect())?
                .is_empty()
        {
            return Ok(State::Missing);
        }
        Ok(State::Valid(drv, known))
    }

    /// Paths of all outputs of a derivation that came without its file, if all are known.
    fn outputs_of_basic(&self, derivation: &BasicDerivation) -> Result<Option<Outputs>> {
        let dir = self.overlay.store_dir();
        let mut outputs = Outputs::new();
        for (name, output) in &derivation.outputs {
            if output.path.is_empty() {
                return Ok(None);
            }
            let path = dir.parse(output.path.as_bytes()).map_err(Error::from)?;
            outputs.insert(name.clone(), path);
        }
        Ok((!outputs.is_empty()).then_some(outputs))
    }

    // -- the client's settings

    fn keep_going(&self) -> bool {
        lock(&self.options)
            .as_ref()
            .is_some_and(|options| options.keep_going)
    }

    fn fallback(&self, reporter: &dyn Reporter) -> Result<bool> {
        let chosen = lock(&self.options)
            .as_ref()
            .is_some_and(|options| options.try_fallback);
        Ok(chosen || self.substituters(reporter)?.settings().fallback)
    }

    /// `always-allow-substitutes`, which only clients with trust may set.
    fn always_allow_substitutes(&self) -> bool {
        self.client.trusted
            && lock(&self.options).as_ref().is_some_and(|options| {
                options
                    .overrides
                    .get(b"always-allow-substitutes".as_slice())
                    .is_some_and(|value| value == b"true" || value == b"1")
            })
    }

    // -- the builder

    /// Lends the client's builder, which is started if there is none, with the client's settings.
    fn with_builder<T>(
        &self,
        work: impl FnOnce(&mut dyn BuilderSession) -> Result<T>,
    ) -> Result<T> {
        let options = lock(&self.options).clone();
        let mut held = lock(&self.builder);
        let builder = match &mut *held {
            Some(builder) => builder,
            none => none.insert(self.overlay.inner.builder.connect(&self.client)?),
        };
        if let Some(options) = &options {
            builder.set_options(options)?;
        }
        work(&mut **builder)
    }

    /// Names what was to be built where the machine stands in the way; what Nix says stays as it is.
    fn cannot_build(&self, paths: &[DerivedPath], error: Error) -> Error {
        if error.kind() != ErrorKind::Environment {
            return error;
        }
        let dir = self.overlay.store_dir();
        let names: Vec<String> = paths
            .iter()
            .map(|path| format!("'{}'", path.print(dir)))
            .collect();
        let out = Error::environment(format!("cannot build {}", names.join(", ")))
            .with_source(error.chain());
        match error.hint() {
            Some(hint) => out.with_hint(hint),
            None => out,
        }
    }

    // -- results

    /// The error of a request: the only one, or that several have failed, with the errors said before.
    fn one_error(
        &self,
        mut failed: Vec<(&DerivedPath, Error)>,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        if failed.len() <= 1 {
            return failed.pop().map_or(Ok(()), |(_, error)| Err(error));
        }
        let dir = self.overlay.store_dir();
        let mut names = BTreeSet::new();
        for (path, error) in &failed {
            reporter.say(Verbosity::Error, &format!("error: {}", error.chain()));
            let name = match path {
                DerivedPath::Opaque(path) => dir.print(path),
                DerivedPath::Built { drv, through, .. } => {
                    let mut name = dir.print(drv);
                    for output in through {
                        name.push('^');
                        name.push_str(output);
                    }
                    name
                }
            };
            names.insert(format!("'{name}'"));
        }
        let names: Vec<String> = names.into_iter().collect();
        Err(Error::user(format!("build of {} failed", names.join(", "))))
    }

    fn substitutes_failed(&self, drv: &StorePath, cause: Option<Error>) -> Error {
        let error = Error::user(format!(
            "some substitutes for the outputs of derivation '{}' failed (usually happens due to networking issues); \
             try '--fallback' to build derivation from source",
            self.overlay.store_dir().print(drv)
        ));
        match cause {
            Some(cause) => error.with_source(cause.chain()),
            None => error,
        }
    }

    /// The result of something that is valid.
    fn valid_result(
        &self,
        path: &StorePath,
        outputs: Outputs,
        prepared: &Prepared,
        with_path: bool,
    ) -> Result<BuildResult> {
        let fetched = |path: &StorePath| prepared.substituted.contains(path);
        let status = if outputs.values().any(fetched) || (outputs.is_empty() && fetched(path)) {
            BuildStatus::Substituted
        } else {
            BuildStatus::AlreadyValid
        };
        let mut result = BuildResult::new(status, "");
        let mut ids = BTreeMap::new();
        let mut floating = BTreeSet::new();
        if !outputs.is_empty()
            && self.overlay.is_valid(path)?
            && let Ok(derivation) = self.overlay.derivation(path)
        {
            let is_floating = |output: &DerivationOutput| {
                !matches!(
                    output,
                    DerivationOutput::InputAddressed(_) | DerivationOutput::Fixed(_)
                )
            };
            let names = derivation.outputs.iter();
            floating = names
                .filter(|(_, output)| is_floating(output))
                .map(|(name, _)| name.clone())
                .collect();
            if !with_path {
                ids = self.overlay.output_ids(path, &derivation);
            }
        }
        for (output, out_path) in outputs {
            let id = key(path, &output, with_path, &mut ids);
            let known = if floating.contains(&output) {
                self.overlay.realisation(&id)?
            } else {
                None
            };
            let realisation = known.filter(|known| known.out_path == out_path);
            let realisation = realisation.unwrap_or(WireRealisation {
                id,
                out_path,
                signatures: BTreeSet::new(),
            });
            result.built_outputs.insert(output, realisation);
        }
        Ok(result)
    }

    /// Says what we have fetched before the builder was asked, and gives the outputs' keys the form that the client
    /// speaks.
    fn finish_result(
        &self,
        drv: &StorePath,
        result: &mut BuildResult,
        prepared: &Prepared,
        with_path: bool,
    ) {
        let outputs = result.built_outputs.values();
        let mut fetched = outputs
            .map(|output| &output.out_path)
            .chain(result.built_outputs.is_empty().then_some(drv));
        if result.status == BuildStatus::AlreadyValid
            && fetched.any(|path| prepared.substituted.contains(path))
        {
            result.status = BuildStatus::Substituted;
        }
        let fits = |id: &DrvOutput| match id {
            DrvOutput::Path { .. } => with_path,
            DrvOutput::Hash(id) => !with_path && !id.starts_with(NO_HASH),
        };
        if result.built_outputs.values().all(|output| fits(&output.id)) {
            return;
        }
        let mut ids = BTreeMap::new();
        if !with_path && let Ok(derivation) = self.overlay.derivation(drv) {
            ids = self.overlay.output_ids(drv, &derivation);
        }
        for (output, realisation) in &mut result.built_outputs {
            realisation.id = key(drv, output, with_path, &mut ids);
        }
    }
}

fn opaque(paths: impl IntoIterator<Item = StorePath>) -> Vec<DerivedPath> {
    paths.into_iter().map(DerivedPath::Opaque).collect()
}

/// What makes the outputs whose contents are known beforehand.
fn addresses_of_basic(
    dir: &StoreDir,
    derivation: &BasicDerivation,
) -> BTreeMap<StorePath, ContentAddress> {
    let fixed = derivation.outputs.values().filter_map(|output| {
        match DerivationOutput::parse(dir, &output.path, &output.hash_algo, &output.hash) {
            Ok(DerivationOutput::Fixed(ca)) => Some((dir.parse(output.path.as_bytes()).ok()?, ca)),
            _ => None,
        }
    });
    fixed.collect()
}

/// The key of an output in the form that the client speaks.
fn key(
    drv: &StorePath,
    output: &str,
    with_path: bool,
    ids: &mut BTreeMap<String, DrvOutput>,
) -> DrvOutput {
    if with_path {
        return DrvOutput::Path {
            drv: drv.clone(),
            output: output.to_owned(),
        };
    }
    ids.remove(output)
        .unwrap_or_else(|| DrvOutput::Hash(format!("{NO_HASH}!{output}")))
}
