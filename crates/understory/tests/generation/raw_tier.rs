//! The raw tier: what is hot is read without the packs, and only if it is right.

use super::*;

/// Makes every frame of the store unreadable.
fn ruin_packs(f: &Fixture) {
    for entry in fs::read_dir(f.dir.path().join("store/castore/packs")).unwrap() {
        let path = entry.unwrap().path();
        let len = fs::metadata(&path).unwrap().len();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let mut offset = 64;
        while offset < len {
            let mut byte = [0];
            fs::File::open(&path)
                .unwrap()
                .read_exact_at(&mut byte, offset)
                .unwrap();
            file.write_all_at(&[!byte[0]], offset).unwrap();
            offset += 97;
        }
    }
}

pub(crate) const HOT: HotOptions = HotOptions {
    bytes_max: 64 << 20,
    by_reads: false,
};

#[test]
fn what_is_hot_is_read_without_the_packs_and_only_if_it_is_right() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let path = f.publish(1, &[]);
    let other = f.publish(2, &[]);
    let made = f.make();
    let heated = f.heat(&path);
    assert!(heated.files > 500 && heated.bytes > 3_000_000, "{heated:?}");
    let again = f.heat(&path);
    assert_eq!((again.files, again.bytes), (heated.files, heated.bytes));
    let expected = contents(&f.tree(1));

    // Flipped bytes and cut checksums: everything is right nevertheless.
    let raw = f.dir.path().join("store/hot/raw");
    let file = fs::File::options()
        .write(true)
        .read(true)
        .open(&raw)
        .unwrap();
    let good = fs::read(&raw).unwrap();
    for offset in (0..good.len()).step_by(40_000) {
        file.write_all_at(&[good[offset] ^ 0x10], offset as u64)
            .unwrap();
    }
    let (mounted, at) = f.mount_hot(&made, Route::File, Some(HOT));
    drop_caches();
    assert!(contents(&at.join(path.base_name())) == expected);
    assert!(contents(&at.join(other.base_name())) == contents(&f.tree(2)));
    mounted.unmount().unwrap();
    f.clear_hot();
    f.heat(&path);
    let sums = f.dir.path().join("store/hot/sums");
    let file = fs::File::options().write(true).open(&sums).unwrap();
    let good = fs::read(&sums).unwrap();
    for offset in (3..good.len()).step_by(8 * 40) {
        file.write_all_at(&[good[offset] ^ 0x10], offset as u64)
            .unwrap();
    }
    let (mounted, at) = f.mount_hot(&made, Route::File, Some(HOT));
    drop_caches();
    assert!(contents(&at.join(path.base_name())) == expected);
    mounted.unmount().unwrap();
    file.set_len(100).unwrap();
    let (mounted, at) = f.mount_hot(&made, Route::File, Some(HOT));
    drop_caches();
    assert!(contents(&at.join(path.base_name())) == expected);
    mounted.unmount().unwrap();

    // Made whole again, it does without the packs; what is not in it does not.
    f.clear_hot();
    f.heat(&path);
    let Fixture { dir, store } = f;
    drop(store);
    let f = Fixture {
        store: open(dir.path()),
        dir,
    };
    let (mounted, at) = f.mount_hot(&made, Route::File, Some(HOT));
    ruin_packs(&f);
    drop_caches();
    assert!(contents(&at.join(path.base_name())) == expected);
    let cold = fs::read(at.join(other.base_name()).join("a/b/c/large"));
    assert_eq!(cold.unwrap_err().raw_os_error(), Some(5));
    mounted.unmount().unwrap();
}

#[test]
fn the_raw_tier_is_bounded_and_takes_what_is_read_often() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let paths = [f.publish(1, &[]), f.publish(2, &[])];
    let made = f.make();
    let small = HotOptions {
        bytes_max: 1 << 20,
        by_reads: true,
    };
    let heated = f.generations().heat(&paths, &small).unwrap();
    assert!(
        heated.bytes <= 1 << 20 && heated.bytes > 512 << 10,
        "{heated:?}"
    );
    let on_disk = |name: &str| {
        let path = f.dir.path().join("store/hot").join(name);
        fs::metadata(path).unwrap().blocks() * 512
    };
    assert!(
        on_disk("raw") <= (1 << 20) + (64 << 10),
        "{}",
        on_disk("raw")
    );
    f.clear_hot();

    let (mounted, at) = f.mount_hot(&made, Route::File, Some(small));
    let error = f.generations().heat(&paths, &small).unwrap_err();
    assert_eq!(error.to_string(), "another process fills the raw tier");
    // 200 KB, read a page here and there: random reads are not read ahead.
    let file = fs::File::open(at.join(paths[0].base_name()).join("a/b/middle")).unwrap();
    let mut page = [0; 4096];
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while on_disk("raw") == 0 {
        assert!(std::time::Instant::now() < deadline, "it is never taken in");
        drop_caches();
        for number in [40, 3, 21, 9, 33, 14, 46, 1, 27, 18] {
            file.read_exact_at(&mut page, number * 4096).unwrap();
        }
    }
    drop(file);
    mounted.unmount().unwrap();
}

#[test]
fn a_raw_tier_of_an_older_form_is_emptied_and_what_a_crash_left_goes() {
    if !can_mount() {
        return;
    }
    let f = Fixture::new();
    let path = f.publish(1, &[]);
    let made = f.make();
    let heated = f.heat(&path);
    let hot = f.dir.path().join("store/hot");
    let on_disk = |name: &str| fs::metadata(hot.join(name)).unwrap().blocks() * 512;
    let slack = 64 << 10;
    let is_whole = || {
        let (mounted, at) = f.mount_hot(&made, Route::File, Some(HOT));
        drop_caches();
        assert!(contents(&at.join(path.base_name())) == contents(&f.tree(1)));
        mounted.unmount().unwrap();
    };
    let form = fs::read_to_string(hot.join("space")).unwrap();
    let id = form.strip_prefix("2 ").unwrap();

    // What a process leaves that is killed: a file whose checksums are not all there, and blocks without any.
    let sums = fs::File::options()
        .write(true)
        .open(hot.join("sums"))
        .unwrap();
    sums.write_all_at(&[0; 8], 0).unwrap();
    let raw = fs::File::options()
        .write(true)
        .open(hot.join("raw"))
        .unwrap();
    let end = heated.bytes.next_multiple_of(1 << 20) + (5 << 20);
    raw.write_all_at(&noise(7, 1 << 20), end).unwrap();
    raw.sync_all().unwrap();
    assert!(on_disk("raw") >= heated.bytes + (1 << 20));
    is_whole();
    assert!(on_disk("raw") <= heated.bytes + slack, "{}", on_disk("raw"));
    let again = f.heat(&path);
    assert_eq!((again.files, again.bytes), (heated.files, heated.bytes));
    is_whole();

    // The first form had the bare id, and other checksums.
    fs::write(hot.join("space"), id).unwrap();
    is_whole();
    assert_eq!((on_disk("raw"), on_disk("sums")), (0, 0));
    assert_eq!(fs::read_to_string(hot.join("space")).unwrap(), form);
    f.heat(&path);
    is_whole();
}
