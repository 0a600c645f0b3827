# adopt.sh [ROUNDS] [SEED]: adopts stores that a real Nix made, kills it at random moments, and goes back.
source /t/lib.sh
rounds=${1:-6} seed=${2:-$RANDOM}
RANDOM=$seed
echo "seed $seed"
corpus_store
mapfile -t tops < /corpus/top-paths
R=$W/root REAL=$W/root/nix/store
# Nix's state directory of the adopted store with the lower daemon's socket of `up`
overlay_url() { us adopt "$R" --yes --json 2>> "$W/adopt.daemon.log" | jq -r .url; }
verify() { nix-store --store "$1" --verify --check-contents 2>&1 | tee "$W/verify.log"; ! grep -Ev '^(reading the Nix store|checking (path existence|link hashes|store hashes)|warning: .*experimental|.*unknown setting)' "$W/verify.log"; }
is_over() { grep -q " $REAL overlay " /proc/self/mounts; }
no_mounts() { ! grep -q " $W/\(root\|understory\)" /proc/self/mounts; }
all_infos() { infos --store "$1" --all; }
leave() { us down > /dev/null 2>&1 || true; }

make_store() { # a store with what stock Nix does to one: hard links, garbage, roots, leftovers
  rm -rf "$R" "$S"; mkdir -p "$R"
  nix copy --no-check-sigs --from "$SRC" --to "$R" "${tops[0]}"
  printf 'text\n' > "$W/plain"; printf 'garbage\n' > "$W/garbage"
  plain=$(nix-store --store "$R" --add "$W/plain")
  garbage=$(nix-store --store "$R" --add "$W/garbage")
  mkdir -p "$W/tree/sub"; ln -sfn ../plain "$W/tree/sub/link"; printf '#!/bin/sh\n' > "$W/tree/run"; chmod +x "$W/tree/run"
  tree=$(nix-store --store "$R" --add "$W/tree")
  nix-store --store "$R" --optimise
  mkdir -p "$R/nix/var/nix/gcroots"
  ln -sfn "${tops[0]}" "$R/nix/var/nix/gcroots/top"; ln -sfn "$plain" "$R/nix/var/nix/gcroots/plain"; ln -sfn "$tree" "$R/nix/var/nix/gcroots/tree"
  echo unfinished > "$REAL/00000000000000000000000000000000-unfinished"
}
check "a store" make_store
all_infos "$R" > "$W/before.json"

# --- beforehand
check "a report" us adopt "$R" --dry-run
check "as JSON" bash -c "understory --store $S adopt $R --dry-run --json > $W/report.json"
check_eq "counts the paths" "$(jq length "$W/before.json")" "$(jq .paths "$W/report.json")"
check_eq "and what is left over" 1 "$(jq .leftovers "$W/report.json")"
check "estimates a range" jq -e '.estimate | .castoreBytesMin <= .castoreBytesMax and .castoreBytesMax > 0' "$W/report.json"
check_eq "nothing stands in the way" "[]" "$(jq -c .obstacles "$W/report.json")"
check "and changes nothing" test ! -e "$S"
check_fails "nothing happens without a yes" "nothing was done: this needs a yes" us adopt "$R"
check_fails "what is no store is refused" "there is no local Nix store in /tmp/w/tree: " us adopt "$W/tree" --yes
check_fails "a castore inside of the store is refused" "lies in the store that is to be adopted" understory --store "$REAL/x" adopt "$R" --yes
check_fails "there is nothing to undo" "has not adopted" us adopt "$R" --undo --yes

# --- somebody uses the store
coproc HOLD { flock --shared "$R/nix/var/nix/db/big-lock" sh -c 'echo held; read -r line'; }
read -r _ <&"${HOLD[0]}"
check_fails "a store in use is not swapped" "the Nix store in .* is in use: .*\(process" us adopt "$R" --yes --wait 0
check "and is as it was" no_mounts
echo >&"${HOLD[1]}"; wait "$HOLD_PID" || true

