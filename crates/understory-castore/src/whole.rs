//! Is a tree whole: is each of its pieces stored, in a frame that is not known to be damaged?
//!
//! What is known comes from reads and scrubs of this process ([`Core::set_bad`](crate::core::Core)); only
//! directories, chunk lists and patches are read here. Each piece is looked at once.

use crate::core::Place;
use crate::error::CastoreError;
use crate::pack::{BuildKeyHasher, Class, Key, Kind};
use crate::recipe::RecipeNode;
use crate::{Castore, Digest, Node};
use std::collections::HashMap;

/// Looks at trees, and remembers what it saw.
pub struct Whole<'a> {
    castore: &'a Castore,
    known: HashMap<Key, bool, BuildKeyHasher>,
}

impl<'a> Whole<'a> {
    /// Begins.
    pub fn new(castore: &'a Castore) -> Self {
        Self {
            castore,
            known: HashMap::default(),
        }
    }

    /// True if all of a tree is stored and nothing of it is known to be damaged.
    ///
    /// # Errors
    /// I/O; damage is an answer.
    pub fn is_whole(&mut self, node: &Node) -> Result<bool, CastoreError> {
        match node {
            Node::Symlink { .. } | Node::File { size: 0, .. } => Ok(true),
            Node::File { digest, .. } => {
                Ok(self.blob(digest, Class::Blob)? || self.blob(digest, Class::Patched)?)
            }
            Node::Directory { digest, .. } if *digest == Digest::EMPTY => Ok(true),
            Node::Directory { digest, .. } => {
                let key = Key::new(digest, Class::Directory);
                if let Some(known) = self.known.get(&key) {
                    return Ok(*known);
                }
                let mut whole = self.find(&key)?.is_some();
                // Not out of the cache's good memory: its frame was found above.
                match absent(self.castore.directory(digest)).transpose()? {
                    None => whole = false,
                    Some(directory) => {
                        for entry in directory.entries() {
                            whole &= self.is_whole(&entry.node)?;
                        }
                    }
                }
                self.known.insert(key, whole);
                Ok(whole)
            }
        }
    }

    /// Finds a piece in a sound frame.
    fn find(&self, key: &Key) -> Result<Option<Place>, CastoreError> {
        let core = self.castore.core();
        Ok(core
            .find_fresh_key(key)?
            .filter(|place| !core.is_bad(place)))
    }

    fn blob(&mut self, digest: &Digest, class: Class) -> Result<bool, CastoreError> {
        let key = Key::new(digest, class);
        if let Some(known) = self.known.get(&key) {
            return Ok(*known);
        }
        let core = self.castore.core();
        let whole = match self.find(&key)? {
            None => false,
            Some(place) => match place.location.kind() {
                Some(Kind::Data) => true,
                Some(Kind::Patched) => match absent(core.patches(&place, digest)).transpose()? {
                    Some(patches) => self.blob(&patches.masked, Class::Blob)?,
                    None => false,
                },
                Some(_) => self.list(&place, digest)?,
                None => false,
            },
        };
        self.known.insert(key, whole);
        Ok(whole)
    }

    fn list(&mut self, place: &Place, digest: &Digest) -> Result<bool, CastoreError> {
        let bytes = absent(self.castore.core().piece(place, digest)).transpose()?;
        let Some(bytes) = bytes else {
            return Ok(false);
        };
        let Ok(node) = RecipeNode::new(&bytes) else {
            return Ok(false);
        };
        let mut whole = true;
        for entry in (0..node.count()).map(|at| node.entry(at)) {
            whole &= if node.level() == 0 {
                self.blob(&entry.digest, Class::Blob)?
            } else {
                match self.find(&Key::new(&entry.digest, Class::RecipeNode))? {
                    Some(place) => self.list(&place, &entry.digest)?,
                    None => false,
                }
            };
        }
        Ok(whole)
    }
}

/// `None` for what is missing or damaged.
fn absent<T>(result: Result<T, CastoreError>) -> Option<Result<T, CastoreError>> {
    match result {
        Err(CastoreError::Missing { .. } | CastoreError::Corrupt { .. }) => None,
        other => Some(other),
    }
}
