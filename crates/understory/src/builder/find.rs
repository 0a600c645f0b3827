//! Which Nix builds: finds the program, asks it once who it is, and says why one is of no use.

use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The oldest Nix that is used: earlier ones have an overlay store with errors that lose data.
const OLDEST: (u32, u32) = (2, 24);
/// Where Nix is looked for when it is not in `PATH`.
const USUAL_PLACES: [&str; 3] = [
    "/run/current-system/sw/bin",
    "/nix/var/nix/profiles/default/bin",
    "/usr/bin",
];
/// How long `nix --version` may take: it reads its configuration and answers.
const VERSION_MS_MAX: u64 = 20_000;
/// How much of its answer is read.
const VERSION_BYTES_MAX: u64 = 4096;
/// What every error of this module advises.
const HINT: &str = "install Nix 2.24 or later, or name it with `--nix`";

/// A program that can build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nix {
    /// The program: `nix-daemon`, or `nix` where there is no such.
    pub program: PathBuf,
    /// Its version, as it says it: `2.34.8`.
    pub version: String,
}

/// How the answer of `--version` was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Stock Nix (or one that is made of it).
    Nix(String, (u32, u32)),
    /// Lix, which has no overlay store.
    Lix(String),
    /// Something else.
    Unknown,
}

impl Nix {
    /// Finds a Nix that can build. `given` may be a `nix`, a `nix-daemon` or the directory of one; `None` looks in
    /// `PATH` and the usual places. The answer is remembered for as long as the program's file is the same.
    ///
    /// # Errors
    /// None found, or none of use: says what was found, with a hint.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        if let Some(given) = given {
            let Some(program) = program_at(given) else {
                return Err(
                    Error::environment(format!("there is no Nix at {}", given.display()))
                        .with_hint(HINT),
                );
            };
            return Self::at(program);
        }
        let mut reason = None;
        for directory in search_path() {
            let Some(program) = program_at(&directory) else {
                continue;
            };
            match Self::at(program) {
                Ok(nix) => return Ok(nix),
                Err(error) => {
                    tracing::debug!(error = error.chain(), "a Nix that cannot be used");
                    reason.get_or_insert(error);
                }
            }
        }
        Err(reason.unwrap_or_else(|| {
            Error::environment("there is no Nix that could build").with_hint(HINT)
        }))
    }

    /// The Nix whose program this is.
    fn at(program: PathBuf) -> Result<Self> {
        let (major, minor) = OLDEST;
        match kind_of(&program)? {
            Kind::Nix(version, number) if number >= OLDEST => Ok(Self { program, version }),
            Kind::Nix(version, _) => Err(Error::environment(format!(
                "{} is Nix {version}, expected {major}.{minor} or later",
                program.display()
            ))
            .with_hint(HINT)),
            Kind::Lix(version) => Err(Error::environment(format!(
                "{} is Lix {version}, which has no local-overlay store and cannot build here",
                program.display()
            ))
            .with_hint(HINT)),
            Kind::Unknown => Err(Error::environment(format!(
                "{} does not say a version as Nix does",
                program.display()
            ))
            .with_hint(HINT)),
        }
    }

    /// The command that serves one client on its standard input and output. The store and the settings are the
    /// caller's to add; `true` with it if it needs the experimental feature `nix-command`.
    pub(super) fn daemon(&self) -> (Command, bool) {
        let mut command = Command::new(&self.program);
        let is_daemon = self
            .program
            .file_name()
            .is_some_and(|name| name == "nix-daemon");
        if !is_daemon {
            command.arg("daemon");
        }
        command.arg("--stdio");
        (command, !is_daemon)
    }
}

/// The program at a path that names it, its neighbour or their directory. A `nix-daemon` is preferred.
fn program_at(given: &Path) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        path.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0)
    };
    let in_directory = |directory: &Path| {
        ["nix-daemon", "nix"]
            .iter()
            .map(|name| directory.join(name))
            .find(|path| is_program(path))
    };
    if given.is_dir() {
        return in_directory(given).or_else(|| in_directory(&given.join("bin")));
    }
    if !is_program(given) {
        return None;
    }
    let named_nix = given.file_name().is_some_and(|name| name == "nix");
    let daemon = given.with_file_name("nix-daemon");
    if named_nix && is_program(&daemon) {
        return Some(daemon);
    }
    Some(given.to_owned())
}

fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        // A relative entry would depend on where we were started.
        .filter(|directory| directory.is_absolute())
        .chain(USUAL_PLACES.iter().map(PathBuf::from))
        .collect()
}

/// Which file a program is: another file under the same name is asked anew.
type FileId = (PathBuf, u64, u64, i64, i64);

fn kind_of(program: &Path) -> Result<Kind> {
    static KNOWN: OnceLock<Mutex<HashMap<FileId, Kind>>> = OnceLock::new();
    let meta = program
        .metadata()
        .map_err(|e| Error::io("reading", program, e).with_hint(HINT))?;
    let id = (
        program.to_owned(),
        meta.dev(),
        meta.ino(),
        meta.mtime(),
        meta.mtime_nsec(),
    );
    let known = KNOWN.get_or_init(Mutex::default);
    if let Some(kind) = known
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&id)
    {
        return Ok(kind.clone());
    }
    let kind = parse_version(&ask_version(program)?);
    known
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(id, kind.clone());
    Ok(kind)
}

