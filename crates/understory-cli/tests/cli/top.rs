//! `top` on a real terminal (a pty) and without one.

use super::Sandbox;
use super::support::{Down, LIMIT, may_mount, shown, up};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// A program on a terminal of its own.
struct OnTerminal {
    child: Child,
    master: File,
    slave: File,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl OnTerminal {
    /// Runs `command` with a controlling terminal of that size.
    fn run(command: &Command, columns: u16, rows: u16) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(name.to_str().unwrap())
                .unwrap()
        };
        let slave = open();
        set_size(&slave, columns, rows);
        let stdio = || Stdio::from(OwnedFd::from(open()));
        // --ctty makes standard input the controlling terminal of a new session.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .env("TERM", "xterm-256color")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (to, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // An error is the end: nobody has the other side open.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if to.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            master,
            slave,
            output,
            seen: String::new(),
        }
    }
    /// Waits until `text` has been written, and forgets all up to it.
    fn expect(&mut self, text: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < end, "no {text:?} in {:?}", self.seen);
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let more = self.output.recv_timeout(LIMIT);
            let more = more.unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
    }
    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

const ENTER: &str = "\u{1b}[?1049h";
const LEAVE: &str = "\u{1b}[?1049l";

#[test]
fn on_a_terminal_it_draws_resizes_and_leaves_it_as_it_was() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.add_tree("tree", "hello\n");
    let _down = Down(&sandbox);
    up(&sandbox);
    for keys in ["q", "\u{3}"] {
        let mut command = sandbox.command();
        command.args(["top", "--interval", "0.1"]);
        let mut top = OnTerminal::run(&command, 120, 40);
        let before = tcgetattr(&top.slave).unwrap();
        top.expect(ENTER);
        top.expect("PROCESSES");
        top.expect("CLIENTS");
        set_size(&top.slave, 70, 50);
        // The screen is cleared and drawn anew for the new size.
        top.expect("\u{1b}[2J");
        top.expect("PROCESSES");
        top.press(keys);
        top.expect(LEAVE);
        assert_eq!(top.child.wait().unwrap().code(), Some(0), "{keys:?}");
        let after = tcgetattr(&top.slave).unwrap();
        assert_eq!(after.local_modes, before.local_modes, "{keys:?}");
        assert_eq!(after.input_modes, before.input_modes, "{keys:?}");
    }
}

#[test]
fn no_color_is_honoured_on_a_terminal() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let _down = Down(&sandbox);
    up(&sandbox);
    for (no_color, expected) in [("", true), ("1", false)] {
        let mut command = sandbox.command();
        command.args(["top", "--interval", "0.1"]);
        if !no_color.is_empty() {
            command.env("NO_COLOR", no_color);
        }
        let mut top = OnTerminal::run(&command, 100, 50);
        top.expect(ENTER);
        // What came along with it is a part of the first screen.
        let mut all = std::mem::take(&mut top.seen);
        let mut pressed = false;
        while !all.contains(LEAVE) {
            // The last line of a screen: all of it has been drawn.
            if !pressed && all.contains("quit") {
                top.press("q");
                pressed = true;
            }
            let more = top.output.recv_timeout(LIMIT);
            let more = more.unwrap_or_else(|_| panic!("it does not leave: {all:?}"));
            all.push_str(&String::from_utf8_lossy(&more));
        }
        assert_eq!(top.child.wait().unwrap().code(), Some(0));
        // The line of keys is dim: colour 8 of the palette.
        let has_color = all.contains("\u{1b}[38;5;8");
        assert_eq!(has_color, expected, "NO_COLOR={no_color:?}: {all:?}");
    }
}

#[test]
fn without_a_terminal_it_is_plain() {
    if !may_mount() {
        return;
    }
    let sandbox = Sandbox::new();
    let path = sandbox.add_tree("tree", "hello\n");
    let _down = Down(&sandbox);
    up(&sandbox);
    std::fs::read(shown(&sandbox, &path).join("file")).unwrap();
    let text = sandbox.ok(&["top", "--interval", "0.1"]);
    assert!(!text.contains('\u{1b}'), "{text}");
    for part in [
        "1 paths, ",
        "KERNEL ",
        "lookup ",
        "read ",
        "PROCESSES ",
        "live      [DIR]/s/mnt",
        "CLIENTS 0 ",
    ] {
        assert!(
            text.replace(sandbox.path().to_str().unwrap(), "[DIR]")
                .contains(part),
            "{part}: {text}"
        );
    }
    let json = sandbox.json(&["top", "--interval", "0.1"]);
    assert_eq!(json["paths"], 1);
    assert!(json["intervalSeconds"].as_f64().unwrap() >= 0.1);
    let requests = json["requests"].as_array().unwrap();
    let total = |name: &str| {
        let of_kind = requests.iter().find(|r| r["name"] == name);
        of_kind.map_or(0, |r| r["total"].as_u64().unwrap())
    };
    assert!(total("lookup") > 0 && total("read") > 0, "{json}");
    assert!(json["processes"][0]["residentBytes"].as_u64().unwrap() > 1_000_000);

    sandbox.ok(&["-q", "down"]);
    let ran = sandbox.run(&["top"]);
    assert_eq!(ran.code, 3);
    assert_eq!(
        ran.stderr,
        "error: no instance runs for [DIR]/s\nhint: start one with `understory up`\n"
    );
}
