# Builds through the overlay store: what substituters have goes to the castore, and only what is needed; the rest is
# built by stock Nix into the upper; both end with the client.
source /t/lib.sh
source /t/up-lib.sh
cat > "$W/b.nix" <<'N'
let
  d = name: attrs: derivation ({
    inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo building ${name}; echo ${name} $uses > $out" ];
  } // attrs);
in rec {
  tool = d "tool" { };                                      # only needed to build lib
  lib = d "lib" { inherit tool; };
  app = d "app" { uses = lib; };
  local = d "local" { uses = app; allowSubstitutes = false; };
  other = d "other" { };
  broken = d "broken" { };
  ca = d "ca" { uses = lib; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  busy = d "busy" { args = [ "-c" "echo at work; while :; do :; done" ]; };  # its sandbox has nothing that sleeps
  fails = d "fails" { args = [ "-c" "echo no; exit 3" ]; };
  above = d "above" { uses = fails; };
}
N
SRC="local?root=$W/src"
export NIX_CONFIG="$NIX_CONFIG
extra-experimental-features = nix-command ca-derivations
sandbox = false"
attr() { nix-instantiate --store "$SRC" "$W/b.nix" -A "$1" 2> /dev/null; }
mapfile -t outs < <(nix-build --store "$SRC" --no-out-link "$W/b.nix" -A app -A other -A broken -A ca -A local 2> "$LOG")
app=${outs[0]} other=${outs[1]} broken=${outs[2]} ca=${outs[3]} local=${outs[4]}
lib=$(nix-store --store "$SRC" -q --references "$app")
tool=$(nix-store --store "$SRC" -q --outputs "$(attr tool)")
binary_cache "$app" "$other" "$broken" "$local"
nix copy --no-check-sigs --from "$SRC" --to "file://$CACHE?compression=zstd&secret-key=$W/cache-secret" -f "$W/b.nix" ca > "$LOG" 2>&1
nar=$(sed -n 's/^URL: //p' "$CACHE/$(basename "$broken" | cut -c 1-32).narinfo")
printf 'nonsense' > "$CACHE/$nar"
S_OPT=(--option substituters "file://$CACHE" --option trusted-public-keys "$PUBLIC")
castore_paths() { us stats --json | jq .paths; }
new_above() { upper_names | grep -v '\.drv$' || true; }

start_up
export NIX_REMOTE=$O

# --- what is missing
missing() { nix-build --dry-run "${S_OPT[@]}" "$W/b.nix" "$@" 2>&1 | grep -v '^warning:' | sed 's/([^)]*)//' | sort; }
for attr in app local ca above; do
  check_eq "what must be built and fetched for $attr" "$(missing -A $attr --store "local?root=$W/fresh")" "$(missing -A $attr)"
done

# --- everything from the substituter
check "nix-build of what a substituter has" nix-build --no-out-link "${S_OPT[@]}" "$W/b.nix" -A app
check "builds nothing" test ! -e "$S/merged/nix/var/log/nix/drvs"
check_eq "puts nothing in the upper" "" "$(new_above)"
check_eq "but two paths in the castore" 2 "$(castore_paths)"
check "and what it refers to" nix path-info "$lib"
check_fails "not what only its build needs" 'is not valid' nix path-info "$tool"
check_eq "the client is told" "$app" "$(nix build --no-link --print-out-paths "${S_OPT[@]}" -f "$W/b.nix" app 2> "$LOG")"

# --- a build over substituted inputs
nix-build --no-out-link "${S_OPT[@]}" "$W/b.nix" -A local > "$W/out" 2> "$W/err" && ok "a build over them" || not_ok "a build over them"
check_eq "has the path that it has elsewhere" "$local" "$(< "$W/out")"
check "its log comes to the client" grep -q '^building local' "$W/err"
check_eq "it is in the upper" "${local##*/}" "$(new_above)"
check_eq "with the right contents" "$(cat "$W/src$local")" "$(cat "$MERGED/${local##*/}")"

# --- content-addressed
nix-build --no-out-link "${S_OPT[@]}" "$W/b.nix" -A ca > "$W/out" 2> "$W/err" && ok "a content-addressed one" || not_ok "a content-addressed one"
check_eq "has the path that it has elsewhere" "$ca" "$(< "$W/out")"
check_eq "and is not built" "" "$(grep '^building ca' "$W/err" || true)"
check_eq "nix build knows it" "$ca" "$(nix build --no-link --print-out-paths "${S_OPT[@]}" -f "$W/b.nix" ca 2> "$LOG")"

# --- a substituter that fails
check_fails "a broken archive is an error" "some substitutes for the outputs of derivation '.*-broken.drv' failed .*try '--fallback'" \
  nix-build --no-out-link "${S_OPT[@]}" "$W/b.nix" -A broken
check "unless it may be built" nix-build --no-out-link "${S_OPT[@]}" --fallback "$W/b.nix" -A broken

# --- failures
check_fails "a build that fails" "failed with exit code 3" nix-build --no-out-link "$W/b.nix" -A above
check_fails "nix build, too" "failed with exit code 3" nix build --no-link -f "$W/b.nix" above
nowhere=/nix/store/00000000000000000000000000000000-x
check_fails "what nobody has" "path '$nowhere' is required, but there is no substituter that can build it" nix-store -r $nowhere
check_fails "a derivation that nobody has" "failed to obtain derivation of '$nowhere.drv'" nix-store -r $nowhere.drv

# --- a client that goes
nix-build --no-out-link "$W/b.nix" -A busy > "$W/out" 2>&1 &
client=$!
wait_for "the build" grep -q '^at work' "$W/out"
check "a builder is at work" bash -c 'pgrep -f "[e]cho at work"'
kill -9 $client; wait $client 2> /dev/null || true
wait_for "its end" bash -c '! pgrep -f "[e]cho at work"'
ok "it ends with its client"
check "rebuild and compare" nix-build --no-out-link --check "$W/b.nix" -A local
check "stop" stop_up

# --- no Nix to build with
start_up --nix /bin/true
check "without a Nix substitution works" nix-build --no-out-link "${S_OPT[@]}" "$W/b.nix" -A other
sed -i 's/"busy" {/"busy-2" {/' "$W/b.nix"
check_fails "and a build says what to do" "hint: install Nix 2.24 or later, or name it with" nix-build --no-out-link "$W/b.nix" -A busy
check_fails "naming it" "cannot build '.*-busy-2.drv" nix build --no-link -f "$W/b.nix" busy
stop_up
finish
