//! The process of a builder: starts it on a socket, keeps the end of what it says on stderr, and ends it so that
//! nothing of it stays.
//!
//! Nix ends its builders itself when its client's socket closes (it watches the socket while it works) and on
//! SIGTERM. So a child is asked in steps: the socket is closed, then SIGTERM, then SIGKILL to it and to all
//! processes below it. Nothing is needed for our own violent death: the kernel closes the socket then. A Nix that is
//! killed by others leaves builders behind, because they have sessions of their own; so these sessions are noted
//! while it works, and ended with it. Checked with Nix 2.26.3 and 2.34.8.

use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open, pidfd_send_signal,
};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines of stderr that are kept for the error when the child dies.
const STDERR_LINES_MAX: usize = 20;
/// Longest line of stderr that is kept.
const STDERR_LINE_BYTES_MAX: u64 = 4096;
/// How long the end of stderr is waited for once the child is dead: something below it may hold it open.
const STDERR_END_MS_MAX: u64 = 500;
/// How long a child may need to end itself after its socket was closed. It kills its builders and waits for them.
const CLOSE_MS_MAX: u64 = 3_000;
/// The same after SIGTERM.
const TERM_MS_MAX: u64 = 5_000;

/// A running child. Dropping it ends it and waits for its end.
#[derive(Debug)]
pub(super) struct Child {
    process: Arc<Process>,
}

/// What ends a child, from any thread.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    /// Readable once the process is dead.
    handle: OwnedFd,
    /// Our end of its standard input and output.
    socket: UnixStream,
    inner: Mutex<Inner>,
    /// Filled by the thread that reads stderr; disconnected at the end of it.
    stderr: Arc<Mutex<VecDeque<String>>>,
    stderr_ended: crossbeam_channel::Receiver<()>,
    /// Sessions of the builders that were seen, with the start time of their leaders.
    sessions: Mutex<BTreeMap<i32, u64>>,
}

#[derive(Debug)]
struct Inner {
    child: std::process::Child,
    status: Option<ExitStatus>,
}

impl Child {
    /// Starts `command` with a socket as its standard input and output, in a process group of its own, without
    /// blocked signals (as `Command` always does).
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let program = command.get_program().to_owned();
        let failed = |error: std::io::Error| {
            Error::environment(format!("starting the builder {}", program.display()))
                .with_source(error)
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let input = theirs.try_clone().map_err(failed)?;
        let mut child = command
            .stdin(Stdio::from(OwnedFd::from(input)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        // The command holds the other end of the socket; while it is open here, the child's death goes unseen.
        drop(command);
        let started = Self::watch(&mut child, ours);
        let (pid, handle, socket, stderr, stderr_ended) = match started {
            Ok(parts) => parts,
            Err(error) => {
                let _gone = child.kill();
                let _reaped = child.wait();
                return Err(failed(error));
            }
        };
        tracing::debug!(pid = pid.as_raw_nonzero().get(), "started a builder");
        let process = Process {
            pid,
            handle,
            socket,
            inner: Mutex::new(Inner {
                child,
                status: None,
            }),
            stderr,
            stderr_ended,
            sessions: Mutex::default(),
        };
        Ok(Self {
            process: Arc::new(process),
        })
    }

    #[allow(clippy::type_complexity, reason = "the parts of a struct")]
    fn watch(
        child: &mut std::process::Child,
        socket: UnixStream,
    ) -> std::io::Result<(
        Pid,
        OwnedFd,
        UnixStream,
        Arc<Mutex<VecDeque<String>>>,
        crossbeam_channel::Receiver<()>,
    )> {
        let pid = Pid::from_child(child);
        let handle = pidfd_open(pid, PidfdFlags::empty())?;
        let stderr: Arc<Mutex<VecDeque<String>>> = Arc::default();
        let (ended, stderr_ended) = crossbeam_channel::bounded::<()>(0);
        if let Some(pipe) = child.stderr.take() {
            let lines = Arc::clone(&stderr);
            std::thread::Builder::new()
                .name("builder-stderr".to_owned())
                .spawn(move || {
                    read_stderr(pipe, &lines);
                    drop(ended);
                })?;
        }
        Ok((pid, handle, socket, stderr, stderr_ended))
    }

    /// Our end of its standard input and output.
    pub(super) fn socket(&self) -> std::io::Result<UnixStream> {
        self.process.socket.try_clone()
    }

    /// What ends it.
    pub(super) fn process(&self) -> Arc<Process> {
        Arc::clone(&self.process)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.process.stop();
    }
}

impl Process {
    /// True as long as the process lives.
    #[cfg(test)]
    fn is_alive(&self) -> bool {
        !self.wait(Duration::ZERO)
    }

    /// Ends the process and everything below it. Returns when it is dead.
    pub(super) fn stop(&self) {
        // Not reaped before the lock is ours, so that its number cannot be another's.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.status.is_some() {
            return;
        }
        let _closed = self.socket.shutdown(Shutdown::Both);
        if !self.wait(Duration::from_millis(CLOSE_MS_MAX)) {
            tracing::debug!(
                pid = self.pid.as_raw_nonzero().get(),
                "a builder that goes on: SIGTERM"
            );
            let _sent = pidfd_send_signal(&self.handle, Signal::TERM);
            if !self.wait(Duration::from_millis(TERM_MS_MAX)) {
                tracing::warn!(
                    pid = self.pid.as_raw_nonzero().get(),
                    "a builder that does not end: SIGKILL"
                );
                // First those below it: once it is dead, nobody knows whose they were.
                for pid in descendants(self.pid) {
                    let _killed = kill_process(pid, Signal::KILL);
                }
                let _killed = pidfd_send_signal(&self.handle, Signal::KILL);
            }
        }
        let _left_behind = kill_process_group(self.pid, Signal::KILL);
        self.end_sessions();
        match inner.child.wait() {
            Ok(status) => inner.status = Some(status),
            Err(error) => tracing::warn!(%error, "waiting for a builder"),
        }
    }

    /// Notes which builders the process has. To be called now and then while it works; reads a few files in `/proc`.
    pub(super) fn note_sessions(&self) {
        let pid = self.pid.as_raw_nonzero().get();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            // Not there in kernels without CONFIG_PROC_CHILDREN; then nothing is noted.
            let children = std::fs::read_to_string(task.path().join("children"));
            for child in children.unwrap_or_default().split_ascii_whitespace() {
                let stat = child.parse().ok().and_then(Stat::of);
                if let Some(stat) = stat.filter(|stat| stat.session == stat.pid) {
                    let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
                    // A number that is used again is another builder's.
                    sessions.insert(stat.session, stat.start_time);
                }
            }
        }
    }