/// The first output of `PROGRAM --version`.
fn ask_version(program: &Path) -> Result<String> {
    let failed = |reason: String| {
        Error::environment(format!(
            "asking {} for its version{reason}",
            program.display()
        ))
        .with_hint(HINT)
    };
    let mut child = Command::new(program)
        .arg("--version")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(String::new()).with_source(e))?;
    let mut text = Vec::new();
    if let Some(output) = child.stdout.take() {
        let deadline = Instant::now() + Duration::from_millis(VERSION_MS_MAX);
        let mut output = output.take(VERSION_BYTES_MAX);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = Timespec::try_from(left).unwrap_or_default();
            let ready = {
                let mut fds = [PollFd::new(output.get_ref(), PollFlags::IN)];
                poll(&mut fds, Some(&wait))
            };
            match ready {
                Ok(0) => {
                    let _gone = child.kill();
                    let _reaped = child.wait();
                    return Err(failed(format!(": no answer within {VERSION_MS_MAX} ms")));
                }
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(failed(String::new()).with_source(error)),
            }
            let mut piece = [0; 512];
            match output.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => text.extend_from_slice(&piece[..count]),
                Err(error) => return Err(failed(String::new()).with_source(error)),
            }
        }
    }
    let status = child
        .wait()
        .map_err(|e| failed(String::new()).with_source(e))?;
    if !status.success() {
        return Err(failed(format!(": {status}")));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Understands `nix (Nix) 2.34.8`, `nix-daemon (Nix) 2.26.3`, `nix (Determinate Nix 3.8.0) 2.30.1`,
/// `nix (Lix, like Nix) 2.93.0`.
fn parse_version(text: &str) -> Kind {
    let line = text.lines().next().unwrap_or_default().trim();
    let Some((kind, version)) = line
        .split_once('(')
        .and_then(|(_, rest)| rest.rsplit_once(')'))
    else {
        return Kind::Unknown;
    };
    let version = version.trim();
    if kind.contains("Lix") {
        return Kind::Lix(version.to_owned());
    }
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if kind.contains("Nix") => {
            Kind::Nix(version.to_owned(), (major, minor))
        }
        _ => Kind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn versions() {
        let nix = |version: &str, number| Kind::Nix(version.to_owned(), number);
        for (text, expected) in [
            ("nix (Nix) 2.34.8\n", nix("2.34.8", (2, 34))),
            ("nix-daemon (Nix) 2.26.3\n", nix("2.26.3", (2, 26))),
            (
                "nix (Nix) 2.36pre20260801_dirty\n",
                nix("2.36pre20260801_dirty", (2, 36)),
            ),
            (
                "nix (Determinate Nix 3.8.0) 2.30.1\n",
                nix("2.30.1", (2, 30)),
            ),
            (
                "nix (Lix, like Nix) 2.93.0\nSystem type: x86_64-linux\n",
                Kind::Lix("2.93.0".to_owned()),
            ),
            ("", Kind::Unknown),
            ("bash 5.2", Kind::Unknown),
            ("nix (Nix) x", Kind::Unknown),
            ("nix (Snow) 2.34", Kind::Unknown),
        ] {
            assert_eq!(parse_version(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_program_its_neighbour_and_their_directory_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        script(&at("both/bin/nix"), "echo 'nix (Nix) 2.34.8'");
        script(&at("both/bin/nix-daemon"), "echo 'nix-daemon (Nix) 2.34.8'");
        script(&at("one/nix"), "echo 'nix (Nix) 2.24.0'");
        let daemon = Nix {
            program: at("both/bin/nix-daemon"),
            version: "2.34.8".to_owned(),
        };
        for given in ["both", "both/bin", "both/bin/nix", "both/bin/nix-daemon"] {
            assert_eq!(Nix::find(Some(&at(given))).unwrap(), daemon, "{given}");
        }
        let one = Nix::find(Some(&at("one"))).unwrap();
        assert_eq!(one.program, at("one/nix"));
        let arguments = |nix: &Nix| -> Vec<String> {
            let (command, _) = nix.daemon();
            let text = command.get_args().map(|a| a.to_string_lossy().into_owned());
            text.collect()
        };
        assert_eq!(arguments(&one), ["daemon", "--stdio"]);
        assert_eq!(arguments(&daemon), ["--stdio"]);
    }

    #[test]
    fn what_cannot_build_is_named_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        script(&at("old/nix"), "echo 'nix (Nix) 2.18.1'");
        script(&at("lix/nix"), "echo 'nix (Lix, like Nix) 2.93.0'");
        script(&at("odd/nix"), "echo hello");
        script(&at("bad/nix"), "exit 3");
        std::fs::create_dir(at("none")).unwrap();
        for (given, expected) in [
            ("old", "old/nix is Nix 2.18.1, expected 2.24 or later"),
            (
                "lix",
                "lix/nix is Lix 2.93.0, which has no local-overlay store and cannot build here",
            ),
            ("odd", "odd/nix does not say a version as Nix does"),
            ("bad", "bad/nix for its version: exit status: 3"),
            ("none", "/none"),
        ] {
            let error = Nix::find(Some(&at(given))).unwrap_err();
            assert!(error.chain().ends_with(expected), "{}", error.chain());
            assert_eq!(error.hint(), Some(HINT));
        }
    }

    #[test]
    fn a_program_that_was_replaced_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("nix");
        script(&program, "echo 'nix (Nix) 2.30.0'");
        assert_eq!(Nix::find(Some(&program)).unwrap().version, "2.30.0");
        std::fs::rename(&program, dir.path().join("old")).unwrap();
        script(&program, "echo 'nix (Nix) 2.31.0'");
        assert_eq!(Nix::find(Some(&program)).unwrap().version, "2.31.0");
    }
}
