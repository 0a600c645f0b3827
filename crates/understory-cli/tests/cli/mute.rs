//! A FUSE file system that never answers.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Bytes of `struct fuse_in_header`, `struct fuse_out_header` and `struct fuse_init_out` of `linux/fuse.h`.
const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;
const INIT_OUT_BYTES: usize = 64;
/// The opcode of the first request.
const INIT: u32 = 26;
/// The protocol that is spoken: no feature is needed.
const VERSION: (u32, u32) = (7, 31);
/// Room for a request, as the kernel wants it.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Mounted on a directory. Who looks into it waits, from when its request was heard on where no signal reaches it, until
/// this is dropped.
pub(super) struct Mute {
    device: File,
    place: Option<PathBuf>,
}

impl Mute {
    pub(super) fn mount(place: &Path) -> Self {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let data = CString::new(data).unwrap();
        mount("mute", place, "fuse", MountFlags::empty(), Some(&*data)).unwrap();
        let mute = Self {
            device,
            place: Some(place.to_owned()),
        };
        let request = mute.request();
        assert_eq!(request[4..8], INIT.to_le_bytes());
        let mut answer = vec![0; OUT_HEADER_BYTES + INIT_OUT_BYTES];
        let bytes = u32::try_from(answer.len()).unwrap();
        answer[..4].copy_from_slice(&bytes.to_le_bytes());
        answer[8..16].copy_from_slice(&request[8..16]);
        let (major, minor) = VERSION;
        answer[16..20].copy_from_slice(&major.to_le_bytes());
        answer[20..24].copy_from_slice(&minor.to_le_bytes());
        (&mute.device).write_all(&answer).unwrap();
        mute
    }

    /// Waits for somebody who asks and will get no answer; returns the name of the thread.
    pub(super) fn hear(&self) -> String {
        let request = self.request();
        let thread = u32::from_le_bytes(request[32..36].try_into().unwrap());
        std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default()
    }

    fn request(&self) -> Vec<u8> {
        let limit = Timespec {
            tv_sec: super::support::LIMIT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        let events = &mut [PollFd::new(&self.device, PollFlags::IN)];
        assert_eq!(poll(events, Some(&limit)).unwrap(), 1, "nobody asks");
        let mut request = vec![0; REQUEST_BYTES_MAX];
        let bytes = (&self.device).read(&mut request).unwrap();
        assert!(bytes >= IN_HEADER_BYTES, "{bytes}");
        request.truncate(bytes);
        request
    }

    /// Takes it away from its place. Who waits goes on waiting.
    pub(super) fn detach(&mut self) {
        if let Some(place) = self.place.take() {
            unmount(&place, UnmountFlags::DETACH).unwrap();
        }
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            // The directory is removed next; what stays mounted shows there.
            let _ = unmount(&place, UnmountFlags::DETACH);
        }
    }
}
