//! `heyvm server`: the API of a cloud, for many accounts, and the edge in front of its regions.
//!
//! - [`run_server`] (`run`): store, accounts, regions, listeners; their end in order.  `config`: what an operator decides.
//! - `guard`: who asks, and whether they may.  `identity`: the two as handlers take them.  `auth`: how they come by
//!   credentials.  [`login`]: people, at a page.
//! - `local`, `forward`: what the command line speaks; the calls that mean the same everywhere go on as they are.
//! - `deployed`, `archives`, `shell`: what other clients speak.  `upstreams`: the edge's way in.
//!
//! ```text
//! heyvm, SDKs ─▶ guard ─┬▶ local, deployed, archives, shell ─▶ heyvm-cloud ─▶ region
//!                       └▶ forward ─────────────────────────────────────────▶ region
//! browser ─▶ edge ─▶ upstreams ─────────────────────────────▶ heyvm-cloud ─▶ region
//! ```

mod archives;
mod auth;
pub mod config;
mod deployed;
mod forward;
mod guard;
mod identity;
mod local;
pub mod login;
mod run;
mod shell;
mod upstreams;

use std::sync::Arc;

use axum::{
    Router,
    extract::FromRef,
    middleware,
    routing::{delete, get, post},
};
use heyvm_accounts::Accounts;
use heyvm_archives::Archives;
use heyvm_cloud::Cloud;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::routes::{self, failures::Server, log, unknown_path, wrong_method};

pub use run::run_server;

/// What handlers share.
#[derive(Clone)]
pub struct Served {
    cloud: Arc<Cloud>,
    accounts: Arc<Accounts>,
    archives: Arc<Archives>,
    public_url: archives::PublicUrl,
    shells: Arc<shell::Shells>,
}

impl FromRef<Served> for Arc<Accounts> {
    fn from_ref(served: &Served) -> Self {
        Arc::clone(&served.accounts)
    }
}

impl FromRef<Served> for Arc<Cloud> {
    fn from_ref(served: &Served) -> Self {
        Arc::clone(&served.cloud)
    }
}

impl FromRef<Served> for Arc<Archives> {
    fn from_ref(served: &Served) -> Self {
        Arc::clone(&served.archives)
    }
}

impl FromRef<Served> for archives::PublicUrl {
    fn from_ref(served: &Served) -> Self {
        served.public_url.clone()
    }
}

impl FromRef<Served> for Arc<shell::Shells> {
    fn from_ref(served: &Served) -> Self {
        Arc::clone(&served.shells)
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "heyvm server",
        description = "Sandboxes that are full VMs, for many accounts. Every call but those that give credentials out \
                       needs `Authorization: Bearer` with a token or an API key. Every path that takes an `id` takes a \
                       name or a slug of the account's own, too. Every error is an `ErrorBody`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "sandboxes", description = "Create, find, stop, start, remove"),
        (name = "commands", description = "Run commands"),
        (name = "files", description = "Files in a sandbox"),
        (name = "ports", description = "URLs of ports"),
        (name = "cloud", description = "The same, as other clients speak it"),
        (name = "archives", description = "What sandboxes are made from"),
        (name = "accounts", description = "Log in, API keys, audit"),
        (name = "system", description = "The server itself"),
    )
)]
struct Document;

fn documented() -> OpenApiRouter<Served> {
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(auth::routes())
        .merge(deployed::routes())
        .merge(archives::routes())
        .merge(shell::routes())
}

