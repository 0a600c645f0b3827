//! What the mounted file system shows.

use super::*;

#[test]
fn files_symlinks_directories_modes_and_times() {
    let Some(f) = Fixture::new() else { return };
    let m = &f.memory;
    let long = [b'n'; 255];
    let target = [b't'; 4095];
    let inner = m.directory(vec![(b"x", m.file(b"same", false))]);
    let node = m.directory(vec![
        (b"empty", m.file(b"", false)),
        (b"plain", m.file(b"same", false)),
        (b"run", m.file(b"same", true)),
        (
            b"link",
            Node::Symlink {
                target: b"plain"[..].into(),
            },
        ),
        (
            b"far",
            Node::Symlink {
                target: target[..].into(),
            },
        ),
        (&long, m.file(b"long name", false)),
        (b"not \xff utf-8 \n", m.file(b"odd name", false)),
        (b"a", inner.clone()),
        (b"b", inner),
        (b"none", m.directory(vec![])),
    ]);
    m.publish(&name(1), node);
    m.publish(&name(2), m.file(b"a store path that is a file", true));
    m.publish(
        &name(3),
        Node::Symlink {
            target: name(2).into_bytes().into(),
        },
    );
    let p = f.path(name(1));

    assert_eq!(std::fs::read(p.join("plain")).unwrap(), b"same");
    assert_eq!(std::fs::read(p.join("link")).unwrap(), b"same");
    assert_eq!(std::fs::read(p.join("empty")).unwrap(), b"");
    assert_eq!(
        std::fs::read(p.join(OsStr::from_bytes(&long))).unwrap(),
        b"long name"
    );
    assert_eq!(
        std::fs::read(p.join(OsStr::from_bytes(b"not \xff utf-8 \n"))).unwrap(),
        b"odd name"
    );
    assert_eq!(
        std::fs::read_link(p.join("far"))
            .unwrap()
            .as_os_str()
            .as_bytes(),
        target
    );
    assert_eq!(
        std::fs::read(f.path(name(3))).unwrap(),
        b"a store path that is a file"
    );
    assert_eq!(
        std::fs::metadata(f.path(name(2))).unwrap().mode(),
        0o100_555
    );

    let mode = |name: &str| std::fs::symlink_metadata(p.join(name)).unwrap().mode();
    assert_eq!(
        (mode("plain"), mode("run"), mode("link"), mode("a")),
        (0o100_444, 0o100_555, 0o120_777, 0o040_555)
    );
    let ino = |name: &str| std::fs::symlink_metadata(p.join(name)).unwrap().ino();
    assert_ne!(
        ino("plain"),
        ino("run"),
        "equal contents, different exec bit"
    );
    assert_eq!(ino("plain"), ino("a/x"), "equal files share an inode");
    assert_ne!(ino("a"), ino("b"), "equal directories do not");
    for entry in ["plain", "run", "link", "far", "a", "a/x", "empty"] {
        let found = std::fs::symlink_metadata(p.join(entry)).unwrap();
        assert_eq!(
            (found.nlink(), found.mtime(), found.ctime(), found.atime()),
            (1, 1, 1, 1),
            "{entry}"
        );
        assert_eq!(
            (found.uid(), found.gid(), found.blocks()),
            (0, 0, found.size().div_ceil(512)),
            "{entry}"
        );
    }
    assert_eq!(f.names(&name(1)).len(), 10);
    assert_eq!(f.names(&format!("{}/none", name(1))).len(), 0);
    // What readdir and stat say is the same.
    for entry in std::fs::read_dir(&p).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            std::os::unix::fs::DirEntryExt::ino(&entry),
            entry.metadata().unwrap().ino()
        );
    }

    assert!(f.path("nothing").symlink_metadata().is_err());
    assert!(p.join("nothing").symlink_metadata().is_err());
    assert!(f.path(".links").symlink_metadata().is_err());
    let refused = std::fs::write(p.join("new"), b"x").unwrap_err();
    assert_eq!(
        refused.raw_os_error(),
        Some(rustix::io::Errno::ROFS.raw_os_error())
    );
    let figures = rustix::fs::statvfs(f.dir.path()).unwrap();
    assert_eq!(
        (
            figures.f_blocks,
            figures.f_bfree,
            figures.f_bavail,
            figures.f_namemax
        ),
        (1000, 600, 500, 255)
    );
}

