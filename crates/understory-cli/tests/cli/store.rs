//! Commands on a store: each one's wiring.

use super::Sandbox;
use std::fs;

#[test]
fn add_look_and_take_out() {
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    assert!(
        path.starts_with("/nix/store/") && path.ends_with("-tree"),
        "{path}"
    );
    assert_eq!(
        sandbox.ok(&["-q", "add", "tree"]),
        path,
        "the same contents are the same path"
    );
    let base = path.strip_prefix("/nix/store/").unwrap();
    let hash = &base[..32];

    for name in [&path, base, hash] {
        assert_eq!(sandbox.ok(&["ls", name]), "bin\nfile\nlink");
        assert_eq!(sandbox.ok(&["cat", &format!("{name}/file")]), "hello");
    }
    assert_eq!(
        sandbox.ok(&["ls", "-lR", base]),
        "dr-xr-xr-x            0 bin\n\
         -r-xr-xr-x           19 bin/tool\n\
         -r--r--r--            6 file\n\
         lrwxrwxrwx            4 link -> file"
    );
    assert_eq!(
        sandbox.json(&["ls", "-R", base]),
        serde_json::json!({"type": "directory", "entries": {
            "bin": {"type": "directory", "entries": {
                "tool": {"type": "regular", "size": 19, "executable": true}}},
            "file": {"type": "regular", "size": 6},
            "link": {"type": "symlink", "target": "file"}}})
    );
    assert_eq!(
        sandbox.json(&["ls", "-d", base]),
        serde_json::json!({"type": "directory"})
    );

    let info = &sandbox.json(&["info", base])[0];
    assert_eq!(info["path"], serde_json::json!(path));
    assert_eq!(info["references"], serde_json::json!([]));
    assert_eq!(info["root"]["type"], "directory");
    let nar = sandbox.run(&["export", base]).raw;
    assert_eq!(info["narSize"], nar.len());
    assert_eq!(&nar[..24], b"\r\0\0\0\0\0\0\0nix-archive-1\0\0\0");
    assert_eq!(sandbox.json(&["info", "--all"])[0], *info);
    assert_eq!(sandbox.ok(&["info", "--all", "--names"]), path);
}

#[test]
fn a_link_to_a_store_path_is_an_argument_too() {
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "x");
    let root = sandbox.path().join("result");
    sandbox.ok(&["root", "add", &path, root.to_str().unwrap()]);
    assert_eq!(fs::read_link(&root).unwrap().to_str(), Some(path.as_str()));
    let roots = sandbox.json(&["roots"]);
    assert_eq!(
        roots,
        serde_json::json!([{"link": "[DIR]/result", "path": path}])
    );
}

#[test]
fn roots_keep_paths_from_gc() {
    let sandbox = Sandbox::new();
    let kept = sandbox.add_tree("kept", "kept");
    let dead = sandbox.add_tree("dead", "dead");
    let root = sandbox.path().join("root");
    sandbox.ok(&["root", "add", &kept, root.to_str().unwrap()]);
    assert_eq!(sandbox.ok(&["-q", "gc", "--dry-run"]), dead);
    assert_eq!(sandbox.ok(&["-q", "gc", "--print-live"]), kept);
    assert_eq!(sandbox.json(&["gc"])["paths"], serde_json::json!([dead]));
    assert_eq!(sandbox.ok(&["info", "--all", "--names"]), kept);
    let ran = sandbox.run(&["delete", &kept]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr
            .starts_with(&format!("error: Cannot delete path '{kept}'")),
        "{}",
        ran.stderr
    );
    fs::remove_file(root).unwrap();
    assert_eq!(sandbox.ok(&["-q", "delete", &kept]), kept);
    assert_eq!(sandbox.ok(&["info", "--all", "--names"]), "");
}