    /// Kills what is left of the builders' sessions.
    fn end_sessions(&self) {
        let mut sessions = {
            let mut noted = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *noted)
        };
        // As long as anything of a session lives, the kernel gives its number to nobody else. So a leader that
        // started at another time leads another session, and the one noted is gone.
        sessions.retain(|leader, start| Stat::of(*leader).is_none_or(|s| s.start_time == *start));
        if sessions.is_empty() {
            return;
        }
        for stat in all_processes() {
            if sessions.contains_key(&stat.session)
                && let Some(pid) = Pid::from_raw(stat.pid)
            {
                tracing::debug!(
                    pid = stat.pid,
                    "a builder that its Nix has left behind: SIGKILL"
                );
                let _killed = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Waits for the death of a process whose socket has ended, and says how it died and what it said last.
    pub(super) fn obituary(&self) -> Error {
        self.stop();
        let status = self
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .status;
        let _ended = self
            .stderr_ended
            .recv_timeout(Duration::from_millis(STDERR_END_MS_MAX));
        let lines = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let mut message = match status {
            Some(status) => format!("the builder has died: {status}"),
            None => "the builder has died".to_owned(),
        };
        for (index, line) in lines.iter().enumerate() {
            message.push_str(if index == 0 { ": " } else { "\n" });
            message.push_str(line);
        }
        Error::environment(message)
    }

    /// True if the process is dead, at once or within `limit`.
    fn wait(&self, limit: Duration) -> bool {
        ends(&self.handle, limit)
    }
}

/// Waits until the process ends; false if it has not by then.
fn ends(handle: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::new(handle, PollFlags::IN)];
        match poll(&mut fds, Some(&wait)) {
            Err(rustix::io::Errno::INTR) => {}
            found => return found.is_ok_and(|count| count > 0),
        }
    }
}

