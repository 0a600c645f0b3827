//! Settings of an overlay store and its daemon, by Nix's names: built-in values, then `nix.conf` for what Nix has
//! too, then `understory.toml`, then the environment, then flags. Each value knows where it comes from, so that
//! messages can say it.
//!
//! - `understory.toml` is `/etc/understory/understory.toml`, then `understory/understory.toml` in the user's
//!   configuration directory; a file that is named replaces both. Keys are Nix's names; a list is an array or a string
//!   of words. `extra-NAME` adds to a list, as in `nix.conf`. A key that is not known is an error.
//! - In the environment `UNDERSTORY_` goes before the name, in capitals and underscores. A list that is set to nothing
//!   is empty; everything else that is set to nothing is not set.
//! - Lines of `nix.conf` that are none of ours are Nix's own affair and are left alone.

mod table;

use crate::daemon::ServerOptions;
use crate::generation::stack::Thresholds;
use crate::metrics::Address;
use crate::{Error, Result, nix_conf};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use table::Definition;
use understory_nix::PublicKeys;

/// Bytes of an `understory.toml`; real ones have a few hundred.
const TOML_BYTES_MAX: u64 = 1 << 20;
/// What stock Nix substitutes from when nobody says otherwise, and the key it trusts (2.26.3 and 2.34.8).
const NIX_SUBSTITUTER: &str = "https://cache.nixos.org/";
const NIX_PUBLIC_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
/// The machine's file.
pub const SYSTEM_FILE: &str = "/etc/understory/understory.toml";

/// What an overlay store goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `substituters`: URLs, as given; order counts among equal priorities.
    pub substituters: Vec<String>,
    /// `trusted-substituters`: what clients without trust may choose, too.
    pub trusted_substituters: BTreeSet<String>,
    /// `trusted-public-keys`.
    pub trusted_public_keys: PublicKeys,
    /// `require-sigs`.
    pub require_signatures: bool,
    /// `substitute`.
    pub substitute: bool,
    /// `fallback`: build when a substitute fails.
    pub fallback: bool,
    /// `max-substitution-jobs`: archives at a time.
    pub substitution_jobs: usize,
    /// `http-connections`: requests at a time to one host; 0 is no limit.
    pub http_connections: usize,
    /// `connect-timeout`.
    pub connect_timeout: Duration,
    /// `stalled-download-timeout`: how long no byte may come.
    pub stalled_timeout: Duration,
    /// `download-attempts`.
    pub download_attempts: u32,
    /// `narinfo-cache-positive-ttl`.
    pub narinfo_positive_ttl: Duration,
    /// `narinfo-cache-negative-ttl`.
    pub narinfo_negative_ttl: Duration,
    /// `ssl-cert-file`.
    pub ssl_cert_file: Option<PathBuf>,
    /// `netrc-file`.
    pub netrc_file: Option<PathBuf>,
    /// `keep-outputs`.
    pub keep_outputs: bool,
    /// `keep-derivations`.
    pub keep_derivations: bool,
    /// `auto-optimise-store`: files that are added to the upper are linked to equal ones there.
    pub auto_optimise: bool,
    /// `fsync-store-paths`: objects in the upper are durable before they are valid.
    pub fsync_store_paths: bool,
    /// `trusted-users`: names, `@group` or `*`.
    pub trusted_users: Vec<String>,
    /// `allowed-users`: names, `@group` or `*`.
    pub allowed_users: Vec<String>,
    /// `build-users-group`: its members may not connect. Empty is none.
    pub build_users_group: String,
    /// `mask-hash-parts`: the castore masks hash parts in what it stores from now on.
    pub mask_hash_parts: bool,
    /// The Nix that builds: a `nix` or `nix-daemon` program. `None` looks in `PATH` and the usual places.
    pub nix: Option<PathBuf>,
    /// Additional lower stores by URL, uppermost first, below our own castore.
    pub lowers: Vec<String>,
    /// `image-renew`: while an instance runs, its overlay moves on to new generations.
    pub image_renew: bool,
    /// `image-paths-min`: from so many paths on the overlay of an instance stands on an image.
    pub image_paths_min: u64,
    /// `image-newer-paths-max`: more paths that came after a generation are reason for another one.
    pub image_newer_paths_max: u64,
    /// `metrics`: where an instance serves its numbers; `None` is nowhere.
    pub metrics: Option<Address>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            substituters: Vec::new(),
            trusted_substituters: BTreeSet::new(),
            trusted_public_keys: PublicKeys::default(),
            require_signatures: true,
            substitute: true,
            fallback: false,
            substitution_jobs: 16,
            http_connections: 25,
            connect_timeout: Duration::from_secs(15),
            stalled_timeout: Duration::from_secs(300),
            download_attempts: 5,
            narinfo_positive_ttl: Duration::from_secs(30 * 24 * 3600),
            narinfo_negative_ttl: Duration::from_secs(3600),
            ssl_cert_file: None,
            netrc_file: None,
            keep_outputs: false,
            keep_derivations: true,
            auto_optimise: false,
            fsync_store_paths: false,
            trusted_users: vec!["root".to_owned()],
            allowed_users: vec!["*".to_owned()],
            build_users_group: "nixbld".to_owned(),
            mask_hash_parts: true,
            nix: None,
            lowers: Vec::new(),
            image_renew: true,
            image_paths_min: Thresholds::default().paths_min,
            image_newer_paths_max: Thresholds::default().newer_paths_max,
            metrics: None,
        }
    }
}

