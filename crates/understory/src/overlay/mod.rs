//! Our own local-overlay store: an upper store in Nix's format over lower stores, joined by an overlayfs.
//!
//! On disk it is what stock Nix calls `local-overlay://`, and stock Nix may open it before, after and at the same time.
//! The behaviour differs where Nix's is broken (`docs/overlay-store.md`). In short:
//! - What is substituted or copied in goes to the castore, if the uppermost lower is one that this process may write;
//!   what is built or added locally goes to the upper. No other lower is ever written to.
//! - The database of the upper (*U*) holds infos of upper objects and copies of the infos of the lower objects in
//!   their closures, because its foreign keys want them. Queries answer from U, then from the lowers; they write nothing.
//! - Liveness, collection and verification look at U and at the upper directory, never at the lower's listing.
//!
//! Invariants, after every operation and after every crash: I1 references of rows are rows; I2 a valid path has an entry
//! in the merged directory; I3 no lower is written to, other than our castore through its own publication; I4 no
//! whiteout at the top of the upper for a name that a lower has; I5 valid below is valid here; I6 U agrees with the
//! lower; I7 nothing in U depends on a lower's absence of something.

mod add;
mod build;
mod delete;
mod gc;
mod log;
pub mod lower;
mod merged;
mod open;
mod optimise;
mod queries;
mod session;
mod substitute;
mod sync;
mod verify;

pub use lower::Lower;
pub use merged::{LowerDir, Remount, check_mount};

use crate::builder::Builder;
use crate::local::{Database, LocalPaths};
use crate::settings::Settings;
use crate::store::Store;
use crate::substitute::Substituters;
use merged::Merged;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use understory_nix::derivation::DerivationHashes;
use understory_nix::{StoreDir, StorePath};

/// What an overlay store is made of.
pub struct Options {
    /// Logical store directory, merged directory (`real`), state and logs.
    pub local: LocalPaths,
    /// The overlayfs's upper directory.
    pub upper: PathBuf,
    /// The stores below, uppermost first; at least one.
    pub lowers: Vec<Arc<dyn Lower>>,
    /// Compare the overlayfs that is mounted with the directories above.
    pub check_mount: bool,
    /// How the overlayfs is made to forget.
    pub remount: Remount,
    /// Keys, roots, substituters and so on.
    pub settings: Settings,
    /// Who builds.
    pub builder: Arc<dyn Builder>,
}

/// An open overlay store. Cheap to clone, shared by threads.
#[derive(Clone)]
pub struct Overlay {
    inner: Arc<Inner>,
}

/// What the parts of this module share.
struct Inner {
    local: LocalPaths,
    db: Database,
    upper: PathBuf,
    lowers: Vec<Arc<dyn Lower>>,
    merged: Merged,
    settings: Settings,
    substituters: Arc<Substituters>,
    builder: Arc<dyn Builder>,
    /// Hashes modulo of derivations that were looked at as inputs of others, so that each is read once.
    hashes: Mutex<KnownHashes>,
}

/// Derivations and their hashes modulo.
type KnownHashes = HashMap<StorePath, Arc<DerivationHashes>>;

impl Overlay {
    /// The logical store directory.
    pub fn store_dir(&self) -> &StoreDir {
        &self.inner.local.store_dir
    }
    /// Merged directory, state and logs.
    pub fn local(&self) -> &LocalPaths {
        &self.inner.local
    }
    /// Calls `then` while no other process has the upper store open, such as a Nix that builds; `None` if some has.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn alone<T>(&self, then: impl FnOnce() -> T) -> crate::Result<Option<T>> {
        self.inner.db.alone(then)
    }
    /// The castore that takes what is substituted or copied in: the uppermost lower, if it is one and writable.
    fn castore(&self) -> Option<&Store> {
        self.inner
            .lowers
            .first()
            .and_then(|lower| lower.castore())
            .filter(|store| !store.is_read_only())
    }
}
