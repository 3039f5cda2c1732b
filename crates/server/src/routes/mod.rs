//! The routes, one module per noun, and the OpenAPI document that is made from them.

mod exec;
pub mod failures;
mod files;
mod images;
mod logs;
mod orphans;
mod ports;
pub mod restricted;
mod sandboxes;
pub mod system;

use std::{path::PathBuf, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::Response,
};
use heyvm_api::{ApiError, ErrorCode, limits};
use heyvm_control_plane::ControlPlane;
use http::{Method, StatusCode, Uri};
use tokio::sync::watch;
use utoipa::{
    OpenApi, PartialSchema, ToSchema,
    openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, schema::Type},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::failures::Server;
use crate::{linger, output::Budget, problem::Problem};

/// What handlers share.
#[derive(Clone)]
pub struct Api {
    output: Arc<Budget>,
    opened: watch::Receiver<Option<Result<Arc<ControlPlane>, ApiError>>>,
}

impl Api {
    /// Handlers wait until `opened` holds something. Output that is too large for memory waits in `spool`.
    pub fn new(spool: PathBuf, opened: watch::Receiver<Option<Result<Arc<ControlPlane>, ApiError>>>) -> Self {
        Self { output: Budget::new(spool), opened }
    }

    /// The control plane, once it is open.
    pub async fn plane(&self) -> Result<Arc<ControlPlane>, ApiError> {
        let mut opened = self.opened.clone();
        let ending = || ApiError::new(ErrorCode::DaemonUnavailable, "the daemon is ending").hint("try again");
        let outcome = opened.wait_for(Option::is_some).await.map_err(|_| ending())?;
        outcome.clone().unwrap_or_else(|| Err(ending()))
    }

    /// Room for output that is too large for memory.
    pub(crate) fn output(&self) -> &Arc<Budget> {
        &self.output
    }
}

/// Bytes as they are, in the document.
pub struct Binary;

impl PartialSchema for Binary {
    fn schema() -> RefOr<Schema> {
        let format = SchemaFormat::KnownFormat(KnownFormat::Binary);
        ObjectBuilder::new().schema_type(Type::String).format(Some(format)).into()
    }
}

impl ToSchema for Binary {}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "heyvm",
        description = "Sandboxes that are full VMs. Every path that takes an `id` takes a name or a slug too: the \
                       living sandbox of that name, else the newest. Every error is an `ErrorBody`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(heyvm_api::sandbox::ListFilter)),
    tags(
        (name = "sandboxes", description = "Create, find, stop, start, remove"),
        (name = "commands", description = "Run commands"),
        (name = "files", description = "Files in a sandbox"),
        (name = "ports", description = "URLs of ports"),
        (name = "images", description = "Images and guest kernels on this machine"),
        (name = "system", description = "The daemon itself"),
    )
)]
struct Document;

fn collected() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(system::health))
        .routes(routes!(system::document))
        .routes(routes!(system::docs))
        .routes(routes!(system::doctor))
        .routes(routes!(system::list_archives, system::put_archive))
        .routes(routes!(system::remove_archive))
        .routes(routes!(sandboxes::list, sandboxes::create))
        .routes(routes!(sandboxes::inactive))
        .routes(routes!(orphans::list))
        .routes(routes!(orphans::recover))
        .routes(routes!(sandboxes::get, sandboxes::remove))
        .routes(routes!(sandboxes::stop))
        .routes(routes!(sandboxes::start))
        .routes(routes!(sandboxes::restart))
        .routes(routes!(sandboxes::set_ttl))
        .routes(routes!(sandboxes::set_restart_policy))
        .routes(routes!(sandboxes::resize))
        .routes(routes!(sandboxes::checkpoint))
        .routes(routes!(sandboxes::restore))
        .routes(routes!(sandboxes::add_mount))
        .routes(routes!(sandboxes::replace_mount))
        .routes(routes!(exec::execute))
        .routes(routes!(exec::stream))
        .routes(routes!(logs::logs))
        .routes(routes!(ports::wait))
        .routes(routes!(ports::endpoints, ports::bind, ports::unbind))
        .routes(routes!(ports::unbind_port))
        .routes(routes!(ports::dial))
        .routes(routes!(ports::route))
        .routes(routes!(files::list, files::remove))
        .routes(routes!(files::download))
        .routes(routes!(files::upload))
        .routes(routes!(files::pack, files::unpack))
        .routes(routes!(images::list))
        .routes(routes!(images::pull))
        .routes(routes!(images::import))
        .routes(routes!(images::prepare))
        .routes(routes!(images::prune))
        .routes(routes!(images::remove))
        .routes(routes!(images::import_kernel))
}

/// Every route.
pub fn router(api: Api) -> Router {
    let (router, _) = collected().split_for_parts();
    router
        .route_layer(middleware::from_fn_with_state(api.clone(), restricted::confine))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        // Each handler has its own limit, or streams.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(log))
        .layer(middleware::from_fn(linger::read_on))
        .with_state(api)
}

/// The OpenAPI document.
pub fn document() -> utoipa::openapi::OpenApi {
    completed(calls(), Server::Daemon)
}

