//! Substitution into an overlay store on real mounts: what goes down, what goes up, what is seen. Needs root.

use crate::common_overlay as overlay;
use crate::support::{Cache, Listener, nar, noise, path};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use understory::daemon::{
    Backend, Listener as Sockets, Operations, Server as Daemon, ServerOptions, Shutdown,
};
use understory::mount::{LiveMount, LiveOptions, OverlayMount};
use understory::overlay::Overlay;
use understory::overlay::lower::CastoreLower;
use understory::settings::Settings;
use understory::{Store, StoreOptions};
use understory_nix::narinfo::Compression;
use understory_nix::{StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

/// An overlay over a castore.
struct World {
    // Dropped in this order.
    overlay: Option<Overlay>,
    merged: Option<OverlayMount>,
    live: Option<LiveMount>,
    store: Store,
    dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.overlay = None;
        if let Some(merged) = self.merged.take() {
            merged.unmount().unwrap();
        }
        self.live = None;
    }
}

impl World {
    fn new(cache: &Cache, read_only: bool, jobs: usize) -> Option<Self> {
        let dir = overlay::root_dir()?;
        let mountpoint = dir.path().join("live");
        std::fs::create_dir(&mountpoint).unwrap();
        let place = dir.path().join("castore");
        Store::create(&place, &StoreDir::default()).unwrap();
        let mut options = StoreOptions::default();
        options.castore.read_only = read_only;
        let store = Store::open(&place, &options).unwrap();
        let live = LiveMount::mount(&store, &mountpoint, &LiveOptions::default()).unwrap();
        let merged = overlay::mount(dir.path(), vec![mountpoint.clone()]);
        let settings = Settings {
            substituters: vec![cache.url()],
            trusted_public_keys: cache.keys(),
            substitution_jobs: jobs,
            ..Settings::default()
        };
        let lower = Arc::new(CastoreLower::new(store.clone(), &mountpoint));
        let options = overlay::options(dir.path(), vec![lower], settings);
        let overlay = Overlay::open(options).unwrap();
        Some(Self {
            overlay: Some(overlay),
            merged: Some(merged),
            live: Some(live),
            store,
            dir,
        })
    }
    fn client(&self) -> Box<dyn Operations> {
        self.overlay
            .as_ref()
            .unwrap()
            .connect(&overlay::CLIENT)
            .unwrap()
    }
    fn merged(&self, path: &StorePath) -> PathBuf {
        overlay::merged(self.dir.path(), path)
    }
    fn upper(&self) -> BTreeSet<String> {
        overlay::upper_names(self.dir.path())
    }
    fn is_below(&self, path: &StorePath) -> bool {
        self.store.is_valid(path).unwrap()
    }
}

fn names(paths: &[&StorePath]) -> BTreeSet<String> {
    paths
        .iter()
        .map(|path| path.base_name().to_owned())
        .collect()
}

#[test]
fn a_closure_goes_down_and_is_seen_at_once() {
    let cache = Cache::new(40);
    let [a, b] = ["a", "b"].map(|name| path(name, "down"));
    cache.add(&a, &noise(200_000, 1), &[]);
    cache.add(&b, b"b", &[&a]);
    let Some(world) = World::new(&cache, false, 16) else {
        return;
    };
    // Overlayfs remembers that there was nothing.
    assert!(!world.merged(&a).exists() && !world.merged(&b).exists());
    let client = world.client();
    let listener = Listener::default();
    let valid = client
        .valid_paths(std::slice::from_ref(&b), true, &listener)
        .unwrap();
    assert_eq!(valid, std::slice::from_ref(&b), "{}", listener.text());
    assert_eq!(std::fs::read(world.merged(&a)).unwrap(), noise(200_000, 1));
    assert_eq!(std::fs::read(world.merged(&b)).unwrap(), b"b");
    assert!(world.is_below(&a) && world.is_below(&b));
    assert!(world.upper().is_empty(), "{:?}", world.upper());
    assert!(client.is_valid(&a).unwrap());
}

