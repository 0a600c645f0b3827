//! A supervisor: the process of `understory up`, which keeps what must outlive the processes that do the work.
//!
//! It holds the instance's lock, the listening sockets and whatever its workers give it to hold, above all the
//! descriptors of FUSE mounts and the memory of their nodes. It opens no store, reads no request and has one thread,
//! so that there is little in it that could fail. The work is done by children of the same program:
//!
//! - the *mount server* serves the FUSE mounts. When it ends, the next one is given the descriptors and the kernel sends
//!   again what was not answered: readers wait, none fails (Linux 6.9; before, requests in flight fail);
//! - the *daemon* serves the sockets and owns the overlay. When it ends, clients that connect wait for the next one;
//!   connections that were open are lost, because the worker protocol cannot be resumed. An upgrade loses none: the
//!   old daemon takes no more clients and ends when its last one has gone.
//!
//! A worker that ends by itself, or gives no sign of life for the watchdog's time, is started again: at once, then
//! with growing pauses. After [`CRASHES_MAX`] crashes or [`KILLS_MAX`] kills within [`WINDOW`] the instance is taken down and
//! says why. If mount servers crash in a row, the requests that they had read are answered with EIO: one of them may be
//! the cause. What goes on is written to `run/supervisor.json` ([`Record`]).
//!
//! Workers end with the supervisor, and each of them holds the lock, too: a new instance starts when all are gone.
//! Where systemd keeps descriptors, the next supervisor goes on with those of the one before: see [`Keeper`]. If that
//! fails before all workers are ready, everything is mounted anew, once.
//!
//! Cost: one process of about 6 MB, most of it the program's text, which the workers share; it wakes a few times in the
//! watchdog's time.

mod channel;
mod kept;
mod process;
mod record;
mod worker;

pub use channel::Role;
pub use kept::{Keeper, Restored};
pub(crate) use process::lives;
pub use record::{Phase, Record, WorkerRecord};
pub use worker::{Change, Held, Line, Order, Worker};

use crate::config::Layout;
use crate::daemon::Listener;
use crate::error::ErrorKind;
use crate::{Error, Result, service_manager};
use channel::{Channel, DESCRIPTORS_MAX, FromWorker, HeldNote, PROTOCOL, Start, ToWorker};
use process::{Process, describe_end, end, kill, reap};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The time in which ends of a worker are counted.
pub const WINDOW: Duration = Duration::from_secs(10);
/// Crashes of a worker within [`WINDOW`] after which the instance gives up.
pub const CRASHES_MAX: usize = 5;
/// Kills by others (SIGKILL, SIGTERM) within [`WINDOW`] after which the instance gives up: those are no bug of ours.
pub const KILLS_MAX: usize = 150;
/// Crashes of mount servers within [`WINDOW`] after which the next one refuses what they had read.
const CRASHES_BEFORE_REFUSAL: usize = 3;
/// The first pause before a worker that ended twice within [`WINDOW`] is started again; it doubles.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long workers may take to undo what they did: longer than the daemons' grace for running operations.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How long clients of the daemon may take to end when the next supervisor is to go on: others wait meanwhile.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// Setting of glibc's allocator for workers, unless the user has made it. By itself it has eight arenas a core, and each
/// keeps several MB of what threads of clients once needed.
const ARENAS: &str = "MALLOC_ARENA_MAX";
const ARENAS_MAX: &str = "2";
/// The program that we are, whatever lies in its place now.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Name of the sockets on which the castore is served.
pub const SOCKET_LOWER: &str = "lower";
/// Name of the sockets on which the overlay store is served.
pub const SOCKET_OVERLAY: &str = "overlay";
/// Name of the instance's control sockets.
pub const SOCKET_CONTROL: &str = "control";
/// Name of the mount server's control socket.
pub const SOCKET_MOUNT: &str = "mount";
/// All of them.
const SOCKETS: [&str; 4] = [SOCKET_LOWER, SOCKET_OVERLAY, SOCKET_CONTROL, SOCKET_MOUNT];

