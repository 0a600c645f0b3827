//! A client of the overlay store: [`Operations`](crate::daemon::Operations) of the worker protocol.

use super::Overlay;
use crate::Result;
use crate::add::AddMethod;
use crate::builder::BuilderSession;
use crate::daemon::{AddOptions, Backend, ClientInfo, NarWriter, Operations, PathSource, Reporter};
use crate::local::restore::dump_path;
use crate::local::roots::{add_indirect_root, add_perm_root, find_roots};
use crate::local::temp_roots::TempRoots;
use crate::nar::{HashRequest, write_nar};
use crate::store::{GcReport, TempRootOwner};
use crate::substitute::Substituters;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, DerivedPath, DrvOutput, GcRequest, KeyedBuildResult,
    MissingInfo, OutputsSpec, SetOptions, SubstitutablePathInfo, WireRealisation,
};
use understory_nix::{ContentAddress, PathInfo, Signature, StoreDir, StorePath};

/// What belongs to one client.
pub(super) struct Session {
    pub(super) overlay: Overlay,
    pub(super) client: ClientInfo,
    /// Dropped, and the roots with it, when the client goes.
    pub(super) roots: TempRoots,
    /// The same in the castore below, if there is one that takes additions.
    pub(super) roots_below: Option<TempRootOwner>,
    /// As the client sent them last.
    pub(super) options: Mutex<Option<SetOptions>>,
    /// With what the client has chosen; made when first needed, dropped by SetOptions.
    pub(super) substituters: Mutex<Option<Arc<Substituters>>>,
    /// Started when first needed.
    pub(super) builder: Mutex<Option<Box<dyn BuilderSession>>>,
}

impl Backend for Overlay {
    fn store_dir(&self) -> &StoreDir {
        Overlay::store_dir(self)
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn Operations>> {
        Ok(Box::new(Session::new(self, client)?))
    }
}

impl Session {
    /// Begins to serve a client.
    ///
    /// # Errors
    /// No random numbers to be had.
    pub(super) fn new(overlay: &Overlay, client: &ClientInfo) -> Result<Self> {
        let local = &overlay.inner.local;
        let castore = overlay.castore();
        Ok(Self {
            overlay: overlay.clone(),
            client: *client,
            roots: TempRoots::new(&local.state, &local.store_dir),
            roots_below: castore.map(|store| store.temp_root_owner()).transpose()?,
            options: Mutex::default(),
            substituters: Mutex::default(),
            builder: Mutex::default(),
        })
    }

    /// The substituters that this client may use and wants.
    pub(super) fn substituters(&self, reporter: &dyn Reporter) -> Result<Arc<Substituters>> {
        let mut made = lock(&self.substituters);
        if let Some(made) = &*made {
            return Ok(made.clone());
        }
        let overrides = match &*lock(&self.options) {
            Some(options) => overrides(options),
            None => BTreeMap::new(),
        };
        let fresh = self.overlay.inner.substituters.for_client(
            &overrides,
            self.client.trusted,
            reporter,
        )?;
        *made = Some(fresh.clone());
        Ok(fresh)
    }
}

/// What a client has chosen, with what has a field of its own among the settings by name.
fn overrides(options: &SetOptions) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut out = options.overrides.clone();
    if !options.use_substitutes {
        out.insert(b"substitute".to_vec(), b"false".to_vec());
    }
    if options.try_fallback {
        out.insert(b"fallback".to_vec(), b"true".to_vec());
    }
    out
}

impl Operations for Session {
    fn set_options(&self, options: &SetOptions) -> Result<()> {
        *lock(&self.options) = Some(options.clone());
        *lock(&self.substituters) = None;
        Ok(())
    }

