# One command: `understory up` mounts, serves and overlays; Nix uses the URL that it prints.
source /t/lib.sh
corpus_store
mapfile -t tops < /corpus/top-paths
us import "$SRC" "${tops[0]}" > "$W/import.log" 2>&1
start_up() {
  rm -f "$W/up.json"      # what an earlier one printed must not pass for an answer
  understory --store "$S" up --json --trusted-users root > "$W/up.json" 2>> "$W/up.daemon.log" &
  daemon_pid=$!
  wait_for "understory up" jq -e .url "$W/up.json"
}
check "up" start_up
url=$(jq -r .url "$W/up.json") merged=$(jq -r .merged "$W/up.json") lower=$(jq -r .lower "$W/up.json") upper=$(jq -r .upper "$W/up.json")
socket=$(jq -r .socket "$W/up.json")
check "status" us status
check "doctor finds nothing wrong" us doctor
check "Nix takes the URL" nix path-info --store "$url" -r "${tops[0]}"
check "and the mount is as it must be" nix-store --store "$url" --verify --check-contents
check_fails "a second up says that one runs" "already|runs|running" us up

# Names that were looked up before they were published: overlayfs remembers that they were not there.
lookups=0 hidden=0
probe() { # PATH, then a command that publishes it
  local path=$1 name=${1##*/}; shift
  if [[ -e $merged/$name || -e $lower/$name ]]; then return 1; fi
  stat "$merged/$name" > /dev/null 2>&1 || true
  ls "$merged/$name/x" > /dev/null 2>&1 || true
  lookups=$((lookups + 1))
  "$@" > "$LOG" 2>&1 || { not_ok "publishing $name"; return 0; }
  [[ -e $merged/$name ]] || hidden=$((hidden + 1))
  [[ $(dump_hash "$merged/$name" 2> "$LOG") == $(dump_hash "$SRC$path") ]] || hidden=$((hidden + 1))
}
mapfile -t new < <(nix-store --store "$SRC" --query --requisites "${tops[1]}")
for p in "${new[@]:0:5}"; do probe "$p" nix copy --no-check-sigs --from "$SRC" --to "unix://$socket" "$p"; done
for p in "${new[@]:5}"; do probe "$p" us import "$SRC" "$p"; done
mkdir "$W/tree"
for i in 1 2 3 4 5; do
  echo "$i" > "$W/tree/file"
  p=$(nix-store --store "$SRC" --add "$W/tree")
  probe "$p" us add "$W/tree"
done
check_eq "$lookups names looked up too early are readable right after they are published" 0 "$hidden"
check "while Nix has the overlay open" nix path-info --store "$url" -r "${tops[1]}"

# a file that is open above stays readable over a publication
exec 8< "$merged/${tops[0]##*/}/nix-support/propagated-build-inputs"
echo other > "$W/tree/file"
us add "$W/tree" > "$LOG" 2>&1
check_same "an open file stays readable" <(cat <&8) "$SRC${tops[0]}/nix-support/propagated-build-inputs"
exec 8<&-

# on top
printf 'on top\n' > "$W/plain"
p=$(nix-store --store "$url" --add "$W/plain")
check "an addition goes to the upper directory" test -e "$upper/${p##*/}"
check_eq "shell shows the merged store at /nix/store" "on top" "$(us shell cat "$p")"
check_eq "and Nix in it uses the overlay" "$p" "$(us shell nix path-info "$p")"
check_eq "its exit status is the command's" 7 "$(us shell sh -c 'exit 7' > /dev/null 2>&1; echo $?)"
check "down" us down
wait "$daemon_pid" || not_ok "up ends with exit status 0"
check "leaves no mount" bash -c "! grep -q ' $W/understory' /proc/self/mounts"
check_fails "status says that nothing runs" "." us status
check "up again" start_up
check_eq "what was on top is there" "on top" "$(cat "$merged/${p##*/}")"
kill -9 "$daemon_pid"; wait "$daemon_pid" 2> /dev/null || true
check "up after kill -9, over its dead mount" start_up
check_eq "all is there" "on top" "$(cat "$merged/${p##*/}")"
check "verify" nix-store --store "$url" --verify --check-contents
kill -TERM "$daemon_pid"
check "SIGTERM ends it" wait "$daemon_pid"
check "and leaves no mount" bash -c "! grep -q ' $W/understory' /proc/self/mounts"
finish
