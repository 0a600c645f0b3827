# The daemon by itself: who may add what, collection, and operations that a lower store does not do.
source /t/lib.sh
corpus_store
top=$(head -n 1 /corpus/top-paths)
us import "$SRC" "$top" > "$W/import.log" 2>&1
nix-store --generate-binary-cache-key test-1 "$W/secret" "$W/public"
start_daemon --trusted-users root --trusted-public-keys "$(< "$W/public")"
chmod a+rx "$W"
as_tester() { setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/tmp "$@"; }

printf 'unsigned\n' > "$W/unsigned"
unsigned=$(nix-store --store "$SRC" --add "$W/unsigned")
printf 'let d = derivation { name = "signed"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo signed > $out" ]; }; in d\n' > "$W/signed.nix"
signed=$(nix-build --store "$SRC" --option sandbox true --no-out-link "$W/signed.nix" 2> "$W/build.log") || cat "$W/build.log"

check_eq "root is trusted" "1" "$(nix store info --json --store "$DIRECT" | jq '.trusted | if . == true or . == 1 then 1 else 0 end')"
check_eq "others are not" "0" "$(as_tester nix store info --json --store "$DIRECT" | jq '.trusted | if . == true or . == 1 then 1 else 0 end')"
nix copy --to "file://$W/cache" --store "$SRC" "$signed" "$unsigned"
chmod -R a+rX "$W/cache"
check_fails "an untrusted peer may not add what is unsigned" "lacks a (valid )?signature|not signed|trusted" \
  as_tester nix copy --no-check-sigs --from "file://$W/cache" --to "$DIRECT" "$signed"
check_fails "and it is not there" "not valid" nix path-info --store "$DIRECT" "$signed"
check "an untrusted peer may add what is content-addressed" as_tester nix copy --no-check-sigs --from "file://$W/cache" --to "$DIRECT" "$unsigned"
nix store sign --store "$SRC" --key-file "$W/secret" "$signed"
nix copy --to "file://$W/cache2" --store "$SRC" "$signed"
chmod -R a+rX "$W/cache2"
check "an untrusted peer may add what a trusted key has signed" as_tester nix copy --no-check-sigs --from "file://$W/cache2" --to "$DIRECT" "$signed"
check_eq "the signature is kept" "$(infos --store "$SRC" "$signed")" "$(infos --store "$DIRECT" "$signed")"
check_fails "an untrusted peer may not collect" "." as_tester nix store delete --store "$DIRECT" "$unsigned"

# AddToStore with every method gives the same path as Nix's own store
mkdir "$W/tree"; printf 'x\n' > "$W/tree/a"; ln -s a "$W/tree/l"
for how in "--add $W/tree" "--add-fixed sha256 $W/unsigned" "--add-fixed sha1 $W/unsigned" "--add-fixed --recursive sha256 $W/tree" \
  "--add-fixed --recursive sha512 $W/tree" "--add-fixed md5 $W/unsigned"; do
  # shellcheck disable=SC2086
  check_eq "nix-store $how" "$(nix-store --store "$SRC" $how)" "$(nix-store --store "$DIRECT" $how)"
done
drv=$(nix-instantiate --store "$DIRECT" "$W/signed.nix" 2> "$W/instantiate.log") || cat "$W/instantiate.log"
check_eq "a derivation is added as text" "$(nix-instantiate --store "$SRC" "$W/signed.nix" 2> /dev/null)" "$drv"
check_eq "and known as the deriver" "$drv" "$(nix-store --store "$DIRECT" -q --valid-derivers "$signed" 2> /dev/null || nix-store --store "$DIRECT" -q --deriver "$signed")"
check_eq "its outputs are known" "$signed" "$(nix-store --store "$DIRECT" -q --outputs "$drv")"
printf 'derivation { name = "never"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "exit 1" ]; }\n' > "$W/never.nix"
check_fails "a build is refused in words" "does not build|cannot build" nix-build --store "$DIRECT" --no-out-link "$W/never.nix"
check_eq "understory add gives the path of nix store add" \
  "$(nix store add --store "$SRC" "$W/tree" 2> /dev/null || nix store add-path --store "$SRC" "$W/tree")" "$(us add "$W/tree" | tail -n 1)"
check_eq "and of nix store add --mode flat" \
  "$(nix store add --mode flat --store "$SRC" "$W/unsigned" 2> /dev/null || nix store add-file --store "$SRC" "$W/unsigned")" \
  "$(us add --mode flat "$W/unsigned" | tail -n 1)"

# roots and collection
check "nix-store --add-root of a path" nix-store --store "$DIRECT" --realise "$top" --add-root "$W/root-link"
check_fails "what a root holds cannot be deleted" "since it is still alive" nix store delete --store "$DIRECT" "$top"
check "a dead path is deleted" nix store delete --store "$DIRECT" "$unsigned"
check_fails "and is gone" "not valid" nix path-info --store "$DIRECT" "$unsigned"
check_eq "print-live has the root's closure" "$(nix-store --store "$SRC" -qR "$top" | sort)" \
  "$(nix-store --store "$DIRECT" --gc --print-live 2> /dev/null | sort)"
head -c 8000000 /dev/urandom > "$W/dead"
check "8 MB are added" nix-store --store "$DIRECT" --add "$W/dead"
bytes_before=$(du -s --block-size=1 "$S/castore" | cut -f1)
check "nix-store --gc" nix-store --store "$DIRECT" --gc
bytes_after=$(du -s --block-size=1 "$S/castore" | cut -f1)
check "gives space back (from $bytes_before to $bytes_after bytes)" test "$bytes_after" -lt $((bytes_before - 7500000))
check_eq "keeps just that" "$(nix-store --store "$SRC" -qR "$top" | sort)" "$(nix path-info --all --store "$DIRECT" | sort)"
check "the daemon stops on SIGTERM" stop_daemon
finish
