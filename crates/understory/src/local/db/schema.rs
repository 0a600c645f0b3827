//! The tables, as Nix 2.26.3 and 2.34.8 make them, and the steps from older ones.

/// The schema's version, which the file `schema` beside the database holds.
pub(super) const VERSION: u32 = 10;
/// The oldest one that can be upgraded: Nix 1.7. Older ones need Nix to rewrite the files of the store too.
pub(super) const VERSION_MIN: u32 = 7;

/// Tables of schema 10. `hash` is `sha256:<hex>`; `registrationTime` unix seconds; `deriver` and `ca` text or null;
/// `narSize` null if it is not known; `ultimate` 1 or null; `sigs` separated by spaces or null.
pub(super) const CREATE: &str = "
create table if not exists ValidPaths (
    id integer primary key autoincrement not null,
    path text unique not null,
    hash text not null,
    registrationTime integer not null,
    deriver text,
    narSize integer,
    ultimate integer,
    sigs text,
    ca text
);
create table if not exists Refs (
    referrer integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);
create trigger if not exists DeleteSelfRefs before delete on ValidPaths
begin
    delete from Refs where referrer = old.id and reference = old.id;
end;
create table if not exists DerivationOutputs (
    drv integer not null,
    id text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
create index if not exists IndexDerivationOutputs on DerivationOutputs(path);
create table if not exists SchemaMigrations (migration text primary key not null);
";

/// From version 7 to 8, and so on.
pub(super) const UPGRADES: [&str; 3] = [
    "alter table ValidPaths add column ultimate integer;
     alter table ValidPaths add column sigs text;",
    "drop table if exists FailedPaths;",
    "alter table ValidPaths add column ca text;",
];

/// Realisations of Nix up to 2.34; `drvPath` is `sha256:<hex>` of the derivation's hash modulo.
pub(super) const CREATE_REALISATIONS: &str = "
create table if not exists Realisations (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath integer not null,
    signatures text,
    foreign key (outputPath) references ValidPaths(id) on delete cascade
);
create index if not exists IndexRealisations on Realisations(drvPath, outputName);
create trigger if not exists DeleteSelfRefsViaRealisations before delete on ValidPaths
begin
    delete from RealisationsRefs where realisationReference in (
        select id from Realisations where outputPath = old.id
    );
end;
create table if not exists RealisationsRefs (
    referrer integer not null,
    realisationReference integer,
    foreign key (referrer) references Realisations(id) on delete cascade,
    foreign key (realisationReference) references Realisations(id) on delete restrict
);
create index if not exists IndexRealisationsRefsRealisationReference on RealisationsRefs(realisationReference);
create index if not exists IndexRealisationsRefs on RealisationsRefs(referrer);
create index if not exists IndexRealisationsRefsOnOutputPath on Realisations(outputPath);
insert or ignore into SchemaMigrations (migration) values ('20220326-ca-derivations');
";

/// Realisations of Nix 2.35; `drvPath` is the derivation's base name, `outputPath` a full path.
pub(super) const CREATE_BUILD_TRACE: &str = "
create table if not exists BuildTraceV3 (
    id integer primary key autoincrement not null,
    drvPath text not null,
    outputName text not null,
    outputPath text not null,
    signatures text
);
create index if not exists IndexBuildTraceV3 on BuildTraceV3(drvPath, outputName);
insert or ignore into SchemaMigrations (migration) values ('20251017-ca-derivations');
";

/// Older schemas have no such table until a newer Nix opens them.
pub(super) const CREATE_MIGRATIONS: &str =
    "create table if not exists SchemaMigrations (migration text primary key not null)";

/// Our own table.
pub(super) const CREATE_NOTES: &str =
    "create table if not exists Understory (name text primary key, value text)";
