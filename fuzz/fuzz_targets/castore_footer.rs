//! Any bytes as a castore's footer and trailer: what is taken is whole.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| understory_castore::fuzzing::footer(bytes));
