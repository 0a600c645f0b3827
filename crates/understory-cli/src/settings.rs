//! Settings on the command line: what `up` and `overlay` share.

use crate::env;
use crate::error::{CommandError, Result};
use std::path::{Path, PathBuf};
use understory::config;
use understory::settings::{Resolved, Sources};

/// Settings that can be given as flags; `understory.toml`, the environment and nix.conf hold them, too.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Settings")]
pub(crate) struct SettingsArgs {
    /// Users (name, @group or *) who may add unsigned paths and delete [default: root]
    #[arg(long, value_name = "USERS")]
    trusted_users: Vec<String>,
    /// Users (name, @group or *) who may connect [default: *]
    #[arg(long, value_name = "USERS")]
    allowed_users: Vec<String>,
    /// Public keys (name:base64) whose signatures make additions by others acceptable
    #[arg(long, value_name = "KEYS")]
    trusted_public_keys: Vec<String>,
    /// Binary caches and stores to substitute from
    #[arg(long, value_name = "URLS")]
    substituters: Vec<String>,
    /// Additional lower stores, uppermost first: unix://SOCKET?real=DIR, local?root=DIR
    #[arg(long, value_name = "URL")]
    lower: Vec<String>,
    /// The nix or nix-daemon program that builds [default: from PATH]
    #[arg(long, value_name = "PROGRAM")]
    nix: Option<PathBuf>,
    /// Set NAME, as in nix.conf; `understory config names` lists what there is
    #[arg(long = "option", num_args = 2, value_names = ["NAME", "VALUE"])]
    options: Vec<String>,
    #[command(flatten)]
    files: FileArgs,
}

/// How a castore stores what is new.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct MaskArgs {
    /// Store files as they are: do not share what differs only in the hash parts of store paths
    #[arg(long)]
    no_mask: bool,
}

impl MaskArgs {
    pub(crate) fn apply(self, options: &mut understory::StoreOptions) {
        options.castore.mask_hash_parts = !self.no_mask;
    }
}

/// Where settings are read.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Settings")]
pub(crate) struct FileArgs {
    /// Read this file instead of /etc/understory/understory.toml and the user's
    #[arg(long, value_name = "FILE", env = env::CONFIG, hide_env_values = true)]
    config: Option<PathBuf>,
    /// Leave nix.conf and NIX_CONFIG alone
    #[arg(long)]
    no_nix_conf: bool,
}

impl SettingsArgs {
    /// Reads all settings.
    pub(crate) fn resolve(&self) -> Result<Resolved> {
        if let Some(url) = self
            .lower
            .iter()
            .find(|url| url.contains(char::is_whitespace))
        {
            return Err(CommandError::usage(format!(
                "the lower store '{url}' has a space in its URL"
            ))
            .hint("write `%20`, as in `local?root=/with%20space`"));
        }
        Ok(self.load()?)
    }

    /// As [`SettingsArgs::resolve`], for who wants to look at the error.
    pub(crate) fn load(&self) -> understory::Result<Resolved> {
        let mut flags: Vec<(String, String)> = self
            .options
            .chunks_exact(2)
            .map(|pair| (pair[0].clone(), pair[1].clone()))
            .collect();
        let named = [
            ("trusted-users", &self.trusted_users),
            ("allowed-users", &self.allowed_users),
            ("trusted-public-keys", &self.trusted_public_keys),
            ("substituters", &self.substituters),
        ];
        for (name, value) in named {
            if !value.is_empty() {
                flags.push((name.to_owned(), value.join(" ")));
            }
        }
        if !self.lower.is_empty() {
            flags.push(("lowers".into(), self.lower.join(" ")));
        }
        if let Some(program) = &self.nix {
            flags.push(("nix".into(), find(program)?.display().to_string()));
        }
        self.files.load(flags)
    }
}

impl FileArgs {
    /// Reads all settings.
    pub(crate) fn resolve(&self) -> Result<Resolved> {
        Ok(self.load(Vec::new())?)
    }

    fn load(&self, flags: Vec<(String, String)>) -> understory::Result<Resolved> {
        let file = self
            .config
            .as_ref()
            .filter(|file| !file.as_os_str().is_empty());
        Resolved::load(&Sources {
            nix_conf: !self.no_nix_conf,
            file: file.map(|file| config::absolute(file)).transpose()?,
            environment: &|name| std::env::var_os(name),
            flags,
        })
    }
}

/// A program as it is named on a command line: a path, or something in `PATH`.
fn find(program: &Path) -> understory::Result<PathBuf> {
    if program.components().count() > 1 {
        return config::absolute(program);
    }
    program
        .to_str()
        .and_then(env::program)
        .ok_or_else(|| understory::Error::user(format!("no program {} in PATH", program.display())))
}
