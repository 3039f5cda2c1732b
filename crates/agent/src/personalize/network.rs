//! The guest's network interfaces, by the kernel's classic calls.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use heyvm_agent_protocol::v1::Network;
use nix::{
    libc::{self, ifreq, rtentry},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::console;

const ETHERNET: &str = "eth0";

nix::ioctl_write_ptr_bad!(set_address, libc::SIOCSIFADDR, ifreq);
nix::ioctl_write_ptr_bad!(set_netmask, libc::SIOCSIFNETMASK, ifreq);
nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, ifreq);
nix::ioctl_write_ptr_bad!(add_route, libc::SIOCADDRT, rtentry);

/// What all clones have alike: loopback and the link itself, without an address.
pub fn prepare() {
    if let Err(error) = Interface::new("lo").and_then(|lo| lo.up()) {
        console::say(format_args!("no loopback: {error}"));
    }
    if !fs::exists("/sys/class/net/eth0").unwrap_or(false) {
        return;
    }
    // Neighbours must not be found by addresses that nobody has given out.
    fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").ok();
    if let Err(error) = Interface::new(ETHERNET).and_then(|eth| eth.up()) {
        console::say(format_args!("no network link: {error}"));
    }
}

/// Gives the link its address and the way out.
pub fn configure(network: &Network) -> io::Result<()> {
    let address = parse(&network.address)?;
    let eth = Interface::new(ETHERNET)?;
    // SAFETY: each call has the kernel read one structure, which lives until it returns.
    unsafe {
        if network.mtu != 0 {
            let mtu = libc::c_int::try_from(network.mtu).map_err(|_| invalid("the MTU is too large"))?;
            set_mtu(eth.raw(), &eth.request(libc::__c_anonymous_ifr_ifru { ifru_mtu: mtu }))?;
        }
        set_address(eth.raw(), &eth.request(with_address(address)))?;
        set_netmask(eth.raw(), &eth.request(with_address(netmask(network.prefix)?)))?;
        eth.up()?;
        if !network.gateway.is_empty() {
            let mut route: rtentry = std::mem::zeroed();
            route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
            route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
            route.rt_gateway = socket_address(parse(&network.gateway)?);
            route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
            match add_route(eth.raw(), &raw const route) {
                Err(nix::errno::Errno::EEXIST) => {}
                done => drop(done?),
            }
        }
    }
    Ok(())
}

struct Interface {
    name: &'static str,
    socket: OwnedFd,
}

impl Interface {
    fn new(name: &'static str) -> io::Result<Self> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { name, socket })
    }

    fn raw(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    fn request(&self, value: libc::__c_anonymous_ifr_ifru) -> ifreq {
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        ifreq { ifr_name: name, ifr_ifru: value }
    }

    fn up(&self) -> io::Result<()> {
        let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: the kernel reads one structure.
        unsafe { set_flags(self.raw(), &self.request(libc::__c_anonymous_ifr_ifru { ifru_flags: flags })) }?;
        Ok(())
    }
}

fn with_address(address: Ipv4Addr) -> libc::__c_anonymous_ifr_ifru {
    libc::__c_anonymous_ifr_ifru { ifru_addr: socket_address(address) }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn netmask(prefix: u32) -> io::Result<Ipv4Addr> {
    let zeros = 32_u32.checked_sub(prefix).ok_or_else(|| invalid("the prefix is longer than an address"))?;
    Ok(Ipv4Addr::from(u32::MAX.checked_shl(zeros).unwrap_or(0)))
}

fn parse(address: &str) -> io::Result<Ipv4Addr> {
    address.parse().map_err(|_| invalid("not an IPv4 address"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_addresses() {
        assert_eq!(netmask(30).unwrap(), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(netmask(0).unwrap(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(netmask(32).unwrap(), Ipv4Addr::BROADCAST);
        assert!(netmask(33).is_err());
        assert_eq!(socket_address(Ipv4Addr::new(10, 0, 0, 255)).sa_data[..7], [0, 0, 10, 0, 0, -1, 0]);
        assert!(parse("fe80::1").is_err());
    }
}
