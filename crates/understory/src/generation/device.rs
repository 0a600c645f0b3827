//! The virtual device of a store: offset, extent, file, bytes.
//!
//! - What a request asks for may lie in several extents; each is answered by the castore, which verifies the
//!   checksum of each frame that it reads. The padding of an extent and what is behind the last one is zeros.
//! - What cannot be read is EIO, and a line in the log that says why. A thread then looks for the store paths that
//!   the damage hurts, and names them: it may have to walk all trees, and a reader must not wait for that.
//!
//! Cost of a request that hits the castore's cache: the search of the extent (below 1 µs), the lookup of the file
//! (1 µs), and one copy.

use super::hot::{HotOptions, RawTier};
use super::metadata_ahead::MetadataAhead;
use super::space::{Extent, SPACE_BLOCKS_MAX, Space};
use super::{BLOCK_BYTES, Generations};
use crate::mount::Device;
use crate::open_files::{OpenFiles, open_files};
use crate::store::StoredPath;
use crate::{Error, Result, Store};
use crossbeam_channel::RecvTimeoutError;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use understory_castore::{Blob, Digest, Node};

/// Memory of the open blobs of large files: the recipes of 8 GiB of them, or the patches of three that have most.
const BLOBS_BYTES_MAX: u64 = 10 << 20;
/// Files up to this size are opened for each request: that is an index lookup, without I/O.
const SMALL_FILE_BYTES_MAX: u64 = 128 << 10;
/// Damaged files whose store paths are looked for; what comes later is logged without.
const HURT_FILES_MAX: usize = 1000;
/// Store paths that are named for one damaged file.
const HURT_PATHS_NAMED: usize = 10;
/// How often the thread of the raw tier looks whether the tier still is.
const HOT_POLL: Duration = Duration::from_secs(1);
/// Rows that are read at once.
const ROWS: usize = 1000;

/// See the module.
pub(crate) struct StoreDevice {
    store: Store,
    generations: Generations,
    space: Space,
    blobs: OpenFiles<u64, Blob>,
    images: Mutex<HashMap<u64, Arc<File>>>,
    hurt: Mutex<HashSet<Digest>>,
    hot: Option<Arc<RawTier>>,
    ahead: MetadataAhead,
}

impl StoreDevice {
    /// The device of `store`, which has made a generation.
    ///
    /// # Errors
    /// It has made none; the address space is damaged.
    pub(crate) fn open(store: &Store, hot: Option<&HotOptions>) -> Result<Self> {
        let generations = Generations::of(store);
        let space = generations.space()?;
        let hot = match hot {
            Some(options) => Some(Arc::new(RawTier::open(store, &space, options)?)),
            None => None,
        };
        if let Some(tier) = &hot {
            crate::metrics::register(tier);
            fill_on_demand(store, tier)?;
        }
        Ok(Self {
            store: store.clone(),
            space,
            hot,
            blobs: open_files(BLOBS_BYTES_MAX),
            images: Mutex::default(),
            hurt: Mutex::default(),
            ahead: MetadataAhead::new(&generations.extents()),
            generations,
        })
    }

    /// The extent at `offset`; looks for generations that were made meanwhile before it says that there is none.
    fn find(&self, offset: u64) -> Result<Option<Extent>> {
        match self.space.find(offset)? {
            Some(extent) => Ok(Some(extent)),
            None => {
                self.space.grow(self.generations.published()?)?;
                self.space.find(offset)
            }
        }
    }

