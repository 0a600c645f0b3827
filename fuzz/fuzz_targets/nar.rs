//! What the reader accepts, the writer must write again byte for byte, wherever the stream's
//! buffer ends; and the reader must leave what follows alone.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::io::{BufReader, Read as _};
use understory_nix::nar;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    let Ok(written) = nar::copy(&mut rest, Vec::new()) else {
        assert!(nar::copy(BufReader::with_capacity(3, bytes), Vec::new()).is_err());
        return;
    };
    assert_eq!(&bytes[..written.len()], written);
    assert_eq!(&bytes[written.len()..], rest);
    let mut stream = BufReader::with_capacity(3, bytes);
    assert_eq!(
        nar::copy(&mut stream, Vec::new()).expect("it was good before"),
        written
    );
    let mut left = Vec::new();
    stream.read_to_end(&mut left).expect("memory does not fail");
    assert_eq!(left, rest);
});
