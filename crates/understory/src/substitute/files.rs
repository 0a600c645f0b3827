//! What a binary cache is made of: files under one place, read over HTTP, from S3 or from a directory.

use super::cancel::{Cancel, interrupted};
use crate::Error;
use crate::daemon::Reporter;
use std::io::Read;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use understory_nix::worker::Verbosity;

/// First pause before another attempt; doubled with each. Nix's number.
const BACKOFF: Duration = Duration::from_millis(250);
/// Longest pause that we choose ourselves.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Longest pause that a server may ask for: a client that waits longer believes that we hang.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Who works for whom.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) reporter: &'a dyn Reporter,
    pub(super) cancel: &'a Cancel,
}

impl Context<'_> {
    /// Says a warning as Nix does.
    pub(super) fn warn(&self, text: &str) {
        self.reporter
            .say(Verbosity::Warn, &format!("warning: {text}"));
    }
}

/// Why a file could not be had.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may succeed.
    Passing {
        error: Error,
        /// How long the server wants us to wait.
        wait: Option<Duration>,
        /// Nobody there: the host is unknown, refuses, or does not answer.
        unreachable: bool,
    },
    /// No attempt will.
    Final(Error),
    /// The client has gone.
    Cancelled,
}

impl Failure {
    pub(super) fn passing(error: Error) -> Self {
        Self::Passing {
            error,
            wait: None,
            unreachable: false,
        }
    }
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Passing { error, .. } | Self::Final(error) => error,
            Self::Cancelled => interrupted(),
        }
    }
    pub(super) fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Passing {
                unreachable: true,
                ..
            }
        )
    }
}

/// Files under one place. Threads share it.
pub(super) trait Files: Send + Sync {
    /// Reads a small file once; `None` if there is none.
    fn read(
        &self,
        name: &str,
        bytes_max: usize,
        context: Context<'_>,
    ) -> Result<Option<Vec<u8>>, Failure>;
    /// Opens a file whose URL a narinfo gave, once; `None` if there is none. The reader may try again by itself when
    /// it breaks, as far as `attempts` allow.
    fn open<'a>(
        &'a self,
        url: &str,
        attempts: &'a Attempts,
        context: Context<'a>,
    ) -> Result<Option<Body<'a>>, Failure>;
    /// Where that is, for messages.
    fn place(&self, url: &str) -> String;
    /// Most files at a time; 0 is no limit.
    fn parallel(&self) -> usize;
    /// How often to try.
    fn attempts(&self) -> u32 {
        1
    }
}

/// A file that is being read.
pub(super) struct Body<'a> {
    pub(super) reader: Box<dyn Read + 'a>,
    /// Bytes, if known.
    pub(super) bytes: Option<u64>,
    /// Why it broke, if it did: what stands between here and who reads it makes other errors of that.
    pub(super) broken: Broken,
}

/// Remembers why a stream broke.
#[derive(Clone, Default)]
pub(super) struct Broken(Arc<Mutex<Option<Failure>>>);

impl Broken {
    /// Notes it, and gives what readers see.
    pub(super) fn set(&self, failure: Failure) -> std::io::Error {
        let text = match &failure {
            Failure::Passing { error, .. } | Failure::Final(error) => error.chain(),
            Failure::Cancelled => interrupted().to_string(),
        };
        *self.lock() = Some(failure);
        std::io::Error::other(text)
    }
    pub(super) fn take(&self) -> Option<Failure> {
        self.lock().take()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts attempts and waits between them.
pub(super) struct Attempts {
    max: u32,
    used: AtomicU32,
}

impl Attempts {
    pub(super) fn new(max: u32) -> Self {
        Self {
            max: max.max(1),
            used: AtomicU32::new(1),
        }
    }
    /// Waits before the next attempt; `Err` with the failure if there is to be none.
    pub(super) fn again(&self, failure: Failure, context: Context<'_>) -> Result<(), Failure> {
        let Failure::Passing { error, wait, .. } = &failure else {
            return Err(failure);
        };
        if context.cancel.is_set() {
            return Err(Failure::Cancelled);
        }
        let used = self.used.fetch_add(1, Ordering::Relaxed);
        if used >= self.max {
            return Err(failure);
        }
        let pause = wait.map_or_else(|| backoff(used), |wait| wait.min(RETRY_AFTER_MAX));
        context.warn(&format!(
            "{}; retrying in {} ms",
            error.chain(),
            pause.as_millis()
        ));
        if context.cancel.wait(pause) {
            return Err(Failure::Cancelled);
        }
        Ok(())
    }
}

/// The pause after attempt `used`: doubled each time, up to half as long again so that clients do not come in waves.
fn backoff(used: u32) -> Duration {
    let base = BACKOFF
        .saturating_mul(1 << (used - 1).min(16))
        .min(BACKOFF_MAX);
    let mut random = [0; 2];
    // Without random numbers there is no jitter.
    let _ = getrandom::fill(&mut random);
    base + base.mul_f64(f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX) / 2.0)
}

/// Reads a small file, trying again as often as the files say.
pub(super) fn read_retrying(
    files: &dyn Files,
    name: &str,
    bytes_max: usize,
    context: Context<'_>,
) -> Result<Option<Vec<u8>>, Failure> {
    let attempts = Attempts::new(files.attempts());
    loop {
        match files.read(name, bytes_max, context) {
            Err(failure) => attempts.again(failure, context)?,
            found => return found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_have_a_limit() {
        for (used, ms) in [(1, 250), (2, 500), (3, 1000), (7, 10_000), (40, 10_000)] {
            let pause = backoff(used).as_millis();
            assert!((ms..=ms + ms / 2).contains(&pause), "{used}: {pause}");
        }
    }
}
