//! Measures ingest and reading: `ingest DIRECTORY CASTORE [LEVEL]`.
//!
//! Each entry of DIRECTORY becomes one tree. Prints sizes, the ratio and rates; the reading pass reads
//! every file twice, the second time mostly from the page cache and the frame cache.
#![allow(clippy::print_stdout, reason = "a measuring tool")]

use std::error::Error;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use understory_castore::{Castore, Node, OpenOptions, TreeBuilder};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(from), Some(to)) = (
        args.next().map(PathBuf::from),
        args.next().map(PathBuf::from),
    ) else {
        return Err("usage: ingest DIRECTORY CASTORE [LEVEL]".into());
    };
    let level = match args.next() {
        Some(level) => level.to_string_lossy().parse()?,
        None => OpenOptions::default().compression_level,
    };
    Castore::create(&to)?;
    let castore = Castore::open(
        &to,
        &OpenOptions {
            compression_level: level,
            ..OpenOptions::default()
        },
    )?;
    let writer = castore.writer()?;
    let start = Instant::now();
    let mut roots = Vec::new();
    let mut entries: Vec<_> = std::fs::read_dir(&from)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let mut builder = TreeBuilder::new(Arc::clone(&writer));
        if add(&mut builder, None, &entry.path())? {
            roots.push(builder.finish()?);
        }
    }
    let read = start.elapsed();
    writer.sync()?;
    let taken = start.elapsed();
    let counters = writer.counters();
    let stats = castore.stats()?;
    println!("{counters:?}");
    println!("{stats:?}");
    println!(
        "ingest: {:.1} MB in {:.2} s (sync {:.2} s): {:.0} MB/s, new data {:.0} MB/s, on disk {:.4}",
        counters.given_bytes as f64 / 1e6,
        taken.as_secs_f64(),
        (taken - read).as_secs_f64(),
        counters.given_bytes as f64 / 1e6 / taken.as_secs_f64(),
        counters.new_bytes as f64 / 1e6 / taken.as_secs_f64(),
        stats.disk_bytes as f64 / counters.given_bytes as f64,
    );
    println!("peak resident after ingest: {}", peak_resident()?);
    for round in 1..=2 {
        let start = Instant::now();
        let (mut files, mut bytes) = (0, 0);
        for root in &roots {
            read_all(&castore, root, &mut files, &mut bytes)?;
        }
        let taken = start.elapsed();
        println!(
            "read {round}: {files} files, {:.0} MB/s, {:.0} files/s",
            bytes as f64 / 1e6 / taken.as_secs_f64(),
            f64::from(files) / taken.as_secs_f64(),
        );
    }
    println!("peak resident: {}", peak_resident()?);
    Ok(())
}

/// Adds what lies at `path`; false for what is no file, directory or symlink.
fn add(builder: &mut TreeBuilder, name: Option<&[u8]>, path: &Path) -> Result<bool> {
    let metadata = std::fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        let target = std::fs::read_link(path)?;
        builder.symlink(name, target.as_os_str().as_bytes())?;
    } else if metadata.is_dir() {
        builder.directory_begin(name)?;
        let mut entries: Vec<_> = std::fs::read_dir(path)?.collect::<std::io::Result<_>>()?;
        // As archives have them.
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            add(builder, Some(entry.file_name().as_bytes()), &entry.path())?;
        }
        builder.directory_end()?;
    } else if metadata.is_file() {
        let executable = metadata.permissions().mode() & 0o100 != 0;
        let mut sink = builder.file(name, executable, metadata.len())?;
        let mut file = std::fs::File::open(path)?;
        let mut buffer = vec![0; metadata.len().clamp(1, 256 << 10) as usize];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            sink.write(&buffer[..count])?;
        }
        sink.finish()?;
    } else {
        return Ok(false);
    }
    Ok(true)
}

fn read_all(castore: &Castore, node: &Node, files: &mut u32, bytes: &mut u64) -> Result<()> {
    match node {
        Node::Directory { digest, .. } => {
            for entry in castore.directory(digest)?.entries() {
                read_all(castore, &entry.node, files, bytes)?;
            }
        }
        Node::File { digest, size, .. } => {
            let blob = castore.blob(digest, *size)?;
            let mut buffer = vec![0; 128 << 10];
            let mut offset = 0;
            while offset < *size {
                offset += blob.read_at(offset, &mut buffer)? as u64;
            }
            *files += 1;
            *bytes += size;
        }
        Node::Symlink { .. } => {}
    }
    Ok(())
}

fn peak_resident() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    Ok(line.unwrap_or("unknown").to_owned())
}
