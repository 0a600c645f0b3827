//! Keeps the derived index in shape: merges, removes what is superseded, makes all of it anew.
//!
//! Whoever writes files in `index/` (but marks) holds `index/lock`. What to merge, and why: see
//! `index.rs`.

use crate::core::{
    Core, Covering, Listing, MERGED_SUFFIX, SealedPack, State, TEMPORARY_SUFFIX, index_frame,
    list_names, lock, random_id,
};
use crate::error::{CastoreError, IoContext};
use crate::index::{FOOTERS_MAX, Merged, PieceMap, Source, TIER_FANOUT, merge};
use crate::pack::PACK_HEADER_BYTES;
use crate::scan::{self, Tail};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

const INDEX_LOCK: &str = "lock";
/// A merged file is written anew when more than one in so many of its packs is gone.
const GONE_SHARE: usize = 16;

/// What to merge into one file.
struct MergeJob {
    sealed: Vec<Arc<SealedPack>>,
    merged: Vec<Arc<Covering>>,
}

impl Core {
    /// Merges footers and index files that have become many, and removes what is superseded. Does
    /// nothing if another process is at it.
    pub(crate) fn tidy_index(&self) -> Result<(), CastoreError> {
        if self.options.read_only || !self.state().wants_merge() {
            return Ok(());
        }
        let Some(_lock) = self.lock_index(false)? else {
            return Ok(());
        };
        self.refresh()?;
        self.merge_all()
    }

    /// Like [`Core::tidy_index`], and writes merged files anew that have many entries of packs that are
    /// gone.
    pub(crate) fn compact_index(&self) -> Result<(), CastoreError> {
        let Some(_lock) = self.lock_index(false)? else {
            return Ok(());
        };
        self.refresh()?;
        while let Some(job) = self.state().compact_job() {
            let name = job.merged.first().map(|covering| covering.name.clone());
            self.merge(&job)?;
            // What it was made of covers no more packs than it does, and would go on to be taken.
            if let Some(name) = name {
                let path = self.index_dir().join(name);
                self.medium.remove(&path).verb("removing", &path)?;
            }
            self.list(&lock(&self.listing))?;
        }
        self.merge_all()
    }

    fn merge_all(&self) -> Result<(), CastoreError> {
        while let Some(job) = self.state().merge_job() {
            self.merge(&job)?;
            self.list(&lock(&self.listing))?;
        }
        self.remove_superseded()
    }

    fn merge(&self, job: &MergeJob) -> Result<(), CastoreError> {
        let state = self.state();
        let sources = job
            .sealed
            .iter()
            .map(|sealed| Source::footer(sealed.pack.id, &sealed.footer, sealed.trailer.pieces))
            .chain(
                job.merged
                    .iter()
                    .map(|covering| Source::merged(&covering.merged)),
            )
            .collect();
        let name = crate::digest::hex(&random_id()?);
        let dir = self.index_dir();
        let temporary = dir.join(format!("{name}{TEMPORARY_SUFFIX}"));
        let result = merge(
            &*self.medium,
            sources,
            &|pack| state.packs.contains_key(pack),
            &temporary,
            &dir.join(format!("{name}{MERGED_SUFFIX}")),
        );
        if result.is_err() {
            let _ = self.medium.remove(&temporary);
        }
        result
    }

    /// Removes index files that the state has no use for. The index lock must be held.
    fn remove_superseded(&self) -> Result<(), CastoreError> {
        let state = self.state();
        let dir = self.index_dir();
        for name in list_names(&dir)? {
            let superseded = name.ends_with(MERGED_SUFFIX)
                && state.merged.iter().all(|covering| covering.name != name);
            if superseded || name.ends_with(TEMPORARY_SUFFIX) {
                let path = dir.join(&name);
                self.medium.remove(&path).verb("removing", &path)?;
            }
        }
        Ok(())
    }

    /// Drops all index files and makes them anew; writes damaged footers again.
    pub(crate) fn rebuild_index(&self) -> Result<(), CastoreError> {
        if self.options.read_only {
            return Err(CastoreError::Invalid(
                "the index cannot be rebuilt: the castore is open read-only".to_owned(),
            ));
        }
        let _lock = self.lock_index(true)?;
        let dir = self.index_dir();
        for name in list_names(&dir)? {
            if name.ends_with(MERGED_SUFFIX) || name.ends_with(TEMPORARY_SUFFIX) {
                let path = dir.join(&name);
                self.medium.remove(&path).verb("removing", &path)?;
            }
        }
        {
            let mut listing = lock(&self.listing);
            *listing = Listing::default();
            let mut state = (*self.state()).clone();
            state.merged.clear();
            state.sealed.clear();
            self.place_packs(&mut state)?;
            self.set_state(&listing, state);
        }
        self.refresh()?;
        for sealed in &self.state().sealed {
            if !sealed.footer.is_sound() {
                self.mend_footer(sealed)?;
            }
        }
        self.drop_unsound_indexes()?;
        self.merge_all()
    }