    fn is_valid(&self, path: &StorePath) -> Result<bool> {
        self.overlay.is_valid(path)
    }
    fn with_path_info(&self, path: &StorePath, visit: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        self.overlay.with_info(path, visit)
    }
    fn valid_paths(
        &self,
        paths: &[StorePath],
        substitute: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>> {
        if substitute {
            let wanted = paths.iter().cloned().collect();
            let missing = self.overlay.invalid(&wanted)?.into_iter();
            let missing: BTreeMap<StorePath, Option<ContentAddress>> =
                missing.map(|path| (path, None)).collect();
            let substituters = self.substituters(reporter)?;
            if !missing.is_empty() && !substituters.is_empty() {
                // What cannot be had is simply not valid afterwards.
                self.overlay.substitute(
                    &missing,
                    &substituters,
                    &self.roots,
                    self.roots_below.as_ref(),
                    reporter,
                )?;
            }
        }
        self.overlay.only_valid(paths)
    }
    fn all_valid_paths(&self) -> Result<Vec<StorePath>> {
        self.overlay.all_valid()
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.overlay.referrers(path)
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>> {
        self.overlay.valid_derivers(path)
    }
    fn path_from_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>> {
        self.overlay.path_from_hash_part(hash_part)
    }
    fn derivation_output_map(
        &self,
        drv: &StorePath,
    ) -> Result<BTreeMap<String, Option<StorePath>>> {
        self.overlay.output_map(drv)
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        self.overlay.realisation(id)
    }
    fn nar<'a>(&'a self, path: &StorePath) -> Result<NarWriter<'a>> {
        if !self.overlay.is_valid(path)? {
            return Err(self.overlay.not_valid(path));
        }
        let inner = &self.overlay.inner;
        // Without the way through the kernel, unless the upper has a copy that is newer.
        if !super::merged::is_there(&inner.upper.join(path.base_name()))? {
            for store in inner.lowers.iter().filter_map(|lower| lower.castore()) {
                if let Some(row) = store.path(path)? {
                    return Ok(Box::new(move |out: &mut dyn Write| {
                        write_nar(store.castore(), &row.root, out)
                    }));
                }
            }
        }
        // Now, while an error can still be told from the archive.
        inner.merged.show(std::slice::from_ref(path))?;
        let place = inner.local.object(path);
        Ok(Box::new(move |out: &mut dyn Write| {
            dump_path(&place, HashRequest::None, out).map(drop)
        }))
    }

    fn add_nar(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        options: AddOptions,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        let mut one = One {
            info: Some(info),
            archive,
        };
        self.add_multiple(&mut one, options, reporter)
    }
    fn add_multiple(
        &self,
        source: &mut dyn PathSource,
        options: AddOptions,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        // A trusted client's choice of keys counts, as in Nix.
        let chosen = if self.client.trusted && options.check_signatures {
            Some(self.substituters(reporter)?)
        } else {
            None
        };
        let keys = match &chosen {
            Some(chosen) => &chosen.settings().trusted_public_keys,
            None => &self.overlay.inner.settings.trusted_public_keys,
        };
        self.overlay.copy_in(
            source,
            options,
            keys,
            &self.roots,
            self.roots_below.as_ref(),
            reporter,
        )
    }
    fn add_dump(
        &self,
        name: &str,
        how: &AddMethod,
        references: &BTreeSet<StorePath>,
        repair: bool,
        dump: &mut dyn BufRead,
        reporter: &dyn Reporter,
    ) -> Result<PathInfo> {
        self.overlay
            .add_dump(name, how, references, repair, dump, &self.roots, reporter)
    }
    fn add_build_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<()> {
        self.overlay.add_build_log(drv, log)
    }
    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<()> {
        self.overlay.add_signatures(path, signatures)
    }
    fn register_realisation(&self, realisation: &WireRealisation) -> Result<()> {
        self.overlay.register_realisation(realisation)
    }

    fn add_temp_root(&self, path: &StorePath) -> Result<()> {
        self.roots.add(std::slice::from_ref(path))
    }
    fn add_indirect_root(&self, link: &Path) -> Result<()> {
        add_indirect_root(&self.overlay.inner.local, link)
    }
    fn add_perm_root(&self, path: &StorePath, link: &Path) -> Result<()> {
        self.roots.add(std::slice::from_ref(path))?;
        add_perm_root(&self.overlay.inner.local, path, link)
    }
    fn roots(&self) -> Result<Vec<(PathBuf, StorePath)>> {
        find_roots(&self.overlay.inner.local, true, &|path| {
            self.overlay.is_valid(path)
        })
    }
    fn collect_garbage(&self, request: &GcRequest, reporter: &dyn Reporter) -> Result<GcReport> {
        self.overlay.collect(request, reporter)
    }
    fn verify(&self, check_contents: bool, repair: bool, reporter: &dyn Reporter) -> Result<bool> {
        self.verify_store(check_contents, repair, reporter)
    }
    fn optimise(&self, reporter: &dyn Reporter) -> Result<()> {
        self.overlay.optimise_all(reporter)
    }

