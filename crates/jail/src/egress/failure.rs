//! Why sandboxes have no network, and what to do about that.

use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::supervisor::TUN;

/// What the egress namespace cannot be made for. It travels from the processes that make it to the daemon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Failure {
    /// passt's program is not there.
    #[error("pasta is not installed (package passt)")]
    NoPasta,
    /// nftables' program is not there.
    #[error("nft is not installed (package nftables)")]
    NoNft,
    /// The kernel or nft itself does not take the packet filter.
    #[error("nft refused the sandboxes' packet filter: {0}")]
    FilterRefused(String),
    /// There is no such device.
    #[error("{TUN} is missing")]
    NoTun,
    /// There is one, and it cannot be opened.
    #[error("{TUN} cannot be opened: {0}")]
    TunClosed(String),
    /// A network namespace cannot be entered or used.
    #[error("{why}")]
    NoNamespace {
        /// What was refused.
        why: String,
        /// Who refuses it.
        rule: Rule,
    },
    /// `[network]` of config.toml names what cannot be allowed.
    #[error("{0}")]
    Settings(String),
    /// pasta did not make its device.
    #[error("pasta did not bring up the sandboxes' network; run/egress.log may say why")]
    NoUplink,
    /// None of these.
    #[error("{0}")]
    Otherwise(String),
}

/// Who may refuse a namespace to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// `kernel.unprivileged_userns_clone`, of Debian's kernels.
    Debian,
    /// `kernel.apparmor_restrict_unprivileged_userns`, of Ubuntu's.
    AppArmor,
    /// `user.max_user_namespaces`, or its sibling for networks.
    Limit,
    /// None of the kernel's settings: a container's confinement.
    Container,
}

impl Rule {
    /// The one that holds here, by the values of the kernel's settings.
    fn of(setting: impl Fn(&str) -> Option<i64>) -> Self {
        if ["user/max_user_namespaces", "user/max_net_namespaces"].iter().any(|name| setting(name) == Some(0)) {
            Self::Limit
        } else if setting("kernel/unprivileged_userns_clone") == Some(0) {
            Self::Debian
        } else if setting("kernel/apparmor_restrict_unprivileged_userns").is_some_and(|value| value != 0) {
            Self::AppArmor
        } else {
            Self::Container
        }
    }
}

impl Failure {
    /// A namespace was refused.
    pub(super) fn namespace(doing: &str, error: impl std::fmt::Display) -> Self {
        let setting = |name: &str| fs::read_to_string(format!("/proc/sys/{name}")).ok()?.trim().parse().ok();
        Self::NoNamespace { why: format!("{doing}: {error}"), rule: Rule::of(setting) }
    }

    /// The device for network devices did not open.
    pub(super) fn tun(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NoTun,
            _ => Self::TunClosed(error.to_string()),
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoPasta => "install the package passt".into(),
            Self::NoNft => "install the package nftables".into(),
            Self::FilterRefused(_) => {
                "run `sudo modprobe nf_tables nft_masq`, on the host where this is a container; the kernel needs nftables"
                    .into()
            }
            Self::NoTun => "run `sudo modprobe tun`; in a container: start it with --device /dev/net/tun".into(),
            Self::TunClosed(_) => format!("run `sudo chmod 666 {TUN}`: it is open to all on most systems"),
            Self::NoNamespace { rule, .. } => match rule {
                Rule::Debian => "run `sudo sysctl -w kernel.unprivileged_userns_clone=1`",
                Rule::AppArmor => {
                    "run `sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or run the daemon as root"
                }
                Rule::Limit => {
                    "run `sudo sysctl -w user.max_user_namespaces=10000 user.max_net_namespaces=10000`: now there may be none"
                }
                Rule::Container => {
                    "allow namespaces: start the container with --privileged, or with a seccomp profile that permits unshare"
                }
            }
            .into(),
            Self::Settings(_) => "correct `allow` in [network] of config.toml, then run `heyvm daemon restart`".into(),
            Self::NoUplink => "look into run/egress.log; a newer passt may help".into(),
            Self::Otherwise(_) => "look into run/egress.log; network.enabled = false does without a network".into(),
        }
    }
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Otherwise(why)
    }
}

impl From<&str> for Failure {
    fn from(why: &str) -> Self {
        Self::Otherwise(why.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_is_the_setting_that_forbids_namespaces() {
        let rule = |settings: &[(&str, i64)]| {
            Rule::of(|name| settings.iter().find(|(other, _)| *other == name).map(|(_, value)| *value))
        };
        assert_eq!(rule(&[("kernel/unprivileged_userns_clone", 0)]), Rule::Debian);
        let ubuntu = [("kernel/unprivileged_userns_clone", 1), ("kernel/apparmor_restrict_unprivileged_userns", 1)];
        assert_eq!(rule(&ubuntu), Rule::AppArmor);
        assert_eq!(rule(&[("user/max_user_namespaces", 0)]), Rule::Limit);
        assert_eq!(rule(&[("user/max_user_namespaces", 1000)]), Rule::Container);
        assert_eq!(rule(&[]), Rule::Container);
    }

    #[test]
    fn each_failure_names_its_own_remedy() {
        let namespace = |rule| Failure::NoNamespace { why: "unshare: EPERM".into(), rule };
        for (failure, remedy) in [
            (Failure::NoPasta, "passt"),
            (Failure::NoNft, "nftables"),
            (Failure::FilterRefused("no such file".into()), "nf_tables"),
            (Failure::tun(&io::ErrorKind::NotFound.into()), "modprobe tun"),
            (Failure::tun(&io::ErrorKind::PermissionDenied.into()), "chmod 666"),
            (namespace(Rule::Debian), "unprivileged_userns_clone=1"),
            (namespace(Rule::AppArmor), "apparmor_restrict_unprivileged_userns=0"),
            (namespace(Rule::Limit), "max_user_namespaces"),
            (namespace(Rule::Container), "--privileged"),
            (Failure::Settings("host is no range".into()), "[network]"),
            (Failure::NoUplink, "egress.log"),
        ] {
            assert!(failure.hint().contains(remedy), "{failure:?}: {}", failure.hint());
            let sent = serde_json::to_vec(&failure).unwrap();
            assert_eq!(serde_json::from_slice::<Failure>(&sent).unwrap(), failure);
        }
    }
}
