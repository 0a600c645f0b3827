//! A look at a store beforehand: what is there, what stands in the way, and about what it would save.
//!
//! The estimate is a sample: paths at even steps along the sum of all NAR sizes (so that a path's chance is its
//! size), put into a castore of its own. What their contents take there, per byte, is measured; the range is two
//! standard errors, and at its lower end also [`SHARED_PERCENT`] for what is equal between paths that are not both
//! in the sample (a guess: it has been 10 to 50 % with stores of several generations).
//!
//! Cost: one `lstat` for each file of the store; the sample, at most [`SAMPLE_BYTES_MAX`] and [`SAMPLE_TIME_MAX`].

use super::tree::check;
use super::{Adoption, Control, Phase, Progress, Step, Valid, nix_store};
use crate::doctor::existing_parent;
use crate::mount::mountinfo;
use crate::nar::read_path;
use crate::{Error, Result, Store, namespace};
use serde::Serialize;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use understory_castore::{Castore, OpenOptions};
use understory_nix::StoreDir;

/// Paths in the sample.
const SAMPLE_PATHS_MAX: u64 = 96;
/// NAR bytes in the sample.
const SAMPLE_BYTES_MAX: u64 = 1 << 30;
/// How long the sample may take.
const SAMPLE_TIME_MAX: Duration = Duration::from_secs(20);
/// What paths outside of the sample are guessed to share, in per cent.
const SHARED_PERCENT: u64 = 30;
/// Files between two tellings.
const TOLD_FILES: u64 = 10_000;

/// What a store holds and what stands in the way.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Examination {
    /// Its store directory in the file system.
    pub real: PathBuf,
    /// The castore's directory.
    pub castore: PathBuf,
    /// How far an adoption is, if one was begun.
    pub phase: Option<Phase>,
    /// True if originals may have been deleted.
    pub reclaimed: bool,
    /// True if the overlay is mounted.
    pub is_mounted: bool,
    /// Valid paths.
    pub paths: u64,
    /// Of these, paths that the castore has already.
    pub paths_in_castore: u64,
    /// Sum of their NAR sizes.
    pub nar_bytes: u64,
    /// Files, directories and symlinks of the store directory.
    pub files: u64,
    /// Sum of the sizes of its files by name, `.links` left out.
    pub apparent_bytes: u64,
    /// What they take on disk: hard links once.
    pub disk_bytes: u64,
    /// Objects that are no valid paths; they stay where they are.
    pub leftovers: u64,
    /// Bytes free where the castore lies.
    pub free_bytes: u64,
    /// What the castore would take; `None` if it was not asked for, or there is nothing to measure.
    pub estimate: Option<Estimate>,
    /// Reasons why the swap would be refused now, and hints.
    pub obstacles: Vec<Obstacle>,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// What.
    pub message: String,
    /// What can be done.
    pub hint: Option<String>,
}

/// What a sample lets expect.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// Paths in the sample.
    pub sample_paths: u64,
    /// Their NAR bytes.
    pub sample_bytes: u64,
    /// What these took.
    pub sample_stored_bytes: u64,
    /// The least that the castore is expected to take.
    pub castore_bytes_min: u64,
    /// The most.
    pub castore_bytes_max: u64,
    /// Seconds for the import and its verification, about.
    pub seconds: u64,
}

