//! Where a store and the state of a running instance lie.
//!
//! One directory (the *state directory*) holds what an instance needs; by default it is the store's
//! own directory:
//! ```text
//! run/lock          held by the running instance (flock), holds its process id
//! run/overlay.sock  worker protocol of the overlay store: what clients use
//! run/daemon.sock   worker protocol of the castore, the lower store
//! run/control.sock  see `control`
//! run/mount.sock    control socket of the mount server
//! run/supervisor.json  the supervisor and its workers, see `supervisor`
//! run/up.log        log of a detached instance
//! mnt/              the live mount: the lower store directory
//! upper/, work/     overlayfs's upper and work directory
//! merged/           root of the overlay store: merged/<store dir> is the overlay mount,
//!                   merged/nix/var its state and logs
//! ```

use crate::{Error, Result};
use std::path::{Path, PathBuf};
use understory_nix::StoreDir;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one of them for the NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What of the layout is not where it is by default.
#[derive(Debug, Clone, Default)]
pub struct LayoutOptions {
    /// State directory; the store's directory by default.
    pub state: Option<PathBuf>,
    /// Overlayfs's upper directory.
    pub upper: Option<PathBuf>,
    /// Overlayfs's work directory; must be on the upper directory's file system.
    pub work: Option<PathBuf>,
    /// Where the overlay is mounted, such as `/nix/store`.
    pub merged: Option<PathBuf>,
    /// The lower daemon's socket.
    pub socket: Option<PathBuf>,
    /// The overlay store's socket.
    pub overlay_socket: Option<PathBuf>,
    /// State directory of the overlay store, such as `/nix/var/nix` of a store that was adopted. With it, the
    /// overlay may lie over another mount.
    pub nix_state: Option<PathBuf>,
    /// Log directory of the overlay store.
    pub nix_log: Option<PathBuf>,
}

/// All paths of an instance, absolute.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Layout {
    /// The store.
    pub store: PathBuf,
    /// The state directory.
    pub state: PathBuf,
    /// Lock, control socket, log.
    pub run: PathBuf,
    /// The lower daemon's socket.
    pub socket: PathBuf,
    /// The overlay store's socket.
    pub overlay_socket: PathBuf,
    /// The live mount.
    pub lower: PathBuf,
    /// Overlayfs's upper directory.
    pub upper: PathBuf,
    /// Overlayfs's work directory.
    pub work: PathBuf,
    /// Prefix of the overlay store if the overlay is mounted in its default place.
    pub root: Option<PathBuf>,
    /// The overlay mount.
    pub merged: PathBuf,
    /// State directory of the overlay store: its database, profiles, roots.
    pub nix_state: PathBuf,
    /// Log directory of the overlay store.
    pub nix_log: PathBuf,
    /// True if the overlay hides a store directory that was there before, which may be a mount.
    pub is_over_store: bool,
}

impl Layout {
    /// Computes the layout. Relative paths are made absolute, nothing is created.
    ///
    /// # Errors
    /// The current directory cannot be read; a path holds `..` or is empty.
    pub fn new(store: &Path, options: &LayoutOptions) -> Result<Self> {
        let store = absolute(store)?;
        let state = match &options.state {
            Some(dir) => absolute(dir)?,
            None => store.clone(),
        };
        let or = |given: &Option<PathBuf>, default: PathBuf| match given {
            Some(path) => absolute(path),
            None => Ok(default),
        };
        let root = state.join("merged");
        let merged = or(&options.merged, root.join("nix/store"))?;
        let upper = or(&options.upper, state.join("upper"))?;
        let work = match (&options.work, &options.upper) {
            (Some(work), _) => absolute(work)?,
            // Must be on the upper's file system.
            (None, Some(_)) => sibling(&upper, "-work"),
            (None, None) => state.join("work"),
        };
        Ok(Self {
            run: state.join("run"),
            socket: or(&options.socket, state.join("run/daemon.sock"))?,
            overlay_socket: or(&options.overlay_socket, state.join("run/overlay.sock"))?,
            lower: state.join("mnt"),
            upper,
            work,
            nix_state: or(&options.nix_state, root.join("nix/var/nix"))?,
            nix_log: or(&options.nix_log, root.join("nix/var/log/nix"))?,
            is_over_store: options.nix_state.is_some(),
            root: (merged == root.join("nix/store")
                && options.nix_state.is_none()
                && options.nix_log.is_none())
            .then_some(root),
            merged,
            store,
            state,
        })
    }
    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }
    /// The control socket of the mount server.
    pub fn mount_control(&self) -> PathBuf {
        self.run.join("mount.sock")
    }
    /// What the supervisor says about itself and its workers.
    pub fn supervisor(&self) -> PathBuf {
        self.run.join("supervisor.json")
    }
    /// The lock file.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }
    /// The log of a detached instance.
    pub fn log(&self) -> PathBuf {
        self.run.join("up.log")
    }
    /// True if `file` lies in one of the instance's own mounts, as far as names tell.
    pub fn is_below_mounts(&self, file: &Path) -> bool {
        let image = self.state.join("image");
        let mounts = [&self.merged, &self.lower, &image];
        mounts.into_iter().any(|mount| file.starts_with(mount))
    }
    /// Refuses socket paths that the kernel would cut.
    ///
    /// # Errors
    /// A path of more than [`SOCKET_PATH_BYTES_MAX`] bytes.
    pub fn check_sockets(&self) -> Result<()> {
        for path in [&self.socket, &self.overlay_socket, &self.control()] {
            let len = path.as_os_str().len();
            if len > SOCKET_PATH_BYTES_MAX {
                return Err(Error::user(format!(
                    "socket path {} has {len} bytes, at most {SOCKET_PATH_BYTES_MAX} are possible",
                    path.display()
                ))
                .with_hint("choose a shorter directory with --state or --socket"));
            }
        }
        Ok(())
    }
}

