//! Self-contained images: closures as one EROFS file, for VMs and containers.
//!
//! The image holds uncompressed blocks of 4 KiB that any kernel since Linux 5.4 reads: metadata first, then the
//! contents, equal files once. The same paths give the same bytes, whatever store they come from, in which order they
//! were named and how many threads write: paths are sorted, and contents lie in the order in which names first need
//! them.
//!
//! The tree is walked twice, without reading contents: once to place contents and learn the size of the metadata, once
//! to write the metadata. Then contents are read from the castore and compared with their digest on the way out, by
//! several threads. The file appears under its name when it is whole and durable, and not before.
//!
//! Cost: the closure's rows, about 90 bytes a unique file, 1 MiB a thread and what [`understory_erofs::Writer`] takes:
//! 200 MB for 1,000,000 unique files. Reading is bound by decompression.

mod verity;

pub use verity::{Verity, add_verity};

use crate::{Error, Result, Store};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use understory_castore::{Digest, Node};
use understory_erofs::{BLOCK_BYTES, Data, ErofsError, Figures, Options, Writer};
use understory_nix::StorePath;

use crate::store::StoredPath;

/// Bytes of contents that a thread reads at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Threads that read contents, at most: more than the disk and the castore's cache feed are of no use.
const THREADS_MAX: usize = 8;
/// Contents that a thread takes at a time.
const BATCH: usize = 64;
/// The name of the registration, as NixOS's images have it.
const REGISTRATION: &[u8] = b"nix-path-registration";

/// What the image shows.
#[derive(Debug, Clone, Default)]
pub struct ImageOptions {
    /// The root has the store directory in it (`/nix/store/…`). Otherwise the root is the store directory.
    pub full_paths: bool,
    /// Adds the file `nix-path-registration` to the root, for `nix-store --load-db`.
    pub registration: bool,
    /// An existing file is replaced.
    pub replace: bool,
    /// Threads that read contents; 0 = as many as cores, at most 8.
    pub threads: usize,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReport {
    /// Store paths.
    pub paths: u64,
    /// What the metadata has.
    pub figures: Figures,
    /// Different contents.
    pub contents: u64,
    /// Their bytes.
    pub content_bytes: u64,
    /// Size of the image.
    pub image_bytes: u64,
}

impl ImageReport {
    /// The image's UUID as text: a hash of all that is in it.
    pub fn uuid(&self) -> String {
        let hex = data_encoding::HEXLOWER.encode(&self.figures.uuid);
        let parts = [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        ];
        parts.join("-")
    }
}

/// An image that is whole and durable, but has no name yet. Dropped, it is gone.
pub struct UnnamedImage {
    file: tempfile::NamedTempFile,
    target: PathBuf,
    replace: bool,
    /// What was written.
    pub report: ImageReport,
}

/// Writes an image of the closures of `paths`, to be named `target`. `progress` gets (bytes done, bytes in all) from
/// any thread; `cancel` makes it end soon.
///
/// # Errors
/// A path is not valid; `target` is there; damaged content; full disk; cancelled.
pub fn write(
    store: &Store,
    paths: &[StorePath],
    target: &Path,
    options: &ImageOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &AtomicBool,
) -> Result<UnnamedImage> {
    if !options.replace && target.symlink_metadata().is_ok() {
        return Err(exists(target));
    }
    let mut closure = store.closure(paths)?;
    closure.sort_by(|a, b| a.info.path.base_name().cmp(b.info.path.base_name()));
    let mut plan = Plan {
        store,
        closure: &closure,
        options,
        places: HashMap::new(),
        contents: Vec::new(),
        blocks: 0,
    };
    let dir = directory_of(target);
    // The first walk finds out how large the metadata is.
    let (_, dry) = plan.feed(std::io::empty(), 0)?;
    let image_blocks = u64::from(dry.metadata_blocks) + u64::from(plan.blocks);
    if image_blocks > u64::from(u32::MAX) {
        return Err(too_large());
    }
    let image_bytes = image_blocks * BLOCK_BYTES;
    let temporary = tempfile::Builder::new()
        .prefix(".understory-image-")
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(&dir)
        .map_err(|e| Error::io("creating a file in", &dir, e))?;
    let file = temporary.as_file();
    let failed = |e: std::io::Error| writing(target, e);
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, image_bytes) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(image_bytes).map_err(failed)?,
        Err(errno) => return Err(failed(errno.into())),
    }
    let out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let (_, figures) = plan.feed(out, dry.metadata_blocks)?;
    let report = ImageReport {
        paths: closure.len() as u64,
        figures,
        contents: plan.contents.len() as u64,
        content_bytes: plan.contents.iter().map(Content::bytes).sum(),
        image_bytes,
    };
    Contents {
        plan: &plan,
        file,
        target,
        first_block: figures.metadata_blocks,
        all_bytes: report.content_bytes,
        done_bytes: AtomicU64::new(0),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        progress,
        cancel,
    }
    .write()?;
    file.sync_all().map_err(failed)?;
    Ok(UnnamedImage {
        file: temporary,
        target: target.to_owned(),
        replace: options.replace,
        report,
    })
}

