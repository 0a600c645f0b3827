//! Linux namespaces: becoming root of a user namespace, joining an instance's, and showing the
//! merged store at the store directory without touching the host.
//!
//! All functions that change namespaces must be called while the process has one thread; they check
//! that. Nothing here can be undone within the process: everything ends with it.

use crate::{Error, Result};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Bit of CAP_SYS_ADMIN, linux/capability.h.
const CAP_SYS_ADMIN_BIT: u32 = 21;

/// True if this process may mount in its mount namespace (CAP_SYS_ADMIN is effective).
pub fn may_mount() -> bool {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| effective_capabilities(&status))
        .is_some_and(|mask| mask >> CAP_SYS_ADMIN_BIT & 1 == 1)
}

/// True if this process is in a user namespace other than the machine's first.
pub fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_initial_map(&map))
}

/// Enters a new user and mount namespace in which the caller's uid and gid are 0.
///
/// # Errors
/// More than one thread runs; user namespaces are switched off.
pub fn enter_user_namespace() -> Result<()> {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS).map_err(|e| {
        e.with_hint("run `understory doctor`: it says which setting of the machine forbids it")
    })?;
    // Without this the kernel does not let an unprivileged process write gid_map, user_namespaces(7).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1\n"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1\n"))?;
    make_private()
}

/// Enters a new mount namespace whose changes nobody else sees.
///
/// # Errors
/// More than one thread runs; not permitted.
pub fn enter_mount_namespace() -> Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    make_private()
}

/// Joins the user and mount namespaces of process `pid`. The current directory is kept by name.
///
/// # Errors
/// More than one thread runs; the process is gone; not permitted.
pub fn join(pid: u32) -> Result<()> {
    require_one_thread()?;
    let cwd = std::env::current_dir().ok();
    let kinds = [
        ("user", LinkNameSpaceType::User),
        ("mnt", LinkNameSpaceType::Mount),
    ];
    let mut open = Vec::new();
    for (name, kind) in kinds {
        let theirs = PathBuf::from(format!("/proc/{pid}/ns/{name}"));
        let link = |p: &Path| fs::read_link(p).map_err(|e| Error::io("reading", p, e));
        if link(&theirs)? == link(Path::new(&format!("/proc/self/ns/{name}")))? {
            continue;
        }
        let file = fs::File::open(&theirs).map_err(|e| Error::io("opening", &theirs, e))?;
        open.push((name, kind, file));
    }
    for (name, kind, file) in open {
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(kind))
            .map_err(|e| {
                Error::environment(format!("joining the {name} namespace of process {pid}"))
                    .with_source(std::io::Error::from(e))
            })?;
    }
    restore_directory(cwd.as_deref());
    Ok(())
}

