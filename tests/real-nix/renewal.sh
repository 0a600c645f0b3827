# renewal.sh [ROUNDS]: the overlay moves on to new generations beside builds and readers, and not under a build.
source /t/lib.sh
source /t/up-lib.sh
rounds=${1:-3}
corpus_store
us import "$SRC" --all > "$W/import.log" 2>&1
start_up --option image-paths-min 1 --option image-newer-paths-max 2
standing() { us status --json | jq -r "${1:-.standing.generation}"; }
moved_on() { (( $(standing) > $1 )); }
first=$(standing)
check "the overlay stands on an image" test "$first" -ge 1
python3 - "$MERGED" "$W" <<'PY' & reader=$!
# Reads every file that was there in the beginning, over and over, until "stop" is there.
import hashlib, json, os, sys, time
top, w = sys.argv[1:3]
def walk(): return [os.path.join(at, f) for at, _, files in os.walk(top) for f in files]
def digest(p):
    if os.path.islink(p): return os.readlink(p)
    with open(p, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()
want = {p: digest(p) for p in walk()}; bad = []; reads = 0
open(w + "/begun", "w").close()
while not os.path.exists(w + "/stop"):
    for p, d in want.items():
        try:
            if digest(p) != d: bad.append("differs: " + p)
        except OSError as e: bad.append(f"{p}: {e}")
        reads += 1
        if reads % 50 == 0: time.sleep(0.001)
        if os.path.exists(w + "/stop"): break
json.dump({"reads": reads, "bad": bad}, open(w + "/result", "w"))
PY
wait_for "the reader" test -e "$W/begun"
# Adds three paths to the castore, which is more than the live part may have.
more() { # NAME
  local n
  for n in 1 2 3; do
    mkdir -p "$W/tree"; echo "$1 $n" > "$W/tree/file"
    us -q add "$W/tree" --name "$1-$n" > /dev/null
  done
}
G=$W/gate
mkdir "$G"
for (( round = 1; round <= rounds; round++ )); do
  at=$(standing)
  # A build that waits for us.
  mkfifo "$G/go-$round"
  nix-build --store "$O" --no-out-link --option extra-sandbox-paths "$G" -E "derivation { name = \"renewal-$round\"; system = builtins.currentSystem;
    PATH = \"/usr/bin:/bin\"; builder = \"/bin/sh\"; args = [ \"-c\" \"echo $round > \$out; : > $G/in-$round; read go < $G/go-$round; echo \$go >> \$out\" ]; }" \
    > "$W/out-$round" 2> "$W/build-$round.log" & build=$!
  wait_for "the build" test -e "$G/in-$round"
  more "round-$round"
  wait_for "the next generation" test -d "$S/generations/$((at + 1))"
  wait_for "what it waits for" eval '[[ $(standing .standing.waitsFor) != null ]]'
  check_eq "round $round: it does not move on under a build" "$at" "$(standing)"
  echo went > "$G/go-$round"
  check "round $round: the build ends" wait "$build"
  check "round $round: then it moves on" wait_for "the next generation" moved_on "$at"
  check_eq "round $round: the output is there" "$round went" "$(tr '\n' ' ' < "$MERGED/$(basename "$(< "$W/out-$round")")" | sed 's/ $//')"
  check_eq "round $round: and what came to the castore" "round-$round 3" "$(cat "$MERGED"/*-"round-$round-3"/file)"
  check "round $round: valid" nix path-info --store "$O" "$(< "$W/out-$round")"
done
: > "$W/stop"
wait "$reader" || true
check_eq "none of $(jq .reads "$W/result") reads failed" 0 "$(jq '.bad | length' "$W/result")"
jq -r '.bad[:5][]' "$W/result"
check "all is valid" nix-store --store "$O" --verify --check-contents
check "down" stop_up
check "no mount stays" test -z "$(grep "$S" /proc/self/mountinfo | grep -v tmpfs || true)"
finish
