//! Processes of an instance that are killed, hang, crash or are upgraded, seen by those who use it.

use super::Sandbox;
use super::mute::Mute;
use super::support::{
    Down, base, may_mount, may_mount_images, read_while, record, replace, send, shown, up, up_with,
    wait_for_end, wait_for_more, wait_until, worker,
};
use rustix::process::Signal;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use understory::daemon::{Client, ClientOptions};
use understory::supervisor::Role;

/// An instance with a file that is read.
fn with_file(sandbox: &Sandbox, line: &str, count: usize, arguments: &[&str]) -> (PathBuf, String) {
    let contents = line.repeat(count);
    let path = sandbox.add_tree("tree", &contents);
    up_with(sandbox, arguments);
    (shown(sandbox, &path).join("file"), contents)
}

#[test]
fn readers_of_an_image_wait_for_the_next_mount_server() {
    if !may_mount_images() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let line = "a line that is read from an image\n";
    let (file, contents) = with_file(&sandbox, line, 100_000, &["--mount", "image"]);
    let status = sandbox.ok(&["status"]);
    assert!(
        status.contains("on        an image, generation 1: "),
        "{status}"
    );
    read_while(&file, &contents, |reads| {
        for _ in 0..10 {
            replace(&sandbox, Role::Mount, Signal::KILL);
            wait_for_more(reads);
        }
    });
    // What comes later is there, too.
    let newer = sandbox.add_tree("newer", "new");
    let found = std::fs::read_to_string(shown(&sandbox, &newer).join("file")).unwrap();
    assert_eq!(found, "new");
}

#[test]
fn readers_wait_for_the_next_mount_server() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let line = "a line that is read\n";
    let (file, contents) = with_file(&sandbox, line, 100_000, &["--watchdog", "1"]);
    let reads = read_while(&file, &contents, |reads| {
        for _ in 0..10 {
            wait_for_more(reads);
            replace(&sandbox, Role::Mount, Signal::KILL);
        }
        // One that hangs is seen by the watchdog.
        replace(&sandbox, Role::Mount, Signal::STOP);
    });
    assert!(reads > 10, "{reads}");
    let status = sandbox.json(&["status"]);
    assert_eq!(status["supervisor"]["workers"][0]["restarts"], 11);
    assert_eq!(status["supervisor"]["workers"][0]["last_end"], "signal 9");
    // What is published now is shown.
    let later = sandbox.add_tree("later", "later\n");
    let names = std::fs::read_dir(sandbox.store().join("mnt")).unwrap();
    assert!(
        names
            .flatten()
            .any(|entry| entry.file_name() == base(&later))
    );
}

#[test]
fn a_mount_server_that_no_signal_reaches_is_gone_on_without() {
    if !may_mount_images() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let paths: Vec<String> = (0..20)
        .map(|number| sandbox.add_tree(&format!("t{number}"), &format!("file {number}\n")))
        .collect();
    up_with(&sandbox, &["--mount", "image", "--watchdog", "1"]);
    let first = worker(&sandbox, Role::Mount, None);
    // Where it looks when some files were begun: it waits there for a file system that does not answer.
    let mut mute = Mute::mount(&sandbox.store().join("generations"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (number, path) in paths.iter().enumerate() {
                let found = std::fs::read_to_string(shown(&sandbox, path).join("file"));
                assert_eq!(found.unwrap(), format!("file {number}\n"));
            }
        });
        // Not somebody who looks for new generations.
        while !mute.hear().starts_with("fuse-") {}
        mute.detach();
    });
    let status = sandbox.json(&["status"]);
    let mount_server = &status["supervisor"]["workers"][0];
    assert_eq!(mount_server["last_end"], "a kill that it does not follow");
    assert_eq!(mount_server["restarts"], 1);
    // A thread of it lives, so nobody can have it taken off the list of processes.
    let left = PathBuf::from(format!("/proc/{first}"));
    assert!(left.exists());
    drop(mute);
    wait_until(|| !left.exists(), || format!("process {first} stays"));
}

#[test]
fn clients_that_connect_while_there_is_no_daemon_wait() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    up(&sandbox);
    for _ in 0..3 {
        send(worker(&sandbox, Role::Daemon, None), Signal::KILL);
        for socket in ["run/daemon.sock", "run/overlay.sock"] {
            understory::up::ping(&sandbox.store().join(socket)).unwrap();
        }
    }
    sandbox.ok(&["status"]);
}

