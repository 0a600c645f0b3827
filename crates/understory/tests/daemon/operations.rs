//! Each operation, at each version where it differs.

use crate::support::{Daemon, VERSIONS, add, full, info, path, server_error, tree_nar};
use std::collections::{BTreeMap, BTreeSet};
use understory::daemon::Client;
use understory_nix::derivation::{self, Derivation};
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildStatus, DerivationOutput, DerivedPath, DrvOutput, MissingInfo,
    OutputsSpec, Request, SetOptions, Trust, Version, WireRealisation,
};
use understory_nix::{StoreDir, StorePath, StorePathName};

fn set(paths: &[&StorePath]) -> BTreeSet<StorePath> {
    paths.iter().map(|path| (*path).clone()).collect()
}

#[test]
fn the_handshake_says_who_we_are_and_whom_we_trust() {
    let daemon = Daemon::start();
    for version in VERSIONS {
        let client = daemon.client_at(version);
        assert_eq!(client.protocol().version, version);
        assert_eq!(client.server_version(), Version::NEWEST);
        let name = version.minor() >= 33;
        let ours = concat!("2.34.8+understory-", env!("CARGO_PKG_VERSION"));
        assert_eq!(client.daemon_version(), name.then_some(ours), "{version}");
        let trust = if version.minor() >= 35 {
            Trust::Trusted
        } else {
            Trust::Unknown
        };
        assert_eq!(client.trust(), trust, "{version}");
    }
    let untrusted = Daemon::untrusted();
    assert_eq!(untrusted.client().trust(), Trust::NotTrusted);
}

#[test]
fn queries_answer_at_every_version() {
    let daemon = Daemon::start();
    let (a, b) = {
        let mut client = daemon.client();
        let a = add(&mut client, "a", &[]);
        let b = add(&mut client, "b", &[&a.path, &path("b")]);
        (a, b)
    };
    let unknown = path("unknown");
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        assert!(client.is_valid_path(&a.path).unwrap());
        assert!(!client.is_valid_path(&unknown).unwrap());
        assert_eq!(client.query_path_info(&a.path).unwrap().unwrap(), a);
        assert_eq!(
            client.query_path_info(&b.path).unwrap().unwrap(),
            b,
            "self reference and time are kept"
        );
        assert_eq!(client.query_path_info(&unknown).unwrap(), None);
        let some = vec![b.path.clone(), unknown.clone(), a.path.clone()];
        assert_eq!(
            client.query_valid_paths(some.clone()).unwrap(),
            set(&[&a.path, &b.path])
        );
        assert_eq!(
            client.query_all_valid_paths().unwrap(),
            set(&[&a.path, &b.path])
        );
        assert_eq!(client.query_referrers(&a.path).unwrap(), set(&[&b.path]));
        assert_eq!(client.query_referrers(&b.path).unwrap(), set(&[&b.path]));
        assert_eq!(client.query_referrers(&unknown).unwrap(), set(&[]));
        assert_eq!(
            client
                .paths(&Request::QueryValidDerivers(a.path.clone()))
                .unwrap(),
            set(&[])
        );
        assert_eq!(
            client
                .query_path_from_hash_part(a.path.hash_part())
                .unwrap(),
            Some(a.path.clone())
        );
        assert_eq!(
            client
                .query_path_from_hash_part(unknown.hash_part())
                .unwrap(),
            None
        );
        assert_eq!(
            client
                .paths(&Request::QuerySubstitutablePaths(some))
                .unwrap(),
            set(&[])
        );
        let infos = Request::QuerySubstitutablePathInfos(BTreeMap::from([(a.path.clone(), a.ca)]));
        assert_eq!(client.query_substitutable_path_infos(&infos).unwrap(), []);
        let mut archive = Vec::new();
        client.nar_from_path(&b.path, &mut archive).unwrap();
        assert_eq!(archive, tree_nar("b"));
        assert_eq!(
            server_error(client.nar_from_path(&unknown, &mut Vec::new())),
            format!("path '{}' is not valid", full(&unknown)),
        );
        let missing = Request::QueryMissing(vec![
            DerivedPath::Opaque(a.path.clone()),
            DerivedPath::Opaque(unknown.clone()),
        ]);
        assert_eq!(
            client.query_missing(&missing).unwrap(),
            MissingInfo {
                unknown: set(&[&unknown]),
                ..MissingInfo::default()
            }
        );
        assert_eq!(client.number(&Request::SyncWithGC).unwrap(), 1);
        assert_eq!(client.number(&Request::OptimiseStore).unwrap(), 1);
        assert_eq!(
            client
                .number(&Request::VerifyStore {
                    check_contents: true,
                    repair: false
                })
                .unwrap(),
            0
        );
        client.set_options(SetOptions::default()).unwrap();
    }
}

