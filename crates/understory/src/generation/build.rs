//! Makes the image of a generation: walks directories, gives extents, writes metadata.
//!
//! Cost: each unique directory that is met is read (a frame holds a hundred of them) and each file costs a look
//! into a hash table; nothing is decompressed but directories. 10,000 paths are some 400,000 names: about two
//! seconds. Memory: the address space's table, the writer (see `understory_erofs::Writer`), and the listings
//! from the root down to where the walk is.

use super::space::{Appender, BLOCK_BYTES};
use super::{IMAGE, PATHS};
use crate::import::Selection;
use crate::store::StoredPath;
use crate::{Error, Result, Store};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use understory_castore::{Directory, Node};
use understory_erofs::{Data, Options, Writer};
use understory_nix::StorePath;

/// Rows that are read at once.
const ROWS: usize = 1000;
/// Directories below one another: more than any path that the kernel would take has.
const DEPTH_MAX: usize = 4096;
/// Bytes collected before the image is written to.
const WRITE_BYTES: usize = 256 << 10;
/// What the image says of its extra device: the beginning of the address space's id follows.
const DEVICE_TAG: &str = "understory ";
/// The time of everything in a store.
const MTIME_S: u64 = 1;

/// How far the making of a generation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Paths done.
    pub paths: u64,
    /// Paths in all.
    pub paths_total: u64,
    /// Names so far.
    pub entries: u64,
}

/// What a generation has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Store paths.
    pub paths: u64,
    /// Inodes; files of equal content share one.
    pub inodes: u64,
    /// Directories, with the root.
    pub directories: u64,
    /// Names of files.
    pub files: u64,
    /// Names of symlinks.
    pub symlinks: u64,
    /// Bytes of all files, each name counted.
    pub file_bytes: u64,
    /// Extents that were new.
    pub new_extents: u64,
    /// Milliseconds that it took to make.
    pub made_ms: u64,
}

/// What was written into the directory of a new generation.
pub(super) struct Built {
    pub(super) last_row: u64,
    pub(super) image_bytes: u64,
    pub(super) image_blake3: String,
    pub(super) figures: Figures,
}

/// Writes image and list of paths into `dir`, synced. Of all paths, those of `without` are left out.
pub(super) fn build(
    store: &Store,
    selection: &Selection,
    without: &BTreeSet<StorePath>,
    space: &mut Appender,
    dir: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Built> {
    let start = Instant::now();
    let extents_before = space.count();
    let image_path = dir.join(IMAGE);
    let list_path = dir.join(PATHS);
    let create = |path: &Path| {
        File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| Error::io("creating", path, e))
    };
    let image = BufWriter::with_capacity(WRITE_BYTES, create(&image_path)?);
    let list = BufWriter::new(create(&list_path)?);
    let options = Options {
        data: Data::Device {
            tag: format!("{DEVICE_TAG}{}", super::hex(&space.id())).into_bytes(),
            // The whole of it, so that the image does not depend on what else has extents.
            blocks: super::space::SPACE_BLOCKS_MAX as u32,
        },
        mtime_s: MTIME_S,
    };
    let failed = |e| image_error(&image_path, e);
    let mut walk = Walk {
        store,
        space,
        writer: Writer::new(image, options).map_err(failed)?,
        image_path: &image_path,
        list,
        list_path: &list_path,
        progress,
        done: Progress::default(),
        file_bytes: 0,
        last_row: 0,
    };
    match selection {
        Selection::All => walk.all(without)?,
        Selection::Paths { paths, closure } => {
            let paths: Vec<_> = paths.iter().cloned().collect();
            let rows = if *closure {
                store.closure(&paths)?
            } else {
                let found = store.paths(&paths)?;
                let rows = found.into_iter().zip(&paths).map(|(row, path)| {
                    row.ok_or_else(|| {
                        Error::user(format!(
                            "path '{}' is not valid",
                            store.store_dir().print(path)
                        ))
                    })
                });
                rows.collect::<Result<_>>()?
            };
            walk.some(rows)?;
        }
    }
    let Walk {
        writer,
        mut list,
        done,
        file_bytes,
        last_row,
        ..
    } = walk;
    // The address space is what gives the blocks a meaning.
    let (image, counted) = writer.finish(&space.id()).map_err(failed)?;
    let mut image = image
        .into_inner()
        .map_err(|e| Error::io("writing", &image_path, e.into_error()))?;
    image
        .sync_all()
        .map_err(|e| Error::io("syncing", &image_path, e))?;
    list.flush()
        .and_then(|()| list.get_ref().sync_all())
        .map_err(|e| Error::io("writing", &list_path, e))?;
    let mut hasher = blake3::Hasher::new();
    let image_bytes = image
        .seek(SeekFrom::Start(0))
        .and_then(|_| std::io::copy(&mut image, &mut hasher))
        .map_err(|e| Error::io("reading", &image_path, e))?;
    Ok(Built {
        last_row,
        image_bytes,
        image_blake3: hasher.finalize().to_hex().to_string(),
        figures: Figures {
            paths: done.paths,
            inodes: counted.inodes,
            directories: counted.directories,
            files: counted.files,
            symlinks: counted.symlinks,
            file_bytes,
            new_extents: space.count() - extents_before,
            made_ms: start.elapsed().as_millis() as u64,
        },
    })
}