impl UnnamedImage {
    /// Where it lies meanwhile.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives it its name. Durable on return.
    ///
    /// # Errors
    /// The name has been taken meanwhile; I/O.
    pub fn persist(self) -> Result<ImageReport> {
        persist(self.file, &self.target, self.replace)?;
        Ok(self.report)
    }
}

/// Names a temporary file.
fn persist(file: tempfile::NamedTempFile, target: &Path, replace: bool) -> Result<()> {
    let result = if replace {
        file.persist(target)
    } else {
        file.persist_noclobber(target)
    };
    result.map_err(|failed| match failed.error.kind() {
        std::io::ErrorKind::AlreadyExists => exists(target),
        _ => Error::io("naming", target, failed.error),
    })?;
    let dir = directory_of(target);
    File::open(&dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io("syncing", dir, e))
}

fn directory_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn exists(target: &Path) -> Error {
    Error::user(format!("{} is there already", target.display()))
        .with_hint("name another file, or replace it with --force")
}

fn writing(target: &Path, error: std::io::Error) -> Error {
    let full = matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    );
    let error = Error::io("writing", target, error);
    match full {
        true => error.with_hint(
            "free some space, or name a file on another file system; nothing was left behind",
        ),
        false => error,
    }
}

fn too_large() -> Error {
    Error::user("the closure takes more than 16 TiB, which is what an image can have")
        .with_hint("write several images")
}

/// The image as far as it can be known without reading contents.
struct Plan<'a> {
    store: &'a Store,
    closure: &'a [Arc<StoredPath>],
    options: &'a ImageOptions,
    /// First blocks of contents.
    places: HashMap<Digest, u32>,
    /// In the order of their blocks.
    contents: Vec<Content>,
    blocks: u32,
}

/// What a run of blocks holds.
struct Content {
    block: u32,
    source: ContentSource,
}

enum ContentSource {
    Blob { digest: Digest, size: u64 },
    Text(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> u64 {
        match &self.source {
            ContentSource::Blob { size, .. } => *size,
            ContentSource::Text(text) => text.len() as u64,
        }
    }
}

impl Plan<'_> {
    /// Feeds the tree to a writer. The first time, contents get their places.
    fn feed<W: Write + Seek>(&mut self, out: W, first_block: u32) -> Result<(W, Figures)> {
        let options = Options {
            data: Data::Behind {
                first_block,
                // Not known in the first walk.
                blocks: if first_block == 0 {
                    u32::MAX
                } else {
                    self.blocks
                },
            },
            mtime_s: 1,
        };
        let mut writer = Writer::new(out, options).map_err(erofs)?;
        let dirs: Vec<&[u8]> = match self.options.full_paths {
            true => self
                .store
                .store_dir()
                .as_str()
                .split('/')
                .filter(|name| !name.is_empty())
                .map(str::as_bytes)
                .collect(),
            false => Vec::new(),
        };
        for dir in &dirs {
            writer.begin_directory(dir).map_err(erofs)?;
        }
        let closure = self.closure;
        for path in closure {
            let name = path.info.path.base_name().as_bytes();
            self.node(&mut writer, name, &path.root)?;
        }
        for _ in &dirs {
            writer.end_directory().map_err(erofs)?;
        }
        if self.options.registration {
            self.registration(&mut writer)?;
        }
        let mut identity = blake3::Hasher::new();
        for content in &self.contents {
            match &content.source {
                ContentSource::Blob { digest, .. } => identity.update(&digest.0),
                ContentSource::Text(text) => identity.update(text),
            };
        }
        writer.finish(identity.finalize().as_bytes()).map_err(erofs)
    }

    fn node<W: Write + Seek>(
        &mut self,
        writer: &mut Writer<W>,
        name: &[u8],
        node: &Node,
    ) -> Result<()> {
        match node {
            Node::Symlink { target } => writer.symlink(name, target).map_err(erofs),
            Node::File {
                digest,
                size,
                executable,
            } => {
                let first_block = self.place(digest, *size)?;
                let file = understory_erofs::File {
                    size: *size,
                    executable: *executable,
                    first_block,
                };
                writer.file(name, &file).map_err(erofs)
            }
            Node::Directory { digest, .. } => {
                let directory = self.store.castore().directory(digest)?;
                writer.begin_directory(name).map_err(erofs)?;
                for entry in directory.entries() {
                    self.node(writer, &entry.name, &entry.node)?;
                }
                writer.end_directory().map_err(erofs)
            }
        }
    }

    fn place(&mut self, digest: &Digest, size: u64) -> Result<u32> {
        if size == 0 {
            return Ok(0);
        }
        if let Some(block) = self.places.get(digest) {
            return Ok(*block);
        }
        let source = ContentSource::Blob {
            digest: *digest,
            size,
        };
        let block = self.add(source, size)?;
        self.places.insert(*digest, block);
        Ok(block)
    }

