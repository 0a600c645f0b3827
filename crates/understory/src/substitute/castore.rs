//! Substitution into a castore's store: archives go straight into the castore, many paths are published together.

use super::Sink;
use crate::add::ingest_nar_with;
use crate::daemon::Reporter;
use crate::nar::ReadOptions;
use crate::store::{Realisation, TempRootOwner};
use crate::{Result, Store};
use std::collections::HashSet;
use std::io::BufRead;
use std::sync::atomic::AtomicU64;
use understory_castore::Node;
use understory_nix::worker::WireRealisation;
use understory_nix::{PathInfo, StorePath};

/// Fills a store. What is looked for becomes a temporary root first.
pub struct CastoreSink<'a> {
    store: Store,
    owner: Owner<'a>,
}

enum Owner<'a> {
    Ours(TempRootOwner),
    Given(&'a TempRootOwner),
}

impl<'a> CastoreSink<'a> {
    /// Begins to fill `store`. What is looked for is a temporary root for as long as the sink lives.
    ///
    /// # Errors
    /// The owner of temporary roots cannot be made.
    pub fn new(store: &Store) -> Result<Self> {
        Ok(Self {
            store: store.clone(),
            owner: Owner::Ours(store.temp_root_owner()?),
        })
    }
    /// The same with temporary roots that live as long as `owner`.
    pub fn with_owner(store: &Store, owner: &'a TempRootOwner) -> Self {
        Self {
            store: store.clone(),
            owner: Owner::Given(owner),
        }
    }
    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

impl Sink for CastoreSink<'_> {
    type Content = Node;

    fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>> {
        let owner = match &self.owner {
            Owner::Ours(owner) => owner,
            Owner::Given(owner) => owner,
        };
        self.store.add_temp_roots(owner, paths)?;
        Ok(self.store.valid_paths(paths)?.into_iter().collect())
    }
    fn receive(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        bytes: &AtomicU64,
        _reporter: &dyn Reporter,
    ) -> Result<Node> {
        let options = ReadOptions {
            bytes: Some(bytes),
            ..ReadOptions::default()
        };
        ingest_nar_with(&self.store, info, archive, &options)
    }
    fn publish(&self, paths: Vec<(PathInfo, Node)>) -> Result<()> {
        self.store.publish(paths)
    }
    fn register(&self, realisation: &WireRealisation) -> Result<()> {
        self.store.add_realisation(&Realisation {
            id: realisation.id.id(),
            out_path: realisation.out_path.clone(),
            signatures: realisation.signatures.clone(),
        })
    }
}
