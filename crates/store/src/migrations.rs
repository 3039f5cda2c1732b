//! How the tables came to be what they are, step by step, for each kind of database.

use sqlx::{
    SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};

use crate::Kind;

/// The steps of one directory: numbers, names and contents. They are named here, rather than found by sqlx's macro, because
/// that macro compiles both databases' drivers a second time, for the compiler's own use.
macro_rules! steps {
    ($directory:literal: $($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../migrations/", $directory, "/", $name, ".sql")))),*]
    };
}

macro_rules! steps_of {
    ($directory:literal) => {
        steps!($directory:
            "0001_sandboxes",
            "0002_accounts_of_sandboxes",
            "0003_accounts",
            "0004_archives",
            "0005_placements",
            "0006_store_id",
            "0007_local_ports",
            "0008_holds_on_placements",
            "0009_audit_by_time",
        )
    };
}

const SQLITE: &[(&str, &str)] = &steps_of!("sqlite");
const POSTGRES: &[(&str, &str)] = &steps_of!("postgres");

/// All steps for a kind of database.
pub(crate) fn of(kind: Kind) -> Migrator {
    let steps = match kind {
        Kind::Sqlite => SQLITE,
        Kind::Postgres => POSTGRES,
    };
    let step = |(name, sql): &(&'static str, &'static str)| {
        let (number, words) = name.split_once('_')?;
        let (sql, words) = (sql.into_sql_str(), words.replace('_', " ").into());
        Some(Migration::new(number.parse().ok()?, words, MigrationType::Simple, sql, false))
    };
    Migrator::with_migrations(steps.iter().filter_map(step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_a_step() {
        for (kind, directory) in [(Kind::Sqlite, "sqlite"), (Kind::Postgres, "postgres")] {
            let files = std::fs::read_dir(format!("{}/migrations/{directory}", env!("CARGO_MANIFEST_DIR"))).unwrap();
            let mut files: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
            files.sort();
            let migrator = of(kind);
            let steps =
                migrator.iter().map(|step| format!("{:04}_{}.sql", step.version, step.description.replace(' ', "_")));
            assert_eq!(steps.collect::<Vec<_>>(), files);
        }
    }
}
