//! Servers that stall, lie, break off, and so on: a clear message, the next substituter, nothing left behind.

use crate::server::{Reply, Request, Server};
use crate::support::{Cache, Here, nar, noise, path, set};
use std::time::{Duration, Instant};
use understory_nix::StorePath;
use understory_nix::narinfo::Compression;

const SIZE: usize = 400_000;

/// A cache with one path, not compressed, so that its file is its archive.
fn one() -> (Cache, StorePath) {
    let cache = Cache::new(40);
    let x = path("x", "one");
    cache.add_with(&x, &noise(SIZE, 7), &[], &Compression::None, |_| {});
    (cache, x)
}

/// Serves that cache, but archives as `bad` says. Expects the message, and that the path comes from a good cache if
/// there is one.
fn expect(message: &str, bad: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static) {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), move |request, bytes| {
        request
            .target
            .starts_with("/nar/")
            .then(|| bad(request, bytes))
    });
    expect_of(message, &cache, &x, &server.url);
}

fn expect_of(message: &str, cache: &Cache, x: &StorePath, url: &str) {
    let message = message.replace("CACHE", url).replace("PATH", x.base_name());
    let here = Here::new(&[url], cache.keys());
    let error = here.refused(x);
    let shown = format!("{error}\n{}", here.listener.text());
    assert!(
        shown.contains(&message),
        "expected: {message}\nfound: {shown}"
    );
    // The next one.
    let good = Cache::with_key_of(cache, 50);
    good.add(x, &noise(SIZE, 7), &[]);
    let here = Here::new(&[url, &good.url()], cache.keys());
    assert_eq!(here.fetched(&[x]), set(&[x]));
    assert_eq!(here.contents(x), nar(&noise(SIZE, 7)));
    let text = here.listener.text();
    assert!(
        text.contains(&message),
        "expected: {message}\nfound: {text}"
    );
}

#[test]
fn not_found_although_there_is_a_narinfo() {
    expect(
        "file 'nar/HASH.nar' does not exist in binary cache 'CACHE'"
            .split("HASH")
            .next()
            .unwrap(),
        |_, _| Reply::new(404, "gone"),
    );
}

#[test]
fn an_error_of_the_server() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |request, _| {
        request
            .target
            .starts_with("/nar/")
            .then(|| Reply::new(500, "oops"))
    });
    let here = Here::new(&[&server.url], cache.keys());
    let url = format!("{}/nar/{}.nar", server.url, x.hash_part());
    assert_eq!(
        here.refused(&x),
        format!(
            "cannot substitute path '/nix/store/{x}' from '{}': unable to download '{url}': HTTP error 500",
            server.url
        )
    );
    let text = here.listener.text();
    assert!(
        text.contains(&format!(
            "warning: unable to download '{url}': HTTP error 500; retrying in "
        )),
        "{text}"
    );
    let tries = server
        .targets()
        .iter()
        .filter(|t| t.starts_with("/nar/"))
        .count();
    assert_eq!(tries, 3);
    expect("HTTP error 500", |_, _| Reply::new(500, "oops"));
    // What cannot get better is not tried again.
    let server = Server::of(cache.dir.path().into(), |request, _| {
        request
            .target
            .starts_with("/nar/")
            .then(|| Reply::new(501, ""))
    });
    let here = Here::new(&[&server.url], cache.keys());
    assert!(here.refused(&x).ends_with("HTTP error 501"));
    assert_eq!(server.targets().len(), 3);
}

#[test]
fn an_error_that_passes() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |request, _| {
        (request.earlier < 2).then(|| Reply::new(503, ""))
    });
    let here = Here::new(&[&server.url], cache.keys());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
}

#[test]
fn too_many_requests_come_back_later() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |request, _| {
        (request.target.starts_with("/nar/") && request.earlier == 0)
            .then(|| Reply::new(429, "").header("Retry-After", "1"))
    });
    let here = Here::new(&[&server.url], cache.keys());
    let begin = Instant::now();
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert!(
        here.listener
            .text()
            .contains("HTTP error 429; retrying in 1000 ms")
    );
}

#[test]
fn another_content_than_was_announced() {
    expect(
        "hash mismatch importing path '/nix/store/PATH'",
        |_, bytes| {
            let mut bytes = bytes.to_vec();
            bytes[1000] ^= 1;
            Reply::new(200, bytes)
        },
    );
}

#[test]
fn an_archive_that_is_none() {
    expect(
        "cannot substitute path '/nix/store/PATH' from 'CACHE': ",
        |_, _| Reply::new(200, b"<html>please log in</html>".repeat(100)),
    );
}

