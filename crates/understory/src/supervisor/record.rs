//! What a supervisor says about itself, in the file `run/supervisor.json`: it can be read while no worker answers.

use super::channel::Role;
use super::process::lives;
use crate::config::Layout;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not all workers were ready yet.
    Starting,
    /// All were; one may be starting again.
    Running,
    /// Everything is being undone.
    Stopping,
}

/// A supervisor and its workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The supervisor's process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// What goes on.
    pub phase: Phase,
    /// Whether a mount server can be replaced without any request failing; unknown before the first one is ready.
    pub resend: Option<bool>,
    /// True if it goes on with what an earlier supervisor has left.
    #[serde(default)]
    pub restored: bool,
    /// True if systemd keeps what the next supervisor needs.
    #[serde(default)]
    pub kept: bool,
    /// Upgrades so far.
    pub upgrades: u64,
    /// Why the last upgrade's program is not used.
    #[serde(default)]
    pub failed_upgrade: Option<String>,
    /// The workers.
    pub workers: Vec<WorkerRecord>,
    /// Processes of earlier daemons that still have clients.
    pub draining: Vec<u32>,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// What it does.
    pub role: Role,
    /// Its process id; none while it waits to be started again.
    pub pid: Option<u32>,
    /// Whether it serves.
    pub ready: bool,
    /// How often it was started again because it had ended by itself.
    pub restarts: u64,
    /// How the last one ended, if one has.
    pub last_end: Option<String>,
}

impl Record {
    /// Reads the record of the instance in `layout`; `None` if there is none, or what wrote it is gone.
    ///
    /// # Errors
    /// I/O, or it is not understood.
    pub fn read(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.supervisor();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("reading", path, e)),
        };
        let record: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::environment(format!("{} is not understood", path.display())).with_source(e)
        })?;
        Ok(lives(record.pid).then_some(record))
    }

    /// The worker of a role.
    pub fn worker(&self, role: Role) -> Option<&WorkerRecord> {
        self.workers.iter().find(|worker| worker.role == role)
    }

    /// Writes it; readers see the old or the new one.
    pub(super) fn write(&self, layout: &Layout) -> Result<()> {
        let path = layout.supervisor();
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::internal("encoding the record").with_source(e))?;
        let new = path.with_extension("json.new");
        std::fs::write(&new, text).map_err(|e| Error::io("writing", &new, e))?;
        std::fs::rename(&new, &path).map_err(|e| Error::io("renaming to", &path, e))
    }
}
