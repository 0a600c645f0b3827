//! What a store knows about a valid path: Nix's `ValidPathInfo`.

use crate::content_address::References;
use crate::{ContentAddress, NarHash, PublicKeys, SecretKey, Signature, StoreDir, StorePath};
use std::collections::BTreeSet;

/// The metadata of one valid store path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Size of its NAR in bytes.
    pub nar_size: u64,
    /// References, itself included if it refers to itself.
    pub references: BTreeSet<StorePath>,
    /// The derivation that made it.
    pub deriver: Option<StorePath>,
    /// Unix seconds; 0 means "now" when it is registered.
    pub registration_time: u64,
    /// True if it was built here.
    pub ultimate: bool,
    /// Signatures.
    pub signatures: BTreeSet<Signature>,
    /// Content address, if it has one.
    pub ca: Option<ContentAddress>,
}

impl PathInfo {
    /// Returns the text that signatures cover: `1;<path>;sha256:<nix32>;<size>;<refs>`.
    pub fn fingerprint(&self, dir: &StoreDir) -> String {
        let mut text = format!(
            "1;{};{};{};",
            dir.print(&self.path),
            self.nar_hash,
            self.nar_size
        );
        for (index, reference) in self.references.iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            text.push_str(dir.as_str());
            text.push('/');
            text.push_str(reference.base_name());
        }
        text
    }

    /// True if `ca` makes exactly this path (with these references).
    ///
    /// This says nothing about the contents: whoever adds the path must hash them too.
    pub fn is_content_addressed(&self, dir: &StoreDir) -> bool {
        let Some(ca) = &self.ca else { return false };
        let references = References::of(&self.path, &self.references);
        ca.make_path(dir, &self.path.to_name(), &references)
            .is_ok_and(|path| path == self.path)
    }

    /// True if a key of `keys` made one of the signatures.
    pub fn is_signed_by(&self, dir: &StoreDir, keys: &PublicKeys) -> bool {
        if keys.is_empty() || self.signatures.is_empty() {
            return false;
        }
        let fingerprint = self.fingerprint(dir);
        self.signatures
            .iter()
            .any(|signature| keys.verify(fingerprint.as_bytes(), signature))
    }

    /// Adds a signature made with `key`.
    pub fn sign(&mut self, dir: &StoreDir, key: &SecretKey) {
        let signature = key.sign(self.fingerprint(dir).as_bytes());
        self.signatures.insert(signature);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Hash, HashAlgorithm};

    fn info() -> PathInfo {
        let path = |text| StorePath::from_base_name(text).unwrap();
        PathInfo {
            path: path("00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432"),
            nar_hash: NarHash::try_from(Hash::of(HashAlgorithm::Sha256, b"")).unwrap(),
            nar_size: 464_152,
            references: [path("7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27")].into(),
            deriver: None,
            registration_time: 0,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        }
    }

    #[test]
    fn fingerprint() {
        let mut info = info();
        let begin = "1;/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432;\
            sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73;464152;";
        let reference = "/nix/store/7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27";
        assert_eq!(
            info.fingerprint(&StoreDir::default()),
            format!("{begin}{reference}")
        );
        info.references.insert(info.path.clone());
        let own = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432";
        assert_eq!(
            info.fingerprint(&StoreDir::default()),
            format!("{begin}{own},{reference}")
        );
        info.references.clear();
        assert_eq!(info.fingerprint(&StoreDir::default()), begin);
    }

    #[test]
    fn signatures_cover_references_and_store_dir() {
        let dir = StoreDir::default();
        let key = SecretKey::generate("test-1").unwrap();
        let keys = PublicKeys::from_iter([key.public()]);
        let mut info = info();
        info.sign(&dir, &key);
        assert!(info.is_signed_by(&dir, &keys));
        assert!(!info.is_signed_by(&StoreDir::new("/t").unwrap(), &keys));
        assert!(!info.is_signed_by(&dir, &PublicKeys::default()));
        info.references.clear();
        assert!(!info.is_signed_by(&dir, &keys));
    }
}
