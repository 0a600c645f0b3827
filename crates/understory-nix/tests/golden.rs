//! Everything that `scripts/golden-vectors` asked a real Nix for, compared with what we make.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;
use understory_nix::content_address::{References, git_hash_of_nar};
use understory_nix::derivation::{Derivation, DerivationKind, DerivationOutput, HashModulo};
use understory_nix::export::{self, Trailer};
use understory_nix::hash::HashModuloSink;
use understory_nix::nar::{self, Event, Reader, Writer};
use understory_nix::narinfo::{CacheInfo, NarInfo};
use understory_nix::realisation::Realisation;
use understory_nix::{
    ContentAddress, ContentAddressMethod, Hash, HashAlgorithm, NarHash, PublicKey, PublicKeys,
    SecretKey, StoreDir, StorePath,
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(golden(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn text(name: &str) -> String {
    String::from_utf8(read(name)).unwrap()
}

/// The files of a folder by name.
fn folder(name: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(golden(name))
        .unwrap()
        .map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect()
}

fn nar_hash(nar: &[u8]) -> NarHash {
    Hash::of(HashAlgorithm::Sha256, nar).try_into().unwrap()
}

/// The contents of a NAR that holds one file.
fn file_of(nar: &[u8]) -> Vec<u8> {
    let mut reader = Reader::new(nar);
    assert!(matches!(reader.next_event().unwrap(), Event::File { .. }));
    let mut contents = Vec::new();
    reader.read_contents_to_end(&mut contents).unwrap();
    contents
}

#[test]
fn hashes() {
    let mut algorithms = BTreeMap::<String, usize>::new();
    for line in text("hashes.tsv").lines() {
        let [data, algorithm, base16, nix32, base64, sri] =
            line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let algorithm = HashAlgorithm::from_name(algorithm).unwrap();
        *algorithms.entry(algorithm.name().to_owned()).or_default() += 1;
        let hash = Hash::of(algorithm, data.as_bytes());
        assert_eq!(
            (hash.to_base16(), hash.to_nix32()),
            (base16.to_owned(), nix32.to_owned())
        );
        assert_eq!(
            (hash.to_base64(), hash.to_sri()),
            (base64.to_owned(), sri.to_owned())
        );
        for spelling in [base16, nix32, base64] {
            assert_eq!(Hash::parse(spelling, Some(algorithm)).unwrap(), hash);
            assert_eq!(
                Hash::parse(&format!("{algorithm}:{spelling}"), None).unwrap(),
                hash
            );
        }
        assert_eq!(Hash::parse(sri, None).unwrap(), hash);
    }
    assert_eq!(algorithms.into_values().collect::<Vec<_>>(), [4; 5]);
}

#[test]
fn nars_are_read_and_written_byte_for_byte() {
    let nars = folder("nar");
    assert!(nars.len() >= 7);
    let mut stream = Vec::new();
    for (name, nar) in &nars {
        assert_eq!(&nar::copy(&nar[..], Vec::new()).unwrap(), nar, "{name}");
        stream.extend_from_slice(nar);
    }
    let mut rest = &stream[..];
    for nar in nars.values() {
        assert_eq!(&nar::copy(&mut rest, Vec::new()).unwrap(), nar);
    }
    assert!(rest.is_empty());
}

#[test]
fn the_directory_holds_what_the_script_made() {
    let long = vec![b'n'; 255];
    let mut writer = Writer::new(Vec::new());
    let file = |writer: &mut Writer<Vec<u8>>, name: &[u8], executable, data: &[u8]| {
        writer
            .file(Some(name), executable, data.len() as u64)
            .unwrap();
        writer.contents(data).unwrap();
    };
    writer.directory_begin(None).unwrap();
    writer.directory_begin(Some(b"a")).unwrap();
    writer.directory_begin(Some(b"deep")).unwrap();
    file(&mut writer, b"x", false, b"x");
    writer.directory_end().unwrap();
    writer.directory_end().unwrap();
    file(&mut writer, b"a-", false, b"order");
    file(&mut writer, b"a.b", false, b"order");
    file(&mut writer, b"a0", false, b"order");
    writer.directory_begin(Some(b"b")).unwrap();
    file(&mut writer, b"8191", false, &[b'z'; 8191]);
    writer.symlink(Some(b"link"), b"../x").unwrap();
    writer.directory_end().unwrap();
    writer.directory_begin(Some(b"empty")).unwrap();
    writer.directory_end().unwrap();
    file(&mut writer, &long, false, b"long");
    file(&mut writer, b"same", false, b"same");
    file(&mut writer, b"same-x", true, b"same");
    file(&mut writer, b"\xff\xfe", false, b"bytes");
    writer.directory_end().unwrap();
    assert_eq!(writer.finish().unwrap(), read("nar/directory.nar"));
}

#[test]
fn store_paths_of_every_method() {
    let dir = StoreDir::default();
    let mut seen = BTreeMap::<String, usize>::new();
    for line in text("paths.tsv").lines() {
        let [tree, mode, algorithm, ca, hash, path] =
            line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        *seen.entry(mode.to_owned()).or_default() += 1;
        let nar = read(&format!("nar/{tree}.nar"));
        assert_eq!(NarHash::parse(hash).unwrap(), nar_hash(&nar), "{line}");
        let algorithm = HashAlgorithm::from_name(algorithm).unwrap();
        let (method, hash) = match mode {
            "nar" => (ContentAddressMethod::Nar, Hash::of(algorithm, &nar)),
            "flat" => (
                ContentAddressMethod::Flat,
                Hash::of(algorithm, &file_of(&nar)),
            ),
            "text" => (
                ContentAddressMethod::Text,
                Hash::of(algorithm, &file_of(&nar)),
            ),
            "git" => (
                ContentAddressMethod::Git,
                git_hash_of_nar(&nar[..], algorithm).unwrap(),
            ),
            other => panic!("{other}"),
        };
        let address = ContentAddress { method, hash };
        assert_eq!(address.to_string(), ca, "{line}");
        assert_eq!(ContentAddress::parse(ca).unwrap(), address);
        let path = dir.parse(path.as_bytes()).unwrap();
        assert_eq!(
            address
                .make_path(&dir, &path.to_name(), &References::default())
                .unwrap(),
            path,
            "{line}"
        );
    }
    assert!(
        ["nar", "flat", "text", "git"]
            .iter()
            .all(|mode| seen[*mode] >= 2),
        "{seen:?}"
    );
}

#[test]
fn narinfos() {
    let dir = StoreDir::default();
    let keys = PublicKeys::parse(&text("key.public")).unwrap();
    let (mut signed, mut addressed) = (0, 0);
    let infos = folder("narinfo");
    for (name, bytes) in &infos {
        let expected = std::str::from_utf8(bytes).unwrap();
        let narinfo = NarInfo::parse(&dir, name, expected).unwrap();
        assert_eq!(narinfo.print(&dir), expected);
        assert_eq!(narinfo.info.path.hash_part(), &name[..32]);
        if narinfo.compression.name() == "none" {
            assert_eq!(narinfo.file_hash, Some(narinfo.info.nar_hash.to_hash()));
        }
        assert_eq!(
            narinfo.info.is_signed_by(&dir, &keys),
            !narinfo.info.signatures.is_empty()
        );
        assert_eq!(
            narinfo.info.is_content_addressed(&dir),
            narinfo.info.ca.is_some(),
            "{name}"
        );
        signed += narinfo.info.signatures.len();
        addressed += usize::from(narinfo.info.ca.is_some());
    }
    assert_eq!((infos.len(), signed, addressed), (10, 4, 8));
    let info = CacheInfo::parse("nix-cache-info", &text("nix-cache-info")).unwrap();
    assert_eq!(info.print(), text("nix-cache-info"));
    assert_eq!(info.store_dir, Some(dir));
}

#[test]
fn signing_gives_the_bytes_that_nix_signs() {
    let dir = StoreDir::default();
    let key = SecretKey::parse(&text("key.secret")).unwrap();
    assert_eq!(key.to_secret_text(), text("key.secret").trim_end());
    assert_eq!(key.public().to_string(), text("key.public").trim_end());
    assert_eq!(
        PublicKey::parse(text("key.public").trim_end()).unwrap(),
        key.public()
    );
    for (name, bytes) in folder("narinfo") {
        let mut info = NarInfo::parse(&dir, &name, std::str::from_utf8(&bytes).unwrap())
            .unwrap()
            .info;
        let expected = std::mem::take(&mut info.signatures);
        info.sign(&dir, &key);
        if !expected.is_empty() {
            assert_eq!(info.signatures, expected, "{name}");
        }
    }
}

#[test]
fn a_path_that_refers_to_itself_is_content_addressed() {
    let dir = StoreDir::default();
    let paths = text("self-referring");
    let path = dir.parse(paths.lines().nth(1).unwrap().as_bytes()).unwrap();
    let nar = read("self-referring.nar");
    let mut sink = HashModuloSink::new(
        HashAlgorithm::Sha256,
        path.hash_part().as_bytes().try_into().unwrap(),
    );
    sink.update(&nar);
    let (hash, size, match_count) = sink.finish();
    assert_eq!((size, match_count), (nar.len() as u64, 3));
    let narinfo = text(&format!("narinfo/{}.none.narinfo", path.hash_part()));
    let info = NarInfo::parse(&dir, "x", &narinfo).unwrap().info;
    assert_eq!(
        (info.nar_hash, info.nar_size),
        (nar_hash(&nar), nar.len() as u64)
    );
    assert_eq!(
        info.ca,
        Some(ContentAddress {
            method: ContentAddressMethod::Nar,
            hash
        })
    );
    assert!(info.is_content_addressed(&dir));
}

#[test]
fn an_export_is_read_and_written_byte_for_byte() {
    let dir = StoreDir::default();
    let bytes = read("export");
    let (mut rest, mut out) = (&bytes[..], Vec::new());
    let mut paths = Vec::new();
    while export::read_begin(&mut rest).unwrap() {
        export::write_begin(&mut out).unwrap();
        nar::copy(&mut rest, &mut out).unwrap();
        let trailer = Trailer::read(&mut rest, &dir).unwrap();
        trailer.write(&mut out, &dir).unwrap();
        paths.push(dir.print(&trailer.path));
    }
    export::write_end(&mut out).unwrap();
    assert!(rest.is_empty());
    assert_eq!(out, bytes);
    let user = text("self-referring").lines().next().unwrap().to_owned();
    let mut expected: Vec<_> = text("texts")
        .lines()
        .map(str::to_owned)
        .chain([user])
        .collect();
    expected.sort();
    paths.sort();
    assert_eq!(paths, expected);
}

fn derivations() -> HashMap<StorePath, Derivation> {
    let dir = StoreDir::default();
    let parse = |(file, bytes): (String, Vec<u8>)| {
        let path = StorePath::from_base_name(&file).unwrap();
        let name =
            understory_nix::StorePathName::new(path.name().strip_suffix(".drv").unwrap()).unwrap();
        let derivation = Derivation::parse(&dir, &name, &bytes)
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(derivation.print(&dir).unwrap(), bytes, "{file}");
        (path, derivation)
    };
    folder("drv").into_iter().map(parse).collect()
}

#[test]
fn derivations_are_read_and_written_byte_for_byte() {
    let all = derivations();
    assert_eq!(all.len(), 13);
    for (path, derivation) in &all {
        assert_eq!(&derivation.make_path(&StoreDir::default()).unwrap(), path);
    }
    let kinds = |kind| {
        all.values()
            .filter(|derivation| derivation.kind().unwrap() == kind)
            .count()
    };
    assert_eq!(kinds(DerivationKind::Fixed), 3);
    assert_eq!(kinds(DerivationKind::Floating), 3);
    assert_eq!(kinds(DerivationKind::Impure), 1);
    let is_dynamic = |derivation: &&Derivation| {
        derivation
            .input_derivations
            .values()
            .any(|i| !i.dynamic.is_empty())
    };
    assert_eq!(all.values().filter(is_dynamic).count(), 1);
}

#[test]
fn output_paths_follow_from_the_derivation() {
    let dir = StoreDir::default();
    let all = derivations();
    let load = |path: &StorePath| all.get(path).cloned().ok_or_else(|| "missing".to_owned());
    let mut modulo = HashModulo::new(dir.clone(), load);
    let mut known = 0;
    for (path, derivation) in &all {
        modulo.check(path, derivation).unwrap();
        let paths = derivation.static_output_paths(&dir).unwrap();
        assert_eq!(modulo.output_paths(derivation).unwrap(), paths, "{path}");
        known += paths.values().flatten().count();
        // A fixed output's path must be the one that the environment says.
        for (name, path) in paths
            .iter()
            .filter_map(|(name, path)| Some((name, path.as_ref()?)))
        {
            if let Some(value) = derivation.env.get(name.as_bytes()) {
                assert_eq!(value, dir.print(path).as_bytes());
            }
        }
    }
    assert_eq!(known, 10);
}

#[test]
fn a_derivation_with_a_wrong_output_path_is_refused() {
    let all = derivations();
    let load = |path: &StorePath| all.get(path).cloned().ok_or_else(|| "missing".to_owned());
    let mut modulo = HashModulo::new(StoreDir::default(), load);
    let (path, derivation) = all
        .iter()
        .find(|(path, _)| path.name() == "plain.drv")
        .unwrap();
    let good = derivation
        .static_output_paths(&StoreDir::default())
        .unwrap()["out"]
        .clone()
        .unwrap();
    let mut bad = derivation.clone();
    bad.outputs.insert(
        "out".to_owned(),
        DerivationOutput::InputAddressed(path.clone()),
    );
    let message = modulo.check(path, &bad).unwrap_err().to_string();
    assert_eq!(
        message,
        format!("derivation '{path}' has incorrect output '{path}', should be '{good}'")
    );
    let mut bad = derivation.clone();
    bad.env.insert(b"out".to_vec(), b"/x".to_vec());
    let message = modulo.check(path, &bad).unwrap_err().to_string();
    assert!(
        message.contains("has incorrect output") || message.contains("incorrect environment"),
        "{message}"
    );
}

#[test]
fn realisations() {
    let dir = StoreDir::default();
    let name = understory_nix::StorePathName::new("realised").unwrap();
    let derivation = Derivation::parse(&dir, &name, &read("realisation/realised.drv")).unwrap();
    let mut modulo = HashModulo::new(dir, |_: &StorePath| Err("it has no inputs".to_owned()));
    let hashes = modulo.hashes(&derivation, true).unwrap();
    assert!(hashes.is_deferred);
    for output in ["out", "other"] {
        let json = text(&format!("realisation/{output}.doi"));
        let realisation = Realisation::parse(&json).unwrap();
        assert_eq!(realisation.print(), json);
        assert_eq!(realisation.id.output_name(), output);
        assert_eq!(*realisation.id.hash(), hashes.outputs[output]);
    }
}
