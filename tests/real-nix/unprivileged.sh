# Everything without root: the store, mounts in a namespace of their own, a shell with the merged store.
# Starts as root only to become an ordinary user.
if (( EUID == 0 )); then
  mkdir /tmp/home; chown 1000:1000 /tmp/home       # an overlay cannot lie on the overlay that the root is
  exec setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/tmp/home USER=tester bash "$0" "$@"
fi
source /t/lib.sh
unset XDG_STATE_HOME XDG_RUNTIME_DIR
us() { understory "$@"; }
mkdir "$W/tree"; cp /t/*.sh "$W/tree"
path=$(us add "$W/tree" | tail -n 1)
check_eq "the path is that of Nix" "$(nix-store --store "$W/nix" --add "$W/tree")" "$path"
check "the store lies in the home directory" test -d ~/.local/state/understory
check_eq "shell without an instance" "$(cat /t/lib.sh)" "$(us shell cat "$path/lib.sh")"
check "Nix in it sees the path" us shell nix path-info "$path"
added=$(us shell nix-store --add "$W/tree/up.sh")
check_eq "what is added in it is kept" "$(cat /t/up.sh)" "$(us shell cat "$added")"
check_eq "with --ephemeral nothing is" "" "$(e=$(us shell --ephemeral nix-store --add "$W/tree/import.sh"); us shell sh -c "cat $e 2> /dev/null")"
understory up --json > "$W/up.json" 2> "$W/up.daemon.log" &
pid=$!
check "up" wait_for "up" jq -e .url "$W/up.json"
check "status" us status
check_eq "shell in the running instance" "$(cat /t/lib.sh)" "$(us shell cat "$path/lib.sh")"
check "the daemon answers outside of the namespace" nix path-info --store "unix://$(jq -r .socket "$W/up.json")" "$path"
check "verify in the shell" us shell nix-store --verify --check-contents
echo later > "$W/later"
later=$(us add "$W/later" | tail -n 1)
check_eq "what is added beside it is seen in it" later "$(us shell cat "$later")"
printf 'derivation { name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh"; in_ = builtins.storePath "%s"; args = [ "-c" "read x < $in_/lib.sh; echo $x > $out" ]; }\n' "$path" > "$W/build.nix"
check "a build on top" us shell nix-build --no-out-link "$W/build.nix"
check "down" us down
check "up ends well" wait "$pid"
check_eq "no mount is left" "" "$(grep -F "$HOME" /proc/self/mounts || true)"
finish
