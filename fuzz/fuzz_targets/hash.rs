//! A hash that parses must print in every spelling to something that parses to it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::{Hash, HashAlgorithm};

fuzz_target!(|text: &str| {
    for default in [
        None,
        Some(HashAlgorithm::Sha256),
        Some(HashAlgorithm::Sha512),
    ] {
        let Ok(hash) = Hash::parse(text, default) else {
            continue;
        };
        assert_eq!(Hash::parse(&hash.to_string(), None), Ok(hash));
        assert_eq!(Hash::parse(&hash.to_sri(), None), Ok(hash));
        for digest in [hash.to_base16(), hash.to_nix32(), hash.to_base64()] {
            assert_eq!(Hash::parse_unprefixed(&digest, hash.algorithm()), Ok(hash));
        }
    }
});
