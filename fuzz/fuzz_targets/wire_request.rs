//! A client's bytes: version, features, operation, arguments. What is read must be written the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use understory_nix::StoreDir;
use understory_nix::wire::{Budget, FramedReader};
use understory_nix::worker::{Body, Decoder, Encoder, Features, Op, Protocol, Request, Version};

fuzz_target!(|data: &[u8]| {
    let [minor, flags, data @ ..] = data else {
        return;
    };
    let protocol = Protocol {
        version: Version::new(1, 21 + minor % 18),
        features: Features {
            realisation_with_path: flags & 1 != 0,
            delete_dead_specific_referrers: flags & 2 != 0,
        },
    };
    let budget = Budget::new(1 << 20);
    let dir = StoreDir::default();
    let mut decoder = Decoder::new(data, dir.clone(), protocol, Some(budget.clone()));
    while let Ok(number) = decoder.u64() {
        let Some(op) = Op::from_wire(number).filter(|op| op.exists(protocol)) else {
            break;
        };
        let Ok(request) = decoder.message(|d| Request::read(op, d)) else {
            break;
        };
        if let Ok(request) = request {
            let mut encoder = Encoder::new(Vec::new(), dir.clone(), protocol);
            request
                .write(&mut encoder)
                .expect("what was read can be written");
            let bytes = encoder.into_inner();
            let mut again = Decoder::new(&bytes[..], dir.clone(), protocol, None);
            assert_eq!(again.u64().ok().and_then(Op::from_wire), Some(op));
            let again = again.message(|d| Request::read(op, d));
            assert_eq!(again.expect("the stream is whole"), Ok(request));
        }
        if op.body(protocol) == Body::Framed
            && FramedReader::new(decoder.reader()).drain(1 << 20).is_err()
        {
            break;
        }
        decoder.release();
    }
    drop(decoder);
    assert_eq!(budget.used(), 0);
});
