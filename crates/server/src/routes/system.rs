//! The daemon itself: health, its document, checks of the host, archives.

use axum::{
    Json,
    body::{Body, Bytes},
    response::{Html, IntoResponse},
};
use futures::{StreamExt, TryStreamExt};
use heyvm_api::system::{ArchiveInfo, DoctorReport, Health};
use http::StatusCode;

use super::document as made_document;
use crate::{docs, extract::Plane, problem::Problem};

/// Whether the daemon is there. Answers at once, without credentials, also while it is still opening.
#[utoipa::path(get, path = "/health", operation_id = "health", tag = "system",
    responses((status = 200, description = "It is", body = Health)))]
pub async fn health() -> Json<Health> {
    Json(Health { status: "ok".into(), version: env!("CARGO_PKG_VERSION").into() })
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "openapi", tag = "system",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub async fn document() -> impl IntoResponse {
    Json(made_document())
}

/// The same as a page to read.
#[utoipa::path(get, path = "/docs", operation_id = "docs", tag = "system",
    responses((status = 200, description = "The page", body = String, content_type = "text/html")))]
pub async fn docs() -> Html<&'static str> {
    Html(docs::page())
}

/// Checks of the host: what works, what does not, what to do about it.
#[utoipa::path(get, path = "/doctor", operation_id = "doctor", tag = "system",
    responses((status = 200, description = "Every check", body = DoctorReport)))]
pub async fn doctor(Plane(plane): Plane) -> Result<Json<DoctorReport>, Problem> {
    Ok(Json(plane.doctor().await?))
}

/// Takes a tar.gz of up to 1 GiB, for `archive_id` of a create.
///
/// It is kept while a sandbox names it, and for a day after it was last sent or used.
#[utoipa::path(put, path = "/archives", operation_id = "put_archive", tag = "system",
    request_body(content = Vec<u8>, content_type = "application/gzip", description = "A tar.gz"),
    responses((status = 201, description = "Kept", body = ArchiveInfo)))]
pub async fn put_archive(Plane(plane): Plane, body: Body) -> Result<(StatusCode, Json<ArchiveInfo>), Problem> {
    let pieces = body.into_data_stream().map_err(std::io::Error::other).map_ok(Bytes::from);
    let archive = plane.put_archive(pieces.boxed()).await?;
    Ok((StatusCode::CREATED, Json(archive)))
}
