//! Caches, keys and daemons of real Nix.

use crate::server::Server;
use crate::support::Here;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use understory::daemon::Silent;
use understory_nix::realisation::Realisation;
use understory_nix::worker::DrvOutput;
use understory_nix::{PublicKeys, SecretKey, StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

/// What Nix can write, by libarchive's names.
const COMPRESSIONS: [&str; 9] = [
    "none", "xz", "zstd", "bzip2", "gzip", "br", "lzip", "lz4", "lzma",
];

/// Builds a closure, signs it, and writes a cache with each compression; realisations of a content-addressing
/// derivation too.
const SCRIPT: &str = r#"
export NIX_CONFIG='experimental-features = nix-command ca-derivations
sandbox = false
build-users-group =
substituters ='
cat > /tmp/e.nix <<'END'
let
  mk = name: extra: text: derivation ({ inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" text ]; PATH = "/usr/bin:/bin"; } // extra);
in rec {
  a = mk "a" { } "mkdir $out; echo hello > $out/f; ln -s f $out/l; echo hello > $out/x; chmod +x $out/x; echo $out > $out/self; : > $out/empty";
  b = mk "b" { } "mkdir $out; echo ${a} > $out/ref; head -c 1000000 /dev/urandom > $out/large";
  c = mk "c" { } "mkdir $out; echo ${b} ${a} > $out/refs";
  ca = mk "ca" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }
    "mkdir $out; echo $out > $out/self";
}
END
nix-build /tmp/e.nix -A c --no-out-link > /out/path-c
nix-build /tmp/e.nix -A ca --no-out-link > /out/path-ca
c=$(cat /out/path-c)
nix-store -qR $c > /out/closure
nix key generate-secret --key-name test-1 > /tmp/key
nix key convert-secret-to-public < /tmp/key > /out/public-key
nix store sign -k /tmp/key -r $c
for z in ALL; do nix copy --to "file:///out/cache-$z?compression=$z" $c; done
nix copy --to "file:///out/cache-ca?secret-key=/tmp/key" -f /tmp/e.nix ca
cp -r /out/cache-zstd /out/cache-multi
"#;

fn fixture(version: Version) -> Option<&'static Path> {
    static MADE: [OnceLock<Option<PathBuf>>; 2] = [const { OnceLock::new() }; 2];
    let index = Version::SUPPORTED.iter().position(|v| *v == version)?;
    let make = || {
        let root = NixRoot::get(version)?;
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("substitute-{}", version.name()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let script = SCRIPT.replace("ALL", &COMPRESSIONS.join(" "));
        root.run_ok(&[Bind::new(&dir, "/out")], 0, &script);
        Some(dir)
    };
    MADE[index].get_or_init(make).as_deref()
}

fn parse(text: &str) -> StorePath {
    StoreDir::default()
        .parse(text.trim_end().as_bytes())
        .unwrap()
}

fn path(fixture: &Path, name: &str) -> StorePath {
    parse(&std::fs::read_to_string(fixture.join(format!("path-{name}"))).unwrap())
}

fn keys(fixture: &Path) -> PublicKeys {
    PublicKeys::parse(&std::fs::read_to_string(fixture.join("public-key")).unwrap()).unwrap()
}

fn closure(fixture: &Path) -> BTreeSet<StorePath> {
    let text = std::fs::read_to_string(fixture.join("closure")).unwrap();
    text.lines().map(parse).collect()
}

#[test]
fn all_compressions_of_real_nix() {
    for version in Version::SUPPORTED {
        let Some(fixture) = fixture(version) else {
            continue;
        };
        for compression in COMPRESSIONS {
            let dir = fixture.join(format!("cache-{compression}"));
            let server = Server::of(dir.clone(), |_, _| None);
            for url in [format!("file://{}", dir.display()), server.url.clone()] {
                let here = Here::new(&[&url], keys(fixture));
                let fetched = here.fetched(&[&path(fixture, "c")]);
                assert_eq!(fetched, closure(fixture), "{compression}");
            }
        }
    }
}

#[test]
fn realisations_of_real_nix() {
    for version in Version::SUPPORTED {
        let Some(fixture) = fixture(version) else {
            continue;
        };
        let dir = fixture.join("cache-ca");
        let id = std::fs::read_dir(dir.join("realisations"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .find_map(|name| name.strip_suffix(".doi").map(str::to_owned))
            .unwrap();
        let id = DrvOutput::Hash(id);
        let server = Server::of(dir.clone(), |_, _| None);
        for url in [format!("file://{}", dir.display()), server.url.clone()] {
            let here = Here::new(&[&url], keys(fixture));
            let found = here
                .substituters()
                .realisation(&id, &Silent)
                .unwrap()
                .unwrap();
            assert_eq!(found.out_path, path(fixture, "ca"));
            // The path needs no signature: its content address is checked.
            let mut here = here;
            here.settings.trusted_public_keys = PublicKeys::default();
            let ca = path(fixture, "ca");
            assert!(here.fetched(&[&ca]).contains(&ca));
        }
        // `nix copy` signs no realisations. A signature that is there must be good.
        let key = SecretKey::generate("test-2").unwrap();
        let file = dir.join(format!("realisations/{}.doi", id.id()));
        let text = std::fs::read_to_string(&file).unwrap();
        let mut signed = Realisation::parse(&text).unwrap();
        signed.sign(&key);
        let copy = tempfile::tempdir().unwrap();
        std::fs::create_dir(copy.path().join("realisations")).unwrap();
        std::fs::copy(
            dir.join("nix-cache-info"),
            copy.path().join("nix-cache-info"),
        )
        .unwrap();
        std::fs::write(
            copy.path().join(format!("realisations/{}.doi", id.id())),
            signed.print(),
        )
        .unwrap();
        let url = format!("file://{}", copy.path().display());
        let here = Here::new(&[&url], [key.public()].into_iter().collect());
        let found = here.substituters().realisation(&id, &Silent).unwrap();
        assert_eq!(found.unwrap().out_path, path(fixture, "ca"));
        let here = Here::new(&[&url], keys(fixture));
        let found = here
            .substituters()
            .realisation(&id, &here.listener)
            .unwrap();
        assert_eq!(found, None);
        assert_eq!(
            here.listener.text(),
            format!(
                "warning: ignoring realisation of '{}' from '{url}', as it's not signed by any of the keys in 'trusted-public-keys'\n",
                id.id()
            )
        );
    }
}

#[test]
fn a_daemon_of_real_nix_behind_ssh() {
    let Some(root) = NixRoot::get(Version::Nix2_34) else {
        return;
    };
    let Some(fixture) = fixture(Version::Nix2_34) else {
        return;
    };
    // An `ssh` that goes into the root instead of to the host.
    let dir = tempfile::tempdir().unwrap();
    let ssh = dir.path().join("ssh");
    let command = root.command(&[Bind::new(fixture, "/out")], 0, &[], "sh");
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let script = format!(
        "#!/bin/sh\nwhile [ \"$1\" != -- ]; do last=$1; shift; done\nshift\n[ \"$last\" = me@there ] || exit 1\nexec {} -c \"$*\"\n",
        words.join(" ")
    );
    std::fs::write(&ssh, script).unwrap();
    std::fs::set_permissions(&ssh, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "real_nix::over_ssh", "--include-ignored"])
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
#[ignore = "run by a_daemon_of_real_nix_behind_ssh"]
fn over_ssh() {
    let fixture = Path::new(env!("CARGO_TARGET_TMPDIR")).join("substitute-2.34");
    let url = "ssh-ng://me@there?remote-store=file:///out/cache-zstd";
    let mut here = Here::new(&[url], keys(&fixture));
    here.settings.stalled_timeout = std::time::Duration::from_secs(60);
    let fetched = here.fetched(&[&path(&fixture, "c")]);
    assert_eq!(fetched, closure(&fixture));
}
