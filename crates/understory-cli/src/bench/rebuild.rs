//! What a mass rebuild adds: every path again with another hash part, in names and in contents.
//!
//! The data is imported, then stored twice more from there, each time with all hash parts replaced by new ones: the
//! first time into an empty store, the second time into the same; what the second time adds is the figure.
//! Nothing is copied to disk in between: archives are made on the way.
//!
//! Real Nix stores have hash parts in their files. Debian packages have none, so where files with hash parts are
//! less than a hundredth of the bytes, each object is first made to look as a Nix build makes it (`dressed`):
//! - `/usr` at the beginning of a path (`/usr/share/…`, `prefix=/usr`) is the object's own store path, in texts and
//!   binaries: there it is the `--prefix` that was configured;
//! - `#!` names an interpreter in a reference;
//! - ELF programs and libraries name a loader (programs only) and a run path: the `lib` of up to [`RUN_PATH_MAX`]
//!   references and of the object;
//! - `nix-support/propagated-build-inputs` lists the references, if there are any.

use super::environment::{self, Work};
use super::import::{self, Source};
use super::report::{Aim, Report, Row, Unit};
use crate::error::{CommandError, Result};
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::io::{BufReader, Write};
use std::path::Path;
use std::sync::Arc;
use understory::add::{AddNarOptions, add_nar};
use understory::store::StoredPath;
use understory::{Store, StoreOptions};
use understory_castore::{Castore, Entry, Node};
use understory_nix::hash::CountingHasher;
use understory_nix::nar::Writer as NarWriter;
use understory_nix::store_path::StorePathHash;
use understory_nix::{HashAlgorithm, NarHash, PathInfo, StorePath, nix32};

/// References in a run path: what a linker keeps after `--shrink-rpath` is few.
const RUN_PATH_MAX: usize = 8;
/// Where a linker puts the loader's name: behind the headers.
const INTERPRETER_AT: usize = 0x318;
/// Where strings of the dynamic section are: in the first pages.
const RUN_PATH_AT: usize = 0x1000;
/// Of so many bytes one is in a file with hash parts, at least, in a store whose objects were built by Nix.
const BUILT_BY_NIX: u64 = 100;
/// Bytes of the archive on its way from the thread that makes it.
const PIPE_BUFFER_BYTES: usize = 256 << 10;
/// Rows fetched at a time.
const ROWS: usize = 100;

type HashPart = [u8; 32];

pub(crate) fn measure(work: &Work, source: &Source, report: &mut Report) -> Result<()> {
    let (imported, _) = import::import(work, source, "imported")?;
    let imported = Store::open(&imported, &StoreOptions::default())?;
    let paths = all(&imported)?;
    let plain = Rebuild::new(&imported, &paths, false).survey()?;
    let is_dressed = plain.bytes_with_hash_parts * BUILT_BY_NIX < plain.bytes;
    let rebuild = Rebuild::new(&imported, &paths, is_dressed);
    let survey = if is_dressed { rebuild.survey()? } else { plain };
    let origin = if is_dressed {
        "as written by a build with its store path for /usr, run paths, interpreters"
    } else {
        "as they are"
    };
    report.condition(
        "rebuild",
        format!(
            "every path with new hash parts; {} of {} files ({} of {}) hold some, {origin}",
            crate::ui::count(survey.files_with_hash_parts),
            crate::ui::count(survey.files),
            crate::ui::bytes(survey.bytes_with_hash_parts),
            crate::ui::bytes(survey.bytes),
        ),
    );
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    for (mask, aim) in [(true, Aim::Part(0.005)), (false, Aim::None)] {
        let with = if mask { "masked" } else { "--no-mask" };
        let (first, added) = rebuild.run(work, mask)?;
        let row = |name: String, here: u64, aim| Row {
            group: "rebuild",
            name,
            unit: Unit::Bytes,
            here: here as f64,
            peer: Some(("apparent size of all files".into(), survey.bytes as f64)),
            aim,
        };
        report
            .rows
            .push(row(format!("first build, {with}"), first, Aim::Part(1.0)));
        report
            .rows
            .push(row(format!("added by a rebuild, {with}"), added, aim));
    }
    drop(rebuild);
    drop(imported);
    work.remove("imported")
}

