//! The store's own id: what was made by way of it is distinguished from what another store's daemon made.

use sqlx::Row;

use crate::{Error, Store};

impl Store {
    /// The id, a UUID, made at the first call. A copy of the database has the same.
    pub async fn id(&self) -> Result<String, Error> {
        let made = uuid::Uuid::new_v4().to_string();
        let sql = "INSERT INTO store_id (only_one, id) VALUES (1, $1) ON CONFLICT DO NOTHING";
        sqlx::query(sql).bind(&made).execute(&self.pool).await?;
        let row = sqlx::query("SELECT id FROM store_id").fetch_one(&self.pool).await?;
        Ok(row.try_get("id")?)
    }
}
