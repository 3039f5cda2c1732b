//! Network devices of the current namespace: making a tap, giving addresses, bringing up. The `ioctl` family of calls.

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    ifaddrs::getifaddrs,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// Makes a tap with virtio headers; it lives as long as the descriptor.
pub fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request_for(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device.into())
}

/// Gives a device its address, prefix length and largest packet size, and brings it up.
pub fn bring_up(name: &str, address: Option<(Ipv4Addr, u8)>, mtu: Option<u32>) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = request_for(name)?;
    if let Some((address, prefix)) = address {
        let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0));
        request.ifr_ifru.ifru_addr = socket_address(address);
        configure(&socket, libc::SIOCSIFADDR, &request)?;
        request.ifr_ifru.ifru_addr = socket_address(mask);
        configure(&socket, libc::SIOCSIFNETMASK, &request)?;
    }
    if let Some(mtu) = mtu {
        request.ifr_ifru.ifru_mtu = mtu as libc::c_int;
        configure(&socket, libc::SIOCSIFMTU, &request)?;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    configure(&socket, libc::SIOCSIFFLAGS, &request)
}

/// One of the calls that set a property of a device; each reads the ifreq alone.
fn configure(socket: &OwnedFd, call: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the kernel reads one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), call as libc::Ioctl, std::ptr::from_ref(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let inet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of the same size; the family tells which it is.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) }
}

/// Whether the namespace has a device of this name.
pub fn exists(name: &str) -> bool {
    if_nametoindex(name).is_ok()
}

/// IPv4 addresses of all devices of the namespace but loopback's.
pub fn own_addresses() -> Vec<Ipv4Addr> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    all.filter_map(|device| Some(device.address?.as_sockaddr_in()?.ip())).filter(|ip| !ip.is_loopback()).collect()
}

fn request_for(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the device's name is too long"));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    Ok(request)
}
