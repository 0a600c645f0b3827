//! Shows that memory stays bounded: `bounds CASTORE files COUNT` or `bounds CASTORE bytes COUNT`.
//!
//! Imports generated small files (five directories of one tree), or one generated large file, and prints
//! time and peak memory.
#![allow(clippy::print_stdout, reason = "a measuring tool")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use understory_castore::{Castore, OpenOptions, TreeBuilder};

/// Directories that the small files are spread over.
const DIRECTORIES: u64 = 5;
const PART_BYTES: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, what, count] = args.as_slice() else {
        return Err("usage: bounds CASTORE files|bytes COUNT".into());
    };
    let count: u64 = count.parse()?;
    let dir = Path::new(dir);
    Castore::create(dir)?;
    let castore = Castore::open(dir, &OpenOptions::default())?;
    let writer = castore.writer()?;
    let mut builder = TreeBuilder::new(Arc::clone(&writer));
    let start = Instant::now();
    builder.directory_begin(None)?;
    if what == "files" {
        for directory in 0..DIRECTORIES {
            builder.directory_begin(Some(format!("directory-{directory}").as_bytes()))?;
            for number in 0..count / DIRECTORIES {
                let name = format!("some-file-{number}.txt");
                let text = format!("contents of file {number} in {directory}\n").repeat(20);
                let mut sink = builder.file(Some(name.as_bytes()), false, text.len() as u64)?;
                sink.write(text.as_bytes())?;
                sink.finish()?;
            }
            builder.directory_end()?;
        }
    } else {
        let mut sink = builder.file(Some(b"large"), false, count)?;
        let mut part = vec![0_u8; PART_BYTES as usize];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..count / PART_BYTES {
            // Words of 16 different values: compresses to about a half.
            for byte in &mut part {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                *byte = (random >> 60) as u8 * 16;
            }
            sink.write(&part)?;
        }
        sink.finish()?;
    }
    builder.directory_end()?;
    let root = builder.finish()?;
    writer.sync()?;
    println!("{root:?} in {:.1} s", start.elapsed().as_secs_f64());
    println!("{:?}", writer.counters());
    println!("{:?}", castore.stats()?);
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines() {
        if line.starts_with("VmHWM:") || line.starts_with("RssAnon:") {
            println!("{line}");
        }
    }
    Ok(())
}
