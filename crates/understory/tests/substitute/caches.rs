//! Binary caches that are as they should be.

use crate::server::{Reply, Server};
use crate::support::{Cache, Here, compress, nar, noise, path, set};
use std::collections::BTreeMap;
use std::time::Duration;
use understory::daemon::Silent;
use understory::settings::Settings;
use understory_nix::narinfo::Compression;
use understory_nix::worker::{ActivityType, LogMessage};
use understory_nix::{PublicKeys, StorePath};

/// a ← b ← c, and a ← c.
fn three(cache: &Cache) -> [StorePath; 3] {
    let [a, b, c] = ["a", "b", "c"].map(|name| path(name, "three"));
    cache.add(&a, b"a", &[]);
    cache.add(&b, &noise(300_000, 1), &[&a, &b]);
    cache.add(&c, &noise(3_000_000, 2), &[&a, &b]);
    [a, b, c]
}

#[test]
fn a_closure_from_a_directory() {
    let cache = Cache::new(40);
    let [a, b, c] = three(&cache);
    let here = Here::new(&[&cache.url()], cache.keys());
    assert_eq!(here.fetched(&[&c]), set(&[&a, &b, &c]));
    assert_eq!(here.contents(&c), nar(&noise(3_000_000, 2)));
    let info = here.store.path(&b).unwrap().unwrap().info.clone();
    assert_eq!(info.references, set(&[&a, &b]));
    assert_eq!(info.signatures.len(), 1);
    // Nothing to do.
    assert!(here.fetched(&[&c]).is_empty());
}

#[test]
fn a_closure_over_http_with_its_activities() {
    let cache = Cache::new(40);
    let [a, b, c] = three(&cache);
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    assert_eq!(here.fetched(&[&c]), set(&[&a, &b, &c]));
    assert_eq!(here.contents(&c), nar(&noise(3_000_000, 2)));
    assert_eq!(server.targets().len(), 7, "{:?}", server.targets());
    let messages = here.listener.messages.lock().unwrap().clone();
    let started = |kind| {
        messages
            .iter()
            .filter(
                |m| matches!(m, LogMessage::StartActivity { activity, .. } if *activity == kind),
            )
            .count()
    };
    for (kind, count) in [
        (ActivityType::Realise, 1),
        (ActivityType::CopyPaths, 1),
        (ActivityType::Substitute, 3),
        (ActivityType::CopyPath, 3),
        (ActivityType::FileTransfer, 3),
    ] {
        assert_eq!(started(kind), count, "{kind:?}");
    }
    let stopped = messages
        .iter()
        .filter(|m| matches!(m, LogMessage::StopActivity(_)))
        .count();
    assert_eq!(stopped, 11);
    let text = format!("copying path '/nix/store/{a}' from '{}'", server.url);
    assert!(
        messages.iter().any(
            |m| matches!(m, LogMessage::StartActivity { text: t, .. } if *t == text.as_bytes())
        )
    );
}

#[test]
fn offers_have_sizes_and_are_remembered() {
    let cache = Cache::new(40);
    let [_, b, _] = three(&cache);
    let absent = path("absent", "x");
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    let asked: BTreeMap<_, _> = [(b.clone(), None), (absent.clone(), None)].into();
    for round in 0..2 {
        // Another process, as far as memory goes.
        let offers = here.substituters().query(&asked, false, &Silent).unwrap();
        assert_eq!(offers.len(), 1);
        let offer = &offers[&b];
        let file = std::fs::metadata(cache.nar_file(&b)).unwrap().len();
        assert_eq!(offer.download_size, file);
        assert_eq!(offer.info.nar_size, nar(&noise(300_000, 1)).len() as u64);
        assert_eq!(&*offer.from, server.url);
        assert_eq!(server.requests().len(), 3, "round {round}");
    }
    // The answers have no age any more.
    let mut here = here;
    here.settings.narinfo_negative_ttl = Duration::ZERO;
    here.substituters().query(&asked, false, &Silent).unwrap();
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn thousands_of_questions_over_few_connections() {
    let cache = Cache::new(40);
    let server = Server::of(cache.dir.path().into(), |_, _| None);
    let here = Here::new(&[&server.url], cache.keys());
    let asked: BTreeMap<_, _> = (0..2000)
        .map(|n| (path("many", &n.to_string()), None))
        .collect();
    assert!(
        here.substituters()
            .query(&asked, true, &Silent)
            .unwrap()
            .is_empty()
    );
    assert_eq!(server.requests().len(), 2001);
    assert!(
        here.substituters()
            .query(&asked, true, &Silent)
            .unwrap()
            .is_empty()
    );
    assert_eq!(server.requests().len(), 2001);
}

#[test]
fn priority_decides_and_order_among_equals() {
    let first = Cache::new(40);
    let x = path("x", "x");
    first.add(&x, b"x", &[]);
    let second = Cache::with_key_of(&first, 30);
    second.add(&x, b"x", &[]);
    let from = |urls: &[&str], mass: bool| {
        let here = Here::new(urls, first.keys());
        let asked = [(x.clone(), None)].into();
        let offers = here.substituters().query(&asked, mass, &Silent).unwrap();
        offers.get(&x).map(|offer| offer.from.to_string())
    };
    let (one, two) = (first.url(), second.url());
    assert_eq!(from(&[&one, &two], false), Some(two.clone()));
    assert_eq!(
        from(&[&one, &format!("{two}?priority=40")], false),
        Some(one.clone())
    );
    assert_eq!(
        from(&[&one, &format!("{two}?want-mass-query=false")], true),
        Some(one.clone())
    );
    assert_eq!(
        from(&[&one, &format!("{two}?want-mass-query=false")], false),
        Some(two)
    );
}

#[test]
fn what_may_be_used_without_a_signature() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, b"x", &[]);
    let warning = format!(
        "warning: ignoring substitute for '/nix/store/{x}' from '{}', as it's not signed by any of the keys in 'trusted-public-keys'\n",
        cache.url()
    );
    let here = Here::new(&[&cache.url()], PublicKeys::default());
    assert_eq!(
        here.refused(&x),
        format!("path '/nix/store/{x}' is required, but there is no substituter that can build it")
    );
    assert_eq!(here.listener.text(), warning);
    let trusted = Here::new(
        &[&format!("{}?trusted=true", cache.url())],
        PublicKeys::default(),
    );
    assert_eq!(trusted.fetched(&[&x]), set(&[&x]));
    let mut careless = Here::new(&[&cache.url()], PublicKeys::default());
    careless.settings.require_signatures = false;
    assert_eq!(careless.fetched(&[&x]), set(&[&x]));
    // A signature does not survive a change.
    let mut narinfo = cache.read(&x);
    narinfo.info.references.insert(path("y", "y"));
    cache.write(&narinfo);
    let here = Here::new(&[&cache.url()], cache.keys());
    here.refused(&x);
    assert_eq!(here.listener.text(), warning);
}