#[test]
fn an_upgrade_keeps_connections_and_mounts() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let (file, contents) = with_file(&sandbox, "upgraded\n", 10_000, &[]);
    let stream = UnixStream::connect(sandbox.store().join("run/overlay.sock")).unwrap();
    let mut client = Client::handshake(stream, &ClientOptions::default()).unwrap();
    let before = record(&sandbox).unwrap();
    read_while(&file, &contents, |_| {
        sandbox.ok(&["-q", "upgrade"]);
    });
    let after = record(&sandbox).unwrap();
    assert_eq!((after.pid, after.upgrades), (before.pid, 1));
    let old = before.worker(Role::Daemon).unwrap().pid.unwrap();
    assert_eq!(after.draining, [old], "it has a client");
    client
        .query_path_from_hash_part(&"0".repeat(32))
        .expect("the old daemon serves it");
    drop(client);
    wait_until(
        || record(&sandbox).unwrap().draining.is_empty(),
        || "the old daemon stays without clients".to_owned(),
    );
}

#[test]
fn an_instance_whose_mount_server_always_crashes_gives_up_and_says_so() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    up(&sandbox);
    let supervisor = record(&sandbox).unwrap().pid;
    let mut pid = None;
    for _ in 1..understory::supervisor::CRASHES_MAX {
        let next = worker(&sandbox, Role::Mount, pid);
        send(next, Signal::ABORT);
        pid = Some(next);
    }
    send(worker(&sandbox, Role::Mount, pid), Signal::ABORT);
    // It says why at the very end, after all is undone.
    wait_for_end(supervisor);
    assert_eq!(record(&sandbox), None);
    assert_eq!(sandbox.run(&["status"]).code, 3);
    let log = std::fs::read_to_string(sandbox.store().join("run/up.log")).unwrap();
    assert!(
        log.contains("the mount worker has ended 5 times within 10 s, at last by signal 6"),
        "{log}"
    );
    assert!(
        std::fs::read_dir(sandbox.store().join("mnt"))
            .unwrap()
            .next()
            .is_none()
    );
}

#[test]
fn a_program_that_does_not_serve_is_not_upgraded_to() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let (file, contents) = with_file(&sandbox, "not upgraded\n", 10_000, &[]);
    let broken = sandbox.path().join("broken");
    std::fs::write(&broken, "#!/bin/sh\nexit 7\n").unwrap();
    let program = broken.to_str().unwrap();
    for (mode, why) in [
        (0o755, "worker: it ended by exit code 7"),
        (0o644, "starting a worker from"),
    ] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&broken, PermissionsExt::from_mode(mode)).unwrap();
        read_while(&file, &contents, |_| {
            let ran = sandbox.run(&["upgrade", "--to", program]);
            assert_eq!(ran.code, 3, "{}", ran.stderr);
            assert!(
                ran.stderr.contains("the new program does not serve: ") && ran.stderr.contains(why),
                "{}",
                ran.stderr
            );
        });
        for socket in ["run/daemon.sock", "run/overlay.sock"] {
            understory::up::ping(&sandbox.store().join(socket)).unwrap();
        }
    }
    // One that serves is upgraded to after that.
    sandbox.ok(&["-q", "upgrade"]);
    assert_eq!(record(&sandbox).unwrap().failed_upgrade, None);
}

#[test]
fn workers_of_a_detached_instance_find_files_that_were_named_relatively() {
    if !may_mount() {
        return;
    }
    for flag in [&["--config", "own.toml"][..], &["--config=own.toml"], &[]] {
        let sandbox = Sandbox::new();
        std::fs::write(sandbox.path().join("own.toml"), "trusted-users = [\"x\"]\n").unwrap();
        let _down = Down(&sandbox);
        let mut command = sandbox.command();
        command.args(["-q", "up", "--detach"]).args(flag);
        if flag.is_empty() {
            command.env("UNDERSTORY_CONFIG", "own.toml");
        }
        let ran = sandbox.ran(&command.output().unwrap());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        // The next one starts in another directory.
        replace(&sandbox, Role::Daemon, Signal::KILL);
        understory::up::ping(&sandbox.store().join("run/overlay.sock")).unwrap();
    }
}