/// Passes lines on and keeps the last ones.
fn read_stderr(pipe: ChildStderr, kept: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match (&mut reader)
            .take(STDERR_LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            continue;
        }
        tracing::debug!(line, "builder");
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == STDERR_LINES_MAX {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}

/// All processes below one, as far as they have not left it.
fn descendants(root: Pid) -> Vec<Pid> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for stat in all_processes() {
        children.entry(stat.parent).or_default().push(stat.pid);
    }
    let mut found = Vec::new();
    let mut open = vec![root.as_raw_nonzero().get()];
    while let Some(pid) = open.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            found.extend(Pid::from_raw(child));
            open.push(child);
        }
    }
    found
}

fn all_processes() -> impl Iterator<Item = Stat> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Stat::of(entry.file_name().to_str()?.parse().ok()?))
}

/// What `/proc/PID/stat` says (proc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    pid: i32,
    parent: i32,
    session: i32,
    /// In ticks since the machine was started.
    start_time: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        Self::parse(pid, &std::fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(pid: i32, stat: &[u8]) -> Option<Self> {
        // The second field is a name in parentheses that may hold anything.
        let end = stat.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
        // From the third field on.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3);
        Some(Self {
            pid,
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
            start_time: field(22)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn shell(script: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Child::start(command).unwrap()
    }

    fn is_running(pid: i32) -> bool {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        let end = stat.iter().rposition(|byte| *byte == b')');
        end.is_some_and(|end| stat.get(end + 2) != Some(&b'Z'))
    }

    fn read_number(socket: &UnixStream) -> i32 {
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }

    #[test]
    fn it_talks_on_the_socket_and_ends_when_that_closes() {
        let child = shell("exec cat");
        let mut socket = child.socket().unwrap();
        socket.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        socket.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
        assert!(child.process().is_alive());
        let started = Instant::now();
        let process = child.process();
        drop(child);
        assert!(!process.is_alive());
        assert!(started.elapsed() < Duration::from_millis(CLOSE_MS_MAX));
    }

    #[test]
    fn one_that_does_not_listen_is_killed_with_what_is_below_it() {
        // In a session of its own, as builders are.
        let child =
            shell("trap '' TERM HUP; setsid sh -c 'echo $$; exec sleep 1000' & wait; sleep 1000");
        let below = Pid::from_raw(read_number(&child.socket().unwrap())).unwrap();
        let below = pidfd_open(below, PidfdFlags::empty()).unwrap();
        assert!(!ends(&below, Duration::ZERO));
        let process = child.process();
        drop(child);
        assert!(!process.is_alive());
        // SIGKILL has been sent, the kernel takes its time with it.
        assert!(ends(&below, Duration::from_secs(20)));
    }

    #[test]
    fn its_death_is_told_with_its_last_words() {
        let child =
            shell("i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo line $i >&2; done; exit 3");
        let message = child.process().obituary().to_string();
        let (first, rest) = message.split_once('\n').unwrap();
        assert_eq!(first, "the builder has died: exit status: 3: line 11");
        assert!(rest.ends_with("\nline 30"), "{rest}");
        let child = shell("kill -9 $$");
        let message = child.process().obituary().to_string();
        assert_eq!(message, "the builder has died: signal: 9 (SIGKILL)");
    }

    #[test]
    fn a_program_that_is_not_there() {
        let error = Child::start(Command::new("/nowhere/nix-daemon")).unwrap_err();
        assert_eq!(
            error.chain(),
            "starting the builder /nowhere/nix-daemon: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_builder_in_its_own_session_ends_with_a_child_that_others_have_killed() {
        let child = shell("setsid sh -c 'echo $$; sleep 1000; :' & wait");
        let below = read_number(&child.socket().unwrap());
        let process = child.process();
        process.note_sessions();
        pidfd_send_signal(&process.handle, Signal::KILL).unwrap();
        let message = process.obituary().to_string();
        assert_eq!(message, "the builder has died: signal: 9 (SIGKILL)");
        let deadline = Instant::now() + Duration::from_secs(10);
        let left = || all_processes().any(|stat| stat.session == below && is_running(stat.pid));
        while left() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_the_kernel_says_of_a_process_is_found_behind_any_name() {
        let line = b"12 (a) b) c) S 7 12 13 34816 12 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        let expected = Stat {
            pid: 12,
            parent: 7,
            session: 13,
            start_time: 4711,
        };
        assert_eq!(Stat::parse(12, line), Some(expected));
        assert_eq!(Stat::parse(12, b"nonsense"), None);
        assert_eq!(Stat::parse(12, b"12 (a) S 7 12"), None);
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(
            Stat::of(own).unwrap().parent,
            i32::try_from(std::os::unix::process::parent_id()).unwrap()
        );
    }
}
