//! Who is at the other end of a socket, and what Nix' `trusted-users` and `allowed-users` say to it.

use super::ServerOptions;
use rustix::process::geteuid;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a looked-up account is believed.
const ACCOUNT_TTL: Duration = Duration::from_secs(60);
/// Accounts remembered; the oldest are dropped all together.
const ACCOUNTS_MAX: usize = 1024;
/// What the kernel shows for users that have no number in our user namespace, unless it was changed.
const OVERFLOW_ID: u32 = 65534;

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) pid: i32,
}

/// What it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Everything.
    Trusted,
    /// What does no harm.
    Untrusted,
    /// Nothing; the text says so.
    Refused(String),
}

/// Looks accounts up. Files first, then `getent` for what only the name service knows.
pub(super) struct Accounts {
    passwd: PathBuf,
    group: PathBuf,
    getent: bool,
    cache: Mutex<HashMap<Query, (Instant, Option<String>)>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Query {
    User(u32),
    Group(u32),
    /// The members of a group, joined by commas.
    Members(String),
}

impl Peer {
    /// True for root and for the user we run as: they can change the store without us.
    pub(super) fn is_privileged(&self) -> bool {
        self.uid == 0 || self.uid == geteuid().as_raw()
    }

    /// The user's name, or the number if it has none.
    pub(super) fn user_name(&self, accounts: &Accounts) -> String {
        Names {
            peer: self,
            accounts,
        }
        .user()
    }

    /// Decides as Nix does.
    pub(super) fn judge(&self, options: &ServerOptions, accounts: &Accounts) -> Decision {
        let names = Names {
            peer: self,
            accounts,
        };
        let trusted = names.in_list(&options.trusted_users);
        let allowed = trusted || names.in_list(&options.allowed_users);
        let builder = options
            .build_users_group
            .as_deref()
            .is_some_and(|group| !group.is_empty() && names.group() == group);
        if !allowed || builder {
            // Nix' words.
            return Decision::Refused(format!(
                "user '{}' is not allowed to connect to the Nix daemon",
                names.user()
            ));
        }
        if trusted {
            Decision::Trusted
        } else {
            Decision::Untrusted
        }
    }
}

struct Names<'a> {
    peer: &'a Peer,
    accounts: &'a Accounts,
}

impl Names<'_> {
    fn user(&self) -> String {
        match self.peer.uid {
            0 => "root".to_owned(),
            uid => self
                .accounts
                .lookup(Query::User(uid))
                .unwrap_or_else(|| uid.to_string()),
        }
    }

    fn group(&self) -> String {
        match self.peer.gid {
            0 => "root".to_owned(),
            gid => self
                .accounts
                .lookup(Query::Group(gid))
                .unwrap_or_else(|| gid.to_string()),
        }
    }

    fn in_list(&self, list: &[String]) -> bool {
        if list.iter().any(|entry| entry == "*") {
            return true;
        }
        // We are not root and the peer is we ourselves: what root may, it can do without us.
        if self.peer.is_privileged() && list.iter().any(|entry| entry == "root") {
            return true;
        }
        // Nobody in our namespace: no name in the list can mean this user, not even `nobody`.
        if self.peer.uid == OVERFLOW_ID && self.peer.uid != geteuid().as_raw() {
            return false;
        }
        if list.is_empty() || list.iter().all(|entry| entry == "root") {
            return false;
        }
        let user = self.user();
        list.iter().any(|entry| match entry.strip_prefix('@') {
            None => *entry == user,
            Some(group) => {
                self.group() == group
                    || self
                        .accounts
                        .lookup(Query::Members(group.to_owned()))
                        .is_some_and(|members| members.split(',').any(|member| member == user))
            }
        })
    }
}

impl Default for Accounts {
    fn default() -> Self {
        Self {
            passwd: "/etc/passwd".into(),
            group: "/etc/group".into(),
            getent: true,
            cache: Mutex::default(),
        }
    }
}

