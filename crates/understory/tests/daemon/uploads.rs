//! Things that are sent to the daemon, in all transports.

use crate::support::{Daemon, VERSIONS, add, file_nar, full, info, path, server_error, tree_nar};
use std::collections::BTreeSet;
use std::io::Read;
use understory::daemon::client::write_info;
use understory_nix::worker::{Request, Version};
use understory_nix::{Hash, HashAlgorithm, PathInfo, StoreDir};

#[test]
fn nars_arrive_in_every_transport() {
    for version in VERSIONS {
        let daemon = Daemon::start();
        let mut client = daemon.client_at(version);
        // Longer than any buffer, and of a size that needs padding.
        let contents: Vec<u8> = (0..1_000_003_u32).map(|i| (i ^ (i >> 7)) as u8).collect();
        let archive = file_nar(&contents);
        let big = info(&path("big"), &archive, &[]);
        client
            .add_to_store_nar(&big, &mut &archive[..], false, true)
            .unwrap();
        assert_eq!(
            client.query_path_info(&big.path).unwrap().unwrap(),
            big,
            "{version}"
        );
        let mut back = Vec::new();
        client.nar_from_path(&big.path, &mut back).unwrap();
        assert!(back == archive, "{version}");
        // Again: it is valid, the archive is read all the same.
        client
            .add_to_store_nar(&big, &mut &archive[..], false, true)
            .unwrap();
        assert!(client.is_valid_path(&big.path).unwrap());
    }
}

#[test]
fn what_differs_from_its_info_is_refused_and_leaves_nothing() {
    for version in VERSIONS {
        let daemon = Daemon::start();
        let mut client = daemon.client_at(version);
        let archive = tree_nar("x");
        let right = info(&path("x"), &archive, &[]);
        let mut wrong = right.clone();
        wrong.nar_hash.0[5] ^= 1;
        let message = server_error(client.add_to_store_nar(&wrong, &mut &archive[..], false, true));
        assert_eq!(
            message,
            format!(
                "hash mismatch importing path '{}';\n  specified: {}\n  got:       {}",
                full(&right.path),
                wrong.nar_hash,
                right.nar_hash
            ),
            "{version}"
        );
        let wrong = PathInfo {
            nar_size: right.nar_size + 8,
            ..right.clone()
        };
        let message = server_error(client.add_to_store_nar(&wrong, &mut &archive[..], false, true));
        assert!(
            message.starts_with("size mismatch importing path"),
            "{message}"
        );
        let missing = path("missing");
        let wrong = info(&right.path, &archive, &[&missing]);
        let message = server_error(client.add_to_store_nar(&wrong, &mut &archive[..], false, true));
        assert_eq!(
            message,
            format!("path '{}' is not valid", full(&missing)),
            "{version}"
        );
        assert!(client.query_all_valid_paths().unwrap().is_empty());
        client
            .add_to_store_nar(&right, &mut &archive[..], false, true)
            .unwrap();
    }
}

#[test]
fn a_malformed_archive_is_refused_and_the_connection_goes_on() {
    let daemon = Daemon::start();
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        let mut archive = file_nar(&[7; 5000]);
        archive[30] ^= 0xff;
        let x = info(&path("x"), &archive, &[]);
        let message = server_error(client.add_to_store_nar(&x, &mut &archive[..], false, true));
        assert!(message.contains("NAR"), "{version}: {message}");
        assert!(!client.is_valid_path(&x.path).unwrap(), "{version}");
    }
}

fn send_all(
    client: &mut understory::daemon::Client,
    items: &[(PathInfo, Vec<u8>)],
) -> Result<(), understory::daemon::ClientError> {
    client.add_multiple_to_store(items.len() as u64, false, true, |out| {
        for (info, archive) in items {
            write_info(out, &StoreDir::default(), info)?;
            out.write_all(archive)?;
        }
        Ok(())
    })
}

#[test]
fn many_paths_come_back_to_back() {
    let daemon = Daemon::start();
    for version in [Version::new(1, 32), Version::new(1, 35), Version::NEWEST] {
        let mut client = daemon.client_at(version);
        let mut items = Vec::new();
        for i in 0..50 {
            let name = format!("{version}-{i}");
            let archive = if i % 2 == 0 {
                tree_nar(&name)
            } else {
                file_nar(name.as_bytes())
            };
            let below: Vec<_> = (i > 0)
                .then(|| path(&format!("{version}-{}", i - 1)))
                .into_iter()
                .collect();
            let references: Vec<_> = below.iter().collect();
            items.push((info(&path(&name), &archive, &references), archive));
        }
        send_all(&mut client, &items).unwrap();
        for (info, archive) in &items {
            assert_eq!(
                client.query_path_info(&info.path).unwrap().as_ref(),
                Some(info)
            );
            let mut back = Vec::new();
            client.nar_from_path(&info.path, &mut back).unwrap();
            assert_eq!(&back, archive);
        }
        // All valid now: everything is skipped. In the wrong order, too.
        items.reverse();
        send_all(&mut client, &items).unwrap();
    }
}

#[test]
fn references_may_come_after_what_refers_to_them() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (a, b) = (tree_nar("a"), tree_nar("b"));
    let items = [
        (info(&path("b"), &b, &[&path("a"), &path("b")]), b.clone()),
        (info(&path("a"), &a, &[]), a.clone()),
    ];
    send_all(&mut client, &items).unwrap();
    assert_eq!(client.query_all_valid_paths().unwrap().len(), 2);
}