#[test]
fn obsolete_queries_still_have_a_meaning() {
    let daemon = Daemon::start();
    let mut client = daemon.client_at(Version::OLDEST);
    let a = add(&mut client, "a", &[]);
    let b = add(&mut client, "b", &[&a.path]);
    assert_eq!(
        client
            .number(&Request::HasSubstitutes(a.path.clone()))
            .unwrap(),
        0
    );
    assert_eq!(
        client
            .text(&Request::QueryPathHash(a.path.clone()))
            .unwrap(),
        a.nar_hash.to_base16()
    );
    assert_eq!(
        client
            .paths(&Request::QueryReferences(b.path.clone()))
            .unwrap(),
        set(&[&a.path])
    );
    assert_eq!(
        client.path(&Request::QueryDeriver(b.path.clone())).unwrap(),
        None
    );
    assert_eq!(
        client
            .number(&Request::QuerySubstitutablePathInfo(a.path.clone()))
            .unwrap(),
        0
    );
    let unknown = path("unknown");
    for request in [
        Request::QueryPathHash(unknown.clone()),
        Request::QueryReferences(unknown.clone()),
        Request::QueryDeriver(unknown.clone()),
        Request::QueryDerivationOutputs(unknown.clone()),
    ] {
        assert_eq!(
            server_error(client.number(&request)),
            format!("path '{}' is not valid", full(&unknown))
        );
    }
    let text = Request::AddTextToStore {
        name: "note".to_owned(),
        text: b"hello\n".to_vec(),
        references: set(&[&a.path]),
    };
    let note = client.path(&text).unwrap().unwrap();
    let note = client.query_path_info(&note).unwrap().unwrap();
    assert_eq!(note.references, set(&[&a.path]));
    assert!(note.ca.unwrap().to_string().starts_with("text:sha256:"));
    let refused = server_error(client.number(&Request::ExportPath {
        path: a.path.clone(),
        sign: 0,
    }));
    assert_eq!(
        refused,
        "this daemon has no operation for exports\nhint: use `nix copy`, or a Nix client since 2.4"
    );
    assert_eq!(server_error(client.number(&Request::ImportPaths)), refused);
    assert!(client.is_valid_path(&a.path).unwrap());
}

#[test]
fn hash_parts_are_32_characters() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for wrong in ["", "abc", &"0".repeat(20), &"0".repeat(33)] {
        assert_eq!(
            server_error(client.query_path_from_hash_part(wrong)),
            "invalid hash part"
        );
    }
    assert_eq!(
        client.query_path_from_hash_part(&"0".repeat(32)).unwrap(),
        None
    );
}

#[test]
fn an_empty_content_address_is_not_the_end_of_the_stream() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]);
    assert_eq!(a.ca, None);
    // Twice: the second reply would be out of step if `ca` had been left out.
    for _ in 0..2 {
        assert_eq!(client.query_path_info(&a.path).unwrap().unwrap(), a);
    }
}

#[test]
fn a_path_outside_of_the_store_is_an_error_and_the_connection_goes_on() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let a = add(&mut client, "a", &[]);
    for wrong in [
        "/foo",
        "",
        "/nix/store",
        "/nix/store/abc",
        &format!("{}/bin", full(&a.path)),
    ] {
        let mut request = Vec::new();
        request.extend(1_u64.to_le_bytes());
        request.extend((wrong.len() as u64).to_le_bytes());
        request.extend(wrong.as_bytes());
        request.resize(request.len().next_multiple_of(8), 0);
        let message = server_error(client.send_raw(&request));
        assert!(
            message.contains(wrong.rsplit('/').next().unwrap()) && message.starts_with("path '"),
            "{message}"
        );
        assert!(client.is_valid_path(&a.path).unwrap());
    }
}

