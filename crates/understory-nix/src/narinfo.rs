//! narinfo and `nix-cache-info`: the metadata files of a binary cache.
//!
//! Lines of `Key: value`; unknown keys are ignored. Written in the order and with the spelling of
//! Nix 2.34.8, checked against `nix copy --to file://…` of 2.34.8 and 2.26.3. A narinfo proves
//! nothing about contents: the NAR's hash is checked when the NAR is read.

use crate::{ContentAddress, Hash, NarHash, PathInfo, Signature, StoreDir, StorePath};
use std::collections::BTreeSet;
use std::fmt::{self, Write as _};

/// Longest narinfo accepted, in bytes: room for 50,000 references.
pub const NARINFO_BYTES_MAX: usize = 4 << 20;
/// What Nix writes for "no deriver" in old caches.
const UNKNOWN_DERIVER: &str = "unknown-deriver";

/// A narinfo: a path info and where its NAR is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// The path info; `registration_time` is 0 and `ultimate` false.
    pub info: PathInfo,
    /// Where the NAR is: relative to the cache, or absolute. Not empty.
    pub url: String,
    /// How the NAR is compressed.
    pub compression: Compression,
    /// Hash of the file at `url`; informative.
    pub file_hash: Option<Hash>,
    /// Bytes of the file at `url`; informative.
    pub file_size: Option<u64>,
}

impl NarInfo {
    /// Parses the text of `file`, which only errors name.
    ///
    /// Whether `StorePath` is the path that was asked for is the caller's to check.
    ///
    /// # Errors
    /// A line that cannot be parsed, or a required key that is missing.
    pub fn parse(dir: &StoreDir, file: &str, text: &str) -> Result<Self, NarInfoError> {
        let mut fields = Fields::default();
        for (key, value, line) in lines(file, text)? {
            fields
                .set(dir, key, value)
                .map_err(|reason| NarInfoError::at(file, line, reason))?;
        }
        fields.finish().map_err(|reason| NarInfoError {
            file: file.to_owned(),
            line: None,
            reason,
        })
    }

    /// Prints the text.
    pub fn print(&self, dir: &StoreDir) -> String {
        let info = &self.info;
        let mut text = format!("StorePath: {}\n", dir.print(&info.path));
        let mut line = |key: &str, value: &dyn fmt::Display| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key}: {value}");
        };
        line("URL", &self.url);
        line("Compression", &self.compression);
        if let Some(hash) = &self.file_hash {
            line("FileHash", hash);
        }
        if let Some(size) = &self.file_size {
            line("FileSize", size);
        }
        line("NarHash", &info.nar_hash);
        line("NarSize", &info.nar_size);
        line(
            "References",
            &info
                .references
                .iter()
                .map(StorePath::base_name)
                .collect::<Vec<_>>()
                .join(" "),
        );
        if let Some(deriver) = &info.deriver {
            line("Deriver", deriver);
        }
        for signature in &info.signatures {
            line("Sig", signature);
        }
        if let Some(ca) = &info.ca {
            line("CA", ca);
        }
        text
    }
}

/// How a NAR in a cache is compressed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// xz, Nix's default.
    Xz,
    /// bzip2; also what an absent `Compression` means.
    Bzip2,
    /// Zstandard.
    Zstd,
    /// Brotli.
    Brotli,
    /// gzip.
    Gzip,
    /// Anything else, by Nix's name: `lzip`, `lz4`, `lzma` and so on.
    Other(String),
}

