//! Certificates from a real ACME server: pebble, Let's Encrypt's own for tests, and the name server beside it.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_edge::{AcmeSettings, Settings, Tls, TlsSettings};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair, generate_simple_self_signed};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    protocols::mirror,
    support::*,
    tls::{ALL, Served, client, handshake, serial},
};

/// pebble and its name server, which says 127.0.0.1 for every name.
struct Pebble {
    servers: Vec<Child>,
    directory: tempfile::TempDir,
    port: u16,
    management: u16,
    names: u16,
    http: TcpListener,
}

impl Drop for Pebble {
    fn drop(&mut self) {
        for server in &mut self.servers {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(program: &str, arguments: &[&str], log: &Path) -> Child {
    let log = std::fs::File::create(log).unwrap();
    Command::new(program)
        .args(arguments)
        .env("PEBBLE_VA_NOSLEEP", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (setup/host.sh knows the package)"))
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Pebble {
    /// Its certificates are valid for so many seconds.
    async fn start(validity: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let own = generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        std::fs::write(at("own.pem"), own.cert.pem()).unwrap();
        std::fs::write(at("own.key"), own.signing_key.serialize_pem()).unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, management, names, control) = (free_port(), free_port(), free_port(), free_port());
        let config = serde_json::json!({"pebble": {
            "listenAddress": format!("127.0.0.1:{port}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": at("own.pem"),
            "privateKey": at("own.key"),
            "httpPort": http.local_addr().unwrap().port(),
            "tlsPort": free_port(),
            "ocspResponderURL": "",
            "externalAccountBindingRequired": false,
            "certificateValidityPeriod": validity,
        }});
        std::fs::write(at("pebble.json"), config.to_string()).unwrap();
        let names_at = format!("127.0.0.1:{names}");
        let dns = [
            "-dns01",
            &names_at,
            "-management",
            &format!("127.0.0.1:{control}"),
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
            "-defaultIPv6",
            "",
        ];
        let config = at("pebble.json");
        let pebble = ["-config", config.to_str().unwrap(), "-dnsserver", &names_at];
        let servers =
            vec![spawn("pebble-challtestsrv", &dns, &at("names.log")), spawn("pebble", &pebble, &at("pebble.log"))];
        for port in [port, management, control] {
            until("the servers listen", async || TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        }
        Self { servers, directory, port, management, names: control, http }
    }

    fn settings(&self, names: &[&str]) -> AcmeSettings {
        let names = names.iter().map(ToString::to_string).collect();
        AcmeSettings {
            directory: format!("https://localhost:{}/dir", self.port),
            trusted_root: Some(self.directory.path().join("own.pem")),
            contacts: vec!["mailto:operator@example.org".into()],
            terms_agreed: true,
            first_retry: Duration::from_millis(500),
            ..AcmeSettings::new(names, self.directory.path().join("state"))
        }
    }

    /// The root of the certificates that it issues; another one each time it starts.
    async fn root(&self) -> CertificateDer<'static> {
        let own = std::fs::read(self.directory.path().join("own.pem")).unwrap();
        let connector = client(CertificateDer::from_pem_slice(&own).unwrap(), ALL, "http/1.1");
        let stream = handshake(&connector, ([127, 0, 0, 1], self.management).into(), "localhost").await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let answer = sender.send_request(get("localhost", "/roots/0")).await.unwrap();
        CertificateDer::from_pem_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    /// A program that makes TXT records at the name server, and notes what it was asked for. It fails the first time.
    fn hook(&self) -> PathBuf {
        let path = self.directory.path().join("hook");
        let script = format!(
            "#!/bin/sh\nset -e\necho \"$1 $2\" >>'{notes}'\n\
             [ -e '{notes}.failed' ] || {{ touch '{notes}.failed'; echo 'no credentials for the name server' >&2; exit 3; }}\n\
             case $1 in\n\
             add) curl -sSf -d \"{{\\\"host\\\":\\\"$2.\\\",\\\"value\\\":\\\"$3\\\"}}\" http://127.0.0.1:{port}/set-txt ;;\n\
             remove) curl -sSf -d \"{{\\\"host\\\":\\\"$2.\\\"}}\" http://127.0.0.1:{port}/clear-txt ;;\n\
             esac\n",
            notes = self.directory.path().join("notes").display(),
            port = self.names,
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

const BASE: &str = "apps.example.org";

async fn served(tls: &Arc<Tls>, plain: TcpListener) -> Served {
    let settings = Settings { base_domain: BASE.into(), ..Settings::default() };
    let (edge, _) = edge(&[("app", Place::At(app(mirror).await, "s"))], None, None, settings);
    Served::start(edge, Arc::clone(tls), plain).await
}

#[tokio::test]
async fn names_are_proved_by_http_and_the_certificate_is_kept() {
    let mut pebble = Pebble::start(3600).await;
    let mut settings = pebble.settings(&[BASE, "login.apps.example.org"]);
    let state = tempfile::tempdir().unwrap();
    settings.state = state.path().join("deep/state");
    let tls = Tls::open(TlsSettings::Acme(settings.clone())).unwrap().unwrap();
    assert!(tls.expires().is_none());
    let http = std::mem::replace(&mut pebble.http, TcpListener::bind("127.0.0.1:0").await.unwrap());
    let served = served(&tls, http).await;
    let connector = client(pebble.root().await, ALL, "http/1.1");
    let stream = until("a certificate", async || handshake(&connector, served.tls, BASE).await.ok()).await;
    handshake(&connector, served.tls, "login.apps.example.org").await.unwrap();
    assert!(handshake(&connector, served.tls, "app.apps.example.org").await.is_err(), "no wildcard");

    let mode = |path: &str| std::fs::metadata(settings.state.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("account.json"), mode("certificate.pem")), (0o700, 0o600, 0o600));
    assert_eq!(std::fs::read_dir(&settings.state).unwrap().count(), 2, "nothing else is left behind");

    // The next start serves it at once, and asks nobody.
    let first = serial(&stream);
    drop(pebble);
    let tls = Tls::open(TlsSettings::Acme(settings)).unwrap().unwrap();
    let again = self::served(&tls, TcpListener::bind("127.0.0.1:0").await.unwrap()).await;
    assert_eq!(serial(&handshake(&connector, again.tls, BASE).await.unwrap()), first);
}

#[tokio::test]
async fn a_wildcard_is_proved_by_dns_after_a_hook_that_failed_once() {
    let mut pebble = Pebble::start(3600).await;
    let settings = AcmeSettings { dns_hook: Some(pebble.hook()), ..pebble.settings(&[BASE, "*.apps.example.org"]) };
    let tls = Tls::open(TlsSettings::Acme(settings)).unwrap().unwrap();
    let http = std::mem::replace(&mut pebble.http, TcpListener::bind("127.0.0.1:0").await.unwrap());
    let served = served(&tls, http).await;
    let connector = client(pebble.root().await, ALL, "http/1.1");
    until("a certificate", async || handshake(&connector, served.tls, "app.apps.example.org").await.ok()).await;
    handshake(&connector, served.tls, BASE).await.unwrap();
    let notes = std::fs::read_to_string(pebble.directory.path().join("notes")).unwrap();
    let count = |verb: &str| notes.lines().filter(|line| *line == format!("{verb} _acme-challenge.{BASE}")).count();
    assert_eq!((count("add"), count("remove")), (3, 3), "{notes}");
}

#[tokio::test]
async fn a_certificate_is_renewed_while_the_old_one_is_served() {
    let mut pebble = Pebble::start(12).await;
    let tls = Tls::open(TlsSettings::Acme(pebble.settings(&[BASE]))).unwrap().unwrap();
    let http = std::mem::replace(&mut pebble.http, TcpListener::bind("127.0.0.1:0").await.unwrap());
    let served = served(&tls, http).await;
    let connector = client(pebble.root().await, ALL, "http/1.1");
    let first = until("a certificate", async || handshake(&connector, served.tls, BASE).await.ok()).await;
    let first = serial(&first);
    let (mut looked, started) = (0, Instant::now());
    loop {
        // At every moment there is a valid one.
        let stream = handshake(&connector, served.tls, BASE).await.unwrap();
        if serial(&stream) != first {
            break;
        }
        looked += 1;
        assert!(started.elapsed() < Duration::from_secs(12), "renewed before its end");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(looked > 5 && started.elapsed() > Duration::from_secs(3), "not at once: {looked}");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let state = tempfile::tempdir().unwrap();
    let settings = |names: &[&str], terms_agreed| {
        let names = names.iter().map(ToString::to_string).collect();
        AcmeSettings { terms_agreed, ..AcmeSettings::new(names, state.path().join("state")) }
    };
    for (settings, word) in [
        (settings(&[], true), "name"),
        (settings(&["a.example.org"], false), "terms of service"),
        (settings(&["*.example.org"], true), "dns_hook"),
    ] {
        let error = Tls::open(TlsSettings::Acme(settings)).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(!state.path().join("state").exists());
}

#[test]
fn a_kept_certificate_is_served_at_once() {
    let state = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![BASE.to_owned()]).unwrap().self_signed(&key).unwrap();
    let pem = key.serialize_pem() + &certificate.pem();
    std::fs::write(state.path().join("certificate.pem"), pem).unwrap();
    let settings = AcmeSettings {
        terms_agreed: true,
        directory: "https://127.0.0.1:1/dir".into(),
        ..AcmeSettings::new(vec![BASE.to_owned()], state.path().to_owned())
    };
    let tls = Tls::open(TlsSettings::Acme(settings.clone())).unwrap().unwrap();
    assert!(tls.expires().is_some());
    std::fs::write(state.path().join("certificate.pem"), "torn").unwrap();
    assert!(Tls::open(TlsSettings::Acme(settings)).unwrap().unwrap().expires().is_none(), "another one is asked for");
}
