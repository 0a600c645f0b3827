//! Remembers on disk what binary caches said: `binary-caches.sqlite`.
//!
//! Only a cache: it may be deleted at any time, is never synced, and what is wrong with it is a warning. The format is
//! nobody's but ours and has a version, `user_version`; a file of another version is emptied.
//!
//! | Table | What |
//! |---|---|
//! | `caches` | `nix-cache-info` of a URL |
//! | `infos` | narinfo of a hash part, as text; `null` says that there is none |
//! | `realisations` | the same for ids of outputs |

use crate::{Error, Result};
use rusqlite::{Connection, OptionalExtension, params};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the tables.
const VERSION: i64 = 1;
/// How long `nix-cache-info` is believed, as in Nix.
const CACHE_INFO_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most narinfos kept; the oldest go first. At about 800 bytes each the file stays below half a gigabyte.
const INFOS_MAX: i64 = 500_000;
/// Longest wait for another process that writes.
const BUSY: Duration = Duration::from_secs(2);

const SCHEMA: &str = "
drop table if exists caches; drop table if exists infos; drop table if exists realisations;
create table caches (id integer primary key, url text not null unique, time integer not null, text text not null);
create table infos (cache integer not null, hash_part text not null, time integer not null, text text,
  primary key (cache, hash_part)) without rowid;
create index infos_by_time on infos (time);
create table realisations (cache integer not null, id text not null, time integer not null, text text,
  primary key (cache, id)) without rowid;
";

/// How long answers are believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ttl {
    pub(super) positive: Duration,
    pub(super) negative: Duration,
}

impl Ttl {
    /// Whether what was said then still counts.
    fn holds(&self, time: i64, present: bool, now: i64) -> bool {
        let ttl = if present {
            self.positive
        } else {
            self.negative
        };
        // A clock that was set back makes nothing young.
        time <= now && now.saturating_sub(time) < i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX)
    }
}

/// What was said, or `None` if nothing is known: `Some(None)` says that there is none.
pub(super) type Known = Option<Option<String>>;

/// The file. Threads and processes share it.
pub(super) struct InfoCache {
    slot: Mutex<Slot>,
}

enum Slot {
    /// Opened when first needed.
    Closed(PathBuf),
    Open(Box<Connection>),
    /// After an error: no more is asked of it.
    Off,
}

impl InfoCache {
    /// The file is opened or made when it is first needed. One that cannot be used is warned about and left alone.
    pub(super) fn new(file: PathBuf) -> Self {
        Self {
            slot: Mutex::new(Slot::Closed(file)),
        }
    }

    /// What the cache at `url` has said of itself, and its number here.
    pub(super) fn cache_info(&self, url: &str) -> Option<(i64, String)> {
        self.with(|db| {
            let row: Option<(i64, i64, String)> = db
                .prepare_cached("select id, time, text from caches where url = ?1")?
                .query_row([url], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
                .optional()?;
            let ttl = Ttl {
                positive: CACHE_INFO_TTL,
                negative: Duration::ZERO,
            };
            Ok(row
                .filter(|(_, time, _)| ttl.holds(*time, true, now()))
                .map(|(id, _, text)| (id, text)))
        })
        .flatten()
    }
    /// Notes what a cache says of itself; returns its number.
    pub(super) fn set_cache_info(&self, url: &str, text: &str) -> Option<i64> {
        self.with(|db| {
            db.prepare_cached(
                "insert into caches (url, time, text) values (?1, ?2, ?3) \
                 on conflict (url) do update set time = excluded.time, text = excluded.text returning id",
            )?
            .query_row(params![url, now(), text], |row| row.get(0))
        })
    }
    /// What is known of the narinfos of these hash parts, in order.
    pub(super) fn infos(&self, cache: i64, hash_parts: &[&str], ttl: Ttl) -> Vec<Known> {
        let found = self.with(|db| {
            let now = now();
            let mut select = db.prepare_cached(
                "select time, text from infos where cache = ?1 and hash_part = ?2",
            )?;
            hash_parts
                .iter()
                .map(|hash_part| known(&mut select, cache, hash_part, ttl, now))
                .collect()
        });
        found.unwrap_or_else(|| vec![None; hash_parts.len()])
    }
    /// Notes narinfos, or that there are none.
    pub(super) fn set_infos(&self, cache: i64, infos: &[(&str, Option<String>)]) {
        self.with(|db| {
            let now = now();
            let transaction = db.transaction()?;
            {
                let mut insert = transaction.prepare_cached(
                    "insert or replace into infos (cache, hash_part, time, text) values (?1, ?2, ?3, ?4)",
                )?;
                for (hash_part, text) in infos {
                    insert.execute(params![cache, hash_part, now, text])?;
                }
            }
            transaction.commit()
        });
    }
    /// Forgets a narinfo that has turned out wrong.
    pub(super) fn forget(&self, cache: i64, hash_part: &str) {
        self.with(|db| {
            db.prepare_cached("delete from infos where cache = ?1 and hash_part = ?2")?
                .execute(params![cache, hash_part])
        });
    }
    /// What is known of a realisation.
    pub(super) fn realisation(&self, cache: i64, id: &str, ttl: Ttl) -> Known {
        self.with(|db| {
            let mut select = db.prepare_cached(
                "select time, text from realisations where cache = ?1 and id = ?2",
            )?;
            known(&mut select, cache, id, ttl, now())
        })
        .flatten()
    }
    /// Notes a realisation, or that there is none.
    pub(super) fn set_realisation(&self, cache: i64, id: &str, text: Option<&str>) {
        self.with(|db| {
            db.prepare_cached(
                "insert or replace into realisations (cache, id, time, text) values (?1, ?2, ?3, ?4)",
            )?
            .execute(params![cache, id, now(), text])
        });
    }

    /// Does it, or warns and does no more.
    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Option<T> {
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Slot::Closed(file) = &*slot {
            *slot = match open(file) {
                Ok(connection) => Slot::Open(Box::new(connection)),
                Err(error) => {
                    tracing::warn!(
                        error = error.chain(),
                        "what binary caches say is not remembered"
                    );
                    Slot::Off
                }
            };
        }
        let Slot::Open(connection) = &mut *slot else {
            return None;
        };
        match work(connection) {
            Ok(done) => Some(done),
            Err(error) => {
                let busy = matches!(
                    error.sqlite_error_code(),
                    Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked)
                );
                if !busy {
                    tracing::warn!(
                        %error,
                        "what binary caches say is not remembered any more"
                    );
                    *slot = Slot::Off;
                }
                None
            }
        }
    }
}

