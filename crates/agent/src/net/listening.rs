//! Whether a port is listened on, without connecting to it: from the kernel's tables.

use std::fs;

/// The state LISTEN in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// Whether a TCP socket listens on `port` on any address.
pub fn listens(port: u16) -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .any(|table| fs::read_to_string(table).is_ok_and(|table| has_listener(&table, port)))
}

fn has_listener(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        let local_port = local.and_then(|local| local.rsplit_once(':')).map(|(_, port)| u16::from_str_radix(port, 16));
        state == Some(LISTEN) && local_port == Some(Ok(port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0\n   \
        1: 0100007F:0050 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  0\n   broken\n";
    const TABLE6: &str = "  sl  local_address                         remote_address                        st\n   \
        0: 00000000000000000000000000000000:0BB8 00000000000000000000000000000000:0000 0A 00000000:00000000\n";

    #[test]
    fn only_listeners_count() {
        assert!(has_listener(TABLE, 8080));
        assert!(!has_listener(TABLE, 80), "a connection is not a listener");
        assert!(!has_listener(TABLE, 40000));
        assert!(has_listener(TABLE6, 3000));
    }

    #[test]
    fn a_real_listener_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }
}
