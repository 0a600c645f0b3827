//! The daemon in process, asked by our own client at every version that differs, and by clients that
//! mean no good.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod backend;
mod golden;
mod hostile;
mod operations;
mod rights;
mod support;
mod uploads;
