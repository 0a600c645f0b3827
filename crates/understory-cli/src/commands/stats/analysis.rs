//! Where the bytes of a store go: a walk over all its trees.
//!
//! Cost: each entry of each tree is looked at once for each path that has it, 0.2 to 1 µs where its directory is in the
//! cache and 20 µs for each directory that is not: a second for 173,000 files, ten for a million. Each file that differs
//! is opened, which is an index lookup (and, for large ones, the read of a chunk list).
//!
//! Memory is bounded: digests of files are remembered as 8 bytes, up to [`DISTINCT_MAX`] of them; beyond, one in
//! two, four, … is (chosen by the digest itself), and sums over files that differ become estimates. Closures are
//! computed for stores of up to [`CLOSURE_PATHS_MAX`] paths.

use super::Trees;
use crate::error::Result;
use std::collections::{HashMap, HashSet};
use understory::Store;
use understory_castore::{Breakdown, Castore, Digest, Node};

/// Rows fetched at a time.
const BATCH: usize = 1_000;
/// Digests remembered exactly: 32 to 64 MB.
const DISTINCT_MAX: usize = 2_000_000;
/// Paths whose references are kept in memory: about 150 bytes each.
const CLOSURE_PATHS_MAX: usize = 300_000;
/// Paths that nothing refers to whose closures are computed, the largest ones.
const CLOSURE_STARTS_MAX: usize = 2_000;
/// Closures that are named.
const CLOSURES_SHOWN: usize = 10;
/// Points of the growth; when there are more, every second is dropped.
const POINTS_MAX: usize = 512;

/// Kinds of files by name, with the endings of each, in the order of their display.
const CLASSES: [(&str, &[&str]); 10] = [
    ("programs, no extension", &[]),
    ("shared libraries", &["so"]),
    (
        "objects, static libraries",
        &["a", "o", "lo", "la", "rlib", "hi", "ko"],
    ),
    (
        "sources, headers",
        &[
            "h", "hh", "hpp", "c", "cc", "cpp", "rs", "go", "hs", "java", "cmake", "pc", "nix",
        ],
    ),
    (
        "scripts, bytecode",
        &[
            "py", "pyc", "pyi", "pl", "pm", "rb", "js", "ts", "mjs", "sh", "bash", "lua", "el",
            "elc", "tcl", "vim", "jar", "class",
        ],
    ),
    (
        "documentation",
        &[
            "md", "txt", "html", "htm", "css", "gz", "1", "2", "3", "4", "5", "6", "7", "8",
            "info", "pdf", "rst", "tex",
        ],
    ),
    (
        "translations, locales",
        &["mo", "po", "gmo", "qm", "locale"],
    ),
    (
        "data, configuration",
        &[
            "json", "xml", "yaml", "yml", "toml", "conf", "ini", "cfg", "csv", "dat", "db", "bin",
            "desktop", "service",
        ],
    ),
    (
        "images, fonts, sound",
        &[
            "png", "svg", "jpg", "jpeg", "gif", "ico", "ttf", "otf", "woff", "woff2", "pcf", "wav",
            "ogg", "mp3", "webp",
        ],
    ),
    ("everything else", &[]),
];

/// What files of a kind hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ClassBytes {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// Of files that differ.
    pub(crate) unique_bytes: u64,
}

/// The store after some path was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    /// Paths by then.
    pub(crate) paths: u64,
    /// Registration time of the last, in Unix seconds.
    pub(crate) registered: u64,
    pub(crate) bytes: u64,
    pub(crate) unique_bytes: u64,
}

