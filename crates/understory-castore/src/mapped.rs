//! Memory-mapped files: the only `unsafe` of this crate.
//!
//! Only files that nobody changes are mapped: footers of sealed packs and finished index files.
//! They are replaced by renaming and removed by unlinking, never cut, so a mapping stays whole as
//! long as nobody tampers with the store. Every use of the bytes is checked: wrong bytes give
//! errors, not undefined behaviour.

use std::fs::File;
use std::io;

/// A read-only mapping of a part of a file.
pub(crate) struct Mapped {
    map: memmap2::Mmap,
}

impl Mapped {
    /// Maps `len` bytes at `offset`.
    pub(crate) fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let mut options = memmap2::MmapOptions::new();
        options.offset(offset).len(len);
        #[allow(unsafe_code, reason = "mapping a file has no safe interface")]
        // SAFETY: the mapping is read-only and private to this type. Packs are sealed before they
        // are mapped and index files are complete before they get their name; no code of this
        // program writes to or shortens them afterwards.
        let map = unsafe { options.map(file) }?;
        let _ = map.advise(memmap2::Advice::Random);
        Ok(Self { map })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}
