//! `demo`: all of it, on this machine's own files, in a private namespace, without leaving a trace.

mod trees;

use crate::commands::enter;
use crate::commands::up::{End, enter_namespace, start};
use crate::context::Context;
use crate::env;
use crate::error::{CommandError, Result};
use crate::progress::{Done, Progress};
use crate::settings::SettingsArgs;
use crate::ui::{self, Style};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use trees::{Pass, Tree};
use understory::config::{Layout, LayoutOptions};
use understory::up::Instance;
use understory_nix::{PathInfo, StorePath};

/// Show all of it on this machine's own files, without leaving a trace
///
/// Takes directories of this machine, adds them as store paths, mounts, serves and overlays them in a
/// private namespace, reads everything back through the overlay and compares it, adds on top, lets
/// stock Nix look at it if it is installed, and shows sizes and speeds. Needs neither root nor Nix.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// About how many bytes to take
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = crate::commands::gc::parse_bytes)]
    size: u64,
    /// At most how many files
    #[arg(long, value_name = "N", default_value_t = 30_000)]
    files: u64,
    /// Directories to take trees from [default: places of this machine that have many files]
    #[arg(value_name = "DIR")]
    from: Vec<PathBuf>,
    /// Where to put the store for the time being
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Figures of a run.
struct Figures {
    files: u64,
    trees: u64,
    apparent_bytes: u64,
    plain_disk_bytes: u64,
    store_disk_bytes: u64,
    up: Duration,
    import: Duration,
    plain: [Pass; 2],
    overlay: [Pass; 2],
    upper_bytes: u64,
    nix: Option<String>,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    let place = Place::new(args)?;
    let result = in_place(args, cx, &place);
    // Clean up whatever happened; say first what went wrong first.
    let removed = place.remove();
    result?;
    removed?;
    cx.ui.say("\nAll is unmounted, stopped and removed again.");
    Ok(())
}

fn in_place(args: &Args, cx: &Context, place: &Place) -> Result<()> {
    let cx = cx.with_store(place.dir.path().join("store"));
    let options = LayoutOptions {
        state: Some(place.state.clone()),
        ..LayoutOptions::default()
    };
    let layout = cx.layout(&options)?;
    let began = Instant::now();
    let (instance, ends) = start(
        &layout,
        "/nix/store",
        SettingsArgs::default().resolve()?,
        Vec::new(),
    )?;
    let result = show(args, &cx, &instance, &ends, began.elapsed());
    let stopped = instance.stop();
    result?;
    Ok(stopped?)
}

/// The directory that all lies in for the time being.
struct Place {
    dir: tempfile::TempDir,
    /// A tmpfs: the file system below may be one that overlayfs refuses as upper directory.
    state: PathBuf,
}

impl Place {
    /// Makes it and enters a private namespace.
    fn new(args: &Args) -> Result<Self> {
        let dir = temporary(args)?;
        enter_namespace(true)?;
        let state = dir.path().join("state");
        std::fs::create_dir(&state)
            .map_err(|e| CommandError::io("creating", state.display(), &e))?;
        rustix::mount::mount(
            "tmpfs",
            &state,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            c"mode=755",
        )
        .map_err(|e| CommandError::io("mounting a tmpfs on", state.display(), &e.into()))?;
        Ok(Self { dir, state })
    }
    fn remove(self) -> Result<()> {
        let unmounted = rustix::mount::unmount(&self.state, rustix::mount::UnmountFlags::DETACH)
            .map_err(|e| CommandError::io("unmounting", self.state.display(), &e.into()));
        let at = self.dir.path().to_owned();
        let removed = self
            .dir
            .close()
            .map_err(|e| CommandError::io("removing", at.display(), &e));
        unmounted?;
        removed
    }
}

