//! The worker protocol against what real Nix says (`tests/worker/wire`, made by
//! `tests/worker/capture` with Nix 2.34.8 and 2.26.3), and against itself.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Cursor, Read, Write};
use std::path::Path;
use understory_nix::content_address::ContentAddressMethod;
use understory_nix::wire::{Budget, FramedReader, FramedWriter, WireError, WireRead, WireWrite};
use understory_nix::worker::{
    ActivityType, BasicDerivation, Body, BuildMode, BuildResult, BuildStatus, CLIENT_MAGIC,
    Decoder, DerivationOutput, DerivedPath, DrvOutput, Encoder, ErrorMessage, Features, Field,
    GcActionKind, GcRequest, KeyedBuildResult, LogMessage, MissingInfo, Op, OutputsSpec, Protocol,
    Request, ResultType, SERVER_MAGIC, SetOptions, SubstitutablePathInfo, Version, WireRealisation,
    read_path_info, read_unkeyed_path_info, write_path_info, write_unkeyed_path_info,
};
use understory_nix::{
    ContentAddress, Hash, HashAlgorithm, NarHash, PathInfo, Signature, StoreDir, StorePath,
    StorePathHash, StorePathName,
};

type Bytes<'a> = Cursor<&'a [u8]>;

fn decoder(bytes: &[u8], protocol: Protocol) -> Decoder<Bytes<'_>> {
    Decoder::new(Cursor::new(bytes), StoreDir::default(), protocol, None)
}

fn encoded(
    protocol: Protocol,
    write: impl FnOnce(&mut Encoder<Vec<u8>>) -> std::io::Result<()>,
) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new(), StoreDir::default(), protocol);
    write(&mut encoder).unwrap();
    encoder.into_inner()
}

/// Reads with `read`, writes the value with `write`, and expects the same bytes.
fn same<'a, T>(
    d: &mut Decoder<Bytes<'a>>,
    read: impl FnOnce(&mut Decoder<Bytes<'a>>) -> Result<T, WireError>,
    write: impl FnOnce(&T, &mut Encoder<Vec<u8>>) -> std::io::Result<()>,
) -> T {
    let start = d.reader().position() as usize;
    let value = d.message(read).unwrap().unwrap();
    let end = d.reader().position() as usize;
    let protocol = d.protocol();
    let found = encoded(protocol, |e| write(&value, e));
    assert_eq!(found, d.reader().get_ref()[start..end]);
    value
}

// -- what real Nix says

/// Reads a client's side of a connection; returns its requests.
fn read_client(d: &mut Decoder<Bytes<'_>>) -> Vec<Request> {
    assert_eq!(d.u64().unwrap(), CLIENT_MAGIC);
    assert_eq!(Version::from_wire(d.u64().unwrap()), Some(Version::NEWEST));
    assert_eq!(d.count().unwrap(), 0, "no features before 2.35");
    assert!(!d.bool().unwrap());
    assert!(!d.bool().unwrap());
    let mut requests = Vec::new();
    while !d.at_end().unwrap() {
        let request = same(
            d,
            |d| {
                let op = Op::from_wire(d.u64()?).unwrap();
                Request::read(op, d)
            },
            Request::write,
        );
        match request.op().body(d.protocol()) {
            Body::None => {}
            Body::Framed => {
                FramedReader::new(d.reader()).drain(1 << 20).unwrap();
            }
            other => panic!("{other:?}"),
        }
        requests.push(request);
    }
    requests
}

/// Reads the log up to its end; false if that is an error.
fn read_log(d: &mut Decoder<Bytes<'_>>) -> bool {
    loop {
        match same(d, LogMessage::read, LogMessage::write) {
            LogMessage::Last => return true,
            LogMessage::Error(_) => return false,
            _ => {}
        }
    }
}

