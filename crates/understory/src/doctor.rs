//! Finds what stands in the way of mounting, serving and overlaying a store, and how to mend it.
//!
//! Nothing is changed on the machine; what must be tried (an overlay mount) is tried by the caller in
//! a process and namespace of its own, see [`probe_overlay`].

use crate::config::Layout;
use crate::generation::stack::Standing;
use crate::mount::mountinfo;
use crate::settings::Resolved;
use crate::{Error, Result, Store, StoreOptions, control, namespace};
use rustix::fs::StatFs;
use serde::Serialize;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Something will be slower or missing.
    Warn,
    /// `understory up` cannot work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name, see `docs/guide/troubleshooting.md`.
    pub id: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub mend: Option<String>,
}

/// What the caller knows.
pub struct Options {
    /// The place to examine.
    pub layout: Layout,
    /// Where `nix` and `fusermount3` are, if they are in `PATH`.
    pub nix: Option<PathBuf>,
    /// See `nix`.
    pub fusermount: Option<PathBuf>,
    /// What is set, or why it cannot be read.
    pub settings: Result<Resolved>,
    /// What a trial mount of an overlay on the upper directory gave, if one was made.
    pub overlay_trial: Option<Result<(), String>>,
}

/// File systems that overlayfs refuses as upper directory: no whiteouts, no extended attributes or no
/// `d_type`. Magic numbers of linux/magic.h.
const REFUSED_AS_UPPER: [(i64, &str); 8] = [
    (0x794c_7630, "overlayfs"),
    (0x6969, "NFS"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "FUSE or virtiofs"),
    (0x4d44, "FAT"),
    (0x2011_bab0, "exFAT"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
];
/// Overlayfs in user namespaces, and `userxattr`: Linux 5.11.
const KERNEL_USERNS_OVERLAY: (u32, u32) = (5, 11);
/// No-open FUSE directories, and kept page cache as we use them: Linux 5.1.
const KERNEL_FUSE: (u32, u32) = (5, 1);
/// FUSE_NOTIFY_RESEND: Linux 6.9.
const KERNEL_RESEND: (u32, u32) = (6, 9);
/// The oldest Nix that can use our sockets.
const NIX_OLDEST: (u32, u32) = (2, 4);
/// The oldest Nix with a usable local-overlay store of its own.
const NIX_OLDEST_OVERLAY: (u32, u32) = (2, 26);

/// Looks at everything; the order is that of dependence.
pub fn examine(options: &Options) -> Vec<Check> {
    let root = namespace::may_mount();
    let layout = &options.layout;
    let mut checks = vec![
        kernel(root),
        restarts(),
        fuse_device(),
        fuse_helper(root, options.fusermount.as_deref()),
    ];
    checks.extend(user_namespaces(root));
    checks.push(overlayfs());
    checks.push(store(layout));
    checks.push(owner(layout));
    checks.push(plain_paths(layout));
    let running = matches!(control::Client::connect(&layout.control()), Ok(Some(_)));
    checks.extend(mounts(layout, running));
    checks.extend(standing(layout).filter(|_| running));
    checks.push(upper(layout, options.overlay_trial.as_ref()));
    checks.push(socket("socket", &layout.socket, running));
    checks.push(socket("overlay-socket", &layout.overlay_socket, running));
    checks.extend(settings(layout, &options.settings));
    checks.extend(nix(options.nix.as_deref()));
    checks
}

/// Mounts an overlay with `upper` below `scratch` and unmounts it. The caller must be in a mount
/// namespace of its own.
///
/// # Errors
/// Why overlayfs refuses.
pub fn probe_overlay(upper: &Path, user_namespace: bool) -> Result<()> {
    let parent = existing_parent(upper);
    let scratch = tempfile::Builder::new()
        .prefix(".understory-probe")
        .tempdir_in(parent)
        .map_err(|e| Error::io("creating a directory in", parent, e))?;
    let dir = |name: &str| {
        let path = scratch.path().join(name);
        fs::create_dir(&path)
            .map_err(|e| Error::io("creating", &path, e))
            .map(|()| path)
    };
    let (lower, upper, work, merged) = (dir("lower")?, dir("upper")?, dir("work")?, dir("merged")?);
    let mut text = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    if user_namespace {
        text.push_str(",userxattr");
    }
    let data = std::ffi::CString::new(text)
        .map_err(|e| Error::user("the path holds a NUL").with_source(e))?;
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("overlay", &merged, "overlay", flags, data.as_c_str())
        .map_err(|e| Error::io("mounting an overlay on", &merged, e.into()))?;
    let written =
        fs::write(merged.join("probe"), b"x").map_err(|e| Error::io("writing to", &merged, e));
    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH)
        .map_err(|e| Error::io("unmounting", &merged, e.into()))?;
    // Overlayfs leaves `work/work` with mode 0; the temporary directory's removal needs to enter it.
    let _ = fs::set_permissions(
        work.join("work"),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    );
    written
}

