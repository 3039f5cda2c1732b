//! How much an account may have at a time.

use heyvm_api::{ApiError, ErrorCode, sandbox::SizeClass};
use heyvm_store::placements::{Limits, Usage};
use serde::Deserialize;

use crate::Cloud;

/// Limits of one account; none where a field is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quotas {
    /// Sandboxes with a VM.
    pub max_running: Option<i64>,
    /// Their processors together, in thousandths.
    pub max_vcpu_millis: Option<i64>,
    /// Their memory together, in MiB.
    pub max_memory_mib: Option<i64>,
    /// Disks of all sandboxes, stopped ones too, in GB.
    pub max_disk_gb: Option<i64>,
    /// Archives together, in MiB; the same content counts once.
    pub max_archive_mib: Option<i64>,
    /// Longest time-to-live in seconds; a sandbox without one gets this.
    pub max_ttl_seconds: Option<i64>,
}

/// What one sandbox takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needs {
    pub size_class: SizeClass,
    pub disk_gb: i64,
}

impl Cloud {
    /// The account's own limits, and the server's where it has none.
    pub async fn quotas_of(&self, account: &str) -> Result<Quotas, ApiError> {
        let own = self.store.account(account).await?.map(|row| row.quotas).unwrap_or_default();
        let default = self.quotas;
        Ok(Quotas {
            max_running: own.max_running.or(default.max_running),
            max_vcpu_millis: own.max_vcpu_millis.or(default.max_vcpu_millis),
            max_memory_mib: own.max_memory_mib.or(default.max_memory_mib),
            max_disk_gb: own.max_disk_gb.or(default.max_disk_gb),
            max_archive_mib: own.max_archive_mib.or(default.max_archive_mib),
            max_ttl_seconds: own.max_ttl_seconds.or(default.max_ttl_seconds),
        })
    }
}

impl Quotas {
    /// As the store counts.
    pub(crate) fn limits(self) -> Limits {
        Limits {
            running: self.max_running,
            vcpu_millis: self.max_vcpu_millis,
            memory_mib: self.max_memory_mib,
            disk_gb: self.max_disk_gb,
        }
    }

    /// The time-to-live to be had: what was asked for, or the ceiling where nothing was.
    pub(crate) fn ttl(self, asked: Option<i64>) -> Result<Option<i64>, ApiError> {
        match (asked, self.max_ttl_seconds) {
            (Some(asked), Some(most)) if asked > most => Err(exceeded(
                &format!("a time-to-live of {asked} s is more than this account's {most} s"),
                "use a shorter --ttl-seconds",
            )),
            (None, most) => Ok(most),
            (asked, _) => Ok(asked),
        }
    }
}

/// Which limit stands in the way, and by how much.
pub(crate) fn refused(usage: Usage, needs: Needs, quotas: Quotas) -> ApiError {
    let class = needs.size_class;
    let over = |used: i64, more: i64, most: Option<i64>| most.filter(|most| used + more > *most);
    let (cpu, memory) = (i64::from(class.cpu_millis()), i64::from(class.memory_mib()));
    let hint = "stop or remove a sandbox (heyvm list --all shows them), or ask the operator for more";
    let message = if let Some(most) = over(usage.running, 1, quotas.max_running) {
        format!("{} sandboxes run, and this account may have {most} at a time", usage.running)
    } else if let Some(most) = over(usage.vcpu_millis, cpu, quotas.max_vcpu_millis) {
        let [used, most, more] = [usage.vcpu_millis, most, cpu].map(|millis| millis as f64 / 1000.0);
        format!("{used} processors are in use, and {more} more would be above this account's {most}")
    } else if let Some(most) = over(usage.memory_mib, memory, quotas.max_memory_mib) {
        format!("{} MiB of memory are in use, and {memory} more would be above this account's {most}", usage.memory_mib)
    } else {
        let most = quotas.max_disk_gb.unwrap_or_default();
        format!(
            "{} GB of disk are in use, and {} more would be above this account's {most}",
            usage.disk_gb, needs.disk_gb
        )
    };
    exceeded(&message, hint)
}

fn exceeded(message: &str, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::QuotaExceeded, message).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs = Needs { size_class: SizeClass::Small, disk_gb: 10 };

    #[test]
    fn the_limit_that_is_exceeded_is_named() {
        let usage = Usage { running: 2, vcpu_millis: 2000, memory_mib: 4096, disk_gb: 20 };
        let none = Quotas::default();
        let told = |quotas| refused(usage, NEEDS, quotas).message;
        assert!(told(Quotas { max_running: Some(2), ..none }).contains("2 sandboxes run"));
        assert!(told(Quotas { max_vcpu_millis: Some(2500), ..none }).contains("above this account's 2.5"));
        assert!(told(Quotas { max_memory_mib: Some(5000), ..none }).contains("4096 MiB"));
        assert!(told(Quotas { max_disk_gb: Some(25), ..none }).contains("20 GB of disk"));
    }

    #[test]
    fn a_ceiling_is_what_those_get_who_ask_for_nothing() {
        let quotas = Quotas { max_ttl_seconds: Some(60), ..Quotas::default() };
        assert_eq!(quotas.ttl(None).unwrap(), Some(60));
        assert_eq!(quotas.ttl(Some(30)).unwrap(), Some(30));
        assert_eq!(quotas.ttl(Some(61)).unwrap_err().code, ErrorCode::QuotaExceeded);
        assert_eq!(Quotas::default().ttl(None).unwrap(), None);
    }
}