fn read_reply(d: &mut Decoder<Bytes<'_>>, request: &Request) {
    match request {
        Request::SetOptions(_)
        | Request::AddToStoreNar { .. }
        | Request::AddMultipleToStore { .. } => {}
        Request::QueryPathInfo(path) => {
            if d.bool().unwrap() {
                same(
                    d,
                    |d| read_unkeyed_path_info(d, path.clone()),
                    |v, e| write_unkeyed_path_info(e, v),
                );
            }
        }
        Request::AddToStore { .. } => {
            same(d, read_path_info, |v, e| write_path_info(e, v));
        }
        Request::QueryMissing(_) => {
            same(d, MissingInfo::read, MissingInfo::write);
        }
        Request::BuildPathsWithResults { .. } => {
            same(
                d,
                |d| d.list(KeyedBuildResult::read),
                |v, e| {
                    e.u64(v.len() as u64)?;
                    v.iter().try_for_each(|result| result.write(e))
                },
            );
        }
        Request::QueryReferrers(_) | Request::QueryValidPaths { .. } => {
            same(d, Decoder::store_path_set, |v, e| e.store_paths(v));
        }
        Request::CollectGarbage(_) => {
            same(
                d,
                |d| Ok((d.store_path_set()?, d.u64()?, d.u64()?)),
                |(paths, freed, zero), e| {
                    assert_eq!(*zero, 0);
                    e.store_paths(paths)?;
                    e.u64(*freed)?;
                    e.u64(0)
                },
            );
        }
        Request::FindRoots => {
            d.message(|d| d.list(|d| Ok((d.bytes(4096)?, d.store_path()?))))
                .unwrap()
                .unwrap();
        }
        Request::QueryDerivationOutputMap(_) => {
            d.message(|d| d.list(|d| Ok((d.short()?, d.opt_store_path()?))))
                .unwrap()
                .unwrap();
        }
        Request::QueryRealisation(_) => {
            same(
                d,
                |d| d.list(WireRealisation::read),
                |v, e| {
                    e.u64(v.len() as u64)?;
                    v.iter().try_for_each(|realisation| realisation.write(e))
                },
            );
        }
        Request::IsValidPath(_)
        | Request::AddTempRoot(_)
        | Request::EnsurePath(_)
        | Request::BuildPaths { .. }
        | Request::VerifyStore { .. }
        | Request::AddSignatures { .. } => {
            assert!(d.u64().unwrap() <= 1);
        }
        other => panic!("the reply to {other:?} is not known here"),
    }
}

#[test]
fn real_connections_are_understood_to_the_last_byte() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/worker/wire");
    let mut names: Vec<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.retain(|name| name.extension().is_some_and(|e| e == "client"));
    names.sort();
    assert_eq!(names.len(), 30);
    let mut seen = BTreeSet::new();
    for name in names {
        println!("{}", name.display());
        let protocol = Protocol::plain(Version::NEWEST);
        let client = std::fs::read(&name).unwrap();
        let requests = read_client(&mut decoder(&client, protocol));
        assert!(matches!(requests[0], Request::SetOptions(_)));
        let server = std::fs::read(name.with_extension("server")).unwrap();
        let d = &mut decoder(&server, protocol);
        assert_eq!(d.u64().unwrap(), SERVER_MAGIC);
        assert_eq!(Version::from_wire(d.u64().unwrap()), Some(Version::NEWEST));
        assert_eq!(d.count().unwrap(), 0);
        assert!(d.short().unwrap().starts_with("2."));
        assert_eq!(d.u64().unwrap(), 1, "root is trusted");
        assert!(read_log(d));
        for request in &requests {
            seen.insert(request.op().name());
            if read_log(d) {
                read_reply(d, request);
            }
        }
        assert!(d.at_end().unwrap());
    }
    // What is worth having recorded.
    for name in [
        "AddMultipleToStore",
        "AddToStoreNar",
        "AddToStore",
        "BuildPathsWithResults",
        "CollectGarbage",
    ] {
        assert!(seen.contains(name), "{name} is not among {seen:?}");
    }
}

#[test]
fn an_error_is_laid_out_as_nix_does() {
    let error = LogMessage::Error(ErrorMessage::new("invalid operation 999"));
    let mut expected = Vec::new();
    for part in [
        &0x6378_7470_u64.to_le_bytes()[..],
        &5_u64.to_le_bytes(),
        b"Error\0\0\0",
        &[0; 8],
    ] {
        expected.extend(part);
    }
    expected.extend([&5_u64.to_le_bytes()[..], b"Error\0\0\0"].concat());
    expected.extend(
        [
            &21_u64.to_le_bytes()[..],
            b"invalid operation 999\0\0\0",
            &[0; 16],
        ]
        .concat(),
    );
    assert_eq!(
        encoded(Protocol::plain(Version::NEWEST), |e| error.write(e)),
        expected
    );
    let old = encoded(Protocol::plain(Version::new(1, 25)), |e| error.write(e));
    let message = [
        &21_u64.to_le_bytes()[..],
        b"invalid operation 999\0\0\0",
        &1_u64.to_le_bytes(),
    ]
    .concat();
    assert_eq!(old, [&0x6378_7470_u64.to_le_bytes()[..], &message].concat());
}

