//! `up` and its relatives on the real kernel: mounts, sockets, namespaces. Needs FUSE and overlayfs.

use super::support::{
    Down, base, collect, may_mount, record, send, shown, up, up_with, wait_for_end, wait_until,
};
use super::{Ran, Sandbox};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn is_mounted(path: &Path) -> bool {
    understory::mount::mountinfo::mount_at(path)
        .unwrap()
        .is_some()
}

#[test]
fn up_and_down() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let _down = Down(&sandbox);
    let said = up(&sandbox).stdout;
    let url = "local-overlay://?root=[DIR]/s/merged&lower-store=unix%3A//[DIR]/s/run/daemon.sock\
               %3Freal%3D[DIR]/s/mnt&upper-layer=[DIR]/s/upper";
    // Nix's own check fails once the overlay stands on an image.
    let unchecked = match understory::namespace::in_user_namespace() {
        true => "",
        false => "&check-mount=false",
    };
    let url = &format!("{url}{unchecked}");
    let remote = "unix://[DIR]/s/run/overlay.sock?root=[DIR]/s/merged";
    assert_eq!(
        said,
        format!(
            "export NIX_REMOTE='{remote}'\n\n\
             # Instead, Nix 2.26 or newer can open the same store by itself; for nix.conf:\n\
             #   experimental-features = nix-command local-overlay-store\n\
             #   store = {url}\n"
        )
    );
    let (merged, tree) = (sandbox.merged(), shown(&sandbox, &path));
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "hello\n");
    let tool = Command::new(tree.join("bin/tool")).output().unwrap();
    assert_eq!(tool.stdout, b"ran\n");

    let status = sandbox.json(&["status"]);
    assert_eq!(status["running"], true);
    assert_eq!(status["socketAnswers"], true);
    assert_eq!(status["overlaySocketAnswers"], true);
    assert_eq!(
        status["nixRemote"]
            .as_str()
            .unwrap()
            .replace(sandbox.path().to_str().unwrap(), "[DIR]"),
        remote
    );
    assert_eq!(status["instance"]["private"], false);
    let pid = status["instance"]["pid"].as_u64().unwrap();
    let again = sandbox.run(&["-q", "up"]);
    assert_eq!(again.code, 1);
    assert_eq!(
        again.stderr,
        format!(
            "error: an instance runs for [DIR]/s already: process {pid}\n\
             hint: see `understory status`; stop it with `understory down`, or use another --state\n"
        )
    );
    // What is added on top lands in the upper directory.
    fs::write(merged.join("on-top"), "x").unwrap();
    assert_eq!(
        fs::read_to_string(sandbox.store().join("upper/on-top")).unwrap(),
        "x"
    );
    // Deleting below a mounted overlay would make its files fail.
    let refused = sandbox.run(&["delete", &path]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("run `understory down` first"),
        "{}",
        refused.stderr
    );

    let began = Instant::now();
    assert_eq!(
        sandbox.run(&["down"]).stderr,
        format!("stopped process {pid}\n")
    );
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert!(!is_mounted(&merged) && !is_mounted(&sandbox.store().join("mnt")));
    for socket in ["daemon.sock", "overlay.sock", "control.sock"] {
        assert!(
            !sandbox.store().join("run").join(socket).exists(),
            "{socket}"
        );
    }
    assert_eq!(sandbox.run(&["status"]).code, 3);
    // The upper layer stays.
    up(&sandbox);
    assert_eq!(fs::read_to_string(merged.join("on-top")).unwrap(), "x");
}

#[test]
fn a_name_that_was_looked_up_before_it_was_published() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    // Find out the path first.
    let path = sandbox.add_tree("tree", "later\n");
    sandbox.ok(&["-q", "delete", &path]);
    let _down = Down(&sandbox);
    up(&sandbox);
    let file = shown(&sandbox, &path).join("file");
    for _ in 0..3 {
        assert!(!file.exists());
    }
    assert_eq!(sandbox.add_tree("tree", "later\n"), path);
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "later\n",
        "at once, not after a time"
    );
    let status = sandbox.json(&["status"]);
    assert_eq!(status["instance"]["published"], 1);
    assert_eq!(
        status["instance"]["remounts"], 1,
        "this kernel hides the name until a remount"
    );
}