fn ok(id: &'static str, found: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Ok,
        found: found.into(),
        mend: None,
    }
}
fn warn(id: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Warn,
        found: found.into(),
        mend: Some(mend.into()),
    }
}
fn fail(id: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
    Check {
        id,
        level: Level::Fail,
        found: found.into(),
        mend: Some(mend.into()),
    }
}

fn kernel(root: bool) -> Check {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let Some(version) = version_of(&release) else {
        return warn(
            "kernel",
            format!("Linux {release}: version not understood"),
            "report this",
        );
    };
    let (needed, what) = if root {
        (KERNEL_FUSE, "the live mount")
    } else {
        (KERNEL_USERNS_OVERLAY, "overlays without root")
    };
    if version >= needed {
        return ok("kernel", format!("Linux {release}"));
    }
    let found = format!("Linux {release}, {what} needs {}.{}", needed.0, needed.1);
    let mend = if root {
        "use a newer kernel"
    } else {
        "use a newer kernel, or run as root"
    };
    fail("kernel", found, mend)
}

/// Whether a mount server may be killed without a reader noticing.
fn restarts() -> Check {
    let id = "restarts";
    let release = rustix::system::uname();
    match version_of(&release.release().to_string_lossy()) {
        Some(version) if version < KERNEL_RESEND => warn(
            id,
            format!(
                "the kernel cannot send FUSE requests again (Linux {}.{} can): reads under way fail when a mount server is replaced",
                KERNEL_RESEND.0, KERNEL_RESEND.1
            ),
            "use a newer kernel, if mount servers crash or are upgraded",
        ),
        _ => ok(
            id,
            "the kernel sends FUSE requests again: no reader notices when a mount server is replaced",
        ),
    }
}

fn fuse_device() -> Check {
    let path = "/dev/fuse";
    let meta = fs::metadata(path);
    let mode = meta.as_ref().map_or(0, MetadataExt::mode);
    match meta {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => fail(
            "fuse-device",
            format!("{path} is missing"),
            "load the module with `modprobe fuse`; in a container pass the device in (docker: --device /dev/fuse)",
        ),
        Err(e) => fail(
            "fuse-device",
            format!("reading {path}: {e}"),
            "check the permissions of /dev",
        ),
        Ok(meta) if !meta.file_type().is_char_device() => fail(
            "fuse-device",
            format!("{path} is not a device"),
            "remove it and run `mknod -m 666 /dev/fuse c 10 229`",
        ),
        Ok(_) => match fs::File::options().read(true).write(true).open(path) {
            Ok(_) => ok("fuse-device", format!("{path} can be opened")),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => fail(
                "fuse-device",
                format!("opening {path}: {e}"),
                "the kernel has no FUSE: run `modprobe fuse`",
            ),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => fail(
                "fuse-device",
                format!(
                    "{path} may not be opened by this user (mode {:o})",
                    mode & 0o777
                ),
                "as root: `chmod 666 /dev/fuse`; in a container allow the device in its cgroup",
            ),
            Err(e) => fail(
                "fuse-device",
                format!("opening {path}: {e}"),
                "check the permissions of /dev/fuse",
            ),
        },
    }
}

fn fuse_helper(root: bool, fusermount: Option<&Path>) -> Check {
    let id = "fusermount3";
    match (root, fusermount) {
        (true, _) => ok(id, "not needed: mounts are permitted"),
        (false, Some(path)) => ok(id, path.display().to_string()),
        (false, None) => warn(
            id,
            "fusermount3 is not installed: `understory mount` cannot work without root (`up` and `shell` can)",
            "install it, on Debian: `apt install fuse3`",
        ),
    }
}