/// The store's directory when none is given: `/var/lib/understory` for root, else
/// `$XDG_STATE_HOME/understory` or `~/.local/state/understory`. `None` without a home.
pub fn default_store(
    is_root: bool,
    xdg_state_home: Option<&Path>,
    home: Option<&Path>,
) -> Option<PathBuf> {
    if is_root {
        return Some(PathBuf::from("/var/lib/understory"));
    }
    // The XDG specification says that relative values are to be ignored.
    if let Some(dir) = xdg_state_home.filter(|dir| dir.is_absolute()) {
        return Some(dir.join("understory"));
    }
    home.filter(|dir| dir.is_absolute())
        .map(|home| home.join(".local/state/understory"))
}

/// The store directory as a path.
pub fn store_dir_path(dir: &StoreDir) -> &Path {
    Path::new(dir.as_str())
}

/// Makes a path absolute and drops `.` and double slashes; `..` is refused, because it means
/// something else behind a symlink.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("resolving", path, e))?;
    let mut out = PathBuf::new();
    for component in absolute.components() {
        if component == std::path::Component::ParentDir {
            let real = std::fs::canonicalize(path).map_err(|e| Error::io("resolving", path, e))?;
            return Ok(real);
        }
        out.push(component);
    }
    Ok(out)
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_places() {
        let some = |p| Some(Path::new(p));
        assert_eq!(
            default_store(true, some("/x"), some("/h")),
            Some("/var/lib/understory".into())
        );
        assert_eq!(
            default_store(false, some("/x"), some("/h")),
            Some("/x/understory".into())
        );
        assert_eq!(
            default_store(false, some("x"), some("/h")),
            Some("/h/.local/state/understory".into())
        );
        assert_eq!(default_store(false, None, None), None);
    }

    #[test]
    fn layout_below_the_store() {
        let l = Layout::new(Path::new("/s//./x/"), &LayoutOptions::default()).unwrap();
        assert_eq!(l.merged, Path::new("/s/x/merged/nix/store"));
        assert_eq!(l.root.as_deref(), Some(Path::new("/s/x/merged")));
        assert_eq!(l.socket, Path::new("/s/x/run/daemon.sock"));
        let options = LayoutOptions {
            merged: Some("/nix/store".into()),
            upper: Some("/big/upper".into()),
            ..LayoutOptions::default()
        };
        let l = Layout::new(Path::new("/s"), &options).unwrap();
        assert_eq!((l.root, l.merged), (None, "/nix/store".into()));
        assert_eq!(l.work, Path::new("/big/upper-work"));
        assert_eq!(l.nix_state, Path::new("/s/merged/nix/var/nix"));
    }

    #[test]
    fn a_long_socket_path_is_refused() {
        let dir = format!("/{}", "x".repeat(100));
        let error = Layout::new(Path::new(&dir), &LayoutOptions::default())
            .unwrap()
            .check_sockets()
            .unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("has 117 bytes, at most 107 are possible"),
            "{error}"
        );
    }
}
