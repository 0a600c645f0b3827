//! Reads `nix.conf`: `name = value` lines, comments, `include` and `!include`.
//!
//! Format: the manual's "nix.conf" chapter; what it leaves open (words are joined by one space, `#` ends a line
//! anywhere, an include is relative to the file that names it) was checked against `nix config show` of Nix 2.26.3
//! and 2.34.8. Files in Nix's order, later ones win: `$NIX_CONF_DIR/nix.conf` (`/etc/nix`), then the user's
//! (`$NIX_USER_CONF_FILES`, or `nix/nix.conf` in `$XDG_CONFIG_DIRS` and `$XDG_CONFIG_HOME`), then `$NIX_CONFIG`.

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How deep files may include each other; Nix has no limit and overflows its stack on a cycle.
const INCLUDE_DEPTH_MAX: usize = 32;
/// Bytes of one file; real ones have a few hundred.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// One `name = value` line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Left of the equals sign, as written: may begin with `extra-`, may be an alias.
    pub name: String,
    /// Right of it; words are separated by one space.
    pub value: String,
    /// The file, or `NIX_CONFIG`.
    pub origin: Arc<Path>,
}

/// Settings by name; the last one counts, and `extra-NAME` adds to it.
///
/// # Errors
/// A line that is none, an included file that is not there, I/O.
pub fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    for assignment in read_file(path)? {
        let extra = assignment.name.strip_prefix("extra-");
        match extra.and_then(|name| out.get_mut(name)) {
            Some(value) => append(value, &assignment.value),
            None if extra.is_some() => {
                append(out.entry(assignment.name).or_default(), &assignment.value);
            }
            None => {
                out.remove(&format!("extra-{}", assignment.name));
                out.insert(assignment.name, assignment.value);
            }
        }
    }
    Ok(out)
}

/// All lines of one file and of what it includes, in the order in which they count.
///
/// # Errors
/// As [`read`].
pub fn read_file(path: &Path) -> Result<Vec<Assignment>> {
    let mut out = Vec::new();
    file_into(path, 0, &mut out)?;
    Ok(out)
}

/// Lines that come from elsewhere, such as `$NIX_CONFIG`; includes are relative to the current directory, as in Nix.
///
/// # Errors
/// As [`read`].
pub fn read_text(text: &str, origin: &str) -> Result<Vec<Assignment>> {
    let mut out = Vec::new();
    text_into(text, Path::new(origin), 0, &mut out)?;
    Ok(out)
}

/// Everything that stock Nix would read in this environment. Files that are not there are nothing.
///
/// # Errors
/// As [`read`].
pub fn read_all(environment: &dyn Fn(&str) -> Option<OsString>) -> Result<Vec<Assignment>> {
    let mut out = Vec::new();
    for file in files(environment) {
        if file.exists() {
            file_into(&file, 0, &mut out)?;
        }
    }
    if let Some(text) = environment("NIX_CONFIG") {
        let text = text
            .to_str()
            .ok_or_else(|| Error::user("NIX_CONFIG is not UTF-8"))?;
        text_into(text, Path::new("NIX_CONFIG"), 0, &mut out)?;
    }
    Ok(out)
}

