//! Substitution: into a castore from binary caches that are honest, broken or hostile, from caches that real Nix made,
//! and from other daemons.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod caches;
mod closures;
#[path = "../common/overlay.rs"]
mod common_overlay;
mod misbehaviour;
mod others;
mod overlay;
mod real_nix;
mod server;
mod support;
