//! Builds by real Nix of both versions. A test runs itself once more in the root of each, so that our code and Nix
//! share one machine there.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};
use understory::builder::{Builder, BuilderSession, NixBuilder};
use understory::daemon::{ClientInfo, Reporter, Silent};
use understory_nix::worker::{
    ActivityType, BasicDerivation, BuildMode, BuildStatus, DerivationOutput, DerivedPath, Field,
    LogMessage, OutputsSpec, ResultType, SetOptions, Verbosity,
};
use understory_nix::{StoreDir, StorePath};
use understory_testkit::nix_root::{Bind, NixRoot, Version};

const INSIDE: &str = "UNDERSTORY_TEST_IN_NIX_ROOT";
/// How long anything in a test may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` in the root of each Nix; `name` is the test's.
fn in_each_nix(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    for version in Version::SUPPORTED {
        let Some(root) = NixRoot::get(version) else {
            continue;
        };
        let exe = std::env::current_exe().unwrap();
        let output = root
            .command(
                &[Bind::new(exe, "/test")],
                0,
                &[
                    (INSIDE, "1"),
                    (
                        "NIX_CONFIG",
                        "sandbox = false\nbuild-users-group =\nsubstituters =",
                    ),
                ],
                "/test",
            )
            .args(["--exact", name, "--nocapture"])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{version:?}:\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// The store at `/nix/store`, where nothing forces a sandbox.
fn builder() -> NixBuilder {
    NixBuilder {
        program: None,
        store_url: "local".to_owned(),
        options: Vec::new(),
    }
}

fn connect(builder: &NixBuilder, trusted: bool) -> Box<dyn BuilderSession> {
    let client = ClientInfo {
        trusted,
        uid: None,
        pid: None,
    };
    builder.connect(&client).unwrap()
}

/// The derivation of an expression, in the store.
fn instantiate(expression: &str) -> StorePath {
    let output = Command::new("nix-instantiate")
        .args(["--store", "local", "--expr", expression])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    StoreDir::default().parse(text.trim().as_bytes()).unwrap()
}

/// A derivation that runs a shell script.
fn script(name: &str, script: &str) -> StorePath {
    instantiate(&format!(
        "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\"; \
         PATH = \"/bin:/usr/bin\"; args = [ \"-c\" ''{script}'' ]; }}"
    ))
}

fn all_outputs(drv: &StorePath) -> Vec<DerivedPath> {
    vec![DerivedPath::Built {
        drv: drv.clone(),
        through: Vec::new(),
        outputs: OutputsSpec::All,
    }]
}

fn options() -> SetOptions {
    SetOptions {
        verbosity: Verbosity::Info as u64,
        max_build_jobs: 1,
        use_build_hook: 1,
        build_cores: 1,
        use_substitutes: true,
        ..SetOptions::default()
    }
}

/// Keeps what is said, and can be cancelled.
#[derive(Default)]
struct Listener {
    heard: Mutex<Vec<LogMessage>>,
    more: Condvar,
    cancelled: AtomicBool,
}

impl Reporter for Listener {
    fn verbosity(&self) -> Verbosity {
        Verbosity::Info
    }
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
    fn send(&self, message: &LogMessage) {
        self.heard.lock().unwrap().push(message.clone());
        self.more.notify_all();
    }
}

impl Listener {
    /// Lines of build logs so far.
    fn lines(&self) -> Vec<String> {
        lines(&self.heard.lock().unwrap())
    }
    /// Waits for a line of a build log.
    fn wait_for(&self, line: &str) {
        let heard = self.heard.lock().unwrap();
        let (_heard, timeout) = self
            .more
            .wait_timeout_while(heard, PATIENCE, |heard| {
                !lines(heard).iter().any(|found| found == line)
            })
            .unwrap();
        assert!(!timeout.timed_out(), "never heard {line:?}");
    }
    /// Everything that is meant to be read.
    fn text(&self) -> String {
        let heard = self.heard.lock().unwrap();
        let texts = heard.iter().filter_map(|message| match message {
            LogMessage::Next(text) => Some(String::from_utf8_lossy(text).into_owned()),
            _ => None,
        });
        texts.collect()
    }
}

fn lines(heard: &[LogMessage]) -> Vec<String> {
    let lines = heard.iter().filter_map(|message| match message {
        LogMessage::Result {
            result: ResultType::BuildLogLine,
            fields,
            ..
        } => match &fields[..] {
            [Field::Text(line)] => Some(String::from_utf8_lossy(line).into_owned()),
            _ => None,
        },
        _ => None,
    });
    lines.collect()
}

/// Processes whose command line holds `text`, other than zombies.
fn processes(text: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(text)
            .then(|| format!("{} {line}", entry.file_name().to_string_lossy()))
    });
    lines.collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Builds, and does something while it runs.
fn build_while(
    session: &mut dyn BuilderSession,
    drv: &StorePath,
    listener: &Listener,
    meanwhile: impl FnOnce(),
) -> understory::Result<()> {
    std::thread::scope(|scope| {
        let build =
            scope.spawn(|| session.build_paths(&all_outputs(drv), BuildMode::Normal, listener));
        // A panic must not wait for the build.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        if let Err(panic) = done {
            listener.cancelled.store(true, Ordering::SeqCst);
            std::panic::resume_unwind(panic);
        }
        build.join().unwrap()
    })
}

