//! The way to the server: TCP (or a proxy's tunnel) and TLS, as `ureq` has them, with reads between the two that end when the client
//! that they are for has gone.

use crate::substitute::cancel::current_is_set;
use std::time::{Duration, Instant};
use ureq::Error;
use ureq::unversioned::transport::time::Duration as Span;
use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, NextTimeout, RustlsConnector,
    TcpConnector, Transport,
};

/// How often a read looks whether anyone still waits for it.
const SLICE: Duration = Duration::from_millis(200);

/// Connects as `ureq` does by itself, with [`Guarded`] around the sockets.
pub(super) fn connector() -> impl Connector {
    ().chain(ConnectProxyConnector::default())
        .chain(TcpConnector::default())
        .chain(Guard)
        .chain(RustlsConnector::default())
}

#[derive(Debug)]
struct Guard;

impl<In: Transport> Connector<In> for Guard {
    type Out = Guarded<In>;

    fn connect(
        &self,
        _details: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(Guarded))
    }
}

/// A socket whose reads wait in slices.
#[derive(Debug)]
struct Guarded<T>(T);

impl<T: Transport> Transport for Guarded<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }
    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.0.transmit_output(amount, timeout)
    }
    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        let end = match timeout.after {
            Span::Exact(after) => Instant::now().checked_add(after),
            Span::NotHappening => None,
        };
        loop {
            if current_is_set() {
                // Not `Interrupted`, which readers take for a reason to go on.
                return Err(Error::Io(std::io::Error::other("interrupted by the user")));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Error::Timeout(timeout.reason));
            }
            let slice = NextTimeout {
                after: Span::Exact(left.map_or(SLICE, |left| left.min(SLICE))),
                per_read: None,
                ..timeout
            };
            match self.0.await_input(slice) {
                Err(Error::Timeout(_)) => {}
                done => return done,
            }
        }
    }
    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }
    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}
