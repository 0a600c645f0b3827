//! What an instance mounts so that its overlay stands on an image: the blob server, the newest generation, and a live
//! mount of what is newer than it.
//!
//! ```text
//! overlay   lowerdir=STATE/image/newer:STATE/image/store
//!           newer: FUSE, paths that were published after the generation
//!           store: EROFS, the generation; contents from STATE/image/blob (FUSE)
//! ```
//! Overlayfs merges directories that two lowers have, at the cost of both: so no path is in both. The live mount of
//! everything, which stock Nix and tools look at, stays where it is.
//!
//! - Which generation: the newest, if it is sound and the store has not grown by more than [`NEWER_PATHS_MAX`] paths
//!   since; else one is made. This happens when an instance starts, while nobody uses its overlay.
//! - If it cannot be done, the live mount serves alone, and [`Standing`] says why.
//! - The server of both FUSE mounts may die: see [`Stack::go_on`]. The image stays mounted meanwhile, and its readers
//!   wait. The generation's lock is among what is held.

use super::mounted::{MountOptions, MountedImage};
use super::{Generation, Generations, HotOptions, InUse};
use crate::config::Layout;
use crate::import::Selection;
use crate::mount::{
    BlobMount, Handover, LiveHandover, LiveMount, LiveOptions, RowsAfter, mountinfo,
};
use crate::{Error, Result, Store, StoreOptions, namespace};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Paths that the live part may have before a new generation is made; each lookup that misses them asks the server.
pub const NEWER_PATHS_MAX: u64 = 64;
/// A store with fewer paths is quick enough without an image, unless one is asked for.
pub const PATHS_MIN: u64 = 100;
/// Generations that stay when a new one is made, besides those that are mounted.
const GENERATIONS_KEPT: usize = 2;
/// Under which name the blob server is held: the generation's lock, then the device.
pub(crate) const HELD_BLOB: &str = "image-blob";
/// Under which name the live mount of what is newer is held: as every live mount.
pub(crate) const HELD_NEWER: &str = "image-newer";

/// What an overlay shall stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MountMode {
    /// An image where it pays and can be mounted, else the live mount.
    #[default]
    Auto,
    /// The live mount.
    Live,
    /// An image, or nothing is started.
    Image,
}

/// How an instance mounts.
#[derive(Debug, Clone, Copy, Default)]
pub struct StackOptions {
    /// What the overlay stands on.
    pub mode: MountMode,
    /// Use the raw tier.
    pub hot: Option<HotOptions>,
}

/// Where the mounts are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The blob server.
    pub blob: PathBuf,
    /// The image.
    pub image: PathBuf,
    /// The live mount of what is newer.
    pub newer: PathBuf,
    /// What [`Standing`] is kept in.
    note: PathBuf,
}

impl Places {
    /// Those of an instance.
    pub fn of(layout: &Layout) -> Self {
        let dir = layout.state.join("image");
        Self {
            blob: dir.join("blob"),
            image: dir.join("store"),
            newer: dir.join("newer"),
            note: layout.run.join("image.json"),
        }
    }

    /// The lower directories of the overlay, uppermost first, if it stands on an image.
    ///
    /// # Errors
    /// Mountinfo cannot be read.
    pub fn lowers(&self) -> Result<Option<[PathBuf; 2]>> {
        let mounts = mountinfo::mounts()?;
        let canonical = |path: &Path| std::fs::canonicalize(path).ok();
        let is = |path: &Path, fs_type: &str| {
            canonical(path)
                .and_then(|path| mountinfo::topmost_at(&mounts, &path))
                .is_some_and(|entry| entry.fs_type == fs_type)
        };
        let both = is(&self.image, crate::mount::EROFS_TYPE) && is(&self.newer, "fuse.understory");
        Ok(both.then(|| [self.newer.clone(), self.image.clone()]))
    }
}

/// What an overlay stands on, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    /// The generation; none if the live mount serves alone.
    pub generation: Option<u64>,
    /// How the kernel reads the image.
    pub route: Option<crate::mount::Route>,
    /// Why it is no image, or not mounted in the best way.
    pub reason: Option<String>,
}

impl Standing {
    /// Reads what an instance has noted; `None` if it has noted nothing.
    pub fn read(layout: &Layout) -> Option<Self> {
        let text = std::fs::read(Places::of(layout).note).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let mut text = match (self.generation, self.route) {
            (Some(number), Some(route)) => {
                format!("an image, generation {number}: {}", route.describe())
            }
            _ => "the live mount".to_owned(),
        };
        if let Some(reason) = &self.reason {
            text.push_str(&format!(" ({reason})"));
        }
        text
    }