#[test]
fn real_nix_builds_and_its_log_comes_while_it_runs() {
    in_each_nix("real_nix_builds_and_its_log_comes_while_it_runs", || {
        let builder = builder();
        let described = builder.describe().unwrap();
        assert!(described.starts_with("Nix 2."), "{described}");
        assert!(described.ends_with("(/usr/bin/nix-daemon)"), "{described}");
        // Its builder runs as another user.
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let go = dir.path().join("go");
        let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", go.display());
        let drv = script(
            "talks",
            &format!("echo one; echo two; {wait}; echo three; echo done > $out"),
        );
        let mut session = connect(&builder, true);
        session.set_options(&options()).unwrap();
        let listener = Listener::default();
        build_while(&mut *session, &drv, &listener, || {
            listener.wait_for("two");
            assert_eq!(listener.lines(), ["one", "two"]);
            std::fs::write(&go, "").unwrap();
        })
        .unwrap();
        assert_eq!(listener.lines(), ["one", "two", "three"]);
        let started = listener.heard.lock().unwrap().iter().any(|message| {
            matches!(message, LogMessage::StartActivity { activity: ActivityType::Build, fields, .. }
                if fields.first() == Some(&Field::Text(StoreDir::default().print(&drv).into_bytes())))
        });
        assert!(started);
        // The same child answers again.
        let child = processes("--stdio");
        assert_eq!(child.len(), 1, "{child:?}");
        let results = session
            .build_paths_with_results(&all_outputs(&drv), BuildMode::Normal, false, &Silent)
            .unwrap();
        assert_eq!(results.len(), 1);
        assert_eq!(results[0].result.status, BuildStatus::AlreadyValid);
        let out = &results[0].result.built_outputs["out"].out_path;
        let text = std::fs::read_to_string(format!("/nix/store/{out}")).unwrap();
        assert_eq!(text, "done\n");
        assert_eq!(processes("--stdio"), child);
        drop(session);
        assert_eq!(processes("--stdio"), Vec::<String>::new());
    });
}

