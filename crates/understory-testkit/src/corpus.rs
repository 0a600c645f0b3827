//! Deterministic trees with all that has ever made a store stumble, and the corpora of `scripts/corpus`.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How large the trees become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Some MB, seconds: every test run.
    Small,
    /// The limits themselves: directories of 50,000 entries, a file of 4 GiB.
    Full,
}

impl Size {
    /// Entries of the largest directory.
    pub const fn directory_entries(self) -> u32 {
        match self {
            Self::Small => 5_000,
            Self::Full => 50_000,
        }
    }
    /// Bytes of the largest dense file: an odd number, and in `Full` more than 32 bits hold.
    pub const fn file_bytes(self) -> u64 {
        match self {
            Self::Small => (9 << 20) + 7,
            Self::Full => (4 << 30) + 7,
        }
    }
    /// Apparent bytes of the sparse file.
    pub const fn sparse_bytes(self) -> u64 {
        match self {
            Self::Small => 64 << 20,
            Self::Full => 6 << 30,
        }
    }
}

/// The longest name that Linux allows.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest symlink target that Linux allows.
pub const TARGET_BYTES_MAX: usize = 4095;
/// Depth of [`deep`]: more than any tool's fixed buffer, fewer than PATH_MAX with short names.
pub const DEPTH: usize = 60;

/// Fills `dir` (made if absent) with one subdirectory for each kind of edge case.
///
/// # Errors
/// I/O.
pub fn edge_cases(dir: &Path, size: Size) -> io::Result<()> {
    executable_bits(&dir.join("executable-bits"))?;
    empty(&dir.join("empty"))?;
    names(&dir.join("names"))?;
    symlinks(&dir.join("symlinks"))?;
    deep(&dir.join("deep"), DEPTH)?;
    many_entries(&dir.join("many-entries"), size.directory_entries())?;
    file_sizes(&dir.join("file-sizes"))?;
    large_files(&dir.join("large-files"), size)
}

/// Equal contents with different executable bits, and with modes that the store does not keep.
///
/// # Errors
/// I/O.
pub fn executable_bits(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for (name, mode) in [
        ("plain", 0o644),
        ("executable", 0o755),
        ("owner-only", 0o700),
        ("group-executes", 0o654),
        ("read-only", 0o444),
        ("same-again", 0o644),
    ] {
        let path = dir.join(name);
        fs::write(&path, "#!/bin/sh\necho equal contents\n")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    for (name, mode) in [("empty-plain", 0o644), ("empty-executable", 0o755)] {
        let path = dir.join(name);
        fs::write(&path, "")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let link = dir.join("hard-link");
    if !link.exists() {
        fs::hard_link(dir.join("executable"), link)?;
    }
    Ok(())
}

/// Empty files, empty directories, and directories of nothing else.
///
/// # Errors
/// I/O.
pub fn empty(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir.join("directory/of/nothing/else"))?;
    fs::create_dir_all(dir.join("another"))?;
    fs::write(dir.join("file"), "")?;
    fs::write(dir.join("zero-byte"), [0])
}

/// Names: of 255 bytes, not UTF-8, with every odd byte, that sort differently by bytes and by locale.
///
/// # Errors
/// I/O.
pub fn names(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut names: Vec<Vec<u8>> = vec![
        vec![b'n'; NAME_BYTES_MAX],
        "ü".repeat(127).into_bytes(),
        b"\xff\xfe not utf-8 \x80".to_vec(),
        b"\xc3".to_vec(),
        b" leading and trailing ".to_vec(),
        b"new\nline".to_vec(),
        b"tab\tquote'\"back\\slash".to_vec(),
        b"\x01\x7f".to_vec(),
        b"-rf".to_vec(),
        b"...".to_vec(),
        b".hidden".to_vec(),
        b"~nix~case~hack~1".to_vec(),
        b".wh.whiteout".to_vec(),
        b"a".to_vec(),
        b"a-b".to_vec(),
        b"a.b".to_vec(),
        b"a0".to_vec(),
        b"A".to_vec(),
        b"B".to_vec(),
        b"*?[x]$HOME;&|<>".to_vec(),
        "日本語".into(),
        "e\u{301}".into(),
        "é".into(),
    ];
    names.push([b"\xf0".as_slice(), &[b'x'; NAME_BYTES_MAX - 1]].concat());
    for (number, name) in names.iter().enumerate() {
        fs::write(
            dir.join(OsStr::from_bytes(name)),
            format!("file {number}\n"),
        )?;
    }
    // "a" as a directory sorts before "a-b" although "a/" would sort after it
    let sub = dir.join("order");
    fs::create_dir_all(sub.join("a"))?;
    fs::write(sub.join("a/b"), "below a")?;
    fs::write(sub.join("a-b"), "beside a")?;
    fs::write(sub.join("a0"), "after a")
}

/// Symlinks: dangling, to themselves, absolute, with targets of up to 4095 bytes that are not UTF-8.
///
/// # Errors
/// I/O.
pub fn symlinks(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("file"), "target")?;
    let long = [b"/".as_slice(), &[b't'; TARGET_BYTES_MAX - 1]].concat();
    let odd = [b"\xff\xfe\n".as_slice(), &b"../".repeat(1000)].concat();
    for (name, target) in [
        ("longest", long.as_slice()),
        ("odd", &odd),
        ("to-file", b"file"),
        ("to-directory", b"."),
        ("up", b"../.."),
        ("itself", b"itself"),
        ("dangling", b"nowhere/at all"),
        ("absolute", b"/etc/passwd"),
        ("slash", b"file/"),
    ] {
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path)?;
        }
        symlink(OsStr::from_bytes(target), path)?;
    }
    Ok(())
}