/// A directory on disk with room for the store, of a name that may stand in a store URL.
fn temporary(args: &Args) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("understory-demo-");
    // /var/tmp is on disk where /tmp may be in memory.
    let parent = args.dir.clone().unwrap_or_else(|| {
        let var_tmp = PathBuf::from("/var/tmp");
        let may_write = rustix::fs::access(&var_tmp, rustix::fs::Access::WRITE_OK).is_ok();
        if may_write {
            var_tmp
        } else {
            std::env::temp_dir()
        }
    });
    builder
        .tempdir_in(&parent)
        .map_err(|e| CommandError::io("creating a directory in", parent.display(), &e))
}

fn show(
    args: &Args,
    cx: &Context,
    instance: &Instance,
    ends: &Receiver<End>,
    up: Duration,
) -> Result<()> {
    let step = |number: u32, what: &str, result: &str| {
        if !cx.json {
            cx.ui.print(format!(
                "{} {what:<28} {result}\n",
                cx.ui.style(Style::Bold, &number.to_string())
            ))
        } else {
            Ok(())
        }
    };
    if !cx.json {
        let title = cx
            .ui
            .style(Style::Bold, "Understory on this machine's own files");
        cx.ui.print(format!("{title}\n\n"))?;
    }
    let kind = if understory::namespace::in_user_namespace() {
        "without root"
    } else {
        "as root"
    };
    step(
        1,
        "mounted, served, overlaid",
        &format!(
            "in {:.2} s, {kind}, in a private namespace",
            up.as_secs_f64()
        ),
    )?;

    let sources = if args.from.is_empty() {
        trees::default_sources()
    } else {
        args.from.clone()
    };
    let found = trees::choose(&sources, args.size, args.files)?;
    let files: u64 = found.iter().map(Tree::files).sum();
    let apparent: u64 = found.iter().map(Tree::bytes).sum();
    step(
        2,
        "chose files of this machine",
        &format!(
            "{} files, {} in {} directories",
            ui::count(files),
            ui::bytes(apparent),
            found.len()
        ),
    )?;

    let (infos, import) = import(cx, instance, &found, ends)?;
    let nar_bytes: u64 = infos.iter().map(|i| i.nar_size).sum();
    step(
        3,
        "added them as store paths",
        &format!(
            "{} paths in {:.1} s, {}",
            infos.len(),
            import.as_secs_f64(),
            ui::rate(nar_bytes, import)
        ),
    )?;

    let merged = &instance.layout().merged;
    let through: Vec<PathBuf> = infos
        .iter()
        .map(|info| merged.join(info.path.base_name()))
        .collect();
    let plain_roots: Vec<PathBuf> = found.iter().map(|tree| tree.root.clone()).collect();
    // The import has just read the originals: both passes over them are warm, as is the second one
    // through the overlay. The first one through the overlay decompresses everything.
    let mut expected = Vec::new();
    let plain_first = trees::read(cx, &found, &plain_roots, ends, &mut |hash| {
        expected.push(hash);
    })?;
    let mut at = 0;
    let mut wrong = 0u64;
    let overlay_first = trees::read(cx, &found, &through, ends, &mut |hash| {
        wrong += u64::from(expected.get(at) != Some(&hash));
        at += 1;
    })?;
    if wrong > 0 || at != expected.len() {
        return Err(CommandError::new(
            crate::error::Code::Internal,
            format!(
                "{wrong} of {} files differ when they are read through the overlay",
                expected.len()
            ),
        ));
    }
    step(
        4,
        "read all through the overlay",
        &format!("{} files, each equal to its original", ui::count(at as u64)),
    )?;
    let plain_again = trees::read(cx, &found, &plain_roots, ends, &mut |_| {})?;
    let overlay_again = trees::read(cx, &found, &through, ends, &mut |_| {})?;

    let upper_bytes = add_on_top(instance, &through[0])?;
    step(
        5,
        "wrote on top",
        &format!(
            "a changed copy of a file; the upper layer has {}",
            ui::bytes(upper_bytes)
        ),
    )?;

    let nix = stock_nix(cx, instance, &infos)?;
    let text = nix
        .clone()
        .unwrap_or_else(|| "not installed: left out".into());
    step(6, "stock Nix on top", &text)?;

    let stats = instance.store().stats()?;
    let figures = Figures {
        files,
        trees: found.len() as u64,
        apparent_bytes: apparent,
        plain_disk_bytes: found.iter().map(Tree::disk_bytes).sum(),
        store_disk_bytes: stats.castore.disk_bytes + stats.database_bytes,
        up,
        import,
        plain: [plain_first, plain_again],
        overlay: [overlay_first, overlay_again],
        upper_bytes,
        nix,
    };
    if cx.json {
        return cx.ui.print_json(&json(&figures));
    }
    cx.ui.print(tables(cx, &figures))
}