    /// Writes a damaged footer again, if the frames still give the very bytes that it had.
    fn mend_footer(&self, sealed: &SealedPack) -> Result<(), CastoreError> {
        let path = &sealed.pack.path;
        let file = self.file(&sealed.pack)?;
        let mut pieces = PieceMap::default();
        let end = sealed.trailer.footer_offset;
        let (_, tail) = scan::frames(
            &file,
            path,
            PACK_HEADER_BYTES as u64,
            end,
            u64::MAX,
            &mut |frame| {
                index_frame(&mut pieces, &frame);
                Ok(())
            },
        )?;
        let footer = crate::pack::encode_footer(pieces.into_iter().collect());
        if tail != Tail::Clean
            || xxhash_rust::xxh3::xxh3_64(&footer) != sealed.trailer.footer_checksum
        {
            return Ok(());
        }
        let writable = std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .verb("opening", path)?;
        self.medium
            .write_all_at(&writable, path, &footer, end)
            .verb("writing", path)?;
        self.medium
            .sync_data(&writable, path)
            .verb("syncing", path)?;
        let listing = lock(&self.listing);
        let mut state = (*self.state()).clone();
        state.sealed.retain(|known| known.pack.id != sealed.pack.id);
        self.place_packs(&mut state)?;
        self.set_state(&listing, state);
        Ok(())
    }

    /// Takes `index/lock`; `None` if another process has it and `wait` is not set.
    fn lock_index(&self, wait: bool) -> Result<Option<File>, CastoreError> {
        let dir = self.index_dir();
        std::fs::create_dir_all(&dir).verb("creating", &dir)?;
        let path = dir.join(INDEX_LOCK);
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .verb("opening", &path)?;
        if wait {
            file.lock().verb("locking", &path)?;
            return Ok(Some(file));
        }
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => {
                Err(CastoreError::io("locking", &path, error))
            }
        }
    }

    /// Verifies the derived index files; see `scrub.rs`.
    pub(crate) fn scrub_indexes(&self, damaged: &mut dyn FnMut(crate::store::Damage)) {
        for name in list_names(&self.index_dir()).unwrap_or_default() {
            if !name.ends_with(MERGED_SUFFIX) {
                continue;
            }
            // Opened anew: what was found sound earlier may have changed.
            let reason = match Merged::open(&self.index_dir().join(&name)) {
                Ok(merged) if merged.is_sound() => continue,
                Ok(_) => "the checksum of its entries is wrong".to_owned(),
                Err(reason) => reason,
            };
            damaged(crate::store::Damage {
                what: format!("index file {name}"),
                reason,
                lost: Vec::new(),
            });
        }
    }
}

impl State {
    fn wants_merge(&self) -> bool {
        self.merge_job().is_some()
    }

    /// A merged file that is due to be written anew without packs that are gone.
    fn compact_job(&self) -> Option<MergeJob> {
        let covering = self.merged.iter().find(|covering| {
            let gone = covering.packs.iter().filter(|pack| pack.is_none()).count();
            gone * GONE_SHARE > covering.packs.len()
        })?;
        Some(MergeJob {
            sealed: Vec::new(),
            merged: vec![Arc::clone(covering)],
        })
    }

    /// The next merge that is due: many footers, or many merged files of one tier.
    fn merge_job(&self) -> Option<MergeJob> {
        if self.sealed.len() > FOOTERS_MAX {
            return Some(MergeJob {
                sealed: self.sealed.clone(),
                merged: Vec::new(),
            });
        }
        let tier = |covering: &Covering| {
            ((covering.packs.len() / FOOTERS_MAX).max(1) as u64).ilog(TIER_FANOUT as u64)
        };
        let mut tiers: HashMap<u32, Vec<Arc<Covering>>> = HashMap::new();
        for covering in &self.merged {
            tiers
                .entry(tier(covering))
                .or_default()
                .push(Arc::clone(covering));
        }
        tiers
            .into_values()
            .find(|files| files.len() >= TIER_FANOUT)
            .map(|merged| MergeJob {
                sealed: Vec::new(),
                merged,
            })
    }
}
