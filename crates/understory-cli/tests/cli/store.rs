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
