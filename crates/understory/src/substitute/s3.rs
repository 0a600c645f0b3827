//! `s3://BUCKET[/PREFIX]?region=&endpoint=&scheme=&profile=&addressing-style=`: a binary cache in an object storage,
//! by signed URLs over the HTTP client.
//!
//! Credentials are those of `AWS_ACCESS_KEY_ID` and its like, else those of the profile in the file of AWS's own tools;
//! without any, requests are anonymous.

use super::files::{Attempts, Body, Context, Failure, Files};
use super::http::Http;
use super::url::{StoreUrl, percent_decode};
use crate::{Error, Result};
use rusty_s3::actions::{GetObject, S3Action};
use rusty_s3::{Bucket, Credentials, UrlStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// How long a signed URL is good: for one request, and redirects.
const SIGNED_FOR: Duration = Duration::from_secs(15 * 60);
/// Nix's default.
const REGION: &str = "us-east-1";

/// The files of a bucket.
pub(super) struct S3Files {
    http: Arc<Http>,
    bucket: Bucket,
    credentials: Option<Credentials>,
    /// Of all keys; empty, or ends with a slash.
    prefix: String,
    /// Of the store, for messages.
    place: String,
}

impl S3Files {
    /// # Errors
    /// A parameter or a bucket's name that cannot be; the file with credentials cannot be read.
    pub(super) fn new(http: Arc<Http>, url: &StoreUrl) -> Result<Self> {
        let (name, prefix) = url.place.split_once('/').unwrap_or((&url.place, ""));
        if name.is_empty() {
            return Err(Error::user("an s3:// URL needs the name of a bucket"));
        }
        let region = match url.param("region") {
            Some(region) if !region.is_empty() => region.to_owned(),
            _ => REGION.to_owned(),
        };
        let scheme = url
            .param("scheme")
            .filter(|s| !s.is_empty())
            .unwrap_or("https");
        let endpoint = url.param("endpoint").filter(|e| !e.is_empty());
        let text = match endpoint {
            Some(endpoint) if endpoint.contains("://") => endpoint.to_owned(),
            Some(endpoint) => format!("{scheme}://{endpoint}"),
            None => format!("{scheme}://s3.{region}.amazonaws.com"),
        };
        let base = Url::parse(&text)
            .map_err(|e| Error::user(format!("invalid endpoint '{text}'")).with_source(e))?;
        let style = match url.param("addressing-style").unwrap_or("auto") {
            "virtual" => UrlStyle::VirtualHost,
            "path" => UrlStyle::Path,
            // A certificate does not cover names with dots.
            "auto" if endpoint.is_none() && !name.contains('.') => UrlStyle::VirtualHost,
            "auto" => UrlStyle::Path,
            other => {
                return Err(Error::user(format!(
                    "unknown addressing-style '{other}': expected auto, path or virtual"
                )));
            }
        };
        let bucket = Bucket::new(base, style, name.to_owned(), region).map_err(|e| {
            Error::user(format!("invalid bucket '{name}' at '{text}'")).with_source(e)
        })?;
        let prefix = percent_decode(prefix);
        Ok(Self {
            http,
            bucket,
            credentials: credentials(url.param("profile"))?,
            prefix: if prefix.is_empty() {
                prefix
            } else {
                format!("{prefix}/")
            },
            place: url.display(),
        })
    }
    /// The key of a relative URL.
    fn key(&self, url: &str) -> Result<String, Failure> {
        let plain =
            !url.contains("://") && url.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !plain {
            return Err(Failure::Final(Error::corrupt(format!(
                "the URL '{url}' does not lead into the binary cache {}",
                self.place
            ))));
        }
        Ok(format!("{}{url}", self.prefix))
    }
    fn sign(&self, key: &str) -> Url {
        GetObject::new(&self.bucket, self.credentials.as_ref(), key).sign(SIGNED_FOR)
    }
}

impl Files for S3Files {
    fn read(
        &self,
        name: &str,
        bytes_max: usize,
        context: Context<'_>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let key = self.key(name)?;
        self.http
            .read(&self.sign(&key), &self.place(name), bytes_max, context)
    }
    fn open<'a>(
        &'a self,
        url: &str,
        attempts: &'a Attempts,
        context: Context<'a>,
    ) -> Result<Option<Body<'a>>, Failure> {
        let key = self.key(url)?;
        self.http
            .open(move || self.sign(&key), &self.place(url), attempts, context)
    }
    fn place(&self, url: &str) -> String {
        format!("{}/{url}", self.place)
    }
    fn parallel(&self) -> usize {
        self.http.connections()
    }
    fn attempts(&self) -> u32 {
        self.http.attempts()
    }
}

/// Of the environment, unless a profile is named; else of the profile.
fn credentials(profile: Option<&str>) -> Result<Option<Credentials>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if profile.is_none()
        && let (Some(key), Some(secret)) = (
            variable("AWS_ACCESS_KEY_ID"),
            variable("AWS_SECRET_ACCESS_KEY"),
        )
    {
        return Ok(Some(match variable("AWS_SESSION_TOKEN") {
            Some(token) => Credentials::new_with_token(key, secret, token),
            None => Credentials::new(key, secret),
        }));
    }
    let file = match variable("AWS_SHARED_CREDENTIALS_FILE") {
        Some(file) => PathBuf::from(file),
        None => match variable("HOME") {
            Some(home) => PathBuf::from(home).join(".aws/credentials"),
            None => return Ok(None),
        },
    };
    let profile = profile
        .map(str::to_owned)
        .or_else(|| variable("AWS_PROFILE"))
        .unwrap_or_else(|| "default".to_owned());
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(of_profile(&text, &profile)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("reading", file, e)),
    }
}

/// The credentials of a profile: sections of `key = value` lines.
fn of_profile(text: &str, profile: &str) -> Option<Credentials> {
    let (mut key, mut secret, mut token) = (None, None, None);
    let mut here = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            here = name.trim() == profile;
        } else if here && let Some((name, value)) = line.split_once('=') {
            let value = Some(value.trim().to_owned());
            match name.trim() {
                "aws_access_key_id" => key = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(match token {
        Some(token) => Credentials::new_with_token(key?, secret?, token),
        None => Credentials::new(key?, secret?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(text: String, profile: String) {
            let _ = of_profile(&text, &profile);
        }
    }

    #[test]
    fn profiles() {
        let text = "[default]\naws_access_key_id = A\naws_secret_access_key=B\n\n[ other ]\naws_access_key_id=C\naws_secret_access_key=D\naws_session_token=E\n[half]\naws_access_key_id=F\n";
        let of = |profile| {
            of_profile(text, profile).map(|c| {
                (
                    c.key().to_owned(),
                    c.secret().to_owned(),
                    c.token().map(str::to_owned),
                )
            })
        };
        assert_eq!(of("default"), Some(("A".into(), "B".into(), None)));
        assert_eq!(
            of("other"),
            Some(("C".into(), "D".into(), Some("E".into())))
        );
        assert_eq!(of("half"), None);
        assert_eq!(of("none"), None);
    }
}