#[test]
fn a_size_that_is_a_lie() {
    for (size, message) in [
        (100, "the archive is longer than its narinfo says"),
        (
            10 * SIZE as u64,
            "size mismatch importing path '/nix/store/PATH'",
        ),
    ] {
        let (cache, x) = one();
        let mut narinfo = cache.read(&x);
        narinfo.info.nar_size = size;
        cache.resign(&mut narinfo);
        cache.write(&narinfo);
        let server = Server::of(cache.dir.path().into(), |_, _| None);
        expect_of(message, &cache, &x, &server.url);
        expect_of(message, &cache, &x, &cache.url());
    }
}

#[test]
fn a_file_that_is_shorter_than_announced() {
    let (cache, x) = one();
    let file = cache.nar_file(&x);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..5000]).unwrap();
    let message = format!("has 5000 bytes, its narinfo says {}", bytes.len());
    expect_of(&message, &cache, &x, &cache.url());
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    expect_of(&message, &cache, &x, &server.url);
}

#[test]
fn a_compressed_file_that_is_damaged() {
    for compression in [Compression::Zstd, Compression::Xz, Compression::Gzip] {
        let cache = Cache::new(40);
        let x = path("x", "damaged");
        cache.add_with(&x, &noise(SIZE, 7), &[], &compression, |_| {});
        let file = cache.nar_file(&x);
        let mut bytes = std::fs::read(&file).unwrap();
        for byte in &mut bytes[20_000..20_100] {
            *byte ^= 0x55;
        }
        std::fs::write(&file, bytes).unwrap();
        expect_of(
            "cannot substitute path '/nix/store/PATH' from 'CACHE'",
            &cache,
            &x,
            &cache.url(),
        );
    }
}

#[test]
fn an_unknown_compression() {
    let (cache, x) = one();
    let mut narinfo = cache.read(&x);
    narinfo.compression = Compression::from_name("rot13");
    cache.write(&narinfo);
    expect_of("unknown compression 'rot13'", &cache, &x, &cache.url());
}

#[test]
fn a_body_that_breaks_off_each_time() {
    expect("the server closed the connection too early", |_, bytes| {
        Reply {
            cut: Some(1000),
            ..Reply::new(200, bytes)
        }
    });
    // Without a length nobody sees the end coming.
    expect(
        "cannot substitute path '/nix/store/PATH' from 'CACHE'",
        |_, bytes| Reply {
            until_close: true,
            ..Reply::new(200, &bytes[..1000])
        },
    );
}

#[test]
fn a_download_goes_on_where_it_broke() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |request, bytes| {
        if !request.target.starts_with("/nar/") {
            return None;
        }
        let from = request.from().unwrap_or(0);
        let reply = Reply {
            cut: (request.earlier < 2).then_some(150_000),
            ..Reply::new(if from > 0 { 206 } else { 200 }, &bytes[from..])
        };
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        Some(
            reply
                .header("Accept-Ranges", "bytes")
                .header("ETag", "\"1\"")
                .header("Content-Range", range),
        )
    });
    let here = Here::new(&[&server.url], cache.keys());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    let asked: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|r| r.target.starts_with("/nar/"))
        .map(|r| (r.from(), r.header("if-range").map(str::to_owned)))
        .collect();
    let tag = Some("\"1\"".to_owned());
    assert_eq!(
        asked,
        [
            (None, None),
            (Some(150_000), tag.clone()),
            (Some(300_000), tag)
        ]
    );
}

#[test]
fn a_download_starts_again_where_it_cannot_go_on() {
    // Without ranges; with a server that says it has them and has not; with one that continues elsewhere.
    for kind in 0..3 {
        let (cache, x) = one();
        let server = Server::of(cache.dir.path().into(), move |request, bytes| {
            if !request.target.starts_with("/nar/") {
                return None;
            }
            let mut reply = Reply::new(200, bytes);
            if request.earlier == 0 {
                reply.cut = Some(150_000);
            }
            if kind > 0 {
                reply = reply.header("Accept-Ranges", "bytes");
            }
            if kind == 2 && request.from().is_some() {
                reply = Reply::new(206, &bytes[10..]).header(
                    "Content-Range",
                    format!("bytes 10-{}/{}", bytes.len() - 1, bytes.len()),
                );
            }
            Some(reply)
        });
        let here = Here::new(&[&server.url], cache.keys());
        assert_eq!(here.fetched(&[&x]), set(&[&x]), "{kind}");
        assert_eq!(here.contents(&x), nar(&noise(SIZE, 7)));
    }
}

