//! Figures about a store.

use super::Store;
use crate::Result;
use understory_castore::Stats;

/// Sizes and counts: path infos and what the castore makes of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Valid paths.
    pub paths: u64,
    /// Their NAR sizes, together.
    pub nar_bytes: u64,
    /// Derivations among them.
    pub derivations: u64,
    /// References, those to itself included.
    pub references: u64,
    /// Realisations.
    pub realisations: u64,
    /// Bytes of the database on disk, its log included.
    pub database_bytes: u64,
    /// The castore's figures.
    pub castore: Stats,
}

impl StoreStats {
    /// Bytes of the NARs that deduplication saved: the same contents are stored once. NAR framing
    /// counts as saved, too.
    pub fn deduplicated_bytes(&self) -> u64 {
        self.nar_bytes.saturating_sub(self.castore.raw_bytes)
    }
    /// Bytes that compression saved.
    pub fn compressed_bytes(&self) -> u64 {
        self.castore
            .raw_bytes
            .saturating_sub(self.castore.stored_bytes)
    }
}

impl Store {
    /// Sizes and counts. Scans the database.
    ///
    /// # Errors
    /// I/O.
    pub fn stats(&self) -> Result<StoreStats> {
        let mut stats = self.db().read_snapshot(|connection| {
            let count = |sql: &str| -> Result<u64> {
                let value: i64 = connection
                    .prepare_cached(sql)?
                    .query_row([], |row| row.get(0))?;
                Ok(value.unsigned_abs())
            };
            Ok(StoreStats {
                paths: count("select count(*) from paths")?,
                nar_bytes: count("select coalesce(sum(nar_size), 0) from paths")?,
                derivations: count("select count(*) from paths where base_name like '%.drv'")?,
                references: count("select count(*) from refs")?,
                realisations: count("select count(*) from realisations")?,
                ..StoreStats::default()
            })
        })?;
        let size = std::fs::metadata(self.db().path()).map_or(0, |metadata| metadata.len());
        stats.database_bytes = size + super::db::wal_bytes(self.db().path());
        stats.castore = self.castore().stats()?;
        Ok(stats)
    }
}
