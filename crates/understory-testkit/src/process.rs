//! Looking at processes.

use std::path::PathBuf;

/// Resident memory of a process in bytes: now, and the most so far. `None` if it is gone.
pub fn resident_bytes(pid: u32) -> Option<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name))?;
        Some(line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}

/// The program under test: `$UNDERSTORY_BIN`, else the newest of what cargo has built beside the running test.
pub fn understory() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("UNDERSTORY_BIN") {
        return Some(path.into());
    }
    // target/PROFILE/deps/test-1234
    let exe = std::env::current_exe().ok()?;
    let target = exe.parent()?.parent()?.parent()?;
    let built = |profile: &str| target.join(profile).join("understory");
    ["release", "debug"]
        .into_iter()
        .map(built)
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
}
