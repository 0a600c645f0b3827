//! Garbage-collector roots: `gcroots/`, `profiles/`, indirect and permanent roots, and what processes use.
//!
//! Rules and words are those of `gc.cc` and `indirect-root-store.cc` of Nix 2.34.8. One thing is more: what a process has
//! open or mapped is recognised below the physical directory of the store too, not only below the logical one.
//!
//! Cost: one pass over `/proc`, some system calls for each open file of each process that we may look at.

use super::LocalPaths;
use super::temp_roots;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use understory_nix::{Hash, HashAlgorithm, StoreDir, StorePath};

/// Depth of directories below `gcroots/` that are looked at: a loop of mounts must not hang a collection.
const DEPTH_MAX: usize = 64;
/// Most bytes that are read of a file in `/proc`: 64 Ki mappings, the kernel's default limit, with long names.
const PROC_BYTES_MAX: u64 = 64 << 20;
/// What the kernel may be told to run: its programs are in use.
const KERNEL_PROGRAMS: [&str; 3] = [
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/fbsplash",
    "/proc/sys/kernel/poweroff_cmd",
];

/// Tells temporary names of this process apart.
static NEXT_LINK: AtomicU64 = AtomicU64::new(0);

/// Keeps what the symlink at `link` points to: `gcroots/auto/<nix32(sha1(link))>` → `link`.
///
/// # Errors
/// I/O; `link` is not absolute.
pub fn add_indirect_root(paths: &LocalPaths, link: &Path) -> Result<()> {
    let link = canonical(link)?;
    let auto = paths.state.join("gcroots/auto");
    fs::create_dir_all(&auto).map_err(|e| Error::io("creating", &auto, e))?;
    let hash = Hash::of(HashAlgorithm::Sha1, link.as_os_str().as_bytes());
    replace_symlink(link.as_os_str(), &auto.join(hash.to_nix32()))
}

/// Makes the symlink `link` → `path` and registers it as an indirect root. The path is to be a temporary root of the
/// caller already.
///
/// # Errors
/// In Nix's words: inside the store, or something else is there. I/O.
pub fn add_perm_root(paths: &LocalPaths, path: &StorePath, link: &Path) -> Result<()> {
    let link = place_for_root(&paths.store_dir, link)?;
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io("creating", parent, e))?;
    }
    replace_symlink(OsStr::new(&paths.store_dir.print(path)), &link)?;
    add_indirect_root(paths, &link)
}

/// Where a permanent root is made that shall be at `link`.
///
/// # Errors
/// In Nix's words: not absolute, inside the store, or something else is there. I/O.
pub(crate) fn place_for_root(store_dir: &StoreDir, link: &Path) -> Result<PathBuf> {
    let link = canonical(link)?;
    let store_dir = Path::new(store_dir.as_str());
    if is_below(&link, store_dir) {
        return Err(Error::user(format!(
            "creating a garbage collector root ({}) in the Nix store is forbidden \
             (are you running nix-build inside the store?)",
            link.display()
        )));
    }
    match fs::symlink_metadata(&link) {
        Ok(metadata) => {
            let into_store = metadata.is_symlink()
                && fs::read_link(&link).is_ok_and(|target| is_below(&target, store_dir));
            if !into_store {
                return Err(Error::user(format!(
                    "cannot create symlink '{}'; already exists",
                    link.display()
                )));
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("reading", link, error)),
    }
    Ok(link)
}

/// All roots, with what `is_valid` says of a link's target: link (or `{temp:PID}`, `/proc/…`) and path. Stale links
/// in `gcroots/auto` are removed. `runtime` adds what processes have open or in their environment.
///
/// # Errors
/// I/O other than missing permissions.
pub fn find_roots(
    paths: &LocalPaths,
    runtime: bool,
    is_valid: &dyn Fn(&StorePath) -> Result<bool>,
) -> Result<Vec<(PathBuf, StorePath)>> {
    let mut roots = permanent_roots(paths, runtime, is_valid)?;
    roots.extend(
        temp_roots::read_all(&paths.state, &paths.store_dir)?
            .into_iter()
            .map(|(pid, path)| (PathBuf::from(format!("{{temp:{pid}}}")), path)),
    );
    roots.sort();
    roots.dedup();
    Ok(roots)
}

/// As [`find_roots`] without the temporary ones.
///
/// # Errors
/// As [`find_roots`].
pub fn permanent_roots(
    paths: &LocalPaths,
    runtime: bool,
    is_valid: &dyn Fn(&StorePath) -> Result<bool>,
) -> Result<Vec<(PathBuf, StorePath)>> {
    let mut search = Search {
        paths,
        is_valid,
        auto: paths.state.join("gcroots/auto"),
        roots: Vec::new(),
    };
    search.visit(&paths.state.join("gcroots"), 0)?;
    search.visit(&paths.state.join("profiles"), 0)?;
    let mut roots = search.roots;
    if runtime {
        for (path, links) in runtime_roots(Path::new("/proc"), &paths.store_dir, &paths.real)? {
            if is_valid(&path)? {
                tracing::debug!("got additional root '{}'", paths.store_dir.print(&path));
                roots.extend(links.into_iter().map(|link| (link, path.clone())));
            }
        }
    }
    roots.sort();
    roots.dedup();
    Ok(roots)
}

struct Search<'a> {
    paths: &'a LocalPaths,
    is_valid: &'a dyn Fn(&StorePath) -> Result<bool>,
    auto: PathBuf,
    roots: Vec<(PathBuf, StorePath)>,
}

