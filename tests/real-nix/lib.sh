# shellcheck shell=bash
# Sourced by each script in here, which `run` starts in a root with real Nix: a tiny assert library, and
# what puts a store, its daemon, its mount and an overlay under a real Nix client.
set -euo pipefail
umask 022

W=/tmp/w                                  # everything lies in here, on tmpfs
LOG=$W/check.log
STORE_DIR=${STORE_DIR:-/nix/store}        # the logical store directory
S=$W/understory                           # our store
LOWER=$W/lower                            # the `root` of the lower store's URL: its files are in nix/store below
M=$LOWER/nix/store
SOCK=$W/lower.sock
B=$W/overlay                              # the overlay store: its database and its merged directory are below
MERGED=$B/nix/store
UPPER=$W/upper
mkdir -p "$W"
export NIX_CONFIG="experimental-features = nix-command local-overlay-store ca-derivations
substituters =
build-users-group =
require-sigs = false
sandbox-paths = /bin /lib /lib64 /usr
sandbox-fallback = false
max-jobs = 2
warn-dirty = false"
failed=0 passed=0

# --- asserting

ok() { passed=$((passed + 1)); printf 'ok      %s: %s\n' "$SCRIPT" "$1"; }
not_ok() { # NAME: the log follows
  failed=$((failed + 1))
  printf 'FAILED  %s: %s\n' "$SCRIPT" "$1"
  [[ ! -s $LOG ]] || sed 's/^/        | /' "$LOG" | tail -n 60
}
# check NAME COMMAND...: the command succeeds.
check() {
  local name=$1; shift
  if "$@" > "$LOG" 2>&1; then ok "$name"; else printf 'exit status %s of: %s\n' "$?" "$*" >> "$LOG"; not_ok "$name"; fi
}
# check_fails NAME REGEX COMMAND...: the command fails, and says something that matches; $SAID keeps it.
SAID=$W/said
check_fails() {
  local name=$1 regex=$2; shift 2
  if "$@" > "$LOG" 2>&1; then printf 'succeeded: %s\n' "$*" >> "$LOG"; not_ok "$name"; return; fi
  cp "$LOG" "$SAID"
  if grep -Eq -- "$regex" "$LOG"; then ok "$name"
  else printf 'does not say %s: %s\n' "$regex" "$*" >> "$LOG"; not_ok "$name"
  fi
}
# check_eq NAME EXPECTED FOUND
check_eq() {
  if [[ $2 == "$3" ]]; then ok "$1"
  else { diff <(printf '%s\n' "$2") <(printf '%s\n' "$3") || true; } | head -n 40 > "$LOG"; not_ok "$1"
  fi
}
# check_same NAME FILE FILE
check_same() {
  if cmp -s "$2" "$3"; then ok "$1"; else { cmp "$2" "$3"; diff -a "$2" "$3"; } 2>&1 | head -n 40 > "$LOG" || true; not_ok "$1"; fi
}
finish() {
  printf '%s with Nix %s: %d passed, %d failed\n' "$SCRIPT" "${NIX_VERSION-}" "$passed" "$failed"
  if (( failed > 0 )); then
    for f in "$W"/*.daemon.log; do
      if [[ -s $f ]]; then printf -- '--- end of %s\n' "$f"; tail -n 40 "$f"; fi
    done
  fi
  (( failed == 0 ))
}
# A script that stops half-way must say where.
set -E
trap 'stopped="${BASH_SOURCE[0]}:$LINENO: $BASH_COMMAND"' ERR
ended() {
  local rc=$?
  if (( rc != 0 && failed == 0 )); then
    printf 'FAILED  %s: exit status %s at %s\n' "$SCRIPT" "$rc" "${stopped-}"
    for f in "$LOG" "$W"/*.daemon.log; do if [[ -s $f ]]; then printf -- '--- end of %s\n' "$f"; tail -n 40 "$f"; fi; done
  fi
  exit "$rc"
}
trap ended EXIT

# --- our side

us() { understory --store "$S" "$@"; }
# Waits until the condition holds; a bound of 20 s that nothing should ever come near.
wait_for() { # WHAT COMMAND...
  local what=$1 i; shift
  for (( i = 0; i < 2000; i++ )); do if "$@" > /dev/null 2>&1; then return 0; fi; sleep 0.01; done
  printf 'waited in vain for %s\n' "$what" >&2
  return 1
}
daemon_pid=
start_daemon() { # OPTION...: serve with socket and mount; ready when it returns
  mkdir -p "$M"
  # not `us`: a function in the background is a shell, and signals would go to it
  understory --store "$S" serve --socket "$SOCK" --mount "$M" "$@" >> "$W/lower.daemon.log" 2>&1 &
  daemon_pid=$!
  wait_for "the socket" test -S "$SOCK"
  mountpoint -q "$M"
}
stop_daemon() { # exits by itself on SIGTERM, and takes its mount along
  kill -TERM "$daemon_pid"
  local rc=0
  wait "$daemon_pid" || rc=$?
  daemon_pid=
  return "$rc"
}
is_mounted() { grep -q " $M " /proc/self/mounts; }

# --- Nix's side

encode() { local s=${1//%/%25}; s=${s//&/%26}; s=${s//=/%3D}; s=${s//\?/%3F}; s=${s//:/%3A}; printf '%s' "${s//\//%2F}"; }
store_param=$([[ $STORE_DIR == /nix/store ]] || printf '&store=%s' "$STORE_DIR")
DIRECT="unix://$SOCK?root=$LOWER$store_param"               # a client's URL for our daemon
OVERLAY="local-overlay://?root=$B$store_param&lower-store=$(encode "$DIRECT")&upper-layer=$UPPER"
mount_overlay() {
  mkdir -p "$MERGED" "$UPPER" "$W/work"
  mount -t overlay overlay -o "lowerdir=$M,upperdir=$UPPER,workdir=$W/work,index=off,metacopy=off,redirect_dir=off" "$MERGED"
}
# Shows the corpus's store at $SRC; writes go to a layer of their own.
SRC=$W/src
corpus_store() {
  mkdir -p "$SRC" "$W/src-upper" "$W/src-work"
  mount -t overlay overlay -o "lowerdir=/corpus/root,upperdir=$W/src-upper,workdir=$W/src-work" "$SRC"
}
upper_names() { find "$UPPER" -mindepth 1 -maxdepth 1 ! -name .links -printf '%f\n' | sort; }
# What a path info says, without what is the store's own affair, in an order of its own.
json_format=()
if [[ ${NIX_VERSION-} == 2.34 ]]; then json_format=(--json-format 1); fi
infos() { # nix path-info's arguments
  nix path-info --json "${json_format[@]}" "$@" | jq -S 'if type == "array" then map({key: .path, value: .}) | from_entries else . end
    | map_values(if . == null then . else del(.path, .registrationTime, .ultimate, .closureSize, .storeDir, .version)
      | .references |= sort | .signatures |= ((. // []) | sort) end)'
}
dump_hash() { nix-store --dump "$1" | sha256sum | cut -d ' ' -f 1; }