/// The calls of the daemon's API that a cloud offers, too.
fn as_local() -> Router<Served> {
    Router::new()
        .route("/health", get(routes::system::health))
        .route("/sandboxes", get(local::list).post(local::create))
        .route("/sandboxes/inactive", get(local::inactive))
        .route("/sandboxes/{id}", get(local::get).delete(local::remove))
        .route("/sandboxes/{id}/stop", post(local::stop))
        .route("/sandboxes/{id}/start", post(local::start))
        .route("/sandboxes/{id}/restart", post(local::restart))
        .route("/sandboxes/{id}/ttl", post(local::set_ttl))
        .route("/sandboxes/{id}/resize", post(local::resize))
        .route("/sandboxes/{id}/checkpoint", post(local::checkpoint))
        .route("/sandboxes/{id}/restore", post(local::restore))
        .route("/sandboxes/{id}/replace-mount", post(local::replace_mount))
        .route("/sandboxes/{id}/proxy", get(local::endpoints).post(local::bind).delete(local::unbind))
        .route("/sandboxes/{id}/proxy/{port}", delete(local::unbind_port))
        .route("/sandboxes/{id}/execute", post(forward::forward))
        .route("/sandboxes/{id}/exec", get(forward::forward))
        // Refused there, as in a create: a region's directories are its owner's.
        .route("/sandboxes/{id}/mounts", post(forward::forward))
        .route("/sandboxes/{id}/logs", get(forward::forward))
        .route("/sandboxes/{id}/wait", get(forward::forward))
        .route("/sandboxes/{id}/files", get(forward::forward).delete(forward::forward))
        .route("/sandboxes/{id}/files/download", get(forward::forward))
        .route("/sandboxes/{id}/files/upload", post(forward::forward))
        .route("/sandboxes/{id}/files/tar", get(forward::forward).put(forward::forward))
        .route("/images", get(local::images))
        .route("/images/pull", post(local::pull))
        .route("/openapi.json", get(local::document))
        .route("/docs", get(local::docs))
}

/// Every route.
pub fn router(served: Served) -> Router {
    let (router, _) = documented().split_for_parts();
    router
        .merge(as_local())
        .route_layer(middleware::from_fn_with_state(served.clone(), guard::guard))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn(log))
        .with_state(served)
}

/// Calls of the daemon's API that concern its machine, or that only a server makes.
const NOT_IN_A_CLOUD: &[&str] = &[
    "/doctor",
    "/images/import",
    "/images/prepare",
    "/images/prune",
    "/images/{name}",
    "/kernels/import",
    "/orphans",
    "/routes/{subdomain}",
    "/sandboxes/{id}/mounts",
    "/sandboxes/{id}/ports/{port}",
    "/sandboxes/{id}/recover",
    "/sandboxes/{id}/restart-policy",
];

/// The OpenAPI document: this API's own calls, and those of the daemon's that it offers, too.
pub fn document() -> utoipa::openapi::OpenApi {
    let (_, document) = documented().split_for_parts();
    let mut locals = routes::calls();
    locals.paths.paths.retain(|path, _| !NOT_IN_A_CLOUD.contains(&path.as_str()));
    routes::completed(document.merge_from(locals), Server::Cloud)
}

#[cfg(test)]
mod tests {
    /// The document is checked in, as `openapi.json` is, and written anew in the same way.
    #[test]
    fn the_document_is_the_one_that_is_checked_in() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi-cloud.json");
        let made = format!("{}\n", super::document().to_pretty_json().unwrap());
        if std::env::var_os("HEYVM_UPDATE_OPENAPI").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == made,
            "openapi-cloud.json is not up to date: HEYVM_UPDATE_OPENAPI=1 cargo test -p heyvm-server"
        );
    }

    #[test]
    fn the_documentation_names_every_call_of_the_clouds_own() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cloud-api.md");
        let page = std::fs::read_to_string(page).unwrap();
        let (_, document) = super::documented().split_for_parts();
        for (path, item) in serde_json::to_value(document).unwrap()["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let call = format!("`{} {path}`", method.to_uppercase());
                assert!(page.contains(&call), "docs/cloud-api.md lacks {call}");
            }
        }
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_a_summary_and_errors() {
        let document = serde_json::to_value(super::document()).unwrap();
        crate::routes::check_operations(&document);
    }
}
