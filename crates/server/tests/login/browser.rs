//! Headless Chromium, driven by its own WebDriver.

use std::{
    net::{Ipv4Addr, TcpListener},
    ops::Deref,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fantoccini::{Client, ClientBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::json;

pub struct Browser {
    client: Client,
    driver: Child,
    _profile: tempfile::TempDir,
}

impl Deref for Browser {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser along with itself.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.driver.id() as i32), nix::sys::signal::SIGTERM).ok();
        self.driver.wait().ok();
    }
}

impl Browser {
    pub async fn start(javascript: bool) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("chromedriver: {error} (setup/host.sh knows the package)"));
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).into();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let scripts = if javascript { 1 } else { 2 };
        let capabilities = json!({
            "acceptInsecureCerts": true,
            "goog:chromeOptions": {
                "args": arguments,
                "prefs": {"profile.managed_default_content_settings.javascript": scripts},
            },
        });
        let Some(capabilities) = capabilities.as_object().cloned() else { unreachable!() };
        let address = format!("http://127.0.0.1:{port}");
        let end = Instant::now() + Duration::from_secs(120);
        let client = loop {
            let mut builder = ClientBuilder::new(HttpConnector::new());
            match builder.capabilities(capabilities.clone()).connect(&address).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < end, "chromium does not start: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        Self { client, driver, _profile: profile }
    }

    /// Waits until the browser is at a URL that begins so, as it is some moments after a form was sent.
    pub async fn arrives_at(&self, beginning: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let url = self.client.current_url().await.unwrap();
            if url.as_str().starts_with(beginning) {
                return;
            }
            assert!(Instant::now() < end, "at {url} instead of {beginning}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
