//! The list of condemned packs: those that a collection is about to delete.
//!
//! `condemned` lies in the castore's directory from when a collection has chosen its packs until they
//! are gone. Writers of all processes do not rely on what lies in them; readers read on. What an
//! interrupted collection leaves behind is deleted by the next one. Each list has a random name, by
//! which others notice that it is a new one.
//!
//! ```text
//! 0   8   USTYCOND
//! 8   4   version, 1
//! 12  4   number of packs n
//! 16  16  name of the list: random
//! 32  16 × n  pack ids
//! …   8   XXH3 of all before it
//! ```

use crate::core::random_id;
use crate::error::{CastoreError, IoContext};
use crate::medium::Medium;
use crate::pack::{PackId, check_sum, u32_at};
use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

const FILE: &str = "condemned";
const TEMPORARY: &str = "condemned.tmp";
const MAGIC: [u8; 8] = *b"USTYCOND";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 32;
const ID_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 8;

/// A list as it was read; no file is an empty list without a name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Condemned {
    name: Option<[u8; ID_BYTES]>,
    packs: HashSet<PackId>,
}

impl Condemned {
    pub(crate) fn name(&self) -> Option<[u8; ID_BYTES]> {
        self.name
    }
    pub(crate) fn has(&self, pack: &PackId) -> bool {
        self.packs.contains(pack)
    }
    pub(crate) fn packs(&self) -> &HashSet<PackId> {
        &self.packs
    }

    /// Reads the name of the list that there is.
    pub(crate) fn read_name(castore: &Path) -> Result<Option<[u8; ID_BYTES]>, CastoreError> {
        let path = castore.join(FILE);
        let mut head = [0; HEAD_BYTES];
        let read = File::open(&path).and_then(|mut file| file.read_exact(&mut head));
        match read {
            Ok(()) => {
                let mut name = [0; ID_BYTES];
                name.copy_from_slice(&head[16..]);
                Ok(Some(name))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CastoreError::io("reading", &path, error)),
        }
    }

    /// Reads the list.
    pub(crate) fn read(castore: &Path) -> Result<Self, CastoreError> {
        let path = castore.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(CastoreError::io("reading", &path, error)),
        };
        let list = path.display();
        let corrupt = |reason: String| {
            CastoreError::corrupt(format!("list of condemned packs {list}"), reason)
        };
        if bytes.len() < HEAD_BYTES + CHECKSUM_BYTES || bytes[..8] != MAGIC {
            return Err(corrupt(format!(
                "expected magic `{}`, found {} bytes",
                MAGIC.escape_ascii(),
                bytes.len()
            )));
        }
        check_sum(&bytes, "list").map_err(corrupt)?;
        let (version, count) = (u32_at(&bytes, 8), u32_at(&bytes, 12) as usize);
        let expected = HEAD_BYTES + count * ID_BYTES + CHECKSUM_BYTES;
        if version != VERSION || bytes.len() != expected {
            return Err(corrupt(format!(
                "expected version {VERSION} and {expected} bytes, found {version} and {}",
                bytes.len()
            )));
        }
        let mut name = [0; ID_BYTES];
        name.copy_from_slice(&bytes[16..HEAD_BYTES]);
        Ok(Self {
            name: Some(name),
            packs: bytes[HEAD_BYTES..expected - CHECKSUM_BYTES]
                .chunks_exact(ID_BYTES)
                .filter_map(|id| Some(PackId(id.try_into().ok()?)))
                .collect(),
        })
    }

    /// Publishes a list, durably; an empty one removes the file. Only the collector does this.
    pub(crate) fn write(
        medium: &dyn Medium,
        castore: &Path,
        packs: &HashSet<PackId>,
    ) -> Result<Self, CastoreError> {
        let path = castore.join(FILE);
        let temporary = castore.join(TEMPORARY);
        let remove = |path: &Path| match medium.remove(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(CastoreError::io("removing", path, error))
            }
            _ => Ok(()),
        };
        remove(&temporary)?;
        if packs.is_empty() {
            remove(&path)?;
            medium.sync_dir(castore).verb("syncing", castore)?;
            return Ok(Self::default());
        }
        let name = random_id()?;
        let mut ids: Vec<_> = packs.iter().collect();
        ids.sort();
        let mut bytes = Vec::with_capacity(HEAD_BYTES + ids.len() * ID_BYTES + CHECKSUM_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(ids.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&name);
        for id in ids {
            bytes.extend_from_slice(&id.0);
        }
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        let file = medium.create_new(&temporary).verb("creating", &temporary)?;
        medium
            .write_all_at(&file, &temporary, &bytes, 0)
            .verb("writing", &temporary)?;
        medium
            .sync_data(&file, &temporary)
            .verb("syncing", &temporary)?;
        medium
            .rename(&temporary, &path)
            .verb("renaming", &temporary)?;
        medium.sync_dir(castore).verb("syncing", castore)?;
        Ok(Self {
            name: Some(name),
            packs: packs.clone(),
        })
    }
}