# --- the swap
exec 8< "$REAL/${plain##*/}"
check "adopt" us adopt "$R" --yes
check "the overlay is over the store directory" is_over
check_eq "a file that was open stays readable" "text" "$(cat <&8)"
exec 8<&-
url=$(overlay_url)
check "adopting again changes nothing" us adopt "$R" --yes
check "stock Nix verifies it as an overlay store" verify "$url"
check_eq "with the same path infos" "$(cat "$W/before.json")" "$(all_infos "$url")"
check_eq "nothing was written above" "" "$(find "$S/upper" -mindepth 1 -maxdepth 1 ! -name .links)"
printf 'on top\n' > "$W/new"
new=$(nix-store --store "$url" --add "$W/new")
check "an addition goes to the upper directory" test -e "$S/upper/${new##*/}" -a -e "$REAL/${new##*/}"
cat > "$W/build.nix" <<NIX
derivation { name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh"; tree = builtins.storePath "$tree";
  args = [ "-c" "echo \$tree > \$out" ]; }
NIX
built=$(nix-build --store "$url" --option sandbox true --no-out-link "$W/build.nix" 2> "$LOG") || not_ok "a build on top"
ln -sfn "$built" "$R/nix/var/nix/gcroots/built"; ln -sfn "$new" "$R/nix/var/nix/gcroots/new"
check "a collection beside the overlay" us gc
check "leaves what the store needs" verify "$url"
check "a collection by stock Nix" nix store gc --store "$url"
check "leaves no whiteout" test -z "$(find "$S/upper" -mindepth 1 -maxdepth 1 -type c)"
check_eq "garbage is not valid any more" "" "$(nix path-info --store "$url" --all | grep -Fx -- "$garbage-" || true)"
after=$(all_infos "$url")