// -- limits

#[test]
fn nothing_is_allocated_from_a_length() {
    for (max, length) in [(10, 11_u64), (1 << 26, u64::MAX), (1 << 26, 1 << 60)] {
        let bytes = length.to_le_bytes();
        let error = (&bytes[..]).read_bytes(max).unwrap_err();
        assert!(matches!(error, WireError::TooLong { .. }), "{error}");
    }
    // A length that is allowed, and nothing behind it.
    let error = (&(60_u64 << 20).to_le_bytes()[..])
        .read_bytes(64 << 20)
        .unwrap_err();
    assert!(error.is_disconnect());
    let mut d = decoder(&[0xff; 8], Protocol::plain(Version::NEWEST));
    assert_eq!(
        d.store_paths().unwrap_err().to_string(),
        "list is too long: expected at most 16777216, found 18446744073709551615"
    );
}

#[test]
fn padding_must_be_zero() {
    let bytes = [&3_u64.to_le_bytes()[..], b"abc\0\0\0\0\x01"].concat();
    assert!(matches!(
        (&bytes[..]).read_bytes(100),
        Err(WireError::Padding)
    ));
    let protocol = Protocol::plain(Version::NEWEST);
    assert!(matches!(
        decoder(&bytes, protocol).bytes(100),
        Err(WireError::Padding)
    ));
    assert!(matches!(
        decoder(&bytes, protocol).store_path(),
        Err(WireError::Padding)
    ));
}

#[test]
fn integers_are_as_wide_as_nix_has_them() {
    let big = (1_u64 << 32).to_le_bytes();
    assert_eq!(
        (&big[..]).read_u32().unwrap_err().to_string(),
        "serialised integer 4294967296 is too large"
    );
    let d = &mut decoder(&big, Protocol::plain(Version::NEWEST));
    assert_eq!(
        d.u8().unwrap_err().to_string(),
        "serialised integer 4294967296 is too large"
    );
    assert!((&2_u64.to_le_bytes()[..]).read_bool().unwrap());
}

#[test]
fn a_message_that_takes_too_much_is_stopped_and_gives_back() {
    let budget = Budget::new(1 << 20);
    let item = encoded(Protocol::plain(Version::NEWEST), |e| e.bytes(vec![1; 4000]));
    let mut bytes = 1000_u64.to_le_bytes().to_vec();
    for _ in 0..1000 {
        bytes.extend(&item);
    }
    let protocol = Protocol::plain(Version::NEWEST);
    let mut d = Decoder::new(
        &bytes[..],
        StoreDir::default(),
        protocol,
        Some(budget.clone()),
    );
    let error = d.list(|d| d.bytes(4096)).unwrap_err();
    assert!(
        matches!(error, WireError::Budget { max: 0x10_0000 }),
        "{error}"
    );
    assert!(budget.used() > 0);
    d.release();
    assert_eq!(budget.used(), 0);
    assert!(budget.take(1 << 20));
    assert!(!budget.take(1));
}

#[test]
fn an_argument_that_is_not_valid_leaves_the_stream_in_step() {
    let protocol = Protocol::plain(Version::NEWEST);
    let bytes = encoded(protocol, |e| {
        e.bytes("/somewhere/else")?;
        e.strings([
            "/nix/store/x",
            "/nix/store/00000000000000000000000000000000-fine",
        ])?;
        e.u64(42)
    });
    let mut d = decoder(&bytes, protocol);
    let read = d
        .message(|d| Ok((d.store_path()?, d.store_path_set()?)))
        .unwrap();
    let invalid = read.unwrap_err();
    assert!(
        invalid.0.starts_with("path '/somewhere/else' "),
        "{invalid}"
    );
    assert_eq!(d.u64().unwrap(), 42);
}

