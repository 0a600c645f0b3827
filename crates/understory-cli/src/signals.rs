//! Signals: SIGINT and SIGTERM ask a command to end.
//!
//! Set up only after namespaces are entered: the waiting thread would forbid that.

use crate::error::{CommandError, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender};
use understory::daemon::Shutdown;

/// Returns a flag that the first SIGINT or SIGTERM sets; the second ends the process at once.
pub(crate) fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let io = |e: std::io::Error| CommandError::io("handling", "signals", &e);
        // Order matters: the shutdown looks at the flag before the second line sets it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone()).map_err(io)?;
        signal_hook::flag::register(signal, flag.clone()).map_err(io)?;
    }
    Ok(flag)
}

/// Returns a socket that becomes readable when one of the signals comes. Needs no thread.
pub(crate) fn readable(signals: &[i32]) -> Result<UnixStream> {
    let io = |e: std::io::Error| CommandError::io("handling", "signals", &e);
    let (reader, writer) = UnixStream::pair().map_err(io)?;
    for &signal in signals {
        let writer = writer.try_clone().map_err(io)?;
        signal_hook::low_level::pipe::register(signal, writer).map_err(io)?;
    }
    Ok(reader)
}

/// Sends a message for each SIGINT, SIGTERM and SIGHUP.
pub(crate) fn forward(to: Sender<i32>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
        .map_err(|e| CommandError::io("handling", "signals", &e))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if to.send(signal).is_err() {
                    return;
                }
            }
        })
        .map_err(|e| CommandError::io("starting", "the signal thread", &e))?;
    Ok(())
}

/// Returns what ends a daemon when the first signal that was forwarded comes.
pub(crate) fn shutdown(signalled: Receiver<i32>) -> Result<Shutdown> {
    let shutdown = Shutdown::new()?;
    let switch = shutdown.clone();
    std::thread::Builder::new()
        .name("ends".into())
        .spawn(move || {
            // An error means that the signal thread is gone; then nothing could stop us but this.
            let _ = signalled.recv();
            switch.trigger();
        })
        .map_err(|e| CommandError::io("starting", "a thread", &e))?;
    Ok(shutdown)
}
