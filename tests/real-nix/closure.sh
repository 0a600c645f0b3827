# closure.sh [PATHS]: a closure of many paths, of which each refers to the one before and to an older one.
source /t/lib.sh
count=${1:-2000}
mkdir -p "$SRC/nix/store"
python3 - "$count" "$SRC/nix/store" "$STORE_DIR" > "$W/registration" <<'PY'
import hashlib, sys
count, files, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
digits = "0123456789abcdfghijklmnpqrsvwxyz"      # of nix32
def name(i):
    number = int.from_bytes(hashlib.sha1(b"member %d" % i).digest(), "little")
    return "".join(digits[(number >> (5 * k)) & 31] for k in reversed(range(32))) + f"-member-{i}"
def string(data):
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)
for i in range(count):
    data = b"member %d\n" % i
    with open(f"{files}/{name(i)}", "wb") as f: f.write(data)
    nar = b"".join(map(string, [b"nix-archive-1", b"(", b"type", b"regular", b"contents", data, b")"]))
    references = sorted({name(i - 1), name(i // 2)}) if i > 0 else []
    print(f"{store}/{name(i)}", hashlib.sha256(nar).hexdigest(), len(nar), "", len(references), sep="\n")
    for r in references: print(f"{store}/{r}")
PY
nix-store --store "$SRC" --load-db < "$W/registration"
find "$SRC/nix/store" -type f -exec chmod 444 {} + -exec touch -h -d @1 {} +
top=$(grep -m 1 "member-$((count - 1))$" "$W/registration")
check "a closure of $count paths is imported" us import "$SRC" "$top"
start_daemon --trusted-users root
mount_overlay
check_eq "nix-store -qR through the overlay" "$(nix-store --store "$SRC" -qR "$top" | sort)" "$(nix-store --store "$OVERLAY" -qR "$top" | sort)"
check_eq "nix path-info -r --json" "$(infos --store "$SRC" -r "$top")" "$(infos --store "$OVERLAY" -r "$top")"
check "every path can be read through the overlay" bash -c 'cat "$1"/*-member-* | sort | cmp - <(for (( i = 0; i < $2; i++ )); do echo "member $i"; done | sort)' - "$MERGED" "$count"
check "nix copy of it to another of our stores" nix copy --no-check-sigs --from "$SRC" --to "$DIRECT" "$top"
S=$W/second SOCK=$W/second.sock M=$W/second-lower/nix/store
first=$daemon_pid
start_daemon --trusted-users root
check "nix copy of it to an empty store of ours" nix copy --no-check-sigs --from "$SRC" --to "unix://$SOCK?root=$W/second-lower" "$top"
check_eq "is complete" "$count" "$(nix path-info --all --store "unix://$SOCK?root=$W/second-lower" | wc -l)"
check "contents verify" us check --contents
check "the daemon stops on SIGTERM" stop_daemon
umount "$MERGED"
kill -TERM "$first"; wait "$first"
finish