    fn read(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            let Some(extent) = self.find(offset)? else {
                buffer.fill(0);
                return Ok(());
            };
            let within = offset - extent.offset;
            let count = clamp(extent.end() - offset, buffer.len());
            let (here, rest) = buffer.split_at_mut(count);
            self.ahead.before(count, within == 0);
            if !self.read_hot(&extent, within, here) {
                let bytes = clamp(extent.size.saturating_sub(within), count);
                let (contents, padding) = here.split_at_mut(bytes);
                padding.fill(0);
                if !contents.is_empty() {
                    self.read_packs(&extent, within, contents)
                        .inspect_err(|_| self.look_for_owners(&extent.digest))?;
                }
            }
            offset += count as u64;
            buffer = rest;
        }
        Ok(())
    }

    /// Fills `buffer` from the raw tier; false if that has it not.
    fn read_hot(&self, extent: &Extent, within: u64, buffer: &mut [u8]) -> bool {
        self.hot.as_ref().is_some_and(|hot| {
            let is_read = hot.read(extent, within, buffer);
            if !is_read {
                hot.count(extent, buffer.len());
            }
            is_read
        })
    }

    fn read_packs(&self, extent: &Extent, within: u64, buffer: &mut [u8]) -> Result<()> {
        let read = self.blob(extent)?.read_at(within, buffer)?;
        if read == buffer.len() {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "blob {} at {within}: expected {} bytes, found {read}",
            extent.digest,
            buffer.len()
        )))
    }

    fn blob(&self, extent: &Extent) -> Result<Blob> {
        let open = || Ok(self.store.castore().blob(&extent.digest, extent.size)?);
        if extent.size <= SMALL_FILE_BYTES_MAX {
            return open();
        }
        self.blobs.get_or_insert_with(&extent.offset, open)
    }

    /// Names the store paths that a damaged file hurts, in the background and once.
    fn look_for_owners(&self, digest: &Digest) {
        {
            let mut hurt = super::lock_mutex(&self.hurt);
            if hurt.len() >= HURT_FILES_MAX || !hurt.insert(*digest) {
                return;
            }
        }
        let (store, digest) = (self.store.clone(), *digest);
        let spawned = std::thread::Builder::new()
            .name("hurt-paths".into())
            .spawn(move || match owners(&store, &digest) {
                Ok(names) => {
                    tracing::error!(
                        "file {digest} cannot be read; it belongs to {}",
                        names.join(", ")
                    );
                }
                Err(error) => {
                    tracing::error!("looking for the paths of file {digest}: {}", error.chain());
                }
            });
        if let Err(error) = spawned {
            tracing::error!("starting a thread that looks for hurt paths: {error}");
        }
    }

    fn image(&self, number: u64) -> Result<Option<Arc<File>>, Errno> {
        let mut images = super::lock_mutex(&self.images);
        if let Some(file) = images.get(&number) {
            return Ok(Some(Arc::clone(file)));
        }
        let generation = match self.generations.load(number) {
            Ok(Some(generation)) => generation,
            Ok(None) => return Ok(None),
            Err(error) => {
                tracing::error!("{}", error.chain());
                return Err(Errno::IO);
            }
        };
        let file = Arc::new(File::open(generation.image()).map_err(|error| {
            tracing::error!("opening {}: {error}", generation.image().display());
            Errno::IO
        })?);
        images.insert(number, Arc::clone(&file));
        Ok(Some(file))
    }
}

impl Device for StoreDevice {
    fn bytes(&self) -> u64 {
        SPACE_BLOCKS_MAX * BLOCK_BYTES
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.read(offset, buffer).map_err(|error| {
            tracing::error!(
                "reading {} bytes at {offset} of the virtual device: {}",
                buffer.len(),
                error.chain()
            );
            Errno::IO
        })
    }

    fn image_bytes(&self, number: u64) -> Result<Option<u64>, Errno> {
        match self.image(number)? {
            Some(file) => Ok(Some(file.metadata().map_err(|_| Errno::IO)?.len())),
            None => Ok(None),
        }
    }

    fn set_mounted(&self, number: u64, is_mounted: bool) {
        let image = super::image_of(self.store.dir(), number);
        if is_mounted {
            self.ahead.add(&image);
        } else {
            self.ahead.remove(&image);
        }
    }

    fn read_image_at(&self, number: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let file = self.image(number)?.ok_or(Errno::STALE)?;
        let mut done = 0;
        while done < buffer.len() {
            match file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!("reading the image of generation {number}: {error}");
                    return Err(Errno::IO);
                }
            }
        }
        Ok(done)
    }
}

/// Starts the thread that takes files into the raw tier; it ends with the tier.
fn fill_on_demand(store: &Store, tier: &Arc<RawTier>) -> Result<()> {
    let Some(wanted) = tier.wanted() else {
        return Ok(());
    };
    let (store, tier) = (store.clone(), Arc::downgrade(tier));
    std::thread::Builder::new()
        .name("hot-files".into())
        .spawn(move || {
            loop {
                let extent = match wanted.recv_timeout(HOT_POLL) {
                    Ok(extent) => extent,
                    Err(RecvTimeoutError::Timeout) if tier.strong_count() > 0 => continue,
                    Err(_) => return,
                };
                let Some(tier) = tier.upgrade() else { return };
                if let Err(error) = tier.insert(&store, &extent) {
                    tracing::warn!("taking a file into the raw tier: {}", error.chain());
                }
            }
        })
        .map(drop)
        .map_err(|e| Error::environment("starting the thread of the raw tier").with_source(e))
}

/// Names of valid store paths that have a file of that digest, the first ones.
fn owners(store: &Store, digest: &Digest) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut after = 0;
    loop {
        let rows = store.list(after, ROWS)?;
        for row in &rows {
            after = row.id;
            if names.len() < HURT_PATHS_NAMED && has_file(store, row, digest)? {
                names.push(row.info.path.base_name().to_owned());
            }
        }
        if rows.len() < ROWS || names.len() == HURT_PATHS_NAMED {
            if names.is_empty() {
                names.push("no valid path".to_owned());
            }
            return Ok(names);
        }
    }
}

fn has_file(store: &Store, row: &StoredPath, wanted: &Digest) -> Result<bool> {
    let mut open = vec![row.root.clone()];
    while let Some(node) = open.pop() {
        match node {
            Node::File { digest, .. } if digest == *wanted => return Ok(true),
            Node::Directory { digest, .. } => {
                let directory = store.castore().directory(&digest)?;
                open.extend(directory.entries().iter().map(|entry| entry.node.clone()));
            }
            _ => {}
        }
    }
    Ok(false)
}

fn clamp(bytes: u64, max: usize) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX).min(max)
}