#[test]
fn two_overlays_over_one_store() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.ok(&["init"]);
    let states = ["a", "b"].map(|name| sandbox.path().join(name));
    let mut clients = Vec::new();
    for state in &states {
        let state = state.to_str().unwrap();
        up_with(&sandbox, &["--state", state]);
        clients.push(state.to_owned());
    }
    let path = sandbox.add_tree("tree", "x");
    for state in &states {
        let merged = state.join("merged/nix/store");
        assert!(merged.join(base(&path)).join("file").exists());
        fs::write(merged.join("on-top"), state.to_str().unwrap()).unwrap();
    }
    assert!(!sandbox.store().join("upper").exists());
    let refused = sandbox.run(&["delete", &path]);
    for state in &clients {
        let status = sandbox.json(&["status", "--state", state]);
        assert_eq!(status["instance"]["published"], 1);
        assert_eq!(sandbox.run(&["down", "--state", state]).code, 0);
    }
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    sandbox.ok(&["delete", &path]);
}

#[test]
fn gc_beside_an_instance_deletes_names_when_nobody_uses_its_overlay() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    let kept = sandbox.add_tree("kept", "x");
    let link = sandbox.path().join("root");
    sandbox.ok(&["-q", "root", "add", &kept, link.to_str().unwrap()]);
    let contents = "y".repeat(300_000);
    let dead = sandbox.add_tree("dead", &contents);
    up(&sandbox);
    let file = shown(&sandbox, &dead).join("file");
    {
        let _open = fs::File::open(shown(&sandbox, &kept).join("file")).unwrap();
        let ran = sandbox.run(&["--json", "gc"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let stay = "warning: dead paths stay: an overlay is mounted over this store";
        assert!(ran.stderr.contains(stay), "{}", ran.stderr);
        let why = "something in the overlay is open or runs";
        assert!(ran.stderr.contains(why), "{}", ran.stderr);
        let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["paths"], serde_json::json!([]), "{report}");
        assert_eq!(fs::read_to_string(&file).unwrap(), contents);
    }
    {
        // One that somebody has made, as for stock Nix.
        let dirs = ["u", "w", "m"].map(|name| sandbox.path().join(name));
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let [upper, work, merged] = dirs.each_ref().map(|dir| dir.display().to_string());
        let lower = sandbox.store().join("mnt");
        let options = format!(
            "lowerdir={},upperdir={upper},workdir={work}",
            lower.display()
        );
        let mount = ["-t", "overlay", "overlay", "-o", &options, &merged];
        let mounted = std::process::Command::new("mount").args(mount).status();
        assert!(mounted.unwrap().success());
        // Or a mount namespace of another test has a copy of ours.
        wait_until(
            || {
                let ran = sandbox.run(&["gc"]);
                assert!(ran.stderr.contains("dead paths stay"), "{}", ran.stderr);
                ran.stderr.contains("another overlay stands on its mounts")
            },
            || "it is not seen".to_owned(),
        );
        let unmounted = std::process::Command::new("umount").arg(&merged).status();
        assert!(unmounted.unwrap().success());
        assert_eq!(fs::read_to_string(&file).unwrap(), contents);
    }
    let report = collect(&sandbox, &["--min-dead", "1"]);
    assert_eq!(report["paths"], serde_json::json!([dead]), "{report}");
    assert!(
        report["content"]["freedPieces"].as_u64() > Some(0),
        "{report}"
    );
    let error = fs::metadata(shown(&sandbox, &dead)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    let names = || {
        let entries = fs::read_dir(sandbox.merged()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| !name.starts_with('.'))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(), [base(&kept)]);
    sandbox.ok(&["-q", "repack", "--level", "9"]);
    assert_eq!(
        fs::read_to_string(shown(&sandbox, &kept).join("file")).unwrap(),
        "x"
    );
    // It may come again.
    assert_eq!(sandbox.add_tree("dead", &contents), dead);
    assert_eq!(fs::read_to_string(&file).unwrap(), contents);
    assert_eq!(names().len(), 2);
}

fn kill_instance(sandbox: &Sandbox) {
    let pid = record(sandbox).unwrap().pid;
    send(pid, Signal::KILL);
    wait_for_end(pid);
}

#[test]
fn up_mends_what_a_killed_instance_left() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let _down = Down(&sandbox);
    up(&sandbox);
    kill_instance(&sandbox);
    let status = sandbox.run(&["status"]);
    assert_eq!(status.code, 3, "{}", status.stdout);
    let doctor = sandbox.run(&["--json", "doctor"]);
    assert_eq!(doctor.code, 3, "{}", doctor.stdout);
    let checks: serde_json::Value = serde_json::from_str(&doctor.stdout).unwrap();
    let of = |id: &str| {
        checks["checks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["id"] == id)
            .unwrap()
            .clone()
    };
    assert_eq!(of("lower-mount")["level"], "fail");
    assert_eq!(
        of("lower-mount")["found"],
        "[DIR]/s/mnt is a dead mount: its server is gone"
    );
    assert_eq!(
        of("socket")["found"],
        "[DIR]/s/run/daemon.sock is stale: nobody listens"
    );
    up(&sandbox);
    let file = shown(&sandbox, &path).join("file");
    assert_eq!(fs::read_to_string(file).unwrap(), "hello\n");
    // The same by `down`.
    kill_instance(&sandbox);
    let down = sandbox.run(&["down"]);
    assert_eq!(down.code, 0, "{}", down.stderr);
    assert!(
        down.stderr
            .contains("removed the dead mount on [DIR]/s/mnt"),
        "{}",
        down.stderr
    );
    assert!(!is_mounted(&sandbox.store().join("mnt")));
}

#[test]
fn a_foreign_mount_is_refused() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.ok(&["init"]);
    let at = sandbox.store().join("mnt");
    fs::create_dir_all(&at).unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(&at)
            .status()
            .unwrap()
            .success()
    );
    let ran = sandbox.run(&["-q", "up"]);
    let doctor = sandbox.run(&["doctor"]);
    assert!(Command::new("umount").arg(&at).status().unwrap().success());
    assert_eq!(ran.code, 3);
    assert_eq!(
        ran.stderr,
        "error: a foreign mount of type tmpfs is on [DIR]/s/mnt\n\
         hint: unmount it with `umount [DIR]/s/mnt`, or choose another place with --state or --merged\n"
    );
    assert_eq!(doctor.code, 3);
    assert!(
        doctor
            .stdout
            .contains("FAIL  lower-mount     [DIR]/s/mnt is a foreign mount"),
        "{}",
        doctor.stdout
    );
}