fn all(store: &Store) -> Result<Vec<Arc<StoredPath>>> {
    let (mut paths, mut after) = (Vec::new(), 0);
    loop {
        let rows = store.list(after, ROWS)?;
        let Some(last) = rows.last() else {
            return Ok(paths);
        };
        after = last.id;
        paths.extend(rows);
    }
}

/// What the files hold.
#[derive(Default)]
struct Survey {
    files: u64,
    bytes: u64,
    files_with_hash_parts: u64,
    bytes_with_hash_parts: u64,
}

struct Rebuild<'a> {
    store: &'a Store,
    /// References first.
    paths: &'a [Arc<StoredPath>],
    is_dressed: bool,
    hash_parts: HashMap<HashPart, StorePathHash>,
}

impl<'a> Rebuild<'a> {
    fn new(store: &'a Store, paths: &'a [Arc<StoredPath>], is_dressed: bool) -> Self {
        let hash_parts = paths
            .iter()
            .map(|path| (hash_part(&path.info.path), path.info.path.hash()))
            .collect();
        Self {
            store,
            paths,
            is_dressed,
            hash_parts,
        }
    }

    fn object(&self, path: &'a StoredPath, generation: u32) -> Object<'_> {
        Object {
            rebuild: self,
            castore: self.store.castore(),
            path,
            own: self.store.store_dir().print(&path.info.path),
            references: path
                .info
                .references
                .iter()
                .filter(|reference| **reference != path.info.path)
                .map(|reference| self.store.store_dir().print(reference))
                .collect(),
            generation,
            survey: Survey::default(),
        }
    }

    /// Looks at all files without storing them.
    fn survey(&self) -> Result<Survey> {
        let mut sum = Survey::default();
        for path in self.paths {
            let mut object = self.object(path, 0);
            object.write(&mut std::io::sink())?;
            let survey = object.survey;
            sum.files += survey.files;
            sum.bytes += survey.bytes;
            sum.files_with_hash_parts += survey.files_with_hash_parts;
            sum.bytes_with_hash_parts += survey.bytes_with_hash_parts;
        }
        Ok(sum)
    }

    /// Builds everything twice; returns what the first and the second time took on disk.
    fn run(&self, work: &Work, mask: bool) -> Result<(u64, u64)> {
        work.remove("rebuilt")?;
        let dir = work.path("rebuilt");
        Store::create(&dir, self.store.store_dir())?;
        let mut options = StoreOptions::default();
        options.castore.mask_hash_parts = mask;
        self.generation(&dir, &options, 1)?;
        let first = environment::disk_bytes(&dir)?;
        self.generation(&dir, &options, 2)?;
        let both = environment::disk_bytes(&dir)?;
        work.remove("rebuilt")?;
        Ok((first, both.saturating_sub(first)))
    }

    fn generation(&self, dir: &Path, options: &StoreOptions, generation: u32) -> Result<()> {
        let store = Store::open(dir, options)?;
        let owner = store.temp_root_owner()?;
        for path in self.paths {
            let mut sink = CountingHasher::new(HashAlgorithm::Sha256);
            self.object(path, generation).write(&mut sink)?;
            let (hash, nar_size) = sink.finish();
            let nar_hash =
                NarHash::try_from(hash).map_err(|e| CommandError::environment(e.to_string()))?;
            let info = PathInfo {
                path: renamed(&path.info.path, generation),
                nar_hash,
                nar_size,
                references: path
                    .info
                    .references
                    .iter()
                    .map(|reference| renamed(reference, generation))
                    .collect::<BTreeSet<_>>(),
                deriver: None,
                registration_time: path.info.registration_time,
                ultimate: false,
                signatures: BTreeSet::new(),
                ca: None,
            };
            std::thread::scope(|scope| -> Result<()> {
                let (from, to) =
                    std::io::pipe().map_err(|e| CommandError::io("making", "a pipe", &e))?;
                let writer = scope.spawn(move || {
                    let mut to = std::io::BufWriter::with_capacity(PIPE_BUFFER_BYTES, to);
                    self.object(path, generation).write(&mut to)?;
                    to.flush()
                        .map_err(|e| CommandError::io("writing", "a pipe", &e))
                });
                let mut from = BufReader::with_capacity(PIPE_BUFFER_BYTES, from);
                add_nar(&store, &owner, info, &mut from, AddNarOptions::default())?;
                drop(from);
                writer
                    .join()
                    .map_err(|_| CommandError::environment("the thread of an archive panicked"))?
            })?;
        }
        Ok(())
    }
}

/// The hash part of `path` in another generation.
fn new_hash(hash: &StorePathHash, generation: u32) -> StorePathHash {
    let digest = blake3::Hasher::new()
        .update(&hash.0)
        .update(&generation.to_le_bytes())
        .finalize();
    let mut new = [0; 20];
    new.copy_from_slice(&digest.as_bytes()[..20]);
    StorePathHash(new)
}

fn renamed(path: &StorePath, generation: u32) -> StorePath {
    StorePath::from_parts(new_hash(&path.hash(), generation), &path.to_name())
}

fn hash_part(path: &StorePath) -> HashPart {
    let mut part = [0; 32];
    part.copy_from_slice(path.hash_part().as_bytes());
    part
}

/// One object in one generation.
struct Object<'a> {
    rebuild: &'a Rebuild<'a>,
    castore: &'a Castore,
    path: &'a StoredPath,
    /// Full store paths, with the hash parts of the data.
    own: String,
    references: Vec<String>,
    generation: u32,
    survey: Survey,
}

