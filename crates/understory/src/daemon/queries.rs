//! Dispatch, and the operations that answer from the store or keep house in it.

use super::connection::{Connection, Failure};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use understory_nix::worker::{
    DrvOutput, GcActionKind, GcRequest, LogMessage, Request, SetOptions, Verbosity,
    WireRealisation, write_unkeyed_path_info,
};
use understory_nix::{PathInfo, Signature, StorePath};

/// Characters of a store path's hash part.
const HASH_PART_CHARS: usize = 32;
/// Signatures that a path may have before peers without trust can add no more.
const UNTRUSTED_SIGNATURES_MAX: usize = 64;

impl Connection<'_> {
    pub(super) fn handle(&mut self, request: Request) -> Result<(), Failure> {
        match request {
            Request::IsValidPath(path) => {
                let valid = self.operations.is_valid(&path)?;
                self.reply_u64(u64::from(valid))
            }
            Request::QueryPathInfo(path) => self.query_path_info(&path),
            Request::QueryValidPaths { paths, substitute } => {
                let valid =
                    self.run(|store, reporter| store.valid_paths(&paths, substitute, reporter))?;
                self.reply_paths(&valid)
            }
            Request::QueryReferrers(path) => {
                let referrers = self.operations.referrers(&path)?;
                self.reply_paths(&referrers)
            }
            Request::QueryValidDerivers(path) => {
                let derivers = self.operations.valid_derivers(&path)?;
                self.reply_paths(&derivers)
            }
            Request::QueryPathFromHashPart(hash_part) => self.query_path_from_hash_part(&hash_part),
            Request::QueryAllValidPaths => {
                let paths = self.operations.all_valid_paths()?;
                self.reply_paths(&paths)
            }
            Request::QueryDerivationOutputMap(drv) => self.query_derivation_output_map(&drv),
            Request::QueryRealisation(id) => self.query_realisation(&id),
            Request::RegisterDrvOutput(realisation) => self.register_drv_output(&realisation),
            Request::QueryMissing(paths) => self.query_missing(&paths),
            Request::SetOptions(options) => self.set_options(&options),
            Request::NarFromPath(path) => self.nar_from_path(&path),

            Request::HasSubstitutes(path) => self.has_substitutes(path),
            Request::QuerySubstitutablePathInfo(path) => self.query_substitutable_path_info(path),
            Request::QuerySubstitutablePaths(paths) => self.query_substitutable_paths(&paths),
            Request::QuerySubstitutablePathInfos(paths) => {
                self.query_substitutable_path_infos(&paths)
            }
            Request::SyncWithGC => self.reply_u64(1),
            Request::OptimiseStore => {
                self.run(|store, reporter| store.optimise(reporter))?;
                self.reply_u64(1)
            }
            Request::QueryPathHash(path) => {
                let hash = self.info(&path)?.nar_hash.to_base16();
                self.last()?;
                Ok(self.encoder.bytes(hash)?)
            }
            Request::QueryReferences(path) => {
                let references = self.info(&path)?.references;
                self.reply_paths(&references)
            }
            Request::QueryDeriver(path) => {
                let deriver = self.info(&path)?.deriver;
                self.last()?;
                Ok(self.encoder.opt_store_path(deriver.as_ref())?)
            }
            Request::QueryDerivationOutputs(drv) => {
                let outputs = self.operations.derivation_output_map(&drv)?;
                let mut paths: Vec<StorePath> = outputs.into_values().flatten().collect();
                paths.sort();
                self.reply_paths(&paths)
            }
            Request::QueryDerivationOutputNames(drv) => {
                let outputs = self.operations.derivation_output_map(&drv)?;
                self.last()?;
                Ok(self.encoder.strings(outputs.keys())?)
            }

            Request::AddToStoreNar {
                info,
                repair,
                dont_check_sigs,
            } => self.add_to_store_nar(*info, repair, dont_check_sigs),
            Request::AddMultipleToStore {
                repair,
                dont_check_sigs,
            } => self.add_multiple_to_store(repair, dont_check_sigs),
            Request::AddToStore {
                name,
                method,
                references,
                repair,
            } => self.add_to_store(&name, &method, &references, repair),
            Request::AddToStoreOld {
                name,
                fixed,
                recursive,
                algorithm,
            } => self.add_to_store_old(&name, fixed, recursive, &algorithm),
            Request::AddTextToStore {
                name,
                text,
                references,
            } => self.add_text_to_store(&name, &text, &references),
            Request::AddBuildLog(drv) => self.add_build_log(&drv),
            Request::AddSignatures { path, signatures } => self.add_signatures(&path, &signatures),

            Request::AddTempRoot(path) => {
                if !self.shared.backend.is_read_only() {
                    self.operations.add_temp_root(&path)?;
                }
                self.reply_u64(1)
            }
            Request::AddIndirectRoot(link) => {
                self.require_writable()?;
                self.operations.add_indirect_root(absolute(&link)?)?;
                self.reply_u64(1)
            }
            Request::AddPermRoot { path, link } => {
                self.require_trust("adding a permanent root")?;
                self.require_writable()?;
                self.operations.add_perm_root(&path, absolute(&link)?)?;
                self.last()?;
                Ok(self.encoder.bytes(link)?)
            }
            Request::FindRoots => self.find_roots(),
            Request::CollectGarbage(request) => self.collect_garbage(&request),
            Request::VerifyStore {
                check_contents,
                repair,
            } => self.verify_store(check_contents, repair),

            Request::EnsurePath(path) => self.ensure_path(&path),
            Request::BuildPaths { paths, mode } => self.build_paths(&paths, mode),
            Request::BuildPathsWithResults { paths, mode } => {
                self.build_paths_with_results(&paths, mode)
            }
            Request::BuildDerivation {
                drv,
                derivation,
                mode,
            } => self.build_derivation(drv, *derivation, mode),

            Request::ExportPath { .. } | Request::ImportPaths => {
                Err(Error::user("this daemon has no operation for exports")
                    .with_hint("use `nix copy`, or a Nix client since 2.4")
                    .into())
            }
        }
    }

    fn query_path_info(&mut self, path: &StorePath) -> Result<(), Failure> {
        let encoder = &mut self.encoder;
        let mut reply = None;
        // Written from where it is kept: nothing is copied.
        let asked = self.operations.with_path_info(path, &mut |info| {
            let written = LogMessage::Last
                .write(encoder)
                .and_then(|()| encoder.u64(1))
                .and_then(|()| write_unkeyed_path_info(encoder, info));
            reply = Some(written);
        });
        match reply {
            Some(written) => Ok(written?),
            None => {
                asked?;
                self.reply_u64(0)
            }
        }
    }

    fn query_path_from_hash_part(&mut self, hash_part: &str) -> Result<(), Failure> {
        if hash_part.len() != HASH_PART_CHARS {
            return Err(Error::user("invalid hash part").into());
        }
        let path = self.operations.path_from_hash_part(hash_part)?;
        self.last()?;
        Ok(self.encoder.opt_store_path(path.as_ref())?)
    }

    fn query_derivation_output_map(&mut self, drv: &StorePath) -> Result<(), Failure> {
        let outputs = self.operations.derivation_output_map(drv)?;
        self.last()?;
        self.encoder.u64(outputs.len() as u64)?;
        for (name, path) in &outputs {
            self.encoder.bytes(name)?;
            self.encoder.opt_store_path(path.as_ref())?;
        }
        Ok(())
    }

    fn query_realisation(&mut self, id: &DrvOutput) -> Result<(), Failure> {
        let found = self.operations.realisation(id)?;
        let protocol = self.encoder.protocol();
        self.last()?;
        let e = &mut self.encoder;
        let Some(found) = found else {
            return Ok(e.u64(0)?);
        };
        e.u64(1)?;
        if protocol.features.realisation_with_path {
            found.write_unkeyed(e)?;
        } else if protocol.since(31) {
            found.write(e)?;
        } else {
            e.store_path(&found.out_path)?;
        }
        Ok(())
    }

    fn register_drv_output(&mut self, realisation: &WireRealisation) -> Result<(), Failure> {
        self.require_trust("registering a derivation output")?;
        self.require_writable()?;
        self.operations.register_realisation(realisation)?;
        self.last()?;
        Ok(())
    }

    fn set_options(&mut self, options: &SetOptions) -> Result<(), Failure> {
        self.set_verbosity(Verbosity::from_wire(options.verbosity));
        self.operations.set_options(options)?;
        self.last()?;
        Ok(())
    }

    fn nar_from_path(&mut self, path: &StorePath) -> Result<(), Failure> {
        // Validity is known before LAST: an error after it could not be told from the archive.
        let write = self.operations.nar(path)?;
        LogMessage::Last.write(&mut self.encoder)?;
        if let Err(error) = write(self.encoder.writer()) {
            let broken = io::Error::other(error.chain());
            tracing::error!(path = %path, error = error.chain(), "sending an archive");
            return Err(broken.into());
        }
        Ok(())
    }

    fn add_signatures(
        &mut self,
        path: &StorePath,
        signatures: &BTreeSet<Signature>,
    ) -> Result<(), Failure> {
        self.require_writable()?;
        let info = self.info(path)?;
        if !self.trusted && info.signatures.union(signatures).count() > UNTRUSTED_SIGNATURES_MAX {
            return Err(Error::user(format!(
                "path '{}' would have more than {UNTRUSTED_SIGNATURES_MAX} signatures",
                self.shared.backend.store_dir().print(path)
            ))
            .into());
        }
        self.operations.add_signatures(path, signatures)?;
        self.reply_u64(1)
    }

    fn find_roots(&mut self) -> Result<(), Failure> {
        let roots = self.operations.roots()?;
        self.last()?;
        self.encoder.u64(roots.len() as u64)?;
        for (link, target) in &roots {
            if self.trusted {
                self.encoder.bytes(link.as_os_str().as_bytes())?;
            } else {
                self.encoder.bytes("{censored}")?;
            }
            self.encoder.store_path(target)?;
        }
        Ok(())
    }

    fn collect_garbage(&mut self, request: &GcRequest) -> Result<(), Failure> {
        if request.ignore_liveness {
            // Nix' words.
            return Err(Error::user("you are not allowed to ignore liveness").into());
        }
        let features = self.decoder.protocol().features;
        if request.action == GcActionKind::DeleteDead
            && request.paths.is_some()
            && !features.delete_dead_specific_referrers
        {
            // Such a client may mean the whole store.
            return Err(
                Error::user("deleting what is dead of given paths only is not supported")
                    .with_hint("delete the paths themselves, or all that is dead")
                    .into(),
            );
        }
        if matches!(
            request.action,
            GcActionKind::DeleteDead | GcActionKind::DeleteSpecific
        ) {
            self.require_writable()?;
            if let Some(reason) = &self.shared.options.deletions_refused {
                return Err(Error::user(reason.clone())
                    .with_hint(
                        "files of deleted paths would fail with \"stale file handle\"; `understory gc` deletes them when nothing in the overlay is in use",
                    )
                    .into());
            }
        }
        let report = self.run(|store, reporter| store.collect_garbage(request, reporter))?;
        self.last()?;
        self.encoder.store_paths(&report.paths)?;
        self.encoder.u64(report.freed_bytes)?;
        Ok(self.encoder.u64(0)?)
    }

    fn verify_store(&mut self, check_contents: bool, repair: bool) -> Result<(), Failure> {
        if repair {
            self.require_trust("repairing")?;
            self.require_writable()?;
        }
        let damaged = self.run(|store, reporter| store.verify(check_contents, repair, reporter))?;
        self.reply_u64(u64::from(damaged))
    }

    fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.shared.backend.store_dir().print(path)
        ))
    }

    fn info(&self, path: &StorePath) -> Result<PathInfo> {
        let mut found = None;
        self.operations
            .with_path_info(path, &mut |info| found = Some(info.clone()))?;
        found.ok_or_else(|| self.not_valid(path))
    }

    pub(super) fn reply_paths<'p, I>(&mut self, paths: I) -> Result<(), Failure>
    where
        I: IntoIterator<Item = &'p StorePath>,
        I::IntoIter: ExactSizeIterator,
    {
        self.last()?;
        Ok(self.encoder.store_paths(paths)?)
    }
}

fn absolute(link: &[u8]) -> Result<&Path> {
    let path = Path::new(OsStr::from_bytes(link));
    if !path.is_absolute() || link.contains(&0) {
        return Err(Error::user(format!(
            "'{}' is not an absolute path",
            path.display()
        )));
    }
    Ok(path)
}
