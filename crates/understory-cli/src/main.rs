//! The command `understory`: sets up, runs and looks into an Understory store.
//!
//! The library does the work and never prints; this crate parses the command line, talks to people,
//! and turns errors into messages, hints and exit codes.

mod bench;
mod commands;
mod context;
mod env;
mod error;
mod plot;
mod progress;
mod resolve;
mod settings;
mod signals;
mod ui;

use clap::error::ErrorKind;
use clap::{ArgAction, Parser, Subcommand};
use commands as c;
use context::Context;
use error::{Code, CommandError, Result};
use std::path::PathBuf;
use std::process::ExitCode;
use ui::{ColorChoice, Ui};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the request cannot be met: path not valid, not permitted, still in use
  2  wrong usage
  3  the machine or its configuration stands in the way; `status`: nothing runs
  4  stored data is damaged
  70 a bug in understory
  130 interrupted

Guides: docs/guide in the source tree. `understory doctor` finds what is wrong with a machine.";

/// A castore that serves as a Nix store.
///
/// Keeps store paths deduplicated and compressed, mounts them, and serves them to stock Nix as the
/// lower store of a local overlay.
#[derive(Debug, Parser)]
#[command(name = "understory", version, after_help = EXIT_CODES, propagate_version = false)]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// The store's directory [default: /var/lib/understory as root, else
    /// $XDG_STATE_HOME/understory or ~/.local/state/understory]
    #[arg(long, global = true, value_name = "DIR", env = env::STORE, hide_env_values = true)]
    store: Option<PathBuf>,
    /// Write data as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Say more; twice: debug
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Say only what is wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// When to use colour
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true
    )]
    color: ColorChoice,
}

/// What each one does stands at its arguments.
#[derive(Debug, Subcommand)]
enum Command {
    Init(c::init::Args),
    Import(c::import::Args),
    Add(c::add::Args),
    Adopt(Box<c::adopt::Args>),
    Up(Box<c::up::Args>),
    Down(c::down::Args),
    Upgrade(c::upgrade::Args),
    Status(c::status::Args),
    Top(c::top::Args),
    Doctor(c::doctor::Args),
    Shell(c::shell::Args),
    Mount(c::mount::Args),
    Generation(c::generation::Args),
    #[command(visible_alias = "daemon")]
    Serve(Box<c::serve::Args>),
    Overlay(Box<c::overlay::Args>),
    Config(c::config::Args),
    Info(c::info::Args),
    Ls(c::ls::Args),
    Cat(c::cat::Args),
    Export(c::export::Args),
    Image(c::image::Args),
    #[command(visible_alias = "root")]
    Roots(c::roots::Args),
    Gc(c::gc::Args),
    Repack(c::repack::Args),
    Delete(c::delete::Args),
    Stats(c::stats::Args),
    Check(c::check::Args),
    Demo(c::demo::Args),
    Bench(Box<bench::Args>),
    Completions(c::completions::Args),
    Man(c::man::Args),
}

fn main() -> ExitCode {
    // Not one of the user's commands: it shows in no help, completion or manual page.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == c::enter::NAME)
    {
        return match c::enter::Args::try_parse_from(std::env::args_os().skip(1)) {
            Ok(args) => end(&Ui::new(ColorChoice::Auto, false), c::enter::run(&args)),
            Err(error) => usage(&error),
        };
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let ui = Ui::new(cli.global.color, cli.global.quiet);
    start_log(&cli, &ui);
    let context = Context::new(ui.clone(), cli.global.json, cli.global.store.clone());
    end(&ui, run(cli.command, &context))
}

fn end(ui: &Ui, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui.error(&error);
            ExitCode::from(error.code)
        }
    }
}

fn run(command: Command, cx: &Context) -> Result<()> {
    match command {
        Command::Init(args) => c::init::run(&args, cx),
        Command::Import(args) => c::import::run(&args, cx),
        Command::Add(args) => c::add::run(&args, cx),
        Command::Adopt(args) => c::adopt::run(&args, cx),
        Command::Up(args) => c::up::run(&args, cx),
        Command::Down(args) => c::down::run(&args, cx),
        Command::Upgrade(args) => c::upgrade::run(&args, cx),
        Command::Status(args) => c::status::run(&args, cx),
        Command::Top(args) => c::top::run(&args, cx),
        Command::Doctor(args) => c::doctor::run(&args, cx),
        Command::Shell(args) => c::shell::run(&args, cx),
        Command::Mount(args) => c::mount::run(&args, cx),
        Command::Generation(args) => c::generation::run(&args, cx),
        Command::Serve(args) => c::serve::run(&args, cx),
        Command::Overlay(args) => c::overlay::run(&args, cx),
        Command::Config(args) => c::config::run(&args, cx),
        Command::Info(args) => c::info::run(&args, cx),
        Command::Ls(args) => c::ls::run(&args, cx),
        Command::Cat(args) => c::cat::run(&args, cx),
        Command::Export(args) => c::export::run(&args, cx),
        Command::Image(args) => c::image::run(&args, cx),
        Command::Roots(args) => c::roots::run(&args, cx),
        Command::Gc(args) => c::gc::run(&args, cx),
        Command::Repack(args) => c::repack::run(&args, cx),
        Command::Delete(args) => c::delete::run(&args, cx),
        Command::Stats(args) => c::stats::run(&args, cx),
        Command::Check(args) => c::check::run(&args, cx),
        Command::Demo(args) => c::demo::run(&args, cx),
        Command::Bench(args) => bench::run(&args, cx),
        Command::Completions(args) => c::completions::run(&args, cx),
        Command::Man(args) => c::man::run(&args, cx),
    }
}

/// Prints clap's message; help and version go to stdout and are no error.
fn usage(error: &clap::Error) -> ExitCode {
    let printed = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion if printed.is_ok() => ExitCode::SUCCESS,
        _ => ExitCode::from(Code::Usage as u8),
    }
}

/// Logs go to stderr. Servers tell what they do; other commands only what is wrong.
fn start_log(cli: &Cli, ui: &Ui) {
    use tracing_subscriber::EnvFilter;
    let serves = matches!(
        cli.command,
        Command::Up(_) | Command::Serve(_) | Command::Overlay(_) | Command::Mount(_)
    );
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => "error",
        (_, 0) if serves => "understory=info,understory_castore=info,warn",
        (_, 0) => "warn",
        (_, 1) => "understory=info,understory_castore=info,warn",
        (_, 2) => "understory=debug,understory_castore=debug,info",
        (_, _) => "trace",
    };
    let filter = env::var(env::LOG)
        .and_then(|text| EnvFilter::try_new(text.to_str()?).ok())
        .unwrap_or_else(|| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ui.colors_err())
        .with_target(cli.global.verbose > 1);
    // A subscriber can be set once; this is the only place.
    let set = if serves && !ui.shows_progress() {
        log.try_init()
    } else {
        log.without_time().try_init()
    };
    if let Err(error) = set {
        ui.warn(CommandError::failed(format!("starting the log: {error}")).message);
    }
}