impl Object<'_> {
    /// Writes it as an archive.
    fn write(&mut self, out: &mut dyn Write) -> Result<()> {
        let mut nar = NarWriter::new(out);
        self.node(None, &self.path.root, &mut nar)?;
        nar.finish().map_err(understory::Error::from)?;
        Ok(())
    }

    fn node(
        &mut self,
        name: Option<&[u8]>,
        node: &Node,
        nar: &mut NarWriter<&mut dyn Write>,
    ) -> Result<()> {
        match node {
            Node::Symlink { target } => {
                let mut target = target.to_vec();
                self.replace(&mut target);
                nar.symlink(name, &target)
                    .map_err(understory::Error::from)?;
            }
            Node::File {
                digest,
                size,
                executable,
            } => {
                let mut contents = vec![0; usize::try_from(*size).unwrap_or_default()];
                if *size > 0 {
                    self.castore
                        .blob(digest, *size)?
                        .read_at(0, &mut contents)?;
                }
                self.file(name, *executable, contents, nar)?;
            }
            Node::Directory { digest, .. } => {
                nar.directory_begin(name).map_err(understory::Error::from)?;
                let directory = self.castore.directory(digest)?;
                let mut entries: Vec<&Entry> = directory.entries().iter().collect();
                entries.sort_by(|a, b| a.name.cmp(&b.name));
                let mut support = name.is_none()
                    && self.rebuild.is_dressed
                    && !self.references.is_empty()
                    && entries.iter().all(|entry| &*entry.name != SUPPORT);
                for entry in entries {
                    if support && &*entry.name > SUPPORT {
                        self.support(nar)?;
                        support = false;
                    }
                    self.node(Some(&entry.name), &entry.node, nar)?;
                }
                if support {
                    self.support(nar)?;
                }
                nar.directory_end().map_err(understory::Error::from)?;
            }
        }
        Ok(())
    }

    fn support(&mut self, nar: &mut NarWriter<&mut dyn Write>) -> Result<()> {
        nar.directory_begin(Some(SUPPORT))
            .map_err(understory::Error::from)?;
        let text = format!("{}\n", self.references.join(" "));
        self.file(
            Some(b"propagated-build-inputs"),
            false,
            text.into_bytes(),
            nar,
        )?;
        nar.directory_end().map_err(understory::Error::from)?;
        Ok(())
    }

    fn file(
        &mut self,
        name: Option<&[u8]>,
        executable: bool,
        mut contents: Vec<u8>,
        nar: &mut NarWriter<&mut dyn Write>,
    ) -> Result<()> {
        if self.rebuild.is_dressed {
            contents = dress(contents, &self.own, &self.references);
        }
        let size = contents.len() as u64;
        self.survey.files += 1;
        self.survey.bytes += size;
        if self.replace(&mut contents) > 0 {
            self.survey.files_with_hash_parts += 1;
            self.survey.bytes_with_hash_parts += size;
        }
        nar.file(name, executable, size)
            .and_then(|()| nar.contents(&contents))
            .map_err(understory::Error::from)?;
        Ok(())
    }

    /// Replaces all hash parts of known paths by those of the generation; says how many there were.
    fn replace(&self, bytes: &mut [u8]) -> u32 {
        let (mut at, mut count) = (0, 0);
        'window: while let Some(window) =
            bytes.get(at..).and_then(<[u8]>::first_chunk::<32>).copied()
        {
            for (place, byte) in window.iter().enumerate().rev() {
                if !nix32::is_digit(*byte) {
                    at += place + 1;
                    continue 'window;
                }
            }
            match self.rebuild.hash_parts.get(&window) {
                Some(hash) => {
                    let new = nix32::encode(&new_hash(hash, self.generation).0);
                    bytes[at..at + 32].copy_from_slice(new.as_bytes());
                    count += 1;
                    at += 32;
                }
                None => at += 1,
            }
        }
        count
    }
}

