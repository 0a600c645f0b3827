//! Every environment variable that the command reads or sets, in one place.

use std::ffi::OsString;
use std::path::PathBuf;

/// The store's directory, as `--store`.
pub(crate) const STORE: &str = "UNDERSTORY_STORE";
/// The file of settings, as `--config`. Each setting has a variable of its own, too: `understory::settings`.
pub(crate) const CONFIG: &str = "UNDERSTORY_CONFIG";
/// Log filter in `tracing`'s syntax, such as `understory=debug`; wins over `-v` and `-q`.
pub(crate) const LOG: &str = "UNDERSTORY_LOG";
/// Base of the default store's directory without root.
pub(crate) const XDG_STATE_HOME: &str = "XDG_STATE_HOME";
/// Base of `~/.local/state`.
pub(crate) const HOME: &str = "HOME";
/// Any value but the empty one switches colour off.
pub(crate) const NO_COLOR: &str = "NO_COLOR";
/// `dumb` switches colour and progress bars off.
pub(crate) const TERM: &str = "TERM";
/// What `shell` runs without a command.
pub(crate) const SHELL: &str = "SHELL";
/// Where `doctor`, `shell` and `demo` look for programs.
pub(crate) const PATH: &str = "PATH";
/// Set by `shell`: the overlay store's socket, which makes Nix use it.
pub(crate) const NIX_REMOTE: &str = "NIX_REMOTE";
/// Set by `shell` (what was there is kept): the `nix` command is allowed. Read as Nix reads it.
pub(crate) const NIX_CONFIG: &str = "NIX_CONFIG";
/// Set by `shell` to the store's directory, so that prompts and scripts can tell.
pub(crate) const SHELL_MARK: &str = "UNDERSTORY_SHELL";

/// Reads a variable; the empty value counts as unset.
pub(crate) fn var(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Reads a variable as a path.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    var(name).map(PathBuf::from)
}

/// Finds a program in `PATH`.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&var(PATH)?)
        .map(|dir| dir.join(name))
        .find(|file| {
            use std::os::unix::fs::PermissionsExt;
            file.metadata()
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}
