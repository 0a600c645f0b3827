# old-client.sh: Debian bookworm's Nix 2.8 as the client of our overlay store: query, add, build, copy, substitute,
# collect, shell. Its root is /big; the store and the socket are where it looks for them by itself. The daemon, and
# the Nix that builds for it, are in the root around it.
source /t/lib.sh
source /t/up-lib.sh
corpus_store
mapfile -t tops < /corpus/top-paths
top=${tops[0]} other=${tops[1]}
mapfile -t closure < <(nix-store --store "$SRC" -qR "$top" | sort)
us import "$SRC" "$top" > "$W/import.log" 2>&1
binary_cache "$other"
castore_paths() { us stats --json | jq .paths; }
# Runs a command in the old root, as root or (-u UID) another user, with (-e NAME=VALUE) in its environment.
OLD=/tmp/old
enter_old() {
  local uid=0 vars=()
  while [[ $1 != -- ]]; do
    case $1 in
      -u) uid=$2; shift 2;;
      -e) vars+=("$2"); shift 2;;
    esac
  done
  shift
  # A plain chroot is not enough: Nix goes back to the mount namespace's own root before it starts a shell.
  # shellcheck disable=SC2016
  unshare --mount --propagation private bash -euc '
    cd "$1"; user=$2; shift 2
    usr/sbin/pivot_root . mnt
    umount -l mnt
    exec /usr/sbin/chroot --userspec="$user" / env -i "$@"' enter_old "$OLD" "$uid:$uid" \
    HOME=/tmp/home PATH=/usr/bin:/bin LANG=C.UTF-8 NIX_REMOTE=daemon \
    NIX_CONFIG="experimental-features = nix-command"$'\n'"require-sigs = false" "${vars[@]}" "$@"
}
old() { enter_old -- "$@"; }
old_root() { # over /big, which is not written to; of ours it sees what lies in $W, the store, and the socket
  mkdir -p "$OLD" "$W/old-upper" "$W/old-work"
  mount -t overlay overlay -o "lowerdir=/big,upperdir=$W/old-upper,workdir=$W/old-work" "$OLD"
  mkdir -p "$OLD$W" "$OLD/nix/store" "$OLD/nix/var/log/nix" "$S/merged/nix/var/log/nix" "$OLD/nix/var/nix/daemon-socket" "$OLD/tmp/home"
  : > "$OLD/nix/var/nix/daemon-socket/socket"
  chmod 1777 "$OLD/tmp" "$OLD/tmp/home"
  mount --rbind "$W" "$OLD$W"
  mount --bind "$MERGED" "$OLD/nix/store"
  mount --bind "$S/merged/nix/var/log/nix" "$OLD/nix/var/log/nix"    # where a client of that age looks by itself
  mount --bind "$U" "$OLD/nix/var/nix/daemon-socket/socket"
  mount --rbind /dev "$OLD/dev"
  mount -t proc proc "$OLD/proc"
}
check "up" start_up --substituters "file://$CACHE" --trusted-public-keys "$PUBLIC"
old_root
check_eq "the client is Nix 2.8" "nix (Nix) 2.8" "$(old nix --version | cut -d . -f 1-2)"
check "nix store ping" old nix store ping

# --- queries
check_eq "nix path-info -r" "$(printf '%s\n' "${closure[@]}")" "$(old nix path-info -r "$top" | sort)"
facts='map({path, narHash, narSize, references: (.references | sort)}) | sort_by(.path)'
check_eq "nix path-info --json" "$(infos --store "$SRC" -r "$top" | jq "to_entries | map(.value + {path: .key}) | $facts")" \
  "$(old nix path-info --json -r "$top" | jq "$facts")"
check_eq "nix-store -qR" "$(printf '%s\n' "${closure[@]}")" "$(old nix-store -qR "$top" | sort)"
check_eq "nix-store --query --hash" "$(nix-store --store "$SRC" -q --hash "$top")" "$(old nix-store -q --hash "$top")"
check_same "nix store cat" <(nix store cat --store "$SRC" "$top/nix-support/propagated-build-inputs") \
  <(old nix store cat "$top/nix-support/propagated-build-inputs")

# --- additions
printf 'on top\n' > "$W/plain"
p=$(old nix-store --add "$W/plain")
check_eq "nix-store --add" "$(nix-store --store "$W/elsewhere" --add "$W/plain")" "$p"
check_eq "goes to the upper directory" "${p##*/}" "$(upper_names)"
check_same "the client sees it" "$W/plain" <(old cat "$p")
mkdir -p "$W/tool/bin"; printf '#!/bin/sh\necho from a tool\n' > "$W/tool/bin/tool"; chmod +x "$W/tool/bin/tool"
tool=$(old nix store add-path "$W/tool" 2> "$LOG")
check "nix store add-path" old test -x "$tool/bin/tool"

