//! Making sure that a tree is stored and stays so, for publications that no finished builder vouches for.
//!
//! A tree that a builder of this process finished is kept by its lease (`lease.rs`). Any other root (of a
//! row that was read, of a builder that waited too long) may be under collection: each of its pieces is
//! looked up as a writer does, and what lies in a condemned pack only is stored again.

use crate::error::CastoreError;
use crate::lease::Operation;
use crate::pack::{Class, Key, Kind, Piece};
use crate::patch::Patches;
use crate::recipe::RecipeNode;
use crate::writer::{Batch, Writer};
use crate::{Castore, Digest, Node};
use std::collections::HashSet;
use std::sync::Arc;

/// Bytes that are gathered before they are handed in.
const BATCH_BYTES: usize = 1 << 20;

impl Castore {
    /// Makes sure that all of a tree is stored, and that no collection takes it away before it is published
    /// and given to [`Castore::release`]. Cheap for trees that a builder of this castore finished; others
    /// are walked. Durable after [`Writer::sync`].
    ///
    /// # Errors
    /// A piece is missing or damaged, I/O.
    pub fn secure(&self, root: &Node) -> Result<(), CastoreError> {
        if self.core().leases.keeps(root) {
            return Ok(());
        }
        let operation = Operation::begin(self.core());
        let mut walk = Secure {
            castore: self,
            writer: self.writer()?,
            seen: HashSet::new(),
            batch: Batch::default(),
        };
        walk.tree(root)?;
        walk.writer.hand_in(&mut walk.batch, None)?;
        operation.finished(root);
        Ok(())
    }
}

struct Secure<'a> {
    castore: &'a Castore,
    writer: Arc<Writer>,
    /// Directories.
    seen: HashSet<Digest>,
    batch: Batch,
}

impl Secure<'_> {
    fn tree(&mut self, root: &Node) -> Result<(), CastoreError> {
        let mut open = vec![root.clone()];
        while let Some(node) = open.pop() {
            match node {
                Node::Symlink { .. } | Node::File { size: 0, .. } => {}
                Node::File { digest, .. } => self.blob(&digest)?,
                Node::Directory { digest, .. } => {
                    if digest != Digest::EMPTY && self.seen.insert(digest) {
                        let directory = self.castore.directory(&digest)?;
                        open.extend(directory.entries().iter().map(|entry| entry.node.clone()));
                        self.piece(&digest, Class::Directory, "directory")?;
                    }
                }
            }
        }
        Ok(())
    }

    fn blob(&mut self, digest: &Digest) -> Result<(), CastoreError> {
        // Of a root whose parts are gone, another one.
        match self.blob_as(digest, Class::Blob) {
            Err(CastoreError::Missing { .. }) => self.blob_as(digest, Class::Patched),
            secured => secured,
        }
    }

    fn blob_as(&mut self, digest: &Digest, class: Class) -> Result<(), CastoreError> {
        let (kind, bytes) = self.piece(digest, class, "blob")?;
        match kind {
            Kind::Patched => {
                let patches = Patches::decode(&bytes).map_err(|reason| {
                    CastoreError::corrupt(format!("patches of blob {digest}"), reason)
                })?;
                self.blob_as(&patches.masked, Class::Blob)
            }
            Kind::Recipe => self.recipe(&bytes, digest),
            _ => Ok(()),
        }
    }

    fn recipe(&mut self, bytes: &[u8], digest: &Digest) -> Result<(), CastoreError> {
        let node = RecipeNode::new(bytes)
            .map_err(|reason| CastoreError::corrupt(format!("recipe {digest}"), reason))?;
        for at in 0..node.count() {
            let child = node.entry(at).digest;
            if node.level() == 0 {
                self.blob_as(&child, Class::Blob)?;
                continue;
            }
            let (_, inner) = self.piece(&child, Class::RecipeNode, "recipe")?;
            self.recipe(&inner, &child)?;
        }
        Ok(())
    }

    /// Makes sure of one piece. Returns its kind, and the bytes of one that others hang on.
    fn piece(
        &mut self,
        digest: &Digest,
        class: Class,
        what: &'static str,
    ) -> Result<(Kind, Vec<u8>), CastoreError> {
        let core = self.castore.core();
        let missing = || CastoreError::Missing {
            kind: what,
            digest: *digest,
        };
        let key = Key::new(digest, class);
        // As for the writer first: what is found there is what hangs on it.
        let stays = core.find_for_writer(&key);
        let place = match &stays {
            Some(place) => place.clone(),
            None => core.find_fresh(digest, class)?.ok_or_else(missing)?,
        };
        let kind = place.location.kind().ok_or_else(missing)?;
        let is_leaf = matches!(kind, Kind::Data | Kind::Directory);
        if stays.is_some() && is_leaf {
            return Ok((kind, Vec::new()));
        }
        let bytes = core.piece(&place, digest)?.to_vec();
        if stays.is_none() {
            let piece = Piece {
                digest: *digest,
                kind,
                len: bytes.len() as u32,
            };
            self.batch.push(piece, &bytes);
            if self.batch.bytes() >= BATCH_BYTES {
                self.writer.hand_in(&mut self.batch, None)?;
            }
        }
        Ok((kind, bytes))
    }
}
