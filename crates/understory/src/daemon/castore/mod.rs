//! The castore as a backend: it keeps and serves paths, substitutes nothing and builds nothing.
//!
//! Cost: IsValidPath and QueryPathInfo are one lookup in [`Store::path`]'s cache; the temporary roots of a
//! client begin with its first addition, so that one that only asks costs an allocation of a few words.

mod build;
mod derivations;
mod verify;

use super::backend::{
    AddOptions, Backend, ClientInfo, NarWriter, Operations, PathSource, Reporter,
};
use crate::add::{self, AddMethod, AddNarOptions};
use crate::daemon::refusal_text;
use crate::store::{CollectOptions, GcAction, GcReport, Realisation, TempRootOwner};
use crate::{Error, Result, Store, nar};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, DerivedPath, DrvOutput, GcActionKind, GcRequest,
    KeyedBuildResult, MissingInfo, SetOptions, SubstitutablePathInfo, Verbosity, WireRealisation,
};
use understory_nix::{ContentAddress, PathInfo, PublicKeys, Signature, StoreDir, StorePath};

/// What may be done to a castore that is served.
#[derive(Debug, Clone, Default)]
pub struct CastoreOptions {
    /// Refuses all changes. Implied by a store that is open read-only.
    pub read_only: bool,
    /// Keys whose signatures make additions by peers without trust acceptable.
    pub trusted_public_keys: PublicKeys,
    /// True if trusted peers, too, need a signature unless they ask for none to be checked.
    pub require_signatures: bool,
}

/// A castore that is served.
pub struct CastoreBackend {
    store: Store,
    options: Arc<CastoreOptions>,
}

impl CastoreBackend {
    /// Serves `store`.
    pub fn new(store: Store, options: CastoreOptions) -> Self {
        Self {
            store,
            options: Arc::new(options),
        }
    }
}

impl Backend for CastoreBackend {
    fn store_dir(&self) -> &StoreDir {
        self.store.store_dir()
    }
    fn is_read_only(&self) -> bool {
        self.options.read_only || self.store.is_read_only()
    }
    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn Operations>> {
        Ok(Box::new(Session {
            store: self.store.clone(),
            options: Arc::clone(&self.options),
            client: *client,
            temp_roots: OnceCell::new(),
        }))
    }
}

/// One client of a castore.
struct Session {
    store: Store,
    options: Arc<CastoreOptions>,
    client: ClientInfo,
    temp_roots: OnceCell<TempRootOwner>,
}

impl Session {
    fn temp_roots(&self) -> Result<&TempRootOwner> {
        if let Some(owner) = self.temp_roots.get() {
            return Ok(owner);
        }
        let owner = self.store.temp_root_owner()?;
        Ok(self.temp_roots.get_or_init(|| owner))
    }

    /// Gives the space of dead content back. If that fails, the client hears why: its paths are deleted.
    fn reclaim(&self, freed_bytes_max: u64, reporter: &dyn Reporter) {
        reporter.say(Verbosity::Info, "freeing space...");
        let options = CollectOptions {
            freed_bytes_max,
            ..CollectOptions::default()
        };
        let mut watch = |_| reporter.check();
        match self.store.reclaim(&options, &BTreeSet::new(), &mut watch) {
            Ok(report) => {
                let (before, after) = (report.disk_bytes_before, report.disk_bytes_after);
                let text = format!("content: {before} bytes on disk before, {after} afterwards");
                reporter.say(Verbosity::Info, &text);
            }
            Err(error) => {
                tracing::warn!("freeing space: {}", error.chain());
                let text = format!("warning: freeing space: {}", refusal_text(&error));
                reporter.say(Verbosity::Warn, &text);
            }
        }
    }

