//! The kernel's list of mounts, as `/proc/self/mountinfo` gives it.
//!
//! Format: proc_pid_mountinfo(5), checked against Linux 6.18. Fields are separated by single
//! spaces; in paths and option values the kernel writes space, tab, newline, backslash and (in
//! option values) comma, equals sign, hash and colon as three-digit octal escapes.

use crate::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where the list of this process's mount namespace is.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount of this process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id, as `statx` gives it.
    pub id: u64,
    /// The id of the mount it lies on.
    pub parent_id: u64,
    /// Major and minor number: the `st_dev` of files on it (btrfs and overlayfs may differ per file).
    pub device: (u32, u32),
    /// The directory within the file system that is this mount's root.
    pub root: PathBuf,
    /// Where it is mounted, seen from this process's root.
    pub mount_point: PathBuf,
    /// Options of this mount, comma separated: `ro,nosuid`.
    pub options: String,
    /// The groups of mounts that it hears of or tells what is mounted and unmounted (`shared:`, `master:`).
    pub peer_groups: Vec<u64>,
    /// The type with its subtype: `ext4`, `fuse.understory`.
    pub fs_type: String,
    /// What is mounted; the file system decides what that means.
    pub source: OsString,
    /// Options of the file system, comma separated, values still escaped; see [`MountEntry::super_option`].
    super_options: Vec<u8>,
}

/// Returns all mounts of this process's mount namespace, in the kernel's order.
///
/// # Errors
/// `/proc` is not mounted or its contents are not understood.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let text = std::fs::read(MOUNTINFO).map_err(|e| {
        Error::io("reading", MOUNTINFO, e).with_hint("mount the proc file system on /proc")
    })?;
    parse(&text)
}

/// Returns the mount that one sees at exactly `path` (canonical), if `path` is a mount point.
///
/// # Errors
/// As [`mounts`].
pub fn mount_at(path: &Path) -> Result<Option<MountEntry>> {
    let all = mounts()?;
    Ok(topmost_at(&all, path).cloned())
}

/// Returns the uppermost of the mounts at exactly `path`.
pub fn topmost_at<'a>(mounts: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let at: Vec<&MountEntry> = mounts.iter().filter(|m| m.mount_point == path).collect();
    // Of mounts stacked at one place, each is the parent of the one above.
    at.iter().rev().copied().find(|m| {
        !at.iter()
            .any(|above| above.parent_id == m.id && above.id != m.id)
    })
}

/// Returns the mounts at exactly `path`, the lowest first.
pub fn stacked_at<'a>(mounts: &'a [MountEntry], path: &Path) -> Vec<&'a MountEntry> {
    let mut out = Vec::new();
    let mut next = topmost_at(mounts, path);
    while let Some(entry) = next {
        out.push(entry);
        next = mounts
            .iter()
            .find(|below| below.id == entry.parent_id && below.mount_point == path)
            .filter(|_| out.len() < mounts.len());
    }
    out.reverse();
    out
}

/// Returns a process in another mount namespace that has a mount of the same file system as `entry` which does not go when
/// `entry` is unmounted. Sees what `/proc` shows: neither namespaces without a process nor mounts that are at no place.
///
/// # Errors
/// `/proc` cannot be read.
pub fn held_elsewhere(entry: &MountEntry) -> Result<Option<u32>> {
    let is_private = |other: &MountEntry| {
        let hears = |group: &u64| other.peer_groups.contains(group);
        other.device == entry.device && !entry.peer_groups.iter().any(hears)
    };
    in_other_namespaces(&is_private)
}

/// True if an overlay of another device than `device` has one of `dirs` among its lower directories, in this mount namespace
/// or another one. Sees those that name a directory by that path.
///
/// # Errors
/// `/proc` cannot be read.
pub fn is_below_another(dirs: &[PathBuf], device: (u32, u32)) -> Result<bool> {
    let stands = |entry: &MountEntry| {
        let lowers = entry.overlay_lower_dirs();
        entry.device != device && lowers.iter().any(|lower| dirs.contains(lower))
    };
    Ok(mounts()?.iter().any(stands) || in_other_namespaces(&stands)?.is_some())
}

