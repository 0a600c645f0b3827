//! Roots, collection, rights and damage.

use crate::support::{Daemon, VERSIONS, add, file_nar, full, info, path, server_error, tree_nar};
use std::collections::BTreeSet;
use understory::daemon::{Client, ServerOptions};
use understory_nix::worker::{
    BasicDerivation, BuildMode, DerivationOutput, GcActionKind, GcRequest, Request, Version,
};
use understory_nix::{SecretKey, Signature, StorePath};

fn set(paths: &[&StorePath]) -> BTreeSet<StorePath> {
    paths.iter().map(|path| (*path).clone()).collect()
}

fn collect(action: GcActionKind, paths: Option<BTreeSet<StorePath>>) -> GcRequest {
    GcRequest {
        action,
        paths,
        delete_referrers: false,
        ignore_liveness: false,
        freed_bytes_max: u64::MAX,
    }
}

#[test]
fn nothing_is_deleted_where_an_overlay_forbids_it() {
    let daemon = Daemon::with(ServerOptions {
        deletions_refused: Some("nothing is deleted while an overlay is mounted".to_owned()),
        ..Default::default()
    });
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]).path;
    for action in [GcActionKind::DeleteDead, GcActionKind::DeleteSpecific] {
        let paths = (action == GcActionKind::DeleteSpecific).then(|| set(&[&a]));
        assert!(
            server_error(client.collect_garbage(collect(action, paths)))
                .starts_with("nothing is deleted while an overlay is mounted")
        );
    }
    client
        .collect_garbage(collect(GcActionKind::ReturnDead, None))
        .unwrap();
    assert!(client.is_valid_path(&a).unwrap());
}

#[test]
fn roots_keep_alive_and_collection_takes_the_rest() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = {
        let mut client = daemon.client();
        let a = add(&mut client, "a", &[]);
        let b = add(&mut client, "b", &[&a.path]);
        let c = add(&mut client, "c", &[]);
        // What was added is alive as long as the connection.
        let (dead, _) = client
            .collect_garbage(collect(GcActionKind::ReturnDead, None))
            .unwrap();
        assert_eq!(dead, set(&[]));
        (a.path, b.path, c.path)
    };
    daemon.wait_until_alone();
    let mut client = daemon.client();
    let link = dir.path().join("result");
    let link_text = link.to_str().unwrap().to_owned();
    let perm = Request::AddPermRoot {
        path: b.clone(),
        link: link_text.clone().into_bytes(),
    };
    assert_eq!(client.text(&perm).unwrap(), link_text);
    let (live, _) = client
        .collect_garbage(collect(GcActionKind::ReturnLive, None))
        .unwrap();
    assert_eq!(live, set(&[&a, &b]));
    assert!(
        client
            .find_roots()
            .unwrap()
            .iter()
            .any(|(name, target)| name == link_text.as_bytes() && *target == b)
    );

    assert_eq!(
        server_error(
            client.collect_garbage(collect(GcActionKind::DeleteSpecific, Some(set(&[&a]))))
        ),
        format!(
            "Cannot delete path '{}' since it is still alive. To find out why, use: \
             nix-store --query --roots and nix-store --query --referrers",
            full(&a)
        )
    );
    assert_eq!(
        server_error(client.collect_garbage(GcRequest {
            ignore_liveness: true,
            ..collect(GcActionKind::DeleteSpecific, Some(set(&[&a])))
        })),
        "you are not allowed to ignore liveness"
    );
    assert!(
        server_error(client.collect_garbage(collect(GcActionKind::DeleteDead, Some(set(&[&c])))))
            .starts_with("deleting what is dead of given paths only is not supported")
    );
    // A temporary root of another connection.
    let mut other = daemon.client();
    assert_eq!(other.number(&Request::AddTempRoot(c.clone())).unwrap(), 1);
    let (deleted, _) = client
        .collect_garbage(collect(GcActionKind::DeleteDead, None))
        .unwrap();
    assert_eq!(deleted, set(&[]));
    drop(other);
    while daemon.server.connection_count() > 1 {
        std::thread::yield_now();
    }
    let (deleted, freed) = client
        .collect_garbage(collect(GcActionKind::DeleteDead, None))
        .unwrap();
    assert_eq!(deleted, set(&[&c]));
    assert_eq!(freed, tree_nar("c").len() as u64);
    assert!(!client.is_valid_path(&c).unwrap());
    std::fs::remove_file(&link).unwrap();
    let (deleted, _) = client
        .collect_garbage(collect(GcActionKind::DeleteSpecific, Some(set(&[&a, &b]))))
        .unwrap();
    assert_eq!(deleted, set(&[&a, &b]));
    assert_eq!(client.query_all_valid_paths().unwrap(), set(&[]));
}

