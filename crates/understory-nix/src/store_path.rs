//! Store directories and store paths.
//!
//! The rules and the words of the errors are those of Nix 2.34.8; the one difference is that the
//! byte between hash part and name must be a dash here.

use crate::nix32;
use std::fmt;
use std::sync::Arc;

/// Characters of the hash part.
const HASH_CHARS: usize = 32;
/// Longest name in bytes: 255 for a file name, less hash part, dash and room for `.drv` and `.lock`.
pub const NAME_BYTES_MAX: usize = 211;
/// Longest store directory or unparsed store path accepted, in bytes: Linux' `PATH_MAX`.
const PATH_BYTES_MAX: usize = 4096;

/// A store path without its store directory: `<32 nix32 characters>-<name>`, which is also how it displays.
///
/// Sorts as its text does. Copies share the text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct StorePath {
    base_name: Arc<str>,
}

impl StorePath {
    /// Parses `<hash>-<name>`.
    ///
    /// # Errors
    /// Says which rule is broken.
    pub fn from_base_name(base_name: &str) -> Result<Self, StorePathError> {
        match check_base_name(base_name) {
            Ok(()) => Ok(Self {
                base_name: base_name.into(),
            }),
            Err(reason) => Err(StorePathError::path(base_name, reason)),
        }
    }

    /// Makes a path of its parts.
    pub fn from_parts(hash: StorePathHash, name: &StorePathName) -> Self {
        Self {
            base_name: format!("{hash}-{}", name.as_str()).into(),
        }
    }

    /// `<hash>-<name>`.
    pub fn base_name(&self) -> &str {
        &self.base_name
    }

    /// The 32 characters.
    pub fn hash_part(&self) -> &str {
        &self.base_name[..HASH_CHARS]
    }

    /// The decoded hash part.
    ///
    /// # Panics
    /// Never: the characters were checked when the path was made.
    pub fn hash(&self) -> StorePathHash {
        let mut bytes = [0; 20];
        match nix32::decode_into(self.hash_part().as_bytes(), &mut bytes) {
            Ok(()) => StorePathHash(bytes),
            Err(error) => unreachable!("store path {self} was checked: {error}"),
        }
    }

    /// The name after the dash.
    pub fn name(&self) -> &str {
        &self.base_name[HASH_CHARS + 1..]
    }

    /// The name after the dash, as a checked name.
    pub fn to_name(&self) -> StorePathName {
        StorePathName(self.name().into())
    }

    /// True for `*.drv`.
    pub fn is_derivation(&self) -> bool {
        self.name().ends_with(".drv")
    }
}
impl PartialOrd for StorePath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for StorePath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.base_name.cmp(&other.base_name)
    }
}
impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base_name)
    }
}
impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base_name)
    }
}

/// The 20 bytes of a store path's hash part. Displays as 32 nix32 characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePathHash(pub [u8; 20]);

impl StorePathHash {
    /// Parses the 32 characters.
    ///
    /// # Errors
    /// A wrong length or character.
    pub fn parse(text: &str) -> Result<Self, nix32::DecodeError> {
        let mut bytes = [0; 20];
        nix32::decode_into(text.as_bytes(), &mut bytes)?;
        Ok(Self(bytes))
    }
}
impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&nix32::encode(&self.0))
    }
}
impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The name of a store path: 1 to 211 bytes of `[0-9A-Za-z+-._?=]`, with Nix's rules for dots.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct StorePathName(Box<str>);

