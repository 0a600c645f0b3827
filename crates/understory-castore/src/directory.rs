//! Nodes and directories, with snix's canonical protobuf encoding.
//!
//! ```text
//! Directory     { repeated DirectoryNode directories = 1; repeated FileNode files = 2;
//!                 repeated SymlinkNode symlinks = 3; }
//! DirectoryNode { bytes name = 1; bytes digest = 2; uint64 size = 3; }
//! FileNode      { bytes name = 1; bytes digest = 2; uint64 size = 3; bool executable = 4; }
//! SymlinkNode   { bytes name = 1; bytes target = 2; }
//! ```
//! Canonical: the three lists in this order, each sorted by name; fields in the order of their
//! numbers, each at most once; a zero number and a false flag are left out; shortest varints; no
//! unknown fields. [`Directory::decode`] takes nothing else, so equal directories have equal digests.

use crate::{CastoreError, Digest};

/// Bytes of a name, as on Linux (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;
/// Bytes of a symlink target: Linux' `PATH_MAX` less the NUL.
const TARGET_BYTES_MAX: usize = 4095;

const WIRE_VARINT: u8 = 0;
const WIRE_BYTES: u8 = 2;

/// What stands behind a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    /// A directory.
    Directory {
        /// BLAKE3 of its canonical encoding.
        digest: Digest,
        /// Number of all nodes below it.
        size: u64,
    },
    /// A regular file.
    File {
        /// BLAKE3 of its bytes.
        digest: Digest,
        /// Bytes.
        size: u64,
        /// The executable bit.
        executable: bool,
    },
    /// A symlink.
    Symlink {
        /// Its target: 1 to 4095 bytes, no NUL.
        target: Box<[u8]>,
    },
}

/// A named node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// 1 to 255 bytes without `/` and NUL, not `.` or `..`.
    pub name: Box<[u8]>,
    /// The node.
    pub node: Node,
}

/// A directory: entries sorted by name (raw bytes), names unique.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Directory {
    entries: Vec<Entry>,
}

impl Directory {
    /// Makes a directory of entries in any order.
    ///
    /// # Errors
    /// An invalid or double name, an invalid symlink target.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, CastoreError> {
        for entry in &entries {
            check_name(&entry.name)?;
            if let Node::Symlink { target } = &entry.node {
                check_target(target)?;
            }
        }
        if !entries.is_sorted_by(|a, b| a.name < b.name) {
            entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            if let Some(pair) = entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
                return Err(CastoreError::Invalid(format!(
                    "two entries of one directory are named `{}`",
                    pair[0].name.escape_ascii()
                )));
            }
        }
        Ok(Self { entries })
    }

    /// The entries, sorted by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Finds an entry (binary search).
    pub fn get(&self, name: &[u8]) -> Option<&Node> {
        self.entries
            .binary_search_by(|entry| (*entry.name).cmp(name))
            .ok()
            .map(|at| &self.entries[at].node)
    }

    /// The number of all nodes below: each entry counts 1, a directory also what is below it.
    pub fn size(&self) -> u64 {
        self.entries.iter().fold(0, |sum, entry| match &entry.node {
            Node::Directory { size, .. } => size.saturating_add(1).saturating_add(sum),
            Node::File { .. } | Node::Symlink { .. } => sum.saturating_add(1),
        })
    }

    /// The canonical protobuf.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() * 64);
        for list in 1..=3 {
            for entry in &self.entries {
                if list_of(&entry.node) == list {
                    put_entry(&mut out, list, entry);
                }
            }
        }
        out
    }

    /// Reads the protobuf.
    ///
    /// # Errors
    /// Not protobuf, or not canonical: unsorted, double or invalid names, wrong digest length.
    pub fn decode(bytes: &[u8]) -> Result<Self, CastoreError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut list = 1;
        let mut list_start = 0;
        let mut rest = Wire { bytes };
        while !rest.bytes.is_empty() {
            let (field, wire) = rest.tag()?;
            if wire != WIRE_BYTES || !(1..=3).contains(&field) {
                return Err(bad(format!("unknown field {field} of wire type {wire}")));
            }
            if field < list {
                return Err(bad(format!("list {field} after list {list}")));
            }
            if field > list {
                list = field;
                list_start = entries.len();
            }
            let entry = read_entry(list, rest.bytes_field()?)?;
            if let Some(last) = entries[list_start..].last()
                && last.name >= entry.name
            {
                return Err(bad(format!(
                    "`{}` stands after `{}`",
                    entry.name.escape_ascii(),
                    last.name.escape_ascii()
                )));
            }
            entries.push(entry);
        }
        let directory = Self::new(entries).map_err(|error| bad(error.to_string()))?;
        Ok(directory)
    }

    /// BLAKE3 of [`Directory::encode`].
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// About how much memory it takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let names: usize = self
            .entries
            .iter()
            .map(|entry| {
                entry.name.len()
                    + match &entry.node {
                        Node::Symlink { target } => target.len() + 16,
                        _ => 16,
                    }
            })
            .sum();
        (names + self.entries.capacity() * size_of::<Entry>() + 64) as u64
    }
}

