//! A generation that is mounted: in use, its blob server, its image.

use super::hot::HotOptions;
use super::{Generation, Generations, InUse, StoreDevice};
use crate::mount::{
    BlobMount, BlobOptions, Handover, HoldLive, ImageMount, ImageRequest, Route, image_name,
};
use crate::{Error, Result, Store};
use rustix::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Bytes that the kernel reads ahead of a sequential reader of an image.
pub const READ_AHEAD_BYTES: u32 = 1 << 20;

/// How to mount a generation.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Ways to mount the image, in the order of trying; see [`Route`].
    pub routes: Vec<Route>,
    /// Threads of the blob server; 0 = by the number of cores.
    pub threads: usize,
    /// Bytes that the kernel reads ahead.
    pub read_ahead_bytes: u32,
    /// Use the raw tier.
    pub hot: Option<HotOptions>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            routes: Route::ALL.to_vec(),
            threads: 0,
            read_ahead_bytes: READ_AHEAD_BYTES,
            hot: None,
        }
    }
}

impl MountOptions {
    fn blob(&self) -> BlobOptions {
        BlobOptions {
            threads: self.threads,
        }
    }
}

/// A mounted generation with a blob server of its own. Dropping it unmounts both.
pub struct MountedGeneration {
    // In the order of dropping: the image lies on the blob server.
    image: MountedImage,
    blob: BlobMount,
}

/// A mounted image, which keeps its generation in use. Dropping it unmounts.
pub struct MountedImage {
    mount: ImageMount,
    in_use: InUse,
}

impl MountedGeneration {
    /// Mounts `generation` of `store` on the directory `mountpoint`, with its blob server on the directory `server`.
    ///
    /// # Errors
    /// As [`Generations::take`]; the machine refuses, with a hint.
    pub fn mount(
        store: &Store,
        generation: &Generation,
        server: &Path,
        mountpoint: &Path,
        options: &MountOptions,
    ) -> Result<Self> {
        let in_use = Generations::of(store).take(generation)?;
        let blob = serve(store, server, options)?;
        let image = MountedImage::mount(in_use, blob.mountpoint(), mountpoint, options)?;
        blob.set_mounted(generation.number, true);
        Ok(Self { image, blob })
    }

    /// The image.
    pub fn image(&self) -> &MountedImage {
        &self.image
    }

    /// True while the contents of files are served.
    pub fn is_serving(&self) -> bool {
        self.blob.is_serving()
    }

    /// Unmounts both.
    ///
    /// # Errors
    /// Not permitted.
    pub fn unmount(self) -> Result<()> {
        self.image.mount.unmount()?;
        self.blob.unmount()
    }
}

/// Mounts a blob server of `store` on the directory `at`.
///
/// # Errors
/// The store has made no generation; the machine refuses.
pub fn serve(store: &Store, at: &Path, options: &MountOptions) -> Result<BlobMount> {
    let device = StoreDevice::open(store, options.hot.as_ref())?;
    BlobMount::mount(Box::new(device), store.dir(), at, &options.blob(), None)
}

/// As [`serve`], but what outlives the server is given to `hold` before anything is served, and the mount stays when
/// what is returned is dropped.
///
/// # Errors
/// As [`serve`], or those of `hold`.
pub fn serve_held(
    store: &Store,
    at: &Path,
    options: &MountOptions,
    hold: HoldLive<'_>,
) -> Result<BlobMount> {
    let device = StoreDevice::open(store, options.hot.as_ref())?;
    let blob = options.blob();
    BlobMount::mount(Box::new(device), store.dir(), at, &blob, Some(hold))
}

/// Serves a blob server whose process is dead; see [`LiveMount::take_over`](crate::mount::LiveMount::take_over).
///
/// # Errors
/// What was held is not of this version.
pub fn take_over(
    store: &Store,
    state: &Handover,
    descriptors: Vec<OwnedFd>,
    options: &MountOptions,
    refuse_resent: bool,
    hold: HoldLive<'_>,
) -> Result<BlobMount> {
    let device = Box::new(StoreDevice::open(store, options.hot.as_ref())?);
    let blob = options.blob();
    BlobMount::take_over(device, state, descriptors, &blob, refuse_resent, hold)
}

impl MountedImage {
    /// Mounts what is in use on the directory `mountpoint`; its blob server is mounted at `server`.
    ///
    /// # Errors
    /// The machine refuses, with each reason.
    pub fn mount(
        in_use: InUse,
        server: &Path,
        mountpoint: &Path,
        options: &MountOptions,
    ) -> Result<Self> {
        let generation = in_use.generation();
        let image: PathBuf = std::fs::canonicalize(generation.image())
            .map_err(|e| Error::io("resolving", generation.image(), e))?;
        let mount = ImageMount::mount(&ImageRequest {
            image: &image,
            served: &server.join(image_name(generation.number)),
            device: &server.join(crate::mount::BLOB_NAME),
            mountpoint,
            routes: &options.routes,
            read_ahead_bytes: options.read_ahead_bytes,
        })?;
        Ok(Self { mount, in_use })
    }

    /// The mount.
    pub fn mount_point(&self) -> &ImageMount {
        &self.mount
    }

    /// The generation.
    pub fn generation(&self) -> &Generation {
        self.in_use.generation()
    }
}

impl Drop for MountedImage {
    fn drop(&mut self) {
        if let Err(error) = self.mount.unmount() {
            tracing::warn!("{}", error.chain());
        }
    }
}
