# Stock Nix on an overlay whose lower store is ours: all that people do with it.
source /t/lib.sh
corpus_store
us import "$SRC" --all > "$W/import.log" 2>&1
start_daemon --trusted-users root
mount_overlay
mapfile -t tops < /corpus/top-paths
mapfile -t all < <(nix-store --store "$SRC" --query --requisites "${tops[@]}")
top=${tops[0]} other=${tops[1]}
leaf=$(nix-store --store "$SRC" --query --requisites "$top" | head -n 1)

# --- questions
check_eq "nix path-info -r --json" "$(infos --store "$SRC" -r "${tops[@]}")" "$(infos --store "$OVERLAY" -r "${tops[@]}")"
check_eq "the same without an overlay" "$(infos --store "$SRC" -r "${tops[@]}")" "$(infos --store "$DIRECT" -r "${tops[@]}")"
check_eq "nix-store -qR" "$(printf '%s\n' "${all[@]}" | sort)" "$(nix-store --store "$OVERLAY" -qR "${tops[@]}" | sort)"
for p in "$leaf" "$top"; do
  check_eq "--referrers of ${p##*/}" "$(nix-store --store "$SRC" -q --referrers "$p" | sort)" \
    "$(nix-store --store "$OVERLAY" -q --referrers "$p" | sort)"
  check_eq "--referrers of ${p##*/} without an overlay" "$(nix-store --store "$SRC" -q --referrers "$p" | sort)" \
    "$(nix-store --store "$DIRECT" -q --referrers "$p" | sort)"
done
for q in --hash --size --deriver --references; do
  check_eq "nix-store -q $q" "$(nix-store --store "$SRC" -q "$q" "$top")" "$(nix-store --store "$OVERLAY" -q "$q" "$top")"
done
for store in "$OVERLAY" "$DIRECT"; do
  check_eq "nix store ls of ${store%%:*}" "$(nix store ls --store "$SRC" -lR "$leaf")" "$(nix store ls --store "$store" -lR "$leaf")"
  check_eq "nix store ls --json of ${store%%:*}" "$(nix store ls --store "$SRC" -R --json "$leaf" | jq -S 'del(.. | .narOffset?)')" \
    "$(nix store ls --store "$store" -R --json "$leaf" | jq -S 'del(.. | .narOffset?)')"
  check_same "nix store cat of ${store%%:*}" <(nix store cat --store "$SRC" "$top/nix-support/propagated-build-inputs") \
    <(nix store cat --store "$store" "$top/nix-support/propagated-build-inputs")