/// The files that stock Nix would read, those that count last at the end.
pub fn files(environment: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let var = |name: &str| environment(name).filter(|value| !value.is_empty());
    let mut out = vec![conf_dir(environment).join("nix.conf")];
    if let Some(list) = var("NIX_USER_CONF_FILES") {
        let files: Vec<PathBuf> = std::env::split_paths(&list)
            .filter(|p| !p.as_os_str().is_empty())
            .collect();
        out.extend(files.into_iter().rev());
        return out;
    }
    let home = var("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".config")));
    let system = var("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    let system: Vec<PathBuf> = std::env::split_paths(&system).collect();
    let dirs = system.into_iter().rev().chain(home);
    out.extend(
        dirs.filter(|dir| dir.is_absolute())
            .map(|dir| dir.join("nix/nix.conf")),
    );
    out
}

/// Where the machine's `nix.conf` is.
pub fn conf_dir(environment: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    environment("NIX_CONF_DIR")
        .filter(|value| !value.is_empty())
        .map_or_else(|| PathBuf::from("/etc/nix"), PathBuf::from)
}

/// Adds words to a list.
pub(crate) fn append(value: &mut String, words: &str) {
    if !value.is_empty() && !words.is_empty() {
        value.push(' ');
    }
    value.push_str(words);
}

fn file_into(path: &Path, depth: usize, out: &mut Vec<Assignment>) -> Result<()> {
    let size = std::fs::metadata(path)
        .map_err(|e| Error::io("reading", path, e))?
        .len();
    if size > FILE_BYTES_MAX {
        return Err(Error::user(format!(
            "{}: expected a configuration file of at most {FILE_BYTES_MAX} bytes, found {size}",
            path.display()
        )));
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("reading", path, e))?;
    text_into(&text, path, depth, out)
}

fn text_into(text: &str, origin: &Path, depth: usize, out: &mut Vec<Assignment>) -> Result<()> {
    let shared: Arc<Path> = origin.into();
    for line in text.lines() {
        let words: Vec<&str> = line
            .split_once('#')
            .map_or(line, |(before, _)| before)
            .split_ascii_whitespace()
            .collect();
        // Nix's words.
        let wrong = || {
            Error::user(format!(
                "syntax error in configuration line '{line}' in '{}'",
                origin.display()
            ))
            .with_hint("a line is `name = value`, with spaces around the equals sign")
        };
        match words.as_slice() {
            [] => {}
            ["include", file] => included(file, origin, true, depth, out)?,
            ["!include", file] => included(file, origin, false, depth, out)?,
            ["include" | "!include", ..] => return Err(wrong()),
            [name, "=", value @ ..] => out.push(Assignment {
                name: (*name).to_owned(),
                value: value.join(" "),
                origin: shared.clone(),
            }),
            _ => return Err(wrong()),
        }
    }
    Ok(())
}

fn included(
    file: &str,
    from: &Path,
    required: bool,
    depth: usize,
    out: &mut Vec<Assignment>,
) -> Result<()> {
    let path = from.parent().unwrap_or(Path::new("")).join(file);
    if depth >= INCLUDE_DEPTH_MAX {
        return Err(Error::user(format!(
            "{}: includes are nested more than {INCLUDE_DEPTH_MAX} deep",
            path.display()
        ))
        .with_hint("do two files include each other?"));
    }
    if path.exists() {
        return file_into(&path, depth + 1, out);
    }
    if !required {
        return Ok(());
    }
    Err(Error::user(format!(
        "file '{}' included from '{}' not found",
        path.display(),
        from.display()
    ))
    .with_hint("write `!include` for a file that may be missing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(list: &[Assignment]) -> Vec<(&str, &str)> {
        list.iter()
            .map(|a| (a.name.as_str(), a.value.as_str()))
            .collect()
    }

    #[test]
    fn lines_comments_and_words() {
        let text = "# a comment\n\n  max-jobs   =  4 # trailing\nsubstituters = https://a\t https://b\nempty =\nsandbox-paths = /a=/b\r\n";
        assert_eq!(
            pairs(&read_text(text, "x").unwrap()),
            [
                ("max-jobs", "4"),
                ("substituters", "https://a https://b"),
                ("empty", ""),
                ("sandbox-paths", "/a=/b"),
            ]
        );
    }

    #[test]
    fn lines_that_are_none() {
        for line in ["cores", "cores 4", "cores=4", "include", "include a b"] {
            assert_eq!(
                read_text(&format!("a = b\n{line}\n"), "NIX_CONFIG")
                    .unwrap_err()
                    .to_string(),
                format!("syntax error in configuration line '{line}' in 'NIX_CONFIG'")
            );
        }
    }

    #[test]
    fn includes_are_relative_and_may_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(
            at("nix.conf"),
            "cores = 1\ninclude d/more.conf\n!include nothing\ncores = 3\n",
        )
        .unwrap();
        std::fs::write(at("d/more.conf"), "cores = 2\ninclude last.conf\n").unwrap();
        std::fs::write(
            at("d/last.conf"),
            "substituters = a\nextra-substituters = b\n",
        )
        .unwrap();
        let all = read_file(&at("nix.conf")).unwrap();
        assert_eq!(
            pairs(&all),
            [
                ("cores", "1"),
                ("cores", "2"),
                ("substituters", "a"),
                ("extra-substituters", "b"),
                ("cores", "3")
            ]
        );
        assert_eq!(&*all[2].origin, at("d/last.conf"));
        let map = read(&at("nix.conf")).unwrap();
        assert_eq!(map["substituters"], "a b");
        assert_eq!(map["cores"], "3");

        std::fs::write(at("nix.conf"), "include nothing\n").unwrap();
        assert_eq!(
            read_file(&at("nix.conf")).unwrap_err().to_string(),
            format!(
                "file '{}' included from '{}' not found",
                at("nothing").display(),
                at("nix.conf").display()
            )
        );
        std::fs::write(at("nix.conf"), "include nix.conf\n").unwrap();
        assert!(
            read_file(&at("nix.conf"))
                .unwrap_err()
                .to_string()
                .ends_with("includes are nested more than 32 deep")
        );
    }

    #[test]
    fn extra_adds_and_a_later_value_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nix.conf");
        std::fs::write(
            &file,
            "extra-a = 1\nextra-a = 2\na = 3\nextra-a = 4\nextra-b = 5\n",
        )
        .unwrap();
        let map = read(&file).unwrap();
        assert_eq!(map["a"], "3 4");
        assert_eq!(map["extra-b"], "5");
        assert!(!map.contains_key("extra-a"));
    }

    #[test]
    fn files_in_nixs_order() {
        let with = |pairs: &'static [(&str, &str)]| {
            files(&move |name| {
                pairs
                    .iter()
                    .find(|(n, _)| *n == name)
                    .map(|(_, v)| v.into())
            })
            .into_iter()
            .map(|p| p.to_str().unwrap().to_owned())
            .collect::<Vec<_>>()
        };
        assert_eq!(
            with(&[("HOME", "/h")]),
            [
                "/etc/nix/nix.conf",
                "/etc/xdg/nix/nix.conf",
                "/h/.config/nix/nix.conf"
            ]
        );
        assert_eq!(
            with(&[
                ("NIX_CONF_DIR", "/c"),
                ("XDG_CONFIG_HOME", "/x"),
                ("XDG_CONFIG_DIRS", "/1:/2")
            ]),
            [
                "/c/nix.conf",
                "/2/nix/nix.conf",
                "/1/nix/nix.conf",
                "/x/nix/nix.conf"
            ]
        );
        assert_eq!(
            with(&[("HOME", "/h"), ("NIX_USER_CONF_FILES", "/a:/b")]),
            ["/etc/nix/nix.conf", "/b", "/a"]
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(lines in proptest::collection::vec(
            ("[a-z][a-z-]{0,20}", proptest::collection::vec("[!-\"$-~]{1,12}", 0..5)), 0..20)) {
            let lines: Vec<_> = lines.into_iter().filter(|(n, _)| n != "include").collect();
            let text: String = lines.iter().map(|(n, v)| format!("\t{n} =  {} # x\n", v.join("  "))).collect();
            let read = read_text(&text, "x").unwrap();
            prop_assert_eq!(read.len(), lines.len());
            for (found, (name, value)) in read.iter().zip(&lines) {
                prop_assert_eq!(&found.name, name);
                prop_assert_eq!(&found.value, &value.join(" "));
            }
        }
        #[test]
        fn any_text_is_read_or_refused(text in "(?s).{0,200}") {
            // Includes of random names are refused or empty; nothing panics.
            let _ = read_text(&text, "/nonexistent/nix.conf");
        }
    }
}
