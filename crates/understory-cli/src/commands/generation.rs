//! `generation`: makes, lists, drops and mounts images of what the store holds.

use super::gc::parse_bytes;
use crate::context::Context;
use crate::error::{CommandError, Result};
use crate::progress::{Done, Progress};
use crate::signals;
use crate::ui;
use clap::ValueEnum;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;
use understory::generation::{
    Dropped, Figures, Generation, Generations, HOT_BYTES_DEFAULT, HotOptions, MountOptions,
    MountedGeneration, clear_hot,
};
use understory::import::Selection;
use understory::mount::Route;
use understory::{config, service_manager};

/// Make, list, drop and mount images of what the store holds
///
/// A generation is an EROFS image of store paths without the contents of their files, which the kernel takes from a
/// virtual device that is decompressed on demand. It is mounted by the kernel itself and as quick as a local file
/// system. What is added later is in the next generation; older ones stay mountable. `understory up` makes and
/// mounts them by itself.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a generation; prints its number
    Make {
        /// Store paths, taken with their closures [default: all that are valid]
        paths: Vec<String>,
    },
    /// List generations
    List,
    /// Drop generations; those that are mounted stay
    Drop {
        /// Which ones
        #[arg(required_unless_present_any = ["all", "keep"])]
        numbers: Vec<u64>,
        /// All of them, and the address space of the virtual device with the last one
        #[arg(long, conflicts_with_all = ["numbers", "keep"])]
        all: bool,
        /// All but the newest N
        #[arg(long, value_name = "N", conflicts_with = "numbers")]
        keep: Option<usize>,
    },
    /// Mount a generation read-only (foreground, as root)
    ///
    /// Ends and unmounts on SIGINT or SIGTERM.
    Mount {
        /// An existing directory
        mountpoint: PathBuf,
        /// Which one [default: the newest that has all paths of its time]
        #[arg(long, value_name = "NUMBER")]
        number: Option<u64>,
        /// How the kernel reads the image [default: the first that works]
        #[arg(long, value_name = "WAY")]
        route: Option<RouteArg>,
        /// Threads that serve contents; 0 = by the number of cores
        #[arg(long, value_name = "N", default_value_t = 0)]
        threads: usize,
        /// Keep files uncompressed that are often read in small pieces: `raw` or `raw=SIZE`
        #[arg(long, value_name = "raw[=SIZE]", value_parser = parse_hot)]
        hot: Option<HotOptions>,
    },
    /// Put the files of closures into the raw tier, where `--hot raw` finds them; prints what it holds
    Heat {
        /// Store paths, taken with their closures
        #[arg(required = true)]
        paths: Vec<String>,
        /// Bytes that the raw tier may take; K, M, G, T for powers of 1000 [default: 1.07G]
        #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
        size: Option<u64>,
    },
    /// Remove the raw tier
    Cool,
}

/// `raw` or `raw=SIZE`.
pub(crate) fn parse_hot(text: &str) -> Result<HotOptions, String> {
    let mut options = HotOptions::default();
    match text.split_once('=') {
        None if text == "raw" => {}
        Some(("raw", size)) => options.bytes_max = parse_bytes(size)?,
        _ => return Err(format!("expected `raw` or `raw=SIZE`, found `{text}`")),
    }
    Ok(options)
}

/// How the kernel reads an image.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RouteArg {
    /// The image file itself (Linux 6.12)
    File,
    /// Through the server of the contents, for images on overlayfs
    Served,
    /// Through loop devices (Linux 5.16)
    Loop,
}

impl From<RouteArg> for Route {
    fn from(route: RouteArg) -> Self {
        match route {
            RouteArg::File => Self::File,
            RouteArg::Served => Self::Served,
            RouteArg::Loop => Self::Loop,
        }
    }
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    match &args.command {
        Command::Make { paths } => make(paths, cx),
        Command::List => list(cx),
        Command::Drop { numbers, all, keep } => {
            let keep = if *all { Some(0) } else { *keep };
            drop_some(numbers, keep, cx)
        }
        Command::Mount {
            mountpoint,
            number,
            route,
            threads,
            hot,
        } => {
            let mut options = MountOptions {
                threads: *threads,
                hot: *hot,
                ..MountOptions::default()
            };
            if let Some(route) = route {
                options.routes = vec![(*route).into()];
            }
            mount(mountpoint, *number, &options, cx)
        }
        Command::Heat { paths, size } => heat(paths, *size, cx),
        Command::Cool => {
            clear_hot(cx.open_to_write()?.dir())?;
            Ok(())
        }
    }
}

fn heat(paths: &[String], size: Option<u64>, cx: &Context) -> Result<()> {
    let store = cx.open_to_write()?;
    let options = HotOptions {
        bytes_max: size.unwrap_or(HOT_BYTES_DEFAULT),
        by_reads: false,
    };
    let paths = match Selection::parse(store.store_dir(), paths, true)? {
        Selection::Paths { paths, .. } => paths.into_iter().collect::<Vec<_>>(),
        Selection::All => Vec::new(),
    };
    let figures = Generations::of(&store).heat(&paths, &options)?;
    if cx.json {
        return cx.ui.print_json(&figures);
    }
    cx.ui.print(format!(
        "{} files, {} of {}\n",
        ui::count(figures.files),
        ui::bytes(figures.bytes),
        ui::bytes(options.bytes_max)
    ))
}

