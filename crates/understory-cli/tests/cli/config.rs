//! Settings: where they are read, and what `config` and `overlay` say.

use super::Sandbox;
use std::fs;

#[test]
fn settings_and_where_they_come_from() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path().join("etc-nix")).unwrap();
    fs::create_dir_all(sandbox.path().join("config/understory")).unwrap();
    fs::write(
        sandbox.path().join("etc-nix/nix.conf"),
        "extra-trusted-users = anna\nkeep-outputs = true\nmax-jobs = 3\n",
    )
    .unwrap();
    fs::write(
        sandbox.path().join("config/understory/understory.toml"),
        "keep-outputs = false\nlowers = [\"unix:///l.sock?real=/l\"]\n",
    )
    .unwrap();
    let names = [
        "trusted-users",
        "keep-outputs",
        "lowers",
        "substituters",
        "gc-keep-derivations",
    ];
    let shown = sandbox.run(&[&["config", "show"][..], &names].concat());
    assert_eq!(
        shown.stdout,
        "trusted-users = root anna  # [DIR]/etc-nix/nix.conf\n\
         keep-outputs = false  # [DIR]/config/understory/understory.toml\n\
         lowers = unix:///l.sock?real=/l  # [DIR]/config/understory/understory.toml\n\
         substituters =  # UNDERSTORY_SUBSTITUTERS in the environment\n\
         keep-derivations = true\n"
    );
    let json = sandbox.json(&[
        "config",
        "show",
        "--no-nix-conf",
        "keep-outputs",
        "trusted-users",
    ]);
    assert_eq!(json["keep-outputs"]["value"], "false");
    assert_eq!(
        json["trusted-users"],
        serde_json::json!({"value": "root", "origins": []})
    );
    let all = sandbox.ok(&["config", "show"]);
    let listed: Vec<&str> = all.lines().filter_map(|l| l.split(' ').next()).collect();
    assert_eq!(listed.join("\n"), sandbox.ok(&["config", "names"]));

    let unknown = sandbox.run(&["config", "show", "keep-output"]);
    assert_eq!(unknown.code, 1);
    assert_eq!(
        unknown.stderr,
        "error: unknown setting 'keep-output'\nhint: did you mean `keep-outputs`?\n"
    );
    fs::write(sandbox.path().join("mine.toml"), "lower = []\n").unwrap();
    for command in [&["config", "show"][..], &["up"]] {
        let wrong = sandbox.run(&[command, &["--config", "mine.toml"]].concat());
        assert_eq!(
            (wrong.code, wrong.stderr.as_str()),
            (
                1,
                "error: [DIR]/mine.toml: unknown setting 'lower'\nhint: did you mean `lowers`?\n"
            )
        );
    }
    let wrong = sandbox.run(&["up", "--option", "fallback", "perhaps"]);
    assert_eq!(
        wrong.stderr,
        "error: the command line: Boolean setting 'fallback' has invalid value 'perhaps'\n"
    );
}

#[test]
fn an_overlay_needs_a_place_and_a_lower_store() {
    let sandbox = Sandbox::new();
    let said = |arguments: &[&str]| {
        let ran = sandbox.run(&[&["overlay"], arguments].concat());
        (
            ran.code,
            ran.stderr.lines().take(2).collect::<Vec<_>>().join("\n"),
        )
    };
    let (code, text) = said(&["--upper", "u"]);
    assert_eq!(code, 2);
    assert!(
        text.contains("required arguments were not provided"),
        "{text}"
    );
    assert_eq!(
        said(&["--root", "r", "--upper", "u"]),
        (
            2,
            "error: there is no lower store\n\
             hint: name one with --lower URL, or a castore with --castore and --castore-mount"
                .into()
        )
    );
    assert_eq!(
        said(&["--root", "r", "--upper", "u", "--lower", ""]).0,
        2,
        "an empty one is none, and not the machine's own"
    );
    assert_eq!(
        said(&[
            "--root",
            "r",
            "--upper",
            "u",
            "--castore",
            "none",
            "--castore-mount",
            "m"
        ]),
        (
            1,
            "error: there is no store in [DIR]/none\n\
             hint: create one with `understory --store [DIR]/none init`"
                .into()
        )
    );
    assert_eq!(
        said(&["--root", "r", "--upper", "u", "--lower", "/a b"]),
        (
            2,
            "error: the lower store '/a b' has a space in its URL\n\
             hint: write `%20`, as in `local?root=/with%20space`"
                .into()
        )
    );
    assert_eq!(
        said(&[
            "--root",
            "r",
            "--upper",
            "u",
            "--nix",
            "no-such-nix",
            "--lower",
            "/x"
        ]),
        (1, "error: no program no-such-nix in PATH".into())
    );
}
