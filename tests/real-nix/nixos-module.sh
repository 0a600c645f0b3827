# The NixOS module and the systemd units in dist.
source /t/lib.sh
evaluate() { # SETTINGS, a Nix expression
  nix-instantiate --eval --strict --json --store "$W/eval" -E "import /t/nixos-module.nix { module = /dist/nixos/module.nix; settings = $1; }"
}
get() { jq -r "$1" "$W/made.json"; }

check "it is off by default" bash -c "$(declare -f evaluate); evaluate '{ package = \"/p\"; }' | jq -e '.config == {}'"
evaluate '{ enable = true; package = "/p"; settings.substituters = [ "https://a" ]; setNixRemote = true; }' > "$W/made.json"
remote='unix:///run/understory/overlay.sock?root=/var/lib/understory/merged'
check_eq "the service" "'/p/bin/understory' '--store' '/var/lib/understory' 'up' '--overlay-socket' '/run/understory/overlay.sock'" \
  "$(get .config.systemd.services.understory.serviceConfig.ExecStart)"
check_eq "its state directory" understory "$(get .config.systemd.services.understory.serviceConfig.StateDirectory)"
check_eq "the socket" /run/understory/overlay.sock "$(get .config.systemd.sockets.understory.socketConfig.ListenStream)"
check_eq "NIX_REMOTE of sessions" "$remote" "$(get .config.environment.sessionVariables.NIX_REMOTE)"
check_eq "and for other modules" "$remote" "$(get .options.remote)"
check_eq "the settings" '/nix/store/toml/understory.toml?{"substituters":["https://a"]}' "$(get '.config.environment.etc["understory/understory.toml"].source')"
evaluate '{ enable = true; package = "/p"; stateDir = "/srv/us"; mergedDir = "/mnt/store"; extraFlags = [ "--private" ]; }' > "$W/made.json"
check_eq "other places" "'/p/bin/understory' '--store' '/srv/us' 'up' '--overlay-socket' '/run/understory/overlay.sock' '--merged' '/mnt/store' '--private'" \
  "$(get .config.systemd.services.understory.serviceConfig.ExecStart)"
check_eq "and their NIX_REMOTE" 'unix:///run/understory/overlay.sock?real=/mnt/store' "$(get .options.remote)"
check_eq "no variable unless it is wanted" '{}' "$(jq -c .config.environment.sessionVariables "$W/made.json")"
check_fails "a wrong type is told" 'extraFlags: not of type listOf' evaluate '{ enable = true; package = "/p"; extraFlags = "--private"; }'
check_fails "an unknown option is told" 'no such option' evaluate '{ enable = true; packages = "/p"; }'

# The flags in the units are flags of the program, and the module's are those of the unit.
mapfile -t commands < <(sed -n 's/^ExecStart=//p' /dist/systemd/*.service)
for line in "${commands[@]}"; do
  read -r _ words <<< "${line//%i/x}"
  # shellcheck disable=SC2086
  check "the command line is understood: $words" bash -c 'understory "$@" --help > /dev/null' - $words
done
if command -v systemd-analyze > /dev/null; then
  install -D /usr/local/bin/understory "$W/units/understory"
  cp /dist/systemd/* "$W/units"
  check "systemd-analyze verify" systemd-analyze verify --man=no "$W"/units/understory.service "$W"/units/understory.socket "$W"/units/understory-overlay@x.service
  check_eq "has nothing to complain of" "" "$(cat "$LOG")"
else
  echo "skipped: no systemd-analyze here"
fi
finish
