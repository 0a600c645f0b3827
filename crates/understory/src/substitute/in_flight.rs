//! What is being fetched at this moment by anyone in this process, so that nothing is fetched twice at a time.
//!
//! Who comes second does not wait here but is told when the first is done: a thread that waited could be the one that
//! is needed to fetch what the first waits for.

use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use understory_nix::StorePath;

/// Paths that are being fetched, and who wants to hear of their end.
#[derive(Default)]
pub(super) struct InFlight(Mutex<HashMap<StorePath, Vec<Sender<StorePath>>>>);

impl InFlight {
    /// Claims a path. `None` if it is claimed already; then its end is sent to `released`.
    pub(super) fn claim(
        self: &Arc<Self>,
        path: &StorePath,
        released: &Sender<StorePath>,
    ) -> Option<Claim> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(others) = claims.get_mut(path) {
            others.push(released.clone());
            return None;
        }
        claims.insert(path.clone(), Vec::new());
        Some(Claim {
            all: self.clone(),
            path: path.clone(),
        })
    }
}

/// A path that is ours to fetch, until this is dropped.
pub(super) struct Claim {
    all: Arc<InFlight>,
    path: StorePath,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let others = self
            .all
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.path);
        for other in others.into_iter().flatten() {
            // It does not listen any more: then it does not matter.
            let _ = other.send(self.path.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_hears_of_the_end() {
        let all = Arc::new(InFlight::default());
        let path = StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-x").unwrap();
        let (sender, receiver) = crossbeam_channel::unbounded();
        let claim = all.claim(&path, &sender).unwrap();
        assert!(all.claim(&path, &sender).is_none());
        assert!(receiver.is_empty());
        drop(claim);
        assert_eq!(receiver.recv().unwrap(), path);
        assert!(all.claim(&path, &sender).is_some());
    }
}
