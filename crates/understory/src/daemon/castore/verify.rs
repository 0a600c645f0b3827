//! VerifyStore: what is damaged is named to the client.

use super::Session;
use crate::daemon::backend::Reporter;
use crate::daemon::refusal_text;
use crate::store::StoredPath;
use crate::{Error, Result, nar};
use std::io::{self, Write};
use understory_castore::Node;
use understory_nix::HashAlgorithm;
use understory_nix::hash::Hasher;
use understory_nix::worker::Verbosity;

/// Rows taken at once when the whole store is walked.
const WALK_ROWS: usize = 512;

impl Session {
    /// True if something is damaged.
    pub(super) fn verify_all(&self, check_contents: bool, reporter: &dyn Reporter) -> Result<bool> {
        let mut damaged = false;
        let mut after = 0;
        loop {
            let rows = self.store.list(after, WALK_ROWS)?;
            let Some(last) = rows.last() else {
                return Ok(damaged);
            };
            after = last.id;
            for row in &rows {
                reporter.check()?;
                if let Err(error) = self.verify_path(row, check_contents, reporter) {
                    // Cancelled is no damage, and neither is what has gone meanwhile.
                    reporter.check()?;
                    if self.store.is_valid(&row.info.path)? {
                        damaged = true;
                        tracing::error!(path = %row.info.path, error = error.chain(), "damaged");
                        reporter.say(Verbosity::Error, &refusal_text(&error));
                    }
                }
            }
        }
    }

    fn verify_path(
        &self,
        row: &StoredPath,
        check_contents: bool,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        let path = self.store.store_dir().print(&row.info.path);
        let castore = self.store.castore();
        if !check_contents {
            return match &row.root {
                Node::Directory { digest, .. } => castore.directory(digest).map(drop),
                Node::File { digest, size, .. } => castore.blob(digest, *size).map(drop),
                Node::Symlink { .. } => Ok(()),
            }
            .map_err(|error| {
                Error::corrupt(format!("path '{path}' has lost its content")).with_source(error)
            });
        }
        let mut sink = HashSink {
            hasher: Hasher::new(HashAlgorithm::Sha256),
            reporter,
        };
        nar::write_nar(castore, &row.root, &mut sink).map_err(|error| {
            Error::corrupt(format!("path '{path}' cannot be read: {}", error.chain()))
        })?;
        let found = sink.hasher.finish();
        let expected = row.info.nar_hash.to_hash();
        if found != expected {
            // Nix' words.
            return Err(Error::corrupt(format!(
                "path '{path}' was modified! expected hash '{expected}', got '{found}'"
            )));
        }
        Ok(())
    }
}

/// Hashes, and fails when the client has gone.
struct HashSink<'a> {
    hasher: Hasher,
    reporter: &'a dyn Reporter,
}

impl Write for HashSink<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.reporter.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.hasher.update(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