/// Shows each source directory at its target for this mount namespace only. A target that does not
/// exist is made in a new root of bind mounts that this process then moves to; `scratch` is an empty
/// directory to build it on.
///
/// # Errors
/// Mounting fails.
pub fn place(pairs: &[(PathBuf, PathBuf)], scratch: &Path) -> Result<()> {
    let missing: Vec<&(PathBuf, PathBuf)> = pairs
        .iter()
        .filter(|(_, target)| !target.is_dir())
        .collect();
    if missing.is_empty() {
        return pairs
            .iter()
            .try_for_each(|(source, target)| bind(source, target, false));
    }
    let cwd = std::env::current_dir().ok();
    fs::create_dir_all(scratch).map_err(|e| Error::io("creating", scratch, e))?;
    rustix::mount::mount(
        "tmpfs",
        scratch,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=755",
    )
    .map_err(|e| Error::io("mounting a tmpfs on", scratch, e.into()))?;
    let targets: Vec<&Path> = missing.iter().map(|(_, target)| target.as_path()).collect();
    mirror(Path::new("/"), scratch, &targets)?;
    for (source, target) in pairs {
        bind(source, &below(scratch, target), false)?;
    }
    rustix::process::chdir(scratch).map_err(|e| Error::io("entering", scratch, e.into()))?;
    rustix::process::pivot_root(".", ".")
        .map_err(|e| Error::io("moving the root to", scratch, e.into()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .map_err(|e| Error::io("unmounting the old root below", scratch, e.into()))?;
    rustix::process::chdir("/").map_err(|e| Error::io("entering", "/", e.into()))?;
    restore_directory(cwd.as_deref());
    Ok(())
}

/// Makes `new` look like `host`, and adds the `targets` (paths from `/`) that are at or below `host`
/// as new directories. Only directories on the way to a target are made anew, all others are bound.
fn mirror(host: &Path, new: &Path, targets: &[&Path]) -> Result<()> {
    let on_the_way = |path: &Path| targets.iter().any(|t| t.starts_with(path));
    let entries = fs::read_dir(host).map_err(|e| Error::io("reading", host, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("reading", host, e))?;
        let (from, to) = (entry.path(), new.join(entry.file_name()));
        let kind = entry
            .file_type()
            .map_err(|e| Error::io("reading", &from, e))?;
        if kind.is_symlink() {
            let target = fs::read_link(&from).map_err(|e| Error::io("reading", &from, e))?;
            std::os::unix::fs::symlink(&target, &to).map_err(|e| Error::io("creating", &to, e))?;
        } else if kind.is_dir() {
            fs::create_dir(&to).map_err(|e| Error::io("creating", &to, e))?;
            if on_the_way(&from) {
                mirror(&from, &to, targets)?;
            } else {
                bind(&from, &to, true)?;
            }
        } else {
            fs::File::create(&to).map_err(|e| Error::io("creating", &to, e))?;
            bind(&from, &to, true)?;
        }
    }
    for target in targets.iter().filter(|t| t.starts_with(host)) {
        let made = below(new, target.strip_prefix(host).unwrap_or(target));
        fs::create_dir_all(&made).map_err(|e| Error::io("creating", &made, e))?;
    }
    Ok(())
}

/// `path` with `root` before it.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.components()
        .chain(
            path.components()
                .filter(|c| !matches!(c, Component::RootDir)),
        )
        .collect()
}

fn bind(source: &Path, target: &Path, recursive: bool) -> Result<()> {
    let done = if recursive {
        rustix::mount::mount_bind_recursive(source, target)
    } else {
        rustix::mount::mount_bind(source, target)
    };
    done.map_err(|e| {
        Error::environment(format!(
            "binding {} to {}",
            source.display(),
            target.display()
        ))
        .with_source(std::io::Error::from(e))
    })
}

fn make_private() -> Result<()> {
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(|e| Error::io("making mounts private below", "/", e.into()))
}

fn unshare(flags: UnshareFlags) -> Result<()> {
    require_one_thread()?;
    #[allow(unsafe_code, reason = "unshare(2) has no safe wrapper")]
    // SAFETY: the descriptor table is not unshared (no CLONE_FILES), which is the only thing that
    // could make a descriptor of another thread invalid; and there is no other thread.
    let done = unsafe { rustix::thread::unshare_unsafe(flags) };
    done.map_err(|e| {
        Error::environment("entering a new namespace").with_source(std::io::Error::from(e))
    })
}

fn require_one_thread() -> Result<()> {
    let dir = "/proc/self/task";
    let threads = fs::read_dir(dir)
        .map_err(|e| Error::io("reading", dir, e))?
        .count();
    if threads == 1 {
        return Ok(());
    }
    Err(Error::internal(format!(
        "namespaces can be changed by a process of one thread only, found {threads}"
    )))
}

fn restore_directory(cwd: Option<&Path>) {
    // A directory that is not there in the new namespace: stay at its root.
    if let Some(dir) = cwd
        && let Err(error) = rustix::process::chdir(dir)
    {
        tracing::debug!(dir = %dir.display(), %error, "current directory is not there in the namespace");
    }
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io("writing", path, e))
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let hex = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn is_initial_map(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// True if `path` exists, symlinks not followed.
pub fn exists(path: &Path) -> bool {
    rustix::fs::statat(CWD, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_of_a_status_file() {
        let text = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert_eq!(effective_capabilities(text), Some(0x1ff_ffff_ffff));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }

    #[test]
    fn the_first_user_namespace_maps_everything() {
        assert!(is_initial_map("         0          0 4294967295\n"));
        assert!(!is_initial_map("         0       1000          1\n"));
    }

    #[test]
    fn below_joins_absolute_paths() {
        assert_eq!(
            below(Path::new("/r"), Path::new("/nix/store")),
            Path::new("/r/nix/store")
        );
        assert_eq!(
            below(Path::new("/r"), Path::new("store")),
            Path::new("/r/store")
        );
    }
}
