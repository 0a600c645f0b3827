//! Additions and NARs, against real Nix.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics when something is not as expected"
)]

#[path = "common/whole.rs"]
mod whole;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;
use understory::add::{AddMethod, AddNarOptions, add_from_dump, add_nar, add_path};
use understory::nar::{HashRequest, hash_node, read_nar, read_path, write_nar};
use understory::{Store, StoreOptions};
use understory_nix::{
    ContentAddress, ContentAddressMethod, Hash, HashAlgorithm, NarHash, PathInfo, StoreDir,
    StorePath,
};
use understory_testkit::corpus::{self, Size};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

/// Writes what `nix-store --dump` and `nix store add` make of the trees in /in.
const SCRIPT: &str = r#"
export NIX_CONFIG='
experimental-features = nix-command git-hashing
build-users-group =
'
for tree in /in/*; do nix-store --dump "$tree" > "/out/${tree##*/}.nar"; done
# Method, algorithm, file, path.
adds() {
  local path
  path=$(nix store add --mode "$1" --hash-algo "$2" "/in/$3") || return 0  # this Nix cannot
  printf '%s %s %s %s\n' "$1" "$2" "$3" "$path"
}
{
  for tree in /in/*; do adds nar sha256 "${tree##*/}"; done
  for algorithm in sha1 sha512 md5; do adds nar $algorithm names; adds flat $algorithm executable-bits/executable; done
  adds flat sha256 executable-bits/executable
  adds nar sha256 executable-bits/executable
  adds nar sha256 empty/file
  adds flat sha256 empty/file
  adds text sha256 executable-bits/plain
  adds git sha1 names
  adds git sha1 executable-bits
  adds git sha256 executable-bits
  adds git sha1 executable-bits/plain
  printf 'add - symlinks %s\n' "$(nix-store --add /in/symlinks)"
} > /out/adds
"#;

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("s");
        Store::create(&at, &StoreDir::default()).unwrap();
        let store = Store::open(&at, &StoreOptions::default()).unwrap();
        Self { dir, store }
    }
}

fn method(name: &str, algorithm: &str) -> AddMethod {
    let method = match name {
        "add" => return AddMethod::default(),
        "nar" => ContentAddressMethod::Nar,
        "flat" => ContentAddressMethod::Flat,
        "text" => ContentAddressMethod::Text,
        "git" => ContentAddressMethod::Git,
        other => panic!("{other}"),
    };
    AddMethod {
        method,
        algorithm: HashAlgorithm::from_name(algorithm).unwrap(),
    }
}

#[test]
fn trees_become_the_nars_and_paths_that_nix_makes_of_them() {
    let input = tempfile::tempdir().unwrap();
    corpus::edge_cases(input.path(), Size::Small).unwrap();
    for root in Version::SUPPORTED.into_iter().filter_map(NixRoot::get) {
        let output = tempfile::tempdir().unwrap();
        root.run_ok(
            &[
                Bind::new(input.path(), "/in"),
                Bind::new(output.path(), "/out"),
            ],
            0,
            SCRIPT,
        );
        let fixture = Fixture::new();
        let writer = fixture.store.writer().unwrap();
        for entry in fs::read_dir(input.path()).unwrap() {
            let tree = entry.unwrap().path();
            let name = tree.file_name().unwrap().to_str().unwrap();
            let expected = fs::read(output.path().join(format!("{name}.nar"))).unwrap();
            let walked = read_path(&writer, &tree).unwrap();
            assert_eq!(walked.nar_size, expected.len() as u64, "{name}");
            assert_eq!(
                walked.nar_hash.to_hash(),
                Hash::of(HashAlgorithm::Sha256, &expected),
                "{name}"
            );
            // From the archive, in small pieces, and nothing past its end is taken.
            let mut stream =
                BufReader::with_capacity(13, Cursor::new([&expected[..], b"rest"].concat()));
            let read = read_nar(&writer, &mut stream).unwrap();
            assert_eq!(
                (&read.root, read.nar_hash),
                (&walked.root, walked.nar_hash),
                "{name}"
            );
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, b"rest");
            writer.sync().unwrap();
            let mut written = Vec::new();
            write_nar(fixture.store.castore(), &walked.root, &mut written).unwrap();
            assert!(
                written == expected,
                "the NAR of {name} differs from nix-store --dump"
            );
        }
        let owner = fixture.store.temp_root_owner().unwrap();
        let none = BTreeSet::new();
        let adds = fs::read_to_string(output.path().join("adds")).unwrap();
        assert!(adds.lines().count() > 20, "{adds}");
        for line in adds.lines() {
            let [name, algorithm, file, path] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let how = method(name, algorithm);
            let file = input.path().join(file);
            let info = add_path(&fixture.store, &owner, &file, None, &how, &none).unwrap();
            assert_eq!(fixture.store.store_dir().print(&info.path), path, "{line}");
            let row = fixture.store.path(&info.path).unwrap().unwrap();
            assert_eq!(row.info, info);
            let hashed = hash_node(fixture.store.castore(), &row.root, HashRequest::None).unwrap();
            assert_eq!(
                (hashed.nar_hash, hashed.nar_size),
                (info.nar_hash, info.nar_size),
                "{line}"
            );
            // The same from a dump.
            let other = Fixture::new();
            let owner = other.store.temp_root_owner().unwrap();
            let base = file.file_name().unwrap().to_str().unwrap();
            let dump = if matches!(name, "flat" | "text") {
                fs::read(&file).unwrap()
            } else {
                let mut nar = Vec::new();
                write_nar(fixture.store.castore(), &row.root, &mut nar).unwrap();
                nar
            };
            let mut stream = Cursor::new(dump);
            let dumped =
                add_from_dump(&other.store, &owner, base, &how, &none, false, &mut stream).unwrap();
            assert_eq!(
                (&dumped.path, dumped.nar_hash),
                (&info.path, info.nar_hash),
                "{line}"
            );
            assert_eq!(
                other.store.path(&info.path).unwrap().unwrap().root,
                row.root
            );
        }
    }
}

