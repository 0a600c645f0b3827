# memory.sh [full]: imports stay under 300 MiB of resident memory; full: a 4 GiB file and 1,000,000 small files.
source /t/lib.sh
if [[ ${1-} == full ]]; then megabytes=4096 files=1000000 D=/big; else megabytes=512 files=50000 D=$W; fi
[[ -d $D ]] || { echo "memory.sh full needs UNDERSTORY_TEST_DIR, a directory with 15 GB"; exit 2; }
S=$D/memory-understory
limit=$((300 * 1024))
peak() { # NAME COMMAND...: succeeds, and its resident memory stays under the limit
  local name=$1; shift
  python3 - "$W/peak" "$@" > "$LOG" 2>&1 <<'PY' || { not_ok "$name"; return 0; }
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
PY
  local kib; kib=$(< "$W/peak")
  echo "resident memory $kib KiB, limit $limit" >> "$LOG"
  if (( kib < limit )); then ok "$name: $((kib / 1024)) MiB"; else not_ok "$name: $((kib / 1024)) MiB"; fi
}
rm -rf "$D/memory-large" "$D/memory-many" "$S"
head -c "${megabytes}M" /dev/urandom > "$D/memory-large"
peak "a file of $megabytes MiB" understory --store "$S" add "$D/memory-large"
rm -f "$D/memory-large"
python3 - "$D/memory-many" "$files" <<'PY'
import os, sys
for i in range(int(sys.argv[2])):
    d = os.path.join(sys.argv[1], str(i // 1000))
    if i % 1000 == 0: os.makedirs(d)
    with open(os.path.join(d, f"{i}.txt"), "w") as f: f.write(f"{i}\n" * (i % 100))
PY
peak "$files small files" understory --store "$S" add "$D/memory-many"
rm -rf "$D/memory-many"
peak "check" understory --store "$S" check
rm -rf "$S"
finish