/// Returns a process in another mount namespace that has a mount which is so.
fn in_other_namespaces(is_so: &dyn Fn(&MountEntry) -> bool) -> Result<Option<u32>> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt"));
    let ours = namespace("self").map_err(|e| Error::io("reading", "/proc/self/ns/mnt", e))?;
    let mut seen = vec![ours];
    for process in std::fs::read_dir("/proc").map_err(|e| Error::io("reading", "/proc", e))? {
        let name = process
            .map_err(|e| Error::io("reading", "/proc", e))?
            .file_name();
        let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        // It may have ended by now.
        let Ok(theirs) = namespace(pid) else { continue };
        if seen.contains(&theirs) {
            continue;
        }
        seen.push(theirs);
        let Ok(text) = std::fs::read(format!("/proc/{pid}/mountinfo")) else {
            continue;
        };
        if parse(&text)?.iter().any(is_so) {
            return Ok(pid.parse().ok());
        }
    }
    Ok(None)
}

/// Parses the contents of a mountinfo file.
///
/// # Errors
/// Names the line that is not understood.
pub fn parse(text: &[u8]) -> Result<Vec<MountEntry>> {
    text.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_line(line).ok_or_else(|| {
                Error::environment(format!(
                    "{MOUNTINFO}: line not understood: {:?}",
                    String::from_utf8_lossy(line)
                ))
            })
        })
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&b| b == b' ');
    let mut next = || fields.next();
    let id = number(next()?)?;
    let parent_id = number(next()?)?;
    let device = std::str::from_utf8(next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = path(next()?);
    let mount_point = path(next()?);
    let options = String::from_utf8_lossy(next()?).into_owned();
    // Optional fields (`shared:1 master:2`) end with a lone dash.
    let mut peer_groups = Vec::new();
    loop {
        let field = next()?;
        if field == b"-" {
            break;
        }
        let group = [&b"shared:"[..], b"master:"]
            .iter()
            .find_map(|name| field.strip_prefix(*name));
        peer_groups.extend(group.and_then(number));
    }
    let fs_type = String::from_utf8_lossy(&unescape(next()?)).into_owned();
    let source = OsString::from_vec(unescape(next()?));
    let super_options = next()?.to_vec();
    Some(MountEntry {
        id,
        parent_id,
        device,
        root,
        mount_point,
        options,
        peer_groups,
        fs_type,
        source,
        super_options,
    })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Resolves the kernel's `\ooo` escapes; anything else after a backslash stays as it is.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'\\'
            && let [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] = tail
        {
            out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

impl MountEntry {
    /// Returns the value of an option of the file system (`lowerdir`, `max_read`); an option without
    /// a value has the empty one. Of several the last counts.
    pub fn super_option(&self, key: &str) -> Option<OsString> {
        self.super_options
            .split(|&b| b == b',')
            .filter_map(|option| {
                let (name, value) = match option.iter().position(|&b| b == b'=') {
                    Some(at) => (&option[..at], &option[at + 1..]),
                    None => (option, &b""[..]),
                };
                (unescape(name) == key.as_bytes()).then(|| OsString::from_vec(unescape(value)))
            })
            .next_back()
    }

    /// Returns all options of the file system with escapes resolved, for people to read.
    pub fn super_options(&self) -> OsString {
        OsString::from_vec(unescape(&self.super_options))
    }

    /// False if it is a FUSE mount whose server has gone. Asks the server, so it waits for a slow one.
    pub fn is_alive(&self) -> bool {
        // Attributes may be answered from memory even of a dead mount; statfs never is.
        let dead = rustix::io::Errno::NOTCONN;
        rustix::fs::statfs(&self.mount_point).err() != Some(dead)
    }

    /// True if the option stands among those of this mount (`ro`, `nosuid`).
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|o| o == option)
    }

    /// Returns an overlay's lower directories, uppermost first; empty for other file systems.
    pub fn overlay_lower_dirs(&self) -> Vec<PathBuf> {
        if self.fs_type != "overlay" {
            return Vec::new();
        }
        let mut out = Vec::new();
        // Mounted with `lowerdir+` (Linux 6.7) there is one option per directory, not quoted.
        for option in self.super_options.split(|&b| b == b',') {
            if let Some(value) = option.strip_prefix(b"lowerdir+=") {
                out.push(path(value));
            } else if let Some(value) = option.strip_prefix(b"lowerdir=") {
                out.extend(split_lower_dirs(OsStr::from_bytes(&unescape(value))));
            }
        }
        out
    }
}

