//! The URL of an overlay store, spelled so that Nix 2.26 and 2.34 both understand it.
//!
//! Values are percent-decoded once, and by Nix 2.26 the value of `lower-store` twice. So the lower
//! URL must not hold a `%` after the first decoding, which leaves paths of `A-Z a-z 0-9 / . _ ~ -`.
//! The same set is safe in overlayfs's option strings and in the regular expressions of Nix's mount
//! check. Checked against Nix 2.26.3 and 2.34.8.

use crate::config::Layout;
use crate::local::LocalPaths;
use crate::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use understory_nix::StoreDir;

/// Where the overlay store has its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Below a prefix: `<root>/nix/store`, `<root>/nix/var/nix`, `<root>/nix/var/log/nix`.
    Root(PathBuf),
    /// Each given.
    Parts {
        /// The overlay mount.
        real: PathBuf,
        /// Database, profiles, roots.
        state: PathBuf,
        /// Build logs.
        log: PathBuf,
    },
}

/// A `local-overlay://` URL; displays as such.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayUrl {
    /// The overlay's place.
    pub place: Place,
    /// The upper directory.
    pub upper: PathBuf,
    /// The lower daemon's socket.
    pub lower_socket: PathBuf,
    /// The lower store directory's files.
    pub lower_real: PathBuf,
    /// The logical store directory.
    pub store_dir: StoreDir,
    /// Nix's own mount check; leave it on.
    pub check_mount: bool,
}

impl OverlayUrl {
    /// The URL of an instance.
    ///
    /// # Errors
    /// A path holds a character that one of the Nix versions would misread.
    pub fn of(layout: &Layout, store_dir: &StoreDir) -> Result<Self> {
        let place = match &layout.root {
            Some(root) => Place::Root(root.clone()),
            None => Place::Parts {
                real: layout.merged.clone(),
                state: layout.nix_state.clone(),
                log: layout.nix_log.clone(),
            },
        };
        check_path(&layout.overlay_socket)?;
        Self {
            place,
            upper: layout.upper.clone(),
            lower_socket: layout.socket.clone(),
            lower_real: layout.lower.clone(),
            store_dir: store_dir.clone(),
            check_mount: true,
        }
        .checked()
    }

    /// The URL at which clients reach the overlay store's daemon: `NIX_REMOTE`. It names where the files are if they
    /// are not at the store directory, so that clients read them there.
    pub fn remote(&self, layout: &Layout) -> String {
        let real = match &layout.root {
            Some(root) => Some(("root", root.as_path())),
            None => Some(("real", layout.merged.as_path())),
        };
        let at_store_dir = layout.merged == Path::new(self.store_dir.as_str());
        self.remote_with(layout, real.filter(|_| !at_store_dir))
    }

    /// The same from a namespace in which the overlay is mounted at the store directory itself.
    pub fn remote_at_store_dir(&self, layout: &Layout) -> String {
        self.remote_with(layout, None)
    }

    fn remote_with(&self, layout: &Layout, place: Option<(&str, &Path)>) -> String {
        let mut url = format!("unix://{}", layout.overlay_socket.display());
        let mut before = '?';
        let mut parameter = |name: &str, value: &Path| {
            url.push_str(&format!("{before}{name}={}", value.display()));
            before = '&';
        };
        if let Some((name, value)) = place {
            parameter(name, value);
        }
        if self.store_dir != StoreDir::default() {
            parameter("store", Path::new(self.store_dir.as_str()));
            if place.is_none() {
                // Else Nix would look for the files of another directory.
                parameter("real", Path::new(self.store_dir.as_str()));
            }
        }
        url
    }

    /// The lower store's URL, not encoded.
    pub fn lower(&self) -> String {
        daemon_url(&self.lower_socket, &self.lower_real, &self.store_dir)
    }

    /// The lines for nix.conf.
    pub fn nix_conf(&self) -> String {
        format!("experimental-features = nix-command local-overlay-store\nstore = {self}\n")
    }

