//! Directories of this machine that the demo works on: chosen, measured, and read.

use super::interrupted;
use crate::commands::up::End;
use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::progress::{Done, Progress};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// A tree is looked at this deep; deeper ones are left out (NARs end at 64).
const DEPTH_MAX: usize = 40;
/// Bytes read at a time.
const BUFFER_BYTES: usize = 256 << 10;
/// Trees whose files are smaller than this on average are taken first. A Nix store's average is about 30 KB.
const SMALL_BYTES: u64 = 40_000;
/// Most trees: more store paths show nothing new.
const TREES_MAX: usize = 500;

/// A directory that becomes a store path.
pub(super) struct Tree {
    pub(super) root: PathBuf,
    pub(super) name: String,
    /// Regular files and symlinks, relative, in the order of reading.
    entries: Vec<Entry>,
    disk_bytes: u64,
}

struct Entry {
    path: PathBuf,
    /// `None` for symlinks.
    size: Option<u64>,
}

/// One reading of everything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    pub(super) bytes: u64,
    pub(super) time: Duration,
}

impl Tree {
    pub(super) fn files(&self) -> u64 {
        self.entries.len() as u64
    }
    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().filter_map(|e| e.size).sum()
    }
    pub(super) fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }
}

/// Places that have many real files on a Debian machine with Rust.
pub(super) fn default_sources() -> Vec<PathBuf> {
    let mut out = Vec::new();
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    if let Ok(output) = sysroot
        && output.status.success()
    {
        let root = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        // A distribution's Rust has the sysroot /usr, whose parts come below.
        if root != Path::new("/usr") {
            out.push(root.join("lib"));
            out.push(root.join("share"));
        }
    }
    out.extend(
        [
            "/usr/share",
            "/usr/lib",
            "/usr/include",
            "/usr/libexec",
            "/opt",
        ]
        .map(PathBuf::from),
    );
    out
}

/// Takes directories below the sources, one of each source in turn, until size or number is reached:
/// first those of many small files, which are what stores mostly hold, then any. What cannot be read,
/// or would not fit, is left out.
pub(super) fn choose(sources: &[PathBuf], bytes_max: u64, files_max: u64) -> Result<Vec<Tree>> {
    let mut queues: Vec<Vec<Tree>> = Vec::new();
    for source in sources {
        let found = directories(source)
            .into_iter()
            .filter_map(|root| measure(&root, bytes_max, files_max));
        queues.push(
            found
                .filter(|tree| !tree.entries.is_empty())
                .take(TREES_MAX)
                .collect(),
        );
    }
    if queues.iter().all(Vec::is_empty) {
        let list: Vec<String> = sources.iter().map(|s| s.display().to_string()).collect();
        return Err(CommandError::failed(format!(
            "no directory that fits is in {}",
            list.join(", ")
        ))
        .hint("name directories with many files: `understory demo /usr/share /usr/lib`"));
    }
    let (mut trees, mut bytes, mut files) = (Vec::new(), 0, 0);
    for average_bytes_max in [SMALL_BYTES, u64::MAX] {
        let mut rest: Vec<Vec<Tree>> = Vec::new();
        while queues.iter().any(|q| !q.is_empty()) {
            for (number, queue) in queues.iter_mut().enumerate() {
                let Some(tree) = queue.pop() else { continue };
                if trees.len() < TREES_MAX
                    && tree.bytes() / tree.files() <= average_bytes_max
                    && bytes + tree.bytes() <= bytes_max
                    && files + tree.files() <= files_max
                {
                    bytes += tree.bytes();
                    files += tree.files();
                    trees.push(tree);
                } else {
                    rest.resize_with(rest.len().max(number + 1), Vec::new);
                    rest[number].push(tree);
                }
            }
        }
        rest.iter_mut().for_each(|queue| queue.reverse());
        queues = rest;
    }
    Ok(trees)
}

/// The directories in `source`, last first, or the source itself if it has none.
fn directories(source: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(source) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect();
    if found.is_empty() {
        return vec![source.to_owned()];
    }
    found.sort();
    found.reverse();
    found
}

