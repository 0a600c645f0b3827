# gc-beside.sh [SECONDS]: `understory gc` over and over beside clients that substitute, build and read. What has a root stays valid, visible and
# whole; what is deleted is neither valid nor visible.
source /t/lib.sh
source /t/up-lib.sh
seconds=${1:-15}
corpus_store
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
binary_cache "${all[@]}" 2> /dev/null
us import "$SRC" --all > "$W/import.log" 2>&1
start_up --option image-paths-min 1 --option image-newer-paths-max 4 --substituters "file://$CACHE" --trusted-public-keys "$PUBLIC"
standing() { us status --json | jq -r .standing.generation; }
first=$(standing)
check "the overlay stands on an image" test "$first" -ge 1
mkdir -p "$W/roots" "$W/faults" "$W/swept"
declare -A want
for p in "${all[@]}"; do want[$p]=$(dump_hash "$MERGED/${p##*/}"); done
end=$((SECONDS + seconds))
fault() { printf '%s\n' "$*" >> "$W/faults/$BASHPID"; }
substituter() {
  local p root
  while (( SECONDS < end )); do
    p=${all[RANDOM % ${#all[@]}]}
    root=$W/roots/$1-${p##*/}
    nix-store --store "$O" --realise "$p" --add-root "$root" > /dev/null 2> "$W/substitute-$1.log" ||
      { fault "substitute: $(< "$W/substitute-$1.log")"; continue; }
    nix path-info --store "$O" "$p" > /dev/null 2> "$W/info-$1.log" || fault "it has a root and is not valid: $(< "$W/info-$1.log")"
    [[ $(dump_hash "$MERGED/${p##*/}" 2> "$W/dump-$1.log") == "${want[$p]}" ]] || fault "it has a root and reads otherwise: $(< "$W/dump-$1.log")"
    if (( RANDOM % 2 )); then rm "$root"; fi
    # Moments at which nobody uses the overlay.
    sleep 0.1
  done
}
builder() {
  local i
  for (( i = 0; SECONDS < end; i++ )); do
    nix-build --store "$O" -o "$W/roots/built-$i" -E "derivation { name = \"built-$i\"; system = builtins.currentSystem; builder = \"/bin/sh\";
      args = [ \"-c\" \"echo $i > \$out\" ]; }" > /dev/null 2> "$W/build.log" || { fault "build: $(tail -n 3 "$W/build.log")"; continue; }
    [[ $(< "$MERGED/$(basename "$(readlink "$W/roots/built-$i")")") == "$i" ]] || fault "built and reads otherwise: $i"
    sleep 0.2
  done
}
adder() {
  local i
  for (( i = 0; SECONDS < end; i++ )); do
    mkdir -p "$W/tree"; echo "$i" > "$W/tree/file"
    us -q add "$W/tree" --name "dead-$i" > /dev/null 2> "$W/add.log" || fault "add: $(< "$W/add.log")"
    sleep 0.1
  done
}
sweeper() {
  while (( SECONDS < end )); do us gc >> "$W/swept/paths" 2>> "$W/swept/said" || fault "gc: $(tail -n 3 "$W/swept/said")"; done
}
pids=()
n=0
for who in substituter substituter builder adder sweeper; do
  n=$((n + 1)); "$who" "$n" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || fault "a client died"; done
cat "$W"/faults/* > "$W/all-faults" 2> /dev/null || true
check "no fault of 5 clients in $seconds s" bash -c '! sort "$1" | uniq -c | sort -rn | head -n 40 | grep .' - "$W/all-faults"
# On a busy machine there may have been no moment at which nobody used the overlay.
mkdir -p "$W/tree"; echo last > "$W/tree/file"
us -q add "$W/tree" --name dead-last > /dev/null
swept() { us gc >> "$W/swept/paths" 2>> "$W/swept/said" && [[ -s $W/swept/paths ]]; }
check "paths were deleted" wait_for "a collection" swept
echo "        $(wc -l < "$W/swept/paths") paths"
check "the overlay moved on" test "$(standing)" -gt "$first"
# A collection that was put off half-way is made good by the next generation.
shows_what_is_valid() {
  diff <(nix path-info --store "$O" --all 2> /dev/null | sed 's#.*/##' | sort) <(find "$MERGED" -mindepth 1 -maxdepth 1 -name '[^.]*' -printf '%f\n' | sort) > "$W/diff"
}
check "what is valid is visible, and nothing else" wait_for "that" shows_what_is_valid || cat "$W/diff"
check "the castore is whole" us check --contents
check "the instance stops" stop_up
finish
