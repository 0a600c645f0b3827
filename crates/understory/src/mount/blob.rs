//! The blob server: a FUSE file system with one file, the virtual device that images take file contents from.
//!
//! - `blob` is opened with direct I/O: what is read goes to the page cache of the image's inodes once, and not a
//!   second time to that of the device. It is as large as the address space; padding and what is behind the last
//!   extent reads as zeros.
//! - `<number>.erofs` is the image of a generation, for kernels that cannot mount the file where it lies (on
//!   overlayfs). It is read through the page cache, as metadata must be.
//! - Nothing is remembered between requests: node ids and file handles mean the same after a restart of the
//!   server, so another process may go on with the descriptors.

use super::connect::{Connection, Handover, shake_hands};
use super::live_mount::{HoldLive, LiveHandover};
use super::protocol::{
    Attributes, DATA_BYTES_MAX, InitRequest, Kind, ROOT_NODE, Reply, Request, VALID_S_MAX,
    dirent_bytes, op,
};
use super::session::{Handler, Outcome, Serve, Session, thread_count};
use super::sys;
use crate::Result;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name of the virtual device.
pub(crate) const BLOB_NAME: &str = "blob";
/// What the names of images end in.
const IMAGE_SUFFIX: &str = ".erofs";
const BLOB_NODE: u64 = 2;
/// Images have the nodes behind this one, by number.
const IMAGES_NODE: u64 = 2;
/// `FOPEN_DIRECT_IO`, `FOPEN_KEEP_CACHE`, `FOPEN_NOFLUSH` of `linux/fuse.h`.
const DIRECT_IO: u32 = 1 << 0;
const KEEP_CACHE: u32 = 1 << 1;
const NO_FLUSH: u32 = 1 << 5;

/// What a blob server serves.
pub(crate) trait Device: Send + Sync + 'static {
    /// Bytes of the device; constant.
    fn bytes(&self) -> u64;
    /// Fills `buffer` from `offset` on; zeros where nothing is. What is wrong was logged.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno>;
    /// Bytes of an image; `None` if there is none of that number.
    fn image_bytes(&self, number: u64) -> Result<Option<u64>, Errno>;
    /// Fills `buffer` from an image; returns how much there was.
    fn read_image_at(&self, number: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno>;
    /// Notes whether the image of a generation is mounted.
    fn set_mounted(&self, number: u64, is_mounted: bool);
}

/// How to mount.
#[derive(Debug, Clone, Default)]
pub struct BlobOptions {
    /// Threads that serve requests; 0 = as many as cores, at most 4, and one more.
    pub threads: usize,
}

/// A mounted blob server. Dropping it unmounts, unless its descriptors are held elsewhere.
pub struct BlobMount {
    session: Session<BlobFs>,
    handover: Handover,
}

impl BlobMount {
    /// Mounts on the directory `mountpoint`. When it returns, the mount answers. With `hold`, what outlives the server
    /// is given to it before anything is served, and the mount stays when this is dropped.
    pub(crate) fn mount(
        device: Box<dyn Device>,
        name: &Path,
        mountpoint: &Path,
        options: &BlobOptions,
        hold: Option<HoldLive<'_>>,
    ) -> Result<Self> {
        let mut source = OsString::from("understory-blob:");
        source.push(name);
        let request = sys::MountRequest {
            source: &source,
            mountpoint,
            // EROFS reads with the credentials of its mounter; nobody else needs to look inside.
            allow_other: false,
            read_bytes_max: DATA_BYTES_MAX,
        };
        let threads = thread_count(options.threads);
        let connection = Connection::mount(&request, threads)?;
        let agreed = shake_hands(&connection.devices()[0], &InitRequest::blob())?;
        let place = connection.place();
        tracing::debug!(
            mountpoint = %place.mountpoint.display(),
            minor = agreed.minor,
            flags = agreed.flags,
            "mounted the blob server"
        );
        let handover = Session::<BlobFs>::handover(place, agreed);
        let serve = Serve {
            threads,
            held: hold.is_some(),
            refuse_resent: false,
        };
        if let Some(hold) = hold {
            hold(&to_hold(&handover, connection.devices()))?;
        }
        let (place, devices) = connection.into_parts();
        Ok(Self {
            session: Session::serve(BlobFs::new(device), place, devices, serve)?,
            handover,
        })
    }

