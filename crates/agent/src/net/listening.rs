//! Whether a port is listened on, and at which addresses, without connecting to it: from the kernel's tables.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
    thread,
    time::Duration,
};

use nix::libc;
use tokio::sync::oneshot;

/// The state LISTEN in `/proc/net/tcp`.
const LISTEN: &str = "0A";
/// Between two looks. The kernel tells nobody of a new listener.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether a TCP socket listens on `port` on any address, now or within `wait`.
pub async fn listens_within(port: u16, wait: Duration) -> bool {
    if listens(port) {
        return true;
    }
    if wait.is_zero() {
        return false;
    }
    let (say, heard) = oneshot::channel();
    let watching = thread::Builder::new().name("listening".into()).spawn(move || watch(port, say)).is_ok();
    let seen = watching && tokio::time::timeout(wait, heard).await.is_ok_and(|heard| heard.is_ok());
    // On a busy processor the watch may not have had its turn.
    seen || listens(port)
}

/// Looks, until nobody wants to know any more, while the processor has nothing else to do: who starts up is not to be
/// slowed down by being waited for, and who has started up and listens, waits.
fn watch(port: u16, say: oneshot::Sender<()>) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameters, which are there. Where it refuses, the watch costs more.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    while !say.is_closed() {
        if listens(port) {
            say.send(()).ok();
            return;
        }
        thread::sleep(PAUSE);
    }
}

fn listens(port: u16) -> bool {
    !addresses(port).is_empty()
}

/// The addresses at which something listens on `port`.
pub fn addresses(port: u16) -> Vec<IpAddr> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    tables.iter().flat_map(|table| listeners(table, port)).collect()
}

fn listeners(table: &str, port: u16) -> impl Iterator<Item = IpAddr> {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let (address, local_port) = local.rsplit_once(':')?;
        (state == LISTEN && u16::from_str_radix(local_port, 16) == Ok(port)).then(|| parse(address))?
    })
}

/// An address as the kernel writes it: words of 32 bits in the host's order, in hex.
fn parse(address: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match address.len() {
        8 => Some(IpAddr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(8 * index)?);
            }
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0\n   \
        1: 0100007F:0050 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  0\n   broken\n";
    const TABLE6: &str = "  sl  local_address                         remote_address                        st\n   \
        0: 00000000000000000000000000000000:0BB8 00000000000000000000000000000000:0000 0A 00000000:00000000\n   \
        1: 000000FD000000000000000010000000:0BB9 00000000000000000000000000000000:0000 0A 00000000:00000000\n   \
        2: 0000000000000000FFFF000002005A0A:0BB9 00000000000000000000000000000000:0000 0A 00000000:00000000\n";

    #[test]
    fn only_listeners_count() {
        let found = |table: &'static str, port| listeners(table, port).map(|a| a.to_string()).collect::<Vec<_>>();
        assert_eq!(found(TABLE, 8080), ["127.0.0.1"]);
        assert!(found(TABLE, 80).is_empty(), "a connection is not a listener");
        assert!(found(TABLE, 40000).is_empty());
        assert_eq!(found(TABLE6, 3000), ["::"]);
        assert_eq!(found(TABLE6, 3001), ["fd00::10", "10.90.0.2"]);
    }

    #[test]
    fn a_real_listener_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }

    #[tokio::test]
    async fn one_that_comes_is_waited_for() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(!listens_within(port, Duration::from_millis(20)).await);
        let late = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            std::net::TcpListener::bind(("127.0.0.1", port)).unwrap()
        });
        assert!(listens_within(port, Duration::from_secs(60)).await);
        drop(late.join().unwrap());
    }
}
