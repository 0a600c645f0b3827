//! Reads back what was imported: from the castore, and through the overlay.

use super::tree::{self, check};
use super::{Adoption, Control, MOUNT_SAMPLE_PATHS, Progress, Step, Valid, differs};
use crate::nar::{HashRequest, hash_node};
use crate::{Error, Result, Store};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Hashes each path's contents as the castore gives them, and compares with Nix's database. Returns how many.
///
/// # Errors
/// The first path that is not there or differs; interrupted.
pub(super) fn castore(
    store: &Store,
    valid: &[Valid],
    jobs: usize,
    control: &Control<'_>,
) -> Result<u64> {
    let total = valid.iter().map(|path| path.nar_size).sum();
    each(valid, jobs, Step::Verifying, total, control, &|path| {
        one(store, path)
    })
}

/// Reads one path's contents back.
pub(super) fn one(store: &Store, path: &Valid) -> Result<u64> {
    let name = || store.store_dir().print(&path.path);
    let stored = store
        .path(&path.path)?
        .ok_or_else(|| Error::corrupt(format!("path '{}' is not valid in the castore", name())))?;
    if stored.info.nar_hash != path.nar_hash {
        return Err(differs(store, path, &stored.info.nar_hash));
    }
    let found = hash_node(store.castore(), &stored.root, HashRequest::None)
        .map_err(|e| Error::corrupt(format!("path '{}': {}", name(), e.chain())))?;
    if found.nar_hash != path.nar_hash {
        return Err(Error::corrupt(format!(
            "path '{}' was modified! expected hash '{}', got '{}'",
            name(),
            path.nar_hash,
            found.nar_hash
        ))
        .with_hint("run `understory check --contents`"));
    }
    Ok(found.nar_size)
}

/// Reads a sample of the paths, or all, through the mounted overlay. Paths that only the upper directory has and
/// paths without objects are left out.
///
/// # Errors
/// As [`castore`]; I/O.
pub(super) fn overlay(
    adoption: &Adoption,
    store: &Store,
    valid: &[Valid],
    control: &Control<'_>,
) -> Result<()> {
    // Evenly over the order of registration.
    let step = if adoption.options.verify_all {
        1
    } else {
        valid.len().div_ceil(MOUNT_SAMPLE_PATHS).max(1)
    };
    let mut sample = Vec::new();
    for path in valid.iter().step_by(step) {
        if store.is_valid(&path.path)? {
            sample.push(path.clone());
        }
    }
    let total = sample.iter().map(|path| path.nar_size).sum();
    let (jobs, at) = (adoption.options.jobs, &adoption.layout.merged);
    each(&sample, jobs, Step::Comparing, total, control, &|path| {
        let place = at.join(path.path.base_name());
        tree::expect_hash(&place, &path.nar_hash, control.cancel)?;
        Ok(path.nar_size)
    })?;
    Ok(())
}

/// Does something with each path on several threads; the first error ends it. Returns how many were done.
pub(super) fn each<T: Sync>(
    items: &[T],
    jobs: usize,
    step: Step,
    bytes_total: u64,
    control: &Control<'_>,
    work: &(dyn Fn(&T) -> Result<u64> + Sync),
) -> Result<u64> {
    let jobs = match jobs {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        jobs => jobs,
    };
    let (next, done, bytes) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let run = || {
        while !stop.load(Ordering::Relaxed) {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            match check(control.cancel).and_then(|()| work(item)) {
                Ok(count) => {
                    let paths = done.fetch_add(1, Ordering::Relaxed) + 1;
                    let bytes = bytes.fetch_add(count, Ordering::Relaxed) + count;
                    (control.progress)(Progress {
                        step,
                        paths: (paths, items.len() as u64),
                        bytes: (bytes, bytes_total),
                        new_bytes: 0,
                    });
                }
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..jobs.min(items.len()) {
            scope.spawn(run);
        }
        run();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(done.into_inner()),
    }
}
