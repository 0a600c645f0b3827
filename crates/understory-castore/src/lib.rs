//! Content-addressed, deduplicated, compressed storage of file trees.
//!
//! The model is snix's: a [`Node`] is a directory, a file or a symlink; a file's digest is the
//! BLAKE3 of its raw bytes, a directory's that of its canonical protobuf. How content is cut,
//! compressed and laid out on disk never shows in a digest.
//!
//! `docs/disk-format.md` draws every byte.

mod blob;
pub mod breakdown;
mod caches;
mod condemned;
mod core;
pub mod counters;
pub mod digest;
pub mod directory;
pub mod error;
mod frames;
#[doc(hidden)]
pub mod fuzzing;
mod gc;
mod index;
mod lease;
mod log;
mod mapped;
mod mask;
mod medium;
mod pack;
mod patch;
mod read_ahead;
mod recipe;
mod scan;
mod scrub;
pub mod store;
#[doc(hidden)]
pub mod synthetic;
mod tidy;
pub mod tree;
mod whole;
mod writer;

#[cfg(test)]
mod tests;

pub use breakdown::Breakdown;
pub use counters::Counters;
pub use digest::Digest;
pub use directory::{Directory, Entry, Node};
pub use error::CastoreError;
pub use mask::Masks;
pub use read_ahead::{FileReads, only_when_told};
pub use store::{Blob, Castore, OpenOptions, Stats, Writer};
pub use tree::{FileSink, TreeBuilder};
pub use whole::Whole;
