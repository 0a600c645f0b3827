//! Measures how fast hash parts are found: `scan FILE…`.
//!
//! Each file is read once and scanned several times from memory with a store directory and ten known hash parts,
//! as a tree's builder does it. Prints a rate for each and for all.
#![allow(clippy::print_stdout, reason = "a measuring tool")]

use std::error::Error;
use std::time::Instant;
use understory_castore::Masks;

/// Bytes scanned of each file at least.
const BYTES: usize = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let known = (0..10_u8).map(|number| [b'0' + number; 32]);
    let masks = Masks::new(b"/nix/store", known);
    for name in std::env::args_os().skip(1) {
        let bytes = std::fs::read(&name)?;
        let rounds = BYTES.div_ceil(bytes.len().max(1));
        let start = Instant::now();
        let mut found = 0;
        for _ in 0..rounds {
            found += masks.count(&bytes);
        }
        println!(
            "{}: {} bytes, {} hash parts, {:.2} GB/s",
            name.display(),
            bytes.len(),
            found / rounds,
            (rounds * bytes.len()) as f64 / 1e9 / start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
