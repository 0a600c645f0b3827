//! The rule of the layers (docs/architecture.md): arrows point down, formats are pure, libraries do not print,
//! `unsafe` is where it is known to be, and nothing names a machine or a registry.

#![allow(clippy::unwrap_used, reason = "a test that cannot look must fail")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// From the bottom. A crate may use those before it.
const LAYERS: [&str; 5] = [
    "understory-nix",
    "understory-erofs",
    "understory-castore",
    "understory",
    "understory-cli",
];

/// Crates that know formats and do no I/O.
const FORMATS: [&str; 2] = ["understory-nix", "understory-erofs"];

/// Crates that only say how to run something or how to do I/O: formats need none of them.
const NOT_IN_FORMATS: [&str; 12] = [
    "tokio",
    "rusqlite",
    "rustix",
    "memmap2",
    "tempfile",
    "signal-hook",
    "sd-notify",
    "indicatif",
    "clap",
    "crossbeam-channel",
    "zstd",
    "tracing-subscriber",
];
/// What formats must not touch. Traits and errors of `std::io` are fine: the caller owns the stream.
const NOT_IN_FORMAT_SOURCES: [&str; 9] = [
    "std::fs",
    "std::net",
    "std::os::unix::net",
    "std::process",
    "std::thread",
    "std::env",
    "std::time::SystemTime",
    "std::io::stdin",
    "std::io::stdout",
];

/// Files that may hold `unsafe`, by what they need it for.
const UNSAFE: &[(&str, &str)] = &[
    (
        "crates/understory/src/store/generation.rs",
        "a counter that processes share in a memory map",
    ),
    ("crates/understory-castore/src/mapped.rs", "memory maps"),
    (
        "crates/understory/src/mount/",
        "the /dev/fuse protocol, mount(2)",
    ),
    (
        "crates/understory/src/mount.rs",
        "the /dev/fuse protocol, mount(2)",
    ),
    ("crates/understory/src/namespace.rs", "fork, unshare"),
    (
        "crates/understory/src/service_manager.rs",
        "descriptors that a process is started with",
    ),
];

/// A file that needs a table of contents is two files.
const LINES_MAX: usize = 900;
/// But not these.
const LONG: &[(&str, &str)] = &[(
    "crates/understory-nix/src/worker/types.rs",
    "one wire type after the other",
)];

#[test]
fn dependencies_point_down() {
    let packages = packages();
    for (layer, name) in LAYERS.iter().enumerate() {
        for dependency in &packages[*name].normal {
            if dependency.starts_with("understory") {
                let below = LAYERS[..layer].contains(&dependency.as_str());
                assert!(
                    below,
                    "{name} depends on {dependency}, which is not below it"
                );
            }
        }
    }
    for (name, package) in &packages {
        assert!(
            !package.normal.iter().any(|d| d == "understory-testkit"),
            "{name} ships understory-testkit, which is for tests only"
        );
    }
}