    fn checked(self) -> Result<Self> {
        let place: Vec<&Path> = match &self.place {
            Place::Root(root) => vec![root],
            Place::Parts { real, state, log } => vec![real, state, log],
        };
        let others = [
            self.upper.as_path(),
            &self.lower_socket,
            &self.lower_real,
            Path::new(self.store_dir.as_str()),
        ];
        for path in place.into_iter().chain(others) {
            check_path(path)?;
        }
        Ok(self)
    }
}

impl fmt::Display for OverlayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("local-overlay://?")?;
        match &self.place {
            Place::Root(root) => write!(f, "root={}", Encoded(root))?,
            Place::Parts { real, state, log } => {
                write!(
                    f,
                    "real={}&state={}&log={}",
                    Encoded(real),
                    Encoded(state),
                    Encoded(log)
                )?;
            }
        }
        if self.store_dir != StoreDir::default() {
            write!(f, "&store={}", Encoded(Path::new(self.store_dir.as_str())))?;
        }
        let lower = self.lower();
        write!(
            f,
            "&lower-store={}&upper-layer={}",
            Encoded(Path::new(&lower)),
            Encoded(&self.upper)
        )?;
        if !self.check_mount {
            f.write_str("&check-mount=false")?;
        }
        Ok(())
    }
}

/// The URL at which the stock Nix that builds for us opens our overlay store: every place is named, and Nix's mount
/// check is off, because ours has been made and Nix's knows one lower directory only. Any path may stand in it as far
/// as Nix 2.34 is concerned; 2.26 needs a `lower` without `%`.
#[derive(Debug, Clone)]
pub struct BuilderUrl<'a> {
    /// Merged directory, state and logs.
    pub local: &'a LocalPaths,
    /// The upper directory.
    pub upper: &'a Path,
    /// URL of the lower store; of several the uppermost one.
    pub lower: &'a str,
    /// Nix's `remount-hook`.
    pub remount_hook: Option<&'a Path>,
}

impl fmt::Display for BuilderUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LocalPaths {
            store_dir,
            real,
            state,
            log,
        } = self.local;
        write!(
            f,
            "local-overlay://?store={}&real={}&state={}&log={}&lower-store={}&upper-layer={}&check-mount=false",
            Encoded(Path::new(store_dir.as_str())),
            Encoded(real),
            Encoded(state),
            Encoded(log),
            Encoded(Path::new(self.lower)),
            Encoded(self.upper),
        )?;
        match self.remount_hook {
            Some(hook) => write!(f, "&remount-hook={}", Encoded(hook)),
            None => Ok(()),
        }
    }
}

/// The URL of a daemon's socket as a lower store, whose files are at `real`.
pub fn daemon_url(socket: &Path, real: &Path, store_dir: &StoreDir) -> String {
    let mut url = format!("unix://{}?real={}", socket.display(), real.display());
    if store_dir != &StoreDir::default() {
        url.push_str("&store=");
        url.push_str(store_dir.as_str());
    }
    url
}

/// Refuses a path that cannot stand in the URL, in overlayfs's options and in Nix's mount check.
///
/// # Errors
/// Names the first such character.
pub fn check_path(path: &Path) -> Result<()> {
    let text = path.to_str().ok_or_else(|| {
        Error::user(format!(
            "path {} is not UTF-8 and cannot stand in a store URL",
            path.display()
        ))
        .with_hint("choose another directory with --store, --state or --upper")
    })?;
    match text.chars().find(|c| !is_plain(*c)) {
        None => Ok(()),
        Some(c) => Err(Error::user(format!(
            "path {text} holds {c:?}, which Nix's local-overlay store cannot handle in all its versions"
        ))
        .with_hint("choose a directory of letters, digits and ._~- only, with --store, --state or --upper")),
    }
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '~' | '-')
}

