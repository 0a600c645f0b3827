//! What users see when something is wrong: message, hint, exit code.

use super::Sandbox;

#[track_caller]
fn check(sandbox: &Sandbox, arguments: &[&str], code: i32, stderr: &str) {
    let ran = sandbox.run(arguments);
    assert_eq!(
        (ran.stderr.as_str(), ran.code, ran.stdout.as_str()),
        (stderr, code, ""),
        "{arguments:?}"
    );
}

#[test]
fn there_is_no_store() {
    let sandbox = Sandbox::new();
    for arguments in [
        &["info", "x"][..],
        &["stats"],
        &["check"],
        &["gc"],
        &["mount", "."],
    ] {
        let text = "error: there is no store in [DIR]/s\n\
                    hint: create one with `understory --store [DIR]/s init`\n";
        check(&sandbox, arguments, 1, text);
    }
    let text = "error: no instance runs for [DIR]/s\nhint: start one with `understory up`\n";
    check(&sandbox, &["status"], 3, text);
    check(&sandbox, &["down"], 0, "nothing was running\n");
}

#[test]
fn not_a_valid_path() {
    let sandbox = Sandbox::new();
    sandbox.ok(&["init"]);
    let absent =
        "hint: it is not in this store: add it with `understory import` or `understory add`\n";
    let full = "/nix/store/00000000000000000000000000000000-x";
    for name in [
        full,
        "00000000000000000000000000000000-x",
        "/nix/store/00000000000000000000000000000000-x/bin",
    ] {
        check(
            &sandbox,
            &["ls", name],
            1,
            &format!("error: path '{full}' is not valid\n{absent}"),
        );
    }
    check(
        &sandbox,
        &["info", "00000000000000000000000000000000"],
        1,
        "error: no valid path has the hash part 00000000000000000000000000000000\n",
    );
    check(
        &sandbox,
        &["cat", "hello"],
        1,
        "error: hello is not a store path\n\
         hint: name it as /nix/store/<hash>-<name>, as <hash>-<name> or by its hash part\n",
    );
}

#[test]
fn a_store_is_there_already() {
    let sandbox = Sandbox::new();
    check(
        &sandbox,
        &["init"],
        0,
        "created a store for /nix/store in [DIR]/s\n",
    );
    check(
        &sandbox,
        &["init"],
        1,
        "error: [DIR]/s is a store already\n",
    );
}

#[test]
fn wrong_usage() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["frobnicate"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr
            .starts_with("error: unrecognized subcommand 'frobnicate'"),
        "{}",
        ran.stderr
    );
    check(
        &sandbox,
        &["import", "/"],
        2,
        "error: nothing is named to be imported\nhint: name store paths of the source, or use --all\n",
    );
    let ran = sandbox.run(&["gc", "--max-freed", "1Q"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr
            .contains("unknown unit \"Q\", expected K, M, G or T"),
        "{}",
        ran.stderr
    );
}

#[test]
fn what_is_below_a_path() {
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "x");
    check(
        &sandbox,
        &["cat", &format!("{path}/nothing")],
        1,
        &format!("error: {path}/nothing does not exist\n"),
    );
    check(
        &sandbox,
        &["cat", &format!("{path}/bin")],
        1,
        &format!("error: {path}/bin is a directory\nhint: list it with `understory ls`\n"),
    );
    check(
        &sandbox,
        &["cat", &format!("{path}/link")],
        1,
        &format!("error: {path}/link is a symlink\nhint: it points to file\n"),
    );
    check(
        &sandbox,
        &["cat", &format!("{path}/file/x")],
        1,
        &format!("error: {path}/file is not a directory\n"),
    );
    check(
        &sandbox,
        &["delete", &format!("{path}/file")],
        1,
        &format!(
            "error: {path}/file is below a store path; the store path itself is expected\nhint: use {path}\n"
        ),
    );
}

#[test]
fn a_directory_that_cannot_stand_in_a_url() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["up", "--state", "a b"]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains(
            "holds ' ', which Nix's local-overlay store cannot handle in all its versions"
        ),
        "{}",
        ran.stderr
    );
    assert!(!sandbox.store().exists(), "nothing is created");
}

#[test]
fn colour_only_where_it_is_wanted() {
    let sandbox = Sandbox::new();
    assert!(!sandbox.run(&["status"]).stderr.contains('\x1b'));
    let ran = sandbox.run(&["--color", "always", "status"]);
    assert!(
        ran.stderr
            .starts_with("\x1b[1;31merror:\x1b[0m no instance runs"),
        "{:?}",
        ran.stderr
    );
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", &"x".repeat(1 << 20));
    let mut child = sandbox
        .command()
        .args(["cat", &format!("{path}/file")])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ran = sandbox.ran(&child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
}

#[test]
fn adopt_refuses_what_it_cannot_take() {
    let sandbox = Sandbox::new();
    check(
        &sandbox,
        &["adopt", "."],
        1,
        "error: there is no local Nix store in [DIR]: [DIR]/nix/var/nix/db/db.sqlite is not there\n\
         hint: name the directory that holds nix/store and nix/var/nix\n",
    );
    let db = sandbox.path().join("nix/var/nix/db");
    std::fs::create_dir_all(&db).unwrap();
    std::fs::create_dir_all(sandbox.path().join("nix/store")).unwrap();
    std::fs::write(db.join("db.sqlite"), "").unwrap();
    std::fs::write(db.join("schema"), "7").unwrap();
    check(
        &sandbox,
        &["adopt", ".", "--yes"],
        1,
        "error: [DIR]/nix/var/nix/db/db.sqlite has schema 7, expected 10\n\
         hint: open the store once with a current Nix, which brings it up to date\n",
    );
    std::fs::write(db.join("schema"), "10").unwrap();
    check(
        &sandbox,
        &["adopt", ".", "--undo", "--yes"],
        1,
        "error: the castore in [DIR]/s has not adopted [DIR]/nix/store\n\
         hint: --store names the castore that was used\n",
    );
    check(
        &sandbox,
        &["adopt", ".", "--undo"],
        2,
        "error: nothing was done: this needs a yes\nhint: add --yes where nobody can be asked\n",
    );
    assert!(!sandbox.store().exists());
}
