//! Snapshots of all help texts, and what is generated from the same definition.

use super::Sandbox;

const COMMANDS: [&str; 31] = [
    "init",
    "import",
    "add",
    "adopt",
    "up",
    "down",
    "upgrade",
    "status",
    "top",
    "doctor",
    "shell",
    "mount",
    "generation",
    "serve",
    "overlay",
    "config",
    "info",
    "ls",
    "cat",
    "export",
    "image",
    "roots",
    "gc",
    "repack",
    "delete",
    "stats",
    "check",
    "demo",
    "bench",
    "completions",
    "man",
];

#[test]
fn help_of_every_command() {
    let sandbox = Sandbox::new();
    insta::assert_snapshot!("help", sandbox.ok(&["--help"]));
    for command in COMMANDS.iter().filter(|c| **c != "bench") {
        insta::assert_snapshot!(format!("help-{command}"), sandbox.ok(&[command, "--help"]));
    }
}

#[test]
fn the_main_help_lists_every_command() {
    let sandbox = Sandbox::new();
    let help = sandbox.ok(&["-h"]);
    let listed: Vec<&str> = help
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    assert_eq!(listed, COMMANDS);
}

#[test]
fn completions_and_manual_pages() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = sandbox.ok(&["completions", shell]);
        assert!(script.contains("trusted-public-keys"), "{shell}");
        assert!(
            !script.contains("__enter"),
            "{shell}: internal commands are not offered"
        );
    }
    assert!(sandbox.ok(&["man"]).starts_with(".ie"));
    sandbox.ok(&["man", "--dir", "man"]);
    let mut pages: Vec<String> = std::fs::read_dir(sandbox.path().join("man"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    assert!(pages.contains(&"understory-up.1".to_owned()), "{pages:?}");
    assert!(!pages.iter().any(|p| p.contains("__enter")), "{pages:?}");
}

#[test]
fn version() {
    assert_eq!(
        Sandbox::new().ok(&["--version"]),
        format!("understory {}", env!("CARGO_PKG_VERSION"))
    );
}