#[test]
fn serve_mounts_before_it_listens_and_ends_at_sigterm() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let (mount, socket) = (sandbox.path().join("m"), sandbox.path().join("sock"));
    let mut child = sandbox
        .command()
        .args(["-q", "serve", "--mount"])
        .arg(&mount)
        .arg("--socket")
        .arg(&socket)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(child.try_wait().unwrap().is_none(), "the daemon died");
        std::thread::yield_now();
    }
    let file = mount.join(base(&path)).join("file");
    assert_eq!(fs::read_to_string(file).unwrap(), "hello\n");
    understory::up::ping(&socket).unwrap();
    let began = Instant::now();
    Command::new("kill")
        .arg(child.id().to_string())
        .status()
        .unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert!(!is_mounted(&mount) && !socket.exists());
}

#[test]
fn shell_shows_the_merged_store_at_its_place() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let had_nix = Path::new("/nix").exists();
    // Other tests mount at the same time.
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own =
            |line: &&str| line.contains(sandbox.path().to_str().unwrap()) || line.contains(" /nix");
        all.lines()
            .filter(own)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    // Without an instance one is started for the time being.
    assert_eq!(
        sandbox.ok(&["-q", "shell", "cat", &format!("{path}/file")]),
        "hello"
    );
    assert_eq!(
        sandbox.ok(&["-q", "shell", &format!("{path}/bin/tool")]),
        "ran"
    );
    assert_eq!(sandbox.run(&["-q", "shell", "sh", "-c", "exit 7"]).code, 7);
    assert_eq!(
        sandbox.run(&["-q", "shell", "sh", "-c", "kill -9 $$"]).code,
        137
    );
    let ran = sandbox.run(&["-q", "shell", "/does/not/exist"]);
    assert_eq!(
        (ran.code, ran.stderr.contains("running /does/not/exist")),
        (3, true),
        "{}",
        ran.stderr
    );
    // In the same directory, with the store as Nix wants it.
    assert_eq!(sandbox.ok(&["-q", "shell", "pwd"]), "[DIR]");
    let remote = sandbox.ok(&["-q", "shell", "sh", "-c", "echo $NIX_REMOTE"]);
    assert_eq!(remote, "unix://[DIR]/s/run/overlay.sock");
    // What is added stays, unless it is asked for otherwise.
    sandbox.ok(&["-q", "shell", "touch", "/nix/store/kept"]);
    sandbox.ok(&["-q", "shell", "--ephemeral", "touch", "/nix/store/gone"]);
    let base = base(&path);
    assert_eq!(
        sandbox.ok(&["-q", "shell", "ls", "/nix/store"]),
        format!("{base}\nkept")
    );
    // In a running instance.
    let _down = Down(&sandbox);
    up(&sandbox);
    let before = mounts();
    assert_eq!(
        sandbox.ok(&["-q", "shell", "ls", "/nix/store"]),
        format!("{base}\nkept")
    );
    assert_eq!(mounts(), before, "nothing changed outside");
    assert_eq!(Path::new("/nix").exists(), had_nix);
}