/// Fails if somebody wants the demo to end.
pub(super) fn interrupted(ends: &Receiver<End>) -> Result<()> {
    match ends.try_recv() {
        Ok(_) => Err(CommandError::interrupted()),
        Err(_) => Ok(()),
    }
}

/// Adds trees on all cores. Results are in the order of the trees.
fn import(
    cx: &Context,
    instance: &Instance,
    trees: &[Tree],
    ends: &Receiver<End>,
) -> Result<(Vec<PathInfo>, Duration)> {
    let store = instance.store();
    let owner = store.temp_root_owner()?;
    let total: u64 = trees.iter().map(Tree::bytes).sum();
    let (next, done_paths, done_bytes) =
        (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let cancelled = AtomicBool::new(false);
    let results: Mutex<Vec<Option<understory::Result<PathInfo>>>> =
        Mutex::new(trees.iter().map(|_| None).collect());
    let progress = Progress::new(&cx.ui, "adding");
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let work = || {
            while !cancelled.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(tree) = trees.get(index) else { return };
                let added = understory::add::add_path(
                    store,
                    &owner,
                    &tree.root,
                    Some(&tree.name),
                    &understory::add::AddMethod::default(),
                    &BTreeSet::<StorePath>::new(),
                );
                done_paths.fetch_add(1, Ordering::Relaxed);
                done_bytes.fetch_add(tree.bytes(), Ordering::Relaxed);
                if let Ok(mut results) = results.lock() {
                    results[index] = Some(added);
                }
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|w| !w.is_finished()) {
            if let Ok(_end) = ends.recv_timeout(Duration::from_millis(100)) {
                cancelled.store(true, Ordering::Relaxed);
            }
            progress.update(Done {
                paths: (done_paths.load(Ordering::Relaxed), trees.len() as u64),
                bytes: (done_bytes.load(Ordering::Relaxed), total),
                new_bytes: 0,
            });
        }
    });
    progress.finish();
    let time = began.elapsed();
    if cancelled.load(Ordering::Relaxed) {
        return Err(CommandError::interrupted());
    }
    let results = results
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut infos = Vec::new();
    for result in results.into_iter().flatten() {
        infos.push(result?);
    }
    Ok((infos, time))
}

/// Copies a file of the lower layer within the overlay and changes it; returns the upper's size.
fn add_on_top(instance: &Instance, lower: &Path) -> Result<u64> {
    let layout: &Layout = instance.layout();
    let target = layout.merged.join("demo-on-top");
    let io = |verb: &str, e: &std::io::Error| CommandError::io(verb, target.display(), e);
    std::fs::create_dir(&target).map_err(|e| io("creating", &e))?;
    let text = format!("built on top of {}\n", lower.display());
    std::fs::write(target.join("result"), &text).map_err(|e| io("writing to", &e))?;
    let upper = layout.upper.join("demo-on-top/result");
    let found = std::fs::metadata(&upper)
        .map_err(|e| CommandError::io("reading", upper.display(), &e))?
        .len();
    // The lower layer is read-only, whoever asks.
    if std::fs::write(instance.layout().lower.join("x"), b"x").is_ok() {
        return Err(CommandError::new(
            crate::error::Code::Internal,
            "the lower layer took a write",
        ));
    }
    std::fs::remove_dir_all(&target).map_err(|e| io("removing", &e))?;
    Ok(found)
}

