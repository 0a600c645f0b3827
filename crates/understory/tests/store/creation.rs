//! How a store is made and opened: several at a time, interrupted, read-only.

use super::support::{ALL_DEAD, Fixture, path, set};
use std::path::Path;
use understory::error::ErrorKind;
use understory::store::GcAction;
use understory::{Store, StoreOptions};
use understory_nix::StoreDir;

#[test]
fn create_refuses_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    Store::create(&at, &StoreDir::default()).unwrap();
    let error = Store::create(&at, &StoreDir::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} is a store already", at.display())
    );
    assert_eq!(error.kind(), ErrorKind::User);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("precious"), "x").unwrap();
    let error = Store::create(&other, &StoreDir::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot make a store in {}: it is not empty (it holds `precious`)",
            other.display()
        )
    );
    assert!(other.join("precious").exists());
}

#[test]
fn an_interrupted_creation_is_finished_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    Store::create(at, &StoreDir::default()).unwrap();
    // As if it had been killed before the last write.
    std::fs::remove_file(at.join("format")).unwrap();
    std::fs::write(at.join("creating"), "").unwrap();
    Store::create(at, &StoreDir::new("/other/store").unwrap()).unwrap();
    let store = Store::open(at, &StoreOptions::default()).unwrap();
    assert_eq!(store.store_dir().as_str(), "/other/store");
    assert!(!at.join("creating").exists());
}

#[test]
fn of_many_that_create_one_store_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    let made: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Store::create(&at, &StoreDir::default())))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results
            .map(|result| match result {
                Ok(()) => 1,
                Err(error) => {
                    assert_eq!(
                        error.to_string(),
                        format!("{} is a store already", at.display())
                    );
                    0
                }
            })
            .sum()
    });
    assert_eq!(made, 1);
    Store::open(&at, &StoreOptions::default()).unwrap();
}

#[test]
fn open_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let open = |at: &Path| Store::open(at, &StoreOptions::default()).err().unwrap();
    let error = open(dir.path());
    assert_eq!(
        error.to_string(),
        format!("{} is not an understory store", dir.path().display())
    );
    assert!(error.hint().is_some());
    let fixture = Fixture::new();
    std::fs::write(fixture.dir().join("format"), "understory store 2\n").unwrap();
    let error = open(&fixture.dir());
    assert_eq!(
        error.to_string(),
        format!(
            "{} has format 2, this program knows format 1",
            fixture.dir().display()
        )
    );
    std::fs::write(fixture.dir().join("format"), "what").unwrap();
    assert_eq!(open(&fixture.dir()).kind(), ErrorKind::Corrupt);
}

#[test]
fn a_read_only_store_changes_nothing() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let store = fixture.read_only();
    let (info, read) = fixture.info("b", &[]);
    let error = store.publish(vec![(info, read.root)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("the store {} is open read-only", fixture.dir().display())
    );
    assert!(store.collect(&ALL_DEAD).is_err());
    assert_eq!(
        store.collect(&GcAction::ReturnDead).unwrap().paths,
        set(&["a"])
    );
    let owner = store.temp_root_owner().unwrap();
    store.add_temp_root(&owner, &path("a")).unwrap();
}

#[test]
fn a_store_on_read_only_media_can_be_read() {
    let fixture = Fixture::new();
    fixture.add("a", &[]);
    let at = fixture.dir();
    let mount = fixture.dir.path().join("ro");
    std::fs::create_dir(&mount).unwrap();
    let target = mount.to_str().unwrap().to_owned();
    let Fixture { dir, store } = fixture;
    drop(store);
    if rustix::mount::mount_bind(&at, &mount).is_err() {
        understory_testkit::skip("mounting needs root");
        return;
    }
    let flags = rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount_remount(&mount, flags, "").unwrap();
    let result = std::panic::catch_unwind(|| {
        let mut options = StoreOptions::default();
        options.castore.read_only = true;
        let store = Store::open(Path::new(&target), &options).unwrap();
        assert!(store.path(&path("a")).unwrap().is_some());
        assert_eq!(store.all_paths().unwrap(), [path("a")]);
        let error = Store::open(Path::new(&target), &StoreOptions::default())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Environment);
        assert!(
            error.chain().contains("Read-only file system"),
            "{}",
            error.chain()
        );
    });
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    drop(dir);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}