impl Adoption {
    /// Looks at the store and says what an adoption would meet; changes nothing. With `estimate`, puts a sample
    /// into a temporary castore beside the real one.
    ///
    /// # Errors
    /// I/O, interrupted.
    pub fn examine(&self, estimate: bool, control: &Control<'_>) -> Result<Examination> {
        let store_dir = self.nix.store_dir()?.unwrap_or_default();
        let valid = self.nix.valid(&store_dir)?;
        let original = self.nix.original(&self.layout)?;
        let state = self.state()?;
        let mut walk = Walk {
            control,
            files: 0,
            apparent: 0,
            disk: 0,
            seen: HashSet::new(),
        };
        let known = super::by_name(&valid);
        let mut leftovers = 0;
        for name in super::tree::names(&original.path)? {
            let is_links = name == Path::new(".links");
            if !is_links && !name.to_str().is_some_and(|name| known.contains_key(name)) {
                leftovers += 1;
            }
            walk.tree(&original.path.join(&name), is_links)?;
        }
        let mut paths_in_castore = 0;
        if self.layout.store.join("format").exists() {
            let mut options = self.options.store_options.clone();
            options.castore.read_only = true;
            let store = Store::open(&self.layout.store, &options)?;
            for path in &valid {
                paths_in_castore += u64::from(store.is_valid(&path.path)?);
            }
        }
        let nar_bytes = valid.iter().map(|path| path.nar_size).sum();
        let place = existing_parent(&self.layout.store);
        let space = rustix::fs::statvfs(place)
            .map_err(|e| Error::io("asking for the free space of", place, e.into()))?;
        let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        let estimate = if estimate {
            sample(&valid, nar_bytes, &original.path, place, control)?
        } else {
            None
        };
        let mut out = Examination {
            real: self.nix.real.clone(),
            castore: self.layout.store.clone(),
            phase: state.as_ref().map(|state| state.phase),
            reclaimed: state.as_ref().is_some_and(|state| state.reclaimed),
            is_mounted: self.is_mounted()?,
            paths: valid.len() as u64,
            paths_in_castore,
            nar_bytes,
            files: walk.files,
            apparent_bytes: walk.apparent,
            disk_bytes: walk.disk,
            leftovers,
            free_bytes,
            estimate,
            obstacles: Vec::new(),
        };
        out.obstacles = self.obstacles(&out, &store_dir)?;
        Ok(out)
    }

    fn obstacles(&self, seen: &Examination, store_dir: &StoreDir) -> Result<Vec<Obstacle>> {
        let mut out = Vec::new();
        let mut add = |message: String, hint: &str| {
            out.push(Obstacle {
                message,
                hint: (!hint.is_empty()).then(|| hint.to_owned()),
            });
        };
        if seen.is_mounted {
            return Ok(out);
        }
        if let Err(error) = crate::overlay_url::OverlayUrl::of(&self.layout, store_dir)
            .and_then(|_| self.layout.check_sockets())
        {
            add(error.to_string(), error.hint().unwrap_or_default());
        }
        if !namespace::may_mount() {
            add(
                format!("mounting on {} is not permitted", self.nix.real.display()),
                "run as root",
            );
        } else if let Err(error) = self.probe_overlay() {
            add(error.chain(), error.hint().unwrap_or_default());
        }
        if let Some((socket, _)) = self.nix.listening_daemon() {
            add(
                format!("a Nix daemon listens on {}", socket.display()),
                "stop it before the swap: `systemctl stop nix-daemon.socket nix-daemon.service`",
            );
        }
        let users = self.nix.users();
        if !users.is_empty() {
            add(
                format!("the store is in use: {}", nix_store::name(&users)),
                "let it finish; the import can run meanwhile, the swap waits with --wait SECONDS",
            );
        }
        if let Some(top) = mountinfo::mount_at(&self.nix.real)?
            && top.fs_type == "overlay"
            && !nix_store::is_overlay(&top, &self.layout.upper)
        {
            add(
                format!("another overlay is mounted on {}", self.nix.real.display()),
                "a store that is an overlay already is not adopted: unmount it first",
            );
        }
        if let Some(estimate) = seen.estimate
            && seen.paths_in_castore == 0
            && estimate.castore_bytes_max > seen.free_bytes
        {
            add(
                format!(
                    "{} bytes are free for the castore, it may need {}",
                    seen.free_bytes, estimate.castore_bytes_max
                ),
                "name a directory on a larger file system with --store, or run `nix-collect-garbage -d` first",
            );
        }
        Ok(out)
    }