fn user_namespaces(root: bool) -> Vec<Check> {
    let id = "user-namespaces";
    let read = |path: &str| {
        fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let bad = |found: String, mend: &str| {
        if root {
            vec![warn(id, found, mend)]
        } else {
            vec![fail(id, found, mend)]
        }
    };
    if fs::metadata("/proc/self/ns/user").is_err() {
        return bad(
            "the kernel has no user namespaces".into(),
            "use a kernel with CONFIG_USER_NS",
        );
    }
    if read("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") {
        return bad(
            "user namespaces are switched off (user.max_user_namespaces = 0)".into(),
            "as root: `sysctl user.max_user_namespaces=10000`",
        );
    }
    if read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return bad(
            "user namespaces are for root only (kernel.unprivileged_userns_clone = 0)".into(),
            "as root: `sysctl kernel.unprivileged_userns_clone=1`",
        );
    }
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return bad(
            "AppArmor restricts user namespaces (kernel.apparmor_restrict_unprivileged_userns = 1)"
                .into(),
            "as root: `sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or give understory an AppArmor profile",
        );
    }
    vec![ok(id, "allowed")]
}

fn overlayfs() -> Check {
    let id = "overlayfs";
    match fs::read_to_string("/proc/filesystems") {
        Ok(list)
            if list
                .lines()
                .any(|line| line.trim_start_matches("nodev").trim() == "overlay") =>
        {
            ok(id, "known to the kernel")
        }
        Ok(_) => warn(
            id,
            "not loaded; the kernel may load it when it is needed",
            "as root: `modprobe overlay`",
        ),
        Err(e) => warn(id, format!("reading /proc/filesystems: {e}"), "mount /proc"),
    }
}

fn store(layout: &Layout) -> Check {
    let id = "store";
    let dir = layout.store.display();
    if !layout.store.join("format").exists() {
        return ok(id, format!("none in {dir} yet; `up` creates one"));
    }
    let mut options = StoreOptions::default();
    options.castore.read_only = true;
    match Store::open(&layout.store, &options) {
        Ok(store) => ok(id, format!("{dir}, store directory {}", store.store_dir())),
        Err(error) => {
            let mend = error.hint().unwrap_or("run `understory check`").to_owned();
            fail(id, error.chain(), mend)
        }
    }
}

fn owner(layout: &Layout) -> Check {
    let id = "owner";
    let me = rustix::process::geteuid().as_raw();
    let dirs = [
        &layout.store,
        &layout.state,
        &layout.run,
        &layout.upper,
        &layout.work,
    ];
    for dir in dirs {
        let Ok(meta) = fs::metadata(dir) else {
            continue;
        };
        if meta.uid() != me {
            return fail(
                id,
                format!(
                    "{} belongs to user {}, this is user {me}",
                    dir.display(),
                    meta.uid()
                ),
                format!(
                    "run as that user, or as root: `chown -R {me} {}`",
                    dir.display()
                ),
            );
        }
    }
    let first = existing_parent(&layout.state);
    match rustix::fs::access(first, rustix::fs::Access::WRITE_OK) {
        Ok(()) => ok(id, format!("{} can be written", first.display())),
        Err(_) => fail(
            id,
            format!("{} cannot be written by user {me}", first.display()),
            "choose another directory with --store or --state",
        ),
    }
}

fn plain_paths(layout: &Layout) -> Check {
    let id = "paths";
    let paths = [&layout.upper, &layout.merged, &layout.lower, &layout.socket];
    let wrong = paths
        .into_iter()
        .find_map(|path| crate::overlay_url::check_path(path).err());
    match wrong.or_else(|| layout.check_sockets().err()) {
        None => ok(id, "can all stand in a store URL"),
        Some(error) => {
            let mend = error
                .hint()
                .unwrap_or("choose another directory with --state")
                .to_owned();
            fail(id, error.to_string(), mend)
        }
    }
}

fn mounts(layout: &Layout, running: bool) -> Vec<Check> {
    let list = match mountinfo::mounts() {
        Ok(list) => list,
        Err(error) => return vec![fail("mounts", error.chain(), "mount /proc")],
    };
    let places = [
        ("lower-mount", &layout.lower, "fuse"),
        ("overlay-mount", &layout.merged, "overlay"),
    ];
    let mut out = Vec::new();
    for (id, path, fs_type) in places {
        let at = path.display();
        let unmount = format!("run `understory down`, or `umount -l {at}`");
        out.push(match mountinfo::topmost_at(&list, path) {
            None if running => ok(id, "in a namespace of the instance's own"),
            None => ok(id, format!("nothing is mounted on {at}")),
            Some(_) if is_dead(path) => fail(id, format!("{at} is a dead mount: its server is gone"), unmount),
            Some(entry) if !entry.fs_type.starts_with(fs_type) => fail(
                id,
                format!("{at} is a foreign mount of type {}", entry.fs_type),
                format!("unmount it with `umount {at}`, or choose another place with --state or --merged"),
            ),
            Some(_) if running => ok(id, format!("mounted on {at}")),
            Some(_) => warn(id, format!("{at} is mounted, but no instance runs"), unmount),
        });
    }
    out
}

