# A full disk: a clear error, and the store stays whole.
source /t/lib.sh
corpus_store
mkdir "$W/small"
mount -t tmpfs -o size=16M tmpfs "$W/small"
S=$W/small/understory
first=$(us add /t | tail -n 1)
hash=$(us export "$first" | sha256sum)
check_fails "an import that does not fit says so" "[Nn]o space left|disk (is )?full" us import "$SRC" --all
check "the store opens" us stats
check "what was there is there" us info "$first"
check_eq "and reads the same" "$hash" "$(us export "$first" | sha256sum)"
check "contents verify" us check --contents
head -c 100000000 /dev/urandom > "$W/random"
check_fails "an addition that does not fit says so" "[Nn]o space left|disk (is )?full" us add "$W/random"
check "the daemon starts on a full disk" start_daemon --trusted-users root
check_fails "nix copy of what does not fit fails in words" "[Nn]o space left|disk (is )?full" nix copy --no-check-sigs --all --from "$SRC" --to "$DIRECT"
check "the daemon still answers" nix path-info --store "$DIRECT" "$first"
check_eq "and the mount reads" "${hash%% *}" "$(dump_hash "$M/${first##*/}")"
check "contents verify" us check --contents
mount -o remount,size=256M "$W/small"
check "with room again, the same daemon takes it" nix copy --no-check-sigs --all --from "$SRC" --to "$DIRECT"
check "an import goes on" us import "$SRC" --all
check "contents verify" us check --contents
check_eq "all is there" "$(infos --all --store "$SRC")" "$(infos --store "$DIRECT" $(nix path-info --all --store "$SRC"))"
check "the daemon stops on SIGTERM" stop_daemon
finish
