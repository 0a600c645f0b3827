//! Temporary roots between stock Nix and us.

use super::support::{Heard, World};
use rustix::fs::{CWD, FileType, Mode};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use understory::daemon::Silent;
use understory::local::LocalPaths;
use understory::local::lock::GcLock;
use understory::local::temp_roots::{RootServer, TempRoots};
use understory::settings::Settings;
use understory_nix::{StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

// -- with stock Nix

/// A store of stock Nix in a directory that both sides see.
fn stock(version: Version) -> Option<(NixRoot, tempfile::TempDir, Vec<Bind>)> {
    if !rustix::process::geteuid().is_root() {
        understory_testkit::skip("entering the root needs root");
        return None;
    }
    let root = NixRoot::get(version)?;
    let dir = tempfile::tempdir().unwrap();
    let binds = vec![Bind::new(dir.path(), "/shared")];
    Some((root, dir, binds))
}

const NIX: &str = "export NIX_REMOTE='local?root=/shared/s' HOME=/tmp; ";

fn add_by_stock(root: &NixRoot, binds: &[Bind], text: &str) -> StorePath {
    let script = format!("{NIX} echo {text} > /tmp/{text}; nix-store --add /tmp/{text}");
    let path = root.run_ok(binds, 0, &script);
    StoreDir::default().parse(path.trim().as_bytes()).unwrap()
}

#[test]
fn real_nix_keeps_our_temporary_roots() {
    for version in [Version::Nix2_26, Version::Nix2_34] {
        let Some((root, dir, binds)) = stock(version) else {
            continue;
        };
        let (kept, late) = (
            add_by_stock(&root, &binds, "kept"),
            add_by_stock(&root, &binds, "late"),
        );
        let paths = LocalPaths::at_root(&dir.path().join("s"), StoreDir::default());
        let roots = TempRoots::new(&paths.state, &paths.store_dir);
        roots.add(std::slice::from_ref(&kept)).unwrap();
        // The collector waits at the FIFO: it has its lock, its socket, and all roots that were there.
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let script = format!(
            "{NIX} export _NIX_TEST_GC_SYNC_2=/shared/fifo; exec nix-store --gc -vvvvv 2>&1"
        );
        let mut gc = root
            .command(&binds, 0, &[], "bash")
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Opens when the collector has opened it to read.
        let mut open = std::fs::File::options().write(true).open(&fifo).unwrap();
        roots.add(std::slice::from_ref(&late)).unwrap();
        open.write_all(b"go\n").unwrap();
        drop(open);
        let said: Vec<String> = BufReader::new(gc.stdout.take().unwrap())
            .lines()
            .map_while(std::io::Result::ok)
            .collect();
        assert!(gc.wait().unwrap().success(), "{said:?}");
        assert!(paths.object(&kept).exists(), "{said:?}");
        assert!(paths.object(&late).exists(), "{said:?}");
        drop(roots);
        root.run_ok(&binds, 0, &format!("{NIX} nix-store --gc"));
        assert!(!paths.object(&kept).exists());
        assert!(!paths.object(&late).exists());
    }
}

#[test]
fn real_nix_hands_its_temporary_roots_to_our_collection() {
    for version in [Version::Nix2_26, Version::Nix2_34] {
        let Some((root, dir, binds)) = stock(version) else {
            continue;
        };
        add_by_stock(&root, &binds, "first");
        let paths = LocalPaths::at_root(&dir.path().join("s"), StoreDir::default());
        let lock = GcLock::exclusive(&paths.state, &Silent).unwrap();
        let (server, before) = RootServer::start(&paths.state, &paths.store_dir).unwrap();
        assert!(before.is_empty(), "{before:?}");
        // It ends, though the collection runs.
        let path = add_by_stock(&root, &binds, "during");
        assert!(server.is_root(&path));
        assert!(!server.claim(&path));
        drop(server);
        drop(lock);
        assert_eq!(add_by_stock(&root, &binds, "during"), path);
    }
}

#[test]
fn real_nix_store_on_disk_is_a_substituter() {
    let Some((root, dir, binds)) = stock(Version::Nix2_34) else {
        return;
    };
    let path = add_by_stock(&root, &binds, "there");
    let settings = Settings {
        substituters: vec![dir.path().join("s").display().to_string()],
        ..Settings::default()
    };
    let Some(world) = World::with(settings) else {
        return;
    };
    let heard = Heard::default();
    world.client().ensure_path(&path, &heard).unwrap();
    assert_eq!(
        std::fs::read_to_string(world.merged(&path)).unwrap(),
        "there\n"
    );
    assert!(world.upper_names().contains(path.base_name()));
    // What is not as its row says is refused, and nothing is left of it.
    let damaged = add_by_stock(&root, &binds, "damaged");
    let file = dir.path().join("s/nix/store").join(damaged.base_name());
    std::fs::write(&file, "other").unwrap();
    let error = world.client().ensure_path(&damaged, &heard).unwrap_err();
    assert!(error.chain().contains("hash mismatch"), "{}", error.chain());
    assert!(!world.upper_names().contains(damaged.base_name()));
}
