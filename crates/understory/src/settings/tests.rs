use super::*;
use proptest::prelude::*;

struct Place {
    dir: tempfile::TempDir,
    env: BTreeMap<String, OsString>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut out = Self {
            dir,
            env: BTreeMap::new(),
        };
        out.set("NIX_CONF_DIR", out.at("etc").to_str().unwrap());
        out.set("XDG_CONFIG_HOME", out.at("config").to_str().unwrap());
        out.set("XDG_CONFIG_DIRS", "/nonexistent");
        std::fs::create_dir(out.at("etc")).unwrap();
        std::fs::create_dir_all(out.at("config/understory")).unwrap();
        out
    }
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn set(&mut self, name: &str, value: &str) {
        self.env.insert(name.into(), value.into());
    }
    fn nix_conf(&self, text: &str) {
        std::fs::write(self.at("etc/nix.conf"), text).unwrap();
    }
    fn toml(&self, text: &str) {
        std::fs::write(self.at("config/understory/understory.toml"), text).unwrap();
    }
    fn load(&self, flags: &[(&str, &str)]) -> Result<Resolved> {
        Resolved::load(&Sources {
            nix_conf: true,
            file: None,
            environment: &|name| self.env.get(name).cloned(),
            flags: flags
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect(),
        })
    }
    fn error(&self, flags: &[(&str, &str)]) -> (String, Option<String>) {
        let error = self.load(flags).unwrap_err();
        let text = error
            .to_string()
            .replace(self.dir.path().to_str().unwrap(), "[DIR]");
        (text, error.hint().map(str::to_owned))
    }
}

fn origins(resolved: &Resolved, name: &str) -> Vec<Origin> {
    resolved.value(name).unwrap().origins.clone()
}

#[test]
fn each_place_wins_over_the_one_before() {
    let mut place = Place::new();
    let resolved = place.load(&[]).unwrap();
    assert_eq!(resolved.settings.download_attempts, 5);
    assert_eq!(resolved.settings.substituters, [NIX_SUBSTITUTER]);
    assert!(!resolved.settings.trusted_public_keys.is_empty());
    assert_eq!(origins(&resolved, "download-attempts"), []);

    place.nix_conf("download-attempts = 6\nextra-substituters = https://a https://b\ngc-keep-outputs = yes\ncores = what Nix likes\n");
    let resolved = place.load(&[]).unwrap();
    assert_eq!(resolved.settings.download_attempts, 6);
    assert!(resolved.settings.keep_outputs, "an alias");
    assert_eq!(
        resolved.settings.substituters,
        [NIX_SUBSTITUTER, "https://a", "https://b"]
    );
    let nix_conf = Origin::NixConf(place.at("etc/nix.conf"));
    assert_eq!(
        origins(&resolved, "substituters"),
        std::slice::from_ref(&nix_conf)
    );
    assert_eq!(resolved.for_nix(), [], "Nix knows all of it by itself");

    place.toml("extra-substituters = [\"https://c\"]\ndownload-attempts = 7\nlowers = [\"unix:///l?real=/x\"]\nfallback = true\n");
    let resolved = place.load(&[]).unwrap();
    assert_eq!(resolved.settings.download_attempts, 7);
    assert!(resolved.settings.fallback);
    assert_eq!(resolved.settings.lowers, ["unix:///l?real=/x"]);
    assert_eq!(
        resolved.settings.substituters,
        [NIX_SUBSTITUTER, "https://a", "https://b", "https://c"]
    );
    let file = Origin::File(place.at("config/understory/understory.toml"));
    assert_eq!(origins(&resolved, "substituters"), [nix_conf, file.clone()]);

    place.set("UNDERSTORY_DOWNLOAD_ATTEMPTS", "8");
    place.set("UNDERSTORY_FALLBACK", "");
    place.set("UNDERSTORY_SUBSTITUTERS", "");
    place.set("UNDERSTORY_EXTRA_ALLOWED_USERS", "x y");
    let resolved = place.load(&[]).unwrap();
    assert_eq!(resolved.settings.download_attempts, 8);
    assert!(resolved.settings.fallback, "set to nothing is not set");
    assert!(
        resolved.settings.substituters.is_empty(),
        "an empty list is one"
    );
    assert_eq!(resolved.settings.allowed_users, ["*", "x", "y"]);

    let resolved = place
        .load(&[("download-attempts", "9"), ("extra-substituters", "z")])
        .unwrap();
    assert_eq!(resolved.settings.download_attempts, 9);
    assert_eq!(resolved.settings.substituters, ["z"]);
    let variable = Origin::Environment("UNDERSTORY_SUBSTITUTERS".into());
    assert_eq!(origins(&resolved, "substituters"), [variable, Origin::Flag]);
    let nix: Vec<_> = resolved.for_nix().into_iter().map(|(n, _)| n).collect();
    assert_eq!(
        nix,
        [
            "allowed-users",
            "download-attempts",
            "fallback",
            "substituters"
        ]
    );
}

