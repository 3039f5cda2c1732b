//! Bound ports and the subdomains that lead to them.

use sqlx::Row;

use crate::{Error, Store, sandboxes::Query};

const ALL: &str = "SELECT subdomain, sandbox_id, port, CAST(is_public AS INTEGER) AS is_public FROM endpoints \
                   ORDER BY created_at, rowid";

/// One bound port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointRow {
    /// First label of the host name.
    pub subdomain: String,
    /// The sandbox it leads to.
    pub sandbox_id: String,
    /// Port in the sandbox.
    pub port: u16,
    /// Whether it answers everyone; else the members of the sandbox's account.
    pub is_public: bool,
}

impl Store {
    /// Binds a port.
    pub async fn add_endpoint(&self, endpoint: &EndpointRow, now: i64) -> Result<(), Error> {
        add_endpoint(endpoint, now).execute(&self.pool).await?;
        Ok(())
    }

    /// Makes a bound port public or private.
    pub async fn set_endpoint_public(&self, sandbox_id: &str, port: u16, is_public: bool) -> Result<(), Error> {
        let sql = "UPDATE endpoints SET is_public = $3 WHERE sandbox_id = $1 AND port = $2";
        let query = sqlx::query(sql).bind(sandbox_id).bind(i64::from(port)).bind(is_public);
        query.execute(&self.pool).await?;
        Ok(())
    }

    /// Unbinds a port; whether it was bound.
    pub async fn remove_endpoint(&self, sandbox_id: &str, port: u16) -> Result<bool, Error> {
        let sql = "DELETE FROM endpoints WHERE sandbox_id = $1 AND port = $2";
        let done = sqlx::query(sql).bind(sandbox_id).bind(i64::from(port)).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Unbinds all ports of a sandbox.
    pub async fn remove_endpoints(&self, sandbox_id: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM endpoints WHERE sandbox_id = $1").bind(sandbox_id).execute(&self.pool).await?;
        Ok(())
    }

    /// Every bound port, in the order of binding.
    pub async fn endpoints(&self) -> Result<Vec<EndpointRow>, Error> {
        let rows = sqlx::query(ALL).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let port: i64 = row.try_get("port")?;
                Ok(EndpointRow {
                    subdomain: row.try_get("subdomain")?,
                    sandbox_id: row.try_get("sandbox_id")?,
                    port: u16::try_from(port).unwrap_or_default(),
                    is_public: row.try_get::<i32, _>("is_public")? != 0,
                })
            })
            .collect()
    }
}

pub(crate) fn add_endpoint(endpoint: &EndpointRow, now: i64) -> Query<'_> {
    let sql = "INSERT INTO endpoints (subdomain, sandbox_id, port, created_at, is_public) VALUES ($1, $2, $3, $4, $5)";
    let query = sqlx::query(sql).bind(&endpoint.subdomain).bind(&endpoint.sandbox_id);
    query.bind(i64::from(endpoint.port)).bind(now).bind(endpoint.is_public)
}
