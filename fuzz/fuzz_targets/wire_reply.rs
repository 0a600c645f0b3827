//! A server's bytes: log messages and the replies that have a structure.
#![no_main]

use libfuzzer_sys::fuzz_target;
use understory_nix::StoreDir;
use understory_nix::worker::{
    BuildResult, Decoder, Encoder, Features, KeyedBuildResult, LogMessage, MissingInfo, Protocol,
    Version, WireRealisation, read_path_info,
};

fuzz_target!(|data: &[u8]| {
    let [minor, flags, data @ ..] = data else {
        return;
    };
    let protocol = Protocol {
        version: Version::new(1, 21 + minor % 18),
        features: Features {
            realisation_with_path: flags & 1 != 0,
            delete_dead_specific_referrers: false,
        },
    };
    let dir = StoreDir::default();
    let decoder = || Decoder::new(data, dir.clone(), protocol, None);
    match flags >> 4 {
        0 => drop(decoder().message(BuildResult::read)),
        1 => drop(decoder().message(KeyedBuildResult::read)),
        2 => drop(decoder().message(MissingInfo::read)),
        3 => drop(decoder().message(WireRealisation::read)),
        4 => drop(decoder().message(read_path_info)),
        _ => {
            let mut decoder = decoder();
            while let Ok(Ok(message)) = decoder.message(LogMessage::read) {
                let mut encoder = Encoder::new(Vec::new(), dir.clone(), protocol);
                message
                    .write(&mut encoder)
                    .expect("what was read can be written");
                let bytes = encoder.into_inner();
                let again =
                    Decoder::new(&bytes[..], dir.clone(), protocol, None).message(LogMessage::read);
                assert_eq!(again.expect("the stream is whole"), Ok(message));
            }
        }
    }
});
