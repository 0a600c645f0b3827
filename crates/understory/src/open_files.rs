//! Open files of a mount, kept by what they take of memory.

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use std::hash::Hash;
use understory_castore::Blob;

/// What one takes, about.
const FILE_BYTES: u64 = 8 << 10;

/// A cache of open files.
pub(crate) type OpenFiles<K, V> = Cache<K, V, ByMemory>;

/// What is weighed.
pub(crate) trait Weigh {
    /// Bytes of memory.
    fn memory_bytes(&self) -> u64;
}

impl Weigh for Blob {
    fn memory_bytes(&self) -> u64 {
        Self::memory_bytes(self)
    }
}

/// Weighs by memory.
#[derive(Debug, Clone)]
pub(crate) struct ByMemory;

impl<K, V: Weigh> Weighter<K, V> for ByMemory {
    fn weight(&self, _key: &K, file: &V) -> u64 {
        file.memory_bytes()
    }
}

/// Makes a cache that takes up to `bytes_max`. It has one shard, since a file that takes more than a shard is not kept.
pub(crate) fn open_files<K: Eq + Hash, V: Clone + Weigh>(bytes_max: u64) -> OpenFiles<K, V> {
    let items = (bytes_max / FILE_BYTES) as usize;
    let options = OptionsBuilder::new()
        .shards(1)
        .weight_capacity(bytes_max)
        .estimated_items_capacity(items)
        .build();
    match options {
        Ok(options) => Cache::with_options(
            options,
            ByMemory,
            DefaultHashBuilder::default(),
            DefaultLifecycle::default(),
        ),
        Err(_) => Cache::with_weighter(items, bytes_max, ByMemory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Weigh for u64 {
        fn memory_bytes(&self) -> u64 {
            *self
        }
    }

    #[test]
    fn what_takes_much_is_kept_and_all_together_stays_in_bounds() {
        let files = open_files::<u32, u64>(10 << 20);
        let large = 3 << 20;
        for key in 0..3 {
            files.insert(key, large);
        }
        assert!((0..3).all(|key| files.get(&key) == Some(large)));
        for key in 10..10_000 {
            files.insert(key, FILE_BYTES);
        }
        assert!(files.weight() <= 10 << 20, "{}", files.weight());
        assert!(files.len() > 100, "{}", files.len());
    }
}
