//! Building: nothing is built here. What is there is reported as there, the rest is refused or reported
//! as missing, in Nix' words.

use super::Session;
use crate::daemon::backend::Reporter;
use crate::daemon::refusal_text;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use understory_nix::StorePath;
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, BuildStatus, DerivedPath, DrvOutput, KeyedBuildResult,
    MissingInfo, OutputsSpec, WireRealisation,
};

/// Stands for the hash modulo of a derivation that is not here to be hashed, as in Nix 2.35: clients
/// use the output's name only.
const NO_HASH: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// What was found of something to build.
enum Found {
    /// All of it is valid: outputs by name (none for an opaque path).
    Valid(BTreeMap<String, StorePath>),
    /// Not all.
    Missing(BuildStatus, Error),
}

impl Session {
    /// BuildPaths: an error if something is not there.
    pub(super) fn all_built(&self, paths: &[DerivedPath], mode: BuildMode) -> Result<()> {
        self.check_mode(mode)?;
        for path in paths {
            if let Found::Missing(_, error) = self.find(path)? {
                return Err(error);
            }
        }
        Ok(())
    }

    /// BuildPathsWithResults.
    pub(super) fn results(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        with_path: bool,
    ) -> Result<Vec<KeyedBuildResult>> {
        self.check_mode(mode)?;
        let mut results = Vec::new();
        for path in paths {
            let result = match self.find(path)? {
                Found::Valid(outputs) => {
                    let (DerivedPath::Opaque(drv) | DerivedPath::Built { drv, .. }) = path;
                    self.already_valid(drv, outputs, with_path)
                }
                Found::Missing(status, error) => BuildResult::new(status, refusal_text(&error)),
            };
            results.push(KeyedBuildResult {
                path: path.clone(),
                result,
            });
        }
        Ok(results)
    }

    /// BuildDerivation.
    pub(super) fn result_of(
        &self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        with_path: bool,
    ) -> Result<BuildResult> {
        self.check_mode(mode)?;
        let mut outputs = BTreeMap::new();
        for (name, output) in &derivation.outputs {
            if output.path.is_empty() {
                return Err(self.does_not_build(drv));
            }
            let path = self.store.store_dir().parse(output.path.as_bytes())?;
            if !self.store.is_valid(&path)? {
                return Err(self.does_not_build(drv));
            }
            outputs.insert(name.clone(), path);
        }
        Ok(self.already_valid(drv, outputs, with_path))
    }

    /// QueryMissing.
    pub(super) fn missing(
        &self,
        paths: &[DerivedPath],
        reporter: &dyn Reporter,
    ) -> Result<MissingInfo> {
        let mut missing = MissingInfo::default();
        let mut open: Vec<DerivedPath> = paths.to_vec();
        let mut seen: BTreeSet<DerivedPath> = BTreeSet::new();
        while let Some(path) = open.pop() {
            reporter.check()?;
            if !seen.insert(path.clone()) {
                continue;
            }
            match &path {
                DerivedPath::Opaque(path) => {
                    if !self.store.is_valid(path)? {
                        missing.unknown.insert(path.clone());
                    }
                }
                DerivedPath::Built { drv, .. } => {
                    if !self.store.is_valid(drv)? {
                        missing.unknown.insert(drv.clone());
                    } else if let Found::Missing(..) = self.find(&path)? {
                        missing.will_build.insert(drv.clone());
                        open.extend(self.inputs_of(drv));
                    }
                }
            }
        }
        Ok(missing)
    }

    fn check_mode(&self, mode: BuildMode) -> Result<()> {
        if mode == BuildMode::Normal {
            return Ok(());
        }
        Err(Error::user(
            "this store does not build, so it can neither repair nor check by building again",
        )
        .with_hint("do it in a store above this one"))
    }

    fn find(&self, path: &DerivedPath) -> Result<Found> {
        let (drv, through, wanted) = match path {
            DerivedPath::Opaque(path) => {
                return Ok(if self.store.is_valid(path)? {
                    Found::Valid(BTreeMap::new())
                } else {
                    Found::Missing(BuildStatus::NoSubstituters, self.no_substituter(path))
                });
            }
            DerivedPath::Built {
                drv,
                through,
                outputs,
            } => (drv, through, outputs),
        };
        let Some(mut outputs) = self.outputs_of(drv)? else {
            return Ok(Found::Missing(
                BuildStatus::NoSubstituters,
                self.no_substituter(drv),
            ));
        };
        if !through.is_empty() {
            return Ok(Found::Missing(
                BuildStatus::MiscFailure,
                self.does_not_build(drv),
            ));
        }
        if let OutputsSpec::Names(names) = wanted {
            let unknown: Vec<&str> = names
                .iter()
                .filter(|name| !outputs.contains_key(*name))
                .map(String::as_str)
                .collect();
            if !unknown.is_empty() {
                // Nix' words.
                let error = Error::user(format!(
                    "derivation '{}' does not have wanted outputs '{}'",
                    self.store.store_dir().print(drv),
                    unknown.join("', '")
                ));
                return Ok(Found::Missing(BuildStatus::MiscFailure, error));
            }
            outputs.retain(|name, _| names.contains(name));
        }
        let mut valid = BTreeMap::new();
        for (name, path) in outputs {
            match path {
                Some(path) if self.store.is_valid(&path)? => valid.insert(name, path),
                _ => {
                    return Ok(Found::Missing(
                        BuildStatus::MiscFailure,
                        self.does_not_build(drv),
                    ));
                }
            };
        }
        Ok(Found::Valid(valid))
    }

    fn already_valid(
        &self,
        drv: &StorePath,
        outputs: BTreeMap<String, StorePath>,
        with_path: bool,
    ) -> BuildResult {
        let mut result = BuildResult::new(BuildStatus::AlreadyValid, "");
        let mut ids = if with_path || outputs.is_empty() {
            BTreeMap::new()
        } else {
            self.output_ids(drv)
        };
        for (output, out_path) in outputs {
            let id = if with_path {
                DrvOutput::Path {
                    drv: drv.clone(),
                    output: output.clone(),
                }
            } else {
                DrvOutput::Hash(
                    ids.remove(&output)
                        .unwrap_or_else(|| format!("{NO_HASH}!{output}")),
                )
            };
            result.built_outputs.insert(
                output,
                WireRealisation {
                    id,
                    out_path,
                    signatures: BTreeSet::new(),
                },
            );
        }
        result
    }

    /// Nix 2.34's words.
    pub(super) fn no_substituter(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is required, but there is no substituter that can build it",
            self.store.store_dir().print(path)
        ))
    }

    fn does_not_build(&self, drv: &StorePath) -> Error {
        Error::user(format!(
            "cannot build '{}': this store keeps and serves paths, it does not build",
            self.store.store_dir().print(drv)
        ))
        .with_hint("build in a store above this one (local-overlay) or in another one, and copy the outputs here")
    }
}