/// The NAR of a file, and its hash.
fn nar(contents: &[u8]) -> (Vec<u8>, NarHash) {
    let mut nar = Vec::new();
    let mut writer = understory_nix::nar::Writer::new(&mut nar);
    writer.file(None, false, contents.len() as u64).unwrap();
    writer.contents(contents).unwrap();
    writer.finish().unwrap();
    let hash = NarHash::try_from(Hash::of(HashAlgorithm::Sha256, &nar)).unwrap();
    (nar, hash)
}

fn info(name: &str, nar_hash: NarHash, nar_size: usize) -> PathInfo {
    let hash_part = Hash::of(HashAlgorithm::Sha1, name.as_bytes()).to_nix32();
    PathInfo {
        path: StorePath::from_base_name(&format!("{hash_part}-{name}")).unwrap(),
        nar_hash,
        nar_size: nar_size as u64,
        references: BTreeSet::new(),
        deriver: None,
        registration_time: 0,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    }
}

/// The same file built again, its own hash part (here not behind the store directory) and that of a
/// reference new. The reference's is found without being announced, too, as in an export.
#[test]
fn a_rebuilt_path_costs_its_patches() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let owner = store.temp_root_owner().unwrap();
    let writer = store.writer().unwrap();
    let mut noise = Vec::new();
    corpus::write_random(&mut noise, 7, 300_000).unwrap();
    let mut added = Vec::new();
    for (generation, announced) in [(0, true), (1, true), (2, false)] {
        let hash = |name: &str| {
            Hash::of(
                HashAlgorithm::Sha1,
                format!("{name}{generation}").as_bytes(),
            )
            .to_nix32()
        };
        let reference = StorePath::from_base_name(&format!("{}-lib", hash("lib"))).unwrap();
        let own = if announced {
            hash("own")
        } else {
            "nothing".repeat(5)[..32].to_owned()
        };
        let text = format!("own {own}\nlib /nix/store/{}/lib\n", reference.base_name());
        let contents = [text.as_bytes(), &noise].concat();
        let before = writer.counters();
        if announced {
            let (bytes, nar_hash) = nar(b"lib");
            let lib = PathInfo {
                path: reference.clone(),
                ..info("x", nar_hash, bytes.len())
            };
            add_nar(
                store,
                &owner,
                lib,
                &mut Cursor::new(&bytes),
                AddNarOptions::default(),
            )
            .unwrap();
        }
        let (bytes, nar_hash) = nar(&contents);
        let path = StorePath::from_base_name(&format!("{}-own", hash("own"))).unwrap();
        let mut info = PathInfo {
            path: path.clone(),
            ..info("x", nar_hash, bytes.len())
        };
        if announced {
            info.references = [path.clone(), reference].into();
        }
        add_nar(
            store,
            &owner,
            info,
            &mut Cursor::new(&bytes),
            AddNarOptions::default(),
        )
        .unwrap();
        let after = writer.counters();
        added.push(after.new_bytes - before.new_bytes);
        assert_eq!(after.masked_files - before.masked_files, 1);
        let mut again = Vec::new();
        let root = store.path(&path).unwrap().unwrap().root.clone();
        write_nar(store.castore(), &root, &mut again).unwrap();
        assert!(again == bytes);
    }
    // What the first generation needs, and what is new behind the own hash part of the last.
    assert!(
        added[0] > 300_000 && added[1] < 400 && added[2] < 300_000,
        "{added:?}"
    );
}

