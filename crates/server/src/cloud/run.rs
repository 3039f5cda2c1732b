//! The server: everything behind the API is opened, served and ended here, in that order.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use axum::Router;
use heyvm_accounts::Accounts;
use heyvm_api::{ApiError, ErrorCode, error::with_causes};
use heyvm_archives::{Archives, Limits, Storage};
use heyvm_cloud::Cloud;
use heyvm_edge::{Edge, Site, SiteBody, Tls};
use heyvm_store::Store;
use http::{Request, Response, header};
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{
    Served,
    archives::PublicUrl,
    config::ServerConfig,
    login::{LoginPage, Session},
    router,
    shell::Shells,
    upstreams::{Members, Sandboxes},
};
use crate::{
    Error,
    daemon::{begin_log, end_asked_for, raise_descriptor_limit},
    pages::Pages,
};

/// How long requests may go on after the end was asked for.
const GRACE: Duration = Duration::from_secs(5);
/// How often keys are changed that are due, and sessions forgotten that count no more.
const MAINTENANCE: Duration = Duration::from_secs(60);

/// Runs a server with the state of `home` (where the configuration names nothing else), until SIGTERM or SIGINT.
pub async fn run_server(home: PathBuf, config: ServerConfig) -> Result<(), Error> {
    begin_log();
    let ending = end_asked_for()?;
    raise_descriptor_limit();
    let api = listen(config.listen).await?;
    let edge = listen(SocketAddr::new(config.edge.listen, config.edge.port)).await?;
    let plain = match config.edge.http_port.filter(|_| config.edge.is_secure()) {
        Some(port) => Some(listen(SocketAddr::new(config.edge.listen, port)).await?),
        None => None,
    };
    let places = Places::of(&config, &api, &edge)?;
    let served = open(&home, &config, &places).await.map_err(Error::NotReady)?;
    let routes = router(served.clone());
    let front = Front::open(&home, &config, &places, &served, routes.clone())?;
    let api_edge = api_edge(&config, routes);
    eprintln!("heyvm: the API is at {}, sandboxes at {}", places.api, places.sandboxes);
    let background = [
        tokio::spawn(Arc::clone(&served.cloud).sync_forever(ending.clone())),
        tokio::spawn(keep_forever(Arc::clone(&served.accounts), ending.clone())),
        tokio::spawn(tidy_forever(Arc::clone(&served.archives), ending.clone())),
        tokio::spawn(front.serve(edge, plain, ending.clone())),
    ];
    api_edge.serve(api, ending.clone()).await;
    tokio::time::timeout(GRACE, futures::future::join_all(background)).await.ok();
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(Error::io(format!("listening on {address}")))
}

/// How others reach what this server listens at.
struct Places {
    api: String,
    login: Url,
    sandboxes: String,
    scheme: &'static str,
    port: u16,
}

impl Places {
    fn of(config: &ServerConfig, api: &TcpListener, edge: &TcpListener) -> Result<Self, Error> {
        let address = |listener: &TcpListener| listener.local_addr().map_err(Error::io("listening"));
        let scheme = if config.edge.is_secure() { "https" } else { "http" };
        let port = config.edge.public_port.unwrap_or(address(edge)?.port());
        let shown = if (scheme, port) == ("http", 80) || (scheme, port) == ("https", 443) {
            String::new()
        } else {
            format!(":{port}")
        };
        let domain = &config.edge.base_domain;
        let api = match &config.public_url {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None if config.edge.is_secure() => format!("https://api.{domain}{shown}"),
            None => format!("http://{}", address(api)?),
        };
        let login = Url::parse(&format!("{scheme}://login.{domain}{shown}"))
            .map_err(|_| Error::Exposed("edge.base_domain gives no URL".into()))?;
        Ok(Self { api, login, sandboxes: format!("{scheme}://NAME.{domain}{shown}"), scheme, port })
    }
}

async fn open(home: &Path, config: &ServerConfig, places: &Places) -> Result<Served, ApiError> {
    let location = config.store_location(home);
    let store = Store::connect(&location).await.map_err(|error| {
        ApiError::new(ErrorCode::HostNotReady, format!("the store cannot be opened: {}", with_causes(&error)))
            .hint("does the database run, and does `store` name it rightly?")
    })?;
    let tokens = config.tokens;
    let settings = heyvm_accounts::Settings {
        issuer: places.api.clone(),
        token_lifetime: Duration::from_secs(tokens.lifetime_seconds),
        session_lifetime: Duration::from_secs(tokens.session_seconds),
        key_rotation: Duration::from_secs(tokens.key_rotation_seconds),
        secret: std::env::var("HEYVM_SERVER_SECRET").ok().map(heyvm_accounts::Secret::new).transpose()?,
        ..heyvm_accounts::Settings::default()
    };
    let accounts = Accounts::open(store.clone(), settings).await?;
    let storage = Storage::open(&config.archive_settings(home)).await?;
    let cloud = heyvm_cloud::Config {
        regions: config.regions(home),
        quotas: config.quotas,
        base_domain: config.edge.base_domain.clone(),
        url_scheme: places.scheme.into(),
        url_port: places.port,
    };
    let archives = Archives::new(store.clone(), storage.clone(), Limits::default(), config.quotas.max_archive_mib);
    let public_url = PublicUrl(config.public_url.as_ref().map(|url| url.as_str().into()));
    let cloud = Cloud::open(cloud, store, storage)?;
    let shells = Shells::new(Arc::clone(&cloud) as _);
    Ok(Served { cloud, accounts, archives, public_url, shells })
}

