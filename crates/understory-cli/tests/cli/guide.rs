//! The guides' commands run as they are written: blocks marked `sh` are run, one shell for each guide.

use super::Sandbox;
use super::support::may_mount;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

fn blocks(guide: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../docs/guide")
        .join(guide);
    let text = fs::read_to_string(path).unwrap();
    let mut script = String::new();
    for block in text.split("```sh\n").skip(1) {
        script.push_str(block.split("```").next().unwrap());
    }
    assert!(!script.is_empty(), "{guide} has no commands");
    script
}

fn run(guide: &str) -> String {
    let sandbox = Sandbox::new();
    let bin = Path::new(env!("CARGO_BIN_EXE_understory"))
        .parent()
        .unwrap();
    let path = std::env::join_paths(
        [bin.to_owned()]
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let output = Command::new("sh")
        .args(["-e", "-c", &blocks(guide)])
        .current_dir(sandbox.path())
        .env("PATH", path.unwrap())
        .env("UNDERSTORY_STORE", sandbox.store())
        .env("UNDERSTORY_SUBSTITUTERS", "")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let ran = sandbox.ran(&output);
    sandbox.run(&["-q", "down"]);
    assert_eq!(ran.code, 0, "{guide}: {}{}", ran.stdout, ran.stderr);
    ran.stdout
}

#[test]
fn generations() {
    let said = run("generations.md");
    assert!(said.starts_with("1\n1  1 paths, "), "{said}");
}

#[test]
fn getting_started() {
    if may_mount() {
        let said = run("getting-started.md");
        assert!(said.contains("\nhello\n"), "{said}");
    }
}

#[test]
fn overlay_store() {
    if may_mount() {
        let said = run("overlay-store.md");
        assert!(said.contains("\nhello\n"), "{said}");
        assert!(said.contains("export NIX_REMOTE='unix://"), "{said}");
        assert!(said.contains("trusted-users = root @wheel  # "), "{said}");
    }
}

#[test]
fn importing() {
    let said = run("importing.md");
    assert!(said.contains("-builtins-to-file\n"), "{said}");
}

#[test]
fn images() {
    assert!(run("images.md").contains("the same bytes\n"));
}

#[test]
fn mount() {
    if may_mount() {
        let said = run("mount.md");
        assert!(said.contains("hello\n"), "{said}");
        assert!(said.contains("only the greeting\n"), "{said}");
    }
}

#[test]
fn observability() {
    if may_mount() {
        assert!(run("observability.md").contains("metrics   unix:"));
    }
}

#[test]
fn daemon() {
    run("daemon.md");
}

#[test]
fn every_check_of_doctor_is_in_the_guide() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["--json", "doctor"]);
    let said: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/troubleshooting.md");
    let text = fs::read_to_string(guide).unwrap();
    for check in said["checks"].as_array().unwrap() {
        let id = check["id"].as_str().unwrap();
        assert!(text.contains(&format!("`{id}`")), "{id}");
    }
}
