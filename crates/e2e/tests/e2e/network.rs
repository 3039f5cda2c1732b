//! A sandbox reaches the internet, and nothing of the host, of other sandboxes, of private networks.

use std::{
    io::Write,
    net::{TcpListener, UdpSocket},
    process::Command,
};

use heyvm_e2e::{Host, Ran, Vm, leaks};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Whether a TCP connection from the guest comes about.
fn reaches(vm: &Vm<'_>, address: &str, port: u16) -> bool {
    let script = format!(
        "import socket, sys\ntry: socket.create_connection(({address:?}, {port}), 3)\nexcept OSError as error: print(error); sys.exit(1)"
    );
    vm.exec(&["python3", "-c", &script]).code == 0
}

/// An address of the host that others could reach, if it has one.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// A listener on all of the host's addresses that would answer anyone.
fn bait() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").expect("listener");
    let port = listener.local_addr().expect("address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            (&stream).write_all(b"caught\n").ok();
        }
    });
    port
}

#[test]
fn the_host_is_out_of_reach() {
    let host = Host::new();
    let vm = host.create(&[]);
    let port = bait();
    let gateway = vm.sh("ip route 2>/dev/null | awk '/default/ {print $3}' | grep . || awk '$2 == \"00000000\" {print $3}' /proc/net/route").out();
    let gateway = if gateway.contains('.') { gateway } else { from_hex(&gateway) };
    let mut addresses = vec!["127.0.0.1".to_owned(), "10.0.2.2".to_owned(), "169.254.1.53".to_owned(), gateway];
    addresses.extend(own_address().map(|address| address.to_string()));
    for address in addresses {
        assert!(!reaches(&vm, &address, port), "the guest reaches the host's port {port} at {address}");
    }
}

/// /proc/net/route has addresses in little-endian hex.
fn from_hex(text: &str) -> String {
    let number = u32::from_str_radix(text.lines().next().unwrap_or("0").trim(), 16).unwrap_or(0);
    std::net::Ipv4Addr::from(number.to_le_bytes()).to_string()
}

#[test]
fn another_sandbox_is_out_of_reach() {
    let host = Host::new();
    let server = host.create(&["--start-command", "exec python3 -m http.server 8000 --bind 0.0.0.0"]);
    host.json(&["wait-for", &server.id, "8000", "--timeout", "20s"]);
    let client = host.create(&[]);
    let own = "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((\"1.1.1.1\", 53)); print(s.getsockname()[0])'";
    let address = server.sh(own).out();
    assert!(reaches(&server, &address, 8000), "the server reaches itself at {address}");
    assert!(!reaches(&client, &address, 8000), "another sandbox reaches it at {address}");
}

#[test]
fn metadata_and_private_ranges_are_out_of_reach() {
    let host = Host::new();
    let vm = host.create(&[]);
    // From the route's point of view these must be refused or dropped, whether or not anything is there on this host.
    for address in ["169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1"] {
        assert!(!reaches(&vm, address, 80), "{address}");
    }
}

/// Addresses of package indexes from the host's own set-up: pip's, then apt's.
fn package_indexes() -> Vec<String> {
    let ask = |program: &str, arguments: &[&str]| {
        let asked = Command::new(program).args(arguments).output();
        asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    let pip =
        ask("python3", &["-c", "import pip._internal.models.index as index; print(index.PyPI.simple_url + '/pip/')"]);
    let apt = ask("apt-get", &["indextargets", "--format", "$(REPO_URI)dists/$(RELEASE)/InRelease"]);
    pip.lines().chain(apt.lines()).map(str::to_owned).collect()
}

#[test]
fn a_package_index_is_within_reach_where_the_host_reaches_it() {
    let host = Host::new();
    let vm = host.create(&[]);
    let curl = ["--silent", "--show-error", "--output", "/dev/null", "--max-time", "30", "--write-out", "%{http_code}"];
    let reached = |index: &String| Ran::of(Command::new("curl").args(curl).arg(index), b"").out() == "200";
    let Some(index) = package_indexes().into_iter().find(reached) else {
        // A host without a network: then the guest has none either, and a look-up must fail rather than hang.
        let nowhere = ["curl", "--max-time", "20", "http://index.invalid/"];
        assert_ne!(vm.exec_with(&["--timeout", "40s"], &nowhere, b"").code, 0);
        return;
    };
    // A host behind a proxy that inspects its traffic has certificates of its own: the guest is given them.
    let target = format!("{}:/tmp/host.crt", vm.id);
    host.run(&["cp", "/etc/ssl/certs/ca-certificates.crt", &target]).succeeded();
    let mut command = vec!["curl", "--cacert", "/tmp/host.crt"];
    command.extend(curl);
    command.push(&index);
    let ran = vm.exec(&command).succeeded();
    assert_eq!(ran.out(), "200", "{index}: {}", ran.err());
}

#[test]
fn a_network_that_has_died_comes_back_for_the_next_sandbox() {
    let host = Host::new();
    host.create(&[]).does("rm");
    let holders: Vec<_> = leaks::processes_of(host.scratch())
        .into_iter()
        .filter(|process| process.arguments.iter().skip(1).take(1).eq(["egress"]))
        .collect();
    assert!(!holders.is_empty());
    for holder in holders {
        kill(Pid::from_raw(holder.pid), Signal::SIGKILL).ok();
    }
    let vm = host.create(&[]);
    assert!(vm.sh("ip route").out().contains("default"));
    assert_eq!(host.json(&["doctor"])["ok"], true);
}
