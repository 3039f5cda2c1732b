//! Whether programs of this host can resolve the names in URLs.

use std::time::Duration;

use heyvm_api::system::{Check, CheckStatus};

/// A resolver that takes longer than this is as good as none.
const DEADLINE: Duration = Duration::from_secs(10);
/// Nothing but a rule for all of `*.localhost` knows it.
const MADE_UP: &str = "heyvm-resolves-this";

/// Looks a made-up name below `base_domain` up, as a program would. `None` for a domain of the real DNS.
pub async fn check(base_domain: &str) -> Option<Check> {
    let is_local = base_domain == "localhost" || base_domain.ends_with(".localhost");
    if !is_local {
        return None;
    }
    let name = format!("{MADE_UP}.{base_domain}");
    let found = tokio::time::timeout(DEADLINE, tokio::net::lookup_host((name.as_str(), 80))).await;
    let resolves = match found {
        Ok(Ok(mut addresses)) => {
            let mut any = false;
            addresses.all(|address| {
                any = true;
                address.ip().is_loopback()
            }) && any
        }
        _ => false,
    };
    Some(match resolves {
        true => Check {
            name: "names".into(),
            status: CheckStatus::Ok,
            message: format!("names below {base_domain} resolve to this host"),
            hint: None,
        },
        false => Check {
            name: "names".into(),
            status: CheckStatus::Warn,
            message: format!("programs cannot resolve names below {base_domain}; browsers and curl can"),
            hint: Some(
                "Install libnss-myhostname (Debian, Ubuntu), nss-myhostname (openSUSE) or systemd's, and have \
                 `hosts:` in /etc/nsswitch.conf name `myhostname` after `files`; or use each port's local_url, which \
                 `heyvm get` shows."
                    .into(),
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_verdict_is_that_of_getaddrinfo() {
        let ran = std::process::Command::new("getent").args(["ahosts", &format!("{MADE_UP}.localhost")]).output();
        let resolves = ran.unwrap().status.success();
        let check = check("localhost").await.unwrap();
        assert_eq!(check.status == CheckStatus::Ok, resolves, "{check:?}");
        assert_eq!(check.hint.is_none(), resolves);
        assert!(super::check("apps.example.org").await.is_none());
    }
}