#[test]
fn unknown_operations_are_named_and_end_the_connection() {
    let daemon = Daemon::start();
    for number in [0_u64, 2, 48, 999, 1000, u64::MAX] {
        let mut client = daemon.client();
        assert_eq!(
            server_error(client.send_raw(&number.to_le_bytes())),
            format!("invalid operation {number}")
        );
        assert!(client.number(&Request::SyncWithGC).is_err());
    }
    // Operations that a version does not have are unknown to it.
    let mut client = daemon.client_at(Version::new(1, 21));
    let request = Request::QueryDerivationOutputMap(path("a.drv"));
    assert_eq!(
        server_error(client.number(&request)),
        "invalid operation 41"
    );
}

#[test]
fn realisations_in_both_forms() {
    let daemon = Daemon::start();
    let out = add(&mut daemon.client(), "out", &[]);
    let id = DrvOutput::Hash(format!("sha256:{}!out", "ab".repeat(32)));
    let realisation = WireRealisation {
        id: id.clone(),
        out_path: out.path.clone(),
        signatures: BTreeSet::from(["key:c2ln".to_owned()]),
    };
    let mut client = daemon.client();
    assert_eq!(client.query_realisation(&id).unwrap(), []);
    client.register_drv_output(&realisation).unwrap();
    assert_eq!(
        client.query_realisation(&id).unwrap(),
        std::slice::from_ref(&realisation)
    );
    // Before 1.31 only the path is told.
    let mut old = daemon.client_at(Version::new(1, 30));
    assert_eq!(
        old.query_realisation(&id).unwrap(),
        [WireRealisation {
            signatures: BTreeSet::new(),
            ..realisation
        }]
    );
    let mut old = daemon.client_at(Version::new(1, 27));
    let other = DrvOutput::Hash(format!("sha256:{}!dev", "cd".repeat(32)));
    old.register_drv_output(&WireRealisation {
        id: other.clone(),
        out_path: out.path.clone(),
        signatures: BTreeSet::new(),
    })
    .unwrap();
    assert_eq!(old.query_realisation(&other).unwrap()[0].out_path, out.path);

    let mut new = daemon.client_with_features();
    let features = new.protocol().features;
    assert!(features.realisation_with_path && features.delete_dead_specific_referrers);
    let id = DrvOutput::Path {
        drv: path("x.drv"),
        output: "out".to_owned(),
    };
    assert_eq!(new.query_realisation(&id).unwrap(), []);
    let realisation = WireRealisation {
        id: id.clone(),
        out_path: out.path,
        signatures: BTreeSet::new(),
    };
    new.register_drv_output(&realisation).unwrap();
    assert_eq!(
        new.query_realisation(&id).unwrap(),
        std::slice::from_ref(&realisation)
    );

    let untrusted = Daemon::untrusted();
    let mut client = untrusted.client_with_features();
    assert_eq!(
        server_error(client.register_drv_output(&realisation)),
        "registering a derivation output is not allowed because you are not in 'trusted-users'"
    );
    assert_eq!(client.query_realisation(&id).unwrap(), []);
}

