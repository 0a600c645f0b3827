//! What is mounted side by side under overlayfs: the live mount, the image mount, images of `mkfs.erofs`, the source.
//!
//! Whatever a machine has not (root, a kernel that mounts EROFS from files, `mkfs.erofs` with zstd) is left out, and
//! the report says so.

use super::super::environment::{Server, Work, run, understory};
use super::super::import::Source;
use super::super::report::Report;
use crate::error::{CommandError, Result};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes that the raw tier may take.
pub(super) const RAW_BYTES_MAX: &str = "4G";

/// What it is, by which its aims are chosen.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Live,
    Image,
    RawImage,
    Other,
}

/// One lower directory below an overlay of its own.
pub(super) struct Contestant {
    pub(super) kind: Kind,
    /// How the report names its group.
    pub(super) group: &'static str,
    /// The merged directory.
    pub(super) merged: PathBuf,
    pub(super) server: Option<Server>,
    /// Where its lower is mounted, if that is ours to unmount.
    lower: Option<PathBuf>,
}

impl Contestant {
    /// The source itself.
    pub(super) fn source(work: &Work, source: &Source) -> Result<Self> {
        Ok(Self {
            kind: Kind::Other,
            group: "the source under overlayfs",
            merged: overlay(work, &source.objects(), "peer")?,
            server: None,
            lower: None,
        })
    }

    /// A directory as it is.
    pub(super) fn directory(work: &Work, dir: &Path, name: &str) -> Result<Self> {
        Ok(Self {
            kind: Kind::Other,
            group: "a directory under overlayfs",
            merged: overlay(work, dir, name)?,
            server: None,
            lower: None,
        })
    }

    /// The live mount of a store.
    pub(super) fn live(work: &Work, store: &Path) -> Result<Self> {
        let lower = work.make("lower")?;
        let socket = work.path("mount.sock");
        let mut server = Server::start(
            understory(store)?
                .arg("serve")
                .arg("--socket")
                .arg(&socket)
                .arg("--mount")
                .arg(&lower),
            &work.path("mount.log"),
        )?;
        server.wait_for("the mount", || socket.exists().then_some(()))?;
        Ok(Self {
            kind: Kind::Live,
            group: "mount under overlayfs",
            merged: overlay(work, &lower, "here")?,
            server: Some(server),
            lower: None,
        })
    }

    /// The newest generation of a store, with or without the raw tier.
    pub(super) fn image(work: &Work, store: &Path, raw: bool) -> Result<Self> {
        let (name, group) = match raw {
            false => ("image", "image mount under overlayfs"),
            true => ("image-raw", "image mount with raw tier under overlayfs"),
        };
        let lower = work.make(&format!("{name}-lower"))?;
        let mut command = understory(store)?;
        command.args(["generation", "mount"]).arg(&lower);
        if raw {
            command.arg(format!("--hot=raw={RAW_BYTES_MAX}"));
        }
        let mut server = Server::start(&mut command, &work.path(&format!("{name}.log")))?;
        let there = || {
            let mut entries = std::fs::read_dir(&lower).ok()?;
            entries.next().map(|_| ())
        };
        server.wait_for("the image mount", there)?;
        Ok(Self {
            kind: if raw { Kind::RawImage } else { Kind::Image },
            group,
            merged: overlay(work, &lower, name)?,
            server: Some(server),
            lower: None,
        })
    }

    /// An image that `mkfs.erofs` makes of the source. `None`, with a word in the report, if that cannot be had.
    pub(super) fn mkfs(
        work: &Work,
        source: &Source,
        program: &OsStr,
        zstd: bool,
        report: &mut Report,
    ) -> Result<Option<Self>> {
        let (name, group, options) = match zstd {
            false => ("mkfs-plain", "mkfs.erofs, plain, under overlayfs", &[][..]),
            true => (
                "mkfs-zstd",
                "mkfs.erofs, zstd all-fragments dedupe, under overlayfs",
                &["-zzstd", "-Eall-fragments,dedupe"][..],
            ),
        };
        let image = work.path(name);
        let made = run(Command::new(program)
            .args(["--quiet", "-T1", "--all-root"])
            .args(options)
            .arg(&image)
            .arg(source.objects()));
        let mounted = made.and_then(|_| {
            let lower = work.make(&format!("{name}-lower"))?;
            mount_erofs(&image, &lower)?;
            Ok(lower)
        });
        let lower = match mounted {
            Ok(lower) => lower,
            Err(error) => {
                let causes = error.causes.join("; ");
                report
                    .missing
                    .push(format!("{group}: {}: {causes}", error.message));
                return Ok(None);
            }
        };
        Ok(Some(Self {
            kind: Kind::Other,
            group,
            merged: overlay(work, &lower, name)?,
            server: None,
            lower: Some(lower),
        }))
    }

    /// Unmounts and ends it.
    pub(super) fn end(self) -> Result<()> {
        run(Command::new("umount").arg(&self.merged))?;
        if let Some(lower) = &self.lower {
            run(Command::new("umount").arg(lower))?;
        }
        match self.server {
            Some(server) => server.stop(),
            None => Ok(()),
        }
    }
}

/// Mounts an image from its file, as the image mount does it.
fn mount_erofs(image: &Path, at: &Path) -> Result<()> {
    let mount = || -> rustix::io::Result<()> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", image)?;
        fsconfig_create(&context)?;
        let mount = fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_RDONLY,
        )?;
        move_mount(
            &mount,
            "",
            rustix::fs::CWD,
            at,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    mount().map_err(|errno| CommandError::io("mounting", image.display(), &errno.into()))
}

fn overlay(work: &Work, lower: &Path, name: &str) -> Result<PathBuf> {
    let upper = work.make(&format!("{name}-upper"))?;
    let workdir = work.make(&format!("{name}-work"))?;
    let merged = work.make(&format!("{name}-merged"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=off,metacopy=off,redirect_dir=off",
        lower.display(),
        upper.display(),
        workdir.display()
    );
    run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged))?;
    Ok(merged)
}