impl Settings {
    /// When an image pays.
    pub fn thresholds(&self) -> Thresholds {
        Thresholds {
            paths_min: self.image_paths_min,
            newer_paths_max: self.image_newer_paths_max,
        }
    }
    /// Who may use a daemon with these settings, and what for.
    pub fn server_options(&self) -> ServerOptions {
        ServerOptions {
            trusted_users: self.trusted_users.clone(),
            allowed_users: self.allowed_users.clone(),
            trusted_public_keys: self.trusted_public_keys.clone(),
            require_signatures: self.require_signatures,
            build_users_group: Some(self.build_users_group.clone())
                .filter(|group| !group.is_empty()),
            ..ServerOptions::default()
        }
    }
}

/// Who said a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nix's configuration: a file, or `NIX_CONFIG`.
    NixConf(PathBuf),
    /// An `understory.toml`.
    File(PathBuf),
    /// A variable of the environment.
    Environment(String),
    /// The command line.
    Flag,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NixConf(path) | Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => write!(f, "{name} in the environment"),
            Self::Flag => f.write_str("the command line"),
        }
    }
}

/// A setting as text, and who said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Nix's name.
    pub name: &'static str,
    /// As it would stand in `nix.conf`.
    pub text: String,
    /// Nobody: the built-in value. Several: `extra-NAME` has added to it.
    pub origins: Vec<Origin>,
}

/// Where settings are read.
pub struct Sources<'a> {
    /// Read `nix.conf`, too, and begin with Nix's own substituter and key as stock Nix does. Without, there are none.
    pub nix_conf: bool,
    /// Instead of the usual files.
    pub file: Option<PathBuf>,
    /// The environment.
    pub environment: &'a dyn Fn(&str) -> Option<OsString>,
    /// Name and value of what the command line says; names as in [`names`], or with `extra-`.
    pub flags: Vec<(String, String)>,
}

/// Settings, and where each comes from.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// What they mean.
    pub settings: Settings,
    values: BTreeMap<&'static str, Value>,
}

