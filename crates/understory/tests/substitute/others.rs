//! Sources that are no binary caches over plain HTTP: daemons, S3, HTTPS with a certificate authority of one's own.

use crate::server::{Reply, Server};
use crate::support::{Cache, Here, nar, noise, path, set};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use understory::daemon::{Listener, Server as Daemon, ServerOptions, Shutdown};
use understory::{Store, StoreOptions};
use understory_nix::{PublicKeys, StoreDir};

#[test]
fn another_daemon() {
    let cache = Cache::new(40);
    let [a, b] = ["a", "b"].map(|name| path(name, "daemon"));
    cache.add(&a, &noise(2_000_000, 1), &[]);
    cache.add(&b, b"b", &[&a]);
    let other = Here::new(&[&cache.url()], cache.keys());
    other.fetched(&[&b]);
    let socket = other.dir.path().join("run/socket");
    let listener = Listener::bind(&socket).unwrap();
    let store = other.dir.path().join("store");
    let store = Store::open(&store, &StoreOptions::default()).unwrap();
    let daemon = Arc::new(Daemon::new(store, ServerOptions::default()));
    let shutdown = Shutdown::new().unwrap();
    let (serving, switch) = (Arc::clone(&daemon), shutdown.clone());
    let thread = std::thread::spawn(move || serving.serve(&[listener], &switch).unwrap());
    let url = format!("unix://{}", socket.display());

    let here = Here::new(&[&url], cache.keys());
    let substituters = here.substituters();
    let missing = path("missing", "daemon");
    let outcome = here.substitute_by(&substituters, &[&b, &missing]).unwrap();
    assert_eq!(outcome.substituted.len(), 2, "{}", here.listener.text());
    assert_eq!(outcome.failed.len(), 1);
    assert_eq!(here.contents(&a), nar(&noise(2_000_000, 1)));
    // Without its keys.
    let stranger = Here::new(&[&url], PublicKeys::default());
    stranger.refused(&b);
    assert!(
        stranger
            .listener
            .text()
            .contains("as it's not signed by any of the keys")
    );
    let trusting = Here::new(&[&format!("{url}?trusted=true")], PublicKeys::default());
    assert_eq!(trusting.fetched(&[&b]), set(&[&a, &b]));

    shutdown.trigger();
    thread.join().unwrap();
    drop(daemon);
    // Gone: the connection that was kept has died, and nobody listens.
    let c = path("c", "daemon");
    let outcome = here.substitute_by(&substituters, &[&c]).unwrap();
    assert_eq!(outcome.failed.len(), 1);
    let text = here.listener.text();
    assert!(
        text.contains(&format!("cannot connect to '{url}'")),
        "{text}"
    );
}

#[test]
fn https_needs_a_certificate_that_is_trusted() {
    let cache = Cache::new(40);
    let x = path("x", "tls");
    cache.add(&x, &noise(1_000_000, 1), &[]);
    let plain = Server::of(cache.dir.path().into(), |_, _| None);
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(
        vec![made.cert.der().clone()],
        rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into(),
    )
    .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!(
        "https://localhost:{}",
        listener.local_addr().unwrap().port()
    );
    let upstream = plain.url.trim_start_matches("http://").to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (config, upstream) = (config.clone(), upstream.clone());
            std::thread::spawn(move || relay(stream.unwrap(), &config, &upstream));
        }
    });
    let mut here = Here::new(&[&url], cache.keys());
    here.refused(&x);
    let text = here.listener.text();
    assert!(
        text.contains("certificate") && text.contains("disabling"),
        "{text}"
    );
    let pem = here.dir.path().join("ca.pem");
    std::fs::write(&pem, made.cert.pem()).unwrap();
    here.settings.ssl_cert_file = Some(pem.clone());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    std::fs::write(&pem, "").unwrap();
    here.settings.ssl_cert_file = Some(pem.clone());
    assert!(here.substituters().is_empty());
}

/// Answers one request after another by asking a plain server.
fn relay(
    mut client: TcpStream,
    config: &Arc<rustls::ServerConfig>,
    upstream: &str,
) -> std::io::Result<()> {
    let mut tls = rustls::ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
    let mut stream = rustls::Stream::new(&mut tls, &mut client);
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    loop {
        while !request.ends_with(b"\r\n\r\n") {
            let count = stream.read(&mut piece)?;
            if count == 0 {
                return Ok(());
            }
            request.extend_from_slice(&piece[..count]);
        }
        let mut server = TcpStream::connect(upstream)?;
        server.write_all(&std::mem::take(&mut request))?;
        server.shutdown(std::net::Shutdown::Write)?;
        std::io::copy(&mut server, &mut stream)?;
        stream.flush()?;
    }
}

const KEY: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

fn hmac(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut block = [0_u8; 64];
    block[..key.len()].copy_from_slice(key);
    let inner = Sha256::new()
        .chain_update(block.map(|byte| byte ^ 0x36))
        .chain_update(data)
        .finalize();
    Sha256::new()
        .chain_update(block.map(|byte| byte ^ 0x5c))
        .chain_update(inner)
        .finalize()
        .to_vec()
}