#[test]
fn find_cp_and_du_see_what_the_model_has() {
    let Some(f) = Fixture::new() else { return };
    let m = &f.memory;
    let mut model: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut bytes = 0u64;
    for path in 0..20u64 {
        let mut entries: Vec<(Vec<u8>, Node)> = Vec::new();
        for number in 0..50u64 {
            let content = vec![b'c'; (number * number * 7 + path % 3) as usize];
            bytes += content.len().div_ceil(512) as u64 * 512;
            entries.push((
                format!("f{number}").into_bytes(),
                m.file(&content, number % 2 == 0),
            ));
        }
        let inner = m.directory(entries.iter().map(|(n, e)| (&n[..], e.clone())).collect());
        m.publish(&name(path), m.directory(vec![(b"d", inner)]));
        model.insert(name(path).into_bytes());
        model.insert(format!("{}/d", name(path)).into_bytes());
        for (entry, _) in &entries {
            model.insert([format!("{}/d/", name(path)).as_bytes(), entry].concat());
        }
    }
    for round in 0..3 {
        let out = Command::new("find")
            .arg(".")
            .args(["-mindepth", "1", "-printf", "%P\\0"])
            .current_dir(f.dir.path())
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "round {round}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        let found: Vec<Vec<u8>> = out
            .stdout
            .split(|&b| b == 0)
            .filter(|n| !n.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        assert_eq!(found.len(), model.len(), "round {round}: each entry once");
        assert_eq!(
            found.into_iter().collect::<BTreeSet<_>>(),
            model,
            "round {round}"
        );
        if round == 1 {
            drop_caches();
        }
    }
    let du = Command::new("du")
        .args(["-s", "--block-size=1"])
        .arg(f.dir.path())
        .output()
        .unwrap();
    let du: u64 = String::from_utf8(du.stdout)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(du, bytes);
    let copy = tempfile::tempdir().unwrap();
    let cp = Command::new("cp")
        .arg("-a")
        .arg(f.path(name(7)))
        .arg(copy.path())
        .output()
        .unwrap();
    assert!(
        cp.status.success(),
        "{}",
        String::from_utf8_lossy(&cp.stderr)
    );
    let diff = Command::new("diff")
        .arg("-r")
        .arg(f.path(name(7)))
        .arg(copy.path().join(name(7)))
        .output()
        .unwrap();
    assert!(
        diff.status.success(),
        "{}",
        String::from_utf8_lossy(&diff.stdout)
    );
    let copied = std::fs::metadata(copy.path().join(name(7)).join("d/f4")).unwrap();
    assert_eq!((copied.mode(), copied.mtime()), (0o100_555, 1));
    drop(
        Command::new("chmod")
            .args(["-R", "u+w"])
            .arg(copy.path())
            .status(),
    );
}

#[test]
fn a_root_of_100_000_paths_lists_each_once_with_buffers_of_all_sizes() {
    let Some(f) = Fixture::new() else { return };
    let node = f.memory.file(b"", false);
    // Rows with gaps, as deletions leave them; names of many lengths.
    for number in 0..100_000u64 {
        f.memory.publish(
            &format!("{number:032}-{}", "n".repeat(1 + (number % 97) as usize)),
            node.clone(),
        );
        if number % 11 == 0 {
            f.memory.0.lock().unwrap().last_row += number % 5;
        }
    }
    for buffer_bytes in [300, 1024, 4096, 65_536, 1 << 20] {
        let dir = rustix::fs::open(
            f.dir.path(),
            rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let mut buffer = Vec::with_capacity(buffer_bytes);
        let mut listing = rustix::fs::RawDir::new(&dir, buffer.spare_capacity_mut());
        let mut seen = vec![false; 100_000];
        let mut dots = 0;
        while let Some(entry) = listing.next() {
            let entry = entry.unwrap();
            let found = entry.file_name().to_str().unwrap();
            match found.get(..32) {
                None => dots += 1,
                Some(number) => {
                    let number: usize = number.parse().unwrap();
                    assert!(
                        !std::mem::replace(&mut seen[number], true),
                        "{number} twice with buffers of {buffer_bytes}"
                    );
                }
            }
        }
        assert_eq!(dots, 2);
        assert!(
            seen.iter().all(|&s| s),
            "missing with buffers of {buffer_bytes}"
        );
        drop_caches();
    }
}

#[test]
fn a_directory_of_50_000_entries() {
    let Some(f) = Fixture::new() else { return };
    let node = f.memory.file(b"x", false);
    let names: Vec<String> = (0..50_000).map(|n| format!("entry-{n}")).collect();
    let directory = f
        .memory
        .directory(names.iter().map(|n| (n.as_bytes(), node.clone())).collect());
    f.memory.publish(&name(1), directory);
    for _ in 0..2 {
        let found: BTreeSet<OsString> = f.names(&name(1)).into_iter().collect();
        assert_eq!(found, names.iter().map(OsString::from).collect());
    }
    assert_eq!(f.names(&name(1)).len(), 50_000);
    assert_eq!(
        std::fs::read(f.path(name(1)).join("entry-31234")).unwrap(),
        b"x"
    );
}

#[test]
fn a_file_of_many_gigabytes_and_random_reads() {
    let Some(f) = Fixture::new() else { return };
    let size = (5 << 30) + 3;
    f.memory
        .publish(&name(1), f.memory.special("zeros", Data::Zeros, size));
    let mut file = std::fs::File::open(f.path(name(1))).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(size - 5)).unwrap();
    file.read_to_end(&mut tail).unwrap();
    assert_eq!(tail, [0; 5]);

    let bytes: Vec<u8> = (0..5_000_011u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    f.memory.publish(&name(2), f.memory.file(&bytes, false));
    assert_eq!(std::fs::read(f.path(name(2))).unwrap(), bytes);
    drop_caches();
    let path = f.path(name(2));
    std::thread::scope(|scope| {
        for seed in 0..8u64 {
            let (path, bytes) = (&path, &bytes);
            scope.spawn(move || {
                let file = std::fs::File::open(path).unwrap();
                let mut at = seed;
                for _ in 0..300 {
                    at = at
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let offset = (at >> 33) as usize % bytes.len();
                    let mut buffer = vec![0; 1 + (at >> 20) as usize % 40_000];
                    let count = file.read_at(&mut buffer, offset as u64).unwrap();
                    assert_eq!(buffer[..count], bytes[offset..offset + count]);
                    assert!(count == buffer.len() || offset + count == bytes.len());
                }
            });
        }
    });
}

#[test]
fn a_name_looked_up_before_it_is_published_is_there_after() {
    let Some(f) = Fixture::new() else { return };
    f.memory.publish(&name(1), f.memory.directory(vec![]));
    for number in 2..20 {
        assert!(!f.path(name(number)).exists());
        assert_eq!(f.names("").len() as u64, number - 1);
        f.memory
            .publish(&name(number), f.memory.file(b"now", false));
        assert_eq!(std::fs::read(f.path(name(number))).unwrap(), b"now");
        if number % 8 == 0 {
            // Another process published it: nothing tells the kernel, but its listing is soon old.
            eventually("the listing shows what another process published", || {
                f.names("").len() as u64 == number
            });
        } else {
            f.mount.announce(&[]);
        }
        assert_eq!(f.names("").len() as u64, number);
    }
}

#[test]
fn a_deleted_path_goes_when_it_is_announced() {
    let Some(f) = Fixture::new() else { return };
    f.memory.publish(
        &name(1),
        f.memory.directory(vec![(b"x", f.memory.file(b"1", false))]),
    );
    f.memory.publish(&name(2), f.memory.file(b"2", false));
    assert_eq!(std::fs::read(f.path(name(1)).join("x")).unwrap(), b"1");
    assert_eq!(f.names("").len(), 2);
    f.memory.remove(&name(1));
    f.mount.announce(&[&name(1)]);
    assert!(!f.path(name(1)).exists());
    assert_eq!(f.names(""), [OsString::from(name(2))]);
    // Registered again with other contents.
    f.memory.publish(
        &name(1),
        f.memory
            .directory(vec![(b"x", f.memory.file(b"other", false))]),
    );
    assert_eq!(std::fs::read(f.path(name(1)).join("x")).unwrap(), b"other");
}

#[test]
fn names_below_are_asked_for_once() {
    let Some(f) = Fixture::new() else { return };
    f.memory.publish(&name(1), f.memory.directory(vec![]));
    for _ in 0..100 {
        assert!(!f.path(name(1)).join("absent").exists());
    }
    assert_eq!(f.memory.0.lock().unwrap().finds, 1);
}

#[test]
fn the_kernel_forgets_all_and_so_do_we() {
    let Some(f) = Fixture::new() else { return };
    let mut entries = Vec::new();
    for number in 0..3000u64 {
        entries.push((
            format!("f{number}"),
            f.memory.file(&number.to_le_bytes(), false),
        ));
    }
    let directory = f.memory.directory(
        entries
            .iter()
            .map(|(n, e)| (n.as_bytes(), e.clone()))
            .collect(),
    );
    f.memory.publish(
        &name(1),
        f.memory
            .directory(vec![(b"a", directory.clone()), (b"b", directory)]),
    );
    for _ in 0..3 {
        let out = Command::new("ls")
            .arg("-lR")
            .arg(f.dir.path())
            .output()
            .unwrap();
        assert!(out.status.success());
        // Fewer if the kernel has dropped some by itself: other tests drop its caches, too.
        let inodes = f.mount.inode_count();
        assert!(
            inodes <= 3003,
            "files that are equal are one inode: {inodes} of them"
        );
        eventually("no inode left", || {
            drop_caches();
            f.mount.inode_count() == 0
        });
    }
}

#[test]
fn a_bad_frame_is_eio_and_the_rest_goes_on() {
    let Some(f) = Fixture::new() else { return };
    let m = &f.memory;
    let node = m.directory(vec![
        (b"bad", m.special("bad", Data::Damaged, 10)),
        (b"short", m.special("short", Data::Short, 10)),
        (b"panic", m.special("panic", Data::Panics, 10)),
        (b"good", m.file(b"good", false)),
        (
            b"lost",
            Node::Directory {
                digest: Digest([9; 32]),
                size: 0,
            },
        ),
    ]);
    m.publish(&name(1), node);
    let p = f.path(name(1));
    let eio = Some(rustix::io::Errno::IO.raw_os_error());
    for _ in 0..10 {
        for bad in ["bad", "short", "panic"] {
            assert_eq!(
                std::fs::read(p.join(bad)).unwrap_err().raw_os_error(),
                eio,
                "{bad}"
            );
        }
        assert_eq!(
            std::fs::read_dir(p.join("lost"))
                .and_then(|mut d| d.next().unwrap().map(drop))
                .unwrap_err()
                .raw_os_error(),
            eio
        );
        assert_eq!(std::fs::read(p.join("good")).unwrap(), b"good");
    }
    assert!(f.mount.is_serving());
}
