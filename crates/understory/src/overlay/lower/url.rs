//! URLs of lower stores.
//!
//! What Nix takes for a store with files, with its parameters and defaults, percent-decoded once. A URL that was
//! encoded as a whole, as it stands in the value of `lower-store`, is understood too.

use crate::import::decode;
use crate::{Error, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use understory_nix::StoreDir;

/// Where Nix's own daemon listens.
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// What a URL names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A daemon.
    Daemon {
        /// Its socket.
        socket: PathBuf,
        /// Where its objects are.
        real: PathBuf,
    },
    /// A store of this machine.
    Local {
        /// Where its objects are.
        real: PathBuf,
        /// Where its database is.
        state: PathBuf,
    },
}

impl Place {
    /// Reads the URL of a lower store of an overlay whose store directory is `store_dir`.
    pub(super) fn parse(url: &str, store_dir: &StoreDir) -> Result<Self> {
        let text = if url.contains('%') && !url.contains('?') {
            decode(url)?.into_string().map_err(|_| {
                Error::user(format!("the URL of the lower store, '{url}', is not UTF-8"))
            })?
        } else {
            url.to_owned()
        };
        let is_decoded = text != url;
        let piece = |piece: &str| -> Result<OsString> {
            if is_decoded {
                Ok(piece.into())
            } else {
                decode(piece)
            }
        };
        let (address, query) = text.split_once('?').unwrap_or((&text, ""));
        let mut parameters = Parameters::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            parameters.set(url, name, piece(value)?, store_dir)?;
        }
        let (scheme, rest) = match address.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None => (address, ""),
        };
        match (scheme, address.contains("://")) {
            ("", false) => Err(Error::user("the lower store has no URL").with_hint(KINDS)),
            ("auto", false) => Err(refused(url, "which store that is depends on who asks")),
            ("daemon", false) => Ok(parameters.daemon(PathBuf::from(DAEMON_SOCKET), store_dir)),
            ("unix", _) => {
                let socket = match rest {
                    "" => PathBuf::from(DAEMON_SOCKET),
                    rest => PathBuf::from(piece(rest)?),
                };
                if !socket.is_absolute() {
                    return Err(refused(
                        url,
                        &format!("the socket's path, {}, is not absolute", socket.display()),
                    ));
                }
                Ok(parameters.daemon(socket, store_dir))
            }
            ("local", _) => {
                if !rest.is_empty() {
                    parameters.root.get_or_insert(piece(rest)?);
                }
                parameters.local(store_dir)
            }
            ("local-overlay", _) => Err(refused(url, "an overlay store is reached by its daemon")
                .with_hint("run its daemon and name that: `unix://SOCKET?real=MERGED-DIRECTORY`")),
            (_, false) if address.contains('/') => {
                parameters.root.get_or_insert(piece(address)?);
                parameters.local(store_dir)
            }
            (
                "http" | "https" | "s3" | "file" | "ssh" | "ssh-ng" | "mounted-ssh-ng" | "dummy",
                _,
            ) => Err(refused(
                url,
                &format!("a store of scheme `{scheme}` has no store directory on this machine"),
            )),
            _ => Err(refused(url, &format!("`{scheme}` is no kind of store"))),
        }
    }
}

/// What can be a lower store.
const KINDS: &str = "a lower store is `unix://SOCKET?real=DIR`, `daemon`, `local?root=DIR` or a path; as a value inside \
     another URL it is percent-encoded once";

fn refused(url: &str, why: &str) -> Error {
    Error::user(format!("lower store '{url}': {why}")).with_hint(KINDS)
}

/// What says where things are.
#[derive(Default)]
struct Parameters {
    root: Option<OsString>,
    real: Option<OsString>,
    state: Option<OsString>,
}

impl Parameters {
    fn set(&mut self, url: &str, name: &str, value: OsString, ours: &StoreDir) -> Result<()> {
        if value.is_empty() {
            return Ok(());
        }
        match name {
            "root" => self.root = Some(value),
            "real" => self.real = Some(value),
            "state" => self.state = Some(value),
            "store" => {
                let found = StoreDir::new(&value.to_string_lossy())?;
                if found != *ours {
                    return Err(Error::user(format!(
                        "lower store '{url}' has store directory '{found}', expected '{ours}'"
                    ))
                    .with_hint(
                        "paths are valid in their own store directory only: all layers must have the same",
                    ));
                }
            }
            // Settings of Nix that say nothing about where things are. We never write to a lower store.
            "log"
            | "read-only"
            | "trusted"
            | "require-sigs"
            | "priority"
            | "want-mass-query"
            | "path-info-cache-size"
            | "system-features"
            | "build-dir"
            | "max-connections"
            | "max-connection-age" => {}
            other => tracing::warn!("unknown parameter `{other}` of lower store '{url}'"),
        }
        Ok(())
    }

    fn daemon(self, socket: PathBuf, store_dir: &StoreDir) -> Place {
        let real = self.real(store_dir);
        Place::Daemon { socket, real }
    }

    fn local(self, store_dir: &StoreDir) -> Result<Place> {
        let root = self.root.clone().map_or_else(|| "/".into(), PathBuf::from);
        let state = self
            .state
            .clone()
            .map_or_else(|| root.join("nix/var/nix"), PathBuf::from);
        Ok(Place::Local {
            real: absolute(&self.real(store_dir))?,
            state: absolute(&state)?,
        })
    }