#[test]
fn a_server_that_stalls() {
    let begin = Instant::now();
    expect("the server has sent nothing for 2 s", |_, bytes| Reply {
        cut: Some(1000),
        stall: true,
        ..Reply::new(200, bytes)
    });
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_server_that_is_mute() {
    let (cache, x) = one();
    let server = Server::new(|_| Reply {
        mute: true,
        ..Reply::new(200, "")
    });
    let message = format!(
        "unable to download '{}/nix-cache-info': the server has sent nothing for 2 s; disabling substituter '{0}' for 60 seconds",
        server.url
    );
    expect_of(&message, &cache, &x, &server.url);
}

#[test]
fn a_slow_server_is_no_bad_server() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |request, bytes| {
        request.target.starts_with("/nar/").then(|| Reply {
            slow: Some((20_000, Duration::from_millis(150))),
            ..Reply::new(200, bytes)
        })
    });
    let here = Here::new(&[&server.url], cache.keys());
    // Longer in all than it may stall.
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
}

#[test]
fn a_server_that_sends_us_round_in_circles() {
    let (cache, x) = one();
    let server =
        Server::new(|request| Reply::new(302, "").header("Location", request.target.clone()));
    expect_of("more than 10 redirects; disabling", &cache, &x, &server.url);
    assert_eq!(server.targets().len(), 22);
}

#[test]
fn nobody_listens() {
    let (cache, x) = one();
    let url = "http://127.0.0.1:9";
    expect_of(
        "unable to download 'http://127.0.0.1:9/nix-cache-info': connection refused; disabling substituter 'http://127.0.0.1:9' for 60 seconds",
        &cache,
        &x,
        url,
    );
    // It is said once and then left alone.
    let here = Here::new(&[url], cache.keys());
    let substituters = here.substituters();
    for _ in 0..3 {
        here.substitute_by(&substituters, &[&x]).unwrap();
    }
    assert_eq!(here.listener.text().matches("disabling").count(), 1);
}

#[test]
fn another_store_directory() {
    let (cache, x) = one();
    std::fs::write(cache.file("nix-cache-info"), "StoreDir: /gnu/store\n").unwrap();
    expect_of(
        "binary cache 'CACHE' is for Nix stores with prefix '/gnu/store', not '/nix/store'; disabling",
        &cache,
        &x,
        &cache.url(),
    );
}

#[test]
fn a_directory_that_is_no_cache() {
    let (cache, x) = one();
    std::fs::remove_file(cache.file("nix-cache-info")).unwrap();
    expect_of(
        "'CACHE' does not appear to be a binary cache",
        &cache,
        &x,
        &cache.url(),
    );
}

#[test]
fn narinfos_that_are_wrong() {
    for (text, message) in [
        ("StorePath", "is corrupt: expecting '\\n' at line 1"),
        ("Nonsense: 1\n", "is corrupt: StorePath missing"),
    ] {
        let (cache, x) = one();
        std::fs::write(cache.narinfo_file(&x), text).unwrap();
        let message = format!("NAR info file 'CACHE/{}.narinfo' {message}", x.hash_part());
        expect_of(&message, &cache, &x, &cache.url());
    }
    // Of another path.
    let (cache, x) = one();
    let y = path("y", "y");
    cache.add(&y, b"y", &[]);
    std::fs::copy(cache.narinfo_file(&y), cache.narinfo_file(&x)).unwrap();
    let message = format!("expected path '/nix/store/{x}', found '/nix/store/{y}'");
    expect_of(&message, &cache, &x, &cache.url());
}

#[test]
fn a_narinfo_that_leads_out_of_the_cache() {
    for url in ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd"] {
        let (cache, x) = one();
        let mut narinfo = cache.read(&x);
        narinfo.url = url.to_owned();
        cache.write(&narinfo);
        expect_of(
            &format!("the URL '{url}' does not lead into the binary cache"),
            &cache,
            &x,
            &cache.url(),
        );
        if url.starts_with("file:") {
            let server = Server::of(cache.dir.path().into(), |_, _| None);
            expect_of("does not lead to a server", &cache, &x, &server.url);
        }
    }
}

#[test]
fn a_content_address_that_is_a_lie() {
    let (cache, x) = one();
    let mut narinfo = cache.read(&x);
    narinfo.info.ca = Some(
        understory_nix::ContentAddress::parse_optional(&format!(
            "fixed:r:{}",
            narinfo.info.nar_hash
        ))
        .unwrap()
        .unwrap(),
    );
    cache.write(&narinfo);
    expect_of(
        "because it claims to be content-addressed but isn't",
        &cache,
        &x,
        &cache.url(),
    );
}

#[test]
fn a_cache_of_answers_that_is_damaged_is_done_without() {
    let (cache, x) = one();
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    std::fs::create_dir_all(here.cache_dir()).unwrap();
    let file = here.cache_dir().join("binary-caches.sqlite");
    std::fs::write(&file, b"x".repeat(5000)).unwrap();
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
}
