//! Addresses a pull may connect to. The operator's pulls go anywhere. A tenant's go to the host that the operator has
//! configured or allowed, and from there to public addresses over TLS alone: a registry names token services and
//! redirects, and none of them may lead into the host's own network. Addresses are checked when they are connected to,
//! so that a name cannot change its meaning in between.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Once,
    time::Duration,
};

use reqwest::{
    Client, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const READ_DEADLINE: Duration = Duration::from_secs(60);

/// On whose behalf an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// The host's operator: every registry, with the operator's credentials.
    Operator,
    /// An account of a server: allowed registries and public addresses, without credentials.
    Tenant,
}

/// A URL that a pull must not follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("it leads to an address without TLS")]
    Plain,
    #[error("it leads to an address of a private network")]
    Private,
}

/// The HTTP clients of one pull.
pub(crate) struct Reach {
    /// The registry or mirror that the pull begins at.
    origin: Url,
    /// Whether the operator has named that very host.
    origin_is_trusted: bool,
    requester: Requester,
    anywhere: Client,
    public: Client,
}

impl Reach {
    pub fn new(origin: &Url, origin_is_trusted: bool, requester: Requester) -> reqwest::Result<Self> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let builder = || {
            // Redirects are followed hop by hop, each through `client_for`.
            Client::builder()
                .redirect(Policy::none())
                .connect_timeout(CONNECT_DEADLINE)
                .read_timeout(READ_DEADLINE)
                .user_agent(concat!("heyvm/", env!("CARGO_PKG_VERSION")))
        };
        Ok(Self {
            origin: origin.clone(),
            origin_is_trusted,
            requester,
            anywhere: builder().build()?,
            // A proxy would resolve the name itself, past the check.
            public: builder().no_proxy().dns_resolver(PublicOnly).build()?,
        })
    }

    /// The client for a URL, which may come from a registry's answer.
    pub fn client_for(&self, url: &Url) -> Result<&Client, Forbidden> {
        if url.scheme() != "https" && self.origin.scheme() == "https" {
            return Err(Forbidden::Plain);
        }
        if self.requester == Requester::Operator || (self.origin_is_trusted && url.origin() == self.origin.origin()) {
            return Ok(&self.anywhere);
        }
        if url.scheme() != "https" {
            return Err(Forbidden::Plain);
        }
        // The resolver is not asked for addresses.
        let literal = match url.host() {
            Some(url::Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(url::Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        match literal {
            Some(address) if !is_public(address) => Err(Forbidden::Private),
            _ => Ok(&self.public),
        }
    }
}

/// Resolves a name to its public addresses.
struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let public: Vec<SocketAddr> = found.into_iter().filter(|address| is_public(address.ip())).collect();
            if public.is_empty() {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, Forbidden::Private).into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

/// Whether an error comes from a name with private addresses alone.
pub(crate) fn is_private(error: &reqwest::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let denied = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if denied.is_some_and(|inner| inner.is::<Forbidden>()) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether an address belongs to the public internet: RFC 6890's special-purpose registries, as of 2024.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let shared = a == 100 && (64..128).contains(&b);
    let protocols = a == 192 && b == 0 && c == 0;
    let relays = a == 192 && b == 88 && c == 99;
    let benchmarks = a == 198 && (18..20).contains(&b);
    !(a == 0
        || a >= 224
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_documentation()
        || shared
        || protocols
        || relays
        || benchmarks)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let words = address.segments();
    let embedded = |high: u16, low: u16| is_public_v4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match words {
        // NAT64 and 6to4 carry an IPv4 address.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        // Protocol assignments (Teredo, ORCHID), documentation.
        [0x2001, 0..0x200, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..0x1000, ..] => false,
        _ => words[0] & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(origin: &str, trusted: bool, requester: Requester) -> Reach {
        Reach::new(&origin.parse().unwrap(), trusted, requester).unwrap()
    }

    #[test]
    fn special_purpose_addresses_are_not_public() {
        for public in ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        let special = "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.168.1.1 \
            198.18.0.1 203.0.113.1 224.0.0.1 255.255.255.255 :: ::1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 fc00::1 fd00::1 \
            fe80::1 ff02::1 64:ff9b::a00:1 2002:a00:1:: 2001::1 2001:db8::1";
        for special in special.split_whitespace() {
            assert!(!is_public(special.parse().unwrap()), "{special}");
        }
    }

    #[test]
    fn a_tenant_leaves_the_trusted_host_for_public_addresses_with_tls_alone() {
        let tenant = reach("http://127.0.0.1:5000", true, Requester::Tenant);
        let answer = |url: &str| tenant.client_for(&url.parse().unwrap()).err();
        assert_eq!(answer("http://127.0.0.1:5000/v2/"), None, "the operator has named it");
        for url in ["http://127.0.0.1:5001/", "http://169.254.169.254/latest", "http://example.com/"] {
            assert_eq!(answer(url), Some(Forbidden::Plain), "{url}");
        }
        for url in ["https://127.0.0.1:5000/", "https://10.0.0.1/", "https://[::1]/", "https://[::ffff:10.0.0.1]/"] {
            assert_eq!(answer(url), Some(Forbidden::Private), "{url}");
        }
        for url in ["https://2130706433/", "https://0x7f.1/", "https://127.1/", "https://0177.0.0.1/"] {
            assert_eq!(answer(url), Some(Forbidden::Private), "{url}: another way to write 127.0.0.1");
        }
        assert_eq!(answer("https://1.1.1.1/"), None);
    }

    #[test]
    fn nobody_leaves_tls() {
        for requester in [Requester::Operator, Requester::Tenant] {
            let reach = reach("https://registry.example.com", true, requester);
            let plain = reach.client_for(&"http://registry.example.com/".parse().unwrap());
            assert_eq!(plain.err(), Some(Forbidden::Plain));
        }
    }

    #[tokio::test]
    async fn a_name_of_a_private_address_is_refused_before_a_connection() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url: Url = format!("https://localhost:{}/", listener.local_addr().unwrap().port()).parse().unwrap();
        let reach = reach("https://registry.example.com", true, Requester::Tenant);
        let sent = tokio::select! {
            sent = reach.client_for(&url).unwrap().get(url).send() => sent,
            _ = listener.accept() => panic!("it was connected to"),
        };
        assert!(is_private(&sent.unwrap_err()));
    }
}