/// Runs a script as user 1000, in a mount namespace where everybody may open /dev/fuse, as with udev.
fn as_user(sandbox: &Sandbox, script: &str) -> Ran {
    fs::set_permissions(
        sandbox.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    // The program may lie where only root can go.
    let program = sandbox.path().join("understory");
    fs::copy(env!("CARGO_BIN_EXE_understory"), &program).unwrap();
    let setup = format!(
        "set -e; cd {dir}; mknod -m 666 fuse c 10 229; mount --bind fuse /dev/fuse\n\
         export HOME={dir} PATH={dir}:$PATH UNDERSTORY_STORE={dir}/u\n\
         exec setpriv --reuid 1000 --regid 1000 --clear-groups sh -ec \"$0\"",
        dir = sandbox.path().display()
    );
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &setup,
            script,
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    sandbox.ran(&output)
}

#[test]
fn everything_works_without_root() {
    if !may_mount() {
        return;
    }
    if fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|n| n.trim() == "0") {
        understory_testkit::skip("needs user namespaces");
        return;
    }
    let sandbox = Sandbox::new();
    let script = r#"
        mkdir tree; echo hello > tree/file
        p=$(understory -q add tree)
        understory -q up --detach > out
        grep -q "^export NIX_REMOTE='unix://" out
        understory status --json | grep -q '"private": true'
        understory -q shell cat $p/file
        understory -q shell touch /nix/store/on-top
        understory -q shell ls /nix/store/later 2> err || echo absent
        echo later > later
        q=$(understory -q add later)
        understory -q shell cat $q
        ls u/upper
        understory doctor > doctor.out || cat doctor.out
        understory down
        understory -q shell --ephemeral cat $p/file
        understory status 2> err || echo "exit code $?"
        understory -q shell id -u
    "#;
    let ran = as_user(&sandbox, script);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert_eq!(
        ran.stdout, "hello\nabsent\nlater\non-top\nhello\nexit code 3\n0\n",
        "{}",
        ran.stderr
    );
    let pid = ran
        .stderr
        .lines()
        .find_map(|l| l.strip_prefix("stopped process "))
        .unwrap_or_else(|| panic!("{}", ran.stderr));
    // It has closed everything; a moment later it is gone, too.
    wait_for_end(pid.parse().unwrap());
}

#[test]
fn the_demo_cleans_up() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    for i in 0..20 {
        let dir = sandbox.path().join(format!("from/{}/{i}", i % 4));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), format!("file {i}\n").repeat(100)).unwrap();
    }
    fs::create_dir(sandbox.path().join("tmp")).unwrap();
    let said = sandbox.json(&["-q", "demo", "--dir", "tmp", "from"]);
    assert_eq!(
        (said["trees"].as_u64(), said["files"].as_u64()),
        (Some(4), Some(20))
    );
    assert_eq!(fs::read_dir(sandbox.path().join("tmp")).unwrap().count(), 0);
    // Also when it fails.
    let ran = sandbox.run(&["-q", "demo", "--dir", "tmp", "nowhere"]);
    assert_eq!(
        (
            ran.code,
            ran.stderr.contains("no directory that fits is in nowhere")
        ),
        (1, true),
        "{}",
        ran.stderr
    );
    assert_eq!(fs::read_dir(sandbox.path().join("tmp")).unwrap().count(), 0);
}
