# A logical store directory other than /nix/store.
STORE_DIR=/opt/pkgs/store
source /t/lib.sh
export NIX_STORE_DIR=$STORE_DIR
src="local?root=$SRC&store=$STORE_DIR"
mkdir "$W/tree"; cp /t/*.sh "$W/tree"; ln -s lib.sh "$W/tree/link"
one=$(nix-store --store "$src" --add "$W/tree")
two=$(nix-store --store "$src" --add /t/lib.sh)
check_eq "Nix makes paths there" "$STORE_DIR" "${one%/*}"
us init --store-dir "$STORE_DIR"
check "such a store is imported" us import "$src" --all
start_daemon --trusted-users root
mount_overlay
check_eq "path infos agree" "$(infos --store "$src" "$one" "$two")" "$(infos --store "$DIRECT" "$one" "$two")"
check_eq "through the overlay too" "$(infos --store "$src" "$one" "$two")" "$(infos --store "$OVERLAY" "$one" "$two")"
check_eq "NARs agree" "$(dump_hash "$SRC/nix/store/${one##*/}")" "$(dump_hash "$MERGED/${one##*/}")"
check_eq "an addition gets the path that Nix gives it" "$(nix-store --store "$src" --add /t/store-dir.sh)" "$(us add /t/store-dir.sh | tail -n 1)"
printf 'derivation { name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh"; in_ = builtins.storePath "%s"; args = [ "-c" "read x < $in_/lib.sh; echo $x > $out" ]; }\n' "$one" > "$W/build.nix"
check "a sandboxed build on top" nix-build --store "$OVERLAY" --option sandbox true --no-out-link "$W/build.nix"
check_fails "a store of another directory is refused" "store dir" us import /corpus/root --all
check "verify" nix-store --store "$OVERLAY" --verify --check-contents
umount "$MERGED"
check "the daemon stops on SIGTERM" stop_daemon
finish