struct Encoded<'a>(&'a Path);
impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.as_os_str().as_encoded_bytes() {
            if is_plain(char::from(*byte)) {
                write!(f, "{}", char::from(*byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayoutOptions;

    fn url(options: &LayoutOptions) -> Result<OverlayUrl> {
        OverlayUrl::of(
            &Layout::new(Path::new("/s"), options)?,
            &StoreDir::default(),
        )
    }

    #[test]
    fn spelled_for_both_versions() {
        let u = url(&LayoutOptions::default()).unwrap();
        assert_eq!(
            u.to_string(),
            "local-overlay://?root=/s/merged&lower-store=unix%3A///s/run/daemon.sock%3Freal%3D/s/mnt&upper-layer=/s/upper"
        );
        assert_eq!(u.lower(), "unix:///s/run/daemon.sock?real=/s/mnt");
        let layout = Layout::new(Path::new("/s"), &LayoutOptions::default()).unwrap();
        assert_eq!(
            u.remote(&layout),
            "unix:///s/run/overlay.sock?root=/s/merged"
        );
        assert_eq!(u.remote_at_store_dir(&layout), "unix:///s/run/overlay.sock");
        assert_eq!(
            u.nix_conf().lines().next(),
            Some("experimental-features = nix-command local-overlay-store")
        );
    }

    #[test]
    fn merged_at_nix_store() {
        let u = url(&LayoutOptions {
            merged: Some("/nix/store".into()),
            ..LayoutOptions::default()
        })
        .unwrap();
        assert_eq!(
            u.to_string(),
            "local-overlay://?real=/nix/store&state=/s/merged/nix/var/nix&log=/s/merged/nix/var/log/nix\
             &lower-store=unix%3A///s/run/daemon.sock%3Freal%3D/s/mnt&upper-layer=/s/upper"
        );
    }

    #[test]
    fn remotes() {
        let remote = |merged: &str, store_dir: &str| {
            let options = LayoutOptions {
                merged: Some(merged.into()),
                ..LayoutOptions::default()
            };
            let layout = Layout::new(Path::new("/s"), &options).unwrap();
            let url = OverlayUrl::of(&layout, &StoreDir::new(store_dir).unwrap()).unwrap();
            (url.remote(&layout), url.remote_at_store_dir(&layout))
        };
        let socket = "unix:///s/run/overlay.sock";
        assert_eq!(
            remote("/nix/store", "/nix/store"),
            (socket.into(), socket.into())
        );
        assert_eq!(
            remote("/m", "/nix/store"),
            (format!("{socket}?real=/m"), socket.into())
        );
        let there = format!("{socket}?store=/o/p&real=/o/p");
        assert_eq!(remote("/o/p", "/o/p"), (there.clone(), there.clone()));
        assert_eq!(
            remote("/m", "/o/p"),
            (format!("{socket}?real=/m&store=/o/p"), there)
        );
    }

    #[test]
    fn of_the_nix_that_builds() {
        let local = LocalPaths::at_root(Path::new("/r"), StoreDir::new("/opt/store").unwrap());
        let lower = daemon_url(Path::new("/run/l.sock"), Path::new("/l"), &local.store_dir);
        let url = BuilderUrl {
            local: &local,
            upper: Path::new("/u p"),
            lower: &lower,
            remount_hook: Some(Path::new("/hook")),
        };
        assert_eq!(
            url.to_string(),
            "local-overlay://?store=/opt/store&real=/r/nix/store&state=/r/nix/var/nix&log=/r/nix/var/log/nix\
             &lower-store=unix%3A///run/l.sock%3Freal%3D/l%26store%3D/opt/store&upper-layer=/u%20p&check-mount=false\
             &remount-hook=/hook"
        );
    }

    #[test]
    fn odd_paths_are_refused_with_a_hint() {
        for (path, c) in [
            ("/a b", "' '"),
            ("/a+b", "'+'"),
            ("/a:b", "':'"),
            ("/a%20", "'%'"),
            ("/ä", "'ä'"),
        ] {
            let error = check_path(Path::new(path)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "path {path} holds {c}, which Nix's local-overlay store cannot handle in all its versions"
                )
            );
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn decoding_once_or_twice_gives_the_same_lower_url() {
        let u = url(&LayoutOptions::default()).unwrap();
        let text = u.to_string();
        let value = text
            .split("lower-store=")
            .nth(1)
            .unwrap()
            .split('&')
            .next()
            .unwrap();
        let once = decode(value);
        assert_eq!(once, u.lower());
        assert_eq!(decode(&once), once);
    }

    fn decode(text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            out.push_str(&rest[..at]);
            out.push(char::from(
                u8::from_str_radix(&rest[at + 1..at + 3], 16).unwrap(),
            ));
            rest = &rest[at + 3..];
        }
        out + rest
    }
}