/// What a running instance's overlay stands on, and why.
fn standing(layout: &Layout) -> Option<Check> {
    let standing = Standing::read(layout)?;
    Some(ok(
        "standing",
        format!("the overlay stands on {}", standing.describe()),
    ))
}

/// True if `path` is a mount whose server is gone.
pub(crate) fn is_dead(path: &Path) -> bool {
    matches!(
        rustix::fs::statfs(path),
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)
    ) || matches!(
        rustix::fs::stat(path),
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)
    )
}

fn upper(layout: &Layout, trial: Option<&Result<(), String>>) -> Check {
    let id = "upper";
    let at = existing_parent(&layout.upper);
    let mend = "choose a directory on ext4, xfs, btrfs or tmpfs with --upper (and --work on the same file system)";
    if let Ok(fs) = rustix::fs::statfs(at)
        && let Some(name) = refused_as_upper(&fs)
    {
        return fail(
            id,
            format!(
                "{} lies on {name}, which overlayfs refuses as upper directory",
                at.display()
            ),
            mend,
        );
    }
    let device = |path: &Path| fs::metadata(existing_parent(path)).map(|m| m.dev()).ok();
    if device(&layout.upper) != device(&layout.work) {
        return fail(
            id,
            format!(
                "{} and {} lie on different file systems",
                layout.upper.display(),
                layout.work.display()
            ),
            "choose --work on the file system of --upper",
        );
    }
    match trial {
        Some(Err(reason)) => fail(
            id,
            format!("a trial overlay at {} failed: {reason}", at.display()),
            mend,
        ),
        Some(Ok(())) => ok(id, format!("a trial overlay at {} works", at.display())),
        None => ok(
            id,
            format!(
                "{} lies on a file system that overlayfs takes",
                at.display()
            ),
        ),
    }
}

fn refused_as_upper(fs: &StatFs) -> Option<&'static str> {
    #[allow(
        clippy::unnecessary_cast,
        clippy::cast_lossless,
        reason = "f_type differs by architecture"
    )]
    let found = fs.f_type as i64;
    REFUSED_AS_UPPER
        .iter()
        .find(|(magic, _)| *magic == found)
        .map(|(_, name)| *name)
}

fn socket(id: &'static str, path: &Path, running: bool) -> Check {
    let option = if id == "socket" {
        "--socket"
    } else {
        "--overlay-socket"
    };
    let at = path.display();
    match fs::symlink_metadata(path) {
        Err(_) if running => fail(
            id,
            format!("an instance runs, but {at} is gone"),
            "run `understory down`, then `up`",
        ),
        Err(_) => ok(id, format!("{at} is free")),
        Ok(meta) if !meta.file_type().is_socket() => fail(
            id,
            format!("{at} is not a socket"),
            format!("move it away, or choose another place with {option}"),
        ),
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) if running => ok(id, format!("the daemon answers at {at}")),
            Ok(_) => warn(
                id,
                format!("another daemon listens at {at}"),
                format!("stop it, or choose another {option}"),
            ),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused && !running => warn(
                id,
                format!("{at} is stale: nobody listens"),
                format!("`understory up` replaces it; or remove it: `rm {at}`"),
            ),
            Err(e) => fail(
                id,
                format!("the daemon at {at} cannot be reached: {e}"),
                "run `understory down`, then `up`",
            ),
        },
    }
}

/// What is set, and who builds.
fn settings(layout: &Layout, settings: &Result<Resolved>) -> Vec<Check> {
    let resolved = match settings {
        Ok(resolved) => resolved,
        Err(error) => {
            let mend = error.hint().unwrap_or("mend that file").to_owned();
            return vec![fail("settings", error.chain(), mend)];
        }
    };
    let list = |items: &[String]| match items {
        [] => "no substituters".to_owned(),
        some => format!("substituters {}", some.join(" ")),
    };
    let found = ok("settings", list(&resolved.settings.substituters));
    let builder = match crate::up::describe_builder(layout, resolved) {
        Ok(what) => ok("builder", what),
        Err(error) => {
            let mend = error
                .hint()
                .unwrap_or("install Nix 2.24 or later")
                .to_owned();
            warn(
                "builder",
                format!("nothing can be built: {}", error.chain()),
                mend,
            )
        }
    };
    vec![found, builder]
}