/// Refuses names that cannot stand in a directory.
pub(crate) fn check_name(name: &[u8]) -> Result<(), CastoreError> {
    let reason = match name {
        b"" => "it is empty".to_owned(),
        b"." | b".." => "it is reserved".to_owned(),
        _ if name.len() > NAME_BYTES_MAX => {
            format!(
                "it has {} bytes, at most {NAME_BYTES_MAX} are allowed",
                name.len()
            )
        }
        _ if name.contains(&b'/') => "it has a slash".to_owned(),
        _ if name.contains(&0) => "it has a NUL byte".to_owned(),
        _ => return Ok(()),
    };
    Err(CastoreError::Invalid(format!(
        "invalid name `{}`: {reason}",
        name.escape_ascii()
    )))
}

/// Refuses targets that a symlink cannot have.
pub(crate) fn check_target(target: &[u8]) -> Result<(), CastoreError> {
    if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
        return Err(CastoreError::Invalid(format!(
            "invalid symlink target of {} bytes: expected 1 to {TARGET_BYTES_MAX} bytes without NUL",
            target.len()
        )));
    }
    Ok(())
}

fn bad(reason: String) -> CastoreError {
    CastoreError::corrupt("directory", reason)
}

fn list_of(node: &Node) -> u8 {
    match node {
        Node::Directory { .. } => 1,
        Node::File { .. } => 2,
        Node::Symlink { .. } => 3,
    }
}

