//! The daemon: everything behind the API is opened, served and ended here, in that order.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use heyvm_api::{ApiError, ErrorCode, error::with_causes};
use heyvm_control_plane::ControlPlane;
use heyvm_edge::Edge;
use heyvm_images::ImageStore;
use heyvm_store::Store;
use heyvm_vm::qemu::{Budgets, EgressSettings, QemuDriver, Settings};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::{
    Error,
    config::Config,
    home::{Home, Presence},
    listening::Announcement,
    local_ports::LocalListeners,
    outbound::Outbound,
    proxy,
    region::Region,
    routes::{Api, router},
};

/// How long requests may go on after the end was asked for.
const GRACE: Duration = Duration::from_secs(5);
/// How long a daemon that could not open answers with the reason, so that those who started it learn of it.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How often the home is looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// The home counts as removed, or no longer ours, when so many looks in a row say so.
const LOOKS: u32 = 3;
/// Standard error gets this much unless `HEYVM_LOG` says otherwise.
const LOG: &str = "info,hyper=warn,h2=warn,tower=warn,sqlx=warn";

/// Runs the daemon of `home` until SIGTERM or SIGINT; VMs keep running after it.
pub async fn run_daemon(home: PathBuf) -> Result<(), Error> {
    begin_log();
    let ending = end_asked_for()?;
    let opened = tokio::task::spawn_blocking(move || Home::open(home)).await;
    let home = Arc::new(opened.map_err(|error| Error::io("opening the home")(std::io::Error::other(error)))??);
    raise_descriptor_limit();
    let config = Config::read(home.path())?;
    let edge_listeners =
        proxy::listen(home.path(), &config.edge).await.map_err(Error::io("listening for the proxy"))?;
    let edge_addresses = edge_listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>();
    let edge_addresses = edge_addresses.map_err(Error::io("listening for the proxy"))?;
    let edge_address = edge_addresses[0];
    let _announcement = Announcement::of_edge(home.path(), &edge_addresses);
    let region = match &config.region {
        Some(config) => Some(Region::listen(config).await?),
        None => None,
    };
    let api_listener = home.listen().map_err(Error::io("listening on run/daemon.sock"))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), home = %home.path().display(), edge = %edge_address, "started");

    // Answers from here on: those who come early wait for the control plane.
    let (opened, plane) = watch::channel(None);
    let routes = Api::new(home.path().join("run"), plane);
    let region = region.map(|region| tokio::spawn(region.serve(router(routes.clone()), ending.clone())));
    let api = serve_api(api_listener, routes, ending.clone());
    let outcome = tokio::select! {
        outcome = open(home.path(), &config, edge_address.port()) => outcome,
        () = ending.cancelled() => Err(ApiError::new(ErrorCode::DaemonUnavailable, "the daemon is ending").hint("try again")),
    };
    let edge = match &outcome {
        Ok(plane) => Some(open_edge(plane, config, ending.clone()).await),
        Err(_) => None,
    };
    opened.send_replace(Some(outcome.clone()));
    let ended = match (outcome, edge) {
        (Ok(plane), edge) => {
            let edge = tokio::spawn(serve_edge(edge, edge_listeners, ending.clone()));
            until_end(&home, &plane, &ending).await;
            edge.await.ok();
            let served = async { (api.await, futures::future::OptionFuture::from(region).await) };
            tokio::time::timeout(GRACE, served).await.ok();
            plane.shutdown().await;
            Ok(())
        }
        (Err(_), _) if ending.is_cancelled() => Ok(()),
        (Err(error), _) => {
            tracing::error!(%error, "the daemon could not open");
            tokio::time::timeout(LAST_WORDS, ending.cancelled()).await.ok();
            ending.cancel();
            Err(Error::NotReady(error))
        }
    };
    home.stop_listening();
    tracing::info!("ended");
    ended
}

pub(crate) fn begin_log() {
    let filter = EnvFilter::try_from_env("HEYVM_LOG").unwrap_or_else(|_| EnvFilter::new(LOG));
    // A second daemon in one process, as in tests, keeps the first one's.
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init().ok();
}

/// Cancelled at SIGTERM and SIGINT. A terminal that is closed does not end a daemon.
pub(crate) fn end_asked_for() -> Result<CancellationToken, Error> {
    let caught =
        || Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?));
    let (mut terminate, mut interrupt, mut hangup) = caught().map_err(Error::io("catching signals"))?;
    let ending = CancellationToken::new();
    let token = ending.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {}
            }
        }
        token.cancel();
    });
    Ok(ending)
}

/// Each sandbox and each visitor costs a few descriptors.
pub(crate) fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

