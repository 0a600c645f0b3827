//! A worker's side of the supervisor's channel.

use super::channel::{Channel, FromWorker, HeldNote, PROTOCOL, Role, Start, ToWorker};
use crate::config::Layout;
use crate::error::ErrorKind;
use crate::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::Signal;
use serde::Serialize;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Signs of life in the watchdog's time.
const BEATS: u32 = 3;

/// What a worker is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Take no more clients, and end when the last one has gone.
    Drain,
    /// Undo what was done and end.
    Stop,
}

/// A process that was started by a supervisor.
pub struct Worker {
    start: Start,
    channel: Arc<Channel>,
    sockets: Vec<(String, UnixListener)>,
    held: Vec<Held>,
    is_well: Arc<Mutex<Check>>,
    changes: Arc<Mutex<Changes>>,
    orders: Mutex<Receiver<Order>>,
    /// The instance's lock: it is held as long as any process of the instance lives.
    _lock: OwnedFd,
}

type Check = Box<dyn Fn() -> bool + Send>;

/// What is new of what is held for other roles.
pub enum Change {
    /// It is held from now on, or with other descriptors.
    Held(Held),
    /// What was held under that name is not any more.
    Forgotten(String),
}

/// Who hears of changes, and those that came before there was anybody.
#[derive(Default)]
struct Changes {
    listener: Option<Box<dyn Fn(Change) + Send>>,
    waiting: Vec<Change>,
}

impl Changes {
    fn push(&mut self, change: Change) {
        match &self.listener {
            Some(listener) => listener(change),
            None => self.waiting.push(change),
        }
    }
}

/// Descriptors that the supervisor keeps for a worker.
pub struct Held {
    /// What they are for.
    pub name: String,
    /// What the worker that gave them has said of them.
    pub state: serde_json::Value,
    /// In the order in which they were given; of what another role holds only the one for notifications.
    pub descriptors: Vec<OwnedFd>,
}

/// Talks to the supervisor from any thread.
#[derive(Clone)]
pub struct Line(Arc<Channel>);

impl Worker {
    /// Takes standard input as the channel and waits for what to do. Ends with the supervisor.
    ///
    /// # Errors
    /// This process was not started by a supervisor, or by one of another version.
    pub fn begin() -> Result<Self> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|e| Error::environment("asking to end with the supervisor").with_source(e))?;
        let end = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
            .map_err(|e| Error::environment("taking the channel").with_source(e))?;
        let null =
            std::fs::File::open("/dev/null").map_err(|e| Error::io("opening", "/dev/null", e))?;
        rustix::stdio::dup2_stdin(&null)
            .map_err(|e| Error::environment("replacing standard input").with_source(e))?;
        let channel = Channel::from_descriptor(end);
        let not_started =
            || Error::user("this option is for processes that `understory up` starts itself");
        let (ToWorker::Start(start), descriptors) = channel
            .receive()
            .map_err(|_| not_started())?
            .ok_or_else(not_started)?
        else {
            return Err(not_started());
        };
        let channel = Arc::new(channel);
        let is_well: Arc<Mutex<Check>> = Arc::new(Mutex::new(Box::new(|| true)));
        let (to, orders) = channel_of_orders();
        let beat = Duration::from_millis(start.watchdog_ms) / BEATS;
        let changes: Arc<Mutex<Changes>> = Arc::default();
        let (line, check) = (Arc::clone(&channel), Arc::clone(&is_well));
        let changed = Arc::clone(&changes);
        std::thread::Builder::new()
            .name("supervised".into())
            .spawn(move || listen(&line, &check, &changed, beat, &to))
            .map_err(|e| Error::environment("starting a thread").with_source(e))?;
        if start.protocol != PROTOCOL {
            return Err(Error::environment(format!(
                "the supervisor speaks version {}, this program version {PROTOCOL}",
                start.protocol
            ))
            .with_hint("restart with `understory down` and `understory up`"));
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = || {
            descriptors
                .next()
                .ok_or_else(|| Error::internal("the supervisor sent too few descriptors"))
        };
        let lock = next()?;
        let mut sockets = Vec::new();
        for name in &start.sockets {
            sockets.push((name.clone(), UnixListener::from(next()?)));
        }
        let mut held = Vec::new();
        for HeldNote {
            name,
            state,
            descriptors,
            ..
        } in &start.held
        {
            let descriptors = (0..*descriptors).map(|_| next()).collect::<Result<_>>()?;
            held.push(Held {
                name: name.clone(),
                state: state.clone(),
                descriptors,
            });
        }
        Ok(Self {
            start: *start,
            channel,
            sockets,
            held,
            is_well,
            changes,
            orders: Mutex::new(orders),
            _lock: lock,
        })
    }

    /// What it is to do.
    pub fn role(&self) -> Role {
        self.start.role
    }
    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.start.layout
    }
    /// The supervisor's process id, which is the instance's.
    pub fn supervisor(&self) -> u32 {
        self.start.supervisor
    }
    /// How long a sign of life may fail to come.
    pub fn watchdog(&self) -> Duration {
        Duration::from_millis(self.start.watchdog_ms)
    }
    /// True if earlier servers died of what they had read, presumably.
    pub fn refuses_resent(&self) -> bool {
        self.start.refuse_resent
    }
    /// Takes the listening sockets of that name.
    pub fn take_sockets(&mut self, name: &str) -> Vec<UnixListener> {
        let (taken, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.sockets)
            .into_iter()
            .partition(|(found, _)| found == name);
        self.sockets = rest;
        taken.into_iter().map(|(_, socket)| socket).collect()
    }
    /// Takes what is held under that name.
    pub fn take_held(&mut self, name: &str) -> Option<Held> {
        let at = self.held.iter().position(|held| held.name == name)?;
        Some(self.held.remove(at))
    }
    /// Takes all that is held and was not taken yet.
    pub fn take_all_held(&mut self) -> Vec<Held> {
        std::mem::take(&mut self.held)
    }
    /// What else is held.
    pub fn held(&self) -> &[Held] {
        &self.held
    }
    /// Talks to the supervisor.
    pub fn line(&self) -> Line {
        Line(Arc::clone(&self.channel))
    }
    /// From now on a sign of life is only given while `check` says so.
    pub fn is_well_while(&self, check: impl Fn() -> bool + Send + 'static) {
        *self.is_well.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(check);
    }
    /// Lets `listener` hear what changes in what is held for other roles, from the start on.
    pub fn on_change(&self, listener: impl Fn(Change) + Send + 'static) {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        for change in std::mem::take(&mut changes.waiting) {
            listener(change);
        }
        changes.listener = Some(Box::new(listener));
    }
    /// Waits for an order.
    pub fn wait(&self) -> Order {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread that sends them ends with the process.
        orders.recv().unwrap_or(Order::Stop)
    }
}

