//! The keys that tokens are signed with.

use sqlx::Row;

use crate::{Error, Store};

/// One signing key. It has no debug form: half of it is nobody's to read.
#[derive(Clone, PartialEq, Eq)]
pub struct SigningKeyRow {
    /// Counts up from key to key.
    pub generation: i64,
    /// The name that tokens say it by.
    pub kid: String,
    /// Its public half.
    pub public_key: String,
    /// Its private half, sealed where the servers have a secret for that.
    pub private_key: String,
    /// When it was made, and published with that.
    pub created_at: i64,
    /// When it begins to sign, and its predecessor ends.
    pub signs_from: i64,
}

impl Store {
    /// Every signing key, oldest first.
    pub async fn signing_keys(&self) -> Result<Vec<SigningKeyRow>, Error> {
        let rows = sqlx::query("SELECT * FROM signing_keys ORDER BY generation").fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                Ok(SigningKeyRow {
                    generation: row.try_get("generation")?,
                    kid: row.try_get("kid")?,
                    public_key: row.try_get("public_key")?,
                    private_key: row.try_get("private_key")?,
                    created_at: row.try_get("created_at")?,
                    signs_from: row.try_get("signs_from")?,
                })
            })
            .collect()
    }

    /// Adds a signing key; [`Error::Exists`] where another server was first with this generation.
    pub async fn add_signing_key(&self, row: &SigningKeyRow) -> Result<(), Error> {
        let sql = "INSERT INTO signing_keys (generation, kid, public_key, private_key, created_at, signs_from) \
                   VALUES ($1, $2, $3, $4, $5, $6)";
        let query = sqlx::query(sql).bind(row.generation).bind(&row.kid).bind(&row.public_key);
        query.bind(&row.private_key).bind(row.created_at).bind(row.signs_from).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets a key that verifies nothing any more.
    pub async fn forget_signing_key(&self, generation: i64) -> Result<(), Error> {
        sqlx::query("DELETE FROM signing_keys WHERE generation = $1").bind(generation).execute(&self.pool).await?;
        Ok(())
    }
}