/// What of the document is written beside the handlers.
pub fn calls() -> utoipa::openapi::OpenApi {
    let (_, mut document) = collected().split_for_parts();
    if let Some(item) = document.paths.paths.remove("/images/{*name}") {
        document.paths.paths.insert("/images/{name}".into(), item);
    }
    document
}

/// A document with what every call has: our version, and errors.
pub fn completed(mut document: utoipa::openapi::OpenApi, server: Server) -> utoipa::openapi::OpenApi {
    document.info.version = env!("CARGO_PKG_VERSION").into();
    let limits: Vec<_> = limits::ALL.iter().map(|limit| format!("{} {}", limit.name, limit.shown())).collect();
    let text = document.info.description.get_or_insert_default();
    text.push_str(&format!(" Limits, beyond which a call answers `limit_exceeded`: {}.", limits.join(", ")));
    failures::describe(&mut document, server);
    document
}

pub async fn unknown_path(uri: Uri) -> Problem {
    ApiError::new(ErrorCode::NotFound, format!("there is nothing at {}", uri.path()))
        .hint("GET /openapi.json lists every path")
        .into()
}

pub async fn wrong_method(method: Method, uri: Uri) -> Problem {
    Problem::invalid(format!("{} takes no {method}", uri.path()), "GET /openapi.json lists every path with its methods")
        .with_status(StatusCode::METHOD_NOT_ALLOWED)
}

/// One line per request, without query, headers and body: those may hold secrets.
pub async fn log(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let started = Instant::now();
    let response = next.run(request).await;
    let (status, ms) = (response.status().as_u16(), started.elapsed().as_millis());
    if path == "/health" {
        tracing::debug!(%method, path, status, ms, "request");
    } else {
        tracing::info!(%method, path, status, ms, "request");
    }
    response
}

#[cfg(test)]
const ERROR: &str = "#/components/schemas/ErrorBody";

/// Panics where an operation of a document lacks what every one has, or refers to what is not there.
#[cfg(test)]
pub fn check_operations(document: &serde_json::Value) {
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut ids = std::collections::BTreeSet::new();
    let paths = document["paths"].as_object().unwrap();
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
            assert!(ids.insert(id.to_owned()), "{id} stands for two operations");
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path}");
            for status in operation["responses"].as_object().unwrap().keys() {
                assert!(status.parse::<u16>().is_ok(), "{method} {path} answers {status}");
            }
            assert_eq!(operation["responses"]["500"]["content"]["application/json"]["schema"]["$ref"], ERROR, "{id}");
        }
    }
    assert!(paths.len() >= 24, "{}", paths.len());
    let text = document.to_string();
    for reference in text.split("#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"][name].is_object(), "{name} is referred to and not there");
    }
}

#[cfg(test)]
mod tests {
    /// The document is checked in, so that a change of the API shows in a review.
    /// `HEYVM_UPDATE_OPENAPI=1 cargo test -p heyvm-server` writes it anew.
    #[test]
    fn the_document_is_the_one_that_is_checked_in() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
        let made = format!("{}\n", super::document().to_pretty_json().unwrap());
        if std::env::var_os("HEYVM_UPDATE_OPENAPI").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == made, "openapi.json is not up to date: HEYVM_UPDATE_OPENAPI=1 cargo test -p heyvm-server");
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_a_summary_and_errors() {
        super::check_operations(&serde_json::to_value(super::document()).unwrap());
    }

    #[tokio::test]
    async fn every_wrong_body_is_refused_by_the_name_of_its_field() {
        let daemon = crate::trials::Daemon::start().await;
        let document = serde_json::to_value(super::document()).unwrap();
        let id = uuid::Uuid::new_v4().to_string();
        let (sent, taken) = crate::trials::bodies::try_all(&document, &daemon.router, "", &id).await;
        assert!(sent > 300, "{sent}");
        assert!(taken.is_empty(), "{} of {sent}:\n{}", taken.len(), taken.join("\n"));
    }

    #[test]
    fn the_document_and_the_page_show_every_limit() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api.md");
        let page = std::fs::read_to_string(page).unwrap();
        let document = serde_json::to_value(super::document()).unwrap();
        for limit in heyvm_api::limits::ALL {
            let row = format!("| {} | {} |", limit.name, limit.shown());
            assert!(page.contains(&row), "docs/api.md lacks {row}");
            assert!(document["info"]["description"].as_str().unwrap().contains(limit.name));
        }
        let fields = &document["components"]["schemas"]["CreateRequest"]["properties"];
        for (field, limit) in [
            ("open_ports", heyvm_api::limits::PORTS),
            ("setup_hooks", heyvm_api::limits::HOOKS),
            ("mounts", heyvm_api::limits::MOUNTS),
        ] {
            assert_eq!(fields[field]["maxItems"], limit.most, "{field}");
        }
    }

    #[test]
    fn the_documentation_names_every_call_and_every_error() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api.md");
        let page = std::fs::read_to_string(page).unwrap();
        let document: serde_json::Value = serde_json::to_value(super::document()).unwrap();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let call = format!("`{} {path}`", method.to_uppercase());
                assert!(page.contains(&call), "docs/api.md lacks {call}");
            }
        }
        for code in document["components"]["schemas"]["ErrorCode"]["enum"].as_array().unwrap() {
            assert!(page.contains(&format!("| `{}` |", code.as_str().unwrap())), "docs/api.md lacks {code}");
        }
    }
}