    /// A content address is as good as a signature: that the content agrees is checked when it comes.
    fn check_signatures(&self, info: &PathInfo, options: AddOptions) -> Result<()> {
        let dir = self.store.store_dir();
        let needed =
            options.check_signatures && (self.options.require_signatures || !self.client.trusted);
        if !needed || (info.ca.is_some() && info.is_content_addressed(dir)) {
            return Ok(());
        }
        let fingerprint = info.fingerprint(dir);
        let keys = &self.options.trusted_public_keys;
        if info
            .signatures
            .iter()
            .any(|signature| keys.verify(fingerprint.as_bytes(), signature))
        {
            return Ok(());
        }
        // Nix' words.
        let error = Error::user(format!(
            "cannot add path '{}' because it lacks a signature by a trusted key",
            dir.print(&info.path)
        ));
        Err(if self.client.trusted {
            error
        } else {
            error.with_hint("sign it with a key of the daemon's trusted public keys, or add it as a trusted user")
        })
    }

    fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.store.store_dir().print(path)
        ))
    }
}

impl Operations for Session {
    fn set_options(&self, options: &SetOptions) -> Result<()> {
        // Settings of builds and substitution mean nothing here; unknown ones must not fail.
        tracing::trace!(overrides = options.overrides.len(), "client's settings");
        Ok(())
    }

