//! What is said to a client while its request is being worked on.
//!
//! The connection lends its encoder for as long as the operation runs. Messages may come from any thread:
//! each is written whole and flushed at once under a lock. When a write fails the client has gone: nothing
//! more is sent, and the operation counts as cancelled.

use super::backend::Reporter;
use super::connection::Output;
use super::server::State;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use understory_nix::worker::{Encoder, LogMessage, Verbosity};

/// Writes log messages to a connection.
pub(super) struct ToClient<'c> {
    encoder: Mutex<&'c mut Encoder<Output>>,
    state: &'c State,
    verbosity: Verbosity,
    lost: AtomicBool,
}

impl<'c> ToClient<'c> {
    pub(super) fn new(
        encoder: &'c mut Encoder<Output>,
        state: &'c State,
        verbosity: Verbosity,
    ) -> Self {
        Self {
            encoder: Mutex::new(encoder),
            state,
            verbosity,
            lost: AtomicBool::new(false),
        }
    }

    /// True if a message could not be written: nothing can be.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Asks the client for at most `bytes_max` bytes.
    pub(super) fn pull(&self, bytes_max: u64) -> io::Result<()> {
        self.write(&LogMessage::Read(bytes_max))
    }

    fn write(&self, message: &LogMessage) -> io::Result<()> {
        let mut encoder = self.encoder.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_lost() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let written = message.write(&mut encoder).and_then(|()| encoder.flush());
        if let Err(error) = &written {
            tracing::debug!(%error, "a client has gone while it was told something");
            self.lost.store(true, Ordering::Relaxed);
        }
        written
    }
}

impl Reporter for ToClient<'_> {
    fn verbosity(&self) -> Verbosity {
        self.verbosity
    }
    fn is_cancelled(&self) -> bool {
        self.is_lost() || self.state.is_cancelled()
    }
    fn send(&self, message: &LogMessage) {
        match message {
            LogMessage::Next(_)
            | LogMessage::StartActivity { .. }
            | LogMessage::StopActivity(_)
            | LogMessage::Result { .. } => {
                // That it failed is remembered.
                let _ = self.write(message);
            }
            LogMessage::Last
            | LogMessage::Error(_)
            | LogMessage::Read(_)
            | LogMessage::Write(_) => {
                debug_assert!(false, "{message:?} is not for a reporter");
                tracing::error!("an operation tried to send a message that is the connection's");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufWriter, Write};
    use understory_nix::StoreDir;
    use understory_nix::worker::{Protocol, Version};

    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_said_cancels() {
        let output: Output = BufWriter::new(Box::new(Closed));
        let protocol = Protocol::plain(Version::NEWEST);
        let mut encoder = Encoder::new(output, StoreDir::default(), protocol);
        let state = State::new(None, false);
        let client = ToClient::new(&mut encoder, &state, Verbosity::Notice);
        client.say(Verbosity::Info, "not wanted, so not sent");
        assert!(client.check().is_ok());
        client.say(Verbosity::Notice, "wanted");
        assert!(client.is_lost());
        let error = client.check().expect_err("the client has gone");
        assert_eq!(error.to_string(), "interrupted by the user");
    }
}