#[test]
fn gc_and_repack_free_space() {
    let sandbox = Sandbox::new();
    let noise = |seed: u32| -> String {
        let mut state = seed;
        (0..300_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                char::from(b'!' + (state >> 24) as u8 % 90)
            })
            .collect()
    };
    let kept = sandbox.add_tree("kept", &noise(1));
    let dead = sandbox.add_tree("dead", &noise(2));
    let root = sandbox.path().join("root");
    sandbox.ok(&["root", "add", &kept, root.to_str().unwrap()]);
    let before = sandbox.json(&["stats"])["diskBytes"].clone();
    let dry = sandbox.json(&["gc", "--dry-run"]);
    assert_eq!(dry["paths"], serde_json::json!([dead]));
    let expected = dry["content"]["diskBytesAfter"].as_u64().unwrap();
    assert_eq!(sandbox.json(&["stats"])["diskBytes"], before);
    let done = sandbox.json(&["gc"]);
    assert_eq!(done["paths"], serde_json::json!([dead]));
    assert_eq!(done["keptBy"]["permanentRoots"], 1);
    let (had, has) = (
        done["content"]["diskBytesBefore"].as_u64().unwrap(),
        done["content"]["diskBytesAfter"].as_u64().unwrap(),
    );
    assert!(has * 10 < had * 6, "{done}");
    assert!(has.abs_diff(expected) * 10 < had, "{dry} {done}");
    assert_eq!(sandbox.json(&["gc"])["content"]["deadPieces"], 0);
    let repacked = sandbox.json(&["repack", "--level", "19"]);
    assert_eq!(repacked["freedPieces"], 0);
    assert!(
        repacked["diskBytesAfter"].as_u64().unwrap() <= has,
        "{repacked}"
    );
    assert_eq!(sandbox.ok(&["cat", &format!("{kept}/file")]), noise(1));
    sandbox.ok(&["-q", "check", "--contents"]);
}

#[test]
fn a_dense_repack_puts_versions_of_a_file_of_many_paths_together() {
    let sandbox = Sandbox::new();
    // Versions of two files of 60 kB by turns, which zstd makes smaller only where one version follows another.
    let version = |number: u32| -> String {
        let mut state = number % 2;
        let text: String = (0..60_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                char::from(b'!' + (state >> 24) as u8 % 90)
            })
            .collect();
        format!("{text}{number}")
    };
    let paths: Vec<String> = (0..8)
        .map(|number| sandbox.add_tree(&format!("version-{number}"), &version(number)))
        .collect();
    let plain = sandbox.json(&["repack", "--level", "9"]);
    let dense = sandbox.json(&["repack", "--dense"]);
    let bytes = |report: &serde_json::Value| report["copiedBytes"].as_u64().unwrap();
    assert!(bytes(&dense) * 2 < bytes(&plain), "{plain} {dense}");
    assert_eq!(dense["freedPieces"], 0);
    for (number, path) in (0..).zip(&paths) {
        assert_eq!(
            sandbox.ok(&["cat", &format!("{path}/file")]),
            version(number)
        );
    }
    sandbox.ok(&["-q", "check", "--contents"]);
}

#[test]
fn another_store_directory() {
    let sandbox = Sandbox::new();
    let made = sandbox.json(&["init", "--store-dir", "/x/store"]);
    assert_eq!(made["storeDir"], "/x/store");
    let path = sandbox.add_tree("tree", "x");
    assert!(path.starts_with("/x/store/"), "{path}");
    assert_eq!(sandbox.ok(&["cat", &format!("{path}/file")]), "x");
}