    fn note(&self, places: &Places) {
        let written = serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&places.note, text));
        if let Err(error) = written {
            tracing::warn!("writing {}: {error}", places.note.display());
        }
    }
}

/// Lets another process hold descriptors under a name, with what the next server must know and the number of the
/// descriptor that notifications go through.
pub type HoldNamed<'a> =
    &'a mut dyn FnMut(&str, &serde_json::Value, &[BorrowedFd<'_>], usize) -> Result<()>;

/// What is held under a name.
pub struct HeldParts {
    /// As it was given.
    pub state: serde_json::Value,
    /// In the same order.
    pub descriptors: Vec<OwnedFd>,
}

/// The mounts of one instance. [`Stack::unmount`] undoes them; a server that dies leaves them to the next one.
pub struct Stack {
    image: Option<MountedImage>,
    places: Places,
    newer: LiveMount,
    blob: BlobMount,
    /// After a takeover: keeps the generation in use.
    _lock: Option<File>,
}

/// What the next server must know of the blob server.
#[derive(Serialize, Deserialize)]
struct BlobState {
    handover: Handover,
    generation: u64,
}

/// What the next server must know of the live mount.
#[derive(Serialize, Deserialize)]
struct NewerState {
    handover: Handover,
    last_row: u64,
}

impl Stack {
    /// Mounts what is wanted for the store in `layout`. `None` if the live mount shall serve alone.
    ///
    /// # Errors
    /// An image was asked for and cannot be had.
    pub fn begin(
        store: &Store,
        layout: &Layout,
        options: &StackOptions,
        hold: HoldNamed<'_>,
    ) -> Result<Option<Self>> {
        let places = Places::of(layout);
        let begun = match options.mode {
            MountMode::Live => Err(Error::user("an image was not asked for")),
            MountMode::Auto | MountMode::Image if namespace::in_user_namespace() => Err(
                Error::environment("EROFS cannot be mounted in a user namespace"),
            ),
            mode => Self::mount(store, layout, &places, mode, options.hot, hold),
        };
        match begun {
            Ok(stack) => {
                tracing::info!(at = %places.image.display(), "{}", stack.1.describe());
                stack.1.note(&places);
                Ok(Some(stack.0))
            }
            Err(error) if options.mode == MountMode::Image => Err(error),
            Err(error) => {
                let standing = Standing {
                    reason: Some(error.chain()),
                    ..Standing::default()
                };
                tracing::info!("{}", standing.describe());
                standing.note(&places);
                Ok(None)
            }
        }
    }

