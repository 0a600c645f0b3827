//! What an instance has done, over all its processes: its own numbers, the mount server's, the supervisor's.

use super::{Shared, lock};
use crate::control::GenerationStatus;
use crate::generation::stack::Standing;
use crate::generation::{Generation, all_of, load};
use crate::{control, metrics, supervisor};
use std::sync::atomic::Ordering;

/// What metrics call the process of an instance that is one process.
const ROLE: &str = "up";

impl Shared {
    /// Adds what the supervisor knows, if there is one.
    fn count_supervisor(&self, out: &mut metrics::Snapshot) {
        let record = match supervisor::Record::read(&self.layout) {
            Ok(Some(record)) if self.mount_control.is_some() => record,
            Ok(_) => return,
            Err(error) => return tracing::debug!("{}", error.chain()),
        };
        metrics::add_process(record.pid, "supervisor", out);
        for worker in &record.workers {
            out.counter(
                "understory_process_restarts_total",
                "How often a process was started again because it had ended by itself.",
                &[("process", worker.role.name())],
                worker.restarts,
            );
        }
    }
    /// The generations of the store, and which of them the overlay stands on.
    pub(super) fn generations(&self) -> Vec<GenerationStatus> {
        let standing = Standing::read(&self.layout).unwrap_or_default();
        let status = |generation: Generation| GenerationStatus {
            number: generation.number,
            paths: generation.figures().paths,
            image_bytes: generation.image_bytes(),
            is_mounted: generation.is_in_use().unwrap_or_else(|error| {
                tracing::debug!("{}", error.chain());
                false
            }),
            has_overlay: standing.generation == Some(generation.number),
            waits_for: match standing.next {
                Some(next) if next == generation.number => standing.waits_for.clone(),
                _ => None,
            },
        };
        match all_of(&self.store) {
            Ok(all) => all.into_iter().map(status).collect(),
            Err(error) => {
                tracing::debug!("listing generations: {}", error.chain());
                Vec::new()
            }
        }
    }
    /// The numbers of the whole instance.
    pub(super) fn snapshot(&self) -> metrics::Snapshot {
        let role = match self.mount_control {
            Some(_) => supervisor::Role::Daemon.name(),
            None => ROLE,
        };
        let mut out = metrics::snapshot(role);
        self.count_supervisor(&mut out);
        if let Some(path) = &self.mount_control {
            // It may be starting again: the numbers of what it does are missing then, no more.
            let observed = control::Client::connect(path).and_then(|client| match client {
                Some(mut client) => client.metrics().map(Some),
                None => Ok(None),
            });
            match observed {
                Ok(Some(observed)) => out.merge(&observed.metrics),
                Ok(None) => {}
                Err(error) => tracing::debug!("asking the mount server: {}", error.chain()),
            }
        }
        out.gauge(
            "understory_overlay_mounts",
            "Overlays that are mounted.",
            &[],
            lock(&self.overlays).len() as u64,
        );
        let standing = Standing::read(&self.layout).unwrap_or_default();
        out.gauge(
            "understory_generation",
            "The generation that the overlay stands on; 0: the live mount.",
            &[],
            standing.generation.unwrap_or(0),
        );
        if let Some(number) = standing.generation
            && let Ok(Some(generation)) = load(&self.store, number)
        {
            out.gauge(
                "understory_generation_paths",
                "Paths in the generation that the overlay stands on.",
                &[],
                generation.figures().paths,
            );
        }
        out.gauge(
            "understory_generation_newer_paths",
            "Paths that came after it, as far as somebody looked: some more than are reason for another one are not counted.",
            &[],
            self.newer_paths.load(Ordering::Relaxed),
        );
        out.gauge(
            "understory_start_time_seconds",
            "Unix time at which the instance was ready.",
            &[],
            self.started,
        );
        out
    }
}