#[test]
fn indirect_roots_are_links_anywhere() {
    let daemon = Daemon::start();
    let dir = tempfile::tempdir().unwrap();
    let a = add(&mut daemon.client(), "a", &[]).path;
    daemon.wait_until_alone();
    let link = dir.path().join("result");
    std::os::unix::fs::symlink(full(&a), &link).unwrap();
    let mut client = daemon.client();
    let request = Request::AddIndirectRoot(link.to_str().unwrap().into());
    assert_eq!(client.number(&request).unwrap(), 1);
    let (dead, _) = client
        .collect_garbage(collect(GcActionKind::ReturnDead, None))
        .unwrap();
    assert_eq!(dead, set(&[]));
    assert_eq!(
        server_error(client.number(&Request::AddIndirectRoot(b"result".to_vec()))),
        "'result' is not an absolute path"
    );
}

#[test]
fn signatures_are_added_to_valid_paths_only() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]).path;
    let signature = Signature::parse(&format!("key-1:{}==", "A".repeat(86))).unwrap();
    let sign = |path: &StorePath| Request::AddSignatures {
        path: path.clone(),
        signatures: BTreeSet::from([signature.clone()]),
    };
    assert_eq!(client.number(&sign(&a)).unwrap(), 1);
    let found = client.query_path_info(&a).unwrap().unwrap();
    assert_eq!(found.signatures, BTreeSet::from([signature.clone()]));
    let unknown = path("unknown");
    assert_eq!(
        server_error(client.number(&sign(&unknown))),
        format!("path '{}' is not valid", full(&unknown))
    );
    assert!(client.is_valid_path(&a).unwrap());
}

#[test]
fn peers_without_trust_may_ask_but_not_change() {
    let key = SecretKey::generate("test-1").unwrap();
    let daemon = Daemon::with(ServerOptions {
        trusted_users: Vec::new(),
        trusted_public_keys: understory_nix::PublicKeys::parse(&key.public().to_string()).unwrap(),
        ..ServerOptions::default()
    });
    let mut client = daemon.client();
    let archive = file_nar(b"contents");
    let unsigned = info(&path("a"), &archive, &[]);
    let lacks = format!(
        "cannot add path '{}' because it lacks a signature by a trusted key\nhint: sign it with a key of the \
         daemon's trusted public keys, or add it as a trusted user",
        full(&unsigned.path)
    );
    // It asks for no check, and is checked.
    assert_eq!(
        server_error(client.add_to_store_nar(&unsigned, &mut &archive[..], false, true)),
        lacks
    );
    assert!(!client.is_valid_path(&unsigned.path).unwrap());
    let multiple = client.add_multiple_to_store(1, false, true, |out| {
        understory::daemon::client::write_info(out, daemon.store.store_dir(), &unsigned)?;
        out.write_all(&archive)
    });
    assert_eq!(server_error(multiple), lacks);
    let mut signed = unsigned.clone();
    let fingerprint = signed.fingerprint(daemon.store.store_dir());
    signed.signatures.insert(key.sign(fingerprint.as_bytes()));
    signed.ultimate = true;
    client
        .add_to_store_nar(&signed, &mut &archive[..], false, true)
        .unwrap();
    let found = client.query_path_info(&signed.path).unwrap().unwrap();
    assert!(
        !found.ultimate,
        "nobody without trust may say that it was built here"
    );
    // A content address needs no signature, if the content agrees.
    let added = client
        .add_to_store("b", "fixed:r:sha256", BTreeSet::new(), &mut &archive[..])
        .unwrap();
    let ca = client.query_path_info(&added.path).unwrap().unwrap();
    assert_eq!(ca, added);
    let other = file_nar(b"else");
    let wrong = understory_nix::PathInfo {
        ca: None,
        ..info(&path("c"), &other, &[])
    };
    let lie = understory_nix::PathInfo {
        path: added.path.clone(),
        ca: added.ca,
        ..wrong
    };
    let fresh = Daemon::untrusted();
    let mut client2 = fresh.client();
    let message = server_error(client2.add_to_store_nar(&lie, &mut &other[..], false, false));
    assert!(
        message.starts_with("ca hash mismatch importing path"),
        "{message}"
    );

    let refused =
        |what: &str| format!("{what} is not allowed because you are not in 'trusted-users'");
    for (request, what) in [
        (
            Request::VerifyStore {
                check_contents: false,
                repair: true,
            },
            "repairing",
        ),
        (
            Request::BuildPaths {
                paths: Vec::new(),
                mode: BuildMode::Repair,
            },
            "repairing",
        ),
        (
            Request::AddPermRoot {
                path: added.path.clone(),
                link: b"/tmp/x".to_vec(),
            },
            "adding a permanent root",
        ),
    ] {
        assert_eq!(server_error(client.number(&request)), refused(what));
    }
    for action in [GcActionKind::DeleteDead, GcActionKind::DeleteSpecific] {
        assert_eq!(
            server_error(client.collect_garbage(collect(action, None))),
            refused("deleting store paths")
        );
    }
    assert_eq!(
        server_error(client.add_build_log(&path("x.drv"), &mut &b"log"[..])),
        refused("adding a build log")
    );
    let roots = client.find_roots().unwrap();
    assert!(!roots.is_empty() && roots.iter().all(|(link, _)| link == b"{censored}"));
    assert!(client.is_valid_path(&signed.path).unwrap());
}

