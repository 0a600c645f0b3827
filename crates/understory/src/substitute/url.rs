//! URLs of stores: scheme, place, parameters.

use crate::{Error, Result};
use std::collections::BTreeMap;

/// A parsed URL of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoreUrl {
    /// `https`, `file`, `daemon` and so on.
    pub(super) scheme: String,
    /// What stands between `://` and `?`, percent-encoding and all; without slashes at its end.
    pub(super) place: String,
    /// Parameters, decoded.
    pub(super) params: BTreeMap<String, String>,
}

impl StoreUrl {
    /// Parses it. A path means a local store, as `local` does, not a binary cache.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let (body, query) = text.split_once('?').unwrap_or((text, ""));
        let (scheme, place) = match body.split_once("://") {
            Some((scheme, place)) => (scheme, place),
            None if body == "daemon" => ("daemon", ""),
            None if body == "local" || body.starts_with('/') => ("local", body),
            None => {
                return Err(Error::user(format!(
                    "don't know how to open Nix store with URI '{text}'"
                ))
                .with_hint("substituters are https://, http://, file://, s3://, unix://, daemon, ssh-ng:// or a local store's path"));
            }
        };
        let params = url::form_urlencoded::parse(query.as_bytes())
            .map(|(name, value)| (name.into_owned(), value.into_owned()))
            .collect();
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            place: place.trim_end_matches('/').to_owned(),
            params,
        })
    }
    /// The URL without parameters, as messages and caches name the store.
    pub(super) fn display(&self) -> String {
        if self.scheme == "daemon" && self.place.is_empty() {
            return "daemon".to_owned();
        }
        if self.scheme == "local" {
            return self.place.clone();
        }
        match self.place.rsplit_once('@') {
            // Passwords are nobody's business.
            Some((user, host)) if self.scheme.starts_with("http") && !user.contains('/') => {
                format!("{}://{host}", self.scheme)
            }
            _ => format!("{}://{}", self.scheme, self.place),
        }
    }
    /// A parameter.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }
    /// A parameter that is true or false, in Nix's spelling.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.param(name) {
            None => Ok(None),
            Some("true" | "yes" | "1") => Ok(Some(true)),
            Some("false" | "no" | "0") => Ok(Some(false)),
            Some(other) => Err(Error::user(format!(
                "Boolean setting '{name}' has invalid value '{other}'"
            ))),
        }
    }
    /// The place with its percent-encoding undone, as a path of this machine.
    pub(super) fn path(&self) -> String {
        percent_decode(&self.place)
    }
}

/// Undoes percent-encoding.
pub(super) fn percent_decode(text: &str) -> String {
    // A plus sign stands for itself outside of queries.
    let text = text.replace('+', "%2B");
    url::form_urlencoded::parse(format!("x={text}").replace('&', "%26").as_bytes())
        .next()
        .map_or_else(String::new, |(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(text: String) {
            if let Ok(url) = StoreUrl::parse(&text) {
                let _ = (url.display(), url.path());
            }
        }
        #[test]
        fn paths_survive(path in "/[a-zA-Z0-9 %+&=é-]{1,20}[a-z]") {
            let encoded: String = url::form_urlencoded::byte_serialize(path.as_bytes())
                .collect::<String>()
                .replace('+', "%20");
            prop_assert_eq!(StoreUrl::parse(&format!("file://{encoded}")).unwrap().path(), path);
        }
    }

    #[test]
    fn kinds() {
        let url =
            StoreUrl::parse("HTTPS://u:p@cache.example.org/a%20b/?priority=3&trusted=1").unwrap();
        assert_eq!(url.scheme, "https");
        assert_eq!(url.display(), "https://cache.example.org/a%20b");
        assert_eq!(url.param("priority"), Some("3"));
        assert_eq!(url.flag("trusted").unwrap(), Some(true));
        assert_eq!(url.flag("want-mass-query").unwrap(), None);
        let file = StoreUrl::parse("file:///a%20b+c&d/").unwrap();
        assert_eq!(
            (file.path().as_str(), file.display().as_str()),
            ("/a b+c&d", "file:///a%20b+c&d")
        );
        assert_eq!(StoreUrl::parse("daemon").unwrap().display(), "daemon");
        let local = StoreUrl::parse("/nix").unwrap();
        assert_eq!(
            (local.scheme.as_str(), local.path().as_str()),
            ("local", "/nix")
        );
        assert_eq!(
            StoreUrl::parse("nix").unwrap_err().to_string(),
            "don't know how to open Nix store with URI 'nix'"
        );
        assert_eq!(
            StoreUrl::parse("file:///x?trusted=maybe")
                .unwrap()
                .flag("trusted")
                .unwrap_err()
                .to_string(),
            "Boolean setting 'trusted' has invalid value 'maybe'"
        );
    }
}