impl Compression {
    /// Returns the compression of that name; the empty name is bzip2.
    pub fn from_name(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "xz" => Self::Xz,
            "bzip2" | "" => Self::Bzip2,
            "zstd" => Self::Zstd,
            "br" => Self::Brotli,
            "gzip" => Self::Gzip,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Returns Nix's name.
    pub fn name(&self) -> &str {
        match self {
            Self::None => "none",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
            Self::Zstd => "zstd",
            Self::Brotli => "br",
            Self::Gzip => "gzip",
            Self::Other(name) => name,
        }
    }
}
impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The file `nix-cache-info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheInfo {
    /// The store directory of all paths; `None` if the file does not say.
    pub store_dir: Option<StoreDir>,
    /// True if clients may ask for many paths at once.
    pub want_mass_query: bool,
    /// Lower is asked first.
    pub priority: Option<u32>,
}

impl CacheInfo {
    /// Parses the text. Unknown keys and lines without a colon are ignored.
    ///
    /// # Errors
    /// A store directory or a priority that is none.
    pub fn parse(file: &str, text: &str) -> Result<Self, NarInfoError> {
        let mut info = Self {
            store_dir: None,
            want_mass_query: false,
            priority: None,
        };
        for (index, line) in text.lines().enumerate() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            let error = |reason: String| NarInfoError::at(file, index + 1, reason);
            match key {
                "StoreDir" => {
                    let dir = StoreDir::new(value).map_err(|cause| error(cause.to_string()))?;
                    info.store_dir = Some(dir);
                }
                "WantMassQuery" => info.want_mass_query = value == "1",
                "Priority" => {
                    info.priority = Some(
                        value
                            .parse()
                            .map_err(|_| error(format!("invalid Priority '{value}'")))?,
                    );
                }
                _ => {}
            }
        }
        Ok(info)
    }

    /// Prints the text.
    pub fn print(&self) -> String {
        let mut text = String::new();
        if let Some(dir) = &self.store_dir {
            text.push_str(&format!("StoreDir: {dir}\n"));
        }
        if self.want_mass_query {
            text.push_str("WantMassQuery: 1\n");
        }
        if let Some(priority) = self.priority {
            text.push_str(&format!("Priority: {priority}\n"));
        }
        text
    }
}

/// Why a narinfo or `nix-cache-info` cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfoError {
    /// The file, as the caller named it.
    pub file: String,
    /// Line, from 1; `None` if something is missing.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

impl NarInfoError {
    fn at(file: &str, line: usize, reason: String) -> Self {
        Self {
            file: file.to_owned(),
            line: Some(line),
            reason,
        }
    }
}
impl fmt::Display for NarInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NAR info file '{}' is corrupt: {}",
            self.file, self.reason
        )?;
        match self.line {
            Some(line) => write!(f, " at line {line}"),
            None => Ok(()),
        }
    }
}
impl std::error::Error for NarInfoError {}

/// What was seen so far.
#[derive(Default)]
struct Fields {
    path: Option<StorePath>,
    url: String,
    compression: String,
    file_hash: Option<Hash>,
    file_size: Option<u64>,
    nar_hash: Option<NarHash>,
    nar_size: u64,
    references: BTreeSet<StorePath>,
    deriver: Option<StorePath>,
    signatures: BTreeSet<Signature>,
    ca: Option<ContentAddress>,
}

impl Fields {
    fn set(&mut self, dir: &StoreDir, key: &str, value: &str) -> Result<(), String> {
        match key {
            "StorePath" => self.path = Some(dir.parse(value.as_bytes()).map_err(text)?),
            "URL" => self.url = value.to_owned(),
            "Compression" => self.compression = value.to_owned(),
            "FileHash" => self.file_hash = Some(Hash::parse(value, None).map_err(text)?),
            "FileSize" => self.file_size = Some(size(key, value)?),
            "NarHash" => {
                let hash = Hash::parse(value, None).map_err(text)?;
                self.nar_hash = Some(hash.try_into().map_err(text)?);
            }
            "NarSize" => self.nar_size = size(key, value)?,
            "References" => {
                if !self.references.is_empty() {
                    return Err("extra References".to_owned());
                }
                let names = value.split(' ').filter(|name| !name.is_empty());
                self.references = names
                    .map(StorePath::from_base_name)
                    .collect::<Result<_, _>>()
                    .map_err(text)?;
            }
            "Deriver" if value == UNKNOWN_DERIVER || value.is_empty() => {}
            "Deriver" => self.deriver = Some(StorePath::from_base_name(value).map_err(text)?),
            "Sig" => {
                self.signatures
                    .insert(Signature::parse(value).map_err(text)?);
            }
            "CA" => {
                if self.ca.is_some() {
                    return Err("extra CA".to_owned());
                }
                self.ca = ContentAddress::parse_optional(value).map_err(text)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<NarInfo, String> {
        let path = self.path.ok_or("StorePath missing")?;
        let nar_hash = self.nar_hash.ok_or("NarHash missing")?;
        if self.url.is_empty() {
            return Err("URL missing".to_owned());
        }
        if self.nar_size == 0 {
            return Err("NarSize missing or zero".to_owned());
        }
        Ok(NarInfo {
            info: PathInfo {
                path,
                nar_hash,
                nar_size: self.nar_size,
                references: self.references,
                deriver: self.deriver,
                registration_time: 0,
                ultimate: false,
                signatures: self.signatures,
                ca: self.ca,
            },
            url: self.url,
            compression: Compression::from_name(&self.compression),
            file_hash: self.file_hash,
            file_size: self.file_size,
        })
    }
}

/// Splits into key, value and line number; between key and value stand a colon and one byte.
fn lines<'a>(file: &str, text: &'a str) -> Result<Vec<(&'a str, &'a str, usize)>, NarInfoError> {
    if text.len() > NARINFO_BYTES_MAX {
        let reason = format!(
            "expected at most {NARINFO_BYTES_MAX} bytes, found {}",
            text.len()
        );
        return Err(NarInfoError {
            file: file.to_owned(),
            line: None,
            reason,
        });
    }
    let mut out = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let error = |reason: &str| NarInfoError::at(file, index + 1, reason.to_owned());
        let line = line
            .strip_suffix('\n')
            .ok_or_else(|| error("expecting '\\n'"))?;
        let (key, rest) = line.split_once(':').ok_or_else(|| error("expecting ':'"))?;
        let mut value = rest.chars();
        value.next();
        out.push((key, value.as_str(), index + 1));
    }
    Ok(out)
}

fn size(key: &str, value: &str) -> Result<u64, String> {
    value
        .parse()
        .map_err(|_| format!("invalid {key} '{value}'"))
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HashAlgorithm, StorePathHash, StorePathName};
    use proptest::prelude::*;

    const TEXT: &str = "\
StorePath: /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools
URL: nar/1094wph9z4nwlgvsd53abfz8i117ykiv5dwnq9nnhz846s7xqd7d.nar.xz
Compression: xz
FileHash: sha256:1094wph9z4nwlgvsd53abfz8i117ykiv5dwnq9nnhz846s7xqd7d
FileSize: 114980
NarHash: sha256:0lxjvvpr59c2mdram7ympy5ay741f180kv3349hvfc3f8nrmbqf6
NarSize: 464152
References: 00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools 7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27
Deriver: 10dx1q4ivjb115y3h90mipaaz533nr0d-net-tools.drv
";

    fn message(text: &str) -> String {
        NarInfo::parse(&StoreDir::default(), "x.narinfo", text)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn prints_what_it_parsed() {
        let info = NarInfo::parse(&StoreDir::default(), "x", TEXT).unwrap();
        assert_eq!(info.print(&StoreDir::default()), TEXT);
        let odd = TEXT.replace("Compression: xz\n", "System: x\nFoo: bar\n");
        assert_eq!(
            NarInfo::parse(&StoreDir::default(), "x", &odd)
                .unwrap()
                .compression,
            Compression::Bzip2
        );
    }

    #[test]
    fn no_references_and_no_deriver() {
        let text = TEXT
            .lines()
            .filter(|line| !line.starts_with("References") && !line.starts_with("Deriver"));
        let text = text.map(|line| format!("{line}\n")).collect::<String>();
        for extra in [
            "References: \nDeriver: unknown-deriver\nCA: \n",
            "References:\n",
            "",
        ] {
            let info = NarInfo::parse(&StoreDir::default(), "x", &format!("{text}{extra}"))
                .unwrap()
                .info;
            assert!(info.references.is_empty() && info.deriver.is_none() && info.ca.is_none());
        }
    }

    #[test]
    fn refuses() {
        let with = |extra: &str| message(&format!("{TEXT}{extra}"));
        let corrupt = |reason: &str| format!("NAR info file 'x.narinfo' is corrupt: {reason}");
        assert_eq!(with("CA"), corrupt("expecting '\\n' at line 10"));
        assert_eq!(with("CA\n"), corrupt("expecting ':' at line 10"));
        assert_eq!(
            with("References: 7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27\n"),
            corrupt("extra References at line 10")
        );
        let ca = "CA: fixed:sha256:0lxjvvpr59c2mdram7ympy5ay741f180kv3349hvfc3f8nrmbqf6\n";
        assert_eq!(with(&ca.repeat(2)), corrupt("extra CA at line 11"));
        assert_eq!(with("NarSize: 0\n"), corrupt("NarSize missing or zero"));
        assert_eq!(
            with("NarSize: -1\n"),
            corrupt("invalid NarSize '-1' at line 10")
        );
        assert_eq!(with("URL: \n"), corrupt("URL missing"));
        assert_eq!(message(""), corrupt("StorePath missing"));
        assert_eq!(
            with("StorePath: /gnu/store/x\n"),
            corrupt("path '/gnu/store/x' is not in the Nix store at line 10")
        );
    }

    #[test]
    fn cache_info() {
        let info = CacheInfo::parse(
            "x",
            "StoreDir: /nix/store\nnoise\nWantMassQuery: 1\nPriority:40 \nX: y\n",
        )
        .unwrap();
        assert_eq!((info.want_mass_query, info.priority), (true, Some(40)));
        assert_eq!(
            info.print(),
            "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
        );
        assert_eq!(
            CacheInfo::parse("nix-cache-info", "Priority: high\n")
                .unwrap_err()
                .to_string(),
            "NAR info file 'nix-cache-info' is corrupt: invalid Priority 'high' at line 1"
        );
    }

    proptest! {
        #[test]
        fn round_trip(
            hashes in proptest::collection::vec(any::<[u8; 20]>(), 1..6),
            digest: [u8; 32], nar_size in 1..u64::MAX, file_size: Option<u64>, ca: bool,
            url in "[!-~]{1,40}", compression in "[a-z0-9]{1,8}", key in "[a-z]{1,5}", with_deriver: bool,
        ) {
            let path = |hash: &[u8; 20]| StorePath::from_parts(StorePathHash(*hash), &StorePathName::new("n").unwrap());
            let hash = Hash::new(HashAlgorithm::Sha256, &digest).unwrap();
            let secret = crate::SecretKey::generate(&key).unwrap();
            let info = NarInfo {
                info: PathInfo {
                    path: path(&hashes[0]),
                    nar_hash: NarHash(digest),
                    nar_size,
                    references: hashes[1..].iter().map(path).collect(),
                    deriver: with_deriver.then(|| path(&hashes[0])),
                    registration_time: 0,
                    ultimate: false,
                    signatures: [secret.sign(b"1"), secret.sign(b"2")].into(),
                    ca: ca.then_some(ContentAddress { method: crate::ContentAddressMethod::Nar, hash }),
                },
                url,
                compression: Compression::from_name(&compression),
                file_hash: file_size.map(|_| hash),
                file_size,
            };
            let dir = StoreDir::new("/s").unwrap();
            prop_assert_eq!(NarInfo::parse(&dir, "x", &info.print(&dir)).unwrap(), info);
        }

        #[test]
        fn never_panics(text: String) {
            let _ = NarInfo::parse(&StoreDir::default(), "x", &text);
            let _ = CacheInfo::parse("x", &text);
        }
    }
}
