//! Ports: their URLs, and whether something listens.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, Request},
    response::{IntoResponse, Response},
};
use heyvm_api::{
    ApiError, ErrorCode, headers, names,
    sandbox::{BindRequest, BoundPort, RouteInfo, WaitResponse},
};
use heyvm_control_plane::ConnectError;
use heyvm_edge::tunnel;
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::{
    extract::{Content, Params, Plane, Who},
    problem::Problem,
    relay,
};

const LONGEST_WAIT: f64 = 86_400.0;
const DEFAULT_WAIT: f64 = 60.0;

/// The bound ports.
#[utoipa::path(get, path = "/sandboxes/{id}/proxy", operation_id = "list_ports", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "With their URLs", body = Vec<BoundPort>)))]
pub async fn endpoints(Plane(plane): Plane, Who(who): Who) -> Result<Json<Vec<BoundPort>>, Problem> {
    Ok(Json(plane.endpoints(&who).await?))
}

/// Gives a port a URL. Binding a bound port gives the same URL.
#[utoipa::path(post, path = "/sandboxes/{id}/proxy", operation_id = "bind_port", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = BindRequest,
    responses((status = 201, description = "Bound", body = BoundPort)))]
pub async fn bind(
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<BindRequest>,
) -> Result<(StatusCode, Json<BoundPort>), Problem> {
    Ok((StatusCode::CREATED, Json(plane.bind(&who, request).await?)))
}

/// Query of an unbind.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UnbindQuery {
    /// Port in the sandbox.
    port: Option<i64>,
}

/// Takes a port's URL away.
#[utoipa::path(delete, path = "/sandboxes/{id}/proxy", operation_id = "unbind_port_by_query", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug"), UnbindQuery),
    responses((status = 204, description = "It has no URL any more")))]
pub async fn unbind(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<UnbindQuery>,
) -> Result<StatusCode, Problem> {
    let port = query.port.ok_or_else(|| Problem::invalid("the port is missing", "add ?port=8080"))?;
    plane.unbind(&who, port).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a port's URL away.
#[utoipa::path(delete, path = "/sandboxes/{id}/proxy/{port}", operation_id = "unbind_port", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug"), ("port" = u16, Path, description = "Port in the sandbox")),
    responses((status = 204, description = "It has no URL any more")))]
pub async fn unbind_port(
    Plane(plane): Plane,
    Who(who): Who,
    Path(path): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    plane.unbind(&who, number(&path.1)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn number(port: &str) -> Result<i64, ApiError> {
    port.parse().map_err(|_| {
        ApiError::new(ErrorCode::InvalidPort, format!("{port:?} is not a port")).hint("ports are 1 to 65535")
    })
}

/// Where a subdomain leads, and who may use it: what the proxy of another machine asks.
#[utoipa::path(get, path = "/routes/{subdomain}", operation_id = "get_route", tag = "ports",
    params(("subdomain" = String, Path, description = "First label of the host name")),
    responses((status = 200, description = "It leads there", body = RouteInfo)))]
pub async fn route(Plane(plane): Plane, Path(subdomain): Path<String>) -> Result<Json<RouteInfo>, Problem> {
    Ok(Json(plane.route(&subdomain).map_err(|failure| refused(failure, &subdomain))?))
}

/// A byte stream to a port in the sandbox.
///
/// The request asks for an upgrade to `heyvm-stream`; after 101 the connection is the port's. What stands in the way is
/// an error as everywhere: `sandbox_not_found`, `invalid_state` (it does not run), `port_not_listening`,
/// `sandbox_unreachable`.
#[utoipa::path(get, path = "/sandboxes/{id}/ports/{port}", operation_id = "dial_port", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug"), ("port" = u16, Path, description = "Port in the sandbox")),
    responses((status = 101, description = "Bytes from here on")))]
pub async fn dial(
    Plane(plane): Plane,
    Who(who): Who,
    Path(path): Path<(String, String)>,
    mut request: Request,
) -> Result<Response, Problem> {
    let port = names::check_port(number(&path.1)?)?;
    if !asks_for_stream(request.headers()) {
        let problem =
            Problem::invalid("a port's stream is an upgrade", "send Connection: Upgrade, Upgrade: heyvm-stream");
        return Err(problem.with_status(StatusCode::UPGRADE_REQUIRED));
    }
    let id = plane.get(&who).await?.id;
    let stream = plane.connect_to(&id, port).await.map_err(|failure| refused(failure, &id))?;
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(caller) = upgraded.await {
            tunnel::carry(TokioIo::new(caller), stream, relay::STREAM_IDLE).await;
        }
    });
    let head = [(header::CONNECTION, "upgrade"), (header::UPGRADE, headers::PORT_STREAM)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, head).into_response())
}

fn asks_for_stream(asked: &HeaderMap) -> bool {
    let names = |name, word: &str| {
        let value = asked.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        value.split(',').any(|each| each.trim().eq_ignore_ascii_case(word))
    };
    names(header::CONNECTION, "upgrade") && names(header::UPGRADE, headers::PORT_STREAM)
}

/// What the proxy would tell a visitor, as an error of the API.
fn refused(failure: ConnectError, whom: &str) -> ApiError {
    let message = failure.to_string();
    match failure {
        ConnectError::UnknownSubdomain => ApiError::new(ErrorCode::SandboxNotFound, format!("{message}: {whom}"))
            .hint("heyvm get shows a sandbox's URLs"),
        ConnectError::NotRunning(_) => {
            ApiError::new(ErrorCode::InvalidState, message).hint("heyvm start brings it back").sandbox(whom)
        }
        ConnectError::NothingListens(_) => ApiError::new(ErrorCode::PortNotListening, message)
            .hint("start the app, have it listen on that port, or look at heyvm logs")
            .sandbox(whom),
        ConnectError::Unreachable(_) => ApiError::new(ErrorCode::SandboxUnreachable, message).sandbox(whom),
    }
}

/// Query of a wait.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// Port in the sandbox.
    port: i64,
    /// An HTTP path that must answer 2xx or 3xx on that port.
    path: Option<String>,
    /// 60 when absent, at most a day.
    timeout_seconds: Option<f64>,
}

/// Waits until something listens on a port in the sandbox; `ready` is false at the deadline.
#[utoipa::path(get, path = "/sandboxes/{id}/wait", operation_id = "wait_for_port", tag = "ports",
    params(("id" = String, Path, description = "Id, name or slug"), WaitQuery),
    responses((status = 200, description = "Ready, or the deadline has passed", body = WaitResponse)))]
pub async fn wait(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<WaitQuery>,
) -> Result<Json<WaitResponse>, Problem> {
    let port = names::check_port(query.port)?;
    let seconds = query.timeout_seconds.unwrap_or(DEFAULT_WAIT);
    if !(0.0..=LONGEST_WAIT).contains(&seconds) {
        let message = format!("timeout_seconds {seconds} is out of range");
        return Err(Problem::invalid(message, "use 0 to 86400 seconds"));
    }
    // The path becomes part of a request in the guest.
    if let Some(path) = &query.path
        && (!path.starts_with('/') || !path.chars().all(|c| c.is_ascii_graphic()))
    {
        let message = format!("path {path:?} is not a path of a URL");
        return Err(Problem::invalid(message, "begin it with / and encode spaces and the like"));
    }
    let timeout = Duration::from_secs_f64(seconds);
    let ready = plane.wait_for_port(&who, query.port, query.path.as_deref(), timeout).await?;
    Ok(Json(WaitResponse { ready, port }))
}
