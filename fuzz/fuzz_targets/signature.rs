//! Keys and signatures that parse must print to themselves.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::{PublicKey, PublicKeys, SecretKey, Signature};

fuzz_target!(|text: &str| {
    if let Ok(key) = PublicKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
    if let Ok(key) = SecretKey::parse(text) {
        let keys = PublicKeys::from_iter([key.public()]);
        assert!(keys.verify(b"text", &key.sign(b"text")));
    }
    if let (Ok(signature), Ok(keys)) = (Signature::parse(text), PublicKeys::parse(text)) {
        keys.verify(text.as_bytes(), &signature);
    }
});