fn known(
    select: &mut rusqlite::CachedStatement<'_>,
    cache: i64,
    key: &str,
    ttl: Ttl,
    now: i64,
) -> rusqlite::Result<Known> {
    let row: Option<(i64, Option<String>)> = select
        .query_row(params![cache, key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(row
        .filter(|(time, text)| ttl.holds(*time, text.is_some(), now))
        .map(|(_, text)| text))
}

fn open(file: &Path) -> Result<Connection> {
    let failed = |e: rusqlite::Error| Error::io("opening", file, std::io::Error::other(e));
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, e))?;
    }
    let mut db = Connection::open(file).map_err(failed)?;
    db.busy_timeout(BUSY).map_err(failed)?;
    db.pragma_update(None, "journal_mode", "wal")
        .map_err(failed)?;
    db.pragma_update(None, "synchronous", "off")
        .map_err(failed)?;
    let transaction = db
        .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
        .map_err(failed)?;
    let version: i64 = transaction
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(failed)?;
    if version != VERSION {
        transaction.execute_batch(SCHEMA).map_err(failed)?;
        transaction
            .pragma_update(None, "user_version", VERSION)
            .map_err(failed)?;
    }
    // What is too old for anyone, and what is too much.
    transaction
        .execute(
            "delete from infos where time < (select time from infos order by time desc limit 1 offset ?1)",
            [INFOS_MAX],
        )
        .map_err(failed)?;
    transaction.commit().map_err(failed)?;
    Ok(db)
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Ttl = Ttl {
        positive: Duration::from_secs(86400),
        negative: Duration::from_secs(3600),
    };

    #[test]
    fn remembers_presence_and_absence_for_as_long_as_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/binary-caches.sqlite");
        let cache = InfoCache::new(file.clone());
        assert!(cache.cache_info("https://a").is_none());
        let id = cache
            .set_cache_info("https://a", "StoreDir: /nix/store\n")
            .unwrap();
        assert_eq!(cache.set_cache_info("https://a", "x"), Some(id));
        cache.set_infos(id, &[("aa", Some("text".into())), ("bb", None)]);
        let known = vec![Some(Some("text".to_owned())), Some(None), None];
        assert_eq!(cache.infos(id, &["aa", "bb", "cc"], DAY), known);
        drop(cache);
        let cache = InfoCache::new(file.clone());
        assert_eq!(cache.cache_info("https://a"), Some((id, "x".to_owned())));
        assert_eq!(cache.infos(id, &["aa", "bb", "cc"], DAY), known);
        assert_eq!(cache.infos(id + 1, &["aa"], DAY), [None]);
        let no_negative = Ttl {
            negative: Duration::ZERO,
            ..DAY
        };
        assert_eq!(
            cache.infos(id, &["aa", "bb"], no_negative),
            [known[0].clone(), None]
        );
        cache.forget(id, "aa");
        assert_eq!(cache.infos(id, &["aa"], DAY), [None]);
        cache.set_realisation(id, "sha256:0!out", None);
        assert_eq!(cache.realisation(id, "sha256:0!out", DAY), Some(None));
    }

    #[test]
    fn a_clock_that_was_set_back() {
        assert!(DAY.holds(100, true, 100));
        assert!(!DAY.holds(101, true, 100));
        assert!(!DAY.holds(0, false, 3600));
    }

    #[test]
    fn works_without_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.sqlite");
        std::fs::write(
            &file,
            "not a database, certainly not one of ours, whatever its name says",
        )
        .unwrap();
        let cache = InfoCache::new(file.clone());
        assert!(cache.set_cache_info("u", "x").is_none());
        assert_eq!(cache.infos(1, &["aa"], DAY), [None]);
        assert!(std::fs::read(&file).unwrap().starts_with(b"not a database"));
    }
}
