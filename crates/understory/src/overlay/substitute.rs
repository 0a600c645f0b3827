//! Substitution into the overlay: into the castore where there is one, else into the upper.
//!
//! A path goes down if all that it refers to is in the castore or goes there with it. What refers to an object that
//! only the upper or another lower has goes to the upper. Mostly that is known when the archive comes; where it turns
//! out later, because a reference went to the upper meanwhile, the content is copied from the castore to the upper.

use super::Overlay;
use super::add::InUpper;
use crate::daemon::{Reporter, Silent};
use crate::local::temp_roots::TempRoots;
use crate::nar::write_nar;
use crate::store::TempRootOwner;
use crate::substitute::{CastoreSink, Outcome, Sink, Substituters};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use understory_castore::Node;
use understory_nix::worker::WireRealisation;
use understory_nix::{ContentAddress, PathInfo, StorePath};

/// Buffer on each side of a pipe.
const BUFFER_BYTES: usize = 256 << 10;

impl Overlay {
    /// Substitutes `paths` and what they refer to, as far as it is not valid. All are temporary roots before they are
    /// looked for: of the upper in `roots`, of the castore in `below`; without the latter nothing goes there. What could
    /// not be had is in the outcome. A path whose content address is known may come from a store with another directory.
    ///
    /// # Errors
    /// Interrupted; the store's.
    pub(super) fn substitute(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        substituters: &Substituters,
        roots: &TempRoots,
        below: Option<&TempRootOwner>,
        reporter: &dyn Reporter,
    ) -> Result<Outcome> {
        let castore = self.castore().zip(below);
        let sink = OverlaySink {
            overlay: self,
            roots,
            castore: castore.map(|(store, owner)| CastoreSink::with_owner(store, owner)),
            upward: Mutex::default(),
        };
        let outcome = substituters.substitute_with(paths, &sink, reporter)?;
        self.settle(reporter);
        Ok(outcome)
    }
}

/// Fills an overlay.
struct OverlaySink<'a> {
    overlay: &'a Overlay,
    roots: &'a TempRoots,
    castore: Option<CastoreSink<'a>>,
    /// What has gone to the upper, or will.
    upward: Mutex<HashSet<StorePath>>,
}

/// A path's content.
#[derive(Clone)]
enum Content {
    /// In the castore.
    Below(Node),
    /// In the upper; taken out when it is made valid.
    Upper(Arc<Mutex<Option<InUpper>>>),
    /// Valid when it came.
    Valid,
}

impl OverlaySink<'_> {
    fn upward(&self) -> std::sync::MutexGuard<'_, HashSet<StorePath>> {
        self.upward.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the path must go to the upper, as far as that is known now.
    fn goes_up(&self, castore: &CastoreSink<'_>, info: &PathInfo) -> Result<bool> {
        let references: Vec<StorePath> = info
            .references
            .iter()
            .filter(|reference| **reference != info.path)
            .cloned()
            .collect();
        let below: HashSet<StorePath> = castore
            .store()
            .valid_paths(&references)?
            .into_iter()
            .collect();
        let outside: Vec<StorePath> = references
            .into_iter()
            .filter(|reference| !below.contains(reference))
            .collect();
        if outside.is_empty() {
            return Ok(false);
        }
        if outside
            .iter()
            .any(|reference| self.upward().contains(reference))
        {
            return Ok(true);
        }
        Ok(self.overlay.valid(&outside)?.contains(&true))
    }

    fn to_upper(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        reporter: &dyn Reporter,
    ) -> Result<Content> {
        self.upward().insert(info.path.clone());
        let stored =
            self.overlay
                .store_in_upper(info.clone(), archive, false, self.roots, reporter)?;
        Ok(match stored {
            Some(stored) => Content::Upper(Arc::new(Mutex::new(Some(stored)))),
            None => Content::Valid,
        })
    }

    /// Copies what is in the castore, but not valid there, to the upper.
    fn raise(&self, castore: &CastoreSink<'_>, info: &PathInfo, root: &Node) -> Result<Content> {
        let store = castore.store();
        // What was written is readable only then.
        store.writer()?.sync()?;
        store.castore().refresh()?;
        let pipe = |e| Error::environment("copying from the castore to the upper").with_source(e);
        let (reader, writer) = std::io::pipe().map_err(pipe)?;
        std::thread::scope(|scope| {
            let written = scope.spawn(move || -> Result<()> {
                let mut out = BufWriter::with_capacity(BUFFER_BYTES, writer);
                write_nar(store.castore(), root, &mut out)?;
                out.flush().map_err(pipe)
            });
            let mut archive = BufReader::with_capacity(BUFFER_BYTES, reader);
            let content = self.to_upper(info, &mut archive, &Silent);
            // Ends the writer, if not all was read.
            drop(archive);
            let written = match written.join() {
                Ok(written) => written,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            // What the reader says is a consequence of what the writer met, unless it stopped first.
            match (content, written) {
                (Err(_), Err(error)) if error.kind() == crate::error::ErrorKind::Corrupt => {
                    Err(error)
                }
                (content, _) => content,
            }
        })
    }
}

impl Sink for OverlaySink<'_> {
    type Content = Content;

    fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>> {
        self.roots.add(paths)?;
        if let Some(castore) = &self.castore {
            // Makes them temporary roots there.
            castore.valid(paths)?;
        }
        Ok(self.overlay.only_valid(paths)?.into_iter().collect())
    }

    fn receive(
        &self,
        info: &PathInfo,
        archive: &mut dyn BufRead,
        bytes: &AtomicU64,
        reporter: &dyn Reporter,
    ) -> Result<Content> {
        if let Some(castore) = &self.castore
            && !self.goes_up(castore, info)?
        {
            self.overlay.clear_upper(&info.path, reporter)?;
            let root = castore.receive(info, archive, bytes, reporter)?;
            return Ok(Content::Below(root));
        }
        let mut counted = Counted {
            inner: archive,
            bytes,
        };
        self.to_upper(info, &mut counted, reporter)
    }

    fn publish(&self, paths: Vec<(PathInfo, Content)>) -> Result<()> {
        let mut below = Vec::new();
        let mut above = Vec::new();
        for (info, content) in paths {
            let content = match (content, &self.castore) {
                (Content::Below(root), Some(castore)) => {
                    if self.goes_up(castore, &info)? {
                        let raised = self.raise(castore, &info, &root);
                        castore.store().castore().release(&root);
                        raised?
                    } else {
                        below.push((info, root));
                        continue;
                    }
                }
                (content, _) => content,
            };
            if let Content::Upper(stored) = content {
                let stored = stored.lock().unwrap_or_else(PoisonError::into_inner).take();
                // Taken by an earlier attempt, which failed.
                above.push(stored.ok_or_else(|| self.overlay.not_valid(&info.path))?);
            }
        }
        let shown: Vec<StorePath> = below.iter().map(|(info, _)| info.path.clone()).collect();
        if let Some(castore) = self.castore.as_ref().filter(|_| !below.is_empty()) {
            castore.publish(below)?;
            self.overlay.inner.merged.show(&shown)?;
        }
        if above.is_empty() {
            return Ok(());
        }
        self.overlay.publish_in_upper(above)
    }

    fn register(&self, realisation: &WireRealisation) -> Result<()> {
        self.overlay.register_realisation(realisation)
    }
}

/// Counts what is read.
pub(super) struct Counted<'a> {
    pub(super) inner: &'a mut dyn BufRead,
    pub(super) bytes: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

impl BufRead for Counted<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        self.inner.consume(count);
    }
}