/// Checks the signature in a URL as Amazon describes it, without the library that made it.
fn is_signed(target: &str, host: &str) -> bool {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut pairs: BTreeMap<&str, &str> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let Some(signature) = pairs.remove("X-Amz-Signature") else {
        return false;
    };
    let canonical: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let request = format!(
        "GET\n{path}\n{}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD",
        canonical.join("&")
    );
    let time = pairs["X-Amz-Date"];
    let date = &time[..8];
    assert_eq!(
        pairs["X-Amz-Credential"],
        format!("{KEY}%2F{date}%2Feu-test-1%2Fs3%2Faws4_request")
    );
    let hex = data_encoding::HEXLOWER.encode(&Sha256::digest(request.as_bytes()));
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{date}/eu-test-1/s3/aws4_request\n{hex}");
    let mut key = hmac(format!("AWS4{SECRET}").as_bytes(), date.as_bytes());
    for part in ["eu-test-1", "s3", "aws4_request"] {
        key = hmac(&key, part.as_bytes());
    }
    data_encoding::HEXLOWER.encode(&hmac(&key, text.as_bytes())) == signature
}

/// A bucket `b` with the cache below `pre fix/`; answers 403 for what is not there, as S3 does.
fn bucket(cache: &Cache, signed: bool) -> Server {
    let dir = cache.dir.path().to_path_buf();
    Server::new(move |request| {
        let host = request.header("host").unwrap();
        if signed != is_signed(&request.target, host) {
            return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
        }
        let path = request.target.split('?').next().unwrap();
        let found = path
            .strip_prefix("/b/pre%20fix/")
            .and_then(|name| std::fs::read(dir.join(name)).ok());
        match found {
            Some(bytes) => Reply::new(200, bytes),
            None => Reply::new(403, "<Error><Code>AccessDenied</Code></Error>"),
        }
    })
}

fn s3_url(server: &Server) -> String {
    format!("s3://b/pre%20fix?endpoint={}&region=eu-test-1", server.url)
}

#[test]
fn signed_requests_to_an_object_storage() {
    // Credentials come from the environment, which a test may not change for others.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "others::with_credentials", "--include-ignored"])
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env_remove("AWS_SESSION_TOKEN")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "others::without_credentials",
            "--include-ignored",
        ])
        .env_remove("AWS_ACCESS_KEY_ID")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
#[ignore = "run by signed_requests_to_an_object_storage"]
fn with_credentials() {
    let cache = Cache::new(40);
    let [a, b] = ["a", "b"].map(|name| path(name, "s3"));
    cache.add(&a, &noise(100_000, 1), &[]);
    cache.add(&b, b"b", &[&a]);
    let server = bucket(&cache, true);
    let here = Here::new(&[&s3_url(&server)], cache.keys());
    assert_eq!(here.fetched(&[&b]), set(&[&a, &b]));
    let missing = path("missing", "s3");
    assert!(
        here.refused(&missing)
            .contains("no substituter that can build it")
    );
    assert_eq!(here.listener.text(), "");
}

#[test]
#[ignore = "run by signed_requests_to_an_object_storage"]
fn without_credentials() {
    let cache = Cache::new(40);
    let x = path("x", "s3");
    cache.add(&x, b"x", &[]);
    let server = bucket(&cache, false);
    let here = Here::new(&[&s3_url(&server)], cache.keys());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    let server = bucket(&cache, true);
    let here = Here::new(&[&s3_url(&server)], cache.keys());
    here.refused(&x);
    assert!(
        here.listener
            .text()
            .contains("'s3://b/pre%20fix' does not appear to be a binary cache")
    );
}

#[test]
fn a_content_address_from_a_store_with_another_directory() {
    use understory_nix::content_address::References;
    use understory_nix::narinfo::{Compression, NarInfo};
    use understory_nix::{ContentAddress, Hash, HashAlgorithm, StorePathName};
    let archive = nar(b"the same everywhere");
    let hash = Hash::of(HashAlgorithm::Sha256, &archive);
    let ca = ContentAddress::parse_optional(&format!("fixed:r:{hash}"))
        .unwrap()
        .unwrap();
    let name = StorePathName::new("x").unwrap();
    let there = StoreDir::new("/other/store").unwrap();
    let [ours, theirs] = [&StoreDir::default(), &there]
        .map(|dir| ca.make_path(dir, &name, &References::default()).unwrap());
    let cache = Cache::new(40);
    std::fs::write(cache.file("nix-cache-info"), "StoreDir: /other/store\n").unwrap();
    cache.add_with(
        &theirs,
        b"the same everywhere",
        &[],
        &Compression::None,
        |info| {
            info.info.ca = Some(ca);
        },
    );
    let narinfo: NarInfo = cache.read(&theirs);
    std::fs::write(cache.narinfo_file(&theirs), narinfo.print(&there)).unwrap();
    let url = format!("{}?store=/other/store", cache.url());
    let here = Here::new(&[&url], PublicKeys::default());
    let sink = understory::substitute::CastoreSink::new(&here.store).unwrap();
    let wanted = [(ours.clone(), Some(ca))].into();
    let outcome = here
        .substituters()
        .substitute_with(&wanted, &sink, &here.listener)
        .unwrap();
    assert_eq!(outcome.substituted, [ours], "{:?}", outcome.failed);
}
