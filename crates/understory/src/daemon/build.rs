//! Requests about building and substitution: what a peer may ask for, and the replies' forms.

use super::connection::{Connection, Failure};
use crate::add::AddMethod;
use crate::{Error, Result};
use std::collections::BTreeMap;
use understory_nix::derivation::{Derivation, DerivationError, DerivationKind, DerivationOutput};
use understory_nix::worker::{BasicDerivation, BuildMode, DerivedPath};
use understory_nix::{ContentAddressMethod, HashAlgorithm, StorePath, StorePathName};

impl Connection<'_> {
    pub(super) fn ensure_path(&mut self, path: &StorePath) -> Result<(), Failure> {
        self.run(|store, reporter| store.ensure_path(path, reporter))?;
        self.reply_u64(1)
    }

    pub(super) fn build_paths(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
    ) -> Result<(), Failure> {
        self.check_mode(mode)?;
        self.run(|store, reporter| store.build_paths(paths, mode, reporter))?;
        self.reply_u64(1)
    }

    pub(super) fn build_paths_with_results(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
    ) -> Result<(), Failure> {
        self.check_mode(mode)?;
        let with_path = self.realisation_with_path();
        let results = self.run(|store, reporter| {
            store.build_paths_with_results(paths, mode, with_path, reporter)
        })?;
        self.last()?;
        self.encoder.u64(results.len() as u64)?;
        for result in &results {
            result.write(&mut self.encoder)?;
        }
        Ok(())
    }

    pub(super) fn build_derivation(
        &mut self,
        mut drv: StorePath,
        mut derivation: BasicDerivation,
        mode: BuildMode,
    ) -> Result<(), Failure> {
        self.check_mode(mode)?;
        let whole = self.judge_derivation(&drv, &mut derivation)?;
        if !self.trusted {
            drv = self.own_derivation(&whole)?;
        }
        let with_path = self.realisation_with_path();
        let result = self.run(|store, reporter| {
            store.build_derivation(&drv, &derivation, mode, with_path, reporter)
        })?;
        self.last()?;
        Ok(result.write(&mut self.encoder)?)
    }

    pub(super) fn query_missing(&mut self, paths: &[DerivedPath]) -> Result<(), Failure> {
        let missing = self.run(|store, reporter| store.query_missing(paths, reporter))?;
        self.last()?;
        Ok(missing.write(&mut self.encoder)?)
    }

    pub(super) fn query_substitutable_paths(&mut self, paths: &[StorePath]) -> Result<(), Failure> {
        let found = self.run(|store, reporter| store.substitutable_paths(paths, reporter))?;
        self.reply_paths(&found)
    }

    /// Before 2.4: for one path.
    pub(super) fn has_substitutes(&mut self, path: StorePath) -> Result<(), Failure> {
        let paths = [path];
        let found = self.run(|store, reporter| store.substitutable_paths(&paths, reporter))?;
        self.reply_u64(u64::from(!found.is_empty()))
    }

    pub(super) fn query_substitutable_path_infos(
        &mut self,
        paths: &BTreeMap<StorePath, Option<understory_nix::ContentAddress>>,
    ) -> Result<(), Failure> {
        let found = self.run(|store, reporter| store.substitutable_path_infos(paths, reporter))?;
        self.last()?;
        self.encoder.u64(found.len() as u64)?;
        for (path, info) in &found {
            self.encoder.store_path(path)?;
            info.write(&mut self.encoder)?;
        }
        Ok(())
    }

    /// Before 2.4: for one path.
    pub(super) fn query_substitutable_path_info(&mut self, path: StorePath) -> Result<(), Failure> {
        let paths = BTreeMap::from([(path, None)]);
        let found = self.run(|store, reporter| store.substitutable_path_infos(&paths, reporter))?;
        self.last()?;
        match found.first() {
            None => Ok(self.encoder.u64(0)?),
            Some((_, info)) => {
                self.encoder.u64(1)?;
                Ok(info.write(&mut self.encoder)?)
            }
        }
    }

    fn realisation_with_path(&self) -> bool {
        self.encoder.protocol().features.realisation_with_path
    }

    fn check_mode(&self, mode: BuildMode) -> Result<()> {
        if mode == BuildMode::Repair {
            self.require_trust("repairing")?;
        }
        Ok(())
    }

    /// Reads what was sent as a derivation. Fixed outputs get the path that follows from their hash,
    /// whatever was sent. Peers without trust may only send what proves itself: a derivation whose outputs
    /// are content-addressed. The rules are Nix's.
    fn judge_derivation(
        &self,
        drv: &StorePath,
        derivation: &mut BasicDerivation,
    ) -> Result<Derivation> {
        let invalid = |error: DerivationError| Error::user(error.to_string());
        let dir = self.shared.backend.store_dir();
        let name = drv.name().strip_suffix(".drv").ok_or_else(|| {
            Error::user(format!(
                "store path '{}' is not a valid derivation path",
                dir.print(drv)
            ))
        })?;
        let name = StorePathName::new(name)?;
        let mut outputs = BTreeMap::new();
        for (output_name, sent) in &mut derivation.outputs {
            let output = DerivationOutput::parse(dir, &sent.path, &sent.hash_algo, &sent.hash)
                .map_err(invalid)?;
            if let DerivationOutput::Fixed(_) = output
                && let Some(path) = output.path(dir, &name, output_name).map_err(invalid)?
            {
                sent.path = dir.print(&path);
            }
            outputs.insert(output_name.clone(), output);
        }
        let whole = Derivation {
            name,
            outputs,
            input_derivations: BTreeMap::new(),
            input_sources: derivation.input_sources.clone(),
            platform: derivation.platform.clone(),
            builder: derivation.builder.clone(),
            args: derivation.arguments.clone(),
            env: derivation.environment.clone(),
        };
        if !self.trusted && whole.kind().map_err(invalid)? == DerivationKind::InputAddressed {
            // Nix' words.
            return Err(Error::user(
                "you are not privileged to build input-addressed derivations",
            ));
        }
        Ok(whole)
    }

    /// The path that a derivation really has, where it is kept, so that nobody is told of a path that the
    /// derivation does not have.
    fn own_derivation(&mut self, derivation: &Derivation) -> Result<StorePath, Failure> {
        let invalid = |error: DerivationError| Error::user(error.to_string());
        let dir = self.shared.backend.store_dir();
        if self.shared.backend.is_read_only() {
            return Ok(derivation.make_path(dir).map_err(invalid)?);
        }
        let text = derivation.print(dir).map_err(invalid)?;
        let how = AddMethod {
            method: ContentAddressMethod::Text,
            algorithm: HashAlgorithm::Sha256,
        };
        let name = format!("{}.drv", derivation.name);
        let references = derivation.references();
        let added = self.run(|store, reporter| {
            store.add_dump(&name, &how, &references, false, &mut &text[..], reporter)
        })?;
        Ok(added.path)
    }
}
