//! Real Nix clients of both versions against our daemon, which runs in this process; its socket is
//! shown in their root.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::sync::Arc;
use understory::daemon::{Listener, Server, ServerOptions, Shutdown};
use understory::{Store, StoreOptions};
use understory_nix::StoreDir;
use understory_testkit::nix_root::{Bind, NixRoot, Version};

/// What all scripts begin with. `$U` is our store, `$S` a local one.
const PROLOGUE: &str = r#"
export NIX_CONFIG=$'experimental-features = nix-command ca-derivations\nbuild-users-group =\nsandbox = false\nsubstituters ='
cd /tmp
U=unix:///d/socket S='local?root=/tmp/scratch'
fails() { # MESSAGE COMMAND...
  local message=$1; shift
  if "$@" >/tmp/out 2>&1; then echo "succeeded: $*"; cat /tmp/out; exit 1; fi
  if ! grep -F -- "$message" /tmp/out >&2; then echo "wrong message of: $*"; cat /tmp/out; exit 1; fi
}
is() { # EXPECTED COMMAND...
  local expected=$1 found; shift
  found=$("$@")
  if [[ $found != "$expected" ]]; then printf '%s\nexpected: %s\nfound:    %s\n' "$*" "$expected" "$found"; exit 1; fi
}
"#;