#[test]
fn nothing_is_built_and_it_is_said_so() {
    let daemon = Daemon::start();
    let there = add(&mut daemon.client(), "there", &[]).path;
    let drv = path("x.drv");
    let unknown = path("unknown");
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        let required = |path: &StorePath| {
            format!(
                "path '{}' is required, but there is no substituter that can build it",
                full(path)
            )
        };
        assert_eq!(
            client.number(&Request::EnsurePath(there.clone())).unwrap(),
            1
        );
        assert_eq!(
            server_error(client.number(&Request::EnsurePath(unknown.clone()))),
            required(&unknown)
        );
        let build = |paths: &[DerivedPath], mode| Request::BuildPaths {
            paths: paths.to_vec(),
            mode,
        };
        let opaque = DerivedPath::Opaque(there.clone());
        let missing = DerivedPath::Opaque(unknown.clone());
        let built = DerivedPath::Built {
            drv: drv.clone(),
            through: Vec::new(),
            outputs: OutputsSpec::All,
        };
        assert_eq!(
            client
                .number(&build(std::slice::from_ref(&opaque), BuildMode::Normal))
                .unwrap(),
            1
        );
        assert_eq!(
            server_error(client.number(&build(
                &[opaque.clone(), missing.clone()],
                BuildMode::Normal
            ))),
            required(&unknown)
        );
        assert_eq!(
            server_error(client.number(&build(std::slice::from_ref(&built), BuildMode::Normal))),
            required(&drv)
        );
        assert!(server_error(client.number(&build(std::slice::from_ref(&opaque), BuildMode::Check))).starts_with(
            "this store does not build, so it can neither repair nor check by building again\nhint: "
        ));
        if version.minor() >= 34 {
            let request = Request::BuildPathsWithResults {
                paths: vec![opaque, missing, built],
                mode: BuildMode::Normal,
            };
            let results = client.build_paths_with_results(&request).unwrap();
            let statuses: Vec<BuildStatus> = results.iter().map(|r| r.result.status).collect();
            assert_eq!(
                statuses,
                [
                    BuildStatus::AlreadyValid,
                    BuildStatus::NoSubstituters,
                    BuildStatus::NoSubstituters
                ]
            );
            assert_eq!(
                String::from_utf8_lossy(&results[1].result.error_message),
                required(&unknown)
            );
        }
        let derivation = |out: &StorePath| Request::BuildDerivation {
            drv: drv.clone(),
            derivation: Box::new(BasicDerivation {
                outputs: BTreeMap::from([(
                    "out".to_owned(),
                    DerivationOutput {
                        path: full(out),
                        ..DerivationOutput::default()
                    },
                )]),
                ..BasicDerivation::default()
            }),
            mode: BuildMode::Normal,
        };
        let result = client.build_derivation(&derivation(&there)).unwrap();
        assert_eq!(result.status, BuildStatus::AlreadyValid);
        if version.minor() >= 28 {
            assert_eq!(result.built_outputs["out"].out_path, there);
        }
        assert_eq!(
            server_error(client.build_derivation(&derivation(&unknown))),
            format!(
                "cannot build '{}': this store keeps and serves paths, it does not build\nhint: build in a store \
                 above this one (local-overlay) or in another one, and copy the outputs here",
                full(&drv)
            )
        );
        assert!(client.is_valid_path(&there).unwrap());
    }
}

/// Adds an input-addressed derivation and returns its path and its output's.
fn add_derivation(
    client: &mut Client,
    name: &str,
    inputs: &[&StorePath],
) -> (StorePath, StorePath) {
    let dir = StoreDir::default();
    let placeholder = path(name);
    let mut derivation = Derivation {
        name: StorePathName::new(name).unwrap(),
        outputs: BTreeMap::from([(
            "out".to_owned(),
            derivation::DerivationOutput::InputAddressed(placeholder.clone()),
        )]),
        input_derivations: inputs
            .iter()
            .map(|drv| {
                let outputs = BTreeSet::from(["out".to_owned()]);
                (
                    (*drv).clone(),
                    derivation::InputOutputs {
                        outputs,
                        ..Default::default()
                    },
                )
            })
            .collect(),
        input_sources: BTreeSet::new(),
        platform: b"x86_64-linux".to_vec(),
        builder: b"/bin/sh".to_vec(),
        args: Vec::new(),
        env: BTreeMap::from([(b"out".to_vec(), full(&placeholder).into_bytes())]),
    };
    let load = |drv: &StorePath| {
        let mut archive = Vec::new();
        client.nar_from_path(drv, &mut archive).unwrap();
        // A NAR of a file: 96 bytes before its contents' length.
        let at = archive.windows(8).position(|w| w == b"contents").unwrap() + 8;
        let size = u64::from_le_bytes(archive[at..at + 8].try_into().unwrap()) as usize;
        let name = StorePathName::new(drv.name().strip_suffix(".drv").unwrap()).unwrap();
        Ok(Derivation::parse(&dir, &name, &archive[at + 8..at + 8 + size]).unwrap())
    };
    let out = derivation::HashModulo::new(dir.clone(), load)
        .output_paths(&derivation)
        .unwrap();
    let out = out["out"].clone().unwrap();
    derivation.outputs.insert(
        "out".to_owned(),
        derivation::DerivationOutput::InputAddressed(out.clone()),
    );
    derivation
        .env
        .insert(b"out".to_vec(), full(&out).into_bytes());
    let text = derivation.print(&dir).unwrap();
    let references = inputs.iter().map(|drv| (*drv).clone()).collect();
    let added = client.add_to_store(
        &format!("{name}.drv"),
        "text:sha256",
        references,
        &mut &text[..],
    );
    (added.unwrap().path, out)
}