/// The proxy in front of sandboxes, with our own hosts on it: the API at the base domain and `api.` below it, the login
/// page at `login.`.
struct Front {
    edge: Arc<Edge>,
    tls: Option<Arc<Tls>>,
    port: u16,
}

impl Front {
    fn open(
        home: &Path,
        config: &ServerConfig,
        places: &Places,
        served: &Served,
        routes: Router,
    ) -> Result<Self, Error> {
        let domain = &config.edge.base_domain;
        let tls = Tls::open(config.edge.tls_settings(home)).map_err(|error| Error::Tls(error.to_string()))?;
        let accounts = Arc::clone(&served.accounts);
        let login = LoginPage::new(Arc::new(Logins(Arc::clone(&accounts))), domain.clone(), places.login.clone());
        let keeper = Members { accounts, login: Arc::clone(&login) };
        let site = Hosts {
            api: Pages::new(vec![domain.clone(), format!("api.{domain}")], routes),
            login: Pages::new(vec![format!("login.{domain}")], login.router()),
        };
        let settings = heyvm_edge::Settings {
            base_domain: domain.clone(),
            trusted_proxies: config.edge.trusted_proxies.clone(),
            response_timeout: Duration::from_secs_f64(config.edge.timeout_seconds),
            ..heyvm_edge::Settings::default()
        };
        let upstreams = Arc::new(Sandboxes(Arc::clone(&served.cloud)));
        let edge = Edge::with_site(upstreams, Some(Arc::new(keeper)), Some(Arc::new(site)), settings);
        Ok(Self { edge, tls, port: places.port })
    }

    async fn serve(self, listener: TcpListener, plain: Option<TcpListener>, ending: CancellationToken) {
        let Some(tls) = self.tls else { return self.edge.serve(listener, ending).await };
        let redirects = async {
            if let Some(plain) = plain {
                self.edge.serve_redirects(plain, Arc::clone(&tls), self.port, ending.clone()).await;
            }
        };
        let secure = self.edge.serve_tls(listener, Arc::clone(&tls), ending.clone());
        tokio::join!(secure, redirects, tls.maintain(ending.clone()));
    }
}

/// Our own hosts.
struct Hosts {
    api: Pages,
    login: Pages,
}

#[async_trait]
impl Site for Hosts {
    fn has(&self, host: &str) -> bool {
        self.api.has(host) || self.login.has(host)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<SiteBody> {
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let login = self.login.has(host.split(':').next().unwrap_or_default());
        if login { self.login.answer(request).await } else { self.api.answer(request).await }
    }
}

/// Accounts as the login page sees them.
struct Logins(Arc<Accounts>);

#[async_trait]
impl super::login::Accounts for Logins {
    async fn log_in(&self, email: &str, password: &str, from: IpAddr) -> Result<Session, ApiError> {
        let tokens = self.0.log_in(email, password, from).await?;
        Ok(Session { token: tokens.access_token, expires_in: tokens.expires_in })
    }

    async fn log_out(&self, token: &str) -> Result<(), ApiError> {
        self.0.log_out(token).await
    }
}

/// The API on a listener of its own, as it is at the edge: a hostile request gets no further there.
fn api_edge(config: &ServerConfig, routes: Router) -> Arc<Edge> {
    let settings = heyvm_edge::Settings {
        trusted_proxies: config.edge.trusted_proxies.clone(),
        ..heyvm_edge::Settings::default()
    };
    Edge::of_site(Arc::new(Pages::on_every_host(routes)), settings)
}

async fn keep_forever(accounts: Arc<Accounts>, ending: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(MAINTENANCE) => {}
            () = ending.cancelled() => return,
        }
        if let Err(error) = accounts.maintain().await {
            tracing::error!(%error, "keeping accounts in order failed");
        }
    }
}

async fn tidy_forever(archives: Arc<Archives>, ending: CancellationToken) {
    tokio::select! {
        () = archives.tidy_forever() => {}
        () = ending.cancelled() => {}
    }
}

#[cfg(test)]
mod tests;
