//! A narinfo that parses must print to something that parses to it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::StoreDir;
use understory_nix::narinfo::{CacheInfo, NarInfo};

fuzz_target!(|text: &str| {
    let dir = StoreDir::default();
    if let Ok(info) = NarInfo::parse(&dir, "fuzz", text) {
        assert_eq!(NarInfo::parse(&dir, "fuzz", &info.print(&dir)), Ok(info));
    }
    if let Ok(info) = CacheInfo::parse("fuzz", text) {
        assert_eq!(CacheInfo::parse("fuzz", &info.print()), Ok(info));
    }
});
