//! Where a benchmark runs: a working directory, the peer's Nix in its root file system, processes that end with us.

use crate::error::{CommandError, Result};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take until it answers.
const READY: Duration = Duration::from_secs(60);

/// The working directory: on the disk that is measured, removed at the end.
pub(crate) struct Work {
    dir: tempfile::TempDir,
}

impl Work {
    pub(crate) fn new(parent: Option<&Path>) -> Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let dir = tempfile::Builder::new()
            .prefix("understory-bench.")
            .tempdir_in(&parent)
            .map_err(|e| CommandError::io("making a directory in", parent.display(), &e))?;
        Ok(Self { dir })
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// Makes a directory.
    pub(crate) fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(&path)
            .map_err(|e| CommandError::io("making", path.display(), &e))?;
        Ok(path)
    }
    /// Removes a tree, read-only directories too.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        run(Command::new("chmod").args(["-R", "u+w"]).arg(&path))?;
        run(Command::new("rm").arg("-rf").arg(&path)).map(drop)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Trees of a Nix store are read-only, which TempDir cannot remove by itself unless we are root.
        let _ = Command::new("chmod")
            .args(["-R", "u+w"])
            .arg(self.dir.path())
            .stderr(Stdio::null())
            .status();
    }
}

/// The peer: a root file system with Nix.
pub(crate) struct Nix {
    root: PathBuf,
    enter: PathBuf,
    /// As `nix --version` says.
    pub(crate) version: String,
}

/// Runs a command in a root file system; `scripts/enter-root` of the repository.
const ENTER_ROOT: &str = include_str!("../../../../scripts/enter-root");

impl Nix {
    pub(crate) fn new(root: &Path, work: &Work) -> Result<Self> {
        let enter = work.path("enter-root");
        let write = |path: &Path| -> std::io::Result<()> {
            let mut file = std::fs::File::create(path)?;
            file.write_all(ENTER_ROOT.as_bytes())
        };
        write(&enter).map_err(|e| CommandError::io("writing", enter.display(), &e))?;
        let mut nix = Self {
            root: root.to_owned(),
            enter,
            version: String::new(),
        };
        let output = run(&mut nix.command(&[], "nix --version"))?;
        // "nix (Nix) 2.34.8"
        let text = String::from_utf8_lossy(&output.stdout);
        nix.version = format!("Nix {}", text.split_whitespace().next_back().unwrap_or("?"));
        Ok(nix)
    }
    /// A Bash script in the root, where each bind shows (directory here, directory there).
    pub(crate) fn command(&self, binds: &[(&Path, &str)], script: &str) -> Command {
        let mut command = Command::new("bash");
        command.arg(&self.enter).arg(&self.root);
        for (source, inside) in binds {
            let mut pair = OsString::from(source);
            pair.push(":");
            pair.push(inside);
            command.arg("-b").arg(pair);
        }
        command.args([
            "-e", NIX_CONFIG, "--", "bash", "-euo", "pipefail", "-c", script,
        ]);
        command.stdin(Stdio::null());
        command
    }
}

const NIX_CONFIG: &str = "NIX_CONFIG=experimental-features = nix-command local-overlay-store
substituters =
build-users-group =
require-sigs = false
trusted-users = *";

/// Runs a command to its end; an error with its output if it fails.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| CommandError::io("running", command.get_program().to_string_lossy(), &e))?;
    if output.status.success() {
        return Ok(output);
    }
    let mut error =
        CommandError::environment(format!("{} failed: {}", describe(command), output.status));
    let talk = String::from_utf8_lossy(&output.stderr);
    error.causes.extend(
        talk.lines()
            .rev()
            .take(10)
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .into_iter()
            .rev(),
    );
    Err(error)
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    if text.len() > 300 {
        format!("{}…", text.chars().take(300).collect::<String>())
    } else {
        text
    }
}

/// Runs a command and returns the seconds it took.
pub(crate) fn timed(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    run(command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// A server that is killed when this is dropped.
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts a command; its output goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = std::fs::File::create(log)
            .map_err(|e| CommandError::io("creating", log.display(), &e))?;
        let copy = file
            .try_clone()
            .map_err(|e| CommandError::io("duplicating", log.display(), &e))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            .spawn()
            .map_err(|e| {
                CommandError::io("starting", command.get_program().to_string_lossy(), &e)
            })?;
        Ok(Self {
            child,
            log: log.to_owned(),
        })
    }
    /// Tries until `ready` gives something.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(value) = ready() {
                return Ok(value);
            }
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || start.elapsed() > READY {
                let mut error = CommandError::environment(format!("waiting for {what}"));
                if let Some(status) = ended {
                    error.causes.push(format!("the server ended: {status}"));
                }
                let talk = std::fs::read_to_string(&self.log).unwrap_or_default();
                error
                    .causes
                    .extend(talk.lines().take(10).map(str::to_owned));
                return Err(error);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
    /// Resident memory in bytes.
    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        Some(line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    }
    /// Asks it to end, and waits.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.terminate();
        Ok(())
    }
    fn terminate(&mut self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.terminate();
    }
}

/// This program.
pub(crate) fn understory(store: &Path) -> Result<Command> {
    let exe =
        std::env::current_exe().map_err(|e| CommandError::io("finding", "this program", &e))?;
    let mut command = Command::new(exe);
    command.arg("--quiet").arg("--store").arg(store);
    Ok(command)
}

/// Empties the kernel's caches of pages, entries and inodes. False if that is not permitted.
pub(crate) fn drop_caches() -> bool {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Processor, memory, kernel, and the file system of `dir`.
pub(crate) fn machine(dir: &Path) -> String {
    let field = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let cpu =
        field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse::<u64>().ok())
        .map_or_else(String::new, |kib| {
            format!(", {}", crate::ui::bytes(kib * 1024))
        });
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let disk = run(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).map_or_else(
        |_| String::new(),
        |out| format!(", {}", String::from_utf8_lossy(&out.stdout).trim()),
    );
    format!("{cores} × {cpu}{memory}, Linux {kernel}{disk}")
}

/// Bytes that a tree takes on disk, each inode once: `du`.
pub(crate) fn disk_bytes(dir: &Path) -> Result<u64> {
    let output = run(Command::new("du").args(["-s", "--block-size=1"]).arg(dir))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| CommandError::environment(format!("du {} printed {text:?}", dir.display())))
}