impl StorePathName {
    /// Checks a name.
    ///
    /// # Errors
    /// The name breaks a rule, which the error says.
    pub fn new(name: &str) -> Result<Self, StorePathError> {
        match check_name(name.as_bytes()) {
            Ok(()) => Ok(Self(name.into())),
            Err(reason) => Err(StorePathError {
                what: "name",
                path: name.to_owned(),
                reason,
            }),
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for StorePathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A logical store directory such as `/nix/store`: absolute, canonical, UTF-8.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct StoreDir(Box<str>);

impl StoreDir {
    /// Checks and canonicalises (lexically) a directory.
    ///
    /// # Errors
    /// It is not absolute, is `/`, holds NUL, or is longer than 4096 bytes.
    pub fn new(dir: &str) -> Result<Self, StorePathError> {
        let error = |reason: &str| StorePathError {
            what: "store directory",
            path: dir.to_owned(),
            reason: reason.to_owned(),
        };
        if !dir.starts_with('/') {
            return Err(error("is not an absolute path"));
        }
        if dir.contains('\0') {
            return Err(error("contains a NUL byte"));
        }
        if dir.len() > PATH_BYTES_MAX {
            return Err(error("is longer than 4096 bytes"));
        }
        let components = canonical_components(dir.as_bytes());
        if components.is_empty() {
            return Err(error("is the root directory"));
        }
        let mut text = String::with_capacity(dir.len());
        for range in components {
            text.push('/');
            text.push_str(&dir[range]);
        }
        Ok(Self(text.into()))
    }

    /// As text, without a slash at the end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Parses a full store path. As Nix does, `.` `..` and repeated slashes are resolved
    /// lexically first, and the path must then be a direct child of this directory.
    ///
    /// # Errors
    /// Not in the store, or not a store path.
    pub fn parse(&self, path: &[u8]) -> Result<StorePath, StorePathError> {
        if let Some(store_path) = self.parse_canonical(path) {
            return Ok(store_path);
        }
        let components = self.components(path)?;
        let base_name = match self.child(path, &components) {
            Some((base_name, [])) => base_name,
            _ => return Err(self.not_in_store(path)),
        };
        parse_base_name(base_name)
    }

    /// Splits a path to or below a store object into it and the rest (without leading slash).
    ///
    /// Empty components and `.` of the rest are the caller's; the rest must not hold `..`.
    ///
    /// # Errors
    /// Not in the store, or not a store path.
    pub fn parse_below<'a>(&self, path: &'a [u8]) -> Result<(StorePath, &'a [u8]), StorePathError> {
        let components = self.components(path)?;
        let Some((base_name, below)) = self.child(path, &components) else {
            return Err(self.not_in_store(path));
        };
        let store_path = parse_base_name(base_name)?;
        let rest = match (below.first(), below.last()) {
            (Some(first), Some(last)) => &path[first.start..last.end],
            _ => &[],
        };
        if rest
            .split(|&byte| byte == b'/')
            .any(|component| component == b"..")
        {
            return Err(StorePathError::path(
                path,
                "has a '..' below the store object".to_owned(),
            ));
        }
        Ok((store_path, rest))
    }

    /// The full path as text.
    pub fn print(&self, path: &StorePath) -> String {
        format!("{}/{}", self.0, path)
    }

    /// Parses a path that is spelt the usual way; `None` says to look closer.
    fn parse_canonical(&self, path: &[u8]) -> Option<StorePath> {
        let base_name = path.strip_prefix(self.0.as_bytes())?.strip_prefix(b"/")?;
        StorePath::from_base_name(std::str::from_utf8(base_name).ok()?).ok()
    }

    fn components(&self, path: &[u8]) -> Result<Vec<std::ops::Range<usize>>, StorePathError> {
        if !path.starts_with(b"/") {
            return Err(StorePathError::path(
                path,
                "is not an absolute path".to_owned(),
            ));
        }
        if path.len() > 2 * PATH_BYTES_MAX {
            return Err(StorePathError::path(
                &path[..64],
                "is longer than 8192 bytes".to_owned(),
            ));
        }
        Ok(canonical_components(path))
    }

    /// Returns the component below this directory and those below that, if there is one.
    fn child<'a, 'b>(
        &self,
        path: &'a [u8],
        components: &'b [std::ops::Range<usize>],
    ) -> Option<(&'a [u8], &'b [std::ops::Range<usize>])> {
        let mut rest = components.iter();
        for expected in self.0.split('/').skip(1) {
            if path[rest.next()?.clone()] != *expected.as_bytes() {
                return None;
            }
        }
        let base_name = &path[rest.next()?.clone()];
        Some((base_name, rest.as_slice()))
    }

    fn not_in_store(&self, path: &[u8]) -> StorePathError {
        StorePathError::path(path, "is not in the Nix store".to_owned())
    }
}
impl Default for StoreDir {
    fn default() -> Self {
        Self("/nix/store".into())
    }
}
impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not a store path or store directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} '{path}' {reason}")]
pub struct StorePathError {
    /// `path`, `name` or `store directory`.
    pub what: &'static str,
    /// The text as it was given (lossy).
    pub path: String,
    /// What is wrong with it, as the rest of a sentence: `is not in the Nix store`.
    pub reason: String,
}

impl StorePathError {
    fn path(path: impl AsRef<[u8]>, reason: String) -> Self {
        Self {
            what: "path",
            path: String::from_utf8_lossy(path.as_ref()).into_owned(),
            reason,
        }
    }
}

fn parse_base_name(base_name: &[u8]) -> Result<StorePath, StorePathError> {
    match std::str::from_utf8(base_name) {
        Ok(text) => StorePath::from_base_name(text),
        Err(_) => Err(StorePathError::path(
            base_name,
            "is not a valid store path: it is not ASCII".to_owned(),
        )),
    }
}

/// Resolves `.`, `..` and repeated slashes of an absolute path, without looking at any disk.
fn canonical_components(path: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut components: Vec<std::ops::Range<usize>> = Vec::new();
    let mut start = 0;
    for component in path.split(|&byte| byte == b'/') {
        let range = start..start + component.len();
        start = range.end + 1;
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop();
            }
            _ => components.push(range),
        }
    }
    components
}