#[test]
fn frames_are_bounded_and_end_where_they_end() {
    let mut bytes = Vec::new();
    let mut writer = FramedWriter::new(&mut bytes);
    writer.write_all(b"hello ").unwrap();
    writer.write_all(b"").unwrap();
    writer.write_all(b"world").unwrap();
    writer.finish().unwrap();
    bytes.write_u64(7).unwrap();
    let mut stream = &bytes[..];
    let mut framed = FramedReader::new(&mut stream);
    let mut text = String::new();
    framed.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello world");
    assert!(framed.ended());
    assert!(framed.fill_buf().unwrap().is_empty());
    assert_eq!(stream.read_u64().unwrap(), 7);

    let mut framed = FramedReader::new(&bytes[..]);
    assert_eq!(framed.drain(100).unwrap(), 11);
    let error = FramedReader::new(&bytes[..]).drain(10).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rest of a refused upload is too long: expected at most 10, found 11"
    );
    // A length that cannot be: the end is never found, and nothing more is read.
    let bytes = [u64::MAX.to_le_bytes(), [0; 8]].concat();
    let mut framed = FramedReader::new(&bytes[..]);
    assert!(framed.read(&mut [0; 8]).is_err());
    assert!(framed.drain(100).is_err());
}

// -- everything that can be written is read again

fn store_path() -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), "[a-zA-Z0-9+_?=-][a-zA-Z0-9+_?=.-]{0,40}").prop_map(|(hash, name)| {
        StorePath::from_parts(StorePathHash(hash), &StorePathName::new(&name).unwrap())
    })
}

fn store_paths() -> impl Strategy<Value = BTreeSet<StorePath>> {
    btree_set(store_path(), 0..6)
}

fn text() -> impl Strategy<Value = String> {
    "[ -~äß]{0,40}"
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..50)
}

fn output_name() -> impl Strategy<Value = String> {
    "[a-z]{1,8}"
}

fn signatures() -> impl Strategy<Value = BTreeSet<Signature>> {
    btree_set("[a-z]{1,9}-1:[A-Za-z0-9+/]{85}[AQgw]==", 0..3).prop_map(|all| {
        all.iter()
            .map(|text| Signature::parse(text).unwrap())
            .collect()
    })
}

fn content_address() -> impl Strategy<Value = ContentAddress> {
    let method = prop_oneof![
        Just(ContentAddressMethod::Text),
        Just(ContentAddressMethod::Flat),
        Just(ContentAddressMethod::Nar)
    ];
    (method, any::<[u8; 32]>()).prop_map(|(method, digest)| ContentAddress {
        method,
        hash: Hash::new(HashAlgorithm::Sha256, &digest).unwrap(),
    })
}

fn path_info() -> impl Strategy<Value = PathInfo> {
    (
        (store_path(), any::<[u8; 32]>(), any::<u64>(), store_paths()),
        (
            proptest::option::of(store_path()),
            0..u64::MAX >> 1,
            any::<bool>(),
            signatures(),
        ),
        proptest::option::of(content_address()),
    )
        .prop_map(|(a, b, ca)| PathInfo {
            path: a.0,
            nar_hash: NarHash(a.1),
            nar_size: a.2,
            references: a.3,
            deriver: b.0,
            registration_time: b.1,
            ultimate: b.2,
            signatures: b.3,
            ca,
        })
}

fn derived_path() -> impl Strategy<Value = DerivedPath> {
    let outputs = prop_oneof![
        Just(OutputsSpec::All),
        btree_set(output_name(), 1..4).prop_map(OutputsSpec::Names)
    ];
    prop_oneof![
        store_path().prop_map(DerivedPath::Opaque),
        (store_path(), vec(output_name(), 0..3), outputs).prop_map(|(drv, through, outputs)| {
            DerivedPath::Built {
                drv,
                through,
                outputs,
            }
        })
    ]
}

fn legacy_realisation() -> impl Strategy<Value = WireRealisation> {
    (
        "[0-9a-f]{64}",
        output_name(),
        store_path(),
        btree_set("[ -~]{0,20}", 0..3),
    )
        .prop_map(|(hash, output, out_path, signatures)| WireRealisation {
            id: DrvOutput::Hash(format!("sha256:{hash}!{output}")),
            out_path,
            signatures,
        })
}

