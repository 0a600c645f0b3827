//! CPU time of a compiler that lies in the mount, with its headers there: what builds see of a mount.
//!
//! The compiler proper (`cc1`) and the C headers of this machine become a store path. What is counted is user and
//! system time of a compilation and of 100 starts of the compiler, caches warm; the compiler itself is most of it.

use super::super::environment::{Work, run, understory};
use super::super::report::Report;
use crate::error::{CommandError, Result};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Functions of the program that is compiled: about a second.
const FUNCTIONS: usize = 1_500;
/// Starts of the compiler.
const STARTS: usize = 100;
/// Where Debian and most others have headers that `stdio.h` and its like need.
const HEADERS: [&str; 4] = [
    "x86_64-linux-gnu",
    "aarch64-linux-gnu",
    "linux",
    "asm-generic",
];

/// A compiler in a directory and in a store.
pub(super) struct Compiler {
    /// The directory whose entries are store paths.
    pub(super) dir: PathBuf,
    /// The entry's name.
    base_name: String,
    source: PathBuf,
}

impl Compiler {
    /// `None`, with a word in the report, if this machine has no compiler.
    pub(super) fn new(work: &Work, store: &Path, report: &mut Report) -> Result<Option<Self>> {
        let said = |argument: &str| {
            let output = Command::new("gcc").arg(argument).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            let path = PathBuf::from(text.trim());
            (output.status.success() && path.is_absolute()).then_some(path)
        };
        let (Some(cc1), Some(own)) = (
            said("-print-prog-name=cc1"),
            said("-print-file-name=include"),
        ) else {
            report
                .missing
                .push("compilation: gcc is not installed".to_owned());
            return Ok(None);
        };
        let tree = work.make("compiler")?;
        let copy = |from: &Path, to: &str| {
            run(Command::new("cp").arg("-rL").arg(from).arg(tree.join(to))).map(drop)
        };
        copy(&cc1, "cc1")?;
        copy(&own, "own")?;
        let include = work.make("compiler/include")?;
        let io = |e: std::io::Error| CommandError::io("reading", "/usr/include", &e);
        for entry in std::fs::read_dir("/usr/include").map_err(io)? {
            let path = entry.map_err(io)?.path();
            let header = path.extension().is_some_and(|e| e == "h") && path.is_file();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if header || HEADERS.contains(&&*name) {
                copy(&path, &format!("include/{name}"))?;
            }
        }
        // One triple is this machine's.
        for triple in &HEADERS[..2] {
            let asm = include.join(triple).join("asm");
            if asm.is_dir() {
                copy(&asm, "include/asm")?;
            }
        }
        let source = work.path("program.c");
        std::fs::write(&source, program())
            .map_err(|e| CommandError::io("writing", source.display(), &e))?;
        let added = run(understory(store)?.arg("add").arg(&tree))?;
        let added = String::from_utf8_lossy(&added.stdout);
        let base_name = added
            .trim()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let dir = work.make("compiler-objects")?;
        run(Command::new("cp")
            .arg("-r")
            .arg(&tree)
            .arg(dir.join(&base_name)))?;
        Ok(Some(Self {
            dir,
            base_name,
            source,
        }))
    }

    /// CPU seconds of a compilation and the starts, with the compiler below `root`.
    pub(super) fn seconds(&self, root: &Path) -> Result<f64> {
        let script = format!(
            "set -e\n\
             \"$1/cc1\" -quiet -O1 -nostdinc -isystem \"$1/own\" -isystem \"$1/include\" \
             -isystem \"$1/include/$(uname -m)-linux-gnu\" \"$2\" -o /dev/null\n\
             n=0; while [ $n -lt {STARTS} ]; do \"$1/cc1\" --version > /dev/null 2>&1; n=$((n+1)); done\n\
             times"
        );
        let output = run(Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(root.join(&self.base_name))
            .arg(&self.source))?;
        let said = String::from_utf8_lossy(&output.stdout);
        // The second line is the children's: `0m1.230000s 0m0.450000s`.
        said.lines()
            .last()
            .and_then(|line| line.split_whitespace().map(seconds).sum())
            .ok_or_else(|| CommandError::failed(format!("`times` said `{}`", said.trim())))
    }
}

/// `1m2.5s` in seconds.
fn seconds(text: &str) -> Option<f64> {
    let (minutes, seconds) = text.strip_suffix('s')?.split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}

/// A C program that needs many headers and some thought.
fn program() -> String {
    let mut text = String::new();
    for header in [
        "assert",
        "ctype",
        "errno",
        "float",
        "inttypes",
        "limits",
        "locale",
        "math",
        "setjmp",
        "signal",
        "stdio",
        "stdlib",
        "string",
        "time",
        "wchar",
        "unistd",
        "fcntl",
        "pthread",
        "dirent",
        "poll",
        "pwd",
        "semaphore",
        "spawn",
        "termios",
        "sys/mman",
        "sys/socket",
        "sys/stat",
        "sys/wait",
        "linux/fs",
        "linux/stat",
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "#include <{header}.h>");
    }
    for number in 0..FUNCTIONS {
        let _ = writeln!(
            text,
            "int f{number}(int a, const char *b) {{ int s = {number}; for (int i = 0; i < a; i++) \
             {{ s += b[i] * (i ^ {number}); if (s > a * {number}) s -= strlen(b); }} return s; }}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn times_of_shells() {
        assert_eq!(seconds("0m1.230000s"), Some(1.23));
        assert_eq!(seconds("2m0.5s"), Some(120.5));
        assert_eq!(seconds("x"), None);
    }
}