#[test]
fn users_that_are_not_allowed_are_told_so() {
    let daemon = Daemon::with(ServerOptions {
        trusted_users: Vec::new(),
        allowed_users: vec!["somebody-else".to_owned()],
        ..ServerOptions::default()
    });
    for version in VERSIONS {
        let options = understory::daemon::ClientOptions {
            version,
            ..Default::default()
        };
        let refused = Client::connect(&daemon.socket, &options).map(drop);
        assert_eq!(
            server_error(refused),
            "user 'root' is not allowed to connect to the Nix daemon"
        );
    }
}

#[test]
fn clients_that_are_too_old_are_told_so() {
    let daemon = Daemon::start();
    let options = understory::daemon::ClientOptions {
        version: Version::new(1, 20),
        ..Default::default()
    };
    assert_eq!(
        server_error(Client::connect(&daemon.socket, &options).map(drop)),
        "the client speaks version 1.20 of the worker protocol, this daemon speaks 1.21 to 1.38"
    );
}

#[test]
fn a_read_only_daemon_refuses_changes_and_goes_on() {
    let daemon = Daemon::with(ServerOptions {
        read_only: true,
        ..ServerOptions::default()
    });
    let mut client = daemon.client();
    let archive = file_nar(b"x");
    let a = info(&path("a"), &archive, &[]);
    let message = "this store is read-only";
    assert_eq!(
        server_error(client.add_to_store_nar(&a, &mut &archive[..], false, true)),
        message
    );
    assert_eq!(
        server_error(client.add_to_store("a", "text:sha256", BTreeSet::new(), &mut &b"x"[..])),
        message
    );
    assert_eq!(
        server_error(client.collect_garbage(collect(GcActionKind::DeleteDead, None))),
        message
    );
    assert_eq!(
        client
            .number(&Request::AddTempRoot(a.path.clone()))
            .unwrap(),
        1
    );
    assert!(!client.is_valid_path(&a.path).unwrap());
}

