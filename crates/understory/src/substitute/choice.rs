//! What a client may choose: settings by Nix's names over the daemon's own.

use crate::settings::Settings;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use understory_nix::PublicKeys;

/// Settings that a client without trust may choose, as in Nix: besides these, only substituters that are allowed.
const OF_ANYONE: [&str; 2] = ["connect-timeout", "substitute"];

/// The settings with what the client wants, as far as it may.
pub(super) fn choose(
    base: &Settings,
    overrides: &BTreeMap<Vec<u8>, Vec<u8>>,
    trusted: bool,
    warn: &dyn Fn(&str),
) -> Settings {
    let mut settings = base.clone();
    let texts: BTreeMap<&str, &str> = overrides
        .iter()
        .filter_map(|(name, value)| {
            Some((
                std::str::from_utf8(name).ok()?,
                std::str::from_utf8(value).ok()?,
            ))
        })
        .collect();
    let get = |name: &str| texts.get(name).copied();
    // The list itself first, whatever the order of names says.
    if let Some(text) = get("substituters").or_else(|| get("binary-caches")) {
        settings.substituters = urls(base, text, trusted, warn);
    }
    if let Some(text) = get("extra-substituters").or_else(|| get("extra-binary-caches")) {
        settings
            .substituters
            .extend(urls(base, text, trusted, warn));
    }
    if trusted {
        let keys = |name: &str| {
            let text = get(name)?;
            let keys = PublicKeys::parse(text);
            if keys.is_err() {
                warn(&format!("setting '{name}' has invalid value '{text}'"));
            }
            keys.ok()
        };
        let chosen = keys("trusted-public-keys").or_else(|| keys("binary-cache-public-keys"));
        let more =
            keys("extra-trusted-public-keys").or_else(|| keys("extra-binary-cache-public-keys"));
        settings.trusted_public_keys = chosen
            .unwrap_or_else(|| base.trusted_public_keys.clone())
            .iter()
            .chain(more.unwrap_or_default().iter())
            .cloned()
            .collect();
    }
    for (name, text) in &texts {
        if trusted || OF_ANYONE.contains(name) {
            apply(&mut settings, name, text, warn);
        }
    }
    settings
}

/// Those of the URLs that the client may use.
fn urls(base: &Settings, text: &str, trusted: bool, warn: &dyn Fn(&str)) -> Vec<String> {
    let allowed = |url: &str| {
        base.substituters.iter().any(|u| u == url) || base.trusted_substituters.contains(url)
    };
    text.split_whitespace()
        .filter_map(|url| {
            let slash = format!("{url}/");
            let bare = url.trim_end_matches('/');
            if trusted || allowed(url) {
                Some(url.to_owned())
            } else if allowed(&slash) {
                Some(slash)
            } else if allowed(bare) {
                Some(bare.to_owned())
            } else {
                warn(&format!(
                    "ignoring untrusted substituter '{url}', you are not a trusted user.\n\
                     Run `man nix.conf` for more information on the `substituters` configuration option."
                ));
                None
            }
        })
        .collect()
}

fn apply(settings: &mut Settings, name: &str, text: &str, warn: &dyn Fn(&str)) {
    let invalid = || warn(&format!("setting '{name}' has invalid value '{text}'"));
    let flag = |to: &mut bool| match text {
        "true" | "yes" | "1" => *to = true,
        "false" | "no" | "0" => *to = false,
        _ => invalid(),
    };
    let seconds = |to: &mut Duration| match text.trim().parse() {
        Ok(seconds) => *to = Duration::from_secs(seconds),
        Err(_) => invalid(),
    };
    match name {
        "substitute" | "build-use-substitutes" => flag(&mut settings.substitute),
        "fallback" | "build-fallback" => flag(&mut settings.fallback),
        "require-sigs" => flag(&mut settings.require_signatures),
        "connect-timeout" => seconds(&mut settings.connect_timeout),
        "stalled-download-timeout" => seconds(&mut settings.stalled_timeout),
        "narinfo-cache-positive-ttl" => seconds(&mut settings.narinfo_positive_ttl),
        "narinfo-cache-negative-ttl" => seconds(&mut settings.narinfo_negative_ttl),
        "http-connections" | "binary-caches-parallel-connections" => match text.trim().parse() {
            Ok(count) => settings.http_connections = count,
            Err(_) => invalid(),
        },
        "max-substitution-jobs" | "substitution-max-jobs" => match text.trim().parse::<usize>() {
            Ok(count) => settings.substitution_jobs = count.max(1),
            Err(_) => invalid(),
        },
        "download-attempts" => match text.trim().parse() {
            Ok(count) => settings.download_attempts = count,
            Err(_) => invalid(),
        },
        "ssl-cert-file" => {
            settings.ssl_cert_file = (!text.is_empty()).then(|| PathBuf::from(text));
        }
        "netrc-file" => settings.netrc_file = (!text.is_empty()).then(|| PathBuf::from(text)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use understory_nix::SecretKey;

    fn chosen(base: &Settings, overrides: &[(&str, &str)], trusted: bool) -> (Settings, String) {
        let warnings = RefCell::new(String::new());
        let overrides = overrides
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        let settings = choose(base, &overrides, trusted, &|text| {
            warnings.borrow_mut().push_str(text);
        });
        (settings, warnings.into_inner())
    }

    fn base() -> Settings {
        Settings {
            substituters: vec!["https://a/".into()],
            trusted_substituters: ["https://b".to_owned()].into(),
            ..Settings::default()
        }
    }

    #[test]
    fn a_client_without_trust_may_choose_among_what_is_allowed() {
        let overrides = [
            ("substituters", "https://b https://a https://evil"),
            ("require-sigs", "false"),
            ("trusted-public-keys", "nonsense"),
            ("connect-timeout", "3"),
        ];
        let (settings, warnings) = chosen(&base(), &overrides, false);
        assert_eq!(settings.substituters, ["https://b", "https://a/"]);
        assert!(settings.require_signatures);
        assert_eq!(settings.connect_timeout, Duration::from_secs(3));
        assert_eq!(
            warnings,
            "ignoring untrusted substituter 'https://evil', you are not a trusted user.\n\
             Run `man nix.conf` for more information on the `substituters` configuration option."
        );
    }

    #[test]
    fn a_trusted_client_may_choose_anything() {
        let [one, two] = ["one", "two"].map(|name| SecretKey::generate(name).unwrap().public());
        let base = Settings {
            trusted_public_keys: [one.clone()].into_iter().collect(),
            ..base()
        };
        let two_text = two.to_string();
        let (settings, warnings) = chosen(
            &base,
            &[
                ("extra-substituters", "file:///c"),
                ("extra-trusted-public-keys", &two_text),
                ("substitute", "false"),
                ("http-connections", "many"),
            ],
            true,
        );
        assert_eq!(settings.substituters, ["https://a/", "file:///c"]);
        let keys: Vec<_> = settings.trusted_public_keys.iter().cloned().collect();
        assert_eq!(keys, [one, two]);
        assert!(!settings.substitute);
        assert_eq!(
            warnings,
            "setting 'http-connections' has invalid value 'many'"
        );
    }
}