    fn mount(
        store: &Store,
        layout: &Layout,
        places: &Places,
        mode: MountMode,
        hot: Option<HotOptions>,
        hold: HoldNamed<'_>,
    ) -> Result<(Self, Standing)> {
        if mode == MountMode::Auto && store.count()? < PATHS_MIN {
            return Err(Error::user(format!(
                "the store has fewer than {PATHS_MIN} paths"
            )));
        }
        for dir in [&places.blob, &places.image, &places.newer] {
            std::fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
        }
        let in_use = choose(layout)?;
        let (generation, lock) = (in_use.generation().clone(), in_use.lock());
        let mount_options = MountOptions {
            hot,
            ..MountOptions::default()
        };
        let blob = super::mounted::serve_held(
            store,
            &places.blob,
            &mount_options,
            &mut |live: &LiveHandover<'_>| {
                let mut all = vec![lock.as_fd()];
                all.extend(&live.descriptors);
                let state = to_json(&BlobState {
                    handover: live.state.clone(),
                    generation: generation.number,
                })?;
                hold(HELD_BLOB, &state, &all, 1)
            },
        )?;
        let undo_blob = |error| {
            let _ = blob.unmount();
            error
        };
        let image = MountedImage::mount(in_use, blob.mountpoint(), &places.image, &mount_options)
            .map_err(undo_blob)?;
        let last_row = generation.last_row();
        let newer = LiveMount::mount_held(
            store,
            &places.newer,
            &newer_options(last_row),
            &mut |live: &LiveHandover<'_>| {
                let state = to_json(&NewerState {
                    handover: live.state.clone(),
                    last_row,
                })?;
                hold(HELD_NEWER, &state, &live.descriptors, 1)
            },
        );
        let newer = match newer {
            Ok(newer) => newer,
            Err(error) => {
                drop(image);
                return Err(undo_blob(error));
            }
        };
        let standing = Standing {
            generation: Some(generation.number),
            route: Some(image.mount_point().route()),
            reason: image.mount_point().reason().map(str::to_owned),
        };
        let stack = Self {
            image: Some(image),
            places: places.clone(),
            newer,
            blob,
            _lock: None,
        };
        Ok((stack, standing))
    }

    /// Serves mounts whose server is dead, from what it had given to `hold`. With `refuse_resent`, requests that the
    /// dead server had read are answered with EIO.
    ///
    /// # Errors
    /// What was held is not of this version.
    pub fn go_on(
        store: &Store,
        layout: &Layout,
        options: &StackOptions,
        (blob, newer): (HeldParts, HeldParts),
        refuse_resent: bool,
        hold: HoldNamed<'_>,
    ) -> Result<Self> {
        let mut descriptors = blob.descriptors;
        if descriptors.is_empty() {
            return Err(Error::internal(
                "a blob server was handed over without a descriptor",
            ));
        }
        let lock = File::from(descriptors.remove(0));
        let state: BlobState = from_json(blob.state)?;
        let mount_options = MountOptions {
            hot: options.hot,
            ..MountOptions::default()
        };
        let blob = super::mounted::take_over(
            store,
            &state.handover,
            descriptors,
            &mount_options,
            refuse_resent,
            &mut |live: &LiveHandover<'_>| {
                let mut all = vec![lock.as_fd()];
                all.extend(&live.descriptors);
                let state = to_json(&BlobState {
                    handover: live.state.clone(),
                    generation: state.generation,
                })?;
                hold(HELD_BLOB, &state, &all, 1)
            },
        )?;
        let state: NewerState = from_json(newer.state)?;
        let last_row = state.last_row;
        let newer = LiveMount::take_over(
            store,
            &state.handover,
            newer.descriptors,
            &newer_options(last_row),
            refuse_resent,
            &mut |live: &LiveHandover<'_>| {
                let state = to_json(&NewerState {
                    handover: live.state.clone(),
                    last_row,
                })?;
                hold(HELD_NEWER, &state, &live.descriptors, 1)
            },
        )?;
        Ok(Self {
            image: None,
            places: Places::of(layout),
            newer,
            blob,
            _lock: Some(lock),
        })
    }

    /// How long the request takes that has been worked on longest.
    pub fn busy_for(&self) -> Duration {
        self.newer.busy_for().max(self.blob.busy_for())
    }

    /// Unmounts all; the overlay on top must be unmounted before.
    ///
    /// # Errors
    /// The first thing that failed; the rest was done nevertheless.
    pub fn unmount(&self) -> Result<()> {
        let image = match &self.image {
            Some(image) => image.mount_point().unmount(),
            None => crate::mount::ImageMount::unmount_at(&self.places.image),
        };
        let _ = std::fs::remove_file(&self.places.note);
        image.and(self.newer.unmount()).and(self.blob.unmount())
    }
}

/// The generation to mount; makes one if there is none that fits.
fn choose(layout: &Layout) -> Result<InUse> {
    // To make one it must be written; what serves it afterwards only reads.
    let store = Store::open(&layout.store, &StoreOptions::default())?;
    let generations = Generations::of(&store);
    if let Some(newest) = generations.newest()?
        && !is_outgrown(&store, &newest)?
    {
        match generations.take(&newest) {
            Ok(in_use) => return Ok(in_use),
            Err(error) => tracing::info!("{}", error.chain()),
        }
    }
    let made = generations.make(&Selection::All, &mut |_| {})?;
    let figures = made.figures();
    tracing::info!(
        "made generation {} of {} paths in {} ms, an image of {} bytes",
        made.number,
        figures.paths,
        figures.made_ms,
        made.image_bytes()
    );
    let in_use = generations.take(&made)?;
    generations.prune(GENERATIONS_KEPT)?;
    Ok(in_use)
}

fn is_outgrown(store: &Store, generation: &Generation) -> Result<bool> {
    let wanted = usize::try_from(NEWER_PATHS_MAX).unwrap_or(usize::MAX);
    Ok(store.list(generation.last_row(), wanted + 1)?.len() > wanted)
}

fn newer_options(last_row: u64) -> LiveOptions {
    LiveOptions {
        filter: Some(Arc::new(RowsAfter::new(last_row))),
        ..LiveOptions::default()
    }
}

fn to_json(value: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("writing JSON").with_source(e))
}

fn from_json<T: for<'de> Deserialize<'de>>(value: serde_json::Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|e| Error::internal("what is held of an image").with_source(e))
}
