//! What tests and benchmarks share: real Nix in Debian roots, trees full of edge cases, corpora.
//!
//! Dev only; nothing that is shipped depends on it.

pub mod corpus;
pub mod erofs;
pub mod nix_root;
pub mod process;
mod small_disk;

pub use small_disk::SmallDisk;

use std::path::{Path, PathBuf};

/// The repository's root directory.
pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// True where a test that cannot run is a failure: in CI.
pub fn nothing_may_be_skipped() -> bool {
    std::env::var_os("UNDERSTORY_REQUIRE_NIX").is_some_and(|v| v == "1")
}

/// Says why a test does not run, and fails where nothing may be skipped.
///
/// # Panics
/// If `UNDERSTORY_REQUIRE_NIX` is 1.
#[allow(clippy::print_stderr, reason = "a skipped test must say so")]
pub fn skip(why: &str) {
    assert!(
        !nothing_may_be_skipped(),
        "cannot run, and UNDERSTORY_REQUIRE_NIX=1: {why}"
    );
    eprintln!("skipped: {why}");
}

/// Bytes of a file that are in the page cache, as `fincore` (util-linux) says.
///
/// # Panics
/// There is no `fincore`, or no such file.
pub fn cached_bytes(file: &Path) -> u64 {
    let output = std::process::Command::new("fincore")
        .args(["--bytes", "--noheadings", "--output", "RES"])
        .arg(file)
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            match text.trim().parse() {
                Ok(bytes) => bytes,
                Err(error) => panic!("fincore says {text:?}: {error}"),
            }
        }
        other => panic!("fincore (Debian: util-linux-extra): {other:?}"),
    }
}