#[test]
fn stats_say_by_what_bytes_were_saved() {
    let sandbox = Sandbox::new();
    sandbox.add_tree("a", &"same\n".repeat(1000));
    sandbox.add_tree("b", &"same\n".repeat(1000));
    let stats = sandbox.json(&["stats"]);
    // `b` has another name but the same contents.
    assert_eq!(
        (stats["paths"].as_u64(), stats["files"].as_u64()),
        (Some(2), Some(4))
    );
    assert_eq!(stats["apparentBytes"], 2 * 5019);
    assert_eq!(
        (stats["uniqueFiles"].as_u64(), stats["uniqueBytes"].as_u64()),
        (Some(2), Some(5019))
    );
    assert!(stats["storedBytes"].as_u64() < Some(1000), "{stats}");
    let text = sandbox.ok(&["stats"]);
    assert!(text.contains("equal files once"), "{text}");
    assert!(sandbox.ok(&["stats", "--quick"]).contains("NAR size"));
}

#[test]
fn check_finds_and_names_damage() {
    let sandbox = Sandbox::new();
    let noise: String = (0..60_000u32)
        .map(|i| format!("{:x}", i.wrapping_mul(2_654_435_761)))
        .collect();
    let path = sandbox.add_tree("tree", &noise);
    assert_eq!(sandbox.run(&["check", "--contents"]).code, 0);
    sandbox.ok(&["check", "--rebuild-index"]);
    assert_eq!(sandbox.json(&["check"])["findings"], serde_json::json!([]));

    let packs = sandbox.store().join("castore");
    let pack = walk(&packs)
        .into_iter()
        .max_by_key(|f| fs::metadata(f).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&pack, PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(&pack, bytes).unwrap();
    let ran = sandbox.run(&["check"]);
    assert_eq!(ran.code, 4, "{}{}", ran.stdout, ran.stderr);
    assert!(
        ran.stdout.contains(&path),
        "the store path is named: {}",
        ran.stdout
    );
    assert!(
        ran.stderr.contains("1 of 1 paths are damaged"),
        "{}",
        ran.stderr
    );
    let ran = sandbox.run(&["cat", &format!("{path}/file")]);
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(ran.raw.len() < noise.len());
}

fn hex_noise(seed: u32) -> String {
    (0..60_000_u32)
        .map(|i| format!("{:x}", (i ^ seed).wrapping_mul(2_654_435_761)))
        .collect()
}

/// Two paths, the URL of a cache that has the first of them, and the only pack, which has them in order.
fn repairable(sandbox: &Sandbox) -> (String, String, String, std::path::PathBuf) {
    let path = sandbox.add_tree("tree", &hex_noise(1));
    let other = sandbox.add_tree("other", &hex_noise(1 << 20));
    let cache = sandbox.path().join("cache");
    fs::create_dir_all(&cache).unwrap();
    fs::write(cache.join("nix-cache-info"), "StoreDir: /nix/store\n").unwrap();
    let archive = sandbox.run(&["export", &path]).raw;
    fs::write(cache.join("tree.nar"), &archive).unwrap();
    let info = sandbox.json(&["info", &path])[0].clone();
    let hash_part = &path["/nix/store/".len()..][..32];
    let narinfo = format!(
        "StorePath: {path}\nURL: tree.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: \n",
        info["narHash"].as_str().unwrap(),
        archive.len(),
    );
    fs::write(cache.join(format!("{hash_part}.narinfo")), narinfo).unwrap();
    let pack = walk(&sandbox.store().join("castore/packs")).remove(0);
    (path, other, format!("file://{}", cache.display()), pack)
}

fn flip(file: &std::path::Path, at: impl Fn(usize) -> usize) {
    use std::os::unix::fs::PermissionsExt;
    let mut bytes = fs::read(file).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 0x40;
    fs::set_permissions(file, PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(file, bytes).unwrap();
}

fn repair(sandbox: &Sandbox, url: &str) -> (i32, serde_json::Value) {
    let ran = sandbox.run(&["--json", "check", "--repair-from", url]);
    let report = serde_json::from_str(&ran.stdout)
        .unwrap_or_else(|_| panic!("{}{}", ran.stdout, ran.stderr));
    (ran.code, report)
}

#[test]
fn check_repairs_from_a_binary_cache() {
    let sandbox = Sandbox::new();
    let (path, other, url, pack) = repairable(&sandbox);
    flip(&pack, |len| len / 4);
    assert_eq!(sandbox.run(&["check"]).code, 4);
    let (code, report) = repair(&sandbox, &url);
    assert_eq!(code, 0, "{report}");
    assert_eq!(
        report["repair"]["repaired"],
        serde_json::json!([path]),
        "{report}"
    );
    assert_eq!(report["repair"]["complete"], true, "{report}");
    assert!(!pack.exists(), "the damaged pack is gone");
    assert_eq!(sandbox.ok(&["cat", &format!("{path}/file")]), hex_noise(1));
    assert_eq!(
        sandbox.ok(&["cat", &format!("{other}/file")]),
        hex_noise(1 << 20)
    );
    sandbox.ok(&["-q", "check", "--contents"]);
}

#[test]
fn what_no_source_has_stays_damaged_and_is_said() {
    let sandbox = Sandbox::new();
    let (path, other, url, pack) = repairable(&sandbox);
    flip(&pack, |len| len * 3 / 4);
    let (code, report) = repair(&sandbox, &url);
    assert_eq!(code, 4, "{report}");
    let repair = &report["repair"];
    assert_eq!(repair["repaired"], serde_json::json!([]), "{report}");
    assert!(repair["failed"][&other].is_string(), "{report}");
    assert_eq!(repair["complete"], false, "{report}");
    assert_eq!(sandbox.ok(&["cat", &format!("{path}/file")]), hex_noise(1));
    assert_eq!(sandbox.run(&["cat", &format!("{other}/file")]).code, 4);
    // It is not what is damaged that is taken for right.
    assert_eq!(sandbox.run(&["check"]).code, 4);
    // Once the path is gone, so is the damage.
    sandbox.ok(&["delete", &other]);
    sandbox.ok(&["gc", "--min-dead", "1"]);
    let ran = sandbox.run(&["check"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(walk(&path));
        } else {
            out.push(path);
        }
    }
    out
}

#[test]
fn import_from_a_binary_cache_that_is_not_there() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["import", "file:///nowhere", "--all"]);
    assert!(ran.code == 1 || ran.code == 3, "{ran:?}");
    assert!(ran.stderr.contains("/nowhere"), "{}", ran.stderr);
}