const SUPPORT: &[u8] = b"nix-support";

/// Makes a file look as a Nix build writes it.
fn dress(contents: Vec<u8>, own: &str, references: &[String]) -> Vec<u8> {
    let mut dressed = match prefixed(&contents, own) {
        Cow::Owned(bytes) => bytes,
        Cow::Borrowed(_) => contents,
    };
    let interpreter = references
        .iter()
        .find(|path| path.contains("-bash") || path.contains("-python") || path.contains("-perl"))
        .or(references.first());
    if let (true, Some(interpreter)) = (dressed.starts_with(b"#!/"), interpreter) {
        let program = dressed[2..]
            .iter()
            .position(|byte| matches!(byte, b' ' | b'\n'))
            .map_or(dressed.len(), |len| 2 + len);
        let name = dressed[2..program]
            .rsplit(|byte| *byte == b'/')
            .next()
            .unwrap_or_default()
            .to_vec();
        let line = [b"#!", interpreter.as_bytes(), b"/bin/", &name].concat();
        dressed.splice(..program, line);
    }
    // Type 2 is a program, 3 a library or a program that may lie anywhere.
    let is_elf = dressed.starts_with(b"\x7fELF") && dressed.len() > RUN_PATH_AT + 2;
    if is_elf && !references.is_empty() && matches!(dressed[16], 2 | 3) {
        let libraries = references.iter().take(RUN_PATH_MAX).map(String::as_str);
        let run_path: Vec<String> = libraries
            .chain([own])
            .map(|path| format!("{path}/lib"))
            .collect();
        let run_path = [run_path.join(":").as_bytes(), b"\0"].concat();
        dressed.splice(RUN_PATH_AT..RUN_PATH_AT, run_path);
        if dressed[..RUN_PATH_AT].windows(6).any(|w| w == b"/ld-li") {
            let loader = format!("{}/lib/ld-linux-x86-64.so.2\0", references[0]);
            dressed.splice(INTERPRETER_AT..INTERPRETER_AT, loader.into_bytes());
        }
    }
    dressed
}

/// Puts `own` in the place of `/usr` where a path begins with it.
fn prefixed<'a>(contents: &'a [u8], own: &str) -> Cow<'a, [u8]> {
    const USR: &[u8] = b"/usr";
    let mut out = Vec::new();
    let mut done = 0;
    for (at, window) in contents.windows(USR.len()).enumerate() {
        if window != USR {
            continue;
        }
        let before = at.checked_sub(1).map_or(b' ', |at| contents[at]);
        let behind = contents.get(at + USR.len()).copied().unwrap_or(b'\n');
        let begins = !before.is_ascii_alphanumeric() && !b"/.-_}".contains(&before);
        if begins && (behind == b'/' || behind == b'\n') {
            out.extend_from_slice(&contents[done..at]);
            out.extend_from_slice(own.as_bytes());
            done = at + USR.len();
        }
    }
    if done == 0 {
        return Cow::Borrowed(contents);
    }
    out.extend_from_slice(&contents[done..]);
    Cow::Owned(out)
}