/// What a supervisor does.
pub struct Options<'a> {
    /// Where everything lies.
    pub layout: Layout,
    /// Is held until the end.
    pub lock: File,
    /// Listening sockets by name.
    pub sockets: Vec<(&'static str, Listener)>,
    /// This program, and the arguments that make it a worker once the role's name is added.
    pub program: PathBuf,
    /// See `program`.
    pub arguments: Vec<OsString>,
    /// Workers start in this directory; `/` if there is none. Not by name: looking one up may lead through a mount
    /// that waits for a worker.
    pub directory: Option<File>,
    /// A worker that gives no sign of life for so long is killed and started again.
    pub watchdog: Duration,
    /// Readable when the instance is to stop.
    pub stop: UnixStream,
    /// Readable when the instance is to be upgraded.
    pub upgrade: UnixStream,
    /// Readable when this process is to end, but the instance is to go on with the next one. Where nobody keeps
    /// descriptors, this is a stop.
    pub leave: UnixStream,
    /// Lets systemd keep what the next supervisor needs.
    pub keeper: Option<Keeper>,
    /// What to go on with.
    pub restored: Option<Restored>,
    /// Called once, with the daemon's report, when everything works. Returns where the workers' log goes from now on.
    pub on_ready: &'a mut dyn FnMut(&serde_json::Value) -> Result<Option<File>>,
    /// Called when the end begins.
    pub on_stop: &'a mut dyn FnMut(),
}

/// Runs an instance until it is stopped.
///
/// # Errors
/// It cannot start, or has given up; everything that was done is undone.
pub fn run(mut options: Options<'_>) -> Result<()> {
    let restored = options.restored.take();
    let is_restored = restored.is_some();
    let (held, resend) = restored.map_or((Vec::new(), None), |r| (r.held, r.resend));
    let mut supervisor = Supervisor {
        phase: Phase::Starting,
        is_restored,
        may_start_afresh: is_restored,
        held,
        stations: [Role::Mount, Role::Daemon].map(Station::new),
        draining: Vec::new(),
        resend,
        upgrades: 0,
        failed_upgrade: None,
        // systemd wants two signs of life in its time.
        beat: service_manager::watchdog().map(|time| (time / 2, Instant::now())),
        options,
    };
    let ran = supervisor.go_on();
    (supervisor.options.on_stop)();
    if let Ok(Ending::Leave) = ran {
        supervisor.leave();
        return Ok(());
    }
    let stopped = supervisor.take_down();
    ran.map(|_| ()).and(stopped)
}

/// How an instance's supervisor ends, if not by an error.
enum Ending {
    /// With everything.
    Stop,
    /// Alone: the next one goes on.
    Leave,
}

/// What is kept for a worker.
struct Bundle {
    note: HeldNote,
    descriptors: Vec<OwnedFd>,
    /// Under which systemd keeps them; none if it does not.
    names: Vec<String>,
}

/// A place for one worker.
struct Station {
    role: Role,
    worker: Option<Process>,
    /// When to start one.
    start_at: Option<Instant>,
    restarts: u64,
    last_end: Option<String>,
    crashes: VecDeque<Instant>,
    kills: VecDeque<Instant>,
    pause: Duration,
    /// What it said when it could not start.
    failure: Option<Error>,
}

struct Supervisor<'a> {
    options: Options<'a>,
    phase: Phase,
    /// It goes on with what an earlier supervisor has left.
    is_restored: bool,
    /// If that fails.
    may_start_afresh: bool,
    held: Vec<Bundle>,
    stations: [Station; 2],
    draining: Vec<Process>,
    resend: Option<bool>,
    upgrades: u64,
    /// Why the last upgrade's program is not used.
    failed_upgrade: Option<String>,
    /// How often systemd wants a sign of life, and when the next one is due.
    beat: Option<(Duration, Instant)>,
}

/// What woke the supervisor.
enum Event {
    Stop,
    Leave,
    Upgrade,
    Message(usize),
    Ended(usize),
    DrainerMessage(usize),
    DrainerEnded(usize),
}

impl Station {
    fn new(role: Role) -> Self {
        Self {
            role,
            worker: None,
            start_at: None,
            restarts: 0,
            last_end: None,
            crashes: VecDeque::new(),
            kills: VecDeque::new(),
            pause: Duration::ZERO,
            failure: None,
        }
    }

