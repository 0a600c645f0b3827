//! A path that parses must print to something that parses to it, in any store directory.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::{StoreDir, StorePath};

fuzz_target!(|input: (&str, &[u8])| {
    let (text, path) = input;
    if let Ok(path) = StorePath::from_base_name(text) {
        assert_eq!(StorePath::from_parts(path.hash(), &path.to_name()), path);
    }
    for dir in [StoreDir::new(text), Ok(StoreDir::default())]
        .into_iter()
        .flatten()
    {
        assert_eq!(StoreDir::new(dir.as_str()).as_ref(), Ok(&dir));
        if let Ok(path) = dir.parse(path) {
            assert_eq!(dir.parse(dir.print(&path).as_bytes()).as_ref(), Ok(&path));
        }
        if let Ok((_, rest)) = dir.parse_below(path) {
            assert!(
                !rest.starts_with(b"/")
                    && !rest.split(|&byte| byte == b'/').any(|part| part == b"..")
            );
        }
    }
});