#[test]
fn damage_is_found_by_verify_and_named() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]);
    let verify = Request::VerifyStore {
        check_contents: true,
        repair: false,
    };
    assert_eq!(client.number(&verify).unwrap(), 0);
    // A wrong hash in the database is what a changed content looks like.
    let row = daemon.store.path(&a.path).unwrap().unwrap();
    let mut wrong = row.info.clone();
    wrong.nar_hash.0[0] ^= 1;
    daemon
        .store
        .republish(vec![(wrong.clone(), row.root.clone())])
        .unwrap();
    assert_eq!(client.number(&verify).unwrap(), 1);
    let said: Vec<String> = client
        .take_logs()
        .into_iter()
        .map(|log| match log {
            understory_nix::worker::LogMessage::Next(text) => String::from_utf8(text).unwrap(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        said,
        [format!(
            "path '{}' was modified! expected hash '{}', got '{}'\n",
            full(&a.path),
            wrong.nar_hash,
            a.nar_hash
        )]
    );
}

#[test]
fn what_is_dead_of_given_paths_is_deleted_with_the_feature() {
    let daemon = Daemon::start();
    let (a, b, c, d) = {
        let mut client = daemon.client();
        let a = add(&mut client, "a", &[]).path;
        let b = add(&mut client, "b", &[&a]).path;
        let c = add(&mut client, "c", &[&b]).path;
        let d = add(&mut client, "d", &[]).path;
        (a, b, c, d)
    };
    daemon.wait_until_alone();
    let mut client = daemon.client_with_features();
    client.number(&Request::AddTempRoot(d.clone())).unwrap();
    // Something else needs `a`, and `d` is alive.
    let among = |paths, delete_referrers| GcRequest {
        delete_referrers,
        ..collect(GcActionKind::DeleteDead, Some(paths))
    };
    let (deleted, freed) = client
        .collect_garbage(among(set(&[&a, &d]), false))
        .unwrap();
    assert_eq!((deleted, freed), (set(&[]), 0));
    let specific = |paths, delete_referrers| GcRequest {
        delete_referrers,
        ..collect(GcActionKind::DeleteSpecific, Some(paths))
    };
    for referrers in [false, true] {
        assert!(
            server_error(client.collect_garbage(specific(set(&[&d]), referrers))).starts_with(
                &format!("Cannot delete path '{}' since it is still alive", full(&d))
            )
        );
    }
    let (deleted, freed) = client
        .collect_garbage(among(set(&[&c, &d]), false))
        .unwrap();
    assert_eq!((deleted, freed), (set(&[&c]), tree_nar("c").len() as u64));
    let (deleted, _) = client.collect_garbage(among(set(&[&a, &d]), true)).unwrap();
    assert_eq!(deleted, set(&[&a, &b]));
    assert_eq!(client.query_all_valid_paths().unwrap(), set(&[&d]));
}

#[test]
fn peers_without_trust_build_what_proves_itself() {
    let daemon = Daemon::untrusted();
    let mut client = daemon.client();
    let build = |output: (&str, &str, &str)| {
        let (path, hash_algo, hash) = output;
        let output = DerivationOutput {
            path: path.to_owned(),
            hash_algo: hash_algo.to_owned(),
            hash: hash.to_owned(),
        };
        Request::BuildDerivation {
            drv: path_of_drv(),
            derivation: Box::new(BasicDerivation {
                outputs: std::collections::BTreeMap::from([("out".to_owned(), output)]),
                platform: b"x".to_vec(),
                builder: b"/bin/sh".to_vec(),
                ..BasicDerivation::default()
            }),
            mode: BuildMode::Normal,
        }
    };
    let some = full(&path("some"));
    assert_eq!(
        server_error(client.build_derivation(&build((&some, "", "")))),
        "you are not privileged to build input-addressed derivations"
    );
    assert_eq!(
        server_error(client.build_derivation(&build(("", "", "")))),
        "you are not privileged to build input-addressed derivations"
    );
    let mut no_drv = build((&some, "", ""));
    if let Request::BuildDerivation { drv, .. } = &mut no_drv {
        *drv = path("no-derivation");
    }
    assert_eq!(
        server_error(client.build_derivation(&no_drv)),
        format!(
            "store path '{}' is not a valid derivation path",
            full(&path("no-derivation"))
        )
    );
    // The path that is named is the derivation's own, and it is there.
    let message = server_error(client.build_derivation(&build(("", "r:sha256", ""))));
    let drv = client.query_all_valid_paths().unwrap();
    assert_eq!(drv.len(), 1);
    let drv = drv.first().unwrap();
    assert!(drv.base_name().ends_with("-x.drv") && *drv != path_of_drv());
    assert!(
        message.starts_with(&format!("cannot build '{}'", full(drv))),
        "{message}"
    );
    // A fixed output is where its hash says.
    let archive = file_nar(b"contents");
    let added = client
        .add_to_store("x", "fixed:r:sha256", BTreeSet::new(), &mut &archive[..])
        .unwrap();
    let hash = added.nar_hash.to_base16();
    let result = client
        .build_derivation(&build((&some, "r:sha256", &hash)))
        .unwrap();
    assert_eq!(result.built_outputs["out"].out_path, added.path);
}

fn path_of_drv() -> StorePath {
    path("x.drv")
}
