//! Caches of decompressed frames and decoded directories, bounded by bytes.

use crate::digest::Digest;
use crate::directory::Directory;
use crate::frames::Frame;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// Weight of a cache's shard, so that the largest frame of a dense repack is a quarter of one.
const CACHE_SHARD_BYTES: u64 = 16 << 20;

/// Weighs by memory.
#[derive(Clone, Copy)]
pub(crate) struct ByBytes;

impl quick_cache::Weighter<(u32, u32), Arc<Frame>> for ByBytes {
    fn weight(&self, _key: &(u32, u32), frame: &Arc<Frame>) -> u64 {
        frame.memory_bytes()
    }
}
impl quick_cache::Weighter<Digest, Arc<Directory>> for ByBytes {
    fn weight(&self, _key: &Digest, directory: &Arc<Directory>) -> u64 {
        directory.memory_bytes()
    }
}

/// Makes a cache of `bytes_max`, whose items have about `item_bytes`.
pub(crate) fn cache<K: Eq + std::hash::Hash, V: Clone>(
    bytes_max: u64,
    item_bytes: u64,
) -> Cache<K, V, ByBytes>
where
    ByBytes: quick_cache::Weighter<K, V> + Clone,
{
    let shards = (bytes_max / CACHE_SHARD_BYTES).clamp(1, 16) as usize;
    let options = quick_cache::OptionsBuilder::new()
        .shards(shards)
        .weight_capacity(bytes_max)
        // The default gives what is new 3 %: of a shard that is less than one frame, which then goes before the next
        // request of the same reader comes.
        .hot_allocation(0.5)
        .estimated_items_capacity((bytes_max / item_bytes).max(16) as usize)
        .build();
    let Ok(options) = options else {
        return Cache::with_weighter(16, bytes_max, ByBytes);
    };
    Cache::with_options(
        options,
        ByBytes,
        quick_cache::DefaultHashBuilder::default(),
        quick_cache::sync::DefaultLifecycle::default(),
    )
}