#[test]
fn one_bad_path_among_many_is_named_and_the_connection_goes_on() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let archive = tree_nar("x");
    let mut wrong = info(&path("wrong"), &archive, &[]);
    wrong.nar_hash.0[0] ^= 1;
    let mut items = vec![
        (info(&path("right"), &archive, &[]), archive.clone()),
        (wrong, archive.clone()),
    ];
    // So much that the client is still sending when the server refuses.
    let big = file_nar(&vec![1; 8 << 20]);
    items.extend((0..4).map(|i| (info(&path(&format!("big-{i}")), &big, &[]), big.clone())));
    let message = server_error(send_all(&mut client, &items));
    assert!(
        message.starts_with(&format!(
            "hash mismatch importing path '{}'",
            full(&path("wrong"))
        )),
        "{message}"
    );
    assert!(!client.is_valid_path(&path("wrong")).unwrap());
    let message = server_error(client.add_multiple_to_store(1, false, true, |out| {
        let outside = understory_nix::wire::WireWrite::write_bytes;
        outside(out, b"/somewhere/else")?;
        Ok(())
    }));
    assert!(message.starts_with("reading the upload"), "{message}");
    let message = server_error(client.add_multiple_to_store(u64::MAX, false, true, |_| Ok(())));
    assert_eq!(
        message,
        "reading the upload: list is too long: expected at most 16777216, found 18446744073709551615"
    );
    assert_eq!(add(&mut client, "after", &[]).path, path("after"));
}

#[test]
fn content_addressed_objects_get_the_path_that_nix_gives_them() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    // `echo -n hello > hello`, and `nix store add`, `nix store add --mode flat`, `builtins.toFile`.
    let nar = file_nar(b"hello");
    for (method, expected, dump) in [
        ("fixed:r:sha256", "fixed:r:sha256:", &nar[..]),
        ("fixed:sha256", "fixed:sha256:", b"hello"),
        ("fixed:sha1", "fixed:sha1:", b"hello"),
        ("fixed:r:sha512", "fixed:r:sha512:", &nar[..]),
        ("text:sha256", "text:sha256:", b"hello"),
    ] {
        let mut dump: &[u8] = dump;
        let added = client
            .add_to_store("hello", method, BTreeSet::new(), &mut dump)
            .unwrap();
        let ca = added.ca.unwrap();
        assert!(ca.to_string().starts_with(expected), "{ca}");
        assert_eq!(
            added.nar_hash.to_hash(),
            Hash::of(HashAlgorithm::Sha256, &nar)
        );
        assert_eq!(added.nar_size, nar.len() as u64);
        assert!(added.is_content_addressed(daemon.store.store_dir()));
        let mut back = Vec::new();
        client.nar_from_path(&added.path, &mut back).unwrap();
        assert_eq!(back, nar);
    }
    // The old operation takes an archive whatever it hashes, and makes the same paths.
    let mut old = daemon.client_at(Version::new(1, 21));
    for (recursive, algorithm, method) in
        [(1, "sha256", "fixed:r:sha256"), (0, "sha1", "fixed:sha1")]
    {
        let request = Request::AddToStoreOld {
            name: "hello".to_owned(),
            fixed: true,
            recursive,
            algorithm: algorithm.to_owned(),
        };
        let made = old
            .add_to_store_old(&request, &mut &nar[..])
            .unwrap()
            .unwrap();
        let mut dump: &[u8] = if recursive == 1 { &nar } else { b"hello" };
        let new = client
            .add_to_store("hello", method, BTreeSet::new(), &mut dump)
            .unwrap();
        assert_eq!(made, new.path);
    }
}

#[test]
fn what_cannot_be_added_is_refused_at_once() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]).path;
    let mut attempt = |name: &str, method: &str, references: BTreeSet<_>| {
        // Endless: only an early answer ends this.
        let mut endless = std::io::repeat(1).take(1 << 40);
        server_error(client.add_to_store(name, method, references, &mut endless))
    };
    assert!(attempt("bad/name", "fixed:sha256", BTreeSet::new()).contains("bad/name"));
    assert!(attempt("x", "nonsense", BTreeSet::new()).contains("nonsense"));
    let mut short: &[u8] = b"text";
    let references = BTreeSet::from([a.clone()]);
    let message = server_error(client.add_to_store("x", "fixed:sha256", references, &mut short));
    assert!(message.contains("reference"), "{message}");
    let mut short: &[u8] = b"text";
    let message = server_error(client.add_to_store("x", "text:sha1", BTreeSet::new(), &mut short));
    assert!(message.contains("sha"), "{message}");
    let mut short: &[u8] = b"text";
    let unknown = path("unknown");
    let references = BTreeSet::from([unknown.clone()]);
    let message = server_error(client.add_to_store("x", "text:sha256", references, &mut short));
    assert_eq!(message, format!("path '{}' is not valid", full(&unknown)));
    let mut old = daemon.client_at(Version::new(1, 21));
    let request = Request::AddToStoreOld {
        name: "x".to_owned(),
        fixed: true,
        recursive: 1,
        algorithm: "sha3".to_owned(),
    };
    let message = server_error(old.add_to_store_old(&request, &mut &file_nar(b"x")[..]));
    assert_eq!(message, "unknown hash algorithm 'sha3'");
    assert!(old.is_valid_path(&a).unwrap());
    assert!(client.is_valid_path(&a).unwrap());
}

#[test]
fn build_logs_are_kept() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let drv = path("x.drv");
    let log = "line\n".repeat(10_000);
    client.add_build_log(&drv, &mut log.as_bytes()).unwrap();
    let mut found = String::new();
    daemon
        .store
        .build_log(&drv)
        .unwrap()
        .unwrap()
        .read_to_string(&mut found)
        .unwrap();
    assert_eq!(found, log);
    assert_eq!(client.number(&Request::SyncWithGC).unwrap(), 1);
}