/// All that was found.
#[derive(Debug, Default)]
pub(crate) struct Analysis {
    pub(crate) trees: Trees,
    pub(crate) unique_files: u64,
    pub(crate) unique_bytes: u64,
    /// Bytes of files that differ only in hash parts of store paths from one before them.
    pub(crate) masked_duplicate_bytes: u64,
    /// Sums over files that differ are estimates.
    pub(crate) is_estimate: bool,
    /// By class, in the order of their display; only those that there are.
    pub(crate) classes: Vec<(&'static str, ClassBytes)>,
    pub(crate) growth: Vec<Point>,
    /// Largest first; `None`: too many paths.
    pub(crate) closures: Option<Vec<(String, u64)>>,
    pub(crate) kinds: Breakdown,
}

/// A set of digests that stays small.
struct Distinct {
    seen: HashSet<u64>,
    max: usize,
    /// Only digests whose lowest `level` bits are zero are in it.
    level: u32,
}

impl Distinct {
    fn new(max: usize) -> Self {
        Self {
            seen: HashSet::new(),
            max,
            level: 0,
        }
    }
    /// For how many the digest stands if it is new; 0 if it is known or not in the sample.
    fn insert(&mut self, digest: &Digest) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest.0[..8]);
        let number = u64::from_le_bytes(bytes);
        let is_in = |number: u64, level: u32| number & ((1 << level) - 1) == 0;
        if !is_in(number, self.level) || !self.seen.insert(number) {
            return 0;
        }
        let stands_for = 1 << self.level;
        if self.seen.len() > self.max {
            self.level += 1;
            let level = self.level;
            self.seen.retain(|number| is_in(*number, level));
            self.seen.shrink_to_fit();
        }
        stands_for
    }
}

struct Walk<'a> {
    castore: &'a Castore,
    files: Distinct,
    masked: Distinct,
    by_extension: HashMap<&'static str, usize>,
    classes: [ClassBytes; CLASSES.len()],
    out: Analysis,
}

