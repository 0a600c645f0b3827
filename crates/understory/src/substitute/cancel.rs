//! Ending work from outside: a client that goes away ends its downloads within a fraction of a second, whatever they
//! wait for.
//!
//! What runs on a thread is told by [`Cancel::enter`] whose work it is, so that connections that many clients share
//! can ask it ([`current_is_set`]) without being told with each read.

use crate::daemon::Reporter;
use crate::{Error, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a client is asked whether it is still there: not felt by a person, nothing for a processor.
const POLL: Duration = Duration::from_millis(100);

thread_local! {
    static CURRENT: RefCell<Option<Cancel>> = const { RefCell::new(None) };
}

/// Says to all threads of one operation that it is over.
#[derive(Clone, Default)]
pub(super) struct Cancel(Arc<Inner>);

#[derive(Default)]
struct Inner {
    flag: AtomicBool,
    lock: Mutex<Sockets>,
    changed: Condvar,
}

/// Sockets whose readers have no other way to notice.
#[derive(Default)]
struct Sockets {
    next: u64,
    open: HashMap<u64, UnixStream>,
}

impl Cancel {
    pub(super) fn is_set(&self) -> bool {
        self.0.flag.load(Ordering::Relaxed)
    }
    /// Ends everything.
    pub(super) fn set(&self) {
        let sockets = self.lock();
        self.0.flag.store(true, Ordering::Relaxed);
        for socket in sockets.open.values() {
            // Closed already: then nobody waits for it.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.0.changed.notify_all();
    }
    /// `Err` if it is over.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_set() {
            return Err(interrupted());
        }
        Ok(())
    }
    /// Waits so long, or until it is over; true if it is.
    pub(super) fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut guard = self.lock();
        while !self.is_set() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.changed.wait_timeout(guard, left);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
    /// Closes the socket when it is over, as long as the guard lives.
    pub(super) fn watch(&self, socket: &UnixStream) -> std::io::Result<Watch> {
        let copy = socket.try_clone()?;
        let mut sockets = self.lock();
        if self.is_set() {
            let _ = copy.shutdown(Shutdown::Both);
        }
        sockets.next += 1;
        let id = sockets.next;
        sockets.open.insert(id, copy);
        Ok(Watch {
            cancel: self.clone(),
            id,
        })
    }
    /// Says that this thread works for it, as long as the guard lives.
    pub(super) fn enter(&self) -> Entered {
        Entered(CURRENT.with(|current| current.replace(Some(self.clone()))))
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, Sockets> {
        self.0.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Cancel::watch`].
pub(super) struct Watch {
    cancel: Cancel,
    id: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.cancel.lock().open.remove(&self.id);
    }
}

/// See [`Cancel::enter`].
pub(super) struct Entered(Option<Cancel>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with(|current| current.replace(self.0.take()));
    }
}

/// True if what this thread works for is over.
pub(super) fn current_is_set() -> bool {
    CURRENT.with(|current| current.borrow().as_ref().is_some_and(Cancel::is_set))
}

/// The error of an operation that the client gave up.
pub(super) fn interrupted() -> Error {
    Error::user("interrupted by the user")
}

/// Runs `work` on a thread of its own, and ends it when the client does not want it any more.
///
/// # Errors
/// Interrupted.
pub(super) fn watched<T: Send>(
    reporter: &dyn Reporter,
    work: impl FnOnce(&Cancel) -> Result<T> + Send,
) -> Result<T> {
    reporter.check()?;
    let cancel = Cancel::default();
    let (done, over) = channel::<()>();
    let mut gone = false;
    let result = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Dropped at the end, also of a panic.
            let _done = done;
            let _entered = cancel.enter();
            work(&cancel)
        });
        while let Err(RecvTimeoutError::Timeout) = over.recv_timeout(POLL) {
            if reporter.is_cancelled() {
                gone = true;
                cancel.set();
                break;
            }
        }
        match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    if gone {
        return Err(interrupted());
    }
    result
}