#[test]
fn a_nar_that_is_not_what_was_announced_is_refused_in_nix_words() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let owner = store.temp_root_owner().unwrap();
    let (bytes, hash) = nar(b"contents");
    let add = |info: PathInfo, bytes: &[u8]| {
        add_nar(
            store,
            &owner,
            info,
            &mut Cursor::new(bytes),
            AddNarOptions::default(),
        )
    };
    let good = info("good", hash, bytes.len());
    let full = store.store_dir().print(&good.path);

    let other = NarHash([1; 32]);
    let error = add(
        PathInfo {
            nar_hash: other,
            ..good.clone()
        },
        &bytes,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "hash mismatch importing path '{full}';\n  specified: {other}\n  got:       {hash}"
        )
    );
    let error = add(
        PathInfo {
            nar_size: 7,
            ..good.clone()
        },
        &bytes,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "size mismatch importing path '{full}';\n  specified: 7\n  got:       {}",
            bytes.len()
        )
    );
    let ca = ContentAddress::parse(&format!(
        "fixed:{}",
        Hash::of(HashAlgorithm::Sha256, b"other")
    ))
    .unwrap();
    let found = ContentAddress::parse(&format!(
        "fixed:{}",
        Hash::of(HashAlgorithm::Sha256, b"contents")
    ))
    .unwrap();
    let error = add(
        PathInfo {
            ca: Some(ca),
            ..good.clone()
        },
        &bytes,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "ca hash mismatch importing path '{full}';\n  specified: {ca}\n  got:       {found}"
        )
    );
    let error = add(
        PathInfo {
            ca: Some(found),
            ..good.clone()
        },
        &bytes,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot add path '{full}' to the Nix store because it claims to be content-addressed but isn't"
        )
    );
    let error = add(good.clone(), &bytes[..bytes.len() - 3]).unwrap_err();
    assert!(
        error.chain().starts_with("NAR stream: "),
        "{}",
        error.chain()
    );
    let error = add(good.clone(), &[b'x'; 200]).unwrap_err();
    assert!(
        error.to_string().starts_with("malformed NAR at byte "),
        "{error}"
    );
    assert_eq!(
        store.all_paths().unwrap(),
        [],
        "nothing of all that is left"
    );

    assert!(add(good.clone(), &bytes).unwrap());
    // Once more: the archive is read to its end and not a byte further.
    let twice = [&bytes[..], b"next"].concat();
    let mut stream = Cursor::new(&twice[..]);
    assert!(
        !add_nar(
            store,
            &owner,
            good.clone(),
            &mut stream,
            AddNarOptions::default()
        )
        .unwrap()
    );
    assert_eq!(stream.position(), bytes.len() as u64);
    // A repair brings other contents.
    let (bytes, hash) = nar(b"repaired");
    let repaired = PathInfo {
        nar_hash: hash,
        nar_size: bytes.len() as u64,
        ..good.clone()
    };
    let options = AddNarOptions { repair: true };
    assert!(!add_nar(store, &owner, repaired, &mut Cursor::new(&bytes), options).unwrap());
    assert_eq!(store.path(&good.path).unwrap().unwrap().info.nar_hash, hash);
}

#[test]
fn a_false_derivation_is_refused() {
    let fixture = Fixture::new();
    let owner = fixture.store.temp_root_owner().unwrap();
    let text = method("text", "sha256");
    let add = |name: &str, contents: &str| {
        add_from_dump(
            &fixture.store,
            &owner,
            name,
            &text,
            &BTreeSet::new(),
            false,
            &mut contents.as_bytes(),
        )
    };
    let error = add("x.drv", "not a derivation").unwrap_err();
    assert!(
        error.to_string().contains("-x.drv' cannot be read: "),
        "{error}"
    );
    let wrong = r#"Derive([("out","/nix/store/00000000000000000000000000000000-x","","")],[],[],"s","/bin/sh",[],[("out","/nix/store/00000000000000000000000000000000-x")])"#;
    let error = add("x.drv", wrong).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has incorrect output '00000000000000000000000000000000-x', should be '"),
        "{error}"
    );
    assert_eq!(fixture.store.all_paths().unwrap(), []);
}