#[test]
fn derivations_tell_their_outputs_and_what_is_missing() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (done, out) = add_derivation(&mut client, "done", &[]);
    let archive = tree_nar("done");
    client
        .add_to_store_nar(&info(&out, &archive, &[]), &mut &archive[..], false, true)
        .unwrap();
    let (todo, _) = add_derivation(&mut client, "todo", &[&done]);
    let (above, _) = add_derivation(&mut client, "above", &[&todo]);
    let mut client = daemon.client();
    let outputs = client.query_derivation_output_map(&done).unwrap();
    assert_eq!(
        outputs,
        BTreeMap::from([("out".to_owned(), Some(out.clone()))])
    );
    let none = path("none.drv");
    assert_eq!(
        server_error(client.query_derivation_output_map(&none)),
        format!("path '{}' is not valid", full(&none))
    );
    assert_eq!(
        client
            .paths(&Request::QueryValidDerivers(out.clone()))
            .unwrap(),
        set(&[&done])
    );
    assert_eq!(
        client
            .paths(&Request::QueryDerivationOutputs(done.clone()))
            .unwrap(),
        set(&[&out])
    );
    assert_eq!(
        client
            .texts(&Request::QueryDerivationOutputNames(done.clone()))
            .unwrap(),
        BTreeSet::from(["out".to_owned()])
    );
    let all = |drv: &StorePath| DerivedPath::Built {
        drv: drv.clone(),
        through: Vec::new(),
        outputs: OutputsSpec::All,
    };
    let missing = client
        .query_missing(&Request::QueryMissing(vec![
            all(&done),
            all(&above),
            all(&none),
        ]))
        .unwrap();
    assert_eq!(
        missing.will_build,
        set(&[&above, &todo]),
        "what it needs is to be built, too"
    );
    assert_eq!(missing.unknown, set(&[&none]));
    let request = Request::BuildPathsWithResults {
        paths: vec![
            all(&done),
            all(&todo),
            DerivedPath::Built {
                drv: done.clone(),
                through: Vec::new(),
                outputs: OutputsSpec::Names(BTreeSet::from(["dev".to_owned()])),
            },
        ],
        mode: BuildMode::Normal,
    };
    let mut featured = daemon.client_with_features();
    for client in [&mut client, &mut featured] {
        let results = client.build_paths_with_results(&request).unwrap();
        assert_eq!(results[0].result.status, BuildStatus::AlreadyValid);
        assert_eq!(results[0].result.built_outputs["out"].out_path, out);
        assert_eq!(results[1].result.status, BuildStatus::MiscFailure);
        assert_eq!(
            String::from_utf8_lossy(&results[2].result.error_message),
            format!(
                "derivation '{}' does not have wanted outputs 'dev'",
                full(&done)
            )
        );
    }
    // Before 1.30 a bare derivation means its outputs.
    let mut old = daemon.client_at(Version::new(1, 25));
    assert_eq!(
        old.number(&Request::BuildPaths {
            paths: vec![all(&done)],
            mode: BuildMode::Normal
        })
        .unwrap(),
        1
    );
}
