# shellcheck shell=bash
# Sourced. Debian packages of any suite from the machine's own mirror, whichever that is.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Runs a command as root: directly, or with sudo.
as_root() { if (( EUID == 0 )); then "$@"; else sudo -n -- "$@"; fi; }

# Installs the packages that are not installed yet.
need_packages() {
  local p missing=()
  for p in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2> /dev/null) == installed ]] || missing+=("$p")
  done
  (( ${#missing[@]} )) || return 0
  say "installing ${missing[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends install)
  as_root "${apt[@]}" "${missing[@]}" > /dev/null 2>&1 ||
    { as_root apt-get -q update && as_root "${apt[@]}" "${missing[@]}"; } >&2
}

# Prints the first of this machine's apt repositories that has Debian's suite $1.
debian_mirror() {
  local uri tmp
  tmp=$(mktemp -d)
  chmod 755 "$tmp"
  while read -r uri; do
    if /usr/lib/apt/apt-helper download-file "${uri%/}/dists/$1/Release" "$tmp/Release" > /dev/null 2>&1 &&
       grep -q '^Origin: Debian$' "$tmp/Release"; then
      rm -rf "$tmp"
      printf '%s\n' "${uri%/}"
      return 0
    fi
    rm -f "$tmp/Release"
  done < <(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | awk '!seen[$0]++')
  rm -rf "$tmp"
  return 1
}

# Sets apt's proxy for programs that do not read apt's settings (debootstrap).
export_apt_proxy() {
  local s v p
  for s in http https; do
    v=${s}_proxy p=
    eval "$(apt-config shell p "Acquire::$s::Proxy")"
    [[ -n ${!v-} || -z $p || $p == DIRECT ]] || export "$v=$p"
  done
}

# apt_private DIR SUITE MIRROR KEYRING: makes DIR an apt installation of its own with nothing
# installed, and prints the options that choose it, one a line.
apt_private() {
  local dir=$1
  mkdir -p "$dir"/{lists/partial,archives/partial,etc/preferences.d}
  : > "$dir/status"
  printf 'deb [signed-by=%s] %s %s main\n' "$4" "$3" "$2" > "$dir/etc/sources.list"
  printf -- '-o\n%s\n' "Dir::State::status=$dir/status" "Dir::State::lists=$dir/lists" \
    "Dir::State::extended_states=$dir/extended_states" "Dir::Cache=$dir" "Dir::Cache::archives=$dir/archives" \
    "Dir::Etc::sourcelist=$dir/etc/sources.list" "Dir::Etc::sourceparts=-" "Dir::Etc::preferences=-" \
    "Dir::Etc::preferencesparts=$dir/etc/preferences.d" "APT::Sandbox::User=root" "APT::Install-Recommends=false" \
    "Acquire::Retries=3" "Binary::apt::APT::Keep-Downloaded-Packages=true" "APT::Keep-Downloaded-Packages=true" \
    "Acquire::Languages=none" "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false" "APT::Get::AllowUnauthenticated=false"
}