/// Splits an overlay's `lowerdir` value at colons; a backslash protects the byte after it.
fn split_lower_dirs(value: &OsStr) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut current = Vec::new();
    let mut bytes = value.as_bytes().iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => current.extend(bytes.next()),
            b':' => out.push(PathBuf::from(OsString::from_vec(std::mem::take(
                &mut current,
            )))),
            other => current.push(other),
        }
    }
    out.push(PathBuf::from(OsString::from_vec(current)));
    out.retain(|p| !p.as_os_str().is_empty());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &[u8] = br"24 1 254:0 / / rw,relatime shared:1 master:3 - ext4 /dev/root rw,errors=remount-ro
25 24 0:23 / /proc rw,nosuid - proc proc rw
90 24 0:50 / /mnt/a\040b\134c ro,nosuid,nodev - fuse.understory understory:/var/lib/under\040story ro,user_id=0,group_id=0,max_read=1048576
91 90 0:51 / /mnt/a\040b\134c ro - tmpfs tmpfs ro,size=1k
92 24 0:52 / /m rw - overlay overlay rw,lowerdir=/l1\134:x:/l\0542,upperdir=/u,workdir=/w,index=off
";

    #[test]
    fn fields_and_escapes() {
        let all = parse(SAMPLE).unwrap();
        assert_eq!(all.len(), 5);
        assert_eq!(all[0].fs_type, "ext4");
        assert_eq!(all[0].peer_groups, [1, 3]);
        assert!(all[1].peer_groups.is_empty());
        assert_eq!(all[0].super_option("errors").unwrap(), "remount-ro");
        assert_eq!(all[2].mount_point, Path::new("/mnt/a b\\c"));
        assert_eq!(all[2].source, "understory:/var/lib/under story");
        assert_eq!(all[2].device, (0, 50));
        assert!(all[2].has_option("nodev") && !all[2].has_option("node"));
        assert_eq!(all[2].super_option("ro").unwrap(), "");
        assert_eq!(all[2].super_option("rw"), None);
        let lowers = all[4].overlay_lower_dirs();
        assert_eq!(lowers, [Path::new("/l1:x"), Path::new("/l,2")]);
        assert_eq!(all[4].super_option("upperdir").unwrap(), "/u");
    }

    #[test]
    fn the_uppermost_of_stacked_mounts_is_found() {
        let mut all = parse(SAMPLE).unwrap();
        let at = Path::new("/mnt/a b\\c");
        assert_eq!(topmost_at(&all, at).unwrap().id, 91);
        all.reverse();
        assert_eq!(topmost_at(&all, at).unwrap().id, 91);
        assert_eq!(topmost_at(&all, Path::new("/nowhere")), None);
        let ids = |at: &str| -> Vec<u64> {
            let stacked = stacked_at(&all, Path::new(at));
            stacked.iter().map(|entry| entry.id).collect()
        };
        assert_eq!(ids("/mnt/a b\\c"), [90, 91]);
        assert_eq!(ids("/m"), [92]);
        assert!(ids("/nowhere").is_empty());
    }

    #[test]
    fn a_line_that_is_not_understood_is_named() {
        let error = parse(b"24 1 254 / / rw - ext4 x rw\n").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("line not understood: \"24 1 254 / / rw"),
            "{error}"
        );
    }

    #[test]
    fn the_machine_has_a_root_mount() {
        assert!(mount_at(Path::new("/")).unwrap().is_some());
    }

    proptest! {
        #[test]
        fn unescape_undoes_the_kernels_escaping(bytes: Vec<u8>) {
            let mut escaped = Vec::new();
            for &b in &bytes {
                if b" \t\n\\,=#:".contains(&b) {
                    escaped.extend(format!("\\{b:03o}").bytes());
                } else {
                    escaped.push(b);
                }
            }
            prop_assert_eq!(unescape(&escaped), bytes);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