/// Lists a tree; `None` if it has something unreadable or special, or is too large.
fn measure(root: &Path, bytes_max: u64, files_max: u64) -> Option<Tree> {
    let parent = root
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default()
        .to_string_lossy();
    let own = root.file_name()?.to_string_lossy();
    let mut tree = Tree {
        root: root.to_owned(),
        name: store_name(&format!("{parent}-{own}")),
        entries: Vec::new(),
        disk_bytes: 0,
    };
    let (mut bytes, mut stack) = (0, vec![(PathBuf::new(), 0)]);
    while let Some((relative, depth)) = stack.pop() {
        if depth > DEPTH_MAX {
            return None;
        }
        let dir = root.join(&relative);
        tree.disk_bytes += fs::metadata(&dir).ok()?.blocks() * 512;
        let mut entries: Vec<_> = fs::read_dir(&dir).ok()?.collect::<Result<_, _>>().ok()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let meta = entry.metadata().ok()?;
            let path = relative.join(entry.file_name());
            if meta.is_dir() {
                stack.push((path, depth + 1));
                continue;
            }
            if meta.is_file() {
                rustix::fs::access(entry.path(), rustix::fs::Access::READ_OK).ok()?;
            } else if !meta.is_symlink() {
                return None;
            }
            bytes += if meta.is_file() { meta.len() } else { 0 };
            tree.disk_bytes += meta.blocks() * 512;
            tree.entries.push(Entry {
                path,
                size: meta.is_file().then_some(meta.len()),
            });
            if bytes > bytes_max || tree.entries.len() as u64 > files_max {
                return None;
            }
        }
    }
    Some(tree)
}

/// Replaces what a store path's name may not hold.
fn store_name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_');
    let name: String = text
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .take(200)
        .collect();
    let name = name.trim_start_matches(['.', '-']);
    if name.is_empty() {
        "tree".into()
    } else {
        name.into()
    }
}

/// Reads all files below `roots` (one for each tree) and gives the BLAKE3 of each file's contents, its
/// executable bit and a symlink's target to `each`, always in the same order.
pub(super) fn read(
    cx: &Context,
    trees: &[Tree],
    roots: &[PathBuf],
    ends: &Receiver<End>,
    each: &mut dyn FnMut([u8; 32]),
) -> Result<Pass> {
    let total: u64 = trees.iter().map(Tree::bytes).sum();
    let progress = Progress::new(&cx.ui, "reading");
    let mut buffer = vec![0; BUFFER_BYTES];
    let began = Instant::now();
    let mut bytes = 0;
    for (tree, root) in trees.iter().zip(roots) {
        interrupted(ends)?;
        for entry in &tree.entries {
            let path = root.join(&entry.path);
            let (hash, n) = digest(&path, &mut buffer)
                .map_err(|e| CommandError::io("reading", path.display(), &e))?;
            each(hash);
            bytes += n;
        }
        progress.update(Done {
            bytes: (bytes, total),
            ..Done::default()
        });
    }
    let time = began.elapsed();
    progress.finish();
    Ok(Pass { bytes, time })
}

fn digest(path: &Path, buffer: &mut [u8]) -> std::io::Result<([u8; 32], u64)> {
    use std::io::Read;
    let meta = fs::symlink_metadata(path)?;
    let mut hasher = blake3::Hasher::new();
    if meta.is_symlink() {
        hasher.update(b"l");
        hasher.update(fs::read_link(path)?.as_os_str().as_bytes());
        return Ok((*hasher.finalize().as_bytes(), 0));
    }
    // What counts as executable in a store: the owner's bit.
    hasher.update(if meta.mode() & 0o100 != 0 { b"x" } else { b"f" });
    let mut file = fs::File::open(path)?;
    let mut bytes = 0;
    loop {
        let n = file.read(buffer)?;
        if n == 0 {
            return Ok((*hasher.finalize().as_bytes(), bytes));
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_for_store_paths() {
        assert_eq!(store_name("share-doc"), "share-doc");
        assert_eq!(store_name("lib-gcc c++"), "lib-gcc-c++");
        assert_eq!(store_name("..ä"), "tree");
        assert_eq!(store_name(""), "tree");
    }

    #[test]
    fn trees_are_bounded_and_special_files_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("file"), vec![0; 1000]).unwrap();
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("b/fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let sources = [dir.path().to_owned()];
        let names = |bytes, files| -> Vec<String> {
            let found = choose(&sources, bytes, files).unwrap();
            found
                .iter()
                .map(|t| t.root.file_name().unwrap().to_string_lossy().into_owned())
                .collect()
        };
        assert_eq!(names(10_000, 10), ["a", "c"]);
        assert_eq!(names(1_500, 10), ["a"]);
        assert_eq!(names(10_000, 1), ["a"]);
    }
}
