//! What several test programs make.

pub(crate) mod overlay;

use std::collections::BTreeSet;
use understory_nix::{Hash, HashAlgorithm, NarHash, PathInfo, StorePath};

/// A directory with one file, as an archive; and a path info for it.
pub(crate) fn archive(name: &str, text: &str, references: &[&StorePath]) -> (PathInfo, Vec<u8>) {
    let mut nar = understory_nix::nar::Writer::new(Vec::new());
    nar.directory_begin(None).unwrap();
    nar.file(Some(b"file"), false, text.len() as u64).unwrap();
    nar.contents(text.as_bytes()).unwrap();
    nar.directory_end().unwrap();
    let nar = nar.finish().unwrap();
    let digest = Hash::of(HashAlgorithm::Sha1, name.as_bytes());
    let path = StorePath::from_base_name(&format!("{}-{name}", digest.to_nix32())).unwrap();
    let info = PathInfo {
        path,
        nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, &nar)).unwrap(),
        nar_size: nar.len() as u64,
        references: references.iter().copied().cloned().collect(),
        deriver: None,
        registration_time: 0,
        ultimate: false,
        signatures: BTreeSet::new(),
        ca: None,
    };
    (info, nar)
}