pub(crate) async fn open(home: &Path, config: &Config, url_port: u16) -> Result<Arc<ControlPlane>, ApiError> {
    let failed = |what: &str, error: &dyn std::error::Error| {
        ApiError::new(ErrorCode::Internal, format!("{what} cannot be opened: {}", with_causes(error)))
            .hint("the daemon's log has the details; HEYO_HOME names another directory")
    };
    let store = Store::open(&home.join("heyvm.db")).await.map_err(|error| failed("heyvm.db", &error))?;
    let registries = config.registries.clone().allowing(config.images.allowed_registries.clone());
    let images = ImageStore::open(home, registries).map_err(|error| failed("the image store", &error))?;
    let outbound = outbound_of(config).await;
    let settings = Settings {
        network: config.network.enabled,
        egress: EgressSettings { allow: config.network.allow.iter().cloned().chain(outbound.allow).collect() },
        reserve: config.reserve,
        templates: config.templates,
        template_budgets: template_budgets(config),
        ..Settings::default()
    };
    let driver = QemuDriver::open(home, settings).await.map_err(|error| failed("sandboxes/", &error))?;
    let config = heyvm_control_plane::Config {
        home: home.to_owned(),
        base_domain: config.edge.base_domain.clone(),
        url_scheme: "http".into(),
        url_port,
        regions: config.regions.clone(),
        default_image: config.default_image.clone(),
        images: config.images.limits(),
        guest: outbound.guest,
    };
    ControlPlane::open(config, store, driver, Arc::new(images)).await
}

fn template_budgets(config: &Config) -> Budgets {
    let mut budgets = Budgets::of_this_host();
    if let Some(mib) = config.template_memory_mib {
        budgets.memory_bytes = mib.saturating_mul(1 << 20);
    }
    if let Some(gib) = config.template_disk_gib {
        budgets.disk_bytes = gib.saturating_mul(1 << 30);
    }
    budgets
}

/// Resolving a proxy's name may take a while.
async fn outbound_of(config: &Config) -> Outbound {
    let (network, is_region) = (config.network.clone(), config.region.is_some());
    let found = tokio::task::spawn_blocking(move || Outbound::of_host(&network, is_region)).await;
    let outbound = found.unwrap_or_default();
    for problem in &outbound.guest.problems {
        tracing::warn!("{problem}");
    }
    outbound
}

pub(crate) fn serve_api(listener: UnixListener, api: Api, ending: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let served = axum::serve(listener, router(api)).with_graceful_shutdown(ending.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "serving run/daemon.sock failed");
        }
    })
}

/// The proxy, and its listeners on loopback for single ports, which a cloud's region has none of.
async fn open_edge(
    plane: &Arc<ControlPlane>,
    config: Config,
    ending: CancellationToken,
) -> (Arc<Edge>, LocalListeners) {
    let settings = heyvm_edge::Settings {
        // Checked when the configuration was read.
        trusted_proxies: config.edge.trusted_proxies().unwrap_or_default(),
        base_domain: config.edge.base_domain,
        response_timeout: Duration::from_secs_f64(config.edge.timeout_seconds),
        ..heyvm_edge::Settings::default()
    };
    let edge = Edge::new(Arc::new(proxy::Sandboxes(Arc::clone(plane))), None, settings);
    let listeners = LocalListeners::new(Arc::clone(&edge), ending);
    if config.region.is_none()
        && let Err(error) = plane.open_local_ports(Arc::new(listeners.clone())).await
    {
        tracing::error!(%error, "there are no ports on loopback");
    }
    (edge, listeners)
}

async fn serve_edge(edge: Option<(Arc<Edge>, LocalListeners)>, listeners: Vec<TcpListener>, ending: CancellationToken) {
    let Some((edge, local)) = edge else { return };
    let served = listeners.into_iter().map(|listener| edge.serve(listener, ending.clone()));
    futures::future::join_all(served).await;
    local.served().await;
}

/// Returns when the end is asked for, or when this is no longer the home's daemon. Sandboxes end only when the home itself
/// was removed: no one could find them again. Whatever else is in doubt is logged, and ends none.
async fn until_end(home: &Arc<Home>, plane: &Arc<ControlPlane>, ending: &CancellationToken) {
    let mut look = tokio::time::interval(HOUSEKEEPING);
    let (mut removed, mut lost) = (0, 0);
    loop {
        tokio::select! {
            () = ending.cancelled() => return,
            _ = look.tick() => {}
        }
        let looked_after = Arc::clone(home);
        let presence = tokio::task::spawn_blocking(move || looked_after.look_after()).await;
        let presence = presence.unwrap_or_else(|error| Presence::Unknown(std::io::Error::other(error)));
        removed = if matches!(presence, Presence::Removed) { removed + 1 } else { 0 };
        lost = if matches!(presence, Presence::Lost(_)) { lost + 1 } else { 0 };
        match presence {
            Presence::Ours => {}
            Presence::Unknown(error) => tracing::warn!(%error, "the home cannot be looked at now"),
            Presence::Removed if removed >= LOOKS => {
                tracing::error!("the home was removed: sandboxes and daemon end");
                plane.abandon().await;
                return ending.cancel();
            }
            Presence::Lost(why) if lost >= LOOKS => {
                tracing::error!(why, "the daemon ends; sandboxes keep running for the next one");
                return ending.cancel();
            }
            Presence::Removed | Presence::Lost(_) => tracing::warn!(?presence, "the home is looked at again"),
        }
    }
}
