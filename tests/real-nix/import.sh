# Every way in keeps contents and path infos; what comes out is byte for byte what Nix gives.
source /t/lib.sh
corpus_store
mapfile -t paths < <(nix-store --store "$SRC" --query --requisites $(< /corpus/top-paths))
check "a store is imported" us import "$SRC" --all
start_daemon --trusted-users root
check_eq "path infos are those of the source" "$(infos --store "$SRC" --all)" "$(infos --store "$DIRECT" --all)"
times() { nix path-info --json "${json_format[@]}" --all --store "$1" | jq -S 'if type == "array" then map({key: .path, value: .}) | from_entries else . end | map_values(.registrationTime)'; }
check_eq "registration times too" "$(times "$SRC")" "$(times "$DIRECT")"

for p in "${paths[@]}"; do
  name=${p##*/}
  printf '%s %s\n' "$name" "$(dump_hash "$SRC$p")"
done > "$W/expected"
for p in "${paths[@]}"; do printf '%s %s\n' "${p##*/}" "$(us export "$p" | sha256sum | cut -d ' ' -f 1)"; done > "$W/exported"
for p in "${paths[@]}"; do printf '%s %s\n' "${p##*/}" "$(dump_hash "$M/${p##*/}")"; done > "$W/mounted"
for p in "${paths[@]}"; do printf '%s %s\n' "${p##*/}" "$(nix store dump-path --store "$DIRECT" "$p" | sha256sum | cut -d ' ' -f 1)"; done > "$W/served"
check_same "export gives the NARs of nix-store --dump" "$W/expected" "$W/exported"
check_same "the mount gives the same NARs" "$W/expected" "$W/mounted"
check_same "the daemon sends the same NARs" "$W/expected" "$W/served"
check_eq "the mount lists every path" "$(printf '%s\n' "${paths[@]##*/}" | sort)" "$(ls -A "$M" | sort)"
attributes() { find "$1" -mindepth 1 ! -path "$1/.links*" -printf '%P %y %m %T@ %s %l\n' | sed -E '/ d [0-9]+ /s/ [0-9]+ $//' | sort; }
check_same "modes, times, sizes and targets are Nix's" <(attributes "$SRC/nix/store") <(attributes "$M")

before=$(us stats --json)
check "importing again is accepted" us import "$SRC" --all
check_eq "and stores nothing" "$(jq .storedBytes <<< "$before")" "$(us stats --json | jq .storedBytes)"

# a database whose write-ahead log was never checkpointed, on a directory that cannot be written
cp -a "$SRC/nix/var/nix/db" "$W/db"
extra=$(nix-store --store "$SRC" --add /t/import.sh)
check "a path that is only in the WAL is found" us import "$SRC" "$extra"
check_fails "a path that is not valid is named" "path '$STORE_DIR/0000000000000000000000000000000[0-9]-nothing' is not valid|is not valid" \
  us import "$SRC" "$STORE_DIR/00000000000000000000000000000000-nothing"

# other sources, each into a store of its own
top=$(head -n 1 /corpus/top-paths)
for compression in none xz zstd bzip2 gzip br; do
  what=$top
  [[ $compression != br ]] || what=${paths[0]}      # Nix takes a minute to compress so much with brotli
  nix copy --store "$SRC" --to "file://$W/cache-$compression?compression=$compression&compression-level=1" "$what" 2> "$LOG"
  S=$W/from-$compression
  check "a binary cache with compression $compression is imported" us import "file://$W/cache-$compression" "$what"
  check_eq "compression $compression: the closure is complete" "$(nix-store --store "$SRC" --query --requisites "$what" | wc -l)" \
    "$(us stats --json | jq .paths)"
  check "compression $compression: contents are right" us check --contents
done
S=$W/from-export
nix-store --store "$SRC" --export $(nix-store --store "$SRC" --query --requisites "$top") > "$W/exported-closure"
check "nix-store --export on stdin is imported" us import - < "$W/exported-closure"
check "contents are right" us check --contents
S=$W/understory

# a NAR hash that is not what the database says
S=$W/from-damaged
victim=$(find "$SRC$top" -type f | head -n 1)
chmod u+w "$victim"; echo damaged >> "$victim"
check_fails "a mismatch names path, expected and found" "${top##*/}" us import "$SRC" "$top"
check "the hash that was expected and the one that was found" grep -Eqz "(specified|expected): +sha256:.*(got|found): +sha256:" "$SAID"
check_fails "and the path stays out" "not valid" us info "$top"
S=$W/understory
check "the daemon stops on SIGTERM" stop_daemon
check "and leaves no mount" bash -c "! grep -q \" $M \" /proc/self/mounts"
finish