fn path_realisation() -> impl Strategy<Value = WireRealisation> {
    (
        store_path(),
        output_name(),
        store_path(),
        btree_set("[ -~]{0,20}", 0..3),
    )
        .prop_map(|(drv, output, out_path, signatures)| WireRealisation {
            id: DrvOutput::Path { drv, output },
            out_path,
            signatures,
        })
}

fn derivation() -> impl Strategy<Value = BasicDerivation> {
    let output =
        ("[ -~]{0,30}", "[a-z0-9:]{0,9}", "[0-9a-f]{0,64}").prop_map(|(path, hash_algo, hash)| {
            DerivationOutput {
                path,
                hash_algo,
                hash,
            }
        });
    (
        btree_map(output_name(), output, 0..3),
        store_paths(),
        bytes(),
        bytes(),
        vec(bytes(), 0..3),
        btree_map(bytes(), bytes(), 0..4),
    )
        .prop_map(
            |(outputs, input_sources, platform, builder, arguments, environment)| BasicDerivation {
                outputs,
                input_sources,
                platform,
                builder,
                arguments,
                environment,
            },
        )
}

fn build_mode() -> impl Strategy<Value = BuildMode> {
    prop_oneof![
        Just(BuildMode::Normal),
        Just(BuildMode::Repair),
        Just(BuildMode::Check)
    ]
}

fn options() -> impl Strategy<Value = SetOptions> {
    (
        any::<[u64; 8]>(),
        any::<[bool; 4]>(),
        btree_map(bytes(), bytes(), 0..4),
    )
        .prop_map(|(n, b, overrides)| SetOptions {
            keep_failed: b[0],
            keep_going: b[1],
            try_fallback: b[2],
            verbosity: n[0],
            max_build_jobs: n[1],
            max_silent_time: n[2],
            use_build_hook: n[3],
            build_verbosity: n[4],
            log_type: n[5],
            print_build_trace: n[6],
            build_cores: n[7],
            use_substitutes: b[3],
            overrides,
        })
}

fn gc_request() -> impl Strategy<Value = GcRequest> {
    (0..4_u64, store_paths(), any::<bool>(), any::<u64>()).prop_map(
        |(action, paths, ignore_liveness, freed_bytes_max)| {
            let action = GcActionKind::from_wire(action).unwrap();
            let whole = paths.is_empty() && action != GcActionKind::DeleteSpecific;
            GcRequest {
                action,
                paths: (!whole).then_some(paths),
                delete_referrers: false,
                ignore_liveness,
                freed_bytes_max,
            }
        },
    )
}

/// Requests that look the same in every version from 1.32 on, without features.
fn request() -> impl Strategy<Value = Request> {
    let one_path = store_path().prop_flat_map(|path| {
        proptest::sample::select(vec![
            Request::IsValidPath(path.clone()),
            Request::QueryPathInfo(path.clone()),
            Request::QueryReferrers(path.clone()),
            Request::QueryValidDerivers(path.clone()),
            Request::EnsurePath(path.clone()),
            Request::AddTempRoot(path.clone()),
            Request::NarFromPath(path.clone()),
            Request::QueryDerivationOutputMap(path.clone()),
            Request::AddBuildLog(path),
        ])
    });
    let many_paths = (vec(store_path(), 0..5), any::<bool>())
        .prop_map(|(paths, substitute)| Request::QueryValidPaths { paths, substitute });
    let queries = prop_oneof![
        one_path,
        many_paths,
        "[ -~]{0,40}".prop_map(Request::QueryPathFromHashPart),
        btree_map(store_path(), proptest::option::of(content_address()), 0..4)
            .prop_map(Request::QuerySubstitutablePathInfos),
        vec(derived_path(), 0..4).prop_map(Request::QueryMissing),
        legacy_realisation().prop_map(|realisation| Request::QueryRealisation(realisation.id)),
        Just(Request::QueryAllValidPaths),
        Just(Request::FindRoots),
    ];
    let changes = prop_oneof![
        legacy_realisation().prop_map(Request::RegisterDrvOutput),
        options().prop_map(|options| Request::SetOptions(Box::new(options))),
        gc_request().prop_map(Request::CollectGarbage),
        (path_info(), any::<bool>(), any::<bool>()).prop_map(|(info, repair, dont_check_sigs)| {
            Request::AddToStoreNar {
                info: Box::new(info),
                repair,
                dont_check_sigs,
            }
        }),
        (text(), text(), store_paths(), any::<bool>()).prop_map(
            |(name, method, references, repair)| {
                Request::AddToStore {
                    name,
                    method,
                    references,
                    repair,
                }
            }
        ),
        (text(), bytes(), store_paths()).prop_map(|(name, text, references)| {
            Request::AddTextToStore {
                name,
                text,
                references,
            }
        }),
        (store_path(), signatures())
            .prop_map(|(path, signatures)| Request::AddSignatures { path, signatures }),
        (store_path(), bytes()).prop_map(|(path, link)| Request::AddPermRoot { path, link }),
        bytes().prop_map(Request::AddIndirectRoot),
        (any::<bool>(), any::<bool>()).prop_map(|(check_contents, repair)| Request::VerifyStore {
            check_contents,
            repair
        }),
    ];
    let builds = prop_oneof![
        (vec(derived_path(), 0..4), build_mode())
            .prop_map(|(paths, mode)| Request::BuildPathsWithResults { paths, mode }),
        (store_path(), derivation(), build_mode()).prop_map(|(drv, derivation, mode)| {
            Request::BuildDerivation {
                drv,
                derivation: Box::new(derivation),
                mode,
            }
        }),
    ];
    prop_oneof![queries, changes, builds]
}

