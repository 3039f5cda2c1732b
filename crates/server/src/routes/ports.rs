//! Ports: their URLs, and whether something listens.

use std::time::Duration;

use axum::{Json, extract::Path};
use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{BindRequest, BoundPort, WaitResponse},
};
use http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::{
    extract::{Content, Params, Plane, Who},
    problem::Problem,
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
    Path((who, port)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let number = port.parse::<i64>().map_err(|_| {
        ApiError::new(ErrorCode::InvalidPort, format!("{port:?} is not a port")).hint("ports are 1 to 65535")
    })?;
    plane.unbind(&who, number).await?;
    Ok(StatusCode::NO_CONTENT)
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
