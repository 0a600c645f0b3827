//! Order, concurrency, cancellation.

use crate::server::{Reply, Server};
use crate::support::{Cache, Here, noise, path, set};
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use understory_nix::StorePath;

#[test]
fn a_thousand_paths_each_published_after_its_references() {
    let cache = Cache::new(40);
    let paths: Vec<StorePath> = (0..1000).map(|n| path("p", &n.to_string())).collect();
    for (n, one) in paths.iter().enumerate() {
        let references: Vec<&StorePath> = [n / 2, n / 3, n.saturating_sub(1)]
            .iter()
            .filter(|r| **r < n)
            .map(|r| &paths[*r])
            .collect();
        cache.add(one, format!("{n}").as_bytes(), &references);
    }
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    let all: Vec<&StorePath> = paths.iter().collect();
    let outcome = here.substitute(&[all[999]]).unwrap();
    // Publication refuses paths whose references are not valid, so the order was right.
    assert_eq!(outcome.substituted.len(), 1000);
    assert!(outcome.failed.is_empty());
}

#[test]
fn what_depends_on_what_cannot_be_had() {
    let cache = Cache::new(40);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| path(name, "deps"));
    cache.add(&b, b"b", &[&a]);
    cache.add(&c, b"c", &[&b]);
    cache.add(&d, b"d", &[]);
    let here = Here::new(&[&cache.url()], cache.keys());
    let outcome = here.substitute(&[&c, &d]).unwrap();
    assert_eq!(outcome.substituted, [d]);
    let said = |path| outcome.failed[path].to_string();
    assert_eq!(
        said(&a),
        format!("path '/nix/store/{a}' is required, but there is no substituter that can build it")
    );
    assert_eq!(
        said(&b),
        format!("some references of path '/nix/store/{b}' could not be realised")
    );
    assert_eq!(
        said(&c),
        format!("some references of path '/nix/store/{c}' could not be realised")
    );
}

#[test]
fn a_closure_that_goes_round_in_circles() {
    let cache = Cache::new(40);
    let [a, b, c] = ["a", "b", "c"].map(|name| path(name, "circle"));
    cache.add(&a, b"a", &[&b]);
    cache.add(&b, b"b", &[&a]);
    cache.add(&c, b"c", &[]);
    let here = Here::new(&[&cache.url()], cache.keys());
    let outcome = here.substitute(&[&a, &c]).unwrap();
    assert_eq!(outcome.substituted, [c]);
    let said: HashSet<String> = outcome.failed.values().map(ToString::to_string).collect();
    assert!(
        said.iter()
            .any(|text| text.starts_with("cycle detected in the references of '/nix/store/")),
        "{said:?}"
    );
}

#[test]
fn two_clients_download_a_path_once() {
    let cache = Cache::new(40);
    let paths: Vec<StorePath> = (0..20).map(|n| path("p", &n.to_string())).collect();
    for (n, one) in paths.iter().enumerate() {
        let references: Vec<&StorePath> = paths[..n].iter().collect();
        cache.add(one, &noise(50_000, n as u64), &references);
    }
    let server = Server::of(cache.dir.path().into(), |request, bytes| {
        request.target.starts_with("/nar/").then(|| Reply {
            slow: Some((20_000, Duration::from_millis(10))),
            ..Reply::new(200, bytes)
        })
    });
    let here = Here::new(&[&server.url], cache.keys());
    let substituters = here.substituters();
    let sum = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let outcome = here.substitute_by(&substituters, &[&paths[19]]).unwrap();
                assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
                assert!(here.store.is_valid(&paths[19]).unwrap());
                sum.fetch_add(outcome.substituted.len(), Ordering::Relaxed);
            });
        }
    });
    assert_eq!(sum.into_inner(), 20);
    let nars = server
        .targets()
        .into_iter()
        .filter(|t| t.starts_with("/nar/"))
        .count();
    assert_eq!(nars, 20);
}

#[test]
fn a_client_that_goes_away_ends_its_downloads() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, &noise(1_000_000, 1), &[]);
    let server = Server::of(cache.dir.path().into(), |request, bytes| {
        request.target.starts_with("/nar/").then(|| Reply {
            cut: Some(100_000),
            stall: true,
            ..Reply::new(200, bytes)
        })
    });
    let mut here = Here::new(&[&server.url], cache.keys());
    here.settings.stalled_timeout = Duration::from_secs(300);
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let error = here.substitute(&[&x]).unwrap_err();
            (error.to_string(), Instant::now())
        });
        while !server
            .targets()
            .iter()
            .any(|target| target.starts_with("/nar/"))
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let begin = Instant::now();
        here.listener.gone.store(true, Ordering::Relaxed);
        let (error, end) = work.join().unwrap();
        assert_eq!(error, "interrupted by the user");
        assert!(end - begin < Duration::from_secs(2), "{:?}", end - begin);
    });
    assert!(!here.store.is_valid(&x).unwrap());
}

#[test]
fn clients_share_what_is_known() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, b"x", &[]);
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    let substituters = here.substituters();
    let client = |overrides: &[(&str, &str)]| {
        let overrides = overrides
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        substituters
            .for_client(&overrides, false, &here.listener)
            .unwrap()
    };
    assert!(client(&[("substituters", "")]).is_empty());
    assert!(client(&[("substituters", "https://evil.example")]).is_empty());
    assert!(here.listener.text().starts_with(
        "warning: ignoring untrusted substituter 'https://evil.example', you are not a trusted user.\n"
    ));
    let outcome = here.substitute_by(&client(&[]), &[&x]).unwrap();
    assert_eq!(outcome.substituted, [x]);
}

#[test]
fn the_next_substituter_has_the_path_with_other_references() {
    let first = Cache::new(30);
    let [x, y, z] = ["x", "y", "z"].map(|name| path(name, "other"));
    first.add(&x, b"x", &[]);
    std::fs::remove_file(first.nar_file(&x)).unwrap();
    first.add(&z, b"z", &[&x]);
    let second = Cache::with_key_of(&first, 40);
    second.add(&y, b"y", &[]);
    second.add(&x, b"x of the second", &[&x, &y]);
    let here = Here::new(&[&first.url(), &second.url()], first.keys());
    assert_eq!(here.fetched(&[&z]), set(&[&x, &y, &z]));
    let info = here.store.path(&x).unwrap().unwrap().info.clone();
    assert_eq!(info.references, set(&[&x, &y]));
    // Where the second has not what its path needs, neither can be had.
    std::fs::remove_file(second.narinfo_file(&y)).unwrap();
    let here = Here::new(&[&first.url(), &second.url()], first.keys());
    let outcome = here.substitute(&[&z]).unwrap();
    assert!(outcome.substituted.is_empty());
    let failed: Vec<&StorePath> = outcome.failed.keys().collect();
    assert_eq!(failed.len(), 3, "{failed:?}");
}