#[test]
fn real_nix_says_why_a_build_fails() {
    in_each_nix("real_nix_says_why_a_build_fails", || {
        let drv = script("fails", "echo some reason; exit 7");
        let mut session = connect(&builder(), true);
        session.set_options(&options()).unwrap();
        let error = session
            .build_paths(&all_outputs(&drv), BuildMode::Normal, &Silent)
            .unwrap_err()
            .chain();
        for text in [
            &*StoreDir::default().print(&drv),
            "failed with exit code 7",
            "some reason",
        ] {
            assert!(error.contains(text), "{error}");
        }
        // It is still there for more.
        let child = processes("--stdio");
        let results = session
            .build_paths_with_results(&all_outputs(&drv), BuildMode::Normal, false, &Silent)
            .unwrap();
        assert_eq!(results[0].result.status, BuildStatus::PermanentFailure);
        assert_eq!(processes("--stdio"), child);
    });
}

#[test]
fn real_nix_stops_when_the_client_goes() {
    in_each_nix("real_nix_stops_when_the_client_goes", || {
        let drv = script("sleeps", "echo asleep; sleep 12345; echo > $out");
        let mut session = connect(&builder(), true);
        session.set_options(&options()).unwrap();
        let listener = Listener::default();
        let gone = Mutex::new(None);
        let error = build_while(&mut *session, &drv, &listener, || {
            listener.wait_for("asleep");
            assert!(!processes("sleep 12345").is_empty());
            listener.cancelled.store(true, Ordering::SeqCst);
            *gone.lock().unwrap() = Some(Instant::now());
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "interrupted by the user");
        let took = gone.lock().unwrap().unwrap().elapsed();
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert_eq!(processes("--stdio"), Vec::<String>::new());
        // It was sent SIGKILL; its death is the kernel's.
        wait_until("no builder is left", || processes("sleep 12345").is_empty());
        // Another one is started for the next request.
        let drv = script("quick", "echo > $out");
        session
            .build_paths(&all_outputs(&drv), BuildMode::Normal, &Silent)
            .unwrap();
    });
}

#[test]
fn real_nix_that_is_killed_is_reported_and_replaced() {
    in_each_nix("real_nix_that_is_killed_is_reported_and_replaced", || {
        let drv = script("killed", "echo asleep; sleep 12345; echo > $out");
        let quick = script("quick", "echo > $out");
        let mut session = connect(&builder(), true);
        session.set_options(&options()).unwrap();
        let listener = Listener::default();
        let kill = || {
            let child = processes("--stdio");
            let pid = child[0].split(' ').next().unwrap();
            Command::new("kill").args(["-9", pid]).status().unwrap();
        };
        let error = build_while(&mut *session, &drv, &listener, || {
            listener.wait_for("asleep");
            // Long enough to be seen by who looks a few times a second.
            std::thread::sleep(Duration::from_secs(1));
            kill();
        })
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the builder has died: signal: 9 (SIGKILL)"
        );
        session
            .build_paths(&all_outputs(&quick), BuildMode::Normal, &Silent)
            .unwrap();
        // Killed while it has nothing to do: nobody notices.
        kill();
        session
            .build_paths(&all_outputs(&quick), BuildMode::Normal, &Silent)
            .unwrap();
        wait_until("no builder is left", || processes("sleep 12345").is_empty());
    });
}

#[test]
fn real_nix_that_cannot_open_the_store_says_so() {
    in_each_nix("real_nix_that_cannot_open_the_store_says_so", || {
        let dir = tempfile::tempdir().unwrap();
        let [root, lower, upper] = ["s", "l", "u"].map(|name| dir.path().join(name));
        let builder = NixBuilder {
            store_url: format!(
                "local-overlay://?root={}&lower-store={}&upper-layer={}&check-mount=true",
                root.display(),
                lower.display(),
                upper.display()
            ),
            ..builder()
        };
        let drv = script("any", "echo > $out");
        let error = connect(&builder, true)
            .build_paths(&all_outputs(&drv), BuildMode::Normal, &Silent)
            .unwrap_err()
            .chain();
        assert!(
            error.starts_with("the builder has died: exit status: 1: error: "),
            "{error}"
        );
        assert!(error.contains("mounted incorrectly"), "{error}");
    });
}

