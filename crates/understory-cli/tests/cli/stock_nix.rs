//! `up` and `shell` under real Nix, of both versions, as root and not.

use understory_testkit::nix_root::{Bind, NixRoot, Version};

const SCRIPT: &str = r#"
work=$(mktemp -d); cd "$work"; mkdir home tree; export HOME=$work/home UNDERSTORY_STORE=$work/s
echo hello > tree/file; ln -s file tree/link; printf '#!/bin/sh\necho ran\n' > tree/tool; chmod +x tree/tool
p=$(understory -q add tree)
q=$(nix --extra-experimental-features nix-command store add-path tree --store "$work/other")
[ "$p" = "$q" ] || { echo "add: $p, Nix says $q"; exit 1; }

understory -q up --detach > out
. ./out; remote=$NIX_REMOTE; unset NIX_REMOTE
url=$(sed -n 's/^#   store = //p' out)
export NIX_CONFIG='experimental-features = nix-command local-overlay-store
build-users-group =
substituters ='
# The URLs as they are printed; without root the mounts are in the instance's namespace.
if [ "$(id -u)" = 0 ]; then nix path-info --store "$url" --json "$p" > info; jq -e . info > /dev/null; fi
nix path-info --store "$remote" --json "$p" > info; jq -e . info > /dev/null
unset NIX_CONFIG
export NIX_CONFIG='substituters ='

understory -q shell nix path-info "$p"
understory -q shell nix store cat "$p/file"
understory -q shell "$p/tool"
# Nix adds on top: it lands in the upper directory.
echo more > tree/more
top=$(understory -q shell nix-store --add tree)
ls s/upper | grep -v '^\.' | sed 's/^[^-]*-//'
# A build whose input lies in the lower store.
out=$(understory -q shell nix-build --no-out-link --option sandbox false -E "
  derivation { name = \"built\"; system = builtins.currentSystem; builder = \"/bin/sh\";
    args = [ \"-c\" \"read line < \${builtins.storePath $p}/file; echo built from \$line > \$out\" ]; }")
understory -q shell cat "$out"
# Looked up before it is published, readable right after.
echo later > later
later=$(understory -q --store "$work/scratch" add later)
understory -q shell sh -c "nix path-info $later || cat $later" 2> absent && exit 1
understory -q add later > /dev/null
understory -q shell nix path-info "$later" > /dev/null
understory -q shell cat "$later"
# Nix copies to the daemon.
nix --extra-experimental-features nix-command copy --no-check-sigs --from "$work/other" --to "unix://$work/s/run/daemon.sock" "$p"
understory -q shell nix-store --verify --check-contents 2> verify || { cat verify; exit 1; }
understory -q down
# The other way round: a real Nix store is imported, and what comes out is what Nix dumps.
understory -q --store "$work/imported" import "local?root=$work/other" --all
understory --store "$work/imported" export "$p" > ours.nar
nix-store --dump "$work/other$p" > theirs.nar
cmp ours.nar theirs.nar
nix-store --store "$work/other" --export "$p" | understory -q --store "$work/exported" import -
understory --store "$work/exported" info --all --names
# In an instance of its own, and thrown away.
understory -q shell --ephemeral sh -c "nix store add-path tree > /dev/null; nix path-info $p" > /dev/null
understory doctor > doctor || { cat doctor; exit 1; }
grep -c '^FAIL' doctor || true
"#;

fn works(version: Version, uid: u32) {
    let Some(root) = NixRoot::get(version) else {
        return;
    };
    let binds = [Bind::new(
        env!("CARGO_BIN_EXE_understory"),
        "/usr/local/bin/understory",
    )];
    let said = root.run_ok(&binds, uid, SCRIPT);
    let mut lines = said.lines();
    let path = lines.next().unwrap_or_default();
    assert!(path.ends_with("-tree"), "{said}");
    let rest: Vec<&str> = lines.collect();
    assert_eq!(
        rest,
        [
            "hello",
            "ran",
            "tree",
            "built from hello",
            "later",
            path,
            "0"
        ],
        "{said}"
    );
}

#[test]
fn nix_2_34_as_root() {
    works(Version::Nix2_34, 0);
}
#[test]
fn nix_2_34_without_root() {
    works(Version::Nix2_34, 1000);
}
#[test]
fn nix_2_26_as_root() {
    works(Version::Nix2_26, 0);
}
#[test]
fn nix_2_26_without_root() {
    works(Version::Nix2_26, 1000);
}
