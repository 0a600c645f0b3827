# Run in a root with real Nix: fills /nix/store with objects of every kind and writes what Nix says about
# them, and all that can be imported, to /out.
export NIX_CONFIG='
experimental-features = nix-command ca-derivations git-hashing
build-users-group =
sandbox = false
substituters =
substitute = false
'
mkdir -p /work && cd /work
mkdir -p tree/sub/empty
echo same > tree/plain; cp tree/plain tree/run; chmod +x tree/run
: > tree/void
head -c 300000 /dev/urandom > tree/big
ln -s ../plain tree/sub/link
ln -s /nonexistent/target tree/dangling
printf x > "tree/$(printf 'name\377\001')"
printf y > "tree/$(printf 'n%.0s' {1..255})"

cat > all.nix <<'NIX'
let
  system = builtins.currentSystem;
  sh = name: script: extra: derivation ({
    inherit name system; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/bin:/usr/bin";
  } // extra);
  text = builtins.toFile "note" "some text\n";
  source = builtins.path { path = ./tree; name = "tree"; };
in rec {
  lib = sh "lib" "mkdir $out; cp -r ${source}/. $out/; echo ${text} > $out/refers" { };
  app = sh "app" "mkdir -p $out/bin $dev; echo ${lib} $out > $out/bin/app; chmod +x $out/bin/app; ln -s $out $dev/out" {
    outputs = [ "out" "dev" ];
  };
  floating = sh "floating" "echo content > $out" {
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
  selfish = sh "selfish" "mkdir $out; echo $out > $out/me; echo $out $out >> $out/me" {
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
  fixed = sh "fixed" "printf fixed > $out" {
    outputHashMode = "flat"; outputHashAlgo = "sha1"; outputHash = builtins.hashString "sha1" "fixed";
  };
}
NIX
# Somebody who has the database open keeps the write-ahead log from being emptied.
nix-store --init
coproc sqlite3 /nix/var/nix/db/db.sqlite
echo 'select count(*) from ValidPaths;' >&"${COPROC[1]}"
read -r _ <&"${COPROC[0]}"

nix-build --no-out-link all.nix > built
nix-store --add-fixed sha512 tree/plain >> built
ln -s anywhere link && nix-store --add link >> built

nix key generate-secret --key-name test-1 > key
nix store sign --key-file key --all 2>/dev/null
nix key convert-secret-to-public < key > /out/public-key

nix path-info --all | sort > /out/paths
nix path-info --json $(< /out/paths) > /out/infos.json 2>/dev/null
mkdir -p /out/nars
while read -r path; do nix-store --dump "$path" > "/out/nars/${path##*/}"; done < /out/paths
nix-store --export $(< /out/paths) > /out/export
for compression in none xz zstd bzip2 gzip br; do
  nix copy --to "file:///out/cache-$compression?compression=$compression" $(< /out/paths)
done
nix copy --to "file:///out/cache-xz?compression=xz" --file all.nix floating 2>/dev/null || true
cp -a /nix /out/nix
# Only now may the database be closed.
echo .quit >&"${COPROC[1]}"
wait