struct Walk<'a, W: Write + Seek> {
    store: &'a Store,
    space: &'a mut Appender,
    writer: Writer<W>,
    image_path: &'a Path,
    list: BufWriter<File>,
    list_path: &'a Path,
    progress: &'a mut dyn FnMut(Progress),
    done: Progress,
    file_bytes: u64,
    last_row: u64,
}

impl<W: Write + Seek> Walk<'_, W> {
    fn all(&mut self, without: &BTreeSet<StorePath>) -> Result<()> {
        self.done.paths_total = self.store.count()?.saturating_sub(without.len() as u64);
        loop {
            let rows = self.store.list(self.last_row, ROWS)?;
            let is_last = rows.len() < ROWS;
            for row in rows {
                self.last_row = row.id;
                if !without.contains(&row.info.path) {
                    self.path(&row)?;
                }
            }
            if is_last {
                return Ok(());
            }
        }
    }

    fn some(&mut self, mut rows: Vec<Arc<StoredPath>>) -> Result<()> {
        rows.sort_by_key(|row| row.id);
        rows.dedup_by_key(|row| row.id);
        self.done.paths_total = rows.len() as u64;
        rows.iter().try_for_each(|row| self.path(row))
    }

    /// Adds a store path.
    fn path(&mut self, row: &StoredPath) -> Result<()> {
        let name = row.info.path.base_name();
        self.node(name.as_bytes(), &row.root).map_err(|error| {
            Error::new(
                error.kind(),
                format!("putting {name} into a generation: {}", error.chain()),
            )
        })?;
        writeln!(self.list, "{} {name}", row.id)
            .map_err(|e| Error::io("writing", self.list_path, e))?;
        self.done.paths += 1;
        (self.progress)(self.done);
        Ok(())
    }

    /// Adds a node and all below, depth first.
    fn node(&mut self, name: &[u8], node: &Node) -> Result<()> {
        /// A listing and the next entry of it.
        struct Level {
            directory: Arc<Directory>,
            next: usize,
        }
        let mut levels: Vec<Level> = Vec::new();
        levels.extend(
            self.enter(name, node)?
                .map(|directory| Level { directory, next: 0 }),
        );
        while let Some(level) = levels.last_mut() {
            // Cheap, and ends the borrow.
            let directory = Arc::clone(&level.directory);
            let Some(entry) = directory.entries().get(level.next) else {
                self.writer
                    .end_directory()
                    .map_err(|e| image_error(self.image_path, e))?;
                levels.pop();
                continue;
            };
            level.next += 1;
            if let Some(directory) = self.enter(&entry.name, &entry.node)? {
                if levels.len() == DEPTH_MAX {
                    return Err(Error::corrupt(format!(
                        "more than {DEPTH_MAX} directories below one another"
                    )));
                }
                levels.push(Level { directory, next: 0 });
            }
        }
        Ok(())
    }

    /// Adds one node; returns the listing of a directory, which is open then.
    fn enter(&mut self, name: &[u8], node: &Node) -> Result<Option<Arc<Directory>>> {
        self.done.entries += 1;
        match node {
            Node::Directory { digest, .. } => {
                let directory = self.store.castore().directory(digest)?;
                self.writer
                    .begin_directory(name)
                    .map_err(|e| image_error(self.image_path, e))?;
                return Ok(Some(directory));
            }
            Node::File {
                digest,
                size,
                executable,
            } => {
                let offset = match *size {
                    0 => 0,
                    size => self.space.place(digest, size)?,
                };
                let file = understory_erofs::File {
                    size: *size,
                    executable: *executable,
                    // Less than 2³²: the space has no more blocks.
                    first_block: (offset / BLOCK_BYTES) as u32,
                };
                self.file_bytes += size;
                self.writer.file(name, &file)
            }
            Node::Symlink { target } => self.writer.symlink(name, target),
        }
        .map_err(|e| image_error(self.image_path, e))?;
        Ok(None)
    }
}

/// Calls `each` with digest and size of each file of a tree that is not empty.
pub(super) fn for_files(
    store: &Store,
    root: &Node,
    each: &mut dyn FnMut(&understory_castore::Digest, u64) -> Result<()>,
) -> Result<()> {
    let mut open = vec![root.clone()];
    while let Some(node) = open.pop() {
        match node {
            Node::File { digest, size, .. } if size > 0 => each(&digest, size)?,
            Node::Directory { digest, .. } => {
                let directory = store.castore().directory(&digest)?;
                open.extend(directory.entries().iter().map(|entry| entry.node.clone()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn image_error(path: &Path, error: understory_erofs::ErofsError) -> Error {
    let kind = if error.is_no_space() {
        crate::error::ErrorKind::Environment
    } else {
        crate::error::ErrorKind::Corrupt
    };
    Error::new(kind, format!("writing {}", path.display())).with_source(error)
}
