//! Things that one thread uses at a time, made on demand and kept: connections to databases and daemons.
//!
//! At most a fixed number is lent at once; who comes later waits for one to come back. What comes back is
//! kept for the next.

use crate::Result;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// See the module.
pub(crate) struct Pool<T> {
    lent_max: usize,
    state: Mutex<State<T>>,
    returned: Condvar,
}

struct State<T> {
    idle: Vec<T>,
    lent: usize,
    /// Threads that wait for one.
    waiting: usize,
}

impl<T> Pool<T> {
    /// Lends at most `lent_max` at a time.
    pub(crate) fn new(lent_max: usize) -> Self {
        Self {
            lent_max,
            state: Mutex::new(State {
                idle: Vec::new(),
                lent: 0,
                waiting: 0,
            }),
            returned: Condvar::new(),
        }
    }

    /// Lends one that is there, or what `make` makes.
    ///
    /// # Errors
    /// `make`'s.
    pub(crate) fn lend(&self, make: impl FnOnce() -> Result<T>) -> Result<Loan<'_, T>> {
        let mut state = lock(&self.state);
        while state.idle.is_empty() && state.lent >= self.lent_max {
            state.waiting += 1;
            state = self
                .returned
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.lent += 1;
        let mut loan = Loan {
            pool: self,
            item: state.idle.pop(),
            is_fresh: false,
        };
        drop(state);
        if loan.item.is_none() {
            // If this fails the loan gives its place back.
            loan.item = Some(make()?);
            loan.is_fresh = true;
        }
        Ok(loan)
    }

    /// Drops those that nobody uses.
    pub(crate) fn clear(&self) {
        let idle = std::mem::take(&mut lock(&self.state).idle);
        drop(idle);
    }
}

/// One on loan; it goes back when this is dropped.
pub(crate) struct Loan<'a, T> {
    pool: &'a Pool<T>,
    item: Option<T>,
    is_fresh: bool,
}

impl<T> Loan<'_, T> {
    /// True if it was made for this loan.
    pub(crate) fn is_fresh(&self) -> bool {
        self.is_fresh
    }
    /// Drops it: it is of no use any more.
    pub(crate) fn discard(mut self) {
        self.item = None;
    }
}

#[allow(clippy::expect_used, reason = "only `discard` and `drop` take it out")]
impl<T> Deref for Loan<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.item.as_ref().expect("a loan has what is lent")
    }
}
#[allow(clippy::expect_used, reason = "only `discard` and `drop` take it out")]
impl<T> DerefMut for Loan<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.item.as_mut().expect("a loan has what is lent")
    }
}

impl<T> Drop for Loan<'_, T> {
    fn drop(&mut self) {
        let item = self.item.take();
        let mut state = lock(&self.pool.state);
        state.lent -= 1;
        state.idle.extend(item);
        // A wake-up is a system call, also if nobody waits.
        let awaited = state.waiting > 0;
        drop(state);
        if awaited {
            self.pool.returned.notify_one();
        }
    }
}

/// Locks a mutex whose data is right even if a thread panicked while it held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn never_more_than_so_many() {
        let pool = Pool::new(2);
        let (made, out, most) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let loan = pool
                            .lend(|| Ok(made.fetch_add(1, Ordering::SeqCst)))
                            .unwrap();
                        most.fetch_max(out.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        out.fetch_sub(1, Ordering::SeqCst);
                        drop(loan);
                    }
                });
            }
        });
        assert!(most.into_inner() <= 2);
        assert!(made.into_inner() <= 2);
    }

    #[test]
    fn failure_and_discard_free_the_place() {
        let pool = Pool::new(1);
        assert!(pool.lend(|| Err::<u8, _>(Error::user("no"))).is_err());
        let loan = pool.lend(|| Ok(1)).unwrap();
        assert!(loan.is_fresh());
        loan.discard();
        let loan = pool.lend(|| Ok(2)).unwrap();
        assert_eq!(*loan, 2);
        drop(loan);
        let loan = pool.lend(|| Ok(3)).unwrap();
        assert!(!loan.is_fresh() && *loan == 2);
        drop(loan);
        pool.clear();
        assert_eq!(*pool.lend(|| Ok(4)).unwrap(), 4);
    }
}