#[test]
fn what_refers_to_the_upper_goes_to_the_upper() {
    let cache = Cache::new(40);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| path(name, "up"));
    cache.add(&a, b"a", &[]);
    cache.add(&b, b"b", &[&a]);
    // Larger, so that it comes before what it refers to, when nobody knows where that will be.
    cache.add(&c, &noise(100_000, 1), &[&b, &c]);
    cache.add(&d, b"d", &[]);
    let Some(world) = World::new(&cache, false, 1) else {
        return;
    };
    let client = world.client();
    let listener = Listener::default();
    // Only the upper has this one.
    let local = client
        .add_dump(
            "local",
            &understory::add::AddMethod::default(),
            &BTreeSet::new(),
            false,
            &mut &nar(b"local")[..],
            &listener,
        )
        .unwrap()
        .path;
    let mut narinfo = cache.read(&b);
    narinfo.info.references.insert(local.clone());
    cache.resign(&mut narinfo);
    cache.write(&narinfo);
    let wanted = [c.clone(), d.clone()];
    let valid = client.valid_paths(&wanted, true, &listener).unwrap();
    assert_eq!(valid, wanted, "{}", listener.text());
    assert!(world.is_below(&a) && world.is_below(&d));
    assert!(!world.is_below(&b) && !world.is_below(&c));
    assert_eq!(world.upper(), names(&[&local, &b, &c]));
    assert_eq!(std::fs::read(world.merged(&c)).unwrap(), noise(100_000, 1));
    let mut found = BTreeSet::new();
    assert!(
        client
            .with_path_info(&c, &mut |info| found = info.references.clone())
            .unwrap()
    );
    assert_eq!(found, [b, c].into());
}

#[test]
fn a_lower_that_is_read_only_gets_nothing() {
    let cache = Cache::new(40);
    let [a, b, bad] = ["a", "b", "bad"].map(|name| path(name, "read-only"));
    cache.add(&a, &noise(200_000, 1), &[]);
    cache.add(&b, b"b", &[&a]);
    cache.add_with(&bad, b"bad", &[&a], &Compression::None, |_| {});
    let file = cache.nar_file(&bad);
    let mut bytes = std::fs::read(&file).unwrap();
    let contents = bytes.windows(3).position(|w| w == b"bad").unwrap();
    bytes[contents] = b'B';
    std::fs::write(&file, bytes).unwrap();
    let Some(world) = World::new(&cache, true, 16) else {
        return;
    };
    let client = world.client();
    let listener = Listener::default();
    let wanted = [b.clone(), bad.clone()];
    let valid = client.valid_paths(&wanted, true, &listener).unwrap();
    assert_eq!(valid, std::slice::from_ref(&b), "{}", listener.text());
    assert_eq!(world.upper(), names(&[&a, &b]));
    assert!(!world.merged(&bad).exists());
    assert_eq!(std::fs::read(world.merged(&b)).unwrap(), b"b");
}

#[test]
fn clients_of_real_nix_realise_paths() {
    let cache = Cache::new(40);
    let [a, b, missing] = ["a", "b", "missing"].map(|name| path(name, "real"));
    cache.add(&a, &noise(2_000_000, 1), &[]);
    cache.add(&b, b"b", &[&a]);
    for version in Version::SUPPORTED {
        let (Some(root), Some(world)) = (NixRoot::get(version), World::new(&cache, false, 16))
        else {
            return;
        };
        let run = world.dir.path().join("run");
        let listener = Sockets::bind(&run.join("socket")).unwrap();
        let daemon = Arc::new(Daemon::for_backend(
            Arc::new(world.overlay.clone().unwrap()),
            ServerOptions::default(),
        ));
        let shutdown = Shutdown::new().unwrap();
        let (serving, switch) = (Arc::clone(&daemon), shutdown.clone());
        let thread = std::thread::spawn(move || serving.serve(&[listener], &switch).unwrap());
        let script = format!(
            "export NIX_REMOTE=unix:///d/socket NIX_CONFIG='experimental-features = nix-command'\n\
             nix-store -r /nix/store/{missing} 2>&1 && exit 1\n\
             nix-store -r /nix/store/{b} --dry-run 2>&1\n\
             nix build --no-link --log-format internal-json -v /nix/store/{b} 2>&1\n\
             nix path-info -r /nix/store/{b}"
        );
        let output = root.run_ok(&[Bind::new(&run, "/d")], 0, &script);
        shutdown.trigger();
        thread.join().unwrap();
        for expected in [
            "there is no substituter that can build it".to_owned(),
            "these 2 paths will be fetched (".to_owned(),
            format!("copying path '/nix/store/{a}' from '{}'", cache.url()),
            format!("copying path '/nix/store/{b}' from '{}'", cache.url()),
            format!("\n/nix/store/{a}\n"),
        ] {
            assert!(output.contains(&expected), "{expected}\n{output}");
        }
        assert!(world.is_below(&a) && world.is_below(&b));
        drop(daemon);
    }
}
