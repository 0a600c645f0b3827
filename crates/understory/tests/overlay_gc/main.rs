//! Collection, optimisation and verification of an overlay store on real overlayfs mounts over a plain lower store, and
//! temporary roots between stock Nix and us. Needs root; without, each test says so and passes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod collection;
#[path = "../common/mod.rs"]
mod common;
mod links;
mod stock;
mod support;
mod verification;
mod whiteouts;
