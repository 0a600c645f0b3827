# edge-cases.sh DIRECTORY: trees of edge cases, made by understory_testkit::corpus, come out as Nix has them.
source /t/lib.sh
trees=${1:-/trees}
start_daemon --trusted-users root
mkdir -p "$SRC"
# type, mode, time, size and target of everything, as Nix makes them
attributes() { (cd "$1" && find . -mindepth 1 -printf '%P\t%y\t%m\t%T@\t%s\t%l\0') | sed -zE '/\td\t/s/\t[0-9]+\t$/\t\t/' | sort -z; }
for tree in "$trees"/*; do
  name=${tree##*/}
  if [[ $name == deep && $NIX_VERSION == 2.26 ]]; then    # Nix 2.26 overflows its own stack at 60 levels
    cp -r "$tree" "$W/deep"
    tree=$W/deep
    below=$(printf 'd%d/' {0..49})
    rm -r "$tree/${below%/}"
  fi
  expected=$(nix-store --store "$SRC" --add "$tree")
  check_eq "$name: understory add" "$expected" "$(us add "$tree" | tail -n 1)"
  hash=$(dump_hash "$SRC$expected")
  check_eq "$name: NAR of the mount" "$hash" "$(dump_hash "$M/${expected##*/}")"
  check_eq "$name: NAR of export" "$hash" "$(us export "$expected" | sha256sum | cut -d ' ' -f 1)"
  check_eq "$name: NAR of the daemon" "$hash" "$(nix store dump-path --store "$DIRECT" "$expected" | sha256sum | cut -d ' ' -f 1)"
  check_same "$name: attributes in the mount" <(attributes "$SRC$expected") <(attributes "$M/${expected##*/}")
  check_eq "$name: nix store ls" "$(nix store ls --store "$SRC" -lR "$expected" | sha256sum)" "$(nix store ls --store "$DIRECT" -lR "$expected" | sha256sum)"
done
check_eq "nlink of every file is 1" "" "$(find "$M" -type f ! -links 1 | head)"
check_eq "du does not count more than is there" "0" "$(find "$M" -type f -printf '%s %b\n' | awk '$2 * 512 > $1 + 4096 { bad++ } END { print bad + 0 }')"

bits=$(nix-store --store "$SRC" --add "$trees/executable-bits"); bits=$M/${bits##*/}
check_eq "equal contents keep their executable bit" "444 555" "$(stat -c %a "$bits/plain" "$bits/executable" | xargs)"
check "and are two inodes" bash -c '[[ $(stat -c %i "$1/plain") != $(stat -c %i "$1/executable") ]]' - "$bits"
many=$(nix-store --store "$SRC" --add "$trees/many-entries"); many=$M/${many##*/}
check_eq "a large directory lists every entry once" "$(ls -A "$trees/many-entries" | wc -l)" "$(ls -A "$many" | sort -u | wc -l)"
for size in 1024 4096 32768 1048576; do   # entries lost where a buffer ends
  check_eq "with a readdir buffer of $size bytes too" "$(ls -A "$trees/many-entries" | wc -l)" "$(python3 - "$many" "$size" <<'PY'
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd, size, names = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY), int(sys.argv[2]), []
buffer = ctypes.create_string_buffer(size)
while True:
    n = libc.syscall(217, fd, buffer, size)      # getdents64
    if n < 0: raise OSError(ctypes.get_errno(), "getdents64")
    if n == 0: break
    at = 0
    while at < n:
        length = struct.unpack_from("H", buffer, at + 16)[0]
        names.append(buffer.raw[at + 19:at + length].split(b"\0")[0]); at += length
print(len(set(names) - {b".", b".."}) if len(names) == len(set(names)) else "double names")
PY
)"
done
# all at once through nix copy, NARs back to back in one AddMultipleToStore
S=$W/second SOCK2=$W/second.sock
mkdir -p "$W/second-lower/nix/store"
understory --store "$S" serve --socket "$SOCK2" --mount "$W/second-lower/nix/store" --trusted-users root >> "$W/second.daemon.log" 2>&1 &
second=$!
wait_for "the second socket" test -S "$SOCK2"
check "nix copy of all of them" nix copy --no-check-sigs --all --from "$SRC" --to "unix://$SOCK2?root=$W/second-lower"
check_eq "path infos agree" "$(infos --all --store "$SRC")" "$(infos --all --store "unix://$SOCK2?root=$W/second-lower")"
check "contents verify" us check --contents
kill -TERM "$second"; wait "$second" || not_ok "the second daemon stops on SIGTERM"
S=$W/understory
check "the daemon stops on SIGTERM" stop_daemon
finish