fn make(paths: &[String], cx: &Context) -> Result<()> {
    let store = cx.open_to_write()?;
    let selection = match paths {
        [] => Selection::All,
        _ => Selection::parse(store.store_dir(), paths, true)?,
    };
    let bar = Progress::new(&cx.ui, "making a generation");
    let made = Generations::of(&store).make(&selection, &mut |progress| {
        bar.update(Done {
            paths: (progress.paths, progress.paths_total),
            ..Done::default()
        });
    });
    bar.finish();
    let made = made?;
    if cx.json {
        return cx.ui.print_json(&describe(&made)?);
    }
    cx.ui.print(format!("{}\n", made.number))?;
    let Figures {
        paths,
        inodes,
        new_extents,
        made_ms,
        ..
    } = made.figures();
    cx.ui.say(format_args!(
        "generation {}: {} paths, {} inodes, {} new files, image of {}, made in {:.2} s",
        made.number,
        ui::count(*paths),
        ui::count(*inodes),
        ui::count(*new_extents),
        ui::bytes(made.image_bytes()),
        Duration::from_millis(*made_ms).as_secs_f64()
    ));
    Ok(())
}

fn describe(generation: &Generation) -> Result<serde_json::Value> {
    let made = generation
        .made()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    Ok(serde_json::json!({
        "number": generation.number,
        "all": generation.has_all(),
        "lastRow": generation.last_row(),
        "inUse": generation.is_in_use()?,
        "made": made,
        "image": generation.image(),
        "imageBytes": generation.image_bytes(),
        "imageBlake3": generation.image_digest(),
        "figures": generation.figures(),
    }))
}

fn list(cx: &Context) -> Result<()> {
    let store = cx.open()?;
    let generations = Generations::of(&store).list()?;
    if cx.json {
        let list = generations
            .iter()
            .map(describe)
            .collect::<Result<Vec<_>>>()?;
        return cx.ui.print_json(&list);
    }
    let mut out = String::new();
    for generation in &generations {
        let figures = generation.figures();
        out.push_str(&format!(
            "{}  {} paths{}, {} inodes, {} of files, image of {}{}\n",
            generation.number,
            ui::count(figures.paths),
            if generation.has_all() {
                ""
            } else {
                " (chosen)"
            },
            ui::count(figures.inodes),
            ui::bytes(figures.file_bytes),
            ui::bytes(generation.image_bytes()),
            if generation.is_in_use()? {
                ", in use"
            } else {
                ""
            }
        ));
    }
    cx.ui.print(out)
}

fn drop_some(numbers: &[u64], keep: Option<usize>, cx: &Context) -> Result<()> {
    let store = cx.open_to_write()?;
    let generations = Generations::of(&store);
    let mut dropped = Dropped::default();
    match keep {
        Some(keep) => dropped = generations.prune(keep)?,
        None => {
            for number in numbers {
                let one = generations.drop_one(*number)?;
                dropped.numbers.extend(one.numbers);
                dropped.bytes += one.bytes;
            }
        }
    }
    if cx.json {
        return cx.ui.print_json(&serde_json::json!({
            "dropped": dropped.numbers,
            "bytes": dropped.bytes,
        }));
    }
    cx.ui.say(format_args!(
        "{} generations dropped, {} of images",
        ui::count(dropped.numbers.len() as u64),
        ui::bytes(dropped.bytes)
    ));
    Ok(())
}

fn mount(
    mountpoint: &std::path::Path,
    number: Option<u64>,
    options: &MountOptions,
    cx: &Context,
) -> Result<()> {
    let store = cx.open()?;
    let generations = Generations::of(&store);
    let generation = match number {
        Some(number) => generations.get(number)?,
        None => generations.newest()?.ok_or_else(|| {
            CommandError::failed("the store has no generation with all its paths")
                .hint("make one with `understory generation make`")
        })?,
    };
    let at = config::absolute(mountpoint)?;
    let (to, ends) = mpsc::channel();
    signals::forward(to)?;
    let server = tempfile::Builder::new()
        .prefix("understory-blob.")
        .tempdir()
        .map_err(|e| CommandError::io("creating", "a directory for the server", &e))?;
    let mounted = MountedGeneration::mount(&store, &generation, server.path(), &at, options)?;
    let mount = mounted.image().mount_point();
    cx.ui.say(format_args!(
        "generation {} is mounted on {}: {}{}",
        generation.number,
        at.display(),
        mount.route().describe(),
        mount
            .reason()
            .map_or_else(String::new, |reason| format!(" ({reason})"))
    ));
    service_manager::ready(&format!("mounted on {}", at.display()));
    // An error cannot be: the sender lives as long as the signal handler.
    let _ = ends.recv();
    service_manager::stopping();
    Ok(mounted.unmount()?)
}
