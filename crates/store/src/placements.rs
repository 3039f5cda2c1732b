//! Whose sandbox is in which region, and where subdomains lead: what a server of a cloud knows.

use sqlx::{Any, AssertSqlSafe, Row, Transaction, any::AnyRow};

use crate::{
    Error, Kind, Store,
    idempotency::{KeyRow, add_key},
    sandboxes::Query,
};

/// One sandbox's place. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementRow {
    /// The sandbox's id.
    pub id: String,
    /// Whose it is.
    pub account_id: String,
    /// Where it is.
    pub region: String,
    /// Its name.
    pub name: String,
    /// Its slug.
    pub slug: String,
    /// Whether it holds name and slug against others of its account.
    pub holds_name: bool,
    /// Whether it counts as running.
    pub running: bool,
    /// Whether it is gone and only told of.
    pub gone: bool,
    /// Whether it could not be made.
    pub failed: bool,
    /// When it was asked for.
    pub created_at: i64,
    /// When its row was last written.
    pub changed_at: i64,
    /// Thousandths of a processor.
    pub vcpu_millis: i64,
    /// MiB.
    pub memory_mib: i64,
    /// GB.
    pub disk_gb: i64,
    /// The account's own name of the archive it was made from.
    pub archive_id: Option<String>,
    /// What its region last told of it, as JSON.
    pub info: String,
}

/// The most an account may have; none where a field is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Sandboxes that run.
    pub running: Option<i64>,
    /// Their processors together.
    pub vcpu_millis: Option<i64>,
    /// Their memory together.
    pub memory_mib: Option<i64>,
    /// Disks of all that are not gone.
    pub disk_gb: Option<i64>,
}

/// What an account has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sandboxes that run.
    pub running: i64,
    /// Their processors together.
    pub vcpu_millis: i64,
    /// Their memory together.
    pub memory_mib: i64,
    /// Disks of all that are not gone.
    pub disk_gb: i64,
}

/// What became of a sandbox that was to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placed {
    /// It has its row, and the idempotency key stands for it.
    Added,
    /// The account has no room for it beside this.
    Full(Usage),
    /// The idempotency key stands for another sandbox, which is not gone.
    Known(KeyRow),
}

impl Store {
    /// Adds a sandbox if its account has room for it. With an idempotency key, the key's row comes with it in the same
    /// transaction: of several requests with one key at once, one adds and the others find what it added.
    pub async fn place(
        &self,
        row: &PlacementRow,
        limits: &Limits,
        key: Option<(&str, &KeyRow)>,
    ) -> Result<Placed, Error> {
        let mut transaction = self.of_account(&row.account_id).await?;
        if let Some((key, stands_for)) = key {
            if let Some(known) = living_key(&mut transaction, key).await? {
                return Ok(Placed::Known(known));
            }
            add_key(key, stands_for, row.created_at).execute(&mut *transaction).await?;
        }
        let usage = usage(&mut transaction, row).await?;
        if !fits(usage, row, limits) {
            return Ok(Placed::Full(usage));
        }
        let sql = "INSERT INTO placements (id, account_id, region, name, slug, holds_name, running, gone, failed, \
                   created_at, changed_at, vcpu_millis, memory_mib, disk_gb, archive_id, info) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)";
        let done = bind(sqlx::query(sql), row).execute(&mut *transaction).await.map(drop);
        if let Err(error) = done {
            // The transaction holds SQLite's only lock for writing: it ends before anything else is asked.
            transaction.rollback().await?;
            return Err(self.placement_taken(error, row).await);
        }
        transaction.commit().await?;
        Ok(Placed::Added)
    }

    /// Counts a sandbox with what this row says, if its account has room for that; else says what the account has beside.
    /// It counts so until [`Store::release_room`], or until `held_until`, whatever its region reports meanwhile.
    pub async fn make_room(
        &self,
        row: &PlacementRow,
        limits: &Limits,
        now: i64,
        held_until: i64,
    ) -> Result<Option<Usage>, Error> {
        let mut transaction = self.of_account(&row.account_id).await?;
        let usage = usage(&mut transaction, row).await?;
        if !fits(usage, row, limits) {
            return Ok(Some(usage));
        }
        let sql = "UPDATE placements SET running = $2, vcpu_millis = $3, memory_mib = $4, disk_gb = $5, \
                   holds = 1 + CASE WHEN held_until > $6 THEN holds ELSE 0 END, held_until = $7 WHERE id = $1";
        let query = sqlx::query(sql).bind(&row.id).bind(row.running).bind(row.vcpu_millis).bind(row.memory_mib);
        query.bind(row.disk_gb).bind(now).bind(held_until).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(None)
    }