/// Lets an installed Nix query and use the store; says what it did.
fn stock_nix(cx: &Context, instance: &Instance, infos: &[PathInfo]) -> Result<Option<String>> {
    let (Some(nix), Some(first)) = (env::program("nix"), infos.first()) else {
        return Ok(None);
    };
    let dir = instance.store().store_dir();
    let run = |args: &[&str]| -> Result<(std::process::Output, Duration)> {
        let mut words: Vec<std::ffi::OsString> = vec![nix.clone().into()];
        words.extend(args.iter().map(Into::into));
        let began = Instant::now();
        let output = enter::command(None, instance.layout(), instance.url(), dir, &words)?
            .output()
            .map_err(|e| CommandError::io("running", nix.display(), &e))?;
        Ok((output, began.elapsed()))
    };
    let (version, _) = run(&["--version"])?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let path = dir.print(&first.path);
    let (output, time) = run(&["path-info", "--json", &path])?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        cx.ui.warn(format_args!(
            "{version} could not use the overlay store: {said}"
        ));
        return Ok(Some(format!("{version}: failed")));
    }
    Ok(Some(format!(
        "{version}: asked for {} in {} ms",
        first.path,
        time.as_millis()
    )))
}

fn json(f: &Figures) -> serde_json::Value {
    let passes = |p: &[Pass; 2]| {
        p.iter()
            .map(|p| serde_json::json!({"bytes": p.bytes, "seconds": p.time.as_secs_f64()}))
            .collect::<Vec<_>>()
    };
    serde_json::json!({
        "trees": f.trees,
        "files": f.files,
        "apparentBytes": f.apparent_bytes,
        "plainDiskBytes": f.plain_disk_bytes,
        "storeDiskBytes": f.store_disk_bytes,
        "upSeconds": f.up.as_secs_f64(),
        "importSeconds": f.import.as_secs_f64(),
        "plainRead": passes(&f.plain),
        "overlayRead": passes(&f.overlay),
        "upperBytes": f.upper_bytes,
        "nix": f.nix,
    })
}

fn tables(cx: &Context, f: &Figures) -> String {
    let mut out = String::new();
    let mut head = |title: &str, left: &str, right: &str| {
        out.push_str(&format!(
            "\n{}{left:>20}{right:>22}\n",
            cx.ui.style(Style::Bold, &format!("{title:<30}"))
        ));
    };
    head("Size", "bytes", "of the files");
    let row = |name: &str, a: String, b: String| {
        let text = format!("{name:<30}{a:>20}{b:>22}");
        format!("{}\n", text.trim_end())
    };
    let whole = f.apparent_bytes;
    out.push_str(&row(
        "the files themselves",
        ui::bytes(whole),
        String::new(),
    ));
    for (name, bytes) in [
        ("plain directories on disk", f.plain_disk_bytes),
        ("Understory on disk", f.store_disk_bytes),
    ] {
        out.push_str(&row(name, ui::bytes(bytes), ui::percent(bytes, whole)));
    }
    let title = format!("{:<30}", "Speed (one thread, hashing)");
    out.push_str(&format!(
        "\n{}{:>20}{:>22}\n",
        cx.ui.style(Style::Bold, &title),
        "plain directories",
        "through the overlay"
    ));
    let names = ["read all: first time", "read all: again, from memory"];
    for (i, name) in names.into_iter().enumerate() {
        let rates = [f.plain[i], f.overlay[i]].map(|p| ui::rate(p.bytes, p.time));
        // What was just imported is in memory already.
        let note = if i == 0 { " *" } else { "" };
        out.push_str(&row(name, format!("{}{note}", rates[0]), rates[1].clone()));
    }
    out.push_str("\n* the import had just read the files, so they came from memory\n");
    out
}
