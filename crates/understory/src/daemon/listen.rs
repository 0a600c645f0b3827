//! Sockets to listen on: bound by us, or handed over by systemd.

use crate::files::remove_if_there;
use crate::service_manager::{self, Handed};
use crate::{Error, Result};
use rustix::process::getpid;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest path of a socket: `sun_path` without its NUL.
const PATH_BYTES_MAX: usize = 107;

/// A listening socket. One that was bound by us is removed from the file system when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    bound: Option<Bound>,
}

/// A socket's name in the file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bound {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Bound {
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        self.path == path
    }
}

impl Listener {
    /// Binds `path` with mode 0666; directories above it are made with mode 0755. The socket
    /// appears under its name only when it is ready. A socket that nobody listens on is replaced.
    ///
    /// # Errors
    /// Somebody listens there, something else is there, or I/O.
    pub fn bind(path: &Path) -> Result<Self> {
        Self::bind_with_mode(path, 0o666)
    }

    /// As [`Listener::bind`] with another mode.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn bind_with_mode(path: &Path, mode: u32) -> Result<Self> {
        if path.as_os_str().len() > PATH_BYTES_MAX {
            return Err(Error::environment(format!(
                "the path of the socket {} has more than {PATH_BYTES_MAX} bytes",
                path.display()
            ))
            .with_hint("choose a shorter one: clients could not connect to it"));
        }
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| Error::io("creating", parent, error))?;
        check_free(path)?;
        let temporary = parent.join(format!(".us-{}", getpid().as_raw_nonzero()));
        remove_if_there(&temporary)?;
        let socket = UnixListener::bind(&temporary)
            .map_err(|error| Error::io("binding the socket", path, error))?;
        let ready = || -> io::Result<Bound> {
            std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))?;
            let metadata = std::fs::symlink_metadata(&temporary)?;
            std::fs::rename(&temporary, path)?;
            Ok(Bound {
                path: path.to_path_buf(),
                device: metadata.dev(),
                inode: metadata.ino(),
            })
        };
        match ready() {
            Ok(bound) => Ok(Self {
                socket,
                bound: Some(bound),
            }),
            Err(error) => {
                remove_if_there(&temporary)?;
                Err(Error::io("binding the socket", path, error))
            }
        }
    }

    /// Takes a socket that listens already.
    pub fn from_socket(socket: UnixListener) -> Self {
        Self {
            socket,
            bound: None,
        }
    }

    /// Takes the sockets that systemd hands over; none if there are none for this process.
    ///
    /// # Errors
    /// The variables make no sense, or a descriptor is not a listening unix socket.
    pub fn activated() -> Result<Vec<Self>> {
        let handed = service_manager::take_descriptors()?;
        handed.into_iter().map(Self::from_handed).collect()
    }

    /// Takes a socket that systemd has handed over.
    ///
    /// # Errors
    /// It is not a listening unix socket.
    pub fn from_handed(handed: Handed) -> Result<Self> {
        let what = format!("descriptor {} of the socket activation", handed.name);
        let listens = rustix::net::sockopt::socket_acceptconn(&handed.descriptor);
        let socket = UnixListener::from(handed.descriptor);
        if !matches!(listens, Ok(true)) || socket.local_addr().is_err() {
            return Err(
                Error::environment(format!("{what} is not a listening unix socket"))
                    .with_hint("the socket unit needs ListenStream= with a path, and Accept=no"),
            );
        }
        Ok(Self::from_socket(socket))
    }

    /// Takes a socket that an earlier process of ours has bound.
    pub(crate) fn from_bound(socket: UnixListener, bound: Bound) -> Self {
        Self {
            socket,
            bound: Some(bound),
        }
    }

    /// Where in the file system it is, if it was bound by us.
    pub(crate) fn bound(&self) -> Option<&Bound> {
        self.bound.as_ref()
    }

    /// Lets it stay in the file system when this is dropped.
    pub(crate) fn leave(&mut self) {
        self.bound = None;
    }

    /// Where it was bound; `None` if it was handed over.
    pub fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| &*bound.path)
    }

    /// Removes it from the file system now, if it was bound by us and is still ours. Who is connected stays so.
    pub(crate) fn remove(&mut self) {
        // Only if it is still ours: another server may have replaced it.
        if let Some(bound) = self.bound.take()
            && let Ok(metadata) = std::fs::symlink_metadata(&bound.path)
            && (metadata.dev(), metadata.ino()) == (bound.device, bound.inode)
            && let Err(error) = std::fs::remove_file(&bound.path)
        {
            tracing::warn!(path = %bound.path.display(), %error, "removing the socket");
        }
    }

    pub(crate) fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

fn check_free(path: &Path) -> Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("reading", path, error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(
            Error::environment(format!("{} is there and is not a socket", path.display()))
                .with_hint("choose another path for the socket, or move that file away"),
        );
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(
            Error::environment(format!("somebody listens on {} already", path.display()))
                .with_hint(
                    "another daemon serves there: stop it, or choose another path for the socket",
                ),
        ),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::io("connecting to", path, error)),
    }
}
