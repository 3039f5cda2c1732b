//! The packet filter of the egress namespace, as nftables reads it.

use std::net::Ipv4Addr;

use super::{EgressSettings, RESOLVER};

/// Ranges that are not the internet: this host, its neighbours, other guests, multicast, reserved.
/// Source: RFC 6890 and its successors, without the documentation ranges, which nothing routes.
const REFUSED: [&str; 11] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Whether every range in the settings is one; the settings end up in a script.
pub fn check(settings: &EgressSettings) -> Result<(), String> {
    match settings.allow.iter().find(|range| !is_range(range)) {
        None => Ok(()),
        Some(bad) => Err(format!("network.allow has {bad:?}, which is no IPv4 range like 10.1.0.0/16")),
    }
}

fn is_range(text: &str) -> bool {
    let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
    address.parse::<Ipv4Addr>().is_ok() && prefix.parse::<u8>().is_ok_and(|bits| bits <= 32)
}

/// The whole ruleset. `host` are the host's own addresses: guests do not reach them, public or not.
pub fn render(settings: &EgressSettings, uplink: &str, host: &[Ipv4Addr]) -> String {
    let host: Vec<String> = host.iter().map(ToString::to_string).collect();
    let refused = REFUSED.join(", ");
    let allow = if settings.allow.is_empty() {
        String::new()
    } else {
        format!("iifname \"hv*\" oifname \"{uplink}\" ip daddr {{ {} }} accept", settings.allow.join(", "))
    };
    let own = if host.is_empty() { String::new() } else { format!("ip daddr {{ {} }} reject", host.join(", ")) };
    format!(
        "table inet heyvm {{
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname \"hv*\" oifname \"{uplink}\" ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 accept
    {own}
    {allow}
    ip daddr {{ {refused} }} reject
    iifname \"hv*\" oifname \"{uplink}\" meta nfproto ipv4 accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    ip protocol icmp icmp type echo-request limit rate 10/second accept
    iifname \"hv*\" reject
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname \"{uplink}\" masquerade
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_comes_before_what_is_refused() {
        let settings = EgressSettings { allow: vec!["10.1.0.0/16".into()] };
        let rules = render(&settings, "up0", &[Ipv4Addr::new(192, 0, 2, 2)]);
        let position = |text: &str| rules.find(text).unwrap();
        assert!(position("dport 53 accept") < position("192.0.2.2"));
        assert!(position("192.0.2.2") < position("10.1.0.0/16"));
        assert!(position("10.1.0.0/16") < position("10.0.0.0/8"));
        assert!(position("10.0.0.0/8") < position("nfproto ipv4 accept"));
    }

    #[test]
    fn a_range_that_is_none_is_refused() {
        for bad in ["10.0.0.0/33", "host", "10.0.0.0/8 } accept #", ""] {
            assert!(check(&EgressSettings { allow: vec![bad.into()] }).is_err(), "{bad}");
        }
        assert!(check(&EgressSettings { allow: vec!["10.0.0.0/8".into(), "192.168.1.7".into()] }).is_ok());
    }
}