/// `depth` directories in each other, a file in each.
///
/// # Errors
/// I/O.
pub fn deep(dir: &Path, depth: usize) -> io::Result<()> {
    let mut at = dir.to_owned();
    fs::create_dir_all(&at)?;
    for level in 0..depth {
        fs::write(at.join("file"), format!("level {level}\n"))?;
        at.push(format!("d{level}"));
        fs::create_dir_all(&at)?;
    }
    Ok(())
}

/// One directory of `count` entries: mostly files with few different contents, some directories and symlinks.
///
/// # Errors
/// I/O.
pub fn many_entries(dir: &Path, count: u32) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for number in 0..count {
        // names of many lengths, so that readdir buffers end in different places
        let path = dir.join(format!(
            "{number:05}-{}",
            "x".repeat((number as usize * 7) % 61)
        ));
        match number % 50 {
            48 => fs::create_dir_all(&path)?,
            49 => {
                if path.symlink_metadata().is_err() {
                    symlink("00000-", &path)?;
                }
            }
            _ => fs::write(&path, format!("contents {}\n", number % 1000))?,
        }
    }
    Ok(())
}

/// Files of all sizes around the limits of blocks, chunks, frames and padding.
///
/// # Errors
/// I/O.
pub fn file_sizes(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut sizes: Vec<u64> = (0..=17).collect();
    for power in [4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20] {
        sizes.extend([power - 1, power, power + 1]);
    }
    for size in sizes {
        let mut file = fs::File::create(dir.join(format!("random-{size}")))?;
        write_random(&mut file, size, size)?;
        let mut file = fs::File::create(dir.join(format!("zeros-{size}")))?;
        io::copy(&mut io::Read::take(io::repeat(0), size), &mut file)?;
    }
    Ok(())
}

/// A dense file that compresses badly, one with long repeats, and a sparse one with data at both ends.
///
/// # Errors
/// I/O.
pub fn large_files(dir: &Path, size: Size) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut dense = fs::File::create(dir.join("dense"))?;
    write_random(&mut dense, 1, size.file_bytes())?;
    let mut repeats = fs::File::create(dir.join("repeats"))?;
    for round in 0..4 {
        write_random(&mut repeats, 2, 2 << 20)?;
        write_random(&mut repeats, 100 + round, 12_345)?;
    }
    let mut sparse = fs::File::create(dir.join("sparse"))?;
    sparse.write_all(b"first")?;
    sparse.set_len(size.sparse_bytes())?;
    sparse.seek(SeekFrom::End(-4))?;
    sparse.write_all(b"last")
}

/// Writes `size` bytes that only `seed` determines and nothing compresses.
///
/// # Errors
/// I/O.
pub fn write_random(out: &mut dyn Write, seed: u64, size: u64) -> io::Result<()> {
    let mut stream = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    let mut buffer = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        let part = &mut buffer[..usize::try_from(left).unwrap_or(usize::MAX).min(1 << 20)];
        stream.fill(part);
        out.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

/// A real Nix store made of Debian packages by `scripts/corpus`.
#[derive(Debug, Clone)]
pub struct Packages {
    /// The store's root directory, for `local?root=`.
    pub root: PathBuf,
    /// Full store paths whose closures are everything.
    pub top_paths: Vec<String>,
}

impl Packages {
    /// Finds or makes the corpus `small` (75 MB, 29 paths) or `medium` (some GB) in the tests' cache.
    /// Prints why when it cannot.
    ///
    /// # Panics
    /// If it cannot and `UNDERSTORY_REQUIRE_NIX` is 1.
    pub fn get(size: &str) -> Option<Self> {
        match Self::find(size) {
            Ok(packages) => Some(packages),
            Err(why) => {
                crate::skip(&format!("no corpus: {why}"));
                None
            }
        }
    }

    fn find(size: &str) -> Result<Self, String> {
        let dir = cache()
            .ok_or("neither UNDERSTORY_TEST_CACHE nor HOME is set")?
            .join(format!("corpus-{size}"));
        let script = crate::repository().join("scripts/corpus");
        let output = Command::new(&script)
            .arg(size)
            .arg(&dir)
            .output()
            .map_err(|e| format!("{}: {e}", script.display()))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let top = dir.join("top-paths");
        let top_paths =
            fs::read_to_string(&top).map_err(|e| format!("reading {}: {e}", top.display()))?;
        Ok(Self {
            root: dir.join("root"),
            top_paths: top_paths.lines().map(str::to_owned).collect(),
        })
    }
}

/// Where tests keep what is slow to make.
fn cache() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("UNDERSTORY_TEST_CACHE") {
        return Some(dir.into());
    }
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    Some(
        std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(home)?
            .join("understory-tests"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_made_and_making_them_again_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        edge_cases(dir.path(), Size::Small).unwrap();
        let list = || {
            let out = Command::new("find")
                .arg(dir.path())
                .args(["-printf", "%P %y %s %l\\0"])
                .output()
                .unwrap()
                .stdout;
            let mut lines: Vec<Vec<u8>> = out.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
            lines.sort();
            lines
        };
        let first = list();
        assert!(first.len() > 5_000 + 60);
        edge_cases(dir.path(), Size::Small).unwrap();
        assert_eq!(first, list());
        let longest = fs::read_link(dir.path().join("symlinks/longest")).unwrap();
        assert_eq!(longest.as_os_str().len(), TARGET_BYTES_MAX);
    }
}
