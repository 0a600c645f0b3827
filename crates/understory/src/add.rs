//! Adding store objects: from NAR streams with a path info (imports, AddToStoreNar), and as content
//! addressed objects from dumps and files (`understory add`, AddToStore).
//!
//! Order of every addition: temporary root (so that no collection takes what is being added), look
//! whether the path is valid already, content into the castore, all hashes compared, publication.
//! When a hash differs, nothing is published; pieces that came into the castore are unreferenced.

mod batch;

pub use batch::{Batch, add_multiple};

use crate::nar::{
    HashRequest, ReadNar, ReadOptions, hash_node, read_nar_with, read_path_with, skip_nar,
};
use crate::store::TempRootOwner;
use crate::{Error, Result, Store};
use std::collections::BTreeSet;
use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use understory_castore::{Masks, Node, TreeBuilder};
use understory_nix::content_address::References;
use understory_nix::hash::CountingHasher;
use understory_nix::{
    ContentAddress, ContentAddressMethod, Hash, HashAlgorithm, NarHash, PathInfo, StoreDir,
    StorePath, StorePathName,
};

/// Flat dumps up to this are kept in memory to be hashed as a NAR, whose header says the size before
/// the contents. Longer ones are read back from the castore.
const FLAT_IN_MEMORY_BYTES_MAX: usize = 4 << 20;

/// How a content-addressed object is made.
#[derive(Debug, Clone)]
pub struct AddMethod {
    /// How it is serialised for its hash.
    pub method: ContentAddressMethod,
    /// The hash.
    pub algorithm: HashAlgorithm,
}

impl Default for AddMethod {
    /// What `nix store add` does.
    fn default() -> Self {
        Self {
            method: ContentAddressMethod::Nar,
            algorithm: HashAlgorithm::Sha256,
        }
    }
}

/// Adds the file, directory or symlink at `path` as a content-addressed object, as `nix store add`
/// does. `name` defaults to the last part of `path`. Returns the path info; the path is valid, and
/// alive as long as `owner`.
///
/// # Errors
/// Not a name for a store path, I/O, an unsupported file type, a file where a directory is, a
/// reference that is not valid.
pub fn add_path(
    store: &Store,
    owner: &TempRootOwner,
    path: &Path,
    name: Option<&str>,
    how: &AddMethod,
    references: &BTreeSet<StorePath>,
) -> Result<PathInfo> {
    let name = name_of(path, name)?;
    let request = request_of(how);
    let writer = store.writer()?;
    let read = read_path_with(
        &writer,
        path,
        &ReadOptions {
            hash: request,
            masks: Some(&store.masks(None, references)),
            ..ReadOptions::default()
        },
    )?;
    if matches!(
        how.method,
        ContentAddressMethod::Flat | ContentAddressMethod::Text
    ) {
        no_executable_bit(store, owner, &name, how, references, read)
    } else {
        finish(store, owner, &name, how, references, read)
    }
}

/// Returns the path that [`add_path`] would make, without storing anything.
///
/// # Errors
/// As [`add_path`].
pub fn path_of(
    store: &Store,
    name: &str,
    content: ContentAddress,
    references: &BTreeSet<StorePath>,
) -> Result<StorePath> {
    let references = References {
        others: references.clone(),
        itself: false,
    };
    Ok(content.make_path(store.store_dir(), &StorePathName::new(name)?, &references)?)
}

/// Adds a content-addressed object from a dump: for [`ContentAddressMethod::Nar`] and
/// [`ContentAddressMethod::Git`] exactly one NAR is read, for the other methods all of `dump` is the
/// file's contents. The path is computed here; it is valid on return, and alive as long as `owner`.
///
/// # Errors
/// Malformed dump, stream error, a reference that is not valid or not allowed with this method.
pub fn add_from_dump(
    store: &Store,
    owner: &TempRootOwner,
    name: &str,
    how: &AddMethod,
    references: &BTreeSet<StorePath>,
    repair: bool,
    dump: &mut dyn BufRead,
) -> Result<PathInfo> {
    let name = StorePathName::new(name)?;
    let writer = store.writer()?;
    let masks = store.masks(None, references);
    let read = match how.method {
        ContentAddressMethod::Nar | ContentAddressMethod::Git => read_nar_with(
            &writer,
            dump,
            &ReadOptions {
                hash: request_of(how),
                masks: Some(&masks),
                ..ReadOptions::default()
            },
        )?,
        ContentAddressMethod::Flat | ContentAddressMethod::Text => {
            read_flat(store, how.algorithm, masks, dump)?
        }
    };
    finish_with(store, owner, &name, how, references, read, repair)
}

/// What to check and do when a NAR is added.
#[derive(Debug, Clone, Copy, Default)]
pub struct AddNarOptions {
    /// Replaces the content of a path that is valid already.
    pub repair: bool,
}