    /// Serves a mount whose server is dead. `descriptors` are those that it had given to `hold`, which is called again
    /// if there are others to keep. With `refuse_resent`, requests that the dead server had read are answered with EIO.
    pub(crate) fn take_over(
        device: Box<dyn Device>,
        state: &Handover,
        descriptors: Vec<OwnedFd>,
        options: &BlobOptions,
        refuse_resent: bool,
        hold: HoldLive<'_>,
    ) -> Result<Self> {
        let serve = Serve {
            threads: options.threads,
            held: true,
            refuse_resent,
        };
        let mut hold_all = |state: &Handover, devices: &[OwnedFd]| hold(&to_hold(state, devices));
        let fs = BlobFs::new(device);
        Ok(Self {
            session: Session::take_over(fs, state, descriptors, serve, &mut hold_all)?,
            handover: state.clone(),
        })
    }

    /// Notes whether the image of generation `number` is mounted, so that its metadata is read ahead.
    pub(crate) fn set_mounted(&self, number: u64, is_mounted: bool) {
        self.session
            .handler()
            .device
            .set_mounted(number, is_mounted);
    }

    /// What another server must know of it.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// How long the request takes that has been worked on longest.
    pub fn busy_for(&self) -> Duration {
        self.session.busy_for()
    }

    /// Where it is mounted; canonical.
    pub fn mountpoint(&self) -> &Path {
        &self.session.place().mountpoint
    }

    /// The virtual device.
    pub fn blob(&self) -> PathBuf {
        self.mountpoint().join(BLOB_NAME)
    }

    /// True while requests are served.
    pub fn is_serving(&self) -> bool {
        self.session.is_serving()
    }

    /// Unmounts and stops serving. What is mounted from it must be unmounted before, or fails from then on.
    ///
    /// # Errors
    /// Not permitted; the mount then stays, but is served no more.
    pub fn unmount(&self) -> Result<()> {
        self.session.unmount()
    }
}

/// The name of the file that is the image of a generation.
pub(crate) fn image_name(number: u64) -> String {
    format!("{number}{IMAGE_SUFFIX}")
}

fn to_hold<'a>(state: &'a Handover, devices: &'a [OwnedFd]) -> LiveHandover<'a> {
    LiveHandover {
        state,
        descriptors: devices.iter().map(AsFd::as_fd).collect(),
    }
}

/// Answers requests.
struct BlobFs {
    device: Box<dyn Device>,
    owner: (u32, u32),
}

impl Handler for BlobFs {
    const COUNTED_AS: crate::metrics::Mount = crate::metrics::Mount::Blob;

    fn handle(&self, request: &Request<'_>, reply: &mut Reply, _: &mut Vec<u64>) -> Outcome {
        let result = match request.opcode {
            op::READ => self.read(request, reply),
            op::LOOKUP => self.lookup(request, reply),
            op::GETATTR => self.attributes(request.node).map(|attributes| {
                reply.put_attr_out(&attributes);
            }),
            op::OPEN => {
                self.open(request.node, reply);
                Ok(())
            }
            op::OPENDIR => {
                put_open(reply, 0);
                Ok(())
            }
            op::READDIR => self.readdir(request, reply),
            // Lookups are not counted.
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT | op::NOTIFY_REPLY => {
                return Outcome::Silent;
            }
            op::DESTROY | op::RELEASE | op::RELEASEDIR => Ok(()),
            writing if op::WRITING.contains(&writing) => Err(Errno::ROFS),
            _ => Err(Errno::NOSYS),
        };
        match result {
            Ok(()) => Outcome::Data,
            Err(errno) => Outcome::Error(errno),
        }
    }
}

