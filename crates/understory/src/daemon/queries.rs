//! Dispatch, and the operations that answer from the store or keep house in it.

use super::connection::{Connection, Failure, refusal_text};
use crate::store::{GcAction, Realisation};
use crate::{Error, Result, nar};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use understory_nix::hash::Hasher;
use understory_nix::worker::{
    DrvOutput, GcActionKind, GcRequest, Request, SetOptions, Verbosity, WireRealisation,
    write_unkeyed_path_info,
};
use understory_nix::{HashAlgorithm, PathInfo, Signature, StorePath};

/// Characters of a store path's hash part.
const HASH_PART_CHARS: usize = 32;
/// Signatures that a path may have before peers without trust can add no more.
const UNTRUSTED_SIGNATURES_MAX: usize = 64;
/// Rows taken at once when the whole store is walked.
const WALK_ROWS: usize = 512;

impl Connection<'_> {
    pub(super) fn handle(&mut self, request: Request) -> Result<(), Failure> {
        match request {
            Request::IsValidPath(path) => {
                let valid = self.store.is_valid(&path)?;
                self.reply_u64(u64::from(valid))
            }
            Request::QueryPathInfo(path) => self.query_path_info(&path),
            Request::QueryValidPaths { paths, .. } => {
                // There is nothing to substitute from, whatever the client wishes.
                let valid = self.store.valid_paths(&paths)?;
                self.reply_paths(&valid)
            }
            Request::QueryReferrers(path) => {
                let referrers = self.store.referrers(&path)?;
                self.reply_paths(&referrers)
            }
            Request::QueryValidDerivers(path) => {
                let derivers = self.store.valid_derivers(&path)?;
                self.reply_paths(&derivers)
            }
            Request::QueryPathFromHashPart(hash_part) => self.query_path_from_hash_part(&hash_part),
            Request::QueryAllValidPaths => {
                let paths = self.store.all_paths()?;
                self.reply_paths(&paths)
            }
            Request::QueryDerivationOutputMap(drv) => self.query_derivation_output_map(&drv),
            Request::QueryRealisation(id) => self.query_realisation(id),
            Request::RegisterDrvOutput(realisation) => self.register_drv_output(realisation),
            Request::QueryMissing(paths) => self.query_missing(&paths),
            Request::SetOptions(options) => self.set_options(&options),
            Request::NarFromPath(path) => self.nar_from_path(&path),

            Request::HasSubstitutes(_) | Request::QuerySubstitutablePathInfo(_) => {
                self.reply_u64(0)
            }
            Request::QuerySubstitutablePaths(_) | Request::QuerySubstitutablePathInfos(_) => {
                self.reply_u64(0)
            }
            Request::SyncWithGC | Request::OptimiseStore => self.reply_u64(1),
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
                let outputs = self.derivation_outputs(&drv)?;
                let mut paths: Vec<StorePath> = outputs.into_values().flatten().collect();
                paths.sort();
                self.reply_paths(&paths)
            }
            Request::QueryDerivationOutputNames(drv) => {
                let outputs = self.derivation_outputs(&drv)?;
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
                if !self.is_read_only() {
                    let owner = self.temp_roots()?;
                    self.store.add_temp_root(&owner, &path)?;
                }
                self.reply_u64(1)
            }
            Request::AddIndirectRoot(link) => {
                self.require_writable()?;
                self.store.add_indirect_root(absolute(&link)?)?;
                self.reply_u64(1)
            }
            Request::AddPermRoot { path, link } => {
                self.require_trust("adding a permanent root")?;
                self.require_writable()?;
                self.store.add_perm_root(&path, absolute(&link)?)?;
                self.last()?;
                Ok(self.encoder.bytes(link)?)
            }
            Request::FindRoots => self.find_roots(),
            Request::CollectGarbage(request) => self.collect_garbage(request),
            Request::VerifyStore {
                check_contents,
                repair,
            } => self.verify_store(check_contents, repair),

            Request::EnsurePath(path) => self.ensure_path(&path),
            Request::BuildPaths { paths, mode } => self.build_paths(&paths, mode),
            Request::BuildPathsWithResults { paths, mode } => {
                self.build_paths_with_results(paths, mode)
            }
            Request::BuildDerivation {
                drv,
                derivation,
                mode,
            } => self.build_derivation(&drv, &derivation, mode),

            Request::ExportPath { .. } | Request::ImportPaths => {
                Err(Error::user("this daemon has no operation for exports")
                    .with_hint("use `nix copy`, or a Nix client since 2.4")
                    .into())
            }
        }
    }

    fn query_path_info(&mut self, path: &StorePath) -> Result<(), Failure> {
        let row = self.store.path(path)?;
        self.last()?;
        let Some(row) = row else {
            return Ok(self.encoder.u64(0)?);
        };
        self.encoder.u64(1)?;
        Ok(write_unkeyed_path_info(&mut self.encoder, &row.info)?)
    }

    fn query_path_from_hash_part(&mut self, hash_part: &str) -> Result<(), Failure> {
        if hash_part.len() != HASH_PART_CHARS {
            return Err(Error::user("invalid hash part").into());
        }
        let path = self.store.path_from_hash_part(hash_part)?;
        self.last()?;
        Ok(self.encoder.opt_store_path(path.as_ref())?)
    }

    fn query_derivation_output_map(&mut self, drv: &StorePath) -> Result<(), Failure> {
        let outputs = self.derivation_outputs(drv)?;
        self.last()?;
        self.encoder.u64(outputs.len() as u64)?;
        for (name, path) in &outputs {
            self.encoder.bytes(name)?;
            self.encoder.opt_store_path(path.as_ref())?;
        }
        Ok(())
    }

    fn query_realisation(&mut self, id: DrvOutput) -> Result<(), Failure> {
        let found = self
            .store
            .realisation(&id.id())?
            .map(|found| WireRealisation {
                id,
                out_path: found.out_path,
                signatures: found.signatures,
            });
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

    fn register_drv_output(&mut self, realisation: WireRealisation) -> Result<(), Failure> {
        self.require_trust("registering a derivation output")?;
        self.require_writable()?;
        self.store.add_realisation(&Realisation {
            id: realisation.id.id(),
            out_path: realisation.out_path,
            signatures: realisation.signatures,
        })?;
        self.last()?;
        Ok(())
    }

    fn set_options(&mut self, options: &SetOptions) -> Result<(), Failure> {
        self.set_verbosity(Verbosity::from_wire(options.verbosity));
        // Settings of builds and substitution mean nothing here; unknown ones must not fail.
        tracing::trace!(overrides = options.overrides.len(), "client's settings");
        self.last()?;
        Ok(())
    }

    fn nar_from_path(&mut self, path: &StorePath) -> Result<(), Failure> {
        // Validity is known before LAST: an error after it could not be told from the archive.
        let row = self.store.path(path)?.ok_or_else(|| self.not_valid(path))?;
        self.last()?;
        let castore = self.store.castore();
        if let Err(error) = nar::write_nar(castore, &row.root, self.encoder.writer()) {
            let broken = io::Error::other(error.chain());
            tracing::error!(path = %path, error = error.chain(), "sending an archive");
            return Err(broken.into());
        }
        Ok(())
    }

    fn add_signatures(
        &mut self,
        path: &StorePath,
        signatures: &std::collections::BTreeSet<Signature>,
    ) -> Result<(), Failure> {
        self.require_writable()?;
        let info = self.info(path)?;
        if !self.trusted && info.signatures.union(signatures).count() > UNTRUSTED_SIGNATURES_MAX {
            return Err(Error::user(format!(
                "path '{}' would have more than {UNTRUSTED_SIGNATURES_MAX} signatures",
                self.store.store_dir().print(path)
            ))
            .into());
        }
        self.store.add_signatures(path, signatures)?;
        self.reply_u64(1)
    }

    fn find_roots(&mut self) -> Result<(), Failure> {
        let roots = self.store.roots()?;
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

    fn collect_garbage(&mut self, request: GcRequest) -> Result<(), Failure> {
        if request.ignore_liveness {
            // Nix' words.
            return Err(Error::user("you are not allowed to ignore liveness").into());
        }
        let action = match (request.action, request.paths) {
            (GcActionKind::ReturnLive, _) => GcAction::ReturnLive,
            (GcActionKind::ReturnDead, _) => GcAction::ReturnDead,
            (GcActionKind::DeleteDead, None) => GcAction::DeleteDead {
                freed_bytes_max: request.freed_bytes_max,
            },
            (GcActionKind::DeleteDead, Some(_)) => {
                return Err(Error::user(
                    "deleting what is dead of given paths only is not supported",
                )
                .with_hint("delete the paths themselves, or all that is dead")
                .into());
            }
            (GcActionKind::DeleteSpecific, paths) => GcAction::DeleteSpecific {
                paths: paths.unwrap_or_default(),
            },
        };
        if !matches!(action, GcAction::ReturnLive | GcAction::ReturnDead) {
            self.require_trust("deleting store paths")?;
            self.require_writable()?;
            if let Some(reason) = &self.shared.options.deletions_refused {
                return Err(Error::user(reason.clone())
                    .with_hint("files of deleted paths would fail with \"stale file handle\"")
                    .into());
            }
        }
        let report = self.store.collect(&action)?;
        self.last()?;
        self.encoder.store_paths(&report.paths)?;
        self.encoder.u64(report.freed_bytes)?;
        Ok(self.encoder.u64(0)?)
    }

    fn verify_store(&mut self, check_contents: bool, repair: bool) -> Result<(), Failure> {
        if repair {
            self.require_trust("repairing")?;
            return Err(Error::user("this store has nothing to repair paths from")
                .with_hint("delete the damaged paths and add them again")
                .into());
        }
        let mut damaged = false;
        let mut after = 0;
        loop {
            let rows = self.store.list(after, WALK_ROWS)?;
            let Some(last) = rows.last() else { break };
            after = last.id;
            for row in &rows {
                if self.state.is_cancelled() {
                    return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
                }
                if let Err(error) = self.verify_path(row, check_contents) {
                    // Gone meanwhile is not damaged.
                    if self.store.is_valid(&row.info.path)? {
                        damaged = true;
                        tracing::error!(path = %row.info.path, error = error.chain(), "damaged");
                        self.say(Verbosity::Error, &refusal_text(&error))?;
                    }
                }
            }
        }
        self.reply_u64(u64::from(damaged))
    }

    fn verify_path(&self, row: &crate::store::StoredPath, check_contents: bool) -> Result<()> {
        let path = self.store.store_dir().print(&row.info.path);
        let castore = self.store.castore();
        if !check_contents {
            return match &row.root {
                understory_castore::Node::Directory { digest, .. } => {
                    castore.directory(digest).map(drop)
                }
                understory_castore::Node::File { digest, size, .. } => {
                    castore.blob(digest, *size).map(drop)
                }
                understory_castore::Node::Symlink { .. } => Ok(()),
            }
            .map_err(|error| {
                Error::corrupt(format!("path '{path}' has lost its content")).with_source(error)
            });
        }
        let mut sink = HashSink {
            hasher: Hasher::new(HashAlgorithm::Sha256),
            connection: self,
        };
        nar::write_nar(castore, &row.root, &mut sink).map_err(|error| {
            Error::corrupt(format!("path '{path}' cannot be read: {}", error.chain()))
        })?;
        let found = sink.hasher.finish();
        let expected = row.info.nar_hash.to_hash();
        if found != expected {
            // Nix' words.
            return Err(Error::corrupt(format!(
                "path '{path}' was modified! expected hash '{expected}', got '{found}'"
            )));
        }
        Ok(())
    }

    pub(super) fn not_valid(&self, path: &StorePath) -> Error {
        Error::user(format!(
            "path '{}' is not valid",
            self.store.store_dir().print(path)
        ))
    }

    fn info(&self, path: &StorePath) -> Result<PathInfo> {
        let row = self.store.path(path)?.ok_or_else(|| self.not_valid(path))?;
        Ok(row.info.clone())
    }

    fn derivation_outputs(
        &self,
        drv: &StorePath,
    ) -> Result<std::collections::BTreeMap<String, Option<StorePath>>> {
        self.outputs_of(drv)?.ok_or_else(|| self.not_valid(drv))
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

/// Hashes, and fails when the client has gone.
struct HashSink<'a> {
    hasher: Hasher,
    connection: &'a Connection<'a>,
}

impl Write for HashSink<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.connection.state.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.hasher.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