#[test]
fn a_large_flat_file_is_added_like_a_small_one() {
    let fixture = Fixture::new();
    let owner = fixture.store.temp_root_owner().unwrap();
    let mut contents = Vec::new();
    understory_testkit::corpus::write_random(&mut contents, 7, (5 << 20) + 3).unwrap();
    let file = fixture.dir.path().join("large");
    fs::write(&file, &contents).unwrap();
    let how = AddMethod {
        method: ContentAddressMethod::Flat,
        algorithm: HashAlgorithm::Sha256,
    };
    let none = BTreeSet::new();
    let info = add_path(&fixture.store, &owner, &file, None, &how, &none).unwrap();
    let other = Fixture::new();
    let owner = other.store.temp_root_owner().unwrap();
    let mut stream = std::io::Cursor::new(&contents);
    let dumped = add_from_dump(
        &other.store,
        &owner,
        "large",
        &how,
        &none,
        false,
        &mut stream,
    )
    .unwrap();
    assert_eq!(
        (dumped.path, dumped.nar_hash, dumped.nar_size),
        (info.path, info.nar_hash, info.nar_size)
    );
}

#[test]
fn odd_files_are_refused_with_their_path() {
    let fixture = Fixture::new();
    let owner = fixture.store.temp_root_owner().unwrap();
    let add = |path: &Path| {
        add_path(
            &fixture.store,
            &owner,
            path,
            None,
            &AddMethod::default(),
            &BTreeSet::new(),
        )
        .unwrap_err()
    };
    let tree = fixture.dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let socket = tree.join("sub/socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(
        add(&tree).to_string(),
        format!("file '{}' has an unsupported type", socket.display())
    );
    let absent = fixture.dir.path().join("absent");
    let error = add(&absent);
    assert_eq!(
        error.chain(),
        format!(
            "reading {}: No such file or directory (os error 2)",
            absent.display()
        )
    );
    let bad_name = fixture.dir.path().join("bad name");
    fs::write(&bad_name, "").unwrap();
    assert!(add(&bad_name).to_string().contains("bad name"));
    let mut deep = fixture.dir.path().join("deep");
    for _ in 0..70 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    let error = add(&fixture.dir.path().join("deep"));
    assert!(error.to_string().contains("/deep/d/d/d"), "{error}");
    assert_eq!(fixture.store.all_paths().unwrap(), []);
}

#[test]
fn a_full_disk_is_said_and_leaves_the_store_whole() {
    let Some(disk) = understory_testkit::SmallDisk::new(24) else {
        return;
    };
    let at = disk.path().join("s");
    Store::create(&at, &StoreDir::default()).unwrap();
    let store = Store::open(&at, &StoreOptions::default()).unwrap();
    let owner = store.temp_root_owner().unwrap();
    let add = |number: u64, bytes: u64| {
        let mut contents = Vec::new();
        corpus::write_random(&mut contents, number, bytes).unwrap();
        let (bytes, hash) = nar(&contents);
        let info = info(&format!("path-{number}"), hash, bytes.len());
        let path = info.path.clone();
        let added = add_nar(
            &store,
            &owner,
            info,
            &mut Cursor::new(bytes),
            AddNarOptions::default(),
        );
        added.map(|_| path)
    };
    let mut good = Vec::new();
    let error = loop {
        match add(good.len() as u64, 1 << 20) {
            Ok(path) => good.push(path),
            Err(error) => break error,
        }
        assert!(good.len() < 30, "24 MB take no 30");
    };
    assert!(good.len() > 3, "{good:?}");
    assert_eq!(
        error.kind(),
        understory::error::ErrorKind::Environment,
        "{}",
        error.chain()
    );
    let text = format!("{} {}", error.chain(), error.hint().unwrap_or_default());
    assert!(
        text.to_lowercase().contains("space") || text.contains("full"),
        "{text}"
    );
    let check = |store: &Store| {
        whole::assert_whole(store);
        assert_eq!(store.valid_paths(&good).unwrap(), good);
    };
    check(&store);
    assert_eq!(store.count().unwrap(), good.len() as u64);
    // With space again, the same process goes on.
    disk.grow(64);
    let path = add(100, 1 << 20).unwrap();
    assert!(store.is_valid(&path).unwrap());
    drop(owner);
    drop(store);
    let store = Store::open(&at, &StoreOptions::default()).unwrap();
    check(&store);
    assert!(store.is_valid(&path).unwrap());
}
