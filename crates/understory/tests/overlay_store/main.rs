//! The overlay store on real overlayfs mounts, over a live castore mount and plain directories. Rows are those of the
//! defects of C++ Nix's local-overlay store in `docs/overlay-store.md`. Needs root; without, each test says so and
//! passes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod additions;
#[path = "../common/mod.rs"]
mod common;
mod opening;
mod queries;
mod support;
