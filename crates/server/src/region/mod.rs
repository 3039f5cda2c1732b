//! The trusted listener of a region: a cloud's servers, known by their certificates, speak the API here over TLS and say
//! for which account they ask. Nobody else gets as far as HTTP.
//!
//! `certificates`: the files that say who we are and whom we know, read again when they change.

mod certificates;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use heyvm_api::{client::notice_silence, headers};
use heyvm_edge::{Patience, serve_connection};
use hyper_util::service::TowerToHyperService;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Error, config::RegionConfig, problem::Problem};
use certificates::Certificates;

/// Who does not show a certificate in this time is nobody we know.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may be showing theirs at the same time: each costs a signature.
const HANDSHAKES: usize = 256;
/// Head of a request, and idle time of a connection.
const PATIENCE: Patience = Patience { head: Duration::from_secs(60), idle: Duration::from_secs(3600) };
/// A server says something as soon as it is connected.
const FIRST_BYTES: Duration = Duration::from_secs(5);
/// Pause after a connection could not be accepted.
const BREATH: Duration = Duration::from_millis(100);
/// What is asked for no account: whether we are there, what we can, and where an address leads.
const FOR_NOBODY: [&str; 4] = ["/health", "/doctor", "/openapi.json", "/routes/"];

/// A listener that is ready to serve.
pub struct Region {
    listener: TcpListener,
    certificates: Arc<Certificates>,
}

impl Region {
    /// Listens. An error names the key of the configuration that is not as it should be.
    pub async fn listen(config: &RegionConfig) -> Result<Self, Error> {
        let certificates = Arc::new(Certificates::open(config.clone())?);
        let listening = TcpListener::bind(config.listen).await;
        let listener = listening.map_err(Error::io(format!("listening on {} (region.listen)", config.listen)))?;
        Ok(Self { listener, certificates })
    }

    /// Serves `api` until the end is asked for, and then what has begun.
    pub async fn serve(self, api: Router, ending: CancellationToken) {
        let api = api.layer(middleware::from_fn(must_name_an_account));
        let (serving, handshakes) = (TaskTracker::new(), Arc::new(Semaphore::new(HANDSHAKES)));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = ending.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the region's listener could not accept a connection");
                    tokio::time::sleep(BREATH).await;
                    continue;
                }
            };
            // Answers are small, and the servers wait for them. What a server that was cut off had begun ends with it.
            stream.set_nodelay(true).ok();
            if let Err(error) = notice_silence(&stream) {
                tracing::warn!(%error, "a server's silence will not be noticed");
            }
            let (api, ending, handshakes) = (api.clone(), ending.clone(), Arc::clone(&handshakes));
            let certificates = Arc::clone(&self.certificates);
            serving.spawn(async move {
                // Those who say nothing take no turn from those who shake hands.
                if !matches!(tokio::time::timeout(FIRST_BYTES, stream.peek(&mut [0])).await, Ok(Ok(1..))) {
                    return;
                }
                let Ok(turn) = handshakes.acquire_owned().await else { return };
                let acceptor = TlsAcceptor::from(certificates.current().await);
                let known = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
                drop(turn);
                match known {
                    Ok(Ok(stream)) => {
                        let served = serve_connection(stream, TowerToHyperService::new(api), PATIENCE, ending).await;
                        if let Err(error) = served {
                            tracing::debug!(%error, "a connection to the region's listener broke off");
                        }
                    }
                    Ok(Err(error)) => tracing::info!(%error, "someone without a good certificate was turned away"),
                    Err(_) => tracing::info!("someone who showed no certificate in time was turned away"),
                }
            });
        }
        serving.close();
        serving.wait().await;
    }
}

/// Without an account a request would be the machine's owner's, who does not come this way.
async fn must_name_an_account(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let for_nobody = FOR_NOBODY.iter().any(|begin| path == *begin || (begin.ends_with('/') && path.starts_with(begin)));
    if for_nobody || request.headers().contains_key(headers::ACCOUNT) {
        return next.run(request).await;
    }
    Problem::invalid("the request does not say for which account it is", "send the header heyvm-account")
        .into_response()
}

#[cfg(test)]
mod tests;
