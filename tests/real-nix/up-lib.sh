# shellcheck shell=bash
# Sourced after lib.sh by scripts that use a whole instance: `understory up` with its overlay store.
U=$S/run/overlay.sock
O="unix://$U?root=$S/merged"
MERGED=$S/merged/nix/store UPPER=$S/upper
# A client's empty list of substituters would be its own choice, and win.
NIX_CONFIG=${NIX_CONFIG/$'\nsubstituters ='/}
up_pid=
start_up() { # OPTION...
  # shellcheck disable=SC2086  # words
  understory --store "$S" up --trusted-users '*' ${UP_OPTIONS-} "$@" >> "$W/up.daemon.log" 2>&1 &
  up_pid=$!
  wait_for "the overlay store" nix store info --store "$O"
  STOCK=$(us status --json | jq -r .url)        # the same store for stock Nix
}
stop_up() {
  kill -TERM "$up_pid"
  local rc=0
  wait "$up_pid" || rc=$?
  up_pid=
  return "$rc"
}
# A binary cache of the corpus at $CACHE, signed; $PUBLIC is its key.
binary_cache() { # PATH...
  CACHE=$W/cache
  nix-store --generate-binary-cache-key cache-1 "$W/cache-secret" "$W/cache-public"
  PUBLIC=$(< "$W/cache-public")
  nix copy --no-check-sigs --from "$SRC" --to "file://$CACHE?compression=zstd&secret-key=$W/cache-secret" "$@"
}
