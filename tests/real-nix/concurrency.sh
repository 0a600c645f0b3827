# concurrency.sh SECONDS: 16 clients that add, copy, substitute, build, collect and read at once. Nothing that has a
# root is collected, nothing is lost, memory stays bounded, and stock Nix finds the database consistent.
source /t/lib.sh
source /t/up-lib.sh
seconds=${1:-20}
corpus_store
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
binary_cache "${all[@]}" 2> /dev/null
start_up --substituters "file://$CACHE" --trusted-public-keys "$PUBLIC"
mkdir -p "$W/roots" "$W/faults"
end=$((SECONDS + seconds))
fault() { printf '%s\n' "$*" >> "$W/faults/$BASHPID"; }
# Keeps a path for ever; it may have been collected before it has its root, but not after that.
keep() { # PATH
  nix-store --store "$O" --realise "$1" --add-root "$W/roots/${1##*/}" > /dev/null 2>&1 || return 0
  nix path-info --store "$O" "$1" > /dev/null 2>&1 || fault "kept but not valid: $1"
  [[ -e $MERGED/${1##*/} ]] || fault "kept but not visible: $1"
}
adder() {
  local i p kept=()
  for (( i = 0; SECONDS < end; i++ )); do
    mkdir -p "$W/tree-$1"
    head -c $(( RANDOM * 8 )) /dev/urandom > "$W/tree-$1/random"; printf '%s %s\n' "$1" "$i" > "$W/tree-$1/name"
    p=$(nix-store --store "$O" --add "$W/tree-$1" 2> "$W/add-$1.log") || { fault "add: $(< "$W/add-$1.log")"; continue; }
    if (( i % 2 )); then
      keep "$p"
      kept+=("${p##*/}")
      if (( ${#kept[@]} > 100 )); then rm -f "$W/roots/${kept[0]}"; kept=("${kept[@]:1}"); fi
    fi
  done
}
copier() {
  local p
  while (( SECONDS < end )); do
    p=${all[RANDOM % ${#all[@]}]}
    nix copy --no-check-sigs --from "$SRC" --to "$O" "$p" 2> "$W/copy-$1.log" || fault "copy: $(< "$W/copy-$1.log")"
    nix path-info --store "$O" -r "$p" > /dev/null 2>&1 || fault "copied but not valid: $p"
  done
}
substituter() {
  local p
  while (( SECONDS < end )); do
    p=${all[RANDOM % ${#all[@]}]}
    nix-store --store "$O" --realise "$p" > /dev/null 2> "$W/substitute-$1.log" || fault "substitute: $(< "$W/substitute-$1.log")"
    [[ -e $MERGED/${p##*/} ]] || fault "substituted but not visible: $p"
  done
}
builder() {
  local i p
  for (( i = 0; SECONDS < end; i++ )); do
    p=$(nix-build --store "$O" --no-out-link -E "derivation { name = \"built-$1-$i\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo $1 $i > \$out\" ]; }" 2> "$W/build-$1.log") ||
      { fault "build: $(tail -n 3 "$W/build-$1.log")"; continue; }
    keep "$p"
  done
}
collector() {
  while (( SECONDS < end )); do nix-store --store "$O" --gc > "$W/gc-$1.log" 2>&1 || fault "gc: $(tail -n 3 "$W/gc-$1.log")"; done
}
reader() {
  local r
  while (( SECONDS < end )); do
    for r in "$W"/roots/*; do
      # an adder may let go of it at any moment
      r=$(readlink "$r") || continue
      r=${r##*/}
      nix-store --dump "$MERGED/$r" > /dev/null 2> "$W/read-$1.log" || [[ ! -L $W/roots/$r ]] || fault "read $r: $(< "$W/read-$1.log")"
      (( SECONDS < end )) || break
    done
    # what is listed may be collected before it is asked for
    nix path-info --store "$O" --all > /dev/null 2> "$W/read-$1.log" || grep -q "is not valid" "$W/read-$1.log" || fault "list: $(< "$W/read-$1.log")"
  done
}
# Proportional set sizes of all processes of the instance, in KiB, every two seconds.
memory() {
  local pids
  while (( SECONDS < end )); do
    pids=$(jq -r '.pid, (.workers[] | select(.ready) | .pid)' "$S/run/supervisor.json")
    for pid in $pids; do cat "/proc/$pid/smaps_rollup"; done 2> /dev/null | awk '/^Pss:/ { s += $2 } END { print s }' >> "$W/memory"
    sleep 2
  done
}
memory & memory_pid=$!
pids=()
n=0
for who in adder adder adder adder copier copier copier substituter substituter substituter builder builder collector collector reader reader; do
  n=$((n + 1)); "$who" "$n" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || fault "a client died"; done
wait "$memory_pid" || true
cat "$W"/faults/* > "$W/all-faults" 2> /dev/null || true
check "no fault of 16 clients in $seconds s" bash -c '! sort "$1" | uniq -c | sort -rn | head -n 40 | grep .' - "$W/all-faults"
quarter=$(( $(wc -l < "$W/memory") / 4 ))
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] + 0 }'; }
early=$(head -n $((2 * quarter)) "$W/memory" | tail -n "$quarter" | median) late=$(tail -n "$quarter" "$W/memory" | median)
most=$(sort -n "$W/memory" | tail -n 1)
check "at most 128 MiB are used ($most KiB)" test "$most" -le $((128 * 1024))
# What a short load shows is how caches fill.
if (( seconds >= 600 )); then
  check "and it does not grow (second quarter $early KiB, last quarter $late KiB)" test "$late" -le $((early + 4096))
fi
kept=$(find "$W/roots" -type l | wc -l)
check "at least something was kept ($kept paths)" test "$kept" -gt 5
lost=()
for r in "$W"/roots/*; do
  r=$(readlink "$r")
  nix path-info --store "$O" "$r" > /dev/null 2>&1 || lost+=("$r")
done
check_eq "kept paths that are gone" "" "${lost[*]}"
check_eq "no whiteout" "" "$(find "$UPPER" -mindepth 1 -maxdepth 1 -type c)"
check "stock Nix verifies it all" nix-store --store "$STOCK" --verify --check-contents
check_eq "and has nothing to complain of" "" "$(grep -Ev '^(reading the Nix store|checking (path existence|link hashes|store hashes)|warning: .*experimental)' "$LOG" || true)"
check "SQLite finds the database whole" test "$(sqlite3 "$S/merged/nix/var/nix/db/db.sqlite" 'pragma integrity_check; pragma foreign_key_check')" = ok
stop_up || true
check "the castore is whole" us check --contents
finish
