//! A content address that parses must print to something that parses to it, and make a path.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::content_address::{ContentAddress, References, parse_method, print_method};
use understory_nix::{StoreDir, StorePathName};

fuzz_target!(|text: &str| {
    if let Ok(address) = ContentAddress::parse(text) {
        assert_eq!(ContentAddress::parse(&address.to_string()), Ok(address));
        let name = StorePathName::new("name").expect("it is one");
        address
            .make_path(&StoreDir::default(), &name, &References::default())
            .expect("it has no references");
    }
    if let Ok((method, algorithm)) = parse_method(text) {
        assert_eq!(print_method(method, algorithm), text);
    }
});
