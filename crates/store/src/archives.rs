//! Archives: whose they are, and which object of their storage has their content.
//!
//! What changes who needs an object takes the lock of the object's row first: an object that is given up and the same
//! content that comes anew never miss each other.

use sqlx::{Any, Row, Transaction, any::AnyRow};

use crate::{Error, Store};

/// One archive. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveRow {
    /// Its id.
    pub id: String,
    /// The account it belongs to.
    pub account: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Hash of what lets one upload it.
    pub ticket: Option<String>,
    /// When it was asked for.
    pub created_at: i64,
    /// When it could be used from.
    pub finalized_at: Option<i64>,
    /// Its content, once it was uploaded.
    pub content: Option<ContentRow>,
}

/// The content of archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentRow {
    /// SHA-256, in hex.
    pub hash: String,
    /// Name of the object that has it.
    pub object: String,
    /// Bytes.
    pub size: i64,
}

const SELECT: &str = "SELECT a.id, a.account, a.name, a.ticket, a.created_at, a.finalized_at, o.hash, o.object, o.size \
                      FROM archives a LEFT JOIN archive_objects o ON o.hash = a.hash";

/// Those that are kept until they are removed: they have a name, or were uploaded to a URL that was asked for.
const KEPT: &str = "(a.name IS NOT NULL OR a.ticket IS NOT NULL)";

impl Store {
    /// Adds an archive that waits for its content.
    pub async fn add_archive(&self, row: &ArchiveRow) -> Result<(), Error> {
        let sql = "INSERT INTO archives (id, account, name, ticket, created_at, finalized_at) \
                   VALUES ($1, $2, $3, $4, $5, $6)";
        let query = sqlx::query(sql).bind(&row.id).bind(&row.account).bind(&row.name).bind(&row.ticket);
        query.bind(row.created_at).bind(row.finalized_at).execute(&self.pool).await?;
        Ok(())
    }