impl Resolved {
    /// Reads everything.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown name (with the nearest one as a hint), a value that is none: with the
    /// place that says it.
    pub fn load(sources: &Sources<'_>) -> Result<Self> {
        let mut values = built_in(sources);
        if sources.nix_conf {
            for line in nix_conf::read_all(sources.environment)? {
                if let Some((definition, adds)) = table::find(&line.name).filter(|(d, _)| d.nix) {
                    let origin = Origin::NixConf(line.origin.to_path_buf());
                    put(&mut values, definition, adds, &line.value, origin)?;
                }
            }
        }
        for path in files(sources) {
            read_toml(&path, &mut values)?;
        }
        for definition in table::DEFINITIONS {
            for adds in [false, true] {
                let name = variable(definition.name, adds);
                let Some(text) = (sources.environment)(&name) else {
                    continue;
                };
                if adds && !definition.kind.is_list()
                    || text.is_empty() && !definition.kind.is_list()
                {
                    continue;
                }
                let text = text
                    .into_string()
                    .map_err(|_| Error::user(format!("{name} is not UTF-8")))?;
                put(
                    &mut values,
                    definition,
                    adds,
                    &text,
                    Origin::Environment(name),
                )?;
            }
        }
        for (name, text) in &sources.flags {
            let (definition, adds) =
                table::find(name).ok_or_else(|| unknown(name, Some("the command line")))?;
            put(&mut values, definition, adds, text, Origin::Flag)?;
        }
        let mut settings = Settings::default();
        for (name, value) in &values {
            if let Some((definition, _)) = table::find(name) {
                (definition.set)(&mut settings, &value.text)
                    .map_err(|e| e.of(name, &value.text))?;
            }
        }
        Ok(Self { settings, values })
    }
    /// One setting.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(table::find(name)?.0.name)
    }
    /// One setting that must be there.
    ///
    /// # Errors
    /// No such setting, with the nearest name as a hint.
    pub fn require(&self, name: &str) -> Result<&Value> {
        self.value(name).ok_or_else(|| unknown(name, None))
    }
    /// All settings, by name.
    pub fn values(&self) -> impl Iterator<Item = &Value> {
        self.values.values()
    }
    /// What Nix has too and was not said in its own configuration: a Nix that works for us must be told.
    pub fn for_nix(&self) -> Vec<(String, String)> {
        let ours = |value: &&Value| {
            let told = |o: &Origin| !matches!(o, Origin::NixConf(_));
            value.origins.iter().any(told) && table::find(value.name).is_some_and(|(d, _)| d.nix)
        };
        self.values()
            .filter(ours)
            .map(|value| (value.name.to_owned(), value.text.clone()))
            .collect()
    }
}

/// The names of all settings.
pub fn names() -> impl Iterator<Item = &'static str> {
    table::DEFINITIONS.iter().map(|definition| definition.name)
}

/// The files that are read: those that are there, or the one that is named.
fn files(sources: &Sources<'_>) -> Vec<PathBuf> {
    if let Some(file) = &sources.file {
        return vec![file.clone()];
    }
    let var = |name: &str| (sources.environment)(name).map(PathBuf::from);
    let user = var("XDG_CONFIG_HOME")
        .filter(|dir| dir.is_absolute())
        .or_else(|| var("HOME").map(|home| home.join(".config")))
        .map(|dir| dir.join("understory/understory.toml"));
    [Some(PathBuf::from(SYSTEM_FILE)), user]
        .into_iter()
        .flatten()
        .filter(|file| file.is_absolute() && file.exists())
        .collect()
}

