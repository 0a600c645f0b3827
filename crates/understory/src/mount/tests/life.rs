//! Beginning and end of a mount.

use super::*;

#[test]
fn unmounting_while_in_use_takes_less_than_a_second() {
    let Some(f) = Fixture::new() else { return };
    f.memory
        .publish(&name(1), f.memory.special("zeros", Data::Zeros, 1 << 40));
    let mut file = std::fs::File::open(f.path(name(1))).unwrap();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer).is_ok_and(|count| count > 0) {}
        file
    });
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    f.mount.unmount().unwrap();
    f.mount.wait();
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    assert!(!f.mount.is_serving());
    assert!(f.names("").is_empty(), "the directory below is seen again");
    reader.join().unwrap();
}

#[test]
fn unmounting_below_an_overlay_that_stays_takes_less_than_a_second() {
    let Some(f) = Fixture::new() else { return };
    f.memory.publish(&name(1), f.memory.file(b"1", false));
    let dirs = tempfile::tempdir().unwrap();
    for dir in ["upper", "work", "merged"] {
        std::fs::create_dir(dirs.path().join(dir)).unwrap();
    }
    let merged = dirs.path().join("merged");
    let d = dirs.path().display();
    let status = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o"])
        .arg(format!(
            "lowerdir={},upperdir={d}/upper,workdir={d}/work",
            f.dir.path().display()
        ))
        .arg(&merged)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(std::fs::read(merged.join(name(1))).unwrap(), b"1");
    let start = Instant::now();
    f.mount.unmount().unwrap();
    let took = start.elapsed();
    let serving = f.mount.is_serving();
    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(!serving);
}

#[test]
fn someone_elses_umount_ends_it() {
    let Some(f) = Fixture::new() else { return };
    rustix::mount::unmount(f.dir.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    f.mount.wait();
    assert!(!f.mount.is_serving());
}

#[test]
fn a_second_mount_on_a_living_one_is_refused() {
    let Some(f) = Fixture::new() else { return };
    let error = mount(&f.memory, f.dir.path()).err().unwrap();
    let at = f.dir.path().display();
    assert_eq!(
        error.to_string(),
        format!("{at} is mounted already: understory:memory, of \\ tests")
    );
    let file = f.dir.path().with_extension("file");
    std::fs::write(&file, b"").unwrap();
    let error = mount(&f.memory, &file).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("{} is not a directory", file.display())
    );
    std::fs::remove_file(file).unwrap();
}

#[test]
fn inode_numbers_survive_a_restart() {
    let memory = Memory::default();
    let Some(f) = Fixture::with(memory.clone()) else {
        return;
    };
    let inner = memory.directory(vec![
        (b"x", memory.file(b"same", true)),
        (
            b"l",
            Node::Symlink {
                target: b"x"[..].into(),
            },
        ),
    ]);
    memory.publish(&name(1), memory.directory(vec![(b"d", inner)]));
    let numbers = |f: &Fixture| -> Vec<u64> {
        ["", "d", "d/x", "d/l"]
            .iter()
            .map(|p| {
                std::fs::symlink_metadata(f.path(name(1)).join(p))
                    .unwrap()
                    .ino()
            })
            .collect()
    };
    let before = numbers(&f);
    drop(f);
    let f = Fixture::with(memory).unwrap();
    assert_eq!(numbers(&f), before);
}
