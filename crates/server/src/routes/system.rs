//! The daemon itself: health, its document, checks of the host, archives.

use axum::{
    Json,
    body::{Body, Bytes},
    response::{Html, IntoResponse},
};
use futures::{StreamExt, TryStreamExt};
use heyvm_api::{
    archives::AccountArchive,
    system::{ArchiveInfo, COMPATIBILITY, DoctorReport, Health},
};
use http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Binary, document as made_document};
use crate::{
    docs,
    extract::{For, Params, Plane, Who},
    internet,
    problem::Problem,
};

/// Whether the daemon is there. Answers at once, without credentials, also while it is still opening.
#[utoipa::path(get, path = "/health", operation_id = "health", tag = "system",
    responses((status = 200, description = "It is", body = Health)))]
pub async fn health() -> Json<Health> {
    let version = env!("CARGO_PKG_VERSION").into();
    Json(Health { status: "ok".into(), version, compatibility: COMPATIBILITY })
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
pub async fn doctor(Plane(plane): Plane, For(account): For) -> Result<Json<DoctorReport>, Problem> {
    account.must_be_owner("doctor")?;
    let network = plane.guest_defaults();
    let (report, internet) = tokio::join!(plane.doctor(), internet::look(network));
    let mut report = report?;
    report.checks.extend(internet);
    Ok(Json(report))
}

/// Takes a tar.gz or tar.zst for `archive_id` of a create: of any size from the owner of the machine, of up to 1 GiB from
/// the accounts of a region.
///
/// It is kept while a sandbox names it, and for a day after it was last sent or used; with a name, until it is removed.
#[utoipa::path(put, path = "/archives", operation_id = "put_archive", tag = "system", params(ArchiveQuery),
    request_body(content = inline(Binary), content_type = "application/gzip", description = "A tar.gz or tar.zst"),
    responses((status = 201, description = "Kept", body = ArchiveInfo)))]
pub async fn put_archive(
    Plane(plane): Plane,
    For(account): For,
    Params(query): Params<ArchiveQuery>,
    body: Body,
) -> Result<(StatusCode, Json<ArchiveInfo>), Problem> {
    if query.name.is_some() {
        account.must_be_owner("naming an archive")?;
    }
    let pieces = body.into_data_stream().map_err(std::io::Error::other).map_ok(Bytes::from);
    let archive = plane.put_archive(&account, query.name, pieces.boxed()).await?;
    Ok((StatusCode::CREATED, Json(archive)))
}

/// Query of an upload.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ArchiveQuery {
    /// What to call it.
    pub(crate) name: Option<String>,
}

/// Query of the list of archives.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct ListArchivesQuery {
    /// Also those without a name, which deploys leave, and who uses them.
    all: bool,
}

/// Archives with a name, or all, newest first.
#[utoipa::path(get, path = "/archives", operation_id = "list_archives", tag = "system", params(ListArchivesQuery),
    responses((status = 200, description = "They can be deployed", body = Vec<AccountArchive>)))]
pub async fn list_archives(
    Plane(plane): Plane,
    For(account): For,
    Params(query): Params<ListArchivesQuery>,
) -> Result<Json<Vec<AccountArchive>>, Problem> {
    account.must_be_owner("listing archives")?;
    Ok(Json(plane.archives(query.all).await?))
}

/// Removes an archive. Sandboxes that were made from it go on.
#[utoipa::path(delete, path = "/archives/{id}", operation_id = "remove_archive", tag = "system",
    params(("id" = String, Path, description = "The archive's id")),
    responses((status = 204, description = "Gone")))]
pub async fn remove_archive(Plane(plane): Plane, Who(who): Who) -> Result<StatusCode, Problem> {
    who.account.must_be_owner("removing an archive")?;
    plane.remove_archive(&who.sandbox).await?;
    Ok(StatusCode::NO_CONTENT)
}