fn log_message() -> impl Strategy<Value = LogMessage> {
    let fields = || {
        vec(
            prop_oneof![
                any::<u64>().prop_map(Field::Int),
                bytes().prop_map(Field::Text)
            ],
            0..4,
        )
    };
    prop_oneof![
        Just(LogMessage::Last),
        (bytes(), vec(bytes(), 0..3)).prop_map(|(message, traces)| {
            LogMessage::Error(ErrorMessage {
                message,
                traces,
                exit_status: 1,
            })
        }),
        bytes().prop_map(LogMessage::Next),
        any::<u64>().prop_map(LogMessage::Read),
        bytes().prop_map(LogMessage::Write),
        (
            any::<u64>(),
            0..8_u64,
            100..130_u64,
            bytes(),
            fields(),
            any::<u64>()
        )
            .prop_map(|(id, level, activity, text, fields, parent)| {
                LogMessage::StartActivity {
                    id,
                    level,
                    activity: ActivityType::from_wire(activity),
                    text,
                    fields,
                    parent,
                }
            }),
        any::<u64>().prop_map(LogMessage::StopActivity),
        (any::<u64>(), 90..120_u64, fields()).prop_map(|(id, result, fields)| LogMessage::Result {
            id,
            result: ResultType::from_wire(result),
            fields,
        }),
    ]
}

fn build_result(realisation: BoxedStrategy<WireRealisation>) -> impl Strategy<Value = BuildResult> {
    (
        (0..15_u64, bytes(), any::<u32>(), any::<bool>()),
        (
            0..1_u64 << 40,
            0..1_u64 << 40,
            any::<Option<i64>>(),
            any::<Option<i64>>(),
        ),
        vec(realisation, 0..3),
    )
        .prop_map(|(a, b, outputs)| BuildResult {
            status: BuildStatus::from_wire(a.0).unwrap(),
            error_message: a.1,
            times_built: a.2,
            non_deterministic: a.3,
            start_time: b.0,
            stop_time: b.1,
            cpu_user_us: b.2,
            cpu_system_us: b.3,
            built_outputs: outputs
                .into_iter()
                .map(|r| (r.id.output().to_owned(), r))
                .collect(),
        })
}

fn with_features() -> Protocol {
    Protocol {
        version: Version::NEWEST,
        features: Features {
            realisation_with_path: true,
            delete_dead_specific_referrers: true,
        },
    }
}