/// Adds a path from a NAR with its path info: reads exactly one NAR, checks hash, size and `ca`, and
/// publishes. If the path is valid already, the NAR is read and thrown away. Signatures are the
/// caller's concern. Returns true if the path was not valid before.
///
/// # Errors
/// `hash mismatch importing path '…'` and its like; malformed NAR, stream error; a reference is not
/// valid. Nothing is published then.
pub fn add_nar(
    store: &Store,
    owner: &TempRootOwner,
    info: PathInfo,
    stream: &mut dyn BufRead,
    options: AddNarOptions,
) -> Result<bool> {
    store.add_temp_root(owner, &info.path)?;
    let valid = store.is_valid(&info.path)?;
    if valid && !options.repair {
        skip_nar(stream)?;
        return Ok(false);
    }
    let root = ingest_nar(store, &info, stream)?;
    if options.repair {
        store.republish(vec![(info, root)])?;
    } else {
        store.publish(vec![(info, root)])?;
    }
    Ok(!valid)
}

/// Reads exactly one NAR into the castore and checks it against `info` (hash, size, `ca`); returns
/// the root node. Publishes nothing: for callers that publish many at once.
///
/// # Errors
/// As [`add_nar`].
pub fn ingest_nar(store: &Store, info: &PathInfo, stream: &mut dyn BufRead) -> Result<Node> {
    ingest_nar_with(store, info, stream, &ReadOptions::default())
}

/// [`ingest_nar`] that can be watched and cancelled; the options' `hash` and `masks` are ignored.
///
/// # Errors
/// As [`ingest_nar`].
pub fn ingest_nar_with(
    store: &Store,
    info: &PathInfo,
    stream: &mut dyn BufRead,
    options: &ReadOptions<'_>,
) -> Result<Node> {
    let writer = store.writer()?;
    let read = read_nar_with(
        &writer,
        stream,
        &ReadOptions {
            hash: check_request(info),
            masks: Some(&store.masks(Some(&info.path), &info.references)),
            ..*options
        },
    )?;
    check(store, info, &read).inspect_err(|_| store.castore().release(&read.root))?;
    Ok(read.root)
}

/// Reads a file tree on disk into the castore and checks it against `info`, like [`ingest_nar_with`].
/// A NAR size of 0 in `info` means that it is not known and is filled in.
///
/// # Errors
/// As [`ingest_nar`], and I/O.
pub fn ingest_path_with(
    store: &Store,
    info: &mut PathInfo,
    path: &Path,
    options: &ReadOptions<'_>,
) -> Result<Node> {
    let writer = store.writer()?;
    let read = read_path_with(
        &writer,
        path,
        &ReadOptions {
            hash: check_request(info),
            masks: Some(&store.masks(Some(&info.path), &info.references)),
            ..*options
        },
    )?;
    if info.nar_size == 0 {
        info.nar_size = read.nar_size;
    }
    check(store, info, &read).inspect_err(|_| store.castore().release(&read.root))?;
    Ok(read.root)
}

/// Which hash proves the content address of `info`.
pub(crate) fn check_request(info: &PathInfo) -> HashRequest {
    let Some(ca) = &info.ca else {
        return HashRequest::None;
    };
    let algorithm = ca.hash.algorithm();
    match ca.method {
        ContentAddressMethod::Nar if info.references.contains(&info.path) => {
            let mut hash_part = [0; 32];
            hash_part.copy_from_slice(info.path.hash_part().as_bytes());
            HashRequest::NarModulo(algorithm, hash_part)
        }
        ContentAddressMethod::Nar => HashRequest::Nar(algorithm),
        ContentAddressMethod::Flat | ContentAddressMethod::Text => HashRequest::Flat(algorithm),
        ContentAddressMethod::Git => HashRequest::Git(algorithm),
    }
}

/// Compares what was read with what was announced; the messages are Nix's.
pub(crate) fn check(store: &Store, info: &PathInfo, read: &ReadNar) -> Result<()> {
    check_content(
        store.store_dir(),
        info,
        &read.nar_hash,
        read.nar_size,
        read.content_hash.as_ref(),
    )
}

/// [`check`] for what was read elsewhere than into the castore. `content_hash` is what [`check_request`] asked for.
pub(crate) fn check_content(
    dir: &StoreDir,
    info: &PathInfo,
    nar_hash: &NarHash,
    nar_size: u64,
    content_hash: Option<&Hash>,
) -> Result<()> {
    let path = dir.print(&info.path);
    let differs = |what: &str, specified: &dyn std::fmt::Display, got: &dyn std::fmt::Display| {
        Err(Error::user(format!(
            "{what} importing path '{path}';\n  specified: {specified}\n  got:       {got}"
        )))
    };
    if *nar_hash != info.nar_hash {
        return differs("hash mismatch", &info.nar_hash, nar_hash);
    }
    if nar_size != info.nar_size {
        return differs("size mismatch", &info.nar_size, &nar_size);
    }
    if let (Some(ca), Some(found)) = (&info.ca, content_hash)
        && ca.hash != *found
    {
        let found = ContentAddress {
            method: ca.method,
            hash: *found,
        };
        return differs("ca hash mismatch", ca, &found);
    }
    Ok(())
}

