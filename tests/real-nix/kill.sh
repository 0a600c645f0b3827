# kill.sh ROUNDS [SEED]: kill -9 at random moments of additions. What was acknowledged is there and verifies,
# the store opens, and nothing is repaired by hand.
source /t/lib.sh
rounds=${1:-5} seed=${2:-$RANDOM}
RANDOM=$seed
echo "seed $seed"
corpus_store
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
[[ ! -d /big ]] || { S=/big/understory; rm -rf "$S"; }     # on a real disk where there is one
us import "$SRC" "${all[0]}" > "$LOG" 2>&1 || { not_ok "the first import"; finish; exit 1; }
: > "$W/acknowledged"

# Small additions one after the other; each one that exits with 0 is acknowledged.
adder() {
  local n=$1 i p
  for (( i = 0; ; i++ )); do
    mkdir -p "$W/tree"
    head -c $(( (i * 7919 + n * 104729) % 300000 )) /dev/urandom > "$W/tree/random"
    printf '%s %s\n' "$n" "$i" > "$W/tree/name"
    p=$(us add --name "tree-$n-$i" "$W/tree" 2> /dev/null | tail -n 1) && [[ -n $p ]] && printf '%s\n' "$p" >> "$W/acknowledged"
  done
}
# A daemon that copies come through; a copy that exits with 0 is acknowledged.
copier() {
  local p
  mkdir -p "$M"
  understory --store "$S" serve --socket "$SOCK" --mount "$M" --trusted-users root >> "$W/lower.daemon.log" 2>&1 &
  wait_for "the socket" test -S "$SOCK"
  for p in "${all[@]}"; do
    nix copy --no-check-sigs --from "$SRC" --to "$DIRECT" "$p" 2> /dev/null && printf '%s\n' "$p" >> "$W/acknowledged"
  done
}
importer() { us import "$SRC" --all > /dev/null 2>&1 && printf '%s\n' "${all[@]}" >> "$W/acknowledged"; }

bad=0
for (( round = 1; round <= rounds; round++ )); do
  case $((round % 3)) in 0) work=copier;; 1) work=importer;; 2) work=adder;; esac
  ms=$(( RANDOM % 1500 + 5 ))
  # a pid namespace of its own: killing its init kills all of it with SIGKILL at one moment
  export -f us wait_for adder copier importer
  export S W M SOCK DIRECT SRC
  all_text=$(printf '%s\n' "${all[@]}")
  export all_text
  unshare --pid --fork --kill-child --mount-proc --propagation private bash -c '
    mapfile -t all <<< "$all_text"; "$1" "$2"; sleep infinity' - "$work" "$round" > "$W/work.log" 2>&1 &
  pid=$!
  sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
  kill -9 "$pid"; wait "$pid" 2> /dev/null || true
  rm -f "$SOCK"
  sort -u "$W/acknowledged" > "$W/expected"
  # opens at once, and has all that was acknowledged
  if ! us stats --json > "$W/stats.json" 2> "$LOG"; then bad=$((bad + 1)); not_ok "round $round ($work, $ms ms): the store opens"; continue; fi
  missing=0
  while read -r p; do us info "$p" > "$LOG" 2>&1 || missing=$((missing + 1)); done < <(shuf -n 20 --random-source=<(yes "$round") "$W/expected")
  if (( missing > 0 )); then bad=$((bad + 1)); not_ok "round $round ($work, $ms ms): $missing acknowledged paths are not valid"; fi
  if (( round % 10 == 0 || rounds <= 10 )) && ! us check > "$LOG" 2>&1; then
    bad=$((bad + 1)); not_ok "round $round ($work, $ms ms): check"
  fi
done
check_eq "$rounds rounds, $(wc -l < "$W/expected") additions acknowledged" 0 "$bad"
check "contents verify at the end" us check --contents
check "an import after it all" us import "$SRC" --all
missing=0
while read -r p; do us export "$p" > /dev/null 2> "$LOG" || missing=$((missing + 1)); done < "$W/expected"
check_eq "all that was acknowledged can be read" 0 "$missing"
for p in "${all[@]}"; do [[ $(dump_hash "$SRC$p") == $(us export "$p" | sha256sum | cut -d ' ' -f 1) ]] || not_ok "NAR of $p"; done
check "a daemon starts" start_daemon --trusted-users root
check "and stops" stop_daemon
finish