    /// Mounts an overlay where ours would be, for a moment, in a directory of its own.
    fn probe_overlay(&self) -> Result<()> {
        let parent = existing_parent(self.layout.upper.parent().unwrap_or(Path::new("/")));
        crate::doctor::probe_overlay(parent, namespace::in_user_namespace())
    }
}

/// Counts files.
struct Walk<'a> {
    control: &'a Control<'a>,
    files: u64,
    apparent: u64,
    disk: u64,
    /// Inodes with several names.
    seen: HashSet<(u64, u64)>,
}

impl Walk<'_> {
    fn tree(&mut self, path: &Path, is_links: bool) -> Result<()> {
        check(self.control.cancel)?;
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            // Nix goes on meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("examining", path, e)),
        };
        let is_first =
            found.is_dir() || found.nlink() == 1 || self.seen.insert((found.dev(), found.ino()));
        if is_first {
            self.disk += found.blocks() * 512;
        }
        if !is_links {
            self.files += 1;
            if found.is_file() {
                self.apparent += found.len();
            }
        }
        if self.files.is_multiple_of(TOLD_FILES) {
            (self.control.progress)(Progress {
                step: Step::Examining,
                paths: (self.files, 0),
                bytes: (self.apparent, 0),
                new_bytes: 0,
            });
        }
        if found.is_dir() {
            for name in super::tree::names(path)? {
                self.tree(&path.join(name), is_links)?;
            }
        }
        Ok(())
    }
}

/// Puts a sample into a castore of its own and measures.
fn sample(
    valid: &[Valid],
    nar_bytes: u64,
    original: &Path,
    place: &Path,
    control: &Control<'_>,
) -> Result<Option<Estimate>> {
    if nar_bytes == 0 {
        return Ok(None);
    }
    let dir = tempfile::Builder::new()
        .prefix(".understory-estimate-")
        .tempdir_in(place)
        .map_err(|e| Error::io("making a directory in", place, e))?;
    let at = dir.path().join("castore");
    Castore::create(&at)?;
    let castore = Castore::open(&at, &OpenOptions::default())?;
    let writer = castore.writer()?;
    let started = Instant::now();
    // Sampled bytes and what they took, for each path.
    let mut measured: Vec<(u64, u64)> = Vec::new();
    let mut total = 0;
    for path in chosen(valid, nar_bytes) {
        check(control.cancel)?;
        if started.elapsed() > SAMPLE_TIME_MAX || total >= SAMPLE_BYTES_MAX {
            break;
        }
        if path.nar_size > SAMPLE_BYTES_MAX && !measured.is_empty() {
            continue;
        }
        let before = writer.counters().stored_bytes;
        let object = original.join(path.path.base_name());
        let read = match read_path(&writer, &object) {
            Ok(read) => read,
            Err(_) if !namespace::exists(&object) => continue,
            Err(error) => return Err(error),
        };
        writer.sync()?;
        let stored = writer.counters().stored_bytes - before;
        total += read.nar_size;
        measured.push((read.nar_size, stored));
        (control.progress)(Progress {
            step: Step::Sampling,
            paths: (measured.len() as u64, SAMPLE_PATHS_MAX),
            bytes: (total, SAMPLE_BYTES_MAX.min(nar_bytes)),
            new_bytes: 0,
        });
    }
    if measured.is_empty() {
        return Ok(None);
    }
    Ok(Some(conclude(
        &measured,
        nar_bytes,
        valid.len() as u64,
        started.elapsed(),
    )))
}

