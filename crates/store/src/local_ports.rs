//! Ports on the host's loopback, by the subdomain that leads to the same place.

use std::collections::HashMap;

use sqlx::Row;

use crate::{Error, Store};

impl Store {
    /// The port of each subdomain that has one.
    pub async fn local_ports(&self) -> Result<HashMap<String, u16>, Error> {
        let rows = sqlx::query("SELECT subdomain, port FROM local_ports").fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let port: i64 = row.try_get("port")?;
                Ok((row.try_get("subdomain")?, u16::try_from(port).unwrap_or_default()))
            })
            .collect()
    }

    /// Makes these the ports; subdomains that are not among them have none any more.
    pub async fn set_local_ports(&self, ports: &HashMap<String, u16>) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        sqlx::query("DELETE FROM local_ports").execute(&mut *transaction).await?;
        for (subdomain, port) in ports {
            let sql = "INSERT INTO local_ports (subdomain, port) VALUES ($1, $2)";
            sqlx::query(sql).bind(subdomain).bind(i64::from(*port)).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}