impl Line {
    /// Says that it serves; `report` is for who has started the instance. `resend`: whether the kernel lets mounts
    /// be taken over without a loss.
    ///
    /// # Errors
    /// The supervisor is gone.
    pub fn ready(&self, report: &impl Serialize, resend: Option<bool>) -> Result<()> {
        let report = to_value(report)?;
        self.say(&FromWorker::Ready { report, resend }, &[])
    }
    /// Says why it cannot start.
    pub fn failed(&self, error: &Error) {
        let kind = match error.kind() {
            ErrorKind::User => "user",
            ErrorKind::Environment => "environment",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Internal => "internal",
        };
        let failed = FromWorker::Failed {
            kind: kind.into(),
            message: error.chain(),
            hint: error.hint().map(str::to_owned),
        };
        if self.say(&failed, &[]).is_err() {
            tracing::error!("{}", error.chain());
        }
    }
    /// Lets the supervisor keep `descriptors` under `name`, instead of those that it keeps there now. When this
    /// returns they are kept, whatever becomes of this process. `notify`: which one other workers may use to tell
    /// the kernel something.
    ///
    /// # Errors
    /// The supervisor is gone.
    pub fn hold(
        &self,
        name: &str,
        state: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        notify: Option<usize>,
    ) -> Result<()> {
        let hold = FromWorker::Hold {
            name: name.into(),
            state: to_value(state)?,
            notify,
        };
        self.say(&hold, descriptors)
    }
    /// Lets the supervisor forget what it keeps under `name`.
    ///
    /// # Errors
    /// The supervisor is gone.
    pub fn release(&self, name: &str) -> Result<()> {
        self.say(&FromWorker::Release { name: name.into() }, &[])
    }
    /// Passes on that a client asks for the instance's end.
    pub fn ask_stop(&self) {
        self.pass(&FromWorker::Stop);
    }
    /// Passes on that a client asks for an upgrade, to `program` or to what now lies where this program was.
    pub fn ask_upgrade(&self, program: Option<PathBuf>) {
        self.pass(&FromWorker::Upgrade { program });
    }
    /// Says that somebody else has ended the mount.
    pub fn unmounted(&self) {
        self.pass(&FromWorker::Unmounted);
    }

    fn pass(&self, message: &FromWorker) {
        if let Err(error) = self.say(message, &[]) {
            tracing::error!("{}", error.chain());
        }
    }
    fn say(&self, message: &FromWorker, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        self.0.send(message, descriptors, true)
    }
}

fn to_value(value: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::internal("encoding a message").with_source(e))
}

fn channel_of_orders() -> (Sender<Order>, Receiver<Order>) {
    channel()
}

/// Gives signs of life, and passes orders on. Ends the process when the supervisor is gone.
fn listen(
    line: &Channel,
    check: &Mutex<Check>,
    changes: &Mutex<Changes>,
    beat: Duration,
    to: &Sender<Order>,
) {
    let change = |change| {
        let mut changes = changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.push(change);
    };
    let mut due = Instant::now() + beat;
    loop {
        let now = Instant::now();
        // Also while orders come all the time.
        if now >= due {
            let is_well = check.lock().unwrap_or_else(PoisonError::into_inner)();
            // No room means that the supervisor has enough to read.
            if is_well && line.send(&FromWorker::Alive, &[], false).is_err() {
                tracing::debug!("the supervisor does not read");
            }
            due = now + beat;
        }
        let pause = Timespec::try_from(due - now).unwrap_or(Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        });
        let mut fds = [PollFd::new(line, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&pause)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) | Err(_) => {}
        }
        let order = match line.receive::<ToWorker>() {
            Ok(Some((ToWorker::Drain, _))) => Order::Drain,
            Ok(Some((ToWorker::Stop, _))) => Order::Stop,
            Ok(Some((ToWorker::Output, descriptors))) => {
                if let Some(output) = descriptors.first()
                    && let Err(error) = rustix::stdio::dup2_stderr(output.as_fd())
                {
                    tracing::warn!(%error, "the log stays where it was");
                }
                continue;
            }
            Ok(Some((ToWorker::Held(note), descriptors))) => {
                change(Change::Held(Held {
                    name: note.name,
                    state: note.state,
                    descriptors,
                }));
                continue;
            }
            Ok(Some((ToWorker::Forget { name }, _))) => {
                change(Change::Forgotten(name));
                continue;
            }
            Ok(Some((ToWorker::Start(_), _))) => continue,
            Ok(None) | Err(_) => {
                tracing::error!("the supervisor is gone");
                std::process::exit(1);
            }
        };
        // The receiver is gone only while the process ends.
        let _ = to.send(order);
    }
}