#[test]
fn narinfos_that_the_server_compresses() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, b"x", &[]);
    for (name, compression) in [
        ("zstd", Compression::Zstd),
        ("gzip", Compression::Gzip),
        ("x-gzip", Compression::Gzip),
    ] {
        let server = Server::of(cache.dir.path().into(), move |request, bytes| {
            assert_eq!(
                request.header("accept-encoding").is_none(),
                request.target.contains("/nar/")
            );
            request.target.contains(".nar").then(|| {
                Reply::new(200, compress(&compression, bytes)).header("Content-Encoding", name)
            })
        });
        let here = Here::new(&[&server.url], cache.keys());
        assert_eq!(here.fetched(&[&x]), set(&[&x]), "{name}");
    }
    let server = Server::of(cache.dir.path().into(), |request, bytes| {
        request
            .target
            .contains(".narinfo")
            .then(|| Reply::new(200, bytes).header("Content-Encoding", "rot13"))
    });
    let here = Here::new(&[&server.url], cache.keys());
    here.refused(&x);
    assert!(
        here.listener.text().contains("content encoding 'rot13'"),
        "{}",
        here.listener.text()
    );
}

#[test]
fn redirects_are_followed() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, &noise(100_000, 3), &[]);
    let real = Server::of(cache.dir.path().into(), |_, _| None);
    let to = real.url.clone();
    let server = Server::new(move |request| {
        Reply::new(302, "").header("Location", format!("{to}{}", request.target))
    });
    let here = Here::new(&[&server.url], cache.keys());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
}

#[test]
fn names_and_passwords_of_netrc_and_url() {
    let cache = Cache::new(40);
    let x = path("x", "x");
    cache.add(&x, b"x", &[]);
    let server = Server::of(cache.dir.path().into(), |request, _| {
        // me:p@ss
        (request.header("authorization") != Some("Basic bWU6cEBzcw==")).then(|| Reply::new(401, ""))
    });
    let mut here = Here::new(&[&server.url], cache.keys());
    here.refused(&x);
    let netrc = here.dir.path().join("netrc");
    std::fs::write(&netrc, "machine 127.0.0.1 login me password p@ss\n").unwrap();
    here.settings.netrc_file = Some(netrc);
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    let url = server.url.replace("http://", "http://me:p%40ss@");
    let here = Here::new(&[&url], cache.keys());
    assert_eq!(here.fetched(&[&x]), set(&[&x]));
    // Passwords are not shown.
    let messages = format!("{:?}", here.listener.messages.lock().unwrap());
    assert!(!messages.contains("p%40ss") && !messages.contains("p@ss"));
}

#[test]
fn nobody_to_ask() {
    let mut here = Here::new(&["http://127.0.0.1:9"], PublicKeys::default());
    here.settings.substitute = false;
    assert!(here.substituters().is_empty());
    let x = path("x", "x");
    assert!(
        here.refused(&x)
            .contains("no substituter that can build it")
    );
    let odd = Settings {
        substituters: vec!["gopher://x".into(), "/nix".into()],
        ..here.settings.clone()
    };
    here.settings = odd;
    assert!(here.substituters().is_empty());
}