    fn add(&mut self, source: ContentSource, size: u64) -> Result<u32> {
        let block = self.blocks;
        self.blocks = u32::try_from(u64::from(block) + size.div_ceil(BLOCK_BYTES))
            .map_err(|_| too_large())?;
        self.contents.push(Content { block, source });
        Ok(block)
    }

    /// What `nix-store --load-db` reads: for each path its name, NAR hash and size, deriver, references.
    fn registration<W: Write + Seek>(&mut self, writer: &mut Writer<W>) -> Result<()> {
        let last = self
            .contents
            .last()
            .map(|content| (content.block, &content.source));
        let (first_block, size) = match last {
            Some((block, ContentSource::Text(text))) => (block, text.len()),
            _ => {
                let text = registration(self.store, self.closure);
                let size = text.len();
                (self.add(ContentSource::Text(text), size as u64)?, size)
            }
        };
        let file = understory_erofs::File {
            size: size as u64,
            executable: false,
            first_block,
        };
        writer.file(REGISTRATION, &file).map_err(erofs)
    }
}

/// The registration of `closure`, in the format of `nix-store --dump-db`, which `--load-db` reads (Nix 2.8 loads it and
/// dumps the same). Registration times and signatures have no place in it.
pub fn registration(store: &Store, closure: &[Arc<StoredPath>]) -> Vec<u8> {
    let dir = store.store_dir();
    let mut text = String::new();
    for path in closure {
        let info = &path.info;
        let deriver = info.deriver.as_ref().map(|path| dir.print(path));
        let lines = [
            dir.print(&info.path),
            info.nar_hash.to_hash().to_base16(),
            info.nar_size.to_string(),
            deriver.unwrap_or_default(),
            info.references.len().to_string(),
        ];
        for line in lines
            .into_iter()
            .chain(info.references.iter().map(|path| dir.print(path)))
        {
            text.push_str(&line);
            text.push('\n');
        }
    }
    text.into_bytes()
}

/// The contents on their way from castore to file.
struct Contents<'a> {
    plan: &'a Plan<'a>,
    file: &'a File,
    target: &'a Path,
    first_block: u32,
    all_bytes: u64,
    done_bytes: AtomicU64,
    /// The first content that no thread has taken.
    next: AtomicUsize,
    failed: AtomicBool,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    cancel: &'a AtomicBool,
}

impl Contents<'_> {
    fn write(&self) -> Result<()> {
        let threads = match self.plan.options.threads {
            0 => std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(THREADS_MAX),
            count => count,
        };
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads)
                .map(|number| {
                    std::thread::Builder::new()
                        .name(format!("image-{number}"))
                        .spawn_scoped(scope, || {
                            let result = self.run();
                            if result.is_err() {
                                self.failed.store(true, Ordering::Relaxed);
                            }
                            result
                        })
                })
                .collect();
            let mut result = Ok(());
            for thread in started {
                let thread = thread.map_err(|e| {
                    self.failed.store(true, Ordering::Relaxed);
                    Error::environment("starting a thread").with_source(e)
                });
                let ended = thread.and_then(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(Error::internal("a thread of the image panicked")))
                });
                result = result.and(ended);
            }
            result
        })
    }

    fn run(&self) -> Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let start = self.next.fetch_add(BATCH, Ordering::Relaxed);
            let contents = &self.plan.contents;
            let Some(batch) = contents.get(start..contents.len().min(start + BATCH)) else {
                return Ok(());
            };
            if batch.is_empty() {
                return Ok(());
            }
            for content in batch {
                self.content(content, &mut buffer)?;
            }
        }
    }

    fn content(&self, content: &Content, buffer: &mut [u8]) -> Result<()> {
        let mut at = (u64::from(self.first_block) + u64::from(content.block)) * BLOCK_BYTES;
        let mut put = |bytes: &[u8]| {
            if self.cancel.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) {
                return Err(Error::user("interrupted"));
            }
            self.file
                .write_all_at(bytes, at)
                .map_err(|e| writing(self.target, e))?;
            at += bytes.len() as u64;
            let bytes = bytes.len() as u64;
            let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
            (self.progress)(done, self.all_bytes);
            Ok(())
        };
        let (digest, size) = match &content.source {
            ContentSource::Text(text) => return put(text),
            ContentSource::Blob { digest, size } => (digest, *size),
        };
        let blob = self.plan.store.castore().blob(digest, size)?;
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        while offset < size {
            let count = usize::try_from(size - offset)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let count = blob.read_at(offset, &mut buffer[..count])?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
            put(&buffer[..count])?;
            offset += count as u64;
        }
        let found = Digest(*hasher.finalize().as_bytes());
        if found != *digest {
            return Err(Error::corrupt(format!(
                "blob {digest}: its bytes have the digest {found}"
            ))
            .with_hint("run `understory check` to see all that is damaged"));
        }
        Ok(())
    }
}

fn erofs(error: ErofsError) -> Error {
    match error {
        ErofsError::Write(source) => writing(Path::new("the image"), source),
        error @ ErofsError::TooLarge { .. } => {
            Error::user("the image cannot be written").with_source(error)
        }
        error => Error::internal("the image cannot be written").with_source(error),
    }
}
