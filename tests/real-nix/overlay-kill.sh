# overlay-kill.sh ROUNDS [SEED]: kill -9 of `up` at random moments of substitution, collection, addition and building;
# afterwards the invariants I1-I7 of an overlay store hold, without any repair by hand.
source /t/lib.sh
source /t/up-lib.sh
rounds=${1:-5} seed=${2:-$RANDOM}
RANDOM=$seed
echo "seed $seed"
corpus_store
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
binary_cache "${all[@]}" 2> /dev/null
DB=$S/merged/nix/var/nix/db/db.sqlite
mkdir -p "$W/roots"
: > "$W/acknowledged"
work() { # ROUND
  local i p
  for (( i = 0; ; i++ )); do
    case $(( ($1 + i) % 4 )) in
      0) p=${all[(i * 7 + $1) % ${#all[@]}]}; nix-store --store "$O" --realise "$p" > /dev/null 2>&1 && printf '%s\n' "$p" >> "$W/acknowledged";;
      1) head -c $((i * 1000 + 10)) /dev/urandom > "$W/random"
         p=$(nix-store --store "$O" --add "$W/random" 2> /dev/null) &&
           nix-store --store "$O" --realise "$p" --add-root "$W/roots/$1-$i" > /dev/null 2>&1 && printf '%s\n' "$p" >> "$W/acknowledged";;
      2) nix-store --store "$O" --gc > /dev/null 2>&1 || true;;
      3) p=$(nix-build --store "$O" --out-link "$W/roots/built-$1-$i" -E "derivation { name = \"built-$1-$i\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo $1 $i > \$out\" ]; }" 2> /dev/null) &&
           [[ -n $p ]] && printf '/nix/store/%s\n' "${p##*/}" >> "$W/acknowledged";;
    esac
  done
}
bad=0
complain() { bad=$((bad + 1)); not_ok "round $round, $ms ms: $1"; }
for (( round = 1; round <= rounds; round++ )); do
  ms=$(( RANDOM % 2000 + 50 ))
  start_up --substituters "file://$CACHE" --trusted-public-keys "$PUBLIC" || { complain "up starts again"; break; }
  work "$round" & worker=$!
  sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
  kill -9 "$up_pid"; wait "$up_pid" 2> /dev/null || true
  kill "$worker"; wait "$worker" 2> /dev/null || true
  # I1: every row's references are rows
  [[ $(sqlite3 "$DB" 'pragma integrity_check; pragma foreign_key_check') == ok ]] || complain "I1: the database"
  start_up --substituters "file://$CACHE" --trusted-public-keys "$PUBLIC" || { complain "up starts again"; break; }
  # I2: a valid path has an entry in the merged directory
  sqlite3 "$DB" 'select path from ValidPaths' > "$W/rows"
  while read -r p; do [[ -e $MERGED/${p##*/} || -L $MERGED/${p##*/} ]] || complain "I2: $p"; done < "$W/rows"
  # I4: no whiteout
  [[ -z $(find "$UPPER" -mindepth 1 -maxdepth 1 -type c) ]] || complain "I4: a whiteout"
  # I5, I6: what is valid below is valid above, and both agree
  while read -r p; do
    below=$(infos --store "unix://$S/run/daemon.sock?root=$S" "$p" 2> /dev/null | jq 'map_values(del(.signatures))') || continue
    [[ $below == "$(infos --store "$O" "$p" 2> /dev/null | jq 'map_values(del(.signatures))')" ]] || complain "I5, I6: $p"
  done < <(shuf -n 15 --random-source=<(yes "$round") <(printf '%s\n' "${all[@]}"))
  # what was acknowledged is there
  sort -u "$W/acknowledged" > "$W/expected"
  while read -r p; do nix path-info --store "$O" "$p" > "$LOG" 2>&1 || complain "lost: $p"; done < "$W/expected"
  check "round $round, $ms ms: stock Nix verifies it" nix-store --store "$STOCK" --verify --check-contents
  stop_up || complain "down"
done
check_eq "$rounds rounds, $(wc -l < "$W/expected") operations acknowledged" 0 "$bad"
check "the castore is whole" us check --contents
finish