# --- builds
cat > "$W/build.nix" <<NIX
derivation {
  name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh"; input = builtins.storePath "$p"; big = builtins.storePath "$top";
  args = [ "-c" "set -e; read line < \$input; test -e \$big/nix-support/propagated-build-inputs; echo \"built \$line\" > \$out; echo \$input >> \$out; echo said" ];
}
NIX
built=$(old nix-build --no-out-link "$W/build.nix" 2> "$LOG") && ok "nix-build" || not_ok "nix-build"
cp "$LOG" "$W/build.log"
check "what the builder says comes to the client" grep -Eq '^(on-top> )?said' "$W/build.log"
check_eq "its output is right" "built on top" "$(old head -n 1 "$built")"
check "and in the upper directory" test -e "$UPPER/${built##*/}"
check "nix build" old nix build --no-link -f "$W/build.nix"
check_eq "nix log" said "$(old nix log "$built" 2> "$LOG")"
printf 'derivation { name = "fails"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo no; exit 3" ]; }\n' > "$W/fails.nix"
check_fails "a build that fails" 'failed with exit code 3' old nix-build --no-out-link "$W/fails.nix"
check_fails "and by nix build" 'failed with exit code 3' old nix build --no-link -f "$W/fails.nix"

# --- copies and substitutes go down
above=$(upper_names) before=$(castore_paths)
stat "$MERGED/${other##*/}" > "$LOG" 2>&1 || true        # overlayfs remembers that it was not there
check "nix copy to a local store" old nix copy --no-check-sigs --to "$W/copied" "$top" "$built"
check "is complete" nix-store --store "$W/copied" --verify --check-contents
check "a path that a substituter has" old nix-store --realise "$other"
check_eq "is visible at once" "$(dump_hash "$SRC$other")" "$(dump_hash "$MERGED/${other##*/}")"
between=$(castore_paths)
check "is in the castore" test "$between" -gt "$before"
printf 'elsewhere\n' > "$W/elsewhere-file"
e=$(nix-store --store "$W/copied" --add "$W/elsewhere-file")
check "nix copy from a local store" old nix copy --no-check-sigs --from "$W/copied" "$e"
check_eq "into the castore" "$((between + 1))" "$(castore_paths)"
check_same "is visible at once" "$W/elsewhere-file" <(old cat "$e")
check_eq "nothing of it is above" "$above" "$(upper_names)"

# --- collection
garbage=$(head -c 5000 /dev/urandom > "$W/garbage"; old nix-store --add "$W/garbage")
check "a root is made" old nix-store --realise "$built" --add-root "$W/root"
check_eq "it is among the roots" "$W/root -> $built" "$(old nix-store --gc --print-roots 2> "$LOG" | grep -F "$built")"
check_eq "dead are those that no root holds" "$garbage" "$(old nix-store --gc --print-dead 2> "$LOG" | grep -F "$garbage")"
more=$(head -c 5000 /dev/urandom > "$W/more"; old nix-store --add "$W/more")
check "nix-store --delete" old nix-store --delete "$garbage"
check "nix store gc" old nix store gc
check "keeps what a root holds" old nix path-info "$built" "$p"
check_fails "removes what none holds" 'is not valid' old nix path-info "$more"
check "leaves what is below alone" old nix path-info -r "$top" "$other"
check_eq "and makes no whiteout" "" "$(find "$UPPER" -mindepth 1 -maxdepth 1 -type c)"

# --- shells
tool=$(old nix store add-path "$W/tool" 2> "$LOG")
check_eq "nix shell" "from a tool" "$(old nix shell "$tool" --command tool 2> "$LOG")"
check_eq "nix-shell" "$p" "$(enter_old -e NIX_BUILD_SHELL=/bin/bash -- nix-shell "$W/build.nix" --run 'echo $input' 2> "$LOG")"
check_eq "as a user" "from a tool" "$(enter_old -u 1000 -- nix shell "$tool" --command tool 2> "$LOG")"

# --- the store as a whole
check "nix store optimise" old nix store optimise
check "nix-store --verify" old nix-store --verify --check-contents
check "stock Nix of today agrees" nix-store --store "$STOCK" --verify --check-contents
check "it stops" stop_up
finish