impl Walk<'_> {
    fn node(&mut self, name: &[u8], node: &Node) -> Result<()> {
        match node {
            Node::Symlink { .. } => self.out.trees.symlinks += 1,
            Node::File {
                digest,
                size,
                executable,
            } => self.file(name, digest, *size, *executable)?,
            Node::Directory { digest, .. } => {
                self.out.trees.directories += 1;
                for entry in self.castore.directory(digest)?.entries() {
                    self.node(&entry.name, &entry.node)?;
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, name: &[u8], digest: &Digest, size: u64, executable: bool) -> Result<()> {
        self.out.trees.files += 1;
        self.out.trees.bytes += size;
        let new = self.files.insert(digest);
        let at = self.class(name, executable);
        let class = &mut self.classes[at];
        class.files += 1;
        class.bytes += size;
        if new == 0 {
            return Ok(());
        }
        class.unique_bytes += size * new;
        self.out.unique_files += new;
        self.out.unique_bytes += size * new;
        if size > 0
            && let Some(masked) = self.castore.blob(digest, size)?.masked_digest()
            && self.masked.insert(masked) == 0
            && self.masked.level == 0
        {
            self.out.masked_duplicate_bytes += size * new;
        }
        Ok(())
    }

    fn class(&self, name: &[u8], executable: bool) -> usize {
        let name = String::from_utf8_lossy(name);
        // Versions stand behind the extension of a library: `libc.so.6`.
        if name.contains(".so.") {
            return 1;
        }
        match name.rsplit_once('.') {
            Some((stem, extension)) if !stem.is_empty() => {
                let known = self
                    .by_extension
                    .get(extension.to_ascii_lowercase().as_str());
                known
                    .copied()
                    .unwrap_or(if executable { 0 } else { CLASSES.len() - 1 })
            }
            _ => 0,
        }
    }
}

/// Walks the store. `progress` gets (paths done, paths in all, bytes done).
pub(crate) fn analyse(store: &Store, progress: &mut dyn FnMut(u64, u64, u64)) -> Result<Analysis> {
    let all = store.count()?;
    let castore = store.castore();
    let extensions = CLASSES.iter().enumerate();
    let extensions = extensions.flat_map(|(at, (_, of))| of.iter().map(move |e| (*e, at)));
    let mut walk = Walk {
        castore,
        files: Distinct::new(DISTINCT_MAX),
        masked: Distinct::new(DISTINCT_MAX),
        by_extension: extensions.collect(),
        classes: Default::default(),
        out: Analysis::default(),
    };
    let mut graph = Graph::default();
    let (mut after, mut done, mut stride) = (0, 0, 1);
    let mut last = None;
    loop {
        let rows = store.list(after, BATCH)?;
        let Some(end) = rows.last() else { break };
        after = end.id;
        for row in &rows {
            walk.node(b"", &row.root)?;
            done += 1;
            graph.add(row);
            let point = Point {
                paths: done,
                registered: row.info.registration_time,
                bytes: walk.out.trees.bytes,
                unique_bytes: walk.out.unique_bytes,
            };
            last = Some(point);
            if done % stride == 0 {
                walk.out.growth.push(point);
            }
            if walk.out.growth.len() > POINTS_MAX {
                stride *= 2;
                walk.out.growth.retain(|point| point.paths % stride == 0);
            }
            progress(done, all, walk.out.trees.bytes);
        }
    }
    let mut out = walk.out;
    if let Some(last) = last
        && out.growth.last() != Some(&last)
    {
        out.growth.push(last);
    }
    out.is_estimate = walk.files.level > 0;
    let names = CLASSES.iter().map(|(name, _)| *name);
    out.classes = names
        .zip(walk.classes)
        .filter(|(_, c)| c.files > 0)
        .collect();
    out.closures = graph.largest();
    out.kinds = castore.breakdown(&mut |_, _| {})?;
    Ok(out)
}

/// Who refers to whom, by number.
#[derive(Default)]
struct Graph {
    numbers: HashMap<String, u32>,
    sizes: Vec<u64>,
    references: Vec<Vec<u32>>,
    is_referred_to: Vec<bool>,
    is_too_large: bool,
}

impl Graph {
    fn number(&mut self, name: &str) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = u32::try_from(self.sizes.len()).unwrap_or(u32::MAX);
        self.numbers.insert(name.to_owned(), number);
        self.sizes.push(0);
        self.references.push(Vec::new());
        self.is_referred_to.push(false);
        number
    }
    fn add(&mut self, row: &understory::store::StoredPath) {
        if self.is_too_large {
            return;
        }
        if self.sizes.len() >= CLOSURE_PATHS_MAX {
            *self = Self {
                is_too_large: true,
                ..Self::default()
            };
            return;
        }
        let own = self.number(row.info.path.base_name());
        let mut references = Vec::with_capacity(row.info.references.len());
        for reference in &row.info.references {
            let other = self.number(reference.base_name());
            if other != own {
                references.push(other);
                self.is_referred_to[other as usize] = true;
            }
        }
        self.sizes[own as usize] = row.info.nar_size;
        self.references[own as usize] = references;
    }
    /// The largest closures of paths that nothing refers to, by NAR bytes.
    fn largest(self) -> Option<Vec<(String, u64)>> {
        if self.is_too_large {
            return None;
        }
        let mut starts: Vec<u32> = (0..).take(self.sizes.len()).collect();
        starts.retain(|at| !self.is_referred_to[*at as usize]);
        starts.sort_by_key(|at| std::cmp::Reverse(self.sizes[*at as usize]));
        starts.truncate(CLOSURE_STARTS_MAX);
        let mut seen_by = vec![u32::MAX; self.sizes.len()];
        let mut found: Vec<(u32, u64)> = Vec::new();
        for start in starts {
            let (mut sum, mut stack) = (0, vec![start]);
            seen_by[start as usize] = start;
            while let Some(at) = stack.pop() {
                sum += self.sizes[at as usize];
                for next in &self.references[at as usize] {
                    if seen_by[*next as usize] != start {
                        seen_by[*next as usize] = start;
                        stack.push(*next);
                    }
                }
            }
            found.push((start, sum));
        }
        found.sort_by_key(|(_, sum)| std::cmp::Reverse(*sum));
        found.truncate(CLOSURES_SHOWN);
        let mut names: HashMap<u32, String> = HashMap::new();
        for (name, number) in self.numbers {
            if found.iter().any(|(at, _)| *at == number) {
                names.insert(number, name);
            }
        }
        let named = found
            .into_iter()
            .filter_map(|(at, sum)| Some((names.remove(&at)?, sum)));
        Some(named.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_stands_for_all() {
        let digest = |n: u64| Digest::of(&n.to_le_bytes());
        let mut exact = Distinct::new(1_000_000);
        let mut small = Distinct::new(2_000);
        let (mut a, mut b) = (0, 0);
        for n in 0..50_000 {
            for _ in 0..2 {
                a += exact.insert(&digest(n));
                b += small.insert(&digest(n));
            }
        }
        assert_eq!(a, 50_000);
        assert!(small.seen.len() <= 2_001 && small.level >= 4);
        assert!((45_000..55_000).contains(&b), "{b}");
    }
}
