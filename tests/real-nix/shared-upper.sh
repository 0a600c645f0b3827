# One upper store for stock Nix's local-overlay:// and for our overlay store: in turn, and at the same time, with objects
# added by each.
source /t/lib.sh
export NIX_CONFIG="$NIX_CONFIG
sandbox = false"
A=$W/a OSOCK=$W/overlay.sock
THEIRS="local-overlay://?root=$B&upper-layer=$UPPER&lower-store=$(encode "$A")"
OURS="unix://$OSOCK?root=$B"
text() { # STORE NAME REFERENCE...: a file that refers to paths of that store
  local store=$1 name=$2 uses='' path; shift 2
  for path; do uses+=" \${builtins.storePath \"$path\"}"; done
  nix-instantiate --store "$store" --eval --read-write-mode --expr "builtins.toFile \"$name\" \"$name:$uses\"" | tr -d '"'
}
built() { # STORE NAME: built by stock Nix, by itself or for us
  nix-build --no-out-link --store "$1" --expr "derivation { name = \"$2\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo $2 > \$out\" ]; }" 2>> "$LOG"
}
start_ours() {
  rm -f "$OSOCK"
  understory overlay --socket "$OSOCK" --root "$B" --upper "$UPPER" --lower "$A" --trusted-users '*' >> "$W/overlay.daemon.log" 2>&1 &
  ours=$!
  wait_for "our overlay store" nix store info --store "$OURS"
}
stop_ours() { kill "$ours"; wait "$ours" || true; }
# What both say of paths.
agree() { # NAME PATH...
  local name=$1; shift
  check_eq "$name" "$(infos --store "$THEIRS" -r "$@")" "$(infos --store "$OURS" -r "$@")"
}
metadata() { (cd "$MERGED" && find . -mindepth 1 -path './.links' -prune -o -path "./$1*" -printf '%P %y %m %U:%G %T@ %s\n' | sed "s/^${1:0:32}//" | sort); }

leaf=$(text "$A" leaf); middle=$(text "$A" middle "$leaf"); top=$(text "$A" top "$middle" "$leaf")
mkdir -p "$MERGED" "$UPPER" "$W/work"
mount -t overlay overlay -o "lowerdir=$A/nix/store,upperdir=$UPPER,workdir=$W/work,index=off,metacopy=off,redirect_dir=off" "$MERGED"

# --- stock Nix first
nix-store --store "$THEIRS" --check-validity "$middle"
theirs=$(text "$THEIRS" theirs "$middle")
theirs_built=$(built "$THEIRS" theirs-built)
echo plain > "$W/plain"
theirs_added=$(nix-store --store "$THEIRS" --add "$W/plain")

# --- then we
start_ours
agree "what stock Nix added is ours" "$theirs" "$theirs_built" "$theirs_added"
ours_text=$(text "$OURS" ours "$theirs" "$top" 2> "$LOG") && ok "we add to it" || not_ok "we add to it"
ours_built=$(built "$OURS" ours-built) && ok "we have it built" || not_ok "we have it built"
mkdir -p "$W/tree/bin"; echo run > "$W/tree/bin/run"; chmod 700 "$W/tree/bin/run"; ln -s bin/run "$W/tree/link"
ours_tree=$(nix-store --store "$OURS" --add "$W/tree")

# --- stock Nix at the same time
agree "what we added is stock Nix's" "$ours_text" "$ours_built" "$ours_tree"
agree "what is below is known to both" "$top"
theirs_second=$(text "$THEIRS" second "$ours_text" "$ours_built")
agree "what stock Nix adds meanwhile is ours at once" "$theirs_second"
cp -a "$W/tree" "$W/tree2"
theirs_tree=$(nix-store --store "$THEIRS" --add "$W/tree2")
check_eq "metadata of trees are the same" "$(metadata "${theirs_tree##*/}" | sed s/tree2/tree/)" "$(metadata "${ours_tree##*/}")"
check "stock Nix verifies all of it" nix-store --store "$THEIRS" --verify --check-contents
check "we verify all of it" nix-store --store "$OURS" --verify --check-contents

# --- roots and collections of each
nix-store --store "$OURS" --add-root "$W/kept" -r "$theirs_second" > "$LOG" 2>&1
check_eq "stock Nix knows our root" "$W/kept" "$(nix-store --store "$THEIRS" -q --roots "$theirs_second" 2> "$LOG" | sed 's/ ->.*//' | grep -x "$W/kept")"
check "stock Nix collects" nix-store --store "$THEIRS" --gc
check "and leaves what our root keeps" nix path-info --store "$OURS" -r "$theirs_second"
check_eq "files and all" "ours: $theirs $top" "$(cat "$MERGED/${ours_text##*/}")"
check_fails "the rest is gone for us, too" 'is not valid' nix path-info --store "$OURS" "$ours_tree"
again=$(nix-store --store "$OURS" --add "$W/tree")
check_eq "and can be added again" "$ours_tree" "$again"
check "we collect" nix-store --store "$OURS" --gc
check_fails "with effect for stock Nix" 'is not valid' nix path-info --store "$THEIRS" "$ours_tree"
check "the root is kept" nix path-info --store "$THEIRS" -r "$theirs_second"
check "what is below is kept by both" nix path-info --store "$THEIRS" -r "$top"

# --- and stock Nix alone again
stop_ours
check "stock Nix goes on alone" text "$THEIRS" third "$theirs_second"
check "and verifies all of it" nix-store --store "$THEIRS" --verify --check-contents
check_eq "the lower store was not touched" "" "$(find "$A/nix/store" -newer "$W/plain" -mindepth 1 ! -name .links -print)"
umount "$MERGED"
finish
