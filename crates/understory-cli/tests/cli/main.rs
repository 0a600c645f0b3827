//! The command as users see it: help, errors, exit codes, and each command's wiring.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests"
)]

mod config;
mod errors;
mod guide;
mod help;
mod instance;
mod kept;
mod metrics;
mod mute;
mod plot;
mod renewal;
mod restarts;
mod stock_nix;
mod store;
mod support;
mod switch_kills;
mod systemd;
mod top;

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A directory with a store `s` in it, and the command.
struct Sandbox {
    dir: tempfile::TempDir,
}

/// What a command did.
#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
    raw: Vec<u8>,
}

impl Sandbox {
    fn new() -> Self {
        // /tmp may be a file system that overlayfs refuses as upper directory; /var/tmp is on disk.
        let dir = tempfile::Builder::new()
            .prefix("understory-test-")
            .tempdir_in("/var/tmp")
            .unwrap();
        Self { dir }
    }
    fn path(&self) -> &Path {
        self.dir.path()
    }
    fn store(&self) -> PathBuf {
        self.path().join("s")
    }
    /// Where an instance of the store has its overlay.
    fn merged(&self) -> PathBuf {
        self.store().join("merged/nix/store")
    }
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understory"));
        command
            .arg("--store")
            .arg(self.store())
            .current_dir(self.path())
            .stdin(Stdio::null());
        for name in [
            "UNDERSTORY_STORE",
            "UNDERSTORY_LOG",
            "NO_COLOR",
            "NIX_REMOTE",
            "NIX_CONFIG",
        ] {
            command.env_remove(name);
        }
        // Nothing of this machine's configuration, and no network.
        command
            .env("NIX_CONF_DIR", self.path().join("etc-nix"))
            .env("XDG_CONFIG_HOME", self.path().join("config"))
            .env("XDG_CONFIG_DIRS", self.path().join("no-config"))
            .env("UNDERSTORY_SUBSTITUTERS", "");
        command
    }
    fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ran {
        self.ran(&self.command().args(arguments).output().unwrap())
    }
    /// Runs and expects success; returns stdout without the last newline.
    fn ok<S: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[S]) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}: {}{}", ran.stdout, ran.stderr);
        ran.stdout.trim_end_matches('\n').to_owned()
    }
    fn json<S: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[S]) -> serde_json::Value {
        let mut all: Vec<&OsStr> = vec!["--json".as_ref()];
        all.extend(arguments.iter().map(AsRef::as_ref));
        serde_json::from_str(&self.ok(&all)).unwrap()
    }
    fn ran(&self, output: &Output) -> Ran {
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes).replace(&self.path().display().to_string(), "[DIR]")
        };
        Ran {
            code: output
                .status
                .code()
                .unwrap_or_else(|| 1000 + output.status.signal().unwrap_or(0)),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
            raw: output.stdout.clone(),
        }
    }
    /// Makes a small tree and adds it; returns its store path.
    fn add_tree(&self, name: &str, contents: &str) -> String {
        let dir = self.path().join(name);
        std::fs::create_dir_all(dir.join("bin")).unwrap();
        std::fs::write(dir.join("file"), contents).unwrap();
        std::fs::write(dir.join("bin/tool"), "#!/bin/sh\necho ran\n").unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(dir.join("bin/tool"), PermissionsExt::from_mode(0o755)).unwrap();
        let _ = std::fs::remove_file(dir.join("link"));
        std::os::unix::fs::symlink("file", dir.join("link")).unwrap();
        self.ok(&["-q", "add", name])
    }
}
