//! Which paths of a source are wanted.

use crate::{Error, Result};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use understory_nix::{StoreDir, StorePath};

/// Symlinks that are followed from a given name into the store: the kernel's own limit.
const SYMLINKS_MAX: usize = 40;

/// What of a source is to be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Everything that is valid there.
    All,
    /// These paths.
    Paths {
        /// The paths.
        paths: BTreeSet<StorePath>,
        /// With everything they refer to, directly or not. Without, their references must be valid
        /// here already, or selected too.
        closure: bool,
    },
}

impl Selection {
    /// Reads paths as a user gives them: full store paths, paths below one, base names, or names of
    /// files that lead into the store by symlinks (`./result`, a profile).
    ///
    /// # Errors
    /// A text is none of that.
    pub fn parse<T: AsRef<str>>(dir: &StoreDir, texts: &[T], closure: bool) -> Result<Self> {
        let paths = texts
            .iter()
            .map(|text| parse_path(dir, text.as_ref()))
            .collect::<Result<BTreeSet<_>>>()?;
        Ok(Self::Paths { paths, closure })
    }
}

fn parse_path(dir: &StoreDir, text: &str) -> Result<StorePath> {
    if !text.contains('/')
        && let Ok(path) = StorePath::from_base_name(text)
    {
        return Ok(path);
    }
    let failed = match dir.parse_below(text.as_bytes()) {
        Ok((path, _)) => return Ok(path),
        Err(error) => error,
    };
    let mut at = std::path::absolute(text).unwrap_or_default();
    for _ in 0..SYMLINKS_MAX {
        let Ok(target) = std::fs::read_link(&at) else {
            break;
        };
        at = at.parent().unwrap_or(Path::new("/")).join(target);
        if let Ok((path, _)) = dir.parse_below(at.as_os_str().as_bytes()) {
            return Ok(path);
        }
    }
    Err(Error::user(failed.to_string()).with_hint(format!(
        "give a path in {dir}, its last component, or a symlink to it"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "7gx4kiv5m0i7d7qkixq2cwzbr10lvxwc-glibc-2.27";

    #[test]
    fn a_path_in_every_form() {
        let dir = StoreDir::default();
        let path = StorePath::from_base_name(NAME).unwrap();
        let full = format!("/nix/store/{NAME}");
        let temp = tempfile::tempdir().unwrap();
        let (one, two) = (temp.path().join("one"), temp.path().join("two"));
        std::os::unix::fs::symlink(&full, &one).unwrap();
        std::os::unix::fs::symlink("one", &two).unwrap();
        let texts = [
            NAME,
            &full,
            &format!("{full}/"),
            &format!("/nix//store/./{NAME}/bin/x"),
            one.to_str().unwrap(),
            two.to_str().unwrap(),
        ];
        let expected = Selection::Paths {
            paths: [path].into(),
            closure: true,
        };
        assert_eq!(Selection::parse(&dir, &texts, true).unwrap(), expected);
    }

    #[test]
    fn what_is_no_path() {
        let dir = StoreDir::default();
        for text in ["", "glibc", "/etc/passwd", "/nix/store", "./x"] {
            let error = Selection::parse(&dir, &[text], true).unwrap_err();
            assert_eq!(
                error.hint(),
                Some("give a path in /nix/store, its last component, or a symlink to it")
            );
        }
    }
}
