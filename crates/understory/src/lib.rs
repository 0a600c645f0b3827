//! A castore that serves as a Nix store.
//!
//! This library never prints: it returns values and errors, and logs with `tracing`.

pub mod add;
pub mod adopt;
pub mod builder;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod error;
mod files;
pub mod generation;
pub mod image;
pub mod import;
pub mod local;
pub mod metrics;
pub mod mount;
pub mod mount_server;
pub mod namespace;
pub mod nar;
pub mod nix_conf;
mod open_files;
pub mod overlay;
pub mod overlay_url;
mod pool;
pub mod service_manager;
pub mod settings;
pub mod store;
pub mod substitute;
pub mod supervisor;
pub mod up;

pub use error::{Error, Result};
pub use store::{Store, StoreOptions};
