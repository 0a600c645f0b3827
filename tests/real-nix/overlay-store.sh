# One command, and Nix uses the overlay store by NIX_REMOTE: query, add, build, copy, collect, shell. What is copied
# in goes to the castore, what is added or built to the upper; stock Nix opens the same store beside us.
source /t/lib.sh
source /t/up-lib.sh
corpus_store
mapfile -t tops < /corpus/top-paths
top=${tops[0]} other=${tops[1]}
us import "$SRC" "$top" > "$W/import.log" 2>&1
mapfile -t below < <(nix-store --store "$SRC" -qR "$top" | sort)
castore_paths() { us stats --json | jq .paths; }
nix store info --help > "$LOG" 2>&1 && INFO=info || INFO=ping

check "up" start_up
said=$(us status --json | jq -r .nixRemote)
check_eq "status says what NIX_REMOTE must be" "$O" "$said"
check_eq "and that the overlay store answers" true "$(us status --json | jq .overlaySocketAnswers)"
check "doctor finds nothing wrong" us doctor
check_eq "doctor knows who builds" "$(nix --version | sed 's/.* //')" "$(us doctor --json | jq -r '.checks[] | select(.id == "builder") | .found' | grep -o '[0-9]*\.[0-9]*\.[0-9]*' | head -n 1)"
export NIX_REMOTE=$O
check "nix store $INFO" nix store "$INFO"

# --- queries
check_eq "path infos of what is below" "$(infos --store "$SRC" -r "$top")" "$(infos -r "$top")"
check_eq "nix-store -qR" "$(printf '%s\n' "${below[@]}")" "$(nix-store -qR "$top" | sort)"
check_same "nix store cat" <(nix store cat --store "$SRC" "$top/nix-support/propagated-build-inputs") <(nix store cat "$top/nix-support/propagated-build-inputs")
check_eq "queries write nothing above" "" "$(upper_names)"

# --- additions go up
printf 'on top\n' > "$W/plain"
p=$(nix-store --add "$W/plain")
check_eq "nix-store --add" "$(nix-store --store "$W/elsewhere" --add "$W/plain")" "$p"
check_eq "an addition is in the upper directory" "${p##*/}" "$(upper_names)"
check_same "and in the merged one" "$W/plain" "$MERGED/${p##*/}"
# The new command hands in a finished object, as a copy does (AddToStoreNar), and so it may go to the castore.
printf 'somewhere\n' > "$W/new"
n=$(nix store add --name new "$W/new" 2> "$LOG" || nix store add-path --name new "$W/new")
check_same "nix store add" "$W/new" "$MERGED/${n##*/}"
printf 'below\n' > "$W/below-file"; us add "$W/below-file" > "$LOG" 2>&1
nix-store --add "$W/below-file" > "$LOG"
check_eq "what the castore has is not added again" "${p##*/}" "$(upper_names | grep -v -- -new)"

# --- copies go down
before=$(castore_paths) above=$(upper_names)
stat "$MERGED/${other##*/}" > "$LOG" 2>&1 || true        # overlayfs remembers that it was not there
check "nix copy of a closure" nix copy --no-check-sigs --from "$SRC" --to "$O" "$other"
check "goes to the castore" test "$(castore_paths)" -gt "$before"
check_eq "and not to the upper directory" "$above" "$(upper_names)"
check_eq "is visible at once" "$(dump_hash "$SRC$other")" "$(dump_hash "$MERGED/${other##*/}")"
check_eq "with its path infos" "$(infos --store "$SRC" -r "$other")" "$(infos -r "$other")"
check "nix copy to another store" nix copy --no-check-sigs --from "$O" --to "$W/copied" "$top" "$p"
check "is complete" nix-store --store "$W/copied" --verify --check-contents

# --- a build
cat > "$W/build.nix" <<NIX
derivation {
  name = "on-top"; system = builtins.currentSystem; builder = "/bin/sh"; input = builtins.storePath "$p"; big = builtins.storePath "$top";
  args = [ "-c" "set -e; read line < \$input; test -e \$big/nix-support/propagated-build-inputs; echo \"built \$line\" > \$out; echo \$input >> \$out; echo said" ];
}
NIX
built=$(nix-build --no-out-link "$W/build.nix" 2> "$LOG") && ok "nix-build" || not_ok "nix-build"
cp "$LOG" "$W/build.log"
check "what the builder says comes to the client" grep -Eq '^(on-top> )?said' "$W/build.log"
check_eq "its output is right" "built on top" "$(head -n 1 "$MERGED/${built##*/}")"
check "and in the upper directory" test -e "$UPPER/${built##*/}"
check_eq "nix build knows it" "$built" "$(nix build --no-link --print-out-paths -f "$W/build.nix" 2> /dev/null)"
check_eq "nix log" said "$(nix log "$built" 2> "$LOG")"
printf 'derivation { name = "fails"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo no; exit 3" ]; }\n' > "$W/fails.nix"
check_fails "a build that fails" 'failed with exit code 3' nix-build --no-out-link "$W/fails.nix"

# --- the same store for stock Nix
check_eq "stock Nix opens the same store" "$p" "$(nix path-info --store "$STOCK" "$p")"
check "and finds nothing wrong" nix-store --store "$STOCK" --verify --check-contents
theirs=$(printf 'theirs\n' > "$W/theirs"; nix-store --store "$STOCK" --add "$W/theirs")
check "what it adds is known to us" nix path-info "$theirs"

# --- collection
nix-store --realise "$built" --add-root "$W/root" > "$LOG" 2>&1 || not_ok "a root is made"
check "nix store gc" nix store gc
check "keeps what a root holds" test -e "$UPPER/${built##*/}" -a -e "$MERGED/${p##*/}"
check "removes garbage from the upper" test ! -e "$UPPER/${theirs##*/}"
check "leaves what is below alone" nix path-info -r "$top" "$other"
check_eq "and makes no whiteout" "" "$(find "$UPPER" -mindepth 1 -maxdepth 1 -type c)"

# --- a shell
unset NIX_REMOTE
check_eq "shell shows the merged store" "built on top" "$(us shell head -n 1 "$built")"
check_eq "and Nix in it uses the overlay store" "$built" "$(us shell nix path-info "$built")"
check_eq "which is our socket" "unix://$U" "$(us shell sh -c 'echo $NIX_REMOTE')"
mkdir -p "$W/tool/bin"; printf '#!/bin/sh\necho from a tool\n' > "$W/tool/bin/tool"; chmod +x "$W/tool/bin/tool"
tool=$(us add "$W/tool" | tail -n 1)
check_eq "nix shell runs what is there" "from a tool" "$(us shell nix shell "$tool" --command tool 2> "$LOG")"

# --- without a Nix everything but building works
check "it stops" stop_up
start_up --nix /bin/true
export NIX_REMOTE=$O
check "queries without a Nix that builds" nix path-info -r "$top" "$built"
check "additions" nix-store --add /t/lib.sh
sed -i 's/on-top/on-top-2/' "$W/build.nix"
check_fails "builds say what is missing" "." nix-build --no-out-link "$W/build.nix"
check "and the store goes on" nix path-info "$built"
check "verify" nix-store --verify --check-contents
check "it stops again" stop_up
finish
