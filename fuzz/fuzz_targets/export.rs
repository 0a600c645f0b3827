//! A trailer that parses must print to something that parses to it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::StoreDir;
use understory_nix::export::{Trailer, read_begin};

fuzz_target!(|bytes: &[u8]| {
    let dir = StoreDir::default();
    let _ = read_begin(bytes);
    if let Ok(trailer) = Trailer::read(bytes, &dir) {
        let mut out = Vec::new();
        trailer.write(&mut out, &dir).expect("memory does not fail");
        assert_eq!(
            Trailer::read(&out[..], &dir).expect("it was written by us"),
            trailer
        );
    }
});