proptest! {
    #[test]
    fn requests_survive(request in request(), minor in 32_u8..=38) {
        let protocol = Protocol::plain(Version::new(1, minor));
        let bytes = encoded(protocol, |e| request.write(e));
        let mut d = decoder(&bytes, protocol);
        let op = Op::from_wire(d.u64().unwrap()).unwrap();
        prop_assert_eq!(op, request.op());
        prop_assert_eq!(d.message(|d| Request::read(op, d)).unwrap().unwrap(), request);
        prop_assert!(d.at_end().unwrap());
    }

    #[test]
    fn requests_that_are_cut_off_are_disconnects(request in request(), cut in any::<prop::sample::Index>()) {
        let protocol = Protocol::plain(Version::NEWEST);
        let bytes = encoded(protocol, |e| request.write(e));
        let bytes = &bytes[..cut.index(bytes.len())];
        let mut d = decoder(bytes, protocol);
        let read = d.u64().and_then(|op| d.message(|d| Request::read(Op::from_wire(op).unwrap(), d)));
        prop_assert!(read.is_err_and(|error| error.is_disconnect()));
    }

    #[test]
    fn log_messages_survive(message in log_message()) {
        let protocol = Protocol::plain(Version::NEWEST);
        let bytes = encoded(protocol, |e| message.write(e));
        prop_assert_eq!(decoder(&bytes, protocol).message(LogMessage::read).unwrap().unwrap(), message);
    }

    #[test]
    fn path_infos_survive(info in path_info()) {
        let protocol = Protocol::plain(Version::NEWEST);
        let bytes = encoded(protocol, |e| write_path_info(e, &info));
        prop_assert_eq!(decoder(&bytes, protocol).message(read_path_info).unwrap().unwrap(), info);
    }

    #[test]
    fn build_results_survive(
        result in build_result(legacy_realisation().boxed()),
        featured in build_result(path_realisation().boxed()),
        path in derived_path(),
    ) {
        let protocol = Protocol::plain(Version::NEWEST);
        let keyed = KeyedBuildResult { path, result };
        let bytes = encoded(protocol, |e| keyed.write(e));
        prop_assert_eq!(decoder(&bytes, protocol).message(KeyedBuildResult::read).unwrap().unwrap(), keyed);
        // With the feature, the derivations of the keys are not told.
        let bytes = encoded(with_features(), |e| featured.write(e));
        let read = decoder(&bytes, with_features()).message(BuildResult::read).unwrap().unwrap();
        let paths = |r: &BuildResult| -> BTreeMap<String, StorePath> {
            r.built_outputs.iter().map(|(name, r)| (name.clone(), r.out_path.clone())).collect()
        };
        prop_assert_eq!(paths(&read), paths(&featured));
        prop_assert_eq!(read.status, featured.status);
    }

    #[test]
    fn features_change_two_requests(realisation in path_realisation(), request in gc_request(), referrers: bool) {
        let gc = GcRequest { delete_referrers: referrers && request.paths.is_some(), ..request };
        for request in [
            Request::RegisterDrvOutput(realisation.clone()),
            Request::QueryRealisation(realisation.id),
            Request::CollectGarbage(gc),
        ] {
            let bytes = encoded(with_features(), |e| request.write(e));
            let mut d = decoder(&bytes, with_features());
            let op = Op::from_wire(d.u64().unwrap()).unwrap();
            prop_assert_eq!(d.message(|d| Request::read(op, d)).unwrap().unwrap(), request);
        }
    }

    #[test]
    fn replies_survive(paths in store_paths(), deriver in proptest::option::of(store_path()), size: u64) {
        let protocol = Protocol::plain(Version::NEWEST);
        let missing = MissingInfo {
            will_build: paths.clone(),
            download_size: size,
            ..MissingInfo::default()
        };
        let bytes = encoded(protocol, |e| missing.write(e));
        prop_assert_eq!(decoder(&bytes, protocol).message(MissingInfo::read).unwrap().unwrap(), missing);
        let info = SubstitutablePathInfo { deriver, references: paths, download_size: size, nar_size: size };
        let bytes = encoded(protocol, |e| info.write(e));
        prop_assert_eq!(decoder(&bytes, protocol).message(SubstitutablePathInfo::read).unwrap().unwrap(), info);
    }

    #[test]
    fn derived_paths_survive_as_text(path in derived_path()) {
        let dir = StoreDir::default();
        prop_assert_eq!(DerivedPath::parse(&dir, &path.print(&dir), false).unwrap(), path);
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), op in proptest::sample::select(Op::ALL), minor in 21_u8..=38) {
        let protocol = Protocol::plain(Version::new(1, minor));
        drop(decoder(&bytes, protocol).message(|d| Request::read(op, d)));
        drop(decoder(&bytes, with_features()).message(|d| Request::read(op, d)));
        drop(decoder(&bytes, protocol).message(LogMessage::read));
        drop(decoder(&bytes, protocol).message(BuildResult::read));
    }
}