impl BlobFs {
    fn new(device: Box<dyn Device>) -> Self {
        Self {
            device,
            owner: sys::owner(),
        }
    }

    fn read(&self, request: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (offset, bytes) = request.range()?;
        if request.node == BLOB_NODE {
            let left = self.device.bytes().saturating_sub(offset);
            let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(bytes);
            return self.device.read_at(offset, reply.data_mut(bytes));
        }
        let number = image_number(request.node)?;
        let buffer = reply.data_mut(bytes);
        let read = self.device.read_image_at(number, offset, buffer)?;
        reply.data_mut(read);
        Ok(())
    }

    fn lookup(&self, request: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        if request.node != ROOT_NODE {
            return Err(Errno::NOTDIR);
        }
        let node = node_of(request.name()?).ok_or(Errno::NOENT)?;
        let attributes = self.attributes(node)?;
        reply.put_entry(node, &attributes);
        Ok(())
    }

    fn attributes(&self, node: u64) -> Result<Attributes, Errno> {
        let (kind, size) = match node {
            ROOT_NODE => (Kind::Directory, 0),
            BLOB_NODE => (Kind::File, self.device.bytes()),
            _ => {
                let number = image_number(node)?;
                let bytes = self.device.image_bytes(number)?;
                (Kind::File, bytes.ok_or(Errno::NOENT)?)
            }
        };
        Ok(Attributes {
            ino: node,
            size,
            kind,
            owner: self.owner,
            mtime_ns: 0,
            valid_s: VALID_S_MAX,
        })
    }

    fn open(&self, node: u64, reply: &mut Reply) {
        put_open(
            reply,
            match node {
                BLOB_NODE => DIRECT_IO | NO_FLUSH,
                _ => KEEP_CACHE | NO_FLUSH,
            },
        );
    }

    /// Images are found by name only.
    fn readdir(&self, request: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (offset, bytes_max) = request.range()?;
        let entries = [
            (ROOT_NODE, Kind::Directory, &b"."[..]),
            (ROOT_NODE, Kind::Directory, b".."),
            (BLOB_NODE, Kind::File, BLOB_NAME.as_bytes()),
        ];
        for (at, (node, kind, name)) in (0_u64..).zip(entries) {
            if at >= offset && reply.len() + dirent_bytes(name.len()) <= bytes_max {
                reply.put_dirent(node, at + 1, kind, name);
            }
        }
        Ok(())
    }
}

/// Appends `struct fuse_open_out`.
fn put_open(reply: &mut Reply, flags: u32) {
    reply.put_u64(0);
    reply.put_u32(flags);
    reply.put_u32(0);
}

fn image_number(node: u64) -> Result<u64, Errno> {
    node.checked_sub(IMAGES_NODE)
        .filter(|number| *number > 0)
        .ok_or(Errno::STALE)
}

fn node_of(name: &[u8]) -> Option<u64> {
    let name = std::str::from_utf8(name).ok()?;
    if name == BLOB_NAME {
        return Some(BLOB_NODE);
    }
    let number: u64 = name.strip_suffix(IMAGE_SUFFIX)?.parse().ok()?;
    // In one spelling only.
    let is_plain = number > 0 && image_name(number) == name;
    is_plain.then(|| number.checked_add(IMAGES_NODE)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_nodes() {
        assert_eq!(node_of(b"blob"), Some(2));
        assert_eq!(node_of(b"1.erofs"), Some(3));
        assert_eq!(node_of(image_name(77).as_bytes()), Some(79));
        for name in [
            &b"0.erofs"[..],
            b"01.erofs",
            b"+1.erofs",
            b".erofs",
            b"1",
            b"18446744073709551615.erofs",
            b"\xff",
            b"",
        ] {
            assert_eq!(node_of(name), None, "{name:?}");
        }
        assert_eq!(image_number(3), Ok(1));
        for node in [0, 1, 2] {
            assert_eq!(image_number(node), Err(Errno::STALE));
        }
    }
}