impl Accounts {
    fn lookup(&self, query: Query) -> Option<String> {
        let now = Instant::now();
        if let Some((at, found)) = self
            .cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&query)
            && now.duration_since(*at) < ACCOUNT_TTL
        {
            return found.clone();
        }
        let found = self.ask(&query);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= ACCOUNTS_MAX {
            cache.clear();
        }
        cache.insert(query, (now, found.clone()));
        found
    }

    fn ask(&self, query: &Query) -> Option<String> {
        // Field that must match, and field that is the answer.
        let (file, database, key, key_field, value_field) = match query {
            Query::User(uid) => (&self.passwd, "passwd", uid.to_string(), 2, 0),
            Query::Group(gid) => (&self.group, "group", gid.to_string(), 2, 0),
            Query::Members(group) => (&self.group, "group", group.clone(), 0, 3),
        };
        let pick = |line: &str| {
            let fields: Vec<&str> = line.trim_end().split(':').collect();
            let value = fields.get(value_field).map(|value| (*value).to_owned());
            if fields.get(key_field) == Some(&&*key) {
                value
            } else {
                None
            }
        };
        let in_file = std::fs::File::open(file).ok().and_then(|file| {
            BufReader::new(file)
                .lines()
                .map_while(Result::ok)
                .find_map(|line| pick(&line))
        });
        if in_file.is_some() || !self.getent || key.starts_with('-') {
            return in_file;
        }
        let output = Command::new("getent")
            .args([database, &key])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .find_map(pick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(dir: &std::path::Path) -> Accounts {
        let passwd = dir.join("passwd");
        let group = dir.join("group");
        std::fs::write(&passwd, "root:x:0:0::/:\nanna:x:4001:4100::/:\nbert:x:4002:4200::/:\nnobody:x:65534:65534::/:\n")
            .unwrap();
        std::fs::write(
            &group,
            "staff:x:4100:\nwheel:x:4300:bert,carl\nnixbld:x:4200:\n",
        )
        .unwrap();
        Accounts {
            passwd,
            group,
            getent: false,
            cache: Mutex::default(),
        }
    }

    fn judge(trusted: &[&str], allowed: &[&str], peer: Peer) -> Decision {
        let dir = tempfile::tempdir().unwrap();
        let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let options = ServerOptions {
            trusted_users: strings(trusted),
            allowed_users: strings(allowed),
            build_users_group: Some("nixbld".to_owned()),
            ..ServerOptions::default()
        };
        peer.judge(&options, &accounts(dir.path()))
    }

    const ANNA: Peer = Peer {
        uid: 4001,
        gid: 4100,
        pid: 1,
    };
    const BERT: Peer = Peer {
        uid: 4002,
        gid: 4200,
        pid: 1,
    };
    const CARL: Peer = Peer {
        uid: 4003,
        gid: 4001,
        pid: 1,
    };
    const ROOT: Peer = Peer {
        uid: 0,
        gid: 0,
        pid: 1,
    };

    fn refused(user: &str) -> Decision {
        Decision::Refused(format!(
            "user '{user}' is not allowed to connect to the Nix daemon"
        ))
    }

    #[test]
    fn users_groups_and_everybody_are_matched_as_nix_does() {
        assert_eq!(judge(&["root"], &["*"], ROOT), Decision::Trusted);
        assert_eq!(judge(&[], &["*"], ROOT), Decision::Untrusted);
        assert_eq!(judge(&["root"], &["*"], ANNA), Decision::Untrusted);
        assert_eq!(judge(&["anna"], &[], ANNA), Decision::Trusted);
        assert_eq!(judge(&["@staff"], &["*"], ANNA), Decision::Trusted);
        assert_eq!(judge(&["@wheel"], &["*"], ANNA), Decision::Untrusted);
        assert_eq!(judge(&["*"], &[], CARL), Decision::Trusted);
        assert_eq!(judge(&["root"], &["4003"], CARL), Decision::Untrusted);
        assert_eq!(judge(&["root"], &["anna"], CARL), refused("4003"));
        assert_eq!(judge(&["root"], &[], ANNA), refused("anna"));
    }

    #[test]
    fn builders_may_never_connect() {
        assert_eq!(judge(&["bert", "@wheel"], &["*"], BERT), refused("bert"));
    }

    #[test]
    fn a_user_from_outside_of_our_namespace_is_not_nobody() {
        let outside = Peer {
            uid: OVERFLOW_ID,
            gid: OVERFLOW_ID,
            pid: 0,
        };
        assert_eq!(
            judge(&["root", "nobody"], &["*"], outside),
            Decision::Untrusted
        );
        assert_eq!(judge(&["root"], &["nobody"], outside), refused("nobody"));
    }
}
