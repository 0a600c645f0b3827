//! Which paths a live mount shows: a filter between the file system and the store.
//!
//! A filter decides by row number, which a path keeps for as long as it is valid and which no other path gets. What is
//! not shown is not there: not in the listing, not for a lookup, and so without a node that could be named. What lies
//! below a shown path is not asked about: it is that path's content.
//!
//! Cost: a lookup asks once; a listing reads the rows that [`RowFilter::skip`] cannot rule out.

use super::protocol::FileSystemFigures;
use super::source::{Contents, RootEntry, Source};
use crate::Result;
use crate::store::StoredPath;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use understory_castore::{Digest, Directory};

/// Decides which rows of a store a live mount shows.
pub trait RowFilter: Debug + Send + Sync {
    /// True if the path with this row is shown.
    fn shows(&self, row: u64) -> bool;

    /// A row, at least `after`, so that no row above `after` and up to it is shown; `u64::MAX` if there is none left.
    fn skip(&self, after: u64) -> u64 {
        after
    }
}

/// Shows certain paths and nothing that comes later.
#[derive(Debug)]
pub struct OnlyRows {
    /// Sorted.
    rows: Vec<u64>,
}

impl OnlyRows {
    /// Shows these paths, such as a closure.
    pub fn of<'a>(paths: impl IntoIterator<Item = &'a StoredPath>) -> Self {
        let mut rows: Vec<u64> = paths.into_iter().map(|path| path.id).collect();
        rows.sort_unstable();
        rows.dedup();
        Self { rows }
    }
}

impl RowFilter for OnlyRows {
    fn shows(&self, row: u64) -> bool {
        self.rows.binary_search(&row).is_ok()
    }

    fn skip(&self, after: u64) -> u64 {
        match self
            .rows
            .get(self.rows.partition_point(|row| *row <= after))
        {
            Some(next) => next - 1,
            None => u64::MAX,
        }
    }
}

/// Shows what was published after a certain row, which may be moved on while the mount is used.
#[derive(Debug)]
pub struct RowsAfter(AtomicU64);

impl RowsAfter {
    /// Shows rows above `row`.
    pub fn new(row: u64) -> Self {
        Self(AtomicU64::new(row))
    }

    /// From now on shows rows above `row` only. What the kernel knows already stays usable.
    pub fn set(&self, row: u64) {
        self.0.store(row, Ordering::Release);
    }
}

impl RowFilter for RowsAfter {
    fn shows(&self, row: u64) -> bool {
        row > self.0.load(Ordering::Acquire)
    }

    fn skip(&self, after: u64) -> u64 {
        after.max(self.0.load(Ordering::Acquire))
    }
}

/// A source of which only a part is shown.
pub(super) struct Filtered<S> {
    /// The whole.
    pub(super) source: S,
    /// What is shown of it.
    pub(super) filter: Arc<dyn RowFilter>,
}

impl<S: Source> Source for Filtered<S> {
    fn find(&self, name: &[u8]) -> Result<Option<RootEntry>> {
        let found = self.source.find(name)?;
        Ok(found.filter(|entry| self.filter.shows(entry.row)))
    }

    fn list(&self, after: u64, count: usize) -> Result<Vec<RootEntry>> {
        let mut shown = Vec::new();
        let mut after = self.filter.skip(after);
        while shown.len() < count && after < u64::MAX {
            let wanted = count - shown.len();
            let rows = self.source.list(after, wanted)?;
            let Some(last) = rows.last() else { break };
            after = self.filter.skip(last.row);
            shown.extend(
                rows.into_iter()
                    .filter(|entry| self.filter.shows(entry.row)),
            );
        }
        Ok(shown)
    }

    fn changes(&self) -> u64 {
        self.source.changes()
    }

    fn directory(&self, digest: &Digest) -> Result<Arc<Directory>> {
        self.source.directory(digest)
    }

    fn blob(&self, digest: &Digest, size: u64) -> Result<Arc<dyn Contents>> {
        self.source.blob(digest, size)
    }

    fn figures(&self) -> Result<FileSystemFigures> {
        self.source.figures()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understory_castore::Node;

    /// Rows 10, 20, … 1000.
    struct Tens;

    impl Source for Tens {
        fn find(&self, name: &[u8]) -> Result<Option<RootEntry>> {
            let row = std::str::from_utf8(name).unwrap().parse().unwrap();
            Ok((row <= 1000 && row % 10 == 0).then(|| entry(row)))
        }
        fn list(&self, after: u64, count: usize) -> Result<Vec<RootEntry>> {
            assert!(count > 0);
            let first = after / 10 + 1;
            Ok((first..=100).take(count).map(|n| entry(n * 10)).collect())
        }
        fn changes(&self) -> u64 {
            0
        }
        fn directory(&self, _: &Digest) -> Result<Arc<Directory>> {
            unreachable!("not asked")
        }
        fn blob(&self, _: &Digest, _: u64) -> Result<Arc<dyn Contents>> {
            unreachable!("not asked")
        }
        fn figures(&self) -> Result<FileSystemFigures> {
            unreachable!("not asked")
        }
    }

    fn entry(row: u64) -> RootEntry {
        RootEntry {
            row,
            name: row.to_string().into(),
            node: Node::Symlink {
                target: (*b"x").into(),
            },
        }
    }

    fn all(source: &dyn Source, count: usize) -> Vec<u64> {
        let mut rows: Vec<u64> = Vec::new();
        loop {
            let more = source
                .list(rows.last().copied().unwrap_or(0), count)
                .unwrap();
            rows.extend(more.iter().map(|entry| entry.row));
            if more.len() < count {
                return rows;
            }
        }
    }

    #[test]
    fn only_the_rows_named_are_there() {
        let filter = OnlyRows {
            rows: vec![20, 500, 510, 1000],
        };
        let source = Filtered {
            source: Tens,
            filter: Arc::new(filter),
        };
        for count in [1, 2, 3, 4, 5, 100] {
            assert_eq!(all(&source, count), [20, 500, 510, 1000]);
        }
        assert!(source.find(b"500").unwrap().is_some());
        assert!(source.find(b"490").unwrap().is_none());
        assert!(source.find(b"15").unwrap().is_none());
        let nothing = Filtered {
            source: Tens,
            filter: Arc::new(OnlyRows::of([])),
        };
        assert!(all(&nothing, 7).is_empty());
    }

    #[test]
    fn rows_after_one_are_there_and_the_limit_moves() {
        let filter = Arc::new(RowsAfter::new(0));
        let source = Filtered {
            source: Tens,
            filter: filter.clone(),
        };
        assert_eq!(all(&source, 7).len(), 100);
        filter.set(980);
        assert_eq!(all(&source, 1), [990, 1000]);
        assert!(source.find(b"980").unwrap().is_none());
        assert!(source.find(b"990").unwrap().is_some());
        filter.set(5000);
        assert!(all(&source, 3).is_empty());
    }
}