fn check_base_name(base_name: &str) -> Result<(), String> {
    let bytes = base_name.as_bytes();
    if bytes.len() < HASH_CHARS + 1 {
        return Err("is too short to be a valid store path".to_owned());
    }
    if let Some(&bad) = bytes[..HASH_CHARS]
        .iter()
        .find(|&&byte| !nix32::is_digit(byte))
    {
        return Err(format!(
            "contains illegal base-32 character '{}'",
            bad.escape_ascii()
        ));
    }
    if bytes[HASH_CHARS] != b'-' {
        return Err("has no dash between hash part and name".to_owned());
    }
    check_name(&bytes[HASH_CHARS + 1..])
        .map_err(|reason| format!("is not a valid store path: its name {reason}"))
}

fn check_name(name: &[u8]) -> Result<(), String> {
    if name.is_empty() {
        return Err("must not be empty".to_owned());
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(format!(
            "must be no longer than {NAME_BYTES_MAX} characters, has {}",
            name.len()
        ));
    }
    if matches!(name, b"." | b"..") {
        return Err("is not valid".to_owned());
    }
    for dots in [".", ".."] {
        if name
            .strip_prefix(dots.as_bytes())
            .is_some_and(|rest| rest.starts_with(b"-"))
        {
            return Err(format!(
                "is not valid: first dash-separated component must not be '{dots}'"
            ));
        }
    }
    match name
        .iter()
        .find(|&&byte| !(byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte)))
    {
        Some(bad) => Err(format!(
            "contains illegal character '{}'",
            bad.escape_ascii()
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: &str = "7rjj86a15146cq1d3qy068lml7n7ykzm-hello-2.12";

    #[test]
    fn parts() {
        let path = StorePath::from_base_name(BASE).unwrap();
        assert_eq!(path.hash_part(), "7rjj86a15146cq1d3qy068lml7n7ykzm");
        assert_eq!(path.name(), "hello-2.12");
        assert_eq!(StorePath::from_parts(path.hash(), &path.to_name()), path);
        assert!(!path.is_derivation());
    }

    #[test]
    fn store_paths_are_canonicalised_lexically() {
        let dir = StoreDir::default();
        let expected = StorePath::from_base_name(BASE).unwrap();
        for text in [
            "/nix/store/B",
            "//nix/./store//B/",
            "/nix/store/x/../B",
            "/../nix/store/B/.",
            "/a/../nix/store/B",
        ] {
            assert_eq!(
                dir.parse(text.replace('B', BASE).as_bytes()).unwrap(),
                expected,
                "{text}"
            );
        }
        for text in [
            "/nix/store/B/bin",
            "/nix/B",
            "/nix/store",
            "/nix/storeB",
            "/nix/store/../B",
            "/",
        ] {
            let text = text.replace('B', BASE);
            assert!(
                dir.parse(text.as_bytes())
                    .unwrap_err()
                    .to_string()
                    .ends_with("is not in the Nix store"),
                "{text}"
            );
        }
        assert_eq!(
            dir.parse(b"nix/store/x").unwrap_err().to_string(),
            "path 'nix/store/x' is not an absolute path"
        );
    }

    #[test]
    fn other_store_directories() {
        let dir = StoreDir::new("/t//s/./store/").unwrap();
        assert_eq!(dir.as_str(), "/t/s/store");
        let path = dir.parse(format!("/t/s/store/{BASE}").as_bytes()).unwrap();
        assert_eq!(dir.print(&path), format!("/t/s/store/{BASE}"));
        assert!(dir.parse(format!("/nix/store/{BASE}").as_bytes()).is_err());
        assert_eq!(
            StoreDir::new("/a/..").unwrap_err().to_string(),
            "store directory '/a/..' is the root directory"
        );
        assert_eq!(
            StoreDir::new("s").unwrap_err().to_string(),
            "store directory 's' is not an absolute path"
        );
    }

    #[test]
    fn below() {
        let dir = StoreDir::default();
        let text = format!("/nix/store/{BASE}/bin/hello");
        let (path, rest) = dir.parse_below(text.as_bytes()).unwrap();
        assert_eq!((path.base_name(), rest), (BASE, &b"bin/hello"[..]));
        let text = format!("/nix/store/{BASE}/");
        assert_eq!(dir.parse_below(text.as_bytes()).unwrap().1, b"");
        assert!(dir.parse_below(b"/nix/store").is_err());
        let text = format!("/nix/store/{BASE}/a/../b");
        assert_eq!(dir.parse_below(text.as_bytes()).unwrap().1, b"b");
        let text = format!("/nix/store/{BASE}/x/y/../b");
        assert!(dir.parse_below(text.as_bytes()).is_err());
    }

    #[test]
    fn refuses() {
        let hash = &BASE[..32];
        for (text, expected) in [
            (
                "short".to_owned(),
                "path 'short' is too short to be a valid store path".to_owned(),
            ),
            (
                format!("{hash}-"),
                format!("path '{hash}-' is not a valid store path: its name must not be empty"),
            ),
            (
                format!("{hash}_a"),
                format!("path '{hash}_a' has no dash between hash part and name"),
            ),
            (
                format!("E{}-a", &hash[1..]),
                format!(
                    "path 'E{}-a' contains illegal base-32 character 'E'",
                    &hash[1..]
                ),
            ),
            (
                format!("{hash}-a/b"),
                format!(
                    "path '{hash}-a/b' is not a valid store path: its name contains illegal character '/'"
                ),
            ),
        ] {
            assert_eq!(
                StorePath::from_base_name(&text).unwrap_err().to_string(),
                expected
            );
        }
        for (name, reason) in [
            (".", "is not valid"),
            ("..", "is not valid"),
            (
                ".-a",
                "is not valid: first dash-separated component must not be '.'",
            ),
            (
                "..-a",
                "is not valid: first dash-separated component must not be '..'",
            ),
            ("ä", "contains illegal character '\\xc3'"),
        ] {
            assert_eq!(
                StorePathName::new(name).unwrap_err().to_string(),
                format!("name '{name}' {reason}")
            );
        }
        assert!(StorePathName::new(&"a".repeat(211)).is_ok());
        assert!(StorePathName::new(&"a".repeat(212)).is_err());
        for good in [".a", "...", "..a-b", "-", "?=+_"] {
            assert!(StorePathName::new(good).is_ok(), "{good}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(hash: [u8; 20], name in "[0-9A-Za-z+_?=][0-9A-Za-z+._?=-]{0,210}") {
            let dir = StoreDir::new("/x/y").unwrap();
            let path = StorePath::from_parts(StorePathHash(hash), &StorePathName::new(&name).unwrap());
            prop_assert_eq!(path.hash(), StorePathHash(hash));
            prop_assert_eq!(&dir.parse(dir.print(&path).as_bytes()).unwrap(), &path);
        }

        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let dir = StoreDir::default();
            let _ = dir.parse(&bytes);
            let _ = dir.parse_below(&[b"/nix/store/", &bytes[..]].concat());
        }
    }
}