#[test]
fn real_nix_does_not_let_untrusted_clients_choose_sandbox_or_hook() {
    let name = "real_nix_does_not_let_untrusted_clients_choose_sandbox_or_hook";
    in_each_nix(name, || {
        let dir = tempfile::tempdir().unwrap();
        let (hook, ran) = (dir.path().join("hook"), dir.path().join("ran"));
        std::fs::write(&hook, format!("#!/bin/sh\necho ran > {}\n", ran.display())).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&hook, mode).unwrap();
        let hook = hook.to_str().unwrap();
        let mut options = options();
        for (name, value) in [
            ("sandbox", "false"),
            ("build-hook", hook),
            ("post-build-hook", hook),
            ("store", "daemon"),
        ] {
            let (name, value) = (name.as_bytes().to_vec(), value.as_bytes().to_vec());
            options.overrides.insert(name, value);
        }
        for trusted in [false, true] {
            let drv = script(&format!("trust-{trusted}"), "echo > $out");
            let mut session = connect(&builder(), trusted);
            session.set_options(&options).unwrap();
            let listener = Listener::default();
            let _result = session.build_paths(&all_outputs(&drv), BuildMode::Normal, &listener);
            let text = listener.text();
            for setting in ["sandbox", "build-hook", "post-build-hook"] {
                let expected = format!("ignoring the client-specified setting '{setting}'");
                assert_eq!(text.contains(&expected), !trusted, "{text}");
            }
            assert!(!text.contains("'store'"), "{text}");
            assert_eq!(ran.exists(), trusted);
        }
        // What must be known by its content if somebody untrusted has it built.
        let derivation = BasicDerivation {
            outputs: [(
                "out".to_owned(),
                DerivationOutput {
                    path: "/nix/store/00000000000000000000000000000000-evil".to_owned(),
                    ..DerivationOutput::default()
                },
            )]
            .into(),
            input_sources: BTreeSet::new(),
            platform: b"x86_64-linux".to_vec(),
            builder: b"/bin/sh".to_vec(),
            ..BasicDerivation::default()
        };
        let drv = StorePath::from_base_name("00000000000000000000000000000000-evil.drv").unwrap();
        let error = connect(&builder(), false)
            .build_derivation(&drv, &derivation, BuildMode::Normal, false, &Silent)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "you are not privileged to build input-addressed derivations"
        );
    });
}

#[test]
fn real_nix_ends_when_we_are_killed() {
    let name = "real_nix_ends_when_we_are_killed";
    in_each_nix(name, || {
        const VICTIM: &str = "UNDERSTORY_TEST_VICTIM";
        if std::env::var_os(VICTIM).is_some() {
            let drv = script("victim", "touch /tmp/runs; sleep 12345; echo > $out");
            let mut session = connect(&builder(), true);
            let _result = session.build_paths(&all_outputs(&drv), BuildMode::Normal, &Silent);
            return;
        }
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(VICTIM, "1")
            .spawn()
            .unwrap();
        wait_until("the build runs", || {
            std::fs::exists("/tmp/runs").unwrap() && !processes("sleep 12345").is_empty()
        });
        victim.kill().unwrap();
        victim.wait().unwrap();
        wait_until("nothing is left", || {
            processes("sleep 12345").is_empty() && processes("--stdio").is_empty()
        });
    });
}

#[test]
fn without_nix_there_is_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let builder = NixBuilder {
        program: Some(dir.path().to_owned()),
        ..builder()
    };
    let client = ClientInfo {
        trusted: true,
        uid: None,
        pid: None,
    };
    for error in [
        builder.describe().unwrap_err(),
        builder.connect(&client).err().unwrap(),
    ] {
        assert_eq!(
            error.to_string(),
            format!("there is no Nix at {}", dir.path().display())
        );
        assert_eq!(
            error.hint(),
            Some("install Nix 2.24 or later, or name it with `--nix`")
        );
    }
}
