//! A derivation that parses must print to something that parses to it; its paths must not panic.
#![no_main]
use libfuzzer_sys::fuzz_target;
use understory_nix::derivation::{Derivation, HashModulo};
use understory_nix::{StoreDir, StorePath, StorePathName};

fuzz_target!(|text: &[u8]| {
    let dir = StoreDir::default();
    let name = StorePathName::new("name").expect("it is one");
    let Ok(derivation) = Derivation::parse(&dir, &name, text) else {
        return;
    };
    if let Ok(printed) = derivation.print(&dir) {
        assert_eq!(
            Derivation::parse(&dir, &name, &printed).as_ref(),
            Ok(&derivation)
        );
    }
    let _ = derivation.make_path(&dir);
    let _ = HashModulo::new(dir, |_: &StorePath| Ok(derivation.clone())).output_paths(&derivation);
});