    fn query_missing(&self, paths: &[DerivedPath], reporter: &dyn Reporter) -> Result<MissingInfo> {
        self.missing(paths, reporter)
    }
    fn ensure_path(&self, path: &StorePath, reporter: &dyn Reporter) -> Result<()> {
        self.ensure(path, reporter)?;
        self.overlay.rely_on(std::slice::from_ref(path));
        Ok(())
    }
    fn build_paths(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        self.build(paths, mode, reporter)?;
        self.overlay.rely_on_built(paths);
        Ok(())
    }
    fn build_paths_with_results(
        &self,
        paths: &[DerivedPath],
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>> {
        let results = self.build_with_results(paths, mode, realisation_with_path, reporter)?;
        self.overlay.rely_on_built(paths);
        Ok(results)
    }
    fn build_derivation(
        &self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<BuildResult> {
        self.build_one(drv, derivation, mode, realisation_with_path, reporter)
    }
    fn substitutable_paths(
        &self,
        paths: &[StorePath],
        reporter: &dyn Reporter,
    ) -> Result<Vec<StorePath>> {
        let asked = paths.iter().map(|path| (path.clone(), None)).collect();
        let offers = self.substituters(reporter)?.query(&asked, true, reporter)?;
        Ok(paths
            .iter()
            .filter(|path| offers.contains_key(path))
            .cloned()
            .collect())
    }
    fn substitutable_path_infos(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        reporter: &dyn Reporter,
    ) -> Result<Vec<(StorePath, SubstitutablePathInfo)>> {
        let offers = self.substituters(reporter)?.query(paths, false, reporter)?;
        let mut infos: Vec<(StorePath, SubstitutablePathInfo)> = offers
            .into_iter()
            .map(|(path, offer)| {
                let info = SubstitutablePathInfo {
                    deriver: offer.info.deriver.clone(),
                    references: offer.info.references.clone(),
                    download_size: offer.download_size,
                    nar_size: offer.info.nar_size,
                };
                (path, info)
            })
            .collect();
        infos.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(infos)
    }
}

impl Overlay {
    /// Notes in U what a client has asked for by name, with its closure: from now on it is missed if a lower loses it.
    /// What U knows is not asked for below again. Failing does no harm.
    pub(super) fn rely_on(&self, paths: &[StorePath]) {
        if let Err(error) = self.sync(paths) {
            tracing::warn!(error = error.chain(), "noting what a client relies on");
        }
    }

    /// [`Overlay::rely_on`] for what was built or found: derivations and the outputs that are valid.
    fn rely_on_built(&self, paths: &[DerivedPath]) {
        let mut all = BTreeSet::new();
        for path in paths {
            match path {
                DerivedPath::Opaque(path) => {
                    all.insert(path.clone());
                }
                DerivedPath::Built { drv, outputs, .. } => {
                    all.insert(drv.clone());
                    let Ok(map) = self.output_map(drv) else {
                        continue;
                    };
                    all.extend(map.into_iter().filter_map(|(name, path)| match outputs {
                        OutputsSpec::Names(names) if !names.contains(&name) => None,
                        _ => path,
                    }));
                }
            }
        }
        let all: Vec<StorePath> = all.into_iter().collect();
        match self.only_valid(&all) {
            Ok(valid) => self.rely_on(&valid),
            Err(error) => {
                tracing::warn!(error = error.chain(), "noting what a client relies on");
            }
        }
    }

    /// Adds signatures to a valid path; the info of a lower-only one comes into U first, with its closure.
    ///
    /// # Errors
    /// `path '…' is not valid`.
    pub(super) fn add_signatures(
        &self,
        path: &StorePath,
        signatures: &BTreeSet<Signature>,
    ) -> Result<()> {
        self.sync(std::slice::from_ref(path))?;
        self.inner.db.add_signatures(path, signatures)
    }

    /// Registers what an output became. What a lower says of it is registered first, with the closures of both paths,
    /// so that a contradiction is found.
    ///
    /// # Errors
    /// The output's path is not valid; another path is registered already.
    pub(super) fn register_realisation(&self, realisation: &WireRealisation) -> Result<()> {
        if self.inner.db.realisation(&realisation.id)?.is_none()
            && let Some(below) = self.lower_realisation(&realisation.id)?
        {
            self.sync(std::slice::from_ref(&below.out_path))?;
            self.inner.db.register_realisation(&below)?;
        }
        self.sync(std::slice::from_ref(&realisation.out_path))?;
        self.inner.db.register_realisation(realisation)
    }
}

/// A single path with its archive.
struct One<'a> {
    info: Option<PathInfo>,
    archive: &'a mut dyn BufRead,
}

impl PathSource for One<'_> {
    fn next(&mut self) -> Result<Option<PathInfo>> {
        Ok(self.info.take())
    }
    fn archive(&mut self) -> &mut dyn BufRead {
        self.archive
    }
    fn release(&mut self) {}
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