fn nix(program: Option<&Path>) -> Vec<Check> {
    let id = "nix";
    let Some(program) = program else {
        return vec![warn(
            id,
            "not installed: nothing will use the overlay store yet",
            "install Nix, 2.4 or newer",
        )];
    };
    let run = |args: &[&str]| {
        Command::new(program)
            .args(args)
            .output()
            .ok()
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
    };
    let Some(text) = run(&["--version"]) else {
        return vec![warn(
            id,
            format!("{} cannot be run", program.display()),
            "reinstall Nix",
        )];
    };
    let found = text.trim().to_owned();
    let number = found.rsplit(' ').next().and_then(version_of);
    let mut out = vec![match number {
        _ if found.contains("Lix") => ok(
            id,
            format!("{found}: with NIX_REMOTE; Lix has no local-overlay:// of its own"),
        ),
        Some(version) if version >= NIX_OLDEST_OVERLAY => ok(id, found),
        Some(version) if version >= NIX_OLDEST => ok(
            id,
            format!("{found}: with NIX_REMOTE; too old for local-overlay://"),
        ),
        _ => warn(id, format!("{found}: too old"), "use Nix 2.4 or newer"),
    }];
    let features = run(&[
        "--extra-experimental-features",
        "nix-command",
        "config",
        "show",
        "experimental-features",
    ])
    .unwrap_or_default();
    let has = |name: &str| features.split_whitespace().any(|f| f == name);
    out.push(if has("local-overlay-store") {
        ok("nix-features", "local-overlay-store is on")
    } else {
        ok(
            "nix-features",
            "local-overlay-store is off; only stock Nix that opens local-overlay:// by itself needs it",
        )
    });
    out
}

/// `6.18.44-fc` as (6, 18).
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

/// `path` or the nearest directory above it that exists.
pub(crate) fn existing_parent(path: &Path) -> &Path {
    path.ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"))
}

/// True if another process holds the instance lock.
pub(crate) fn is_locked(lock: &Path) -> bool {
    let file = fs::File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(lock);
    file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayoutOptions;

    fn options(dir: &Path) -> Options {
        let layout = Layout::new(dir, &LayoutOptions::default()).unwrap();
        Options {
            layout,
            nix: None,
            fusermount: None,
            settings: Resolved::load(&crate::settings::Sources {
                nix_conf: false,
                file: None,
                environment: &|_| None,
                flags: Vec::new(),
            }),
            overlay_trial: None,
        }
    }
    fn find<'a>(checks: &'a [Check], id: &str) -> &'a Check {
        checks.iter().find(|c| c.id == id).unwrap()
    }

    #[test]
    fn versions() {
        assert_eq!(version_of("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version_of("2.34.8"), Some((2, 34)));
        assert_eq!(version_of("2.35pre2026"), Some((2, 35)));
        assert_eq!(version_of("x"), None);
    }

    #[test]
    fn a_stale_socket_and_a_plain_file_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        fs::create_dir(&options.layout.run).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&options.layout.socket).unwrap());
        let check = find(&examine(&options), "socket").clone();
        assert_eq!(check.level, Level::Warn);
        assert!(
            check.found.ends_with("is stale: nobody listens"),
            "{}",
            check.found
        );
        fs::remove_file(&options.layout.socket).unwrap();
        fs::write(&options.layout.socket, "").unwrap();
        let check = find(&examine(&options), "socket").clone();
        assert_eq!(check.level, Level::Fail);
        assert!(check.found.ends_with("is not a socket"), "{}", check.found);
    }

    #[test]
    fn an_odd_directory_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let checks = examine(&options(&dir.path().join("a b")));
        let check = find(&checks, "paths");
        assert_eq!(check.level, Level::Fail);
        assert!(check.mend.as_deref().is_some_and(|m| m.contains("--state")));
    }

    #[test]
    fn upper_and_work_on_different_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path());
        options.layout.work = "/proc".into();
        let checks = examine(&options);
        assert_eq!(find(&checks, "upper").level, Level::Fail);
    }
}