fn put_entry(out: &mut Vec<u8>, list: u8, entry: &Entry) {
    let name = bytes_len(entry.name.len());
    let len = name
        + match &entry.node {
            Node::Directory { size, .. } => 34 + number_len(*size),
            Node::File {
                size, executable, ..
            } => 34 + number_len(*size) + usize::from(*executable) * 2,
            Node::Symlink { target } => bytes_len(target.len()),
        };
    out.push(list << 3 | WIRE_BYTES);
    put_varint(out, len as u64);
    put_bytes(out, 1, &entry.name);
    match &entry.node {
        Node::Directory { digest, size } => {
            put_bytes(out, 2, &digest.0);
            put_number(out, 3, *size);
        }
        Node::File {
            digest,
            size,
            executable,
        } => {
            put_bytes(out, 2, &digest.0);
            put_number(out, 3, *size);
            put_number(out, 4, u64::from(*executable));
        }
        Node::Symlink { target } => put_bytes(out, 2, target),
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | WIRE_BYTES);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_number(out: &mut Vec<u8>, field: u8, value: u64) {
    if value != 0 {
        out.push(field << 3 | WIRE_VARINT);
        put_varint(out, value);
    }
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn bytes_len(len: usize) -> usize {
    1 + varint_len(len as u64) + len
}

fn number_len(value: u64) -> usize {
    if value == 0 { 0 } else { 1 + varint_len(value) }
}

/// Reads the message of one entry of `list`.
fn read_entry(list: u8, bytes: &[u8]) -> Result<Entry, CastoreError> {
    let mut rest = Wire { bytes };
    let name = rest.field(1, WIRE_BYTES)?;
    if !name {
        return Err(bad("an entry without a name".to_owned()));
    }
    let name: Box<[u8]> = rest.bytes_field()?.into();
    if !rest.field(2, WIRE_BYTES)? {
        return Err(bad(format!(
            "entry `{}` without field 2",
            name.escape_ascii()
        )));
    }
    let second = rest.bytes_field()?;
    let node = if list == 3 {
        Node::Symlink {
            target: second.into(),
        }
    } else {
        let digest = Digest(second.try_into().map_err(|_| {
            bad(format!(
                "digest of `{}`: expected 32 bytes, found {}",
                name.escape_ascii(),
                second.len()
            ))
        })?);
        let size = rest.number_field(3)?;
        if list == 1 {
            Node::Directory { digest, size }
        } else {
            let executable = match rest.number_field(4)? {
                0 => false,
                1 => true,
                other => {
                    return Err(bad(format!(
                        "executable flag of `{}`: expected 1, found {other}",
                        name.escape_ascii()
                    )));
                }
            };
            Node::File {
                digest,
                size,
                executable,
            }
        }
    };
    if !rest.bytes.is_empty() {
        return Err(bad(format!(
            "entry `{}` has unknown or misplaced fields",
            name.escape_ascii()
        )));
    }
    Ok(Entry { name, node })
}

/// Protobuf's wire format.
struct Wire<'a> {
    bytes: &'a [u8],
}

impl<'a> Wire<'a> {
    /// Takes a tag: field number (below 16) and wire type.
    fn tag(&mut self) -> Result<(u8, u8), CastoreError> {
        match self.bytes.split_first() {
            Some((tag, rest)) if *tag < 0x80 => {
                self.bytes = rest;
                Ok((tag >> 3, tag & 7))
            }
            _ => Err(bad("unknown field".to_owned())),
        }
    }

    /// Takes the tag if it is this one.
    fn field(&mut self, field: u8, wire: u8) -> Result<bool, CastoreError> {
        let is = self.bytes.first() == Some(&(field << 3 | wire));
        if is {
            self.tag()?;
        }
        Ok(is)
    }

    fn varint(&mut self) -> Result<u64, CastoreError> {
        let mut value = 0_u64;
        for place in 0..10 {
            let Some((byte, rest)) = self.bytes.split_first() else {
                return Err(bad("ends inside a number".to_owned()));
            };
            self.bytes = rest;
            let bits = u64::from(byte & 0x7f);
            if place == 9 && bits > 1 {
                return Err(bad("a number of more than 64 bits".to_owned()));
            }
            value |= bits << (7 * place);
            if byte & 0x80 == 0 {
                if *byte == 0 && place > 0 {
                    return Err(bad("a number that is not of the shortest form".to_owned()));
                }
                return Ok(value);
            }
        }
        Err(bad("a number of more than 64 bits".to_owned()))
    }

    fn bytes_field(&mut self) -> Result<&'a [u8], CastoreError> {
        let len = self.varint()?;
        let (bytes, rest) = usize::try_from(len)
            .ok()
            .and_then(|len| self.bytes.split_at_checked(len))
            .ok_or_else(|| {
                bad(format!(
                    "a field of {len} bytes: only {} are left",
                    self.bytes.len()
                ))
            })?;
        self.bytes = rest;
        Ok(bytes)
    }

    /// A number that is left out when zero.
    fn number_field(&mut self, field: u8) -> Result<u64, CastoreError> {
        if !self.field(field, WIRE_VARINT)? {
            return Ok(0);
        }
        match self.varint()? {
            0 => Err(bad(format!("field {field} is zero and not left out"))),
            value => Ok(value),
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
