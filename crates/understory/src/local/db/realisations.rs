//! What outputs of derivations became, in the tables of two generations of Nix.

use super::queries::{has_table, opt_text, text};
use super::{Database, Failure, Work, schema};
use crate::{Error, Result};
use rusqlite::Connection;
use std::collections::BTreeSet;
use understory_nix::StorePath;
use understory_nix::realisation::DrvOutput as HashOutput;
use understory_nix::worker::{DrvOutput, WireRealisation};

/// Where a realisation is kept.
struct Table {
    name: &'static str,
    create: &'static str,
    select: &'static str,
    insert: &'static str,
    update: &'static str,
}

/// Of Nix up to 2.34.
const REALISATIONS: Table = Table {
    name: "Realisations",
    create: schema::CREATE_REALISATIONS,
    select: "select ValidPaths.path, signatures from Realisations \
             join ValidPaths on ValidPaths.id = outputPath where drvPath = ?1 and outputName = ?2",
    insert: "insert into Realisations (drvPath, outputName, outputPath, signatures) \
             values (?1, ?2, (select id from ValidPaths where path = ?3), ?4)",
    update: "update Realisations set signatures = ?3 where drvPath = ?1 and outputName = ?2",
};

/// Of Nix 2.35.
const BUILD_TRACE: Table = Table {
    name: "BuildTraceV3",
    create: schema::CREATE_BUILD_TRACE,
    select: "select outputPath, signatures from BuildTraceV3 where drvPath = ?1 and outputName = ?2",
    insert: "insert into BuildTraceV3 (drvPath, outputName, outputPath, signatures) values (?1, ?2, ?3, ?4)",
    update: "update BuildTraceV3 set signatures = ?3 where drvPath = ?1 and outputName = ?2",
};

/// The table, and the key in it.
struct Key {
    table: &'static Table,
    drv: String,
    output: String,
}

impl Key {
    fn of(id: &DrvOutput) -> Result<Self> {
        match id {
            DrvOutput::Hash(text) => {
                let id = HashOutput::parse(text).map_err(|e| Error::user(e.to_string()))?;
                Ok(Self {
                    table: &REALISATIONS,
                    drv: format!("sha256:{}", id.hash().to_base16()),
                    output: id.output_name().to_owned(),
                })
            }
            DrvOutput::Path { drv, output } => Ok(Self {
                table: &BUILD_TRACE,
                drv: drv.base_name().to_owned(),
                output: output.clone(),
            }),
        }
    }
}

impl Database {
    /// A realisation, from table Realisations (key with a hash) or BuildTraceV3 (key with a path).
    pub fn realisation(&self, id: &DrvOutput) -> Result<Option<WireRealisation>> {
        let key = Key::of(id)?;
        let found = self.read_snapshot(|connection| self.find(connection, &key))?;
        Ok(found.map(|(out_path, signatures)| WireRealisation {
            id: id.clone(),
            out_path,
            signatures,
        }))
    }

    /// Registers a realisation, with the tables of Nix up to 2.34 or of 2.35 by the kind of its key; the tables
    /// are created if they are not there. Signatures are merged.
    ///
    /// # Errors
    /// The output's path is no row; another path is registered already.
    pub fn register_realisation(&self, realisation: &WireRealisation) -> Result<()> {
        let key = Key::of(&realisation.id)?;
        self.write(|connection| {
            if self.id_of(connection, &realisation.out_path)?.is_none() {
                return Err(self.not_valid(&realisation.out_path).into());
            }
            let Some((out_path, known)) = self.find(connection, &key)? else {
                if !has_table(connection, key.table.name)? {
                    connection.execute_batch(schema::CREATE_MIGRATIONS)?;
                    connection.execute_batch(key.table.create)?;
                }
                connection.prepare_cached(key.table.insert)?.execute((
                    &key.drv,
                    &key.output,
                    self.store_dir.print(&realisation.out_path),
                    join(&realisation.signatures),
                ))?;
                return Ok(());
            };
            if out_path != realisation.out_path {
                return Err(Failure::Other(Error::user(format!(
                    "Trying to register a realisation of '{}', but we already have another one locally.\n\
                     Local:  {}\nRemote: {}",
                    realisation.id.id(),
                    self.store_dir.print(&out_path),
                    self.store_dir.print(&realisation.out_path)
                ))));
            }
            if !realisation.signatures.is_subset(&known) {
                let all = known.union(&realisation.signatures).cloned().collect();
                connection
                    .prepare_cached(key.table.update)?
                    .execute((&key.drv, &key.output, join(&all)))?;
            }
            Ok(())
        })
    }

    fn find(
        &self,
        connection: &Connection,
        key: &Key,
    ) -> Work<Option<(StorePath, BTreeSet<String>)>> {
        if !has_table(connection, key.table.name)? {
            return Ok(None);
        }
        let mut statement = connection.prepare_cached(key.table.select)?;
        let mut rows = statement.query((&key.drv, &key.output))?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let signatures = opt_text(row, 1)?.unwrap_or_default();
        Ok(Some((
            self.parse(text(row, 0)?)?,
            signatures
                .split_ascii_whitespace()
                .map(str::to_owned)
                .collect(),
        )))
    }
}

fn join(signatures: &BTreeSet<String>) -> String {
    let all: Vec<&str> = signatures.iter().map(String::as_str).collect();
    all.join(" ")
}