impl Search<'_> {
    /// Takes what is at `path`; what cannot be looked at is said and left out.
    fn visit(&mut self, path: &Path, depth: usize) -> Result<()> {
        match self.try_visit(path, depth) {
            Err(Found::Io(error)) if is_permanent(&error) => {
                tracing::info!("cannot read potential root '{}'", path.display());
                Ok(())
            }
            Err(Found::Io(error)) => Err(Error::io("reading", path, error)),
            Err(Found::Other(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    }

    fn try_visit(&mut self, path: &Path, depth: usize) -> Result<(), Found> {
        let kind = fs::symlink_metadata(path)?.file_type();
        if kind.is_dir() {
            if depth >= DEPTH_MAX {
                return Err(Found::Other(Error::environment(format!(
                    "{} lies deeper than {DEPTH_MAX} directories",
                    path.display()
                ))));
            }
            for entry in fs::read_dir(path)? {
                self.visit(&entry?.path(), depth + 1)
                    .map_err(Found::Other)?;
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(path)?;
            let store_dir = Path::new(self.paths.store_dir.as_str());
            if is_below(&target, store_dir) {
                return self.found(path, &target);
            }
            // An indirect root: the symlink that it names must lead into the store.
            let link = resolve(path.parent().unwrap_or(Path::new("/")), &target);
            match fs::symlink_metadata(&link) {
                Ok(metadata) if metadata.is_symlink() => {
                    let second = fs::read_link(&link)?;
                    if is_below(&second, store_dir) {
                        return self.found(&link, &second);
                    }
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
                {
                    if path.starts_with(&self.auto) {
                        tracing::info!(
                            "removing stale link from '{}' to '{}'",
                            path.display(),
                            link.display()
                        );
                        fs::remove_file(path)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        } else if kind.is_file()
            && let Some(store_path) = path
                .file_name()
                .and_then(OsStr::to_str)
                .and_then(|name| StorePath::from_base_name(name).ok())
            && (self.is_valid)(&store_path).map_err(Found::Other)?
        {
            self.roots.push((path.to_path_buf(), store_path));
        }
        Ok(())
    }

    fn found(&mut self, link: &Path, target: &Path) -> Result<(), Found> {
        let Ok((path, _)) = self
            .paths
            .store_dir
            .parse_below(target.as_os_str().as_bytes())
        else {
            return Ok(());
        };
        if (self.is_valid)(&path).map_err(Found::Other)? {
            self.roots.push((link.to_path_buf(), path));
        } else {
            tracing::info!(
                "skipping invalid root from '{}' to '{}'",
                link.display(),
                target.display()
            );
        }
        Ok(())
    }
}

/// Why a place could not be looked at.
enum Found {
    Io(std::io::Error),
    Other(Error),
}
impl From<std::io::Error> for Found {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// True for what Nix does not look at further.
fn is_permanent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied
    )
}

/// True if `path` lies in `dir`.
fn is_below(path: &Path, dir: &Path) -> bool {
    path != dir && path.starts_with(dir)
}

/// `target` as seen from `dir`, with `.` and `..` resolved lexically.
fn resolve(dir: &Path, target: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in dir.join(target).components() {
        match component {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

fn canonical(link: &Path) -> Result<PathBuf> {
    if !link.is_absolute() {
        return Err(Error::user(format!(
            "not an absolute path: '{}'",
            link.display()
        )));
    }
    Ok(resolve(Path::new("/"), link))
}

/// Makes a symlink beside its place, and renames it there.
fn replace_symlink(target: &OsStr, link: &Path) -> Result<()> {
    loop {
        let mut name = link.as_os_str().to_os_string();
        let number = NEXT_LINK.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".tmp-{}-{number}", std::process::id()));
        let temporary = PathBuf::from(name);
        match symlink(target, &temporary) {
            Ok(()) => {}
            // Another process of that number, in another pid namespace, or dead.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(Error::io("creating", temporary, error)),
        }
        return fs::rename(&temporary, link).map_err(|error| {
            let _ = fs::remove_file(&temporary); // the error that counts is the other one
            Error::io("creating", link, error)
        });
    }
}

/// What processes have open, mapped, as their program or directory, or in their environment; with where it was seen.
fn runtime_roots(
    proc: &Path,
    store_dir: &StoreDir,
    real: &Path,
) -> Result<BTreeMap<StorePath, BTreeSet<PathBuf>>> {
    let mut seen = Seen {
        store_dir,
        real: real.as_os_str().as_bytes(),
        roots: BTreeMap::new(),
    };
    let entries = match fs::read_dir(proc) {
        Ok(entries) => entries,
        Err(error) if is_permanent(&error) => return Ok(seen.roots),
        Err(error) => return Err(Error::io("reading", proc, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("reading", proc, e))?;
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let process = entry.path();
        if let Err(error) = seen.process(&process)
            && !is_permanent(&error)
            && error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error())
        {
            return Err(Error::io("reading", process, error));
        }
    }
    for file in KERNEL_PROGRAMS.map(Path::new) {
        match fs::read(file) {
            Ok(text) => seen.path(file, text.trim_ascii_end()),
            Err(error) if is_permanent(&error) => {}
            Err(error) => return Err(Error::io("reading", file, error)),
        }
    }
    Ok(seen.roots)
}

struct Seen<'a> {
    store_dir: &'a StoreDir,
    real: &'a [u8],
    roots: BTreeMap<StorePath, BTreeSet<PathBuf>>,
}

impl Seen<'_> {
    fn process(&mut self, dir: &Path) -> std::io::Result<()> {
        for name in ["exe", "cwd"] {
            self.link(&dir.join(name))?;
        }
        for entry in fs::read_dir(dir.join("fd"))? {
            self.link(&entry?.path())?;
        }
        let maps = dir.join("maps");
        for line in read_some(&maps)?.split(|byte| *byte == b'\n') {
            if let Some(path) = mapped_file(line) {
                self.path(&maps, path);
            }
        }
        let environ = dir.join("environ");
        let text = read_some(&environ)?;
        for path in paths_in(&text, self.store_dir.as_str().as_bytes()) {
            self.path(&environ, path);
        }
        Ok(())
    }
    /// A link that is gone or not ours to read is none.
    fn link(&mut self, link: &Path) -> std::io::Result<()> {
        match fs::read_link(link) {
            Ok(target) => {
                self.path(link, target.as_os_str().as_bytes());
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
    fn path(&mut self, source: &Path, path: &[u8]) {
        let found = self.store_dir.parse_below(path).ok().or_else(|| {
            let below = path.strip_prefix(self.real)?.strip_prefix(b"/")?;
            let name = below.split(|byte| *byte == b'/').next()?;
            let name = std::str::from_utf8(name).ok()?;
            Some((StorePath::from_base_name(name).ok()?, &[][..]))
        });
        if let Some((store_path, _)) = found {
            self.roots
                .entry(store_path)
                .or_default()
                .insert(source.to_path_buf());
        }
    }
}

fn read_some(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(PROC_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The file of a line of `maps`: the sixth field, if it is a path without blanks.
fn mapped_file(line: &[u8]) -> Option<&[u8]> {
    let mut fields = line
        .split(u8::is_ascii_whitespace)
        .filter(|field| !field.is_empty());
    let path = fields.nth(5)?;
    (path.starts_with(b"/") && fields.next().is_none()).then_some(path)
}

/// Everything in `text` that looks like a store path: the directory, a slash, then characters of base names.
fn paths_in<'a>(text: &'a [u8], store_dir: &[u8]) -> Vec<&'a [u8]> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(begin) = find(&text[at..], store_dir).map(|offset| at + offset) {
        let name = begin + store_dir.len() + 1;
        let end = (name..text.len())
            .find(|i| !is_name_byte(text[*i]))
            .unwrap_or(text.len());
        let is_path = text.get(name - 1) == Some(&b'/') && end > name;
        if is_path {
            found.push(&text[begin..end]);
        }
        at = if is_path { end } else { begin + 1 };
    }
    found
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    const A: &str = "00000000000000000000000000000000-a";
    const B: &str = "11111111111111111111111111111111-b";

    fn store() -> (tempfile::TempDir, LocalPaths) {
        let dir = tempfile::tempdir().unwrap();
        let paths = LocalPaths::at_root(dir.path(), StoreDir::default());
        fs::create_dir_all(paths.state.join("gcroots/auto")).unwrap();
        fs::create_dir_all(paths.state.join("profiles")).unwrap();
        fs::create_dir_all(&paths.real).unwrap();
        (dir, paths)
    }
    fn path(name: &str) -> StorePath {
        StorePath::from_base_name(name).unwrap()
    }
    fn permanent(paths: &LocalPaths) -> Vec<(String, String)> {
        let valid = |path: &StorePath| Ok(path.base_name() == A);
        find_roots(paths, false, &valid)
            .unwrap()
            .into_iter()
            .map(|(link, path)| {
                let link = link.strip_prefix(&paths.state).unwrap_or(&link);
                (link.display().to_string(), path.to_string())
            })
            .collect()
    }

    #[test]
    fn links_into_the_store_and_files_named_like_paths_are_roots_if_valid() {
        let (_dir, paths) = store();
        let gcroots = paths.state.join("gcroots");
        fs::create_dir(gcroots.join("deep")).unwrap();
        symlink(format!("/nix/store/{A}/bin"), gcroots.join("deep/x")).unwrap();
        symlink(format!("/nix/store/{B}"), gcroots.join("not-valid")).unwrap();
        symlink("/nix/store/garbage", gcroots.join("garbage")).unwrap();
        symlink("../profiles", gcroots.join("profiles")).unwrap();
        fs::write(gcroots.join(A), "").unwrap();
        fs::write(gcroots.join(B), "").unwrap();
        symlink(
            format!("/nix/store/{A}"),
            paths.state.join("profiles/p-1-link"),
        )
        .unwrap();
        assert_eq!(
            permanent(&paths),
            [
                (format!("gcroots/{A}"), A.to_string()),
                ("gcroots/deep/x".to_string(), A.to_string()),
                ("profiles/p-1-link".to_string(), A.to_string()),
            ]
        );
    }

    #[test]
    fn an_indirect_root_counts_while_its_link_is_there() {
        let (dir, paths) = store();
        let link = dir.path().join("work/result");
        add_perm_root(&paths, &path(A), &link).unwrap();
        assert_eq!(
            fs::read_link(&link).unwrap().as_os_str(),
            format!("/nix/store/{A}").as_str()
        );
        add_perm_root(&paths, &path(A), &link).unwrap();
        assert_eq!(
            permanent(&paths),
            [(link.display().to_string(), A.to_string())]
        );
        let auto = || {
            fs::read_dir(paths.state.join("gcroots/auto"))
                .unwrap()
                .count()
        };
        assert_eq!(auto(), 1);
        fs::remove_file(&link).unwrap();
        assert_eq!(permanent(&paths), []);
        assert_eq!(auto(), 0, "the stale link is gone");
    }

    #[test]
    fn an_indirect_root_has_the_name_that_nix_gives_it() {
        let (_dir, paths) = store();
        add_indirect_root(&paths, Path::new("/home/u/result")).unwrap();
        // `printf /home/u/result | sha1sum`, in nix32 by `nix hash convert`.
        let hash = Hash::of(HashAlgorithm::Sha1, b"/home/u/result").to_nix32();
        assert_eq!(hash.len(), 32);
        assert_eq!(
            fs::read_link(paths.state.join("gcroots/auto").join(hash)).unwrap(),
            Path::new("/home/u/result")
        );
    }

    #[test]
    fn a_permanent_root_clobbers_nothing() {
        let (dir, paths) = store();
        let link = dir.path().join("mine");
        fs::write(&link, "x").unwrap();
        let error = add_perm_root(&paths, &path(A), &link).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot create symlink '{}'; already exists", link.display())
        );
        let error = add_perm_root(&paths, &path(A), Path::new("/nix/store/x/../y")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "creating a garbage collector root (/nix/store/y) in the Nix store is forbidden \
             (are you running nix-build inside the store?)"
        );
        let error = add_perm_root(&paths, &path(A), Path::new("x")).unwrap_err();
        assert_eq!(error.to_string(), "not an absolute path: 'x'");
    }

    #[test]
    fn what_a_process_has_open_or_in_its_environment_is_a_root() {
        let (_dir, paths) = store();
        let file = paths.real.join(A);
        fs::write(&file, "x").unwrap();
        // Its input is the object, by the physical path; its environment names another one.
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .arg0("holds-a-root")
            .env("THING", format!("x:/nix/store/{B}/bin:/nix/store/garbage"))
            .stdin(fs::File::open(&file).unwrap())
            .spawn()
            .unwrap();
        let pid = child.id();
        // The program runs when its environment is the new one.
        let environ = format!("/proc/{pid}/environ");
        while !fs::read(&environ)
            .unwrap()
            .windows(5)
            .any(|w| w == b"THING")
        {
            std::thread::yield_now();
        }
        let roots = runtime_roots(Path::new("/proc"), &paths.store_dir, &paths.real);
        child.kill().unwrap();
        child.wait().unwrap();
        let roots = roots.unwrap();
        assert!(roots[&path(A)].contains(&PathBuf::from(format!("/proc/{pid}/fd/0"))));
        assert!(roots[&path(B)].contains(&PathBuf::from(environ)));
    }

    #[test]
    fn store_paths_in_an_environment() {
        let found = |text: &str| -> Vec<String> {
            paths_in(text.as_bytes(), b"/nix/store")
                .into_iter()
                .map(|path| String::from_utf8(path.to_vec()).unwrap())
                .collect()
        };
        assert_eq!(
            found("PATH=/nix/store/x/bin:/nix/store/y-1.0_+?=\0B=/nix/store\0C=/nix/store/"),
            ["/nix/store/x", "/nix/store/y-1.0_+?="]
        );
        assert_eq!(found("/nix/store/nix/store/x"), ["/nix/store/nix"]);
        assert_eq!(found("/nix/nix/store/x"), ["/nix/store/x"]);
        assert_eq!(found("/nix/stor"), [""; 0]);
    }

    #[test]
    fn lines_of_maps() {
        let line = b"7f0 r-xp 0 00:1f 12   /nix/store/x/lib/libc.so";
        assert_eq!(mapped_file(line), Some(&b"/nix/store/x/lib/libc.so"[..]));
        assert_eq!(mapped_file(b"7f0 r-xp 0 00:1f 12   [heap]"), None);
        assert_eq!(mapped_file(b"7f0 r-xp 0 00:1f 12   /x (deleted)"), None);
        assert_eq!(mapped_file(b"7f0 r-xp 0 00:00 0"), None);
    }
}