#[test]
fn a_named_file_replaces_the_others() {
    let place = Place::new();
    place.toml("fallback = true\n");
    let named = place.at("named.toml");
    std::fs::write(&named, "keep-outputs = true\n").unwrap();
    let resolved = Resolved::load(&Sources {
        nix_conf: false,
        file: Some(named),
        environment: &|name| place.env.get(name).cloned(),
        flags: Vec::new(),
    })
    .unwrap();
    assert!(resolved.settings.keep_outputs && !resolved.settings.fallback);
    assert!(resolved.settings.substituters.is_empty());
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let mut place = Place::new();
    let text = |t: &str| t.to_owned();
    place.toml("substiuters = []\n");
    let file = "[DIR]/config/understory/understory.toml";
    assert_eq!(
        place.error(&[]),
        (
            format!("{file}: unknown setting 'substiuters'"),
            Some(text("did you mean `substituters`?"))
        )
    );
    place.toml("colour = true\n");
    assert_eq!(
        place.error(&[]).1.as_deref(),
        Some("`understory config names` lists all settings")
    );
    place.toml("extra-fallback = true\n");
    assert_eq!(
        place.error(&[]).0,
        format!("{file}: unknown setting 'extra-fallback'")
    );
    place.toml("fallback = [\"a\"]\n");
    assert_eq!(
        place.error(&[]).0,
        format!("{file}: fallback: expected true or false, found array")
    );
    place.toml("substituters = [\"a b\"]\n");
    assert_eq!(
        place.error(&[]).0,
        format!("{file}: substituters: expected a list of words, found array")
    );
    place.toml("\nfallback = maybe\n");
    assert!(place.error(&[]).0.starts_with(&format!("{file}: line 2: ")));
    place.toml("http-connections = \"many\"\n");
    assert_eq!(
        place.error(&[]).0,
        format!("{file}: setting 'http-connections' has invalid value 'many'")
    );
    place.toml("nix = \"bin/nix\"\n");
    assert_eq!(
        place.error(&[]).0,
        format!("{file}: setting 'nix': expected an absolute path, found 'bin/nix'")
    );
    place.toml("");
    place.nix_conf("require-sigs = perhaps\n");
    assert_eq!(
        place.error(&[]).0,
        "[DIR]/etc/nix.conf: Boolean setting 'require-sigs' has invalid value 'perhaps'"
    );
    place.nix_conf("");
    place.set("UNDERSTORY_TRUSTED_PUBLIC_KEYS", "k:x");
    assert!(
        place.error(&[]).0.starts_with(
            "UNDERSTORY_TRUSTED_PUBLIC_KEYS in the environment: setting 'trusted-public-keys': "
        ),
        "{:?}",
        place.error(&[])
    );
    place.set("UNDERSTORY_TRUSTED_PUBLIC_KEYS", "");
    assert_eq!(
        place.error(&[("falback", "1")]),
        (
            text("the command line: unknown setting 'falback'"),
            Some(text("did you mean `fallback`?"))
        )
    );
}

#[test]
fn numbers_and_booleans_as_nix_takes_them() {
    let place = Place::new();
    let attempts = |text: &str| {
        place
            .load(&[("download-attempts", text)])
            .map(|r| r.settings.download_attempts)
            .ok()
    };
    assert_eq!(attempts("2K"), Some(2048));
    assert_eq!(attempts("1m"), Some(1 << 20));
    assert_eq!(attempts("4G"), None, "more than fits");
    assert_eq!(attempts(""), None);
    assert_eq!(attempts("-1"), None);
    for (text, value) in [
        ("true", true),
        ("yes", true),
        ("1", true),
        ("no", false),
        ("0", false),
    ] {
        let resolved = place.load(&[("build-fallback", text)]).unwrap();
        assert_eq!(resolved.settings.fallback, value);
    }
}

#[test]
fn names_are_in_order_and_mean_one_thing() {
    let all: Vec<_> = names().collect();
    assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
    for definition in table::DEFINITIONS {
        for name in definition.aliases.iter().chain([&definition.name]) {
            let found = table::find(name).unwrap();
            assert!(std::ptr::eq(found.0, definition) && !found.1, "{name}");
        }
        let shown = (definition.get)(&Settings::default());
        assert!((definition.set)(&mut Settings::default(), &shown).is_ok());
    }
}

proptest! {
    #[test]
    fn any_toml_is_read_or_refused(text in "(?s)[a-z0-9=\\[\\]\"#\n -]{0,120}") {
        let place = Place::new();
        place.toml(&text);
        let _ = place.load(&[]);
    }
    #[test]
    fn distances(a in "[a-c]{0,6}", b in "[a-c]{0,6}") {
        prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        prop_assert_eq!(distance(&a, &b) == 0, a == b);
        prop_assert!(distance(&a, &b) <= a.len().max(b.len()));
    }
}
