//! EROFS images, pure: a tree in, bytes out, and back.
//!
//! - [`Writer`] makes the metadata of an image from a tree that is fed to it. File contents are extents of whole
//!   blocks, either on an extra device or behind the metadata in the same image; it never sees them.
//! - [`Image`] reads what the writer makes (and what `mkfs.erofs` makes without compression), and
//!   [`Image::verify`] checks all of it. Hostile images give errors; work and memory are bounded by the image's size.
//! - `layout` has the structures on disk. They are those of Linux (`fs/erofs/erofs_fs.h`), which reads the images since
//!   5.4, with an extra device since 5.16. Checked against Linux 6.18 and `fsck.erofs` of erofs-utils 1.5 and 1.8.
//!
//! Nothing here opens a file: the writer is generic over [`std::io::Write`] and [`std::io::Seek`], the reader over
//! [`ReadAt`].

mod blocks;
mod checksum;
mod error;
mod layout;
mod reader;
mod verify;
mod writer;

pub use error::ErofsError;
pub use layout::{
    BLOCK_BYTES, DEVICE_FIRST_BLOCK, FileType, NAME_BYTES_MAX, TAG_BYTES_MAX, TARGET_BYTES_MAX,
};
pub use reader::{Device, DirectoryEntry, Extent, Image, Inode, Place, ReadAt, Superblock};
pub use verify::Verified;
pub use writer::{Data, Figures, File, Options, Writer};

#[cfg(test)]
mod tests;
