# Flipped bits in packs, index and database: found by check, named, never served silently.
source /t/lib.sh
corpus_store
us import "$SRC" --all > "$W/import.log" 2>&1
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
declare -A expected=()
for p in "${all[@]}"; do expected[$p]=$(dump_hash "$SRC$p"); done
check "check finds nothing in a whole store" us check
cp -a "$S" "$W/whole"
flip() { # FILE OFFSET: inverts one bit
  local byte
  byte=$(od -An -tu1 -j "$2" -N 1 "$1")
  # shellcheck disable=SC2059
  printf "\\x$(printf %02x $((byte ^ 16)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
# What is read is either right or an error; prints how many were errors, and WRONG for silent damage.
read_all() {
  local p bad=0 out
  for p in "${all[@]}"; do
    if out=$(us export "$p" 2> "$W/export.log" | sha256sum | cut -d ' ' -f 1); then
      [[ $out == "${expected[$p]}" ]] || echo "WRONG $p"
    else bad=$((bad + 1)); fi
  done
  echo "$bad"
}
RANDOM=${SEED:=$RANDOM$$}
echo "seed $SEED"
mapfile -t packs < <(find "$S" -type f -name '*pack*' -size +64k | sort)
(( ${#packs[@]} )) || { echo "no packs in:"; find "$S" -type f; }
for round in 1 2 3; do
  rm -rf "$S"; cp -a "$W/whole" "$S"
  pack=${packs[RANDOM % ${#packs[@]}]}
  size=$(stat -c %s "$pack")
  at=$(( (RANDOM * 32768 + RANDOM) % (size - 8192) + 4096 ))
  flip "$pack" "$at"
  check_fails "round $round: a bit at $at of $size of a pack is found" "." us check
  check "round $round: check names what is hurt" grep -Eq "$(basename "$pack")|[0-9a-z]{32}-" "$SAID"
  result=$(read_all)
  check_eq "round $round: nothing wrong is served" "" "$(grep WRONG <<< "$result" || true)"
done
# through the daemon and the mount: EIO and a line in the log that names the path
rm -rf "$S"; cp -a "$W/whole" "$S"
for pack in "${packs[@]}"; do
  size=$(stat -c %s "$pack")
  for (( at = 4096; at < size - 4096; at += 20000 )); do flip "$pack" "$at"; done
done
start_daemon --trusted-users root
wrong=0 errors=0
while read -r -d '' file; do
  if cat "$M/$file" > "$W/read" 2> "$W/read.log"; then cmp -s "$W/read" "$SRC/nix/store/$file" || wrong=$((wrong + 1))
  else errors=$((errors + 1)); fi
done < <(cd "$SRC/nix/store" && find . -type f ! -path './.links/*' -printf '%P\0' | head -z -n 600)
check_eq "the mount never gives wrong bytes" 0 "$wrong"
check "it gives EIO ($errors files)" test "$errors" -gt 0
check "and the log names a store path" grep -Eq '[0-9a-z]{32}-' "$W/lower.daemon.log"
check_fails "nix sees an error, not wrong bytes" "." nix-store --store "$DIRECT" --export "${all[@]}"
check "the daemon stays up" nix path-info --store "$DIRECT" "${all[0]}"
check "and stops on SIGTERM" stop_daemon

# The index of a sealed pack, which is its end. A pack is sealed when it is large: so something large first.
rm -rf "$S"; cp -a "$W/whole" "$S"
head -c 300M /dev/urandom > "$W/random"
large=$(us add "$W/random" 2> "$LOG" | tail -n 1)
rm -rf "$W/whole"; mv "$S" "$W/whole"
fresh() { rm -rf "$S"; cp -a "$W/whole" "$S"; }
fresh
all+=("$large") expected[$large]=$(dump_hash "$W/random")
sealed=$(find "$S/castore/packs" -type f -printf '%s %p\n' | sort -rn | head -n 1 | cut -d ' ' -f 2-)
for offset in 5 200 3000; do
  fresh
  flip "$sealed" $(( $(stat -c %s "$sealed") - offset ))
  check_fails "a bit of a pack's index, $offset bytes before its end, is found" "$(basename "$sealed" .pack)" us check
  check_eq "nothing wrong is served" "" "$(read_all | grep WRONG || true)"
  check_eq "contents are read all the same" 0 "$(read_all)"
done
fresh
find "$S/castore/index" -type f -delete
check "the index directory may be lost" us check
check "check --rebuild-index makes it anew" us check --rebuild-index
check_eq "and all is read" 0 "$(read_all)"

# The database: pages whose structure is broken, then values that SQLite cannot know to be wrong.
database=$S/db.sqlite
fresh_database() { fresh; sqlite3 "$database" 'pragma wal_checkpoint(truncate)' > "$LOG"; }
fresh_database
size=$(stat -c %s "$database")
for (( at = 4096; at < size; at += 4096 )); do flip "$database" "$at"; done
check_fails "broken pages of the database are found" "database|malformed|corrupt" us check
check_eq "nothing wrong is served" "" "$(read_all | grep WRONG || true)"
broken_value() { # COLUMN NEW-VALUE WHAT
  fresh_database
  sqlite3 "$database" "update paths set $1 = $2 where id = (select max(id) from paths)"
  check_fails "a wrong $3 in the database is found" "[0-9a-z]{32}-" us check --contents
  check_eq "a wrong $3: nothing wrong is served" "" "$(read_all | grep WRONG || true)"
}
broken_value nar_hash "randomblob(32)" "NAR hash"
broken_value nar_size "nar_size + 1" "NAR size"
broken_value root "case when root_kind = 2 then root || 'x' else randomblob(length(root)) end" "root node"
finish