fn built_in(sources: &Sources<'_>) -> BTreeMap<&'static str, Value> {
    let settings = Settings {
        ssl_cert_file: ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"]
            .into_iter()
            .filter_map(|name| (sources.environment)(name).filter(|v| !v.is_empty()))
            .map(PathBuf::from)
            .next(),
        netrc_file: Some(nix_conf::conf_dir(sources.environment).join("netrc"))
            .filter(|file| sources.nix_conf && file.exists()),
        ..Settings::default()
    };
    let value = |definition: &Definition| Value {
        name: definition.name,
        text: (definition.get)(&settings),
        origins: Vec::new(),
    };
    let mut out: BTreeMap<&'static str, Value> = table::DEFINITIONS
        .iter()
        .map(|definition| (definition.name, value(definition)))
        .collect();
    if sources.nix_conf {
        let nix = [
            ("substituters", NIX_SUBSTITUTER),
            ("trusted-public-keys", NIX_PUBLIC_KEY),
        ];
        for (name, text) in nix {
            if let Some(value) = out.get_mut(name) {
                text.clone_into(&mut value.text);
            }
        }
    }
    out
}

/// Changes a value, and checks it so that the message can name the place.
fn put(
    values: &mut BTreeMap<&'static str, Value>,
    definition: &Definition,
    adds: bool,
    text: &str,
    origin: Origin,
) -> Result<()> {
    (definition.set)(&mut Settings::default(), text).map_err(|e| {
        e.of(definition.name, text)
            .within(Path::new(&origin.to_string()))
    })?;
    if let Some(value) = values.get_mut(definition.name) {
        if adds {
            nix_conf::append(&mut value.text, text);
        } else {
            text.clone_into(&mut value.text);
            value.origins.clear();
        }
        value.origins.push(origin);
    }
    Ok(())
}

fn read_toml(path: &Path, values: &mut BTreeMap<&'static str, Value>) -> Result<()> {
    let size = std::fs::metadata(path)
        .map_err(|e| Error::io("reading", path, e))?
        .len();
    if size > TOML_BYTES_MAX {
        return Err(Error::user(format!(
            "{}: expected a configuration file of at most {TOML_BYTES_MAX} bytes, found {size}",
            path.display()
        )));
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("reading", path, e))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e
            .span()
            .map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Error::user(format!("{}: line {line}: {}", path.display(), e.message()))
    })?;
    // `extra-` after what it adds to, whatever the order in the file.
    let (extra, plain): (Vec<_>, Vec<_>) = table
        .iter()
        .partition(|(name, _)| table::find(name).is_some_and(|(_, adds)| adds));
    for (name, value) in plain.into_iter().chain(extra) {
        let (definition, adds) =
            table::find(name).ok_or_else(|| unknown(name, Some(&path.display().to_string())))?;
        let text = toml_text(value, definition.kind.is_list()).ok_or_else(|| {
            Error::user(format!(
                "{}: {name}: expected {}, found {}",
                path.display(),
                definition.kind,
                value.type_str()
            ))
        })?;
        put(
            values,
            definition,
            adds,
            &text,
            Origin::File(path.to_owned()),
        )?;
    }
    Ok(())
}

/// A value as `nix.conf` has it; `None` for what has no such form.
fn toml_text(value: &toml::Value, list: bool) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(yes) => Some(yes.to_string()),
        toml::Value::Array(items) if list => items
            .iter()
            .map(|item| {
                item.as_str()
                    .filter(|word| !word.contains(char::is_whitespace))
            })
            .collect::<Option<Vec<_>>>()
            .map(|words| words.join(" ")),
        _ => None,
    }
}

/// `UNDERSTORY_` and the name in capitals.
fn variable(name: &str, adds: bool) -> String {
    let name = name.replace('-', "_").to_ascii_uppercase();
    format!("UNDERSTORY_{}{name}", if adds { "EXTRA_" } else { "" })
}

fn unknown(name: &str, place: Option<&str>) -> Error {
    let error = match place {
        Some(place) => Error::user(format!("{place}: unknown setting '{name}'")),
        None => Error::user(format!("unknown setting '{name}'")),
    };
    let plain = name.strip_prefix("extra-").unwrap_or(name);
    match names().min_by_key(|known| distance(plain, known)) {
        Some(near) if distance(plain, near) <= 1 + plain.len() / 4 => {
            error.with_hint(format!("did you mean `{near}`?"))
        }
        _ => error.with_hint("`understory config names` lists all settings"),
    }
}

/// How many letters must be changed, added or left out (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b = b.as_bytes();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