    /// One archive.
    pub async fn archive(&self, id: &str) -> Result<Option<ArchiveRow>, Error> {
        let sql = format!("{SELECT} WHERE a.id = $1");
        let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&self.pool).await?;
        row.as_ref().map(archive).transpose()
    }

    /// An account's archives that can be used and were not sent for one deploy alone, newest first.
    pub async fn archives(&self, account: &str) -> Result<Vec<ArchiveRow>, Error> {
        let sql = format!(
            "{SELECT} WHERE a.account = $1 AND a.finalized_at IS NOT NULL AND {KEPT} ORDER BY a.created_at DESC, a.id"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(account).fetch_all(&self.pool).await?;
        rows.iter().map(archive).collect()
    }

    /// Ids of the archives asked for before `time` that nobody will use: those that cannot be used yet, and those that
    /// were sent for one deploy, whose sandbox is gone.
    pub async fn unused_archives(&self, time: i64) -> Result<Vec<String>, Error> {
        let used = "SELECT 1 FROM placements p WHERE p.archive_id = a.id AND NOT p.gone";
        let sql = format!(
            "SELECT a.id FROM archives a WHERE a.created_at < $1 \
             AND (a.finalized_at IS NULL OR (NOT {KEPT} AND NOT EXISTS ({used})))"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(time).fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok(row.try_get("id")?)).collect()
    }

    /// Gives an archive of `account` its content, or another. Answers the objects that nobody needs now: the one in
    /// `content`, where another has the same, and that of the content before.
    ///
    /// # Errors
    /// [`Error::Gone`] when there is no such archive, or it is finalized; [`Error::Full`] when the account's archives would
    /// be more than `most` bytes together, the same content counted once.
    pub async fn fill_archive(
        &self,
        account: &str,
        id: &str,
        content: &ContentRow,
        most: Option<i64>,
    ) -> Result<Vec<String>, Error> {
        let mut transaction = self.of_account(account).await?;
        let sql = "INSERT INTO archive_objects (hash, object, size) VALUES ($1, $2, $3) \
                   ON CONFLICT (hash) DO UPDATE SET size = excluded.size RETURNING object";
        let query = sqlx::query(sql).bind(&content.hash).bind(&content.object).bind(content.size);
        let object: String = query.fetch_one(&mut *transaction).await?.try_get("object")?;
        let sql = "SELECT hash FROM archives WHERE id = $1 AND account = $2";
        let before = sqlx::query(sql).bind(id).bind(account);
        let before = before.fetch_optional(&mut *transaction).await?.ok_or(Error::Gone)?;
        let before: Option<String> = before.try_get("hash")?;
        let sql = "UPDATE archives SET hash = $2 WHERE id = $1 AND finalized_at IS NULL";
        let filled = sqlx::query(sql).bind(id).bind(&content.hash).execute(&mut *transaction).await?;
        if filled.rows_affected() == 0 {
            return Err(Error::Gone);
        }
        let used = used_by(&mut transaction, account).await?;
        if most.is_some_and(|most| used > most) {
            return Err(Error::Full(used - content.size));
        }
        let mut free = Vec::new();
        if object != content.object {
            free.push(content.object.clone());
        }
        if let Some(before) = before.filter(|hash| *hash != content.hash) {
            free.extend(give_up(&mut transaction, &before).await?);
        }
        transaction.commit().await?;
        Ok(free)
    }

    /// Makes an archive usable; whether it had its content and was not usable before.
    pub async fn finalize_archive(&self, id: &str, name: Option<&str>, now: i64) -> Result<bool, Error> {
        let sql = "UPDATE archives SET finalized_at = $2, name = $3 \
                   WHERE id = $1 AND finalized_at IS NULL AND hash IS NOT NULL";
        let done = sqlx::query(sql).bind(id).bind(now).bind(name).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Forgets an archive. Answers the object that nobody needs now.
    pub async fn remove_archive(&self, id: &str) -> Result<Option<String>, Error> {
        let mut transaction = self.begin().await?;
        let sql = "DELETE FROM archives WHERE id = $1 RETURNING hash";
        let row = sqlx::query(sql).bind(id).fetch_optional(&mut *transaction).await?;
        let hash: Option<String> = row.map(|row| row.try_get("hash")).transpose()?.flatten();
        let free = match hash {
            Some(hash) => give_up(&mut transaction, &hash).await?,
            None => None,
        };
        transaction.commit().await?;
        Ok(free)
    }

    /// Whether an object is known as some content's.
    pub async fn knows_object(&self, object: &str) -> Result<bool, Error> {
        let query = sqlx::query("SELECT 1 FROM archive_objects WHERE object = $1").bind(object);
        Ok(query.fetch_optional(&self.pool).await?.is_some())
    }
}

/// Bytes of an account's archives.
async fn used_by(transaction: &mut Transaction<'_, Any>, account: &str) -> Result<i64, Error> {
    // PostgreSQL's sum of integers is none.
    let sql = "SELECT CAST(COALESCE(SUM(size), 0) AS BIGINT) AS used FROM archive_objects \
               WHERE hash IN (SELECT hash FROM archives WHERE account = $1)";
    Ok(sqlx::query(sql).bind(account).fetch_one(&mut **transaction).await?.try_get("used")?)
}

/// Forgets a content that no archive has. Its row is locked before the archives are looked at: PostgreSQL shows a
/// statement what was committed before it began.
async fn give_up(transaction: &mut Transaction<'_, Any>, hash: &str) -> Result<Option<String>, Error> {
    sqlx::query("UPDATE archive_objects SET size = size WHERE hash = $1")
        .bind(hash)
        .execute(&mut **transaction)
        .await?;
    let sql = "DELETE FROM archive_objects WHERE hash = $1 AND NOT EXISTS (SELECT 1 FROM archives WHERE hash = $1) \
               RETURNING object";
    let row = sqlx::query(sql).bind(hash).fetch_optional(&mut **transaction).await?;
    Ok(row.map(|row| row.try_get("object")).transpose()?)
}

fn archive(row: &AnyRow) -> Result<ArchiveRow, Error> {
    let hash: Option<String> = row.try_get("hash")?;
    let content = match hash {
        Some(hash) => Some(ContentRow { hash, object: row.try_get("object")?, size: row.try_get("size")? }),
        None => None,
    };
    Ok(ArchiveRow {
        id: row.try_get("id")?,
        account: row.try_get("account")?,
        name: row.try_get("name")?,
        ticket: row.try_get("ticket")?,
        created_at: row.try_get("created_at")?,
        finalized_at: row.try_get("finalized_at")?,
        content,
    })
}