done
hash_part=${leaf##*/}; hash_part=${hash_part%%-*}
check_eq "a path from its hash part" "$leaf" "$(nix path-info --store "$DIRECT" "$STORE_DIR/$hash_part" 2> /dev/null || nix path-info --store "$DIRECT" "$leaf")"
check "nix store ping or info" bash -c 'nix store info --store "$1" || nix store ping --store "$1"' - "$DIRECT"
check_fails "a path that is not there" "is not valid|does not exist|don't know how to build" nix path-info --store "$OVERLAY" "$STORE_DIR/00000000000000000000000000000000-nothing"
check_eq "nothing was written above" "" "$(upper_names)"

# --- copying
printf 'a file of the upper store\n' > "$W/plain"
ours=$(nix-store --store "$OVERLAY" --add "$W/plain")
check_eq "an addition is in the upper directory" "${ours##*/}" "$(upper_names)"
check "nix copy from the overlay" nix copy --from "$OVERLAY" --to "$W/copied" "$top" "$ours"
check_eq "is complete and the same" "$(infos --store "$SRC" -r "$top")" "$(infos --store "$W/copied" -r "$top")"
check "its contents verify" nix-store --store "$W/copied" --verify --check-contents
check "nix copy from us" nix copy --from "$DIRECT" --to "$W/copied2" "$other"
check "its contents verify" nix-store --store "$W/copied2" --verify --check-contents
mkdir "$W/tree"; cp -r /t "$W/tree/t"; ln -s t "$W/tree/link"; printf '#!/bin/sh\n' > "$W/tree/run"; chmod +x "$W/tree/run"
new=$(nix-store --store "$SRC" --add "$W/tree")
check "nix copy to us" nix copy --from "$SRC" --to "$DIRECT" "$new"
check_eq "what came is what went" "$(dump_hash "$SRC$new")" "$(dump_hash "$M/${new##*/}")"
check_eq "with the same path info" "$(infos --store "$SRC" "$new")" "$(infos --store "$DIRECT" "$new")"
check "and is seen through the overlay" nix path-info --store "$OVERLAY" "$new"
check "nix copy to the overlay of what the lower store has" nix copy --from "$SRC" --to "$OVERLAY" "$top" "$new"
check_eq "adds nothing to the upper directory" "${ours##*/}" "$(upper_names)"
check_eq "nix store add of what the lower store has" "$new" "$(nix store add --store "$OVERLAY" --name tree "$W/tree" 2> /dev/null || nix store add-path --store "$OVERLAY" --name tree "$W/tree")"
check_eq "adds nothing to the upper directory" "${ours##*/}" "$(upper_names)"
check "nix copy of a closure to an overlay over an empty store" nix copy --from "$OVERLAY" --to "file://$W/cache?compression=none" "$other"

# --- a build in a sandbox, its inputs in the lower store
cat > "$W/build.nix" <<NIX
derivation {
  name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh";
  input = builtins.storePath "$new"; big = builtins.storePath "$top";
  args = [ "-c" "set -e; read line < \$input/t/lib.sh; test -x \$input/run; test ! -e /corpus; read deps < \$big/nix-support/propagated-build-inputs || :; echo \"\$line\" > \$out; echo \$input >> \$out; test -n \"\$deps\"" ];
}
NIX
built=$(nix-build --store "$OVERLAY" --option sandbox true --no-out-link "$W/build.nix" 2> "$LOG") && ok "a sandboxed build whose inputs lie in the lower store" || not_ok "a sandboxed build whose inputs lie in the lower store"
check_eq "its references are in the lower store" "$new" "$(nix-store --store "$OVERLAY" -q --references "$built")"
check "its output is in the upper directory" test -e "$UPPER/${built##*/}"
check "nix build too" nix build --store "$OVERLAY" --option sandbox true --no-link --rebuild -f "$W/build.nix"

# --- the upkeep of the overlay
check "nix-store --verify --check-contents of the overlay" nix-store --store "$OVERLAY" --verify --check-contents
check_eq "it found nothing to complain of" "" "$(grep -Ev '^(reading the Nix store|checking (path existence|link hashes|store hashes)|warning: .*experimental)' "$LOG" || true)"
check "nix store optimise" nix store optimise --store "$OVERLAY"
printf 'garbage\n' > "$W/garbage"
garbage=$(nix-store --store "$OVERLAY" --add "$W/garbage")
mkdir -p "$B/nix/var/nix/gcroots"; ln -s "$built" "$B/nix/var/nix/gcroots/built"
check "nix store gc" nix store gc --store "$OVERLAY"
check "removes garbage from the upper directory" test ! -e "$UPPER/${garbage##*/}"
check "keeps what a root holds" test -e "$MERGED/${built##*/}" -a -e "$UPPER/${built##*/}"
check "keeps what the lower store has" nix path-info --store "$OVERLAY" -r "$top"
check_eq "leaves no whiteout" "" "$(find "$UPPER" -mindepth 1 -maxdepth 1 -type c)"
check_eq "and the lower store as it was" "$(dump_hash "$SRC$leaf")" "$(dump_hash "$MERGED/${leaf##*/}")"

# a path that is above and, later, below: removing it above must not hide it
dup=$(nix-store --store "$OVERLAY" --add /t/overlay.sh)
check "what is above is added below" nix copy --from "$OVERLAY" --to "$DIRECT" "$dup"
check "optimise drops the upper copy" nix store optimise --store "$OVERLAY"
check "it is gone above" test ! -e "$UPPER/${dup##*/}"
env LIBMOUNT_FORCE_MOUNT2=always mount -o remount "$MERGED"
check_same "and readable through the overlay" /t/overlay.sh "$MERGED/${dup##*/}"
check "verify is content after all this" nix-store --store "$OVERLAY" --verify --check-contents

# --- all of it is byte for byte the same through the merged directory
bad=0
for p in "${all[@]}"; do
  if [[ $(dump_hash "$SRC$p") != "$(dump_hash "$MERGED/${p##*/}")" ]]; then bad=$((bad + 1)); fi
done
check_eq "NARs of ${#all[@]} paths through the overlay" 0 "$bad"
umount "$MERGED"
check "the daemon stops on SIGTERM" stop_daemon
finish