    fn is_ready(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.ready)
    }

    /// Counts an end; an error if there were too many.
    fn ended(&mut self, status: &str, killed: bool) -> Result<()> {
        let now = Instant::now();
        let (list, max) = match killed {
            true => (&mut self.kills, KILLS_MAX),
            false => (&mut self.crashes, CRASHES_MAX),
        };
        list.push_back(now);
        for list in [&mut self.kills, &mut self.crashes] {
            list.retain(|then| now.duration_since(*then) < WINDOW);
        }
        let count = if killed { &self.kills } else { &self.crashes }.len();
        self.last_end = Some(status.to_owned());
        if count >= max {
            return Err(Error::environment(format!(
                "the {} worker has ended {count} times within {} s, at last by {status}",
                self.role.name(),
                WINDOW.as_secs()
            ))
            .with_hint("its log says why: see the journal, or up.log in the run directory"));
        }
        self.pause = match self.kills.len() + self.crashes.len() {
            0 | 1 => Duration::ZERO,
            2 => PAUSE_MIN,
            // Kills come from outside: waiting does not make them less likely.
            _ if killed => PAUSE_MIN,
            _ => (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX),
        };
        self.start_at = Some(now + self.pause);
        Ok(())
    }
}

impl Supervisor<'_> {
    fn go_on(&mut self) -> Result<Ending> {
        self.start(0)?;
        loop {
            self.write_record();
            if let Some(event) = self.wait()? {
                match event {
                    Event::Stop => return Ok(Ending::Stop),
                    Event::Leave => {
                        let keeper = self.options.keeper.as_ref();
                        return Ok(match keeper.is_some_and(Keeper::is_whole) {
                            true => Ending::Leave,
                            false => Ending::Stop,
                        });
                    }
                    Event::Upgrade => self.upgrade(None),
                    Event::Message(at) => {
                        if self.hear(at)? {
                            return Ok(Ending::Stop);
                        }
                    }
                    Event::Ended(at) => self.ended(at)?,
                    Event::DrainerMessage(at) => {
                        // Of what it may still say, a stop matters.
                        match self.draining[at].channel.receive::<FromWorker>() {
                            Ok(Some((FromWorker::Stop, _))) => return Ok(Ending::Stop),
                            Ok(Some(_)) => {}
                            Ok(None) | Err(_) => self.drained(at),
                        }
                    }
                    Event::DrainerEnded(at) => self.drained(at),
                }
            }
            self.look_at_clock()?;
        }
    }

    fn drained(&mut self, at: usize) {
        let process = self.draining.remove(at);
        kill(&process);
        let pid = process.pid.as_raw_nonzero().get();
        let status = reap(process.pid);
        tracing::info!(pid, %status, "an earlier worker has ended");
    }

    /// Waits for something to happen, or for the next time limit.
    fn wait(&self) -> Result<Option<Event>> {
        let mut events = vec![Event::Stop, Event::Leave, Event::Upgrade];
        let mut fds = vec![
            PollFd::new(&self.options.stop, PollFlags::IN),
            PollFd::new(&self.options.leave, PollFlags::IN),
            PollFd::new(&self.options.upgrade, PollFlags::IN),
        ];
        // Messages before ends: what a worker gave away last must be kept.
        for (at, station) in self.stations.iter().enumerate() {
            if let Some(worker) = &station.worker {
                fds.push(PollFd::new(&worker.channel, PollFlags::IN));
                events.push(Event::Message(at));
            }
        }
        for (at, station) in self.stations.iter().enumerate() {
            if let Some(worker) = &station.worker {
                fds.push(PollFd::new(&worker.pidfd, PollFlags::IN));
                events.push(Event::Ended(at));
            }
        }
        for (at, worker) in self.draining.iter().enumerate() {
            fds.push(PollFd::new(&worker.channel, PollFlags::IN));
            events.push(Event::DrainerMessage(at));
            fds.push(PollFd::new(&worker.pidfd, PollFlags::IN));
            events.push(Event::DrainerEnded(at));
        }
        let limit = self.next_limit().map(|limit| {
            let left = limit.saturating_duration_since(Instant::now());
            // Rounded up, so that it is past when we wake.
            Timespec::try_from(left + Duration::from_millis(1)).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            })
        });
        match rustix::event::poll(&mut fds, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(None),
            Err(e) => return Err(Error::environment("waiting for workers").with_source(e)),
        }
        let woken = fds
            .iter()
            .zip(events)
            .find(|(fd, _)| !fd.revents().is_empty());
        Ok(woken.map(|(_, event)| event))
    }

    fn next_limit(&self) -> Option<Instant> {
        let starts = self.stations.iter().filter_map(|station| station.start_at);
        let workers = self.stations.iter().filter_map(|s| s.worker.as_ref());
        let limits = workers.map(|worker| worker.heard + self.options.watchdog);
        let beat = self.beat.iter().map(|(_, due)| *due);
        starts.chain(limits).chain(beat).min()
    }

    fn look_at_clock(&mut self) -> Result<()> {
        let now = Instant::now();
        if let Some((time, due)) = &mut self.beat
            && *due <= now
        {
            service_manager::alive();
            *due = now + *time;
        }
        for at in 0..self.stations.len() {
            let station = &mut self.stations[at];
            if let Some(worker) = &station.worker
                && now.duration_since(worker.heard) >= self.options.watchdog
            {
                let (role, time) = (station.role.name(), self.options.watchdog.as_secs_f32());
                if !worker.killed {
                    tracing::error!(
                        "the {role} worker has given no sign of life for {time} s: it is killed"
                    );
                    kill(worker);
                    // Its end comes at once.
                    if let Some(worker) = &mut station.worker {
                        (worker.heard, worker.killed) = (now, true);
                    }
                } else if let Some(process) = station.worker.take() {
                    // A thread of it may wait for what only the next one answers.
                    tracing::error!(
                        "the {role} worker does not end {time} s after it was killed: going on without it"
                    );
                    self.draining.push(process);
                    station.ended("a kill that it does not follow", true)?;
                    station.restarts += 1;
                }
            }
            if self.stations[at].start_at.is_some_and(|then| then <= now) {
                self.start(at)?;
            }
        }
        Ok(())
    }

    /// Starts a worker.
    fn start(&mut self, at: usize) -> Result<()> {
        let program = self.options.program.clone();
        match self.start_from(at, &program) {
            Err(error) if self.upgrades > 0 && program != Path::new(OWN_PROGRAM) => {
                self.fall_back(error.chain());
                self.start_from(at, Path::new(OWN_PROGRAM))
            }
            other => other,
        }
    }

    fn start_from(&mut self, at: usize, program: &Path) -> Result<()> {
        let role = self.stations[at].role;
        let (channel, theirs) = Channel::pair()?;
        let directory = match &self.options.directory {
            Some(directory) => PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())),
            None => PathBuf::from("/"),
        };
        let mut command = Command::new(program);
        if std::env::var_os(ARENAS).is_none() {
            command.env(ARENAS, ARENAS_MAX);
        }
        let child = command
            .args(&self.options.arguments)
            .arg(role.name())
            .current_dir(directory)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // The terminal's signals are for the supervisor.
            .process_group(0)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            .env_remove("FDSTORE")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_FDNAMES")
            .env_remove("LISTEN_PID")
            .spawn()
            .map_err(|e| Error::io("starting a worker from", program, e))?;
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|e| Error::environment("watching a worker").with_source(e))?;
        let station = &mut self.stations[at];
        let refuse = role == Role::Mount && station.crashes.len() >= CRASHES_BEFORE_REFUSAL;
        let mine = |bundle: &&Bundle| role == Role::Mount || bundle.note.notify.is_some();
        let bundles: Vec<&Bundle> = self.held.iter().filter(mine).collect();
        let mut descriptors = vec![self.options.lock.as_fd()];
        let wanted = |name: &str| (name == SOCKET_MOUNT) == (role == Role::Mount);
        let sockets = self.options.sockets.iter().filter(|(name, _)| wanted(name));
        let mut names = Vec::new();
        for (name, listener) in sockets {
            names.push((*name).to_owned());
            descriptors.push(listener.as_fd());
        }
        let mut notes = Vec::new();
        for bundle in bundles {
            let all = bundle.descriptors.iter().map(AsFd::as_fd);
            let before = descriptors.len();
            match (role, bundle.note.notify) {
                (Role::Daemon, Some(notify)) => descriptors.extend(all.skip(notify).take(1)),
                _ => descriptors.extend(all),
            }
            notes.push(HeldNote {
                descriptors: descriptors.len() - before,
                ..bundle.note.clone()
            });
        }
        let start = ToWorker::Start(Box::new(Start {
            protocol: PROTOCOL,
            role,
            supervisor: std::process::id(),
            layout: self.options.layout.clone(),
            watchdog_ms: u64::try_from(self.options.watchdog.as_millis()).unwrap_or(u64::MAX),
            sockets: names,
            held: notes,
            refuse_resent: refuse,
        }));
        // A new channel has room for it. If the worker is dead already, its end is seen as every other one.
        if let Err(error) = channel.send(&start, &descriptors, false) {
            tracing::error!("{}", error.chain());
        }
        tracing::debug!(pid = child.id(), role = role.name(), "started a worker");
        station.start_at = None;
        station.worker = Some(Process {
            pid,
            pidfd,
            channel,
            ready: false,
            heard: Instant::now(),
            dismissed: false,
            killed: false,
        });
        Ok(())
    }

    /// Reads what a worker says; true if the instance is to stop.
    fn hear(&mut self, at: usize) -> Result<bool> {
        let Some(worker) = &mut self.stations[at].worker else {
            return Ok(false);
        };
        worker.heard = Instant::now();
        let (message, descriptors) = match worker.channel.receive::<FromWorker>() {
            Ok(Some(received)) => received,
            // It has closed its end, which only its end does.
            Ok(None) => {
                kill(worker);
                return self.ended(at).map(|()| false);
            }
            Err(error) => {
                tracing::error!("{}", error.chain());
                kill(worker);
                return self.ended(at).map(|()| false);
            }
        };
        match message {
            FromWorker::Alive => {}
            FromWorker::Stop => {
                tracing::info!("asked to stop");
                return Ok(true);
            }
            FromWorker::Upgrade { program } => self.upgrade(program),
            FromWorker::Hold {
                name,
                state,
                notify,
            } => self.hold(name, state, notify, descriptors),
            FromWorker::Release { name } => {
                self.held.retain(|bundle| bundle.note.name != name);
                self.tell_daemons(&ToWorker::Forget { name }, &[]);
                self.keep();
            }
            FromWorker::Unmounted => {
                return Err(
                    Error::environment("the live mount was unmounted by somebody else")
                        .with_hint("stop the instance with `understory down`"),
                );
            }
            FromWorker::Failed {
                kind,
                message,
                hint,
            } => {
                let kind = match &*kind {
                    "user" => ErrorKind::User,
                    "corrupt" => ErrorKind::Corrupt,
                    "environment" => ErrorKind::Environment,
                    _ => ErrorKind::Internal,
                };
                let error = Error::new(kind, message);
                self.stations[at].failure = Some(match hint {
                    Some(hint) => error.with_hint(hint),
                    None => error,
                });
            }
            FromWorker::Ready { report, resend } => self.ready(at, &report, resend)?,
        }
        Ok(false)
    }

    fn hold(
        &mut self,
        name: String,
        state: serde_json::Value,
        notify: Option<usize>,
        descriptors: Vec<OwnedFd>,
    ) {
        self.held.retain(|bundle| bundle.note.name != name);
        let so_far: usize = self.held.iter().map(|b| b.descriptors.len()).sum();
        let others = self.options.sockets.len() + 1;
        if so_far + others + descriptors.len() > DESCRIPTORS_MAX {
            tracing::error!(
                "{name} is not kept: {so_far} descriptors are, and {DESCRIPTORS_MAX} is the limit"
            );
            return;
        }
        let note = HeldNote {
            name,
            state,
            descriptors: descriptors.len(),
            notify,
        };
        self.held.push(Bundle {
            note,
            descriptors,
            names: Vec::new(),
        });
        // Before anybody relies on it.
        self.keep();
        if let Some(Bundle {
            note, descriptors, ..
        }) = self.held.last()
            && let Some(device) = note.notify.and_then(|at| descriptors.get(at))
        {
            let note = HeldNote {
                descriptors: 1,
                ..note.clone()
            };
            self.tell_daemons(&ToWorker::Held(note), &[device.as_fd()]);
        }
    }

    /// Those that drain publish, too.
    fn tell_daemons(&self, message: &ToWorker, descriptors: &[BorrowedFd<'_>]) {
        let daemon = self.stations[1].worker.iter();
        for process in daemon.chain(&self.draining) {
            if let Err(error) = process.channel.send(message, descriptors, false) {
                tracing::error!("telling the daemon of a mount: {}", error.chain());
            }
        }
    }

    /// Lets systemd keep what there is, once everything works.
    fn keep(&mut self) {
        if self.phase == Phase::Running
            && let Some(keeper) = &mut self.options.keeper
        {
            let (layout, sockets) = (&self.options.layout, &self.options.sockets);
            keeper.keep(layout, sockets, &mut self.held, self.resend);
        }
    }

    fn ready(&mut self, at: usize, report: &serde_json::Value, resend: Option<bool>) -> Result<()> {
        let station = &mut self.stations[at];
        station.failure = None;
        if let Some(worker) = &mut station.worker {
            worker.ready = true;
        }
        self.resend = resend.or(self.resend);
        tracing::info!("the {} worker serves", station.role.name());
        if self.phase != Phase::Starting {
            return Ok(());
        }
        if station.role == Role::Mount {
            // The daemon needs the mount. It may be there if this mount server is not the first one.
            let daemon = &self.stations[1];
            return match daemon.worker.is_none() && daemon.start_at.is_none() {
                true => self.start(1),
                false => Ok(()),
            };
        }
        self.phase = Phase::Running;
        self.may_start_afresh = false;
        self.keep();
        // Before anybody is told, so that who was told finds it.
        self.write_record();
        if let Some(log) = (self.options.on_ready)(report)? {
            // In the background: the directory it was started in must not stay busy.
            self.options.directory = None;
            for worker in self.stations.iter().filter_map(|s| s.worker.as_ref()) {
                worker
                    .channel
                    .send(&ToWorker::Output, &[log.as_fd()], false)?;
            }
        }
        Ok(())
    }

    fn ended(&mut self, at: usize) -> Result<()> {
        let station = &mut self.stations[at];
        let Some(process) = station.worker.take() else {
            return Ok(());
        };
        let (status, killed) = describe_end(reap(process.pid));
        let role = station.role.name();
        let failure = station.failure.take();
        if self.may_start_afresh {
            let ended = || Error::environment(format!("the {role} worker ended by {status}"));
            // Who was killed by somebody else may have better luck.
            let is_over = match killed && failure.is_none() {
                true => station.ended(&status, killed).err(),
                false => Some(failure.unwrap_or_else(ended)),
            };
            station.restarts += 1;
            return is_over.map_or(Ok(()), |why| self.start_afresh(&why));
        }
        let is_hopeless =
            self.phase == Phase::Starting || !process.ready && station.crashes.len() > 2;
        if is_hopeless && let Some(error) = failure {
            return Err(error);
        }
        if self.phase == Phase::Starting {
            return Err(Error::environment(format!(
                "the {role} worker ended by {status} before it was ready"
            )));
        }
        if process.dismissed {
            station.start_at = Some(Instant::now());
            return Ok(());
        }
        tracing::error!("the {role} worker has ended by {status}");
        station.ended(&status, killed)?;
        station.restarts += 1;
        if !process.ready && self.upgrades > 0 {
            // What an upgrade has brought does not even start.
            let why = failure.map_or_else(|| format!("it ended by {status}"), |e| e.chain());
            self.fall_back(format!("the {role} worker: {why}"));
        }
        Ok(())
    }

    /// From now on workers are of the program that was started first.
    fn fall_back(&mut self, why: String) {
        if self.options.program == Path::new(OWN_PROGRAM) {
            return;
        }
        tracing::error!("{why}: going on with the program that was started first");
        self.options.program = PathBuf::from(OWN_PROGRAM);
        self.failed_upgrade = Some(why);
    }

    /// Replaces the workers by those of the program that now lies where ours was, or of `program`. The daemon serves
    /// the clients that it has until they go.
    fn upgrade(&mut self, program: Option<PathBuf>) {
        let mut signals = [0; 64];
        let _ = self.options.upgrade.set_nonblocking(true);
        // Only so that it is not readable any more.
        let _ = self.options.upgrade.read(&mut signals);
        if self.phase != Phase::Running {
            return;
        }
        if let Some(program) = program {
            self.options.program = program;
        }
        tracing::info!(program = %self.options.program.display(), "replacing the workers");
        self.upgrades += 1;
        self.failed_upgrade = None;
        for station in &mut self.stations {
            let Some(mut process) = station.worker.take() else {
                continue;
            };
            process.dismissed = true;
            if station.role == Role::Mount {
                // Nothing is lost by this; see `mount`.
                kill(&process);
                station.worker = Some(process);
                continue;
            }
            if let Err(error) = process.channel.send(&ToWorker::Drain, &[], false) {
                tracing::error!("{}", error.chain());
                kill(&process);
            }
            self.draining.push(process);
            station.start_at = Some(Instant::now());
        }
    }

    /// Drops what was kept and mounts everything anew. Readers of the mounts get errors.
    fn start_afresh(&mut self, why: &Error) -> Result<()> {
        tracing::error!(
            "{}: what was kept cannot be gone on with, and everything is mounted anew",
            why.chain()
        );
        self.may_start_afresh = false;
        self.is_restored = false;
        for station in &mut self.stations {
            if let Some(process) = station.worker.take() {
                kill(&process);
                reap(process.pid);
            }
            *station = Station::new(station.role);
        }
        self.held.clear();
        if let Some(keeper) = &mut self.options.keeper {
            keeper.forget();
        }
        for what in crate::up::unmount_leftovers(&self.options.layout)? {
            tracing::warn!("removed {what}");
        }
        self.start(0)
    }

    /// Ends the workers and leaves everything else for the next supervisor.
    fn leave(&mut self) {
        self.phase = Phase::Stopping;
        self.write_record();
        let limit = Instant::now() + LEAVE_MAX;
        let daemon = self.stations[1].worker.take();
        if let Some(daemon) = &daemon
            && daemon.channel.send(&ToWorker::Drain, &[], false).is_err()
        {
            kill(daemon);
        }
        for process in self.draining.drain(..).chain(daemon) {
            if let Err(error) = end(&process, limit) {
                tracing::error!("{}", error.chain());
            }
        }
        if let Some(process) = self.stations[0].worker.take() {
            // Nothing is lost by this; see `mount`.
            kill(&process);
            reap(process.pid);
        }
        let control = self.options.layout.control();
        for (name, listener) in &mut self.options.sockets {
            let bears_pid = *name == SOCKET_CONTROL
                && !listener.bound().is_some_and(|bound| bound.is_at(&control));
            match bears_pid {
                true => listener.remove(),
                false => listener.leave(),
            }
        }
    }

    /// Stops the workers, the daemon first, and undoes what they have not.
    fn take_down(&mut self) -> Result<()> {
        self.phase = Phase::Stopping;
        self.write_record();
        if let Some(keeper) = &mut self.options.keeper {
            keeper.forget();
        }
        let mut failed = Ok(());
        let daemons = self.stations[1].worker.take();
        let mut processes: Vec<Process> = daemons.into_iter().collect();
        processes.append(&mut self.draining);
        // The overlay is unmounted before what lies below it is served no more.
        for processes in [
            processes,
            self.stations[0].worker.take().into_iter().collect(),
        ] {
            for process in &processes {
                if process.channel.send(&ToWorker::Stop, &[], false).is_err() {
                    kill(process);
                }
            }
            for process in processes {
                let limit = Instant::now() + STOP_MAX;
                if let Err(error) = end(&process, limit) {
                    failed = failed.and(Err(error));
                }
            }
        }
        self.held.clear();
        // What a worker did not undo.
        match crate::up::unmount_leftovers(&self.options.layout) {
            Ok(removed) => removed
                .iter()
                .for_each(|what| tracing::warn!("removed {what}")),
            Err(error) => failed = failed.and(Err(error)),
        }
        for listener in &mut self.options.sockets {
            listener.1.remove();
        }
        if let Err(error) = std::fs::remove_file(self.options.layout.supervisor()) {
            tracing::debug!(%error, "removing the record");
        }
        failed
    }

    fn write_record(&self) {
        let pid = |process: &Process| process.pid.as_raw_nonzero().get().cast_unsigned();
        let workers = self.stations.iter().map(|station| WorkerRecord {
            role: station.role,
            pid: station.worker.as_ref().map(pid),
            ready: station.is_ready(),
            restarts: station.restarts,
            last_end: station.last_end.clone(),
        });
        let record = Record {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            phase: self.phase,
            resend: self.resend,
            restored: self.is_restored,
            kept: self.options.keeper.as_ref().is_some_and(Keeper::is_whole),
            upgrades: self.upgrades,
            failed_upgrade: self.failed_upgrade.clone(),
            workers: workers.collect(),
            draining: self.draining.iter().map(pid).collect(),
        };
        if let Err(error) = record.write(&self.options.layout) {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// For [`Channel::send`].
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}
