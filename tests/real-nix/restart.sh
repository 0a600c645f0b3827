# restart.sh ROUNDS [SEED]: kill -9 of the mount server under readers and builds through the overlay, a hung one, a killed
# daemon, an upgrade: no read fails, every checksum holds, every build succeeds.
source /t/lib.sh
source /t/up-lib.sh
rounds=${1:-5} seed=${2:-$RANDOM}
RANDOM=$seed
echo "seed $seed"
corpus_store
mapfile -t all < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
us import "$SRC" --all > "$W/import.log" 2>&1
start_up --watchdog 2
record() { jq -r "$1" "$S/run/supervisor.json"; }
worker() { record ".workers[] | select(.role == \"$1\") | if .ready then .pid else empty end"; }
# Waits until another process of that role serves than PID.
wait_for_other() { # ROLE PID
  local now end=$((SECONDS + 60))
  until now=$(worker "$1") && [[ -n $now && $now != "$2" ]]; do
    (( SECONDS < end )) || return 1
    sleep 0.01
  done
}
python3 - "$MERGED" "$W/sums" "${all[@]##*/}" <<'PY'
import hashlib, json, os, sys
top, out = sys.argv[1:3]
def digest(path):
    if os.path.islink(path): return "-> " + os.readlink(path)
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()
want = {}
for name in sys.argv[3:]:
    root = os.path.join(top, name)
    if os.path.islink(root) or not os.path.isdir(root): want[name] = digest(root); continue
    for at, dirs, files in os.walk(root):
        for f in files + [d for d in dirs if os.path.islink(os.path.join(at, d))]:
            p = os.path.join(at, f); want[os.path.relpath(p, top)] = digest(p)
json.dump(want, open(out, "w"))
PY
cat > "$W/read.py" <<'PY'
# Reads everything over and over, with caches dropped, until the file "stop" is there; says what failed.
import hashlib, json, os, sys, threading
top, sums, stop, progress, result = sys.argv[1:6]
want = json.load(open(sums)); bad = []; reads = [0] * 3
def digest(path):
    if os.path.islink(path): return "-> " + os.readlink(path)
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()
def read(n):
    names = list(want)[n::2] + list(want)[1 - n::2] if n < 2 else list(want)[::-1]
    while not os.path.exists(stop):
        for name in names:
            try:
                if digest(os.path.join(top, name)) != want[name]: bad.append("differs: " + name)
            except OSError as e: bad.append(f"{name}: {e}")
            reads[n] += 1
            if reads[n] % 20 == 0:
                if n == 0: open("/proc/sys/vm/drop_caches", "w").write("3")
                with open(progress + ".new" + str(n), "w") as f: f.write(str(sum(reads)))
                os.rename(progress + ".new" + str(n), progress)
                if os.path.exists(stop): return
threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
json.dump({"reads": sum(reads), "bad": bad}, open(result, "w"))
PY
# Builds that read a whole tree through the overlay, until "stop" is there: the output is the checksum of what they read.
tree=$(for p in "${all[@]}"; do [[ ! -d $MERGED/${p##*/} ]] || printf '%s %s\n' "$(find "$MERGED/${p##*/}" -type f | wc -l)" "$p"; done |
  sort -rn | sed -n '1s/^[0-9]* //p')
sum_of() { (cd "$1" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum); }
sum=$(sum_of "$MERGED/${tree##*/}")
build() {
  local i out
  for (( i = 0; ; i++ )); do
    [[ ! -e $W/stop ]] || return 0
    if out=$(nix-build --store "$O" --no-out-link -E "derivation { name = \"restart-$seed-$i\"; system = builtins.currentSystem;
      PATH = \"/usr/bin:/bin\"; LC_ALL = \"C\"; builder = \"/bin/sh\"; tree = builtins.storePath \"$tree\"; args = [ \"-c\"
      \"cd \$tree && find . -type f -print0 | sort -z | xargs -0 cat | sha256sum > \$out\" ]; }" 2> "$W/build-error") &&
      [[ $(< "$MERGED/${out##*/}") == "$sum" ]]; then printf '%s\n' "$out" >> "$W/built"
    else { echo "build $i: $out"; cat "$W/build-error"; } >> "$W/failed-builds"
    fi
  done
}
: > "$W/built" > "$W/failed-builds"
echo 0 > "$W/progress"
python3 "$W/read.py" "$MERGED" "$W/sums" "$W/stop" "$W/progress" "$W/result" & reader=$!
build & builder=$!
lost=0
for (( round = 1; round <= rounds; round++ )); do
  # Between two kills something must have been read.
  before=$(< "$W/progress") end=$((SECONDS + 60))
  until (( $(< "$W/progress") > before )) || (( SECONDS >= end )); do sleep 0.02; done
  pid=$(worker mount)
  kill -9 "$pid"
  wait_for_other mount "$pid" || { lost=1; break; }
done
check_eq "$rounds mount servers were killed and replaced" 0 "$lost"
pid=$(worker mount)
kill -STOP "$pid"
check "a hung mount server is replaced" wait_for_other mount "$pid"
mount_pid=$(worker mount) daemon_pid=$(worker daemon)
check "upgrade" us upgrade
check "upgrade replaces the mount server" test "$(worker mount)" != "$mount_pid"
check "upgrade replaces the daemon" test "$(worker daemon)" != "$daemon_pid"
: > "$W/stop"
wait "$reader" "$builder" || true
check_eq "none of $(jq .reads "$W/result") reads failed" 0 "$(jq '.bad | length' "$W/result")"
jq -r '.bad[:5][]' "$W/result"
check_eq "none of $(wc -l < "$W/built") builds failed" 0 "$(grep -c '^build' "$W/failed-builds" || true)"
check "there were builds" test -s "$W/built"
head -n 20 "$W/failed-builds"
for (( round = 1; round <= 3; round++ )); do
  pid=$(worker daemon)
  kill -9 "$pid"
  # No waiting: the socket is there, and who connects is served by the next one.
  check "a client that connects after daemon $round was killed" nix store info --store "$O"
done
check "status" us status
check "down" stop_up
check "no mount stays" test -z "$(grep "$S" /proc/self/mountinfo | grep -v tmpfs || true)"
finish
