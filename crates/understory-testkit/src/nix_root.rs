//! Debian root file systems with real Nix, entered by pivot_root.
//!
//! `scripts/nix-root VERSION` makes and finds them (its header says where they lie), `scripts/enter-root`
//! runs a command in one. A command sees a throw-away layer over the root, so tests run in parallel on one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A Nix that a Debian suite has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// bookworm's.
    Nix2_8,
    /// trixie's.
    Nix2_26,
    /// sid's.
    Nix2_34,
}

impl Version {
    /// The versions that everything must work with.
    pub const SUPPORTED: [Self; 2] = [Self::Nix2_26, Self::Nix2_34];

    /// As `scripts/nix-root` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nix2_8 => "2.8",
            Self::Nix2_26 => "2.26",
            Self::Nix2_34 => "2.34",
        }
    }
}

/// A path of this machine that is to be seen in the root.
#[derive(Debug, Clone)]
pub struct Bind {
    /// Here.
    pub source: PathBuf,
    /// There, absolute. Made if absent.
    pub inside: PathBuf,
}

impl Bind {
    /// Shows `source` at `inside`.
    pub fn new(source: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            inside: inside.into(),
        }
    }
}

/// A Debian root with Nix.
#[derive(Debug, Clone)]
pub struct NixRoot {
    version: Version,
    root: PathBuf,
}

impl NixRoot {
    /// Finds the root of that version, or makes it (a minute; the first of several callers does it).
    /// Prints why when it cannot.
    ///
    /// # Panics
    /// If it cannot and `UNDERSTORY_REQUIRE_NIX` is 1.
    pub fn get(version: Version) -> Option<Self> {
        match Self::find(version) {
            Ok(root) => Some(root),
            Err(why) => {
                crate::skip(&format!("no root with Nix {}: {why}", version.name()));
                None
            }
        }
    }

    fn find(version: Version) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("entering a root file system needs root".to_owned());
        }
        let script = crate::repository().join("scripts/nix-root");
        let output = Command::new(&script)
            .arg(version.name())
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("running {}: {e}", script.display()))?;
        if !output.status.success() {
            return Err(format!(
                "{} failed:\n{}",
                script.display(),
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        let root = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
        Ok(Self { version, root })
    }

    /// The version asked for.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The directory. Only to be read.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// A command that runs `program` in the root as `uid` (0 or any other), with `binds` mounted, `/dev/fuse`,
    /// an empty `/tmp` and a clean environment. Add its arguments with [`Command::arg`].
    pub fn command(
        &self,
        binds: &[Bind],
        uid: u32,
        env: &[(&str, &str)],
        program: &str,
    ) -> Command {
        let mut command = Command::new(crate::repository().join("scripts/enter-root"));
        command.arg(&self.root).arg("-u").arg(uid.to_string());
        for bind in binds {
            let mut pair = OsString::from(&bind.source);
            pair.push(":");
            pair.push(&bind.inside);
            command.arg("-b").arg(pair);
        }
        for (name, value) in env {
            command.arg("-e").arg(format!("{name}={value}"));
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs a Bash script in the root under `set -euo pipefail` and waits for it. See [`NixRoot::command`].
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn run(&self, binds: &[Bind], uid: u32, script: &str) -> Output {
        let mut command = self.command(binds, uid, &[], "bash");
        command
            .args(["-euo", "pipefail", "-c", script])
            .stdin(Stdio::null());
        match command.output() {
            Ok(output) => output,
            Err(error) => panic!("running scripts/enter-root: {error}"),
        }
    }

    /// As [`NixRoot::run`]; returns its stdout.
    ///
    /// # Panics
    /// If the script fails, with all its output.
    pub fn run_ok(&self, binds: &[Bind], uid: u32, script: &str) -> String {
        let output = self.run(binds, uid, script);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "in the root with Nix {}: {}\n--- script\n{script}\n--- stdout\n{stdout}\n--- stderr\n{}",
            self.version.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        stdout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_supported_version_runs_and_leaves_nothing_behind() {
        for version in Version::SUPPORTED {
            let Some(root) = NixRoot::get(version) else {
                return;
            };
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("seen"), "yes").unwrap();
            let script = "nix --version; cat /bound/seen; id -u; touch /left-behind; [[ -c /dev/fuse && -w /dev/fuse ]]";
            let out = root.run_ok(&[Bind::new(dir.path(), "/bound")], 0, script);
            assert!(
                out.starts_with(&format!("nix (Nix) {}.", version.name())),
                "{out}"
            );
            assert!(out.ends_with("\nyes0\n"), "{out}");
            assert!(!root.path().join("left-behind").exists());
            let out = root.run_ok(
                &[],
                1000,
                "id -u; test -w /dev/fuse; unshare --user --map-root-user id -u",
            );
            assert_eq!(out, "1000\n0\n");
            assert_eq!(root.run(&[], 0, "false; true").status.code(), Some(1));
        }
    }
}
