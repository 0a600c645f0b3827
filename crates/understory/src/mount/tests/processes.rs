//! Mounts of other processes: this test program runs itself, with the part to play in a variable.

use super::*;
use crate::mount::{OverlayLayers, OverlayMount};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

const DIR: &str = "UNDERSTORY_TEST_CHILD_DIR";

fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os(DIR).map(Into::into)
}

/// The arguments that run the child's part `name`.
fn arguments(name: &str) -> [String; 4] {
    [
        format!("mount::tests::processes::{name}"),
        "--exact".into(),
        "--ignored".into(),
        "--nocapture".into(),
    ]
}

fn sample() -> Memory {
    let memory = Memory::default();
    let link = Node::Symlink {
        target: b"x"[..].into(),
    };
    memory.publish(
        &name(1),
        memory.directory(vec![(b"x", memory.file(b"child", false)), (b"l", link)]),
    );
    memory
}

#[test]
#[ignore = "a part of other tests"]
fn part_serve_until_killed() {
    let Some(dir) = child_dir() else { return };
    let mount = mount(&sample(), &dir).unwrap();
    println!("\nready");
    std::io::stdout().flush().unwrap();
    mount.wait();
}

#[test]
#[ignore = "a part of other tests"]
fn part_use_as_user() {
    let Some(dir) = child_dir() else { return };
    let own = rustix::process::geteuid().as_raw();
    for part in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(dir.join(part)).unwrap();
    }
    let mount = mount(&sample(), &dir.join("lower")).unwrap();
    let inside = dir.join("lower").join(name(1));
    assert_eq!(std::fs::read(inside.join("l")).unwrap(), b"child");
    let found = std::fs::symlink_metadata(inside.join("x")).unwrap();
    assert_eq!(
        (found.mode(), found.uid(), found.gid()),
        (0o100_444, 0, 0),
        "uid {own}"
    );
    if own == 0 {
        let layers = OverlayLayers {
            lowers: vec![dir.join("lower")],
            upper: dir.join("upper"),
            work: dir.join("work"),
        };
        let overlay = OverlayMount::mount(&layers, &dir.join("merged"), true).unwrap();
        let merged = dir.join("merged");
        assert_eq!(
            std::fs::read(merged.join(name(1)).join("x")).unwrap(),
            b"child"
        );
        std::fs::write(merged.join("new"), b"x").unwrap();
        std::fs::remove_dir_all(merged.join(name(1))).unwrap();
        assert!(!merged.join(name(1)).exists());
        assert!(overlay.is_hidden(OsStr::new(&name(1))).unwrap());
        overlay.remount().unwrap();
        assert!(merged.join("new").exists());
        // Below a living overlay and with an open file, without privileges to end the connection.
        let held = std::fs::File::open(inside.join("x")).unwrap();
        let start = Instant::now();
        mount.unmount().unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(1) && !mount.is_serving(),
            "{:?}",
            start.elapsed()
        );
        drop(held);
        overlay.unmount().unwrap();
    }
    mount.unmount().unwrap();
    assert!(!inside.exists());
    println!("\nall well as {own}");
}

fn serve(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(arguments("part_serve_until_killed"))
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    child
}

#[test]
fn a_mount_over_the_dead_one_of_a_killed_process() {
    let Some(f) = Fixture::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut child = serve(dir.path());
    assert_eq!(
        std::fs::read(dir.path().join(name(1)).join("x")).unwrap(),
        b"child"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let entry = crate::mount::mountinfo::mount_at(dir.path())
        .unwrap()
        .unwrap();
    assert!(!entry.is_alive());
    // The root's attributes may be remembered for a second.
    eventually("stat fails", || std::fs::metadata(dir.path()).is_err());
    f.memory.publish(&name(2), f.memory.file(b"alive", false));
    let again = mount(&f.memory, dir.path()).unwrap();
    assert_eq!(std::fs::read(dir.path().join(name(2))).unwrap(), b"alive");
    drop(again);
    assert!(
        std::fs::read_dir(dir.path()).unwrap().next().is_none(),
        "nothing is left below"
    );
}

/// Runs the child's part as uid 1000 where /dev/fuse may be opened by all, as on most machines.
fn as_user(within: &str) -> Option<String> {
    Fixture::new()?;
    let dir = tempfile::tempdir().unwrap();
    // The program may lie where that user has no access.
    let program = dir.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let script = format!(
        "set -e; cd {dir}; chmod 755 .; mkdir dev home; mount -t tmpfs -o mode=755 dev dev; mknod -m 666 dev/fuse c 10 229
         mount --bind dev/fuse /dev/fuse; chown 1000:1000 home; export {DIR}=$PWD/home HOME=$PWD/home
         exec setpriv --reuid=1000 --regid=1000 --clear-groups {within} ./program {}",
        arguments("part_use_as_user").join(" "),
        dir = dir.path().display(),
    );
    let out = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    Some(String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn in_a_user_namespace() {
    let Some(said) = as_user("unshare -Urm") else {
        return;
    };
    assert!(said.contains("all well as 0"), "{said}");
}

#[test]
fn by_a_user_with_fusermount3() {
    if Command::new("fusermount3").arg("-V").output().is_err() {
        understory_testkit::skip("there is no fusermount3");
        return;
    }
    let Some(said) = as_user("") else { return };
    assert!(said.contains("all well as 1000"), "{said}");
}

#[test]
fn without_the_device_the_error_says_what_to_do() {
    let Some(f) = Fixture::new() else { return };
    let script = format!(
        "mount -t tmpfs none /dev; exec {} {}",
        std::env::current_exe().unwrap().display(),
        arguments("part_use_as_user").join(" ")
    );
    let home = tempfile::tempdir().unwrap();
    let out = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", &script])
        .env(DIR, home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(said.contains("/dev/fuse is missing"), "{said}");
    assert!(
        said.contains("load the kernel module with `modprobe fuse`"),
        "{said}"
    );
    drop(f);
}

#[test]
fn without_fusermount3_the_error_says_what_to_install() {
    let Some(said) = as_user("env PATH=/nowhere") else {
        return;
    };
    assert!(
        said.contains("this user may not mount, and fusermount3 cannot be run"),
        "{said}"
    );
    assert!(
        said.contains("install the package fuse3, or run as root or in a user namespace"),
        "{said}"
    );
}
