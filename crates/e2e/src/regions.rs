//! Two regions, each with a daemon and a server in a network of its own, as a cloud in two places has them.

use std::{path::Path, process::Command};

use crate::{
    Host, Ran,
    cloud::Cloud,
    network::{Namespace, Network},
};

/// Port of a region's trusted listener, and of the edges: the same everywhere, so that URLs are.
const LISTENER: u16 = 7443;
const EDGE: u16 = 8490;

/// The regions US and EU, and what the servers share.
pub struct Regions {
    /// Region US.
    pub us: Host,
    /// Region EU.
    pub eu: Host,
    store: String,
    shared: tempfile::TempDir,
    /// The link between the two. Last: their ends come first.
    pub network: Network,
}

impl Default for Regions {
    fn default() -> Self {
        Self::new()
    }
}

impl Regions {
    /// Two daemons that listen for servers; no server runs yet.
    pub fn new() -> Self {
        let network = Network::new();
        let shared = tempfile::Builder::new().prefix("hv-").tempdir_in("/tmp").expect("temporary directory");
        certify(shared.path(), &network);
        let region = |name: &str, place: &Namespace| {
            let host = Host::new().within(place);
            let files = shared.path().display();
            host.configure(&format!(
                "[network]\nenabled = false\n[region]\nlisten = \"{}:{LISTENER}\"\ncertificate = \"{files}/{name}.pem\"\n\
                 key = \"{files}/{name}.key\"\nclient_ca = \"{files}/ca.pem\"\n",
                place.address
            ));
            host.list(&[]);
            host
        };
        let (us, eu) = (region("us", &network.us), region("eu", &network.eu));
        let store = crate::http::block_on(heyvm_test_services::postgres::database());
        Self { us, eu, store, shared, network }
    }

    /// A server beside the daemon of `host` that knows both regions; all such servers are one cloud.
    pub fn serve<'a>(&self, host: &'a Host, settings: &str) -> Cloud<'a> {
        let files = self.shared.path().display();
        let region = |name: &str, place: &Namespace| {
            format!(
                "[[region]]\nname = \"{name}\"\nurl = \"https://{}:{LISTENER}\"\nca = \"{files}/ca.pem\"\n\
                 certificate = \"{files}/server.pem\"\nkey = \"{files}/server.key\"\n",
                place.address
            )
        };
        let settings = format!(
            "[edge]\nport = {EDGE}\n[archives]\ndirectory = \"{files}/archives\"\n{settings}{}{}",
            region("US", &self.network.us),
            region("EU", &self.network.eu)
        );
        Cloud::over(host, Some(&self.store), &settings)
    }
}

/// An authority, and whom it knows: the two daemons by their addresses, and the servers.
fn certify(directory: &Path, network: &Network) {
    openssl(directory, "ca", &["-addext", "keyUsage=critical,keyCertSign"]);
    for (name, address) in [("us", &network.us.address), ("eu", &network.eu.address), ("server", &"127.0.0.1".into())] {
        let names = format!("subjectAltName=IP:{address}");
        let signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"];
        openssl(directory, name, &[&signed[..], &["-addext", &names]].concat());
    }
}

fn openssl(directory: &Path, name: &str, arguments: &[&str]) {
    let (certificate, key, subject) = (format!("{name}.pem"), format!("{name}.key"), format!("/CN={name}"));
    let mut command = Command::new("openssl");
    command.current_dir(directory).args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    command.args(["-nodes", "-days", "2", "-subj", &subject, "-out", &certificate, "-keyout", &key]).args(arguments);
    Ran::of(&mut command, b"").succeeded();
}