fn request_of(how: &AddMethod) -> HashRequest {
    match how.method {
        ContentAddressMethod::Nar => HashRequest::Nar(how.algorithm),
        ContentAddressMethod::Git => HashRequest::Git(how.algorithm),
        ContentAddressMethod::Flat | ContentAddressMethod::Text => HashRequest::Flat(how.algorithm),
    }
}

fn name_of(path: &Path, name: Option<&str>) -> Result<StorePathName> {
    let name = match name {
        Some(name) => name,
        None => path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| {
                Error::user(format!("{} has no name for a store path", path.display()))
            })?,
    };
    Ok(StorePathName::new(name)?)
}

/// Reads a file's contents to the end of `dump`.
fn read_flat(
    store: &Store,
    algorithm: HashAlgorithm,
    masks: Arc<Masks>,
    dump: &mut dyn BufRead,
) -> Result<ReadNar> {
    let stream = |e: std::io::Error| Error::environment("reading the dump").with_source(e);
    let writer = store.writer()?;
    let mut builder = TreeBuilder::with_masks(writer.clone(), masks);
    let mut hasher = understory_nix::hash::Hasher::new(algorithm);
    let mut kept = Vec::new();
    let mut all_kept = true;
    let mut sink = builder.file(None, false, 0)?;
    loop {
        let piece = dump.fill_buf().map_err(stream)?;
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        sink.write(piece)?;
        all_kept &= kept.len() + piece.len() <= FLAT_IN_MEMORY_BYTES_MAX;
        if all_kept {
            kept.extend_from_slice(piece);
        } else {
            kept = Vec::new();
        }
        let count = piece.len();
        dump.consume(count);
    }
    sink.finish()?;
    let root = builder.finish()?;
    let content_hash = Some(hasher.finish());
    if all_kept {
        let (nar_hash, nar_size) = nar_of_file(&kept)?;
        return Ok(ReadNar {
            root,
            nar_hash,
            nar_size,
            content_hash,
        });
    }
    writer.sync()?;
    store.castore().refresh()?;
    Ok(ReadNar {
        content_hash,
        ..hash_node(store.castore(), &root, HashRequest::None)?
    })
}

pub(crate) fn nar_of_file(contents: &[u8]) -> Result<(NarHash, u64)> {
    let mut sink = CountingHasher::new(HashAlgorithm::Sha256);
    let mut nar = understory_nix::nar::Writer::new(&mut sink);
    nar.file(None, false, contents.len() as u64)?;
    nar.contents(contents)?;
    nar.finish()?;
    let (hash, bytes) = sink.finish();
    Ok((NarHash::try_from(hash)?, bytes))
}

/// A flat object is never executable, whatever the file on disk was.
fn no_executable_bit(
    store: &Store,
    owner: &TempRootOwner,
    name: &StorePathName,
    how: &AddMethod,
    references: &BTreeSet<StorePath>,
    mut read: ReadNar,
) -> Result<PathInfo> {
    if let Node::File {
        executable: executable @ true,
        ..
    } = &mut read.root
    {
        *executable = false;
        store.writer()?.sync()?;
        store.castore().refresh()?;
        let content_hash = read.content_hash;
        read = ReadNar {
            content_hash,
            ..hash_node(store.castore(), &read.root, HashRequest::None)?
        };
    }
    finish(store, owner, name, how, references, read)
}

fn finish(
    store: &Store,
    owner: &TempRootOwner,
    name: &StorePathName,
    how: &AddMethod,
    references: &BTreeSet<StorePath>,
    read: ReadNar,
) -> Result<PathInfo> {
    finish_with(store, owner, name, how, references, read, false)
}

fn finish_with(
    store: &Store,
    owner: &TempRootOwner,
    name: &StorePathName,
    how: &AddMethod,
    references: &BTreeSet<StorePath>,
    read: ReadNar,
    repair: bool,
) -> Result<PathInfo> {
    let hash = read
        .content_hash
        .ok_or_else(|| Error::internal("the content hash was not made"))?;
    let ca = ContentAddress {
        method: how.method,
        hash,
    };
    let with_self = References {
        others: references.clone(),
        itself: false,
    };
    let path = ca.make_path(store.store_dir(), name, &with_self)?;
    store.add_temp_root(owner, &path)?;
    if !repair && let Some(known) = store.path(&path)? {
        store.castore().release(&read.root);
        return Ok(known.info.clone());
    }
    let info = PathInfo {
        path: path.clone(),
        nar_hash: read.nar_hash,
        nar_size: read.nar_size,
        references: references.clone(),
        deriver: None,
        registration_time: 0,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: Some(ca),
    };
    if repair {
        store.republish(vec![(info, read.root)])?;
    } else {
        store.publish(vec![(info, read.root)])?;
    }
    // As it was registered: with its time.
    let stored = store
        .path(&path)?
        .ok_or_else(|| Error::internal("a path is gone that was just published"))?;
    Ok(stored.info.clone())
}