/// Runs `script` as `uid` with each Nix, against a daemon over a fresh store.
fn with_each_nix(uid: u32, options: &ServerOptions, script: &str) {
    for version in Version::SUPPORTED {
        let Some(root) = NixRoot::get(version) else {
            continue;
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            dir.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let store = dir.path().join("store");
        Store::create(&store, &StoreDir::default()).unwrap();
        let store = Store::open(&store, &StoreOptions::default()).unwrap();
        let run = dir.path().join("run");
        let listener = Listener::bind(&run.join("socket")).unwrap();
        let server = Arc::new(Server::new(store, options.clone()));
        let shutdown = Shutdown::new().unwrap();
        let switch = shutdown.clone();
        let thread = std::thread::spawn(move || server.serve(&[listener], &switch));
        let script = format!("{PROLOGUE}\n{script}");
        let output = root.run(&[Bind::new(Path::new(&run), "/d")], uid, &script);
        shutdown.trigger();
        thread.join().unwrap().unwrap();
        assert!(
            output.status.success(),
            "{version:?}:\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Three derivations, each above the last.
const BUILD: &str = r#"
cat > a.nix <<'N'
let
  d = name: deps: derivation {
    inherit name deps; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo ${name} $deps > $out" ];
  };
  a = d "a" []; b = d "b" [ a ];
in d "c" [ a b ]
N
OUT=$(nix-build --no-out-link --store "$S" a.nix 2>/dev/null)
DRV=$(nix-instantiate --store "$S" a.nix 2>/dev/null)
A=$(nix-store --store "$S" -qR $OUT | grep -- '-a$') B=$(nix-store --store "$S" -qR $OUT | grep -- '-b$')
"#;

#[test]
fn nix_copies_to_us_and_asks_us() {
    let script = format!(
        r#"{BUILD}
nix store info --store $U 2>&1 | grep -F 'Version: 2.34.8+understory-'
nix copy --no-check-sigs --from "$S" --to $U $OUT
nix copy --no-check-sigs --from "$S" --to $U $OUT
nix copy --from "$S" --to $U --derivation $DRV
# Everything that the local store knows, we know, but for the time and who built it.
strip() {{ jq -S 'del(.[].ultimate, .[].registrationTime)'; }}
is "$(nix path-info -r --json --store "$S" $OUT 2>/dev/null | strip)" \
  bash -c "$(declare -f strip); nix path-info -r --json --store $U $OUT 2>/dev/null | strip"
is "$(nix-store --store "$S" -qR $OUT)" nix-store --store $U -qR $OUT
is "$(printf '%s\n' $B $OUT | sort)" bash -c "nix-store --store $U -q --referrers $A | sort"
is $DRV nix-store --store $U -q --deriver $OUT
is 6 bash -c "nix path-info --all --store $U | wc -l"
is $OUT nix path-info --store $U /nix/store/$(basename $OUT)
is $OUT nix build --no-link --print-out-paths --store $U "$DRV^out"
fails 'is not valid' nix-store --store $U --check-validity $OUT /nix/store/00000000000000000000000000000000-x
fails 'is not valid' nix path-info --store $U /nix/store/00000000000000000000000000000000-x
"#
    );
    with_each_nix(0, &ServerOptions::default(), &script);
}

#[test]
fn nix_gets_archives_from_us_over_a_pipe() {
    // ssh-ng is the transport that does not read files; a relay stands in for ssh.
    let script = format!(
        r#"{BUILD}
nix copy --no-check-sigs --from "$S" --to $U $OUT
mkdir bin
cat > bin/ssh <<'P'
#!/usr/bin/env python3
import os, socket, sys, threading
line = " ".join(sys.argv)
if "-O" in sys.argv: sys.exit(1)  # asks for a running master
print("started", flush=True)
s = socket.socket(socket.AF_UNIX); s.connect("/d/socket")
def up():
    while d := os.read(0, 65536): s.sendall(d)
    s.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while d := s.recv(65536):
    while d: d = d[os.write(1, d):]
P
chmod +x bin/ssh
PATH=/tmp/bin:$PATH
nix copy --no-check-sigs --from ssh-ng://elsewhere --to 'local?root=/tmp/back' $OUT
diff -r /tmp/scratch$OUT /tmp/back$OUT
is "$(nix-store --store 'local?root=/tmp/scratch' -qR $OUT)" nix-store --store 'local?root=/tmp/back' -qR $OUT
echo more > more
is $(nix-store --store "$S" --add more) nix-store --store ssh-ng://elsewhere --add more
"#
    );
    with_each_nix(0, &ServerOptions::default(), &script);
}

#[test]
fn nix_adds_content_addressed_objects_under_the_same_paths() {
    let script = r#"
mkdir -p src/empty; echo hello > src/hello; chmod +x src/hello; ln -s hello src/link; echo flat > flat
same() { is "$(nix-"$1" --store "$S" "${@:2}")" nix-"$1" --store $U "${@:2}"; }
for file in src flat; do
  is "$(nix store add-path --store "$S" $file)" nix store add-path --store $U $file
  is "$(nix-store --store "$S" --add $file)" nix-store --store $U --add $file
done
is "$(nix store add-file --store "$S" flat)" nix store add-file --store $U flat
for algorithm in md5 sha1 sha256 sha512; do
  is "$(nix-store --store "$S" --add-fixed $algorithm flat)" nix-store --store $U --add-fixed $algorithm flat
  is "$(nix-store --store "$S" --add-fixed --recursive $algorithm src)" \
    nix-store --store $U --add-fixed --recursive $algorithm src
done
is "$(nix eval --raw --store "$S" --expr '"${builtins.toFile "t" "text"}"')" \
  nix eval --raw --store $U --expr '"${builtins.toFile "t" "text"}"'
is "$(nix path-info --all --json --store "$S" 2>/dev/null | jq -S 'map_values(.ca)')" \
  bash -c "nix path-info --all --json --store $U 2>/dev/null | jq -S 'map_values(.ca)'"
nix-store --store $U --verify --check-contents
"#;
    with_each_nix(0, &ServerOptions::default(), script);
}

#[test]
fn nix_signs_verifies_and_deletes() {
    let script = format!(
        r#"{BUILD}
nix copy --no-check-sigs --from "$S" --to $U $OUT
nix key generate-secret --key-name k-1 > key
public=$(nix key convert-secret-to-public < key)
fails 'untrusted' nix store verify -r --no-contents --store $U --trusted-public-keys "$public" $OUT
nix store sign -k key -r --store $U $OUT
nix store verify -r --no-contents --store $U --trusted-public-keys "$public" $OUT
nix-store --store $U --verify --check-contents
nix-store --store $U --optimise
fails "Cannot delete path '$A' since it is still alive" nix-store --store $U --delete $A
nix-store --store $U --delete $OUT
fails 'is not valid' nix-store --store $U --check-validity $OUT
nix store gc --store $U
is "" nix path-info --all --store $U
"#
    );
    with_each_nix(0, &ServerOptions::default(), &script);
}

#[test]
fn nix_is_told_that_we_do_not_build() {
    let script = r#"
cat > n.nix <<'N'
derivation { name = "n"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; }
N
message='this store keeps and serves paths, it does not build'
fails "$message" nix-build --no-out-link --store $U n.nix
fails "$message" nix build --no-link --store $U -f n.nix
fails 'hint: build in a store above this one' nix build --no-link --store $U -f n.nix
nix-build --dry-run --store $U n.nix 2>&1 | grep 'will be built'
"#;
    with_each_nix(0, &ServerOptions::default(), script);
}

#[test]
fn nix_without_trust_needs_signatures() {
    let script = format!(
        r#"{BUILD}
nix store info --store $U 2>&1 | grep 'Trusted: 0' || nix store info --store $U 2>&1 | grep 'Trusted: false'
fails 'because it lacks a signature by a trusted key' nix copy --no-check-sigs --from "$S" --to $U $OUT
echo free > free
is $(nix-store --store "$S" --add free) nix-store --store $U --add free
P=$(nix-store --store $U --add free)
fails 'deleting store paths is not allowed' nix-store --store $U --delete $P
fails 'deleting store paths is not allowed' nix store gc --store $U
nix-store --store $U --gc --print-roots > roots
"#
    );
    with_each_nix(1000, &ServerOptions::default(), &script);
}