    fn real(&self, store_dir: &StoreDir) -> PathBuf {
        match (&self.real, &self.root) {
            (Some(real), _) => PathBuf::from(real),
            (None, Some(root)) => Path::new(root).join("nix/store"),
            (None, None) => PathBuf::from(store_dir.as_str()),
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("finding", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(url: &str) -> Result<Place> {
        Place::parse(url, &StoreDir::default())
    }
    fn daemon(socket: &str, real: &str) -> Place {
        Place::Daemon {
            socket: socket.into(),
            real: real.into(),
        }
    }
    fn local(real: &str, state: &str) -> Place {
        Place::Local {
            real: real.into(),
            state: state.into(),
        }
    }

    #[test]
    fn daemons() {
        for (url, expected) in [
            ("daemon", daemon(DAEMON_SOCKET, "/nix/store")),
            ("unix://", daemon(DAEMON_SOCKET, "/nix/store")),
            ("daemon?root=/r", daemon(DAEMON_SOCKET, "/r/nix/store")),
            (
                "unix:///run/l.sock?real=/lower/nix/store",
                daemon("/run/l.sock", "/lower/nix/store"),
            ),
            (
                "unix:///run/l.sock?real=%2Flower&store=/nix/store/&max-connections=3",
                daemon("/run/l.sock", "/lower"),
            ),
            // As the value of `lower-store`, not decoded.
            (
                "unix%3A%2F%2F%2Frun%2Fl.sock%3Freal%3D%2Flower%26root%3D%2Fx",
                daemon("/run/l.sock", "/lower"),
            ),
            (
                "unix:///a%20b?root=/c%3Fd?e=f",
                daemon("/a b", "/c?d?e=f/nix/store"),
            ),
        ] {
            assert_eq!(parse(url).unwrap(), expected, "{url}");
        }
    }

    #[test]
    fn local_stores() {
        for (url, expected) in [
            ("local", local("/nix/store", "/nix/var/nix")),
            ("/lower", local("/lower/nix/store", "/lower/nix/var/nix")),
            ("local?root=/lower", parse("/lower").unwrap()),
            ("local:///lower", parse("/lower").unwrap()),
            ("/lower?read-only=true", parse("/lower").unwrap()),
            // Users forget where to encode.
            ("/lower%3Fread-only=true", parse("/lower").unwrap()),
            ("local?root=/l&real=/r", local("/r", "/l/nix/var/nix")),
            ("local?real=/r&state=/s&log=/g", local("/r", "/s")),
            ("local?root=", parse("local").unwrap()),
        ] {
            assert_eq!(parse(url).unwrap(), expected, "{url}");
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            parse("./lower").unwrap(),
            local(
                here.join("lower/nix/store").to_str().unwrap(),
                here.join("lower/nix/var/nix").to_str().unwrap()
            )
        );
        let other = StoreDir::new("/t/store").unwrap();
        assert_eq!(
            Place::parse("local", &other).unwrap(),
            local("/t/store", "/nix/var/nix")
        );
    }

    #[test]
    fn what_is_no_lower_store() {
        for (url, expected) in [
            ("", "the lower store has no URL"),
            (
                "auto",
                "lower store 'auto': which store that is depends on who asks",
            ),
            (
                "https://cache.example.org",
                "lower store 'https://cache.example.org': a store of scheme `https` has no store directory on this machine",
            ),
            (
                "ssh-ng://host",
                "lower store 'ssh-ng://host': a store of scheme `ssh-ng` has no store directory on this machine",
            ),
            (
                "local-overlay://?root=/x",
                "lower store 'local-overlay://?root=/x': an overlay store is reached by its daemon",
            ),
            (
                "locale",
                "lower store 'locale': `locale` is no kind of store",
            ),
            (
                "unix://run/x",
                "lower store 'unix://run/x': the socket's path, run/x, is not absolute",
            ),
            ("local?root=%zz", "invalid percent-encoding in '%zz'"),
            (
                "/lower?store=/t/store",
                "lower store '/lower?store=/t/store' has store directory '/t/store', expected '/nix/store'",
            ),
        ] {
            assert_eq!(parse(url).unwrap_err().to_string(), expected, "{url}");
        }
        assert!(
            parse("")
                .unwrap_err()
                .hint()
                .unwrap()
                .contains("percent-encoded once")
        );
    }

    proptest! {
        #[test]
        fn never_panics(url in "\\PC{0,60}") {
            let _ = parse(&url);
        }
        #[test]
        fn encoded_as_a_whole_is_the_same(root in "/[a-z/ %?&=#+]{0,20}") {
            let encode = |text: &str| -> String {
                text.bytes().map(|byte| format!("%{byte:02X}")).collect()
            };
            let url = format!("unix:///s?real={}", encode(&root));
            prop_assert_eq!(parse(&url).unwrap(), daemon("/s", &root));
            let simple = format!("unix:///s?real={}", root.replace(['%', '&', '?'], ""));
            prop_assert_eq!(parse(&encode(&simple)).unwrap(), parse(&simple).unwrap());
        }
    }
}
