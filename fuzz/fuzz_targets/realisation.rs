//! A realisation that parses must print to something that parses to it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::realisation::{DrvOutput, Realisation};

fuzz_target!(|text: &str| {
    if let Ok(realisation) = Realisation::parse(text) {
        let again = Realisation::parse(&realisation.print()).expect("it was printed by us");
        assert_eq!(again, realisation);
    }
    if let Ok(id) = DrvOutput::parse(text) {
        assert_eq!(
            DrvOutput::parse(&id.to_string()).expect("it was printed by us"),
            id
        );
    }
});