#[test]
fn every_crate_has_its_layer() {
    let mut expected: Vec<&str> = LAYERS.into_iter().chain(["understory-testkit"]).collect();
    expected.sort_unstable();
    assert_eq!(
        packages().keys().map(String::as_str).collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn formats_are_pure() {
    for format in FORMATS {
        let used = &packages()[format].normal;
        for banned in NOT_IN_FORMATS {
            assert!(
                !used.iter().any(|d| d == banned),
                "{format} depends on {banned}"
            );
        }
        for file in sources(&format!("crates/{format}/src")) {
            for (number, line) in code(&file) {
                for banned in NOT_IN_FORMAT_SOURCES {
                    assert!(
                        !line.contains(banned),
                        "{}:{number}: {banned}",
                        file.display()
                    );
                }
            }
        }
    }
}

#[test]
fn no_async_below_the_library() {
    for name in ["understory-nix", "understory-erofs", "understory-castore"] {
        let used = &packages()[name].normal;
        assert!(
            !used.iter().any(|d| d == "tokio" || d == "futures"),
            "{name} knows of async"
        );
    }
}

#[test]
fn libraries_do_not_print() {
    let mut found = Vec::new();
    for dir in [
        "crates/understory-nix/src",
        "crates/understory-erofs/src",
        "crates/understory-castore/src",
        "crates/understory/src",
    ] {
        for file in sources(dir) {
            for (number, line) in code(&file) {
                if ["println!", "print!(", "dbg!("]
                    .iter()
                    .any(|banned| line.contains(banned))
                {
                    found.push(format!("{}:{number}: {}", relative(&file), line.trim()));
                }
            }
        }
    }
    none(&found);
}

#[test]
fn unsafe_is_where_it_is_known_to_be() {
    let mut found = Vec::new();
    for file in sources("crates") {
        let relative = relative(&file);
        if UNSAFE.iter().any(|(path, _)| relative.starts_with(path)) {
            continue;
        }
        for (number, line) in code(&file) {
            if line
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .any(|word| word == "unsafe")
            {
                found.push(format!("{relative}:{number}: {}", line.trim()));
            }
        }
    }
    none(&found);
}

#[test]
fn nothing_names_a_registry_or_a_machine() {
    // pieces, so that this file does not name them either
    let banned = [
        ["deb.", "debian.org"].concat(),
        ["archive.", "ubuntu.com"].concat(),
        ["static.", "crates.io"].concat(),
        ["index.", "crates.io"].concat(),
        ["pypi", ".org"].concat(),
        ["registry.", "npmjs"].concat(),
        ["ghcr", ".io"].concat(),
        ["/var/", "tmp/us"].concat(),
        ["/wo", "rk/"].concat(),
        ["/root/", ".cache"].concat(),
    ];
    let mut found = Vec::new();
    for file in tracked_files() {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let name = relative(&file);
        // the lock file names its source by Cargo's own constant
        if name.ends_with("Cargo.lock") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if banned.iter().any(|word| line.contains(word.as_str())) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(&found);
}

#[test]
fn no_file_needs_a_table_of_contents() {
    let mut found = Vec::new();
    for file in sources("crates") {
        let lines = code(&file).len();
        if lines > LINES_MAX && !LONG.iter().any(|(long, _)| relative(&file) == *long) {
            found.push(format!(
                "{}: {lines} lines without tests, which is two files",
                relative(&file)
            ));
        }
    }
    none(&found);
}

#[test]
fn every_module_says_what_it_owns() {
    let mut found = Vec::new();
    for file in sources("crates").iter().filter(|file| !is_test(file)) {
        let text = fs::read_to_string(file).unwrap();
        let first = text
            .lines()
            .find(|l| !l.trim().is_empty() && !l.starts_with("#!"));
        if !first.is_some_and(|l| l.starts_with("//!") && l.split_whitespace().count() > 2) {
            found.push(format!(
                "{}: does not begin with a //! of some words",
                relative(file)
            ));
        }
    }
    none(&found);
}

/// Fails with all that was found.
fn none(found: &[String]) {
    assert!(
        found.is_empty(),
        "{} findings:\n{}",
        found.len(),
        found.join("\n")
    );
}

// -- what is looked at

struct Package {
    /// Names of normal and build dependencies.
    normal: Vec<String>,
}

fn packages() -> BTreeMap<String, Package> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--offline",
            "--no-deps",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut packages = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let normal = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|d| d["kind"] != "dev")
            .map(|d| d["name"].as_str().unwrap().to_owned())
            .collect();
        packages.insert(
            package["name"].as_str().unwrap().to_owned(),
            Package { normal },
        );
    }
    packages
}

fn root() -> PathBuf {
    understory_testkit::repository().canonicalize().unwrap()
}

fn relative(file: &Path) -> String {
    file.strip_prefix(root()).unwrap().display().to_string()
}

/// All Rust sources below `dir`, which must exist.
fn sources(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty());
    found.sort();
    found
}

/// Lines of code that ship: without comments, and without what follows the first `#[cfg(test)]` that
/// begins a module (tests stand at the end of a file).
fn code(file: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let end = lines
        .windows(2)
        .position(|pair| {
            pair[0].starts_with("#[cfg(test)]")
                && pair[1].starts_with("mod ")
                && pair[1].ends_with('{')
        })
        .unwrap_or(lines.len());
    lines[..if is_test(file) { 0 } else { end }]
        .iter()
        .enumerate()
        .map(|(number, line)| (number + 1, strip(line)))
        .collect()
}

/// True for files that are tests as a whole.
fn is_test(file: &Path) -> bool {
    file.file_stem()
        .and_then(|s| s.to_str())
        .is_some_and(|s| s == "tests" || s.ends_with("_tests"))
        || file.components().any(|c| c.as_os_str() == "tests")
}

/// The line without a comment at its end and without the contents of string literals.
fn strip(line: &str) -> String {
    let mut out = String::new();
    let mut in_string = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if in_string => {
                chars.next();
            }
            '"' => in_string = !in_string,
            '/' if !in_string && chars.peek() == Some(&'/') => break,
            '#' if !in_string && out.trim().is_empty() => return String::new(), // attributes
            _ if in_string => {}
            c => out.push(c),
        }
    }
    out
}

/// What is in the repository.
fn tracked_files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output();
    match output {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            String::from_utf8(output.stdout)
                .unwrap()
                .split_terminator('\0')
                .map(|name| root().join(name))
                .filter(|path| path.is_file())
                .collect()
        }
        // a source archive
        _ => ["crates", "fuzz"]
            .into_iter()
            .filter(|d| root().join(d).is_dir())
            .flat_map(sources)
            .collect(),
    }
}

#[test]
fn stripping_a_line_leaves_the_code() {
    assert_eq!(strip("let a = \"unsafe // no\"; // unsafe"), "let a = ; ");
    assert_eq!(strip("#[allow(unsafe_code)]"), "");
    assert_eq!(strip("unsafe { x() } // why"), "unsafe { x() } ");
}
