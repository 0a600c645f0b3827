//! `netrc`: names and passwords for hosts.

use crate::{Error, Result};
use std::path::Path;

/// Longest file that is read.
const NETRC_BYTES_MAX: u64 = 1 << 20;

/// The entries of a file, in order.
#[derive(Default)]
pub(super) struct Netrc(Vec<Entry>);

#[derive(Default)]
struct Entry {
    /// `None` is `default`.
    host: Option<String>,
    login: String,
    password: String,
}

impl Netrc {
    /// Reads the file; one that is not there has no entries.
    pub(super) fn read(file: &Path) -> Result<Self> {
        use std::io::Read;
        let open = match std::fs::File::open(file) {
            Ok(open) => open,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(Error::io("opening", file, e)),
        };
        let mut text = String::new();
        open.take(NETRC_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(|e| Error::io("reading", file, e))?;
        Ok(Self::parse(&text))
    }
    /// Name and password for a host.
    pub(super) fn find(&self, host: &str) -> Option<(&str, &str)> {
        self.0
            .iter()
            .find(|entry| {
                entry
                    .host
                    .as_deref()
                    .is_none_or(|name| name.eq_ignore_ascii_case(host))
            })
            .map(|entry| (entry.login.as_str(), entry.password.as_str()))
    }
    fn parse(text: &str) -> Self {
        let mut entries: Vec<Entry> = Vec::new();
        let mut words = Vec::new();
        let mut in_macro = false;
        for line in text.lines() {
            // A macro ends with an empty line.
            if in_macro {
                in_macro = !line.trim().is_empty();
                continue;
            }
            if line.trim_start().starts_with('#') {
                continue;
            }
            for word in line.split_whitespace() {
                if word == "macdef" {
                    in_macro = true;
                    break;
                }
                words.push(word);
            }
        }
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word {
                "machine" => {
                    if let Some(host) = words.next() {
                        entries.push(Entry {
                            host: Some(host.to_owned()),
                            ..Entry::default()
                        });
                    }
                }
                "default" => entries.push(Entry::default()),
                "login" | "password" | "account" => {
                    let value = words.next().unwrap_or_default().to_owned();
                    if let Some(entry) = entries.last_mut() {
                        match word {
                            "login" => entry.login = value,
                            "password" => entry.password = value,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Self(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hosts_default_comments_and_macros() {
        let netrc = Netrc::parse(
            "# all\nmachine a.example login me password s3cret\nmacdef init\nmachine no\n\nmachine B.example\n  login you\n  password p\ndefault login anon password x\n",
        );
        assert_eq!(netrc.find("a.example"), Some(("me", "s3cret")));
        assert_eq!(netrc.find("b.example"), Some(("you", "p")));
        assert_eq!(netrc.find("no"), Some(("anon", "x")));
        assert_eq!(Netrc::parse("machine a login b").find("c"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = Netrc::parse(&text).find("x");
        }
    }
}