/// The paths at even steps along the sum of sizes, in an order in which any beginning is spread over all.
fn chosen(valid: &[Valid], nar_bytes: u64) -> Vec<&Valid> {
    let count = SAMPLE_PATHS_MAX.min(valid.len() as u64).max(1);
    let mut ends = Vec::with_capacity(valid.len());
    let mut sum = 0_u64;
    for path in valid {
        sum += path.nar_size;
        ends.push(sum);
    }
    let mut seen = HashSet::new();
    (0..count)
        // 61 is prime to all counts up to 96 but its own multiple, and near the golden ratio of 96.
        .map(|n| n * 61 % count)
        .filter_map(|n| {
            let point = u128::from(nar_bytes) * (2 * u128::from(n) + 1) / (2 * u128::from(count));
            let at = ends.partition_point(|end| u128::from(*end) <= point);
            valid.get(at).filter(|_| seen.insert(at))
        })
        .collect()
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate"
)]
fn conclude(measured: &[(u64, u64)], nar_bytes: u64, paths: u64, time: Duration) -> Estimate {
    let (bytes, stored) = measured
        .iter()
        .fold((0, 0), |(a, b), (bytes, stored)| (a + bytes, b + stored));
    let ratio = stored as f64 / (bytes as f64).max(1.0);
    // The spread of the paths' own ratios, weighted by size.
    let variance = measured
        .iter()
        .map(|(b, s)| {
            let share = *b as f64 / (bytes as f64).max(1.0);
            share * share * (*s as f64 / (*b as f64).max(1.0) - ratio).powi(2)
        })
        .sum::<f64>();
    let error = 2.0 * variance.sqrt();
    let all = measured.len() as u64 >= paths;
    let shared = if all { 0 } else { SHARED_PERCENT };
    let of = |ratio: f64| (nar_bytes as f64 * ratio.max(0.0)) as u64;
    let rate = bytes as f64 / time.as_secs_f64().max(1e-3);
    Estimate {
        sample_paths: measured.len() as u64,
        sample_bytes: bytes,
        sample_stored_bytes: stored,
        castore_bytes_min: of(ratio - if all { 0.0 } else { error }) * (100 - shared) / 100,
        castore_bytes_max: of(ratio + if all { 0.0 } else { error }),
        // Reading back takes about as long again as a third of the import.
        seconds: (nar_bytes as f64 / rate * 1.3).ceil() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understory_nix::{NarHash, StorePath};

    fn paths(sizes: &[u64]) -> Vec<Valid> {
        let name = |n: usize| format!("7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-p{n}");
        sizes
            .iter()
            .enumerate()
            .map(|(n, size)| Valid {
                path: StorePath::from_base_name(&name(n)).unwrap(),
                nar_hash: NarHash([0; 32]),
                nar_size: *size,
            })
            .collect()
    }

    #[test]
    fn a_sample_takes_paths_by_their_size() {
        let all = paths(&[1; 20]);
        assert_eq!(chosen(&all, 20).len(), 20, "few paths: all");
        let mut sizes = vec![1; 1000];
        sizes[500] = 1_000_000;
        let all = paths(&sizes);
        let found = chosen(&all, 1_000_999);
        assert_eq!(found.len(), 1, "one path is nearly everything");
        assert_eq!(found[0].nar_size, 1_000_000);
        let found = chosen(&paths(&[10; 5000]), 50_000).len() as u64;
        assert_eq!(found, SAMPLE_PATHS_MAX);
        assert!(
            chosen(&paths(&[0, 0, 5]), 5)
                .iter()
                .all(|p| p.nar_size == 5)
        );
    }

    #[test]
    fn a_sample_of_everything_has_no_range() {
        let estimate = conclude(&[(100, 50), (100, 30)], 200, 2, Duration::from_secs(1));
        assert_eq!(
            (estimate.castore_bytes_min, estimate.castore_bytes_max),
            (80, 80)
        );
        let estimate = conclude(
            &[(1000, 500), (1000, 300)],
            200_000,
            200,
            Duration::from_secs(1),
        );
        assert!(estimate.castore_bytes_min < 56_000, "{estimate:?}");
        assert!(estimate.castore_bytes_max > 80_000, "{estimate:?}");
        assert_eq!(estimate.seconds, 130);
    }
}