    /// Ends one operation's hold: once the last one has ended, what the region reports counts again.
    pub async fn release_room(&self, id: &str) -> Result<(), Error> {
        let sql = "UPDATE placements SET holds = holds - 1 WHERE id = $1 AND holds > 0";
        sqlx::query(sql).bind(id).execute(&self.pool).await?;
        Ok(())
    }

    /// A transaction that no other one of the same account runs beside: what is counted stays so until its end.
    pub(crate) async fn of_account(&self, account: &str) -> Result<Transaction<'static, Any>, Error> {
        let mut transaction = self.begin().await?;
        if self.kind == Kind::Postgres {
            let sql = "SELECT 1 FROM (SELECT pg_advisory_xact_lock(hashtextextended($1, 0))) AS locked";
            sqlx::query(sql).bind(account).execute(&mut *transaction).await?;
        }
        Ok(transaction)
    }

    /// Names what is taken: where both are, the name counts.
    async fn placement_taken(&self, error: sqlx::Error, row: &PlacementRow) -> Error {
        match Error::from(error) {
            Error::SlugTaken => {}
            other => return other,
        }
        let sql = "SELECT 1 FROM placements WHERE holds_name AND account_id = $1 AND name = $2 AND id <> $3";
        let query = sqlx::query(sql).bind(&row.account_id).bind(&row.name).bind(&row.id);
        match query.fetch_optional(&self.pool).await {
            Ok(Some(_)) => Error::NameTaken,
            Ok(None) => Error::SlugTaken,
            Err(error) => error.into(),
        }
    }

    /// Writes a sandbox anew. What is held by an operation under way keeps counting as that operation asked for.
    pub async fn update_placement(&self, row: &PlacementRow) -> Result<(), Error> {
        let sql = format!(
            "UPDATE placements SET account_id = $2, region = $3, name = $4, slug = $5, holds_name = $6, \
             running = {}, gone = $8, failed = $9, created_at = $10, changed_at = $11, vcpu_millis = {}, \
             memory_mib = {}, disk_gb = {}, archive_id = $15, info = $16 WHERE id = $1",
            unless_held("running", "$7"),
            unless_held("vcpu_millis", "$12"),
            unless_held("memory_mib", "$13"),
            unless_held("disk_gb", "$14"),
        );
        let sql = AssertSqlSafe(sql);
        bind(sqlx::query(sql), row).execute(&self.pool).await?;
        Ok(())
    }

    /// In one step: `old` gives its name up and is gone, `new` takes it.
    pub async fn replace_placement(&self, old: &PlacementRow, new: &PlacementRow) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        let sql =
            "UPDATE placements SET holds_name = $2, running = $3, gone = $4, changed_at = $5, info = $6 WHERE id = $1";
        for row in [old, new] {
            let query = sqlx::query(sql).bind(&row.id).bind(row.holds_name).bind(row.running).bind(row.gone);
            query.bind(row.changed_at).bind(&row.info).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// By id, whoever's it is.
    pub async fn placement(&self, id: &str) -> Result<Option<PlacementRow>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM placements WHERE id = $1");
        let row = sqlx::query(AssertSqlSafe(sql)).bind(id).fetch_optional(&self.pool).await?;
        row.as_ref().map(placement).transpose()
    }

    /// The account's living one of this name or slug, else the newest.
    pub async fn placement_named(&self, account: &str, name: &str) -> Result<Option<PlacementRow>, Error> {
        let sql = format!(
            "SELECT {COLUMNS} FROM placements WHERE account_id = $1 AND (name = $2 OR slug = $2) \
             ORDER BY CAST(holds_name AS INTEGER) DESC, CAST(gone AS INTEGER), created_at DESC LIMIT 1"
        );
        let row = sqlx::query(AssertSqlSafe(sql)).bind(account).bind(name).fetch_optional(&self.pool).await?;
        row.as_ref().map(placement).transpose()
    }

    /// A page of the account's, newest first, then by id: those behind `after` (a creation and an id), also those that are
    /// gone where `gone` says so.
    pub async fn placements_of(
        &self,
        account: &str,
        gone: bool,
        after: Option<(i64, &str)>,
        limit: i64,
    ) -> Result<Vec<PlacementRow>, Error> {
        let (at, id) = after.unwrap_or((i64::MAX, ""));
        let living = if gone { "" } else { "AND NOT gone" };
        let sql = format!(
            "SELECT {COLUMNS} FROM placements WHERE account_id = $1 {living} \
             AND (created_at < $2 OR (created_at = $2 AND id > $3)) ORDER BY created_at DESC, id LIMIT $4"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).bind(account).bind(at).bind(id).bind(limit);
        query.fetch_all(&self.pool).await?.iter().map(placement).collect()
    }

    /// At most `limit` of the account's whose id begins with `prefix`, of hexadecimal digits and dashes.
    pub async fn placements_with_prefix(
        &self,
        account: &str,
        prefix: &str,
        limit: i64,
    ) -> Result<Vec<PlacementRow>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM placements WHERE account_id = $1 AND id LIKE $2 || '%' LIMIT $3");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(account).bind(prefix).bind(limit);
        query.fetch_all(&self.pool).await?.iter().map(placement).collect()
    }

    /// Ids of the region's that are not gone and have not changed since `before`.
    pub async fn placements_unheard(&self, region: &str, before: i64) -> Result<Vec<String>, Error> {
        let sql = "SELECT id FROM placements WHERE region = $1 AND NOT gone AND created_at < $2 AND changed_at < $2";
        Ok(sqlx::query_scalar(sql).bind(region).bind(before).fetch_all(&self.pool).await?)
    }

    /// Forgets those that have been gone since before `then`, with their subdomains.
    pub async fn forget_placements(&self, then: i64) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        let gone = "SELECT id FROM placements WHERE gone AND changed_at < $1";
        for table in ["subdomains WHERE sandbox_id", "idempotency_keys WHERE sandbox_id", "placements WHERE id"] {
            let sql = format!("DELETE FROM {table} IN ({gone})");
            sqlx::query(AssertSqlSafe(sql)).bind(then).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Has these subdomains, and no others, lead to a sandbox.
    pub async fn set_subdomains(&self, sandbox_id: &str, subdomains: &[String]) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        sqlx::query("DELETE FROM subdomains WHERE sandbox_id = $1").bind(sandbox_id).execute(&mut *transaction).await?;
        for subdomain in subdomains {
            let sql = "INSERT INTO subdomains (subdomain, sandbox_id) VALUES ($1, $2) \
                       ON CONFLICT (subdomain) DO UPDATE SET sandbox_id = excluded.sandbox_id";
            sqlx::query(sql).bind(subdomain).bind(sandbox_id).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// The region of the sandbox behind a subdomain, as far as this is known.
    pub async fn region_behind(&self, subdomain: &str) -> Result<Option<String>, Error> {
        let sql = "SELECT p.region AS region FROM subdomains s JOIN placements p ON p.id = s.sandbox_id WHERE s.subdomain = $1";
        let row = sqlx::query(sql).bind(subdomain).fetch_optional(&self.pool).await?;
        row.map(|row| Ok(row.try_get("region")?)).transpose()
    }
}

/// A counted column's next value; `$11` is the time of the change.
fn unless_held(column: &str, value: &str) -> String {
    format!("CASE WHEN holds > 0 AND held_until > $11 THEN {column} ELSE {value} END")
}

/// What a key stands for, as long as that is not gone; a key that stands for what is gone is removed.
async fn living_key(transaction: &mut Transaction<'static, Any>, key: &str) -> Result<Option<KeyRow>, Error> {
    let sql = "SELECT k.request AS request, k.sandbox_id AS sandbox_id FROM idempotency_keys k \
               JOIN placements p ON p.id = k.sandbox_id WHERE k.key = $1 AND NOT p.gone";
    if let Some(row) = sqlx::query(sql).bind(key).fetch_optional(&mut **transaction).await? {
        return Ok(Some(KeyRow { request: row.try_get("request")?, sandbox_id: row.try_get("sandbox_id")? }));
    }
    sqlx::query("DELETE FROM idempotency_keys WHERE key = $1").bind(key).execute(&mut **transaction).await?;
    Ok(None)
}

/// What the row's account has beside the row itself.
async fn usage(transaction: &mut Transaction<'static, Any>, row: &PlacementRow) -> Result<Usage, Error> {
    let sql = "SELECT COALESCE(SUM(CASE WHEN running THEN 1 ELSE 0 END), 0) AS running, \
               CAST(COALESCE(SUM(CASE WHEN running THEN vcpu_millis ELSE 0 END), 0) AS BIGINT) AS vcpu_millis, \
               CAST(COALESCE(SUM(CASE WHEN running THEN memory_mib ELSE 0 END), 0) AS BIGINT) AS memory_mib, \
               CAST(COALESCE(SUM(disk_gb), 0) AS BIGINT) AS disk_gb \
               FROM placements WHERE account_id = $1 AND NOT gone AND id <> $2";
    let found = sqlx::query(sql).bind(&row.account_id).bind(&row.id).fetch_one(&mut **transaction).await?;
    Ok(Usage {
        running: found.try_get("running")?,
        vcpu_millis: found.try_get("vcpu_millis")?,
        memory_mib: found.try_get("memory_mib")?,
        disk_gb: found.try_get("disk_gb")?,
    })
}

fn fits(usage: Usage, row: &PlacementRow, limits: &Limits) -> bool {
    let within = |used: i64, more: i64, most: Option<i64>| most.is_none_or(|most| used + more <= most);
    let runs = within(usage.running, 1, limits.running)
        && within(usage.vcpu_millis, row.vcpu_millis, limits.vcpu_millis)
        && within(usage.memory_mib, row.memory_mib, limits.memory_mib);
    // Of what it does not ask for, an account may have too much already.
    (runs || !row.running) && within(usage.disk_gb, row.disk_gb, limits.disk_gb)
}

const COLUMNS: &str = "id, account_id, region, name, slug, CAST(holds_name AS INTEGER) AS holds_name, \
                       CAST(running AS INTEGER) AS running, CAST(gone AS INTEGER) AS gone, \
                       CAST(failed AS INTEGER) AS failed, created_at, changed_at, vcpu_millis, memory_mib, disk_gb, \
                       archive_id, info";

fn bind<'q>(query: Query<'q>, row: &'q PlacementRow) -> Query<'q> {
    query
        .bind(&row.id)
        .bind(&row.account_id)
        .bind(&row.region)
        .bind(&row.name)
        .bind(&row.slug)
        .bind(row.holds_name)
        .bind(row.running)
        .bind(row.gone)
        .bind(row.failed)
        .bind(row.created_at)
        .bind(row.changed_at)
        .bind(row.vcpu_millis)
        .bind(row.memory_mib)
        .bind(row.disk_gb)
        .bind(&row.archive_id)
        .bind(&row.info)
}

fn placement(row: &AnyRow) -> Result<PlacementRow, Error> {
    let flag = |name: &str| row.try_get::<i32, _>(name).map(|value| value != 0);
    Ok(PlacementRow {
        id: row.try_get("id")?,
        account_id: row.try_get("account_id")?,
        region: row.try_get("region")?,
        name: row.try_get("name")?,
        slug: row.try_get("slug")?,
        holds_name: flag("holds_name")?,
        running: flag("running")?,
        gone: flag("gone")?,
        failed: flag("failed")?,
        created_at: row.try_get("created_at")?,
        changed_at: row.try_get("changed_at")?,
        vcpu_millis: row.try_get("vcpu_millis")?,
        memory_mib: row.try_get("memory_mib")?,
        disk_gb: row.try_get("disk_gb")?,
        archive_id: row.try_get("archive_id")?,
        info: row.try_get("info")?,
    })
}
