//! What shows that the mounts of an instance work: a look through each.

use crate::config::Layout;
use crate::{Error, Result, namespace};
use std::fs;
use std::path::Path;

/// Lists the beginning of the live mount.
pub(super) fn prove_live(at: &Path) -> Result<()> {
    let io = |e: std::io::Error| Error::io("reading through the live mount at", at, e);
    // The first entry is enough: the root may list millions.
    match fs::read_dir(at).map_err(io)?.next() {
        Some(Err(e)) => Err(io(e)),
        _ => Ok(()),
    }
}

/// Makes a file through the overlay, looks for it in the upper directory, and removes it.
pub(super) fn prove_overlay(layout: &Layout, pid: u32) -> Result<()> {
    let name = format!(".understory-probe-{pid}");
    let (through, below) = (layout.merged.join(&name), layout.upper.join(&name));
    fs::write(&through, b"probe\n").map_err(|e| {
        Error::io("writing through the overlay at", &layout.merged, e)
            .with_hint("run `understory doctor`: the upper directory's file system may not do")
    })?;
    let seen = namespace::exists(&below);
    fs::remove_file(&through).map_err(|e| Error::io("removing", &through, e))?;
    if seen && !namespace::exists(&below) {
        return Ok(());
    }
    Err(Error::environment(format!(
        "a file written to {} does not show in {}: is something else mounted there?",
        layout.merged.display(),
        layout.upper.display()
    )))
}
