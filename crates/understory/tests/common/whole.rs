//! A store that has no damage.

use std::sync::atomic::AtomicBool;
use understory::Store;

/// Reads all contents.
pub(crate) fn assert_whole(store: &Store) {
    let mut findings = Vec::new();
    let cancel = AtomicBool::new(false);
    store
        .check(
            true,
            &mut |_| {},
            &mut |finding| findings.push(finding),
            &cancel,
        )
        .unwrap();
    assert_eq!(findings, []);
}