# --- a restart of the machine: the mount is gone, somebody adds to the store before it is back
check "down" us down
check "no mount is left" no_mounts
check_fails "the castore keeps what the store needs" "the Nix store at $REAL needs what is in $S: nothing is deleted" us gc
printf 'meanwhile\n' > "$W/meanwhile"
mean=$(nix-store --store "$R" --add "$W/meanwhile")
ln -sfn "$mean" "$R/nix/var/nix/gcroots/mean"
check "adopt brings it back" us adopt "$R" --yes
check_eq "what was added meanwhile shows" meanwhile "$(cat "$REAL/${mean##*/}")"
check "all verifies" verify "$url"
check "status, with no flags" us status
after=$(all_infos "$url")

# --- a killed instance
kill -9 "$(jq -r .instance.pid <(us status --json))"
wait_for "the lock to be free" flock --nonblock "$S/run/lock" true
check "adopt brings it back over the dead mount" us adopt "$R" --yes
check "all verifies" verify "$url"

# --- space
used() { du -s --block-size=1 --one-file-system "$1" | cut -f 1; }
exec 9< "$REAL/${tree##*/}/run"
check "reclaim" us adopt "$R" --reclaim --yes
exec 9<&-
check "all verifies without the originals" verify "$url"
check_eq "with the same path infos" "$after" "$(all_infos "$url")"
us down > "$LOG" 2>&1
check_eq "originals are gone" 2 "$(find "$REAL" -mindepth 1 -maxdepth 1 ! -name .links | wc -l)"
check "also with the overlay gone the store comes back" us adopt "$R" --yes
check "all verifies" verify "$url"

# --- back
exec 9< "$REAL/${tree##*/}/run"
check_fails "an overlay in use is not taken away" "the overlay on $REAL is in use: .*\(process $$\)" us adopt "$R" --undo --yes
exec 9<&-
check "undo" us adopt "$R" --undo --yes
check "no mount is left" no_mounts
check "the note of it is gone" test ! -e "$S/adopt.json"
check "stock Nix verifies the store" verify "$R"
check_eq "with the same path infos" "$after" "$(all_infos "$R")"
check_eq "nothing is left above" "" "$(find "$S/upper" -mindepth 1 -maxdepth 1 ! -name .links)"
check_eq "metadata is canonical" "" "$(find "$REAL" -mindepth 1 -path "$REAL/.links" -prune -o ! -name '*-unfinished' \( ! -type l ! -perm 0444 ! -perm 0555 -o ! -newermt @0 -o -newermt @1.5 -o ! -user 0 \) -print)"
check_eq "and without overlayfs's marks" "" "$(getfattr -R -h -d -m . --absolute-names "$REAL" 2> /dev/null || true)"
check "builds go on" nix-build --store "$R" --option sandbox true --no-out-link "$W/build.nix"

# --- damage is found before anything happens
damaged=$REAL/${plain##*/}
chmod u+w "$damaged"; printf 'tex_\n' > "$damaged"
S=$W/understory2
check_fails "a damaged path is not adopted" "1 of .* paths were not imported" us adopt "$R" --yes
check "and nothing is mounted" no_mounts
S=$W/understory

# --- kill -9 at random moments
survives() { # WHAT MS COMMAND...: killed after that time, then it is run to its end
  local what=$1 ms=$2; shift 2
  setsid understory --store "$S" adopt "$R" --yes "$@" > "$W/killed.log" 2>&1 &
  local pid=$!
  sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
  kill -9 "$pid" 2> /dev/null || true
  wait "$pid" 2> /dev/null || true
}
bad=0
check "a store to be killed over" make_store
all_infos "$R" > "$W/before.json"
for (( round = 1; round <= rounds; round++ )); do
  leave; rm -rf "$S"
  ms=$(( RANDOM % 2500 + 20 )); survives adopt "$ms"
  ms2=$(( RANDOM % 1500 + 20 )); survives adopt "$ms2"
  # sometimes straight back, sometimes on
  if (( RANDOM % 3 == 0 )); then
    us adopt "$R" --undo --yes > "$LOG" 2>&1 || grep -q 'has not adopted' "$LOG" || { bad=$((bad + 1)); not_ok "round $round: undo after kills at $ms and $ms2 ms"; }
  else
    wait_for "a stable instance" us adopt "$R" --yes || { us adopt "$R" --yes > "$LOG" 2>&1; bad=$((bad + 1)); not_ok "round $round: adopt after kills at $ms and $ms2 ms"; }
    survives reclaim "$(( RANDOM % 800 + 20 ))" --reclaim
    verify "$url" > "$LOG" 2>&1 || { bad=$((bad + 1)); not_ok "round $round: verify of the overlay store"; }
    if (( RANDOM % 2 == 0 )); then us adopt "$R" --reclaim --yes > "$LOG" 2>&1 || { bad=$((bad + 1)); not_ok "round $round: reclaim"; }; fi
    survives undo "$(( RANDOM % 1500 + 20 ))" --undo
    us adopt "$R" --undo --yes > "$LOG" 2>&1 || grep -q 'has not adopted' "$LOG" || { bad=$((bad + 1)); not_ok "round $round: undo after a kill"; }
  fi
  no_mounts || { bad=$((bad + 1)); grep "$W" /proc/self/mounts > "$LOG"; not_ok "round $round: mounts are left"; }
  verify "$R" > "$LOG" 2>&1 || { bad=$((bad + 1)); not_ok "round $round: stock Nix verifies"; }
  [[ $(all_infos "$R") == "$(cat "$W/before.json")" ]] || { bad=$((bad + 1)); not_ok "round $round: path infos"; }
done
check_eq "$rounds rounds of kills" 0 "$bad"

# --- this machine's own store, at /nix/store
if [[ -e /nix/var/nix/db/db.sqlite ]] || nix-store --init; then
  S=$W/own
  own=$(nix-store --add "$W/plain")
  check "the machine's own store" us adopt / --yes
  check "is the overlay now" grep -q ' /nix/store overlay ' /proc/self/mounts
  own_url=$(us adopt / --yes --json 2> "$LOG" | jq -r .url)
  check "and Nix works on it" nix-store --store "$own_url" --verify --check-contents
  check "and back" us adopt / --undo --yes
  check_eq "with its files" text "$(cat "$own")"
fi
finish