    fn is_valid(&self, path: &StorePath) -> Result<bool> {
        self.store.is_valid(path)
    }
    fn with_path_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        let row = self.store.path(path)?;
        if let Some(row) = &row {
            visit(&row.info);
        }
        Ok(row.is_some())
    }
    fn valid_paths(
        &self,
        paths: &[StorePath],
        _substitute: bool,
        _reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>> {
        // There is nothing to substitute from, whatever the client wishes.
        self.store.valid_paths(paths)
    }
    fn all_valid_paths(&self) -> Result<Vec<StorePath>> {
        self.store.all_paths()
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.store.referrers(path)
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.store.valid_derivers(path)
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        self.store.path_from_hash_part(hash_part)
    }
    fn derivation_output_map(
        &self,
        drv: &StorePath,
    ) -> Result<BTreeMap<String, Option<StorePath>>> {
        self.outputs_of(drv)?.ok_or_else(|| self.not_valid(drv))
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        self.store.wire_realisation(id)
    }
    fn nar<'a>(&'a self, path: &StorePath) -> Result<NarWriter<'a>> {
        let row = self.store.path(path)?.ok_or_else(|| self.not_valid(path))?;
        Ok(Box::new(move |out| {
            nar::write_nar(self.store.castore(), &row.root, out).map(drop)
        }))
    }

    fn add_nar(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        options: AddOptions,
        _reporter: &dyn Reporter,
    ) -> Result<()> {
        self.check_signatures(&info, options)?;
        let how = AddNarOptions {
            repair: options.repair,
        };
        add::add_nar(&self.store, self.temp_roots()?, info, archive, how).map(drop)
    }
    fn add_multiple(
        &self,
        source: &mut dyn PathSource,
        options: AddOptions,
        _reporter: &dyn Reporter,
    ) -> Result<()> {
        let owner = self.temp_roots()?;
        add::add_multiple(&self.store, owner, source, options.repair, &mut |info| {
            self.check_signatures(info, options)
        })
    }
    fn add_dump(
        &self,
        name: &str,
        how: &AddMethod,
        references: &BTreeSet<StorePath>,
        repair: bool,
        dump: &mut dyn BufRead,
        _reporter: &dyn Reporter,
    ) -> Result<PathInfo> {
        let owner = self.temp_roots()?;
        add::add_from_dump(&self.store, owner, name, how, references, repair, dump)
    }
    fn add_build_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<()> {
        self.store.add_build_log(drv, log)
    }
    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<()> {
        self.store.add_signatures(path, signatures)
    }
    fn register_realisation(&self, realisation: &WireRealisation) -> Result<()> {
        self.store.add_realisation(&Realisation {
            id: realisation.id.id(),
            out_path: realisation.out_path.clone(),
            signatures: realisation.signatures.clone(),
        })
    }

    fn add_temp_root(&self, path: &StorePath) -> Result<()> {
        self.store.add_temp_root(self.temp_roots()?, path)
    }
    fn add_indirect_root(&self, link: &Path) -> Result<()> {
        self.store.add_indirect_root(link)
    }
    fn add_perm_root(&self, path: &StorePath, link: &Path) -> Result<()> {
        self.store.add_perm_root(path, link)
    }
    fn roots(&self) -> Result<Vec<(PathBuf, StorePath)>> {
        self.store.roots()
    }
    fn collect_garbage(&self, request: &GcRequest, reporter: &dyn Reporter) -> Result<GcReport> {
        let action = match (request.action, &request.paths) {
            (GcActionKind::ReturnLive, _) => GcAction::ReturnLive,
            (GcActionKind::ReturnDead, _) => GcAction::ReturnDead,
            (GcActionKind::DeleteDead, None) => GcAction::DeleteDead {
                freed_bytes_max: request.freed_bytes_max,
            },
            (GcActionKind::DeleteDead, Some(paths)) => GcAction::DeleteAmong {
                paths: paths.clone(),
                referrers: request.delete_referrers,
                skip_alive: true,
                freed_bytes_max: request.freed_bytes_max,
            },
            (GcActionKind::DeleteSpecific, Some(paths)) if request.delete_referrers => {
                GcAction::DeleteAmong {
                    paths: paths.clone(),
                    referrers: true,
                    skip_alive: false,
                    freed_bytes_max: request.freed_bytes_max,
                }
            }
            (GcActionKind::DeleteSpecific, paths) => GcAction::DeleteSpecific {
                paths: paths.clone().unwrap_or_default(),
            },
        };
        if !self.client.trusted && !matches!(action, GcAction::ReturnLive | GcAction::ReturnDead) {
            // Others rely on what is here; Nix would let everybody collect.
            return Err(Error::user(
                "deleting store paths is not allowed because you are not in 'trusted-users'",
            ));
        }
        let report = self.store.collect_with(&action, &|| reporter.check())?;
        if matches!(action, GcAction::DeleteDead { .. }) {
            self.reclaim(request.freed_bytes_max, reporter);
        }
        Ok(report)
    }
    fn verify(&self, check_contents: bool, repair: bool, reporter: &dyn Reporter) -> Result<bool> {
        if repair {
            return Err(Error::user("this store has nothing to repair paths from")
                .with_hint("delete the damaged paths and add them again"));
        }
        self.verify_all(check_contents, reporter)
    }
    fn optimise(&self, _reporter: &dyn Reporter) -> Result<()> {
        // Equal content is one content already.
        Ok(())
    }

    fn query_missing(&self, paths: &[DerivedPath], reporter: &dyn Reporter) -> Result<MissingInfo> {
        self.missing(paths, reporter)
    }
    fn ensure_path(&self, path: &StorePath, _reporter: &dyn Reporter) -> Result<()> {
        if self.store.is_valid(path)? {
            return Ok(());
        }
        Err(self.no_substituter(path))
    }
    fn build_paths(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        _reporter: &dyn Reporter,
    ) -> Result<()> {
        self.all_built(paths, mode)
    }
    fn build_paths_with_results(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        realisation_with_path: bool,
        _reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>> {
        self.results(paths, mode, realisation_with_path)
    }
    fn build_derivation(
        &self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        realisation_with_path: bool,
        _reporter: &dyn Reporter,
    ) -> Result<BuildResult> {
        self.result_of(drv, derivation, mode, realisation_with_path)
    }
    fn substitutable_paths(
        &self,
        _paths: &[StorePath],
        _reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>> {
        Ok(Vec::new())
    }
    fn substitutable_path_infos(
        &self,
        _paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        _reporter: &dyn Reporter,
    ) -> Result<Vec<(StorePath, SubstitutablePathInfo)>> {
        Ok(Vec::new())
    }
}
