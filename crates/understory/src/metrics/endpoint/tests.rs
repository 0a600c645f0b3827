//! The responder as clients meet it, friendly and hostile.

use super::*;

fn endpoint() -> Endpoint {
    let take = || {
        let mut s = Snapshot::default();
        s.counter("understory_a_total", "A.", &[], 7);
        s
    };
    Endpoint::start(&"127.0.0.1:0".parse().unwrap(), Arc::new(take)).unwrap()
}

fn socket(endpoint: &Endpoint) -> TcpStream {
    let Address::Tcp(address) = endpoint.address() else {
        panic!("not TCP");
    };
    TcpStream::connect(address).unwrap()
}

fn ask(endpoint: &Endpoint, request: &[u8]) -> String {
    let mut stream = socket(endpoint);
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn addresses() {
    let ok = |text: &str, shown: &str| {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
    };
    ok("127.0.0.1:9464", "http://127.0.0.1:9464/metrics");
    ok("127.9.9.9:1", "http://127.9.9.9:1/metrics");
    ok("[::1]:9464", "http://[::1]:9464/metrics");
    ok("localhost:80", "http://127.0.0.1:80/metrics");
    ok("unix:/run/m.sock", "unix:/run/m.sock");
    ok("/run/m.sock", "unix:/run/m.sock");
    for (text, expected) in [
        (
            "0.0.0.0:9464",
            "metrics are not served on 0.0.0.0:9464: it is no loopback address",
        ),
        (
            "[::]:9464",
            "metrics are not served on [::]:9464: it is no loopback address",
        ),
        (
            "192.0.2.1:9464",
            "metrics are not served on 192.0.2.1:9464: it is no loopback address",
        ),
        ("9464", "'9464' is no address for metrics"),
        (
            "example.org:9464",
            "'example.org:9464' is no address for metrics",
        ),
        ("unix:m.sock", "'unix:m.sock' is no address for metrics"),
        ("", "'' is no address for metrics"),
    ] {
        let error = text.parse::<Address>().unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().unwrap().contains("127.0.0.1:9464"));
    }
}

#[test]
fn answers() {
    let endpoint = endpoint();
    let text = ask(
        &endpoint,
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    );
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    assert!(text.ends_with("\nunderstory_a_total 7\n"), "{text}");
    let json = ask(&endpoint, b"GET /metrics.json?x=1 HTTP/1.0\r\n\r\n");
    let body = json.split("\r\n\r\n").nth(1).unwrap();
    let value: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(value["understory_a_total"]["samples"][0]["value"], 7);
    let head = ask(
        &endpoint,
        b"HEAD /metrics HTTP/1.1\r\nHost: [::1]:1\r\n\r\n",
    );
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"));
    assert!(!head.contains("Content-Length: 0\r\n"));
}

#[test]
fn refusals() {
    let endpoint = endpoint();
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9 << 10));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("GET /metrics/../metrics HTTP/1.1\r\n\r\n", "404"),
        (
            "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
            "405",
        ),
        ("GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", "403"),
        (
            "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\n\r\n",
            "403",
        ),
        ("rubbish\r\n\r\n", "400"),
        ("GET /metrics HTTP/9.9\r\n\r\n", "400"),
        ("\u{0}\u{1}\r\n\r\n", "400"),
        (long.as_str(), "431"),
        (many.as_str(), "431"),
    ] {
        let answer = ask(&endpoint, request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:.60}: {answer}"
        );
    }
}

#[test]
fn idle_clients_keep_nobody_out_for_longer_than_their_time() {
    let endpoint = endpoint();
    // All places are taken by clients that say nothing; the others are closed, not kept waiting.
    let idle: Vec<TcpStream> = (0..CONNECTIONS_MAX).map(|_| socket(&endpoint)).collect();
    let request = b"GET /metrics HTTP/1.1\r\n\r\n";
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut stream = socket(&endpoint);
        let mut answer = String::new();
        // Closed before it was read: a reset.
        let _ = stream.write_all(request);
        let _ = stream.read_to_string(&mut answer);
        if answer.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(answer.is_empty(), "{answer}");
        assert!(Instant::now() < deadline, "never served again");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut first = &idle[0];
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[test]
fn a_unix_socket_is_the_owners_and_goes_with_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.sock");
    let address = Address::Unix(path.clone());
    let take: Arc<Take> = Arc::new(Snapshot::default);
    let first = Endpoint::start(&address, take.clone()).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(Endpoint::start(&address, take.clone()).is_err(), "in use");
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: \r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(first);
    assert!(!path.exists());
    // What a killed process left is replaced.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Endpoint::start(&address, take.clone()).unwrap());
    // A file is not.
    std::fs::write(&path, "x").unwrap();
    assert!(Endpoint::start(&address, take).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "x");
}