#[test]
fn an_export_stream_that_is_rubbish() {
    let sandbox = Sandbox::new();
    let rubbish = sandbox.path().join("rubbish");
    fs::write(&rubbish, "rubbish ".repeat(100)).unwrap();
    let output = sandbox
        .command()
        .args(["import", "-"])
        .stdin(fs::File::open(&rubbish).unwrap())
        .output()
        .unwrap();
    let ran = sandbox.ran(&output);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert_eq!(sandbox.ok(&["info", "--all", "--names"]), "");
}

#[test]
fn an_image_is_written_once() {
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let report = sandbox.json(&["image", &path, "-o", "image"]);
    assert_eq!((&report["paths"], &report["files"]), (&1.into(), &2.into()));
    assert_eq!(report["image"], "[DIR]/image");
    let bytes = fs::read(sandbox.path().join("image")).unwrap();
    assert_eq!(report["imageBytes"], bytes.len());
    let again = sandbox.run(&["image", &path, "-o", "image"]);
    assert_eq!(again.code, 1);
    assert_eq!(
        again.stderr,
        "error: [DIR]/image is there already\nhint: name another file, or replace it with --force\n"
    );
    sandbox.ok(&["-q", "image", &path, "-o", "image", "--force"]);
    assert!(fs::read(sandbox.path().join("image")).unwrap() == bytes);
    let absent = sandbox.run(&["image", &format!("{}-absent", "0".repeat(32)), "-o", "x"]);
    assert_eq!(absent.code, 1);
    assert!(
        absent.stderr.contains("is not valid\nhint: "),
        "{}",
        absent.stderr
    );
}
