//! EROFS images: whatever the bytes, an error and bounded work.
#![no_main]

use libfuzzer_sys::fuzz_target;
use understory_erofs::Image;

fuzz_target!(|bytes: &[u8]| {
    // Past the checksum, which would stop nearly all: without its feature bit.
    let mut bytes = bytes.to_vec();
    if let Some(features) = bytes.get_mut(1032) {
        *features &= !1;
    }
    let Ok(image) = Image::open(bytes.as_slice()) else {
        return;
    };
    let _ = image.verify(false);
    let Ok(root) = image.root() else { return };
    let _ = image.lookup(&root, b"name");
    let mut numbers = Vec::new();
    let _ = image.entries(&root, |entry| {
        numbers.push(entry.number);
        numbers.len() < 20
    });
    for number in numbers {
        let Ok(inode) = image.inode(number) else {
            continue;
        };
        let mut buffer = [0; 64];
        let _ = image.read_contents(&inode, 0, &mut buffer);
        let _ = image.target(&inode);
        let _ = image.extent(&inode, inode.size / 2);
    }
});
