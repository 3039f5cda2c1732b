//! Archives of accounts: an upload in three steps, as existing clients do it, or in one; lists, removal.
//!
//! The URL of an upload holds a secret for this one archive, good for an hour: whoever sends the bytes needs no other
//! credentials, and could not use them for anything else.

use std::{io, sync::Arc};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, FromRef, FromRequestParts, State},
};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use heyvm_accounts::{Accounts, Metered};
use heyvm_api::{
    accounts::Scope,
    archives::{AccountArchive, FinalizeArchiveRequest, PresignedUpload},
    system::ArchiveInfo,
};
use heyvm_archives::{Archive, Archives, Error};
use heyvm_edge::Visitor;
use http::{HeaderMap, StatusCode, Uri, header, request::Parts, uri::Authority};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::identity::{Caller, Named};
use crate::{
    extract::{OptionalContent, Params},
    problem::Problem,
    routes::{Binary, system::ArchiveQuery},
};

/// Where clients reach this server (`https://api.example.com`), when it is not where they say.
#[derive(Debug, Clone, Default)]
pub struct PublicUrl(pub Option<Arc<str>>);

/// The routes of this module, over any state that has the archives and credentials' check.
pub fn routes<S>() -> OpenApiRouter<S>
where
    S: Clone + Send + Sync + 'static,
    Arc<Archives>: FromRef<S>,
    Arc<Accounts>: FromRef<S>,
    PublicUrl: FromRef<S>,
{
    OpenApiRouter::new()
        .routes(routes!(presign))
        .routes(routes!(upload))
        .routes(routes!(list))
        .routes(routes!(get, remove))
        .routes(routes!(list_as_local, put))
        .routes(routes!(remove_as_local))
        .routes(routes!(finalize))
        // Uploads are counted as they stream.
        .layer(DefaultBodyLimit::disable())
}

/// Begins the upload of an archive. Needs scope `deploy`.
///
/// PUT the tar.gz to `upload_url`, without other credentials, and repeat it where it breaks off; then call
/// `finalize_archive`. What is not finalized within a day is forgotten.
#[utoipa::path(post, path = "/sandbox-archives/presign", operation_id = "presign_archive", tag = "archives",
    responses((status = 200, description = "Where to PUT it", body = PresignedUpload)))]
async fn presign(
    State(archives): State<Arc<Archives>>,
    State(accounts): State<Arc<Accounts>>,
    base: BaseUrl,
    caller: Caller,
) -> Result<Json<PresignedUpload>, Problem> {
    let account = caller.require(Scope::Deploy)?.account_id;
    accounts.meter(Metered::Presign, &account)?;
    let ticket = archives.presign(&account).await?;
    Ok(Json(PresignedUpload {
        upload_url: format!("{}/sandbox-archives/{}/content?token={}", base.0, ticket.id, ticket.secret),
        archive_id: ticket.id,
        expires_in: ticket.lifetime.as_secs(),
    }))
}

/// What an upload's URL holds.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct UploadQuery {
    /// From `upload_url`.
    #[serde(default)]
    token: String,
}

/// Takes an archive's content. Its URL is the credential.
///
/// Sending the same again changes nothing; another content takes its place until the archive is finalized.
#[utoipa::path(put, path = "/sandbox-archives/{id}/content", operation_id = "upload_archive", tag = "archives",
    params(("id" = String, Path, description = "The archive's id"), UploadQuery),
    request_body(content = inline(Binary), content_type = "application/gzip", description = "A tar.gz"),
    responses((status = 200, description = "Checked and kept", body = ArchiveInfo)))]
async fn upload(
    State(archives): State<Arc<Archives>>,
    Named(archive_id): Named,
    Params(query): Params<UploadQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ArchiveInfo>, Problem> {
    let size_bytes = archives.upload(&archive_id, &query.token, pieces(&archives, &headers, body)?).await?;
    Ok(Json(ArchiveInfo { archive_id, size_bytes }))
}

/// Makes an uploaded archive usable. Needs scope `deploy`. Doing it again changes nothing.
#[utoipa::path(post, path = "/sandbox-archives/{id}/finalize", operation_id = "finalize_archive", tag = "archives",
    params(("id" = String, Path, description = "The archive's id")), request_body = Option<FinalizeArchiveRequest>,
    responses((status = 200, description = "It can be deployed", body = AccountArchive)))]
async fn finalize(
    State(archives): State<Arc<Archives>>,
    Named(id): Named,
    caller: Caller,
    OptionalContent(request): OptionalContent<FinalizeArchiveRequest>,
) -> Result<Json<AccountArchive>, Problem> {
    let caller = caller.require(Scope::Deploy)?;
    let request = request.unwrap_or_default();
    let name = request.name.or(request.sandbox_id).filter(|name| !name.is_empty());
    Ok(Json(told(archives.finalize(&caller.account_id, &id, name.as_deref()).await?)))
}

/// The account's archives, newest first.
#[utoipa::path(get, path = "/sandbox-archives", operation_id = "list_archives", tag = "archives",
    responses((status = 200, description = "Those that can be deployed", body = Vec<AccountArchive>)))]
async fn list(State(archives): State<Arc<Archives>>, caller: Caller) -> Result<Json<Vec<AccountArchive>>, Problem> {
    let found = archives.list(&caller.require(Scope::Read)?.account_id).await?;
    Ok(Json(found.into_iter().map(told).collect()))
}

/// One archive.
#[utoipa::path(get, path = "/sandbox-archives/{id}", operation_id = "get_archive", tag = "archives",
    params(("id" = String, Path, description = "The archive's id")),
    responses((status = 200, description = "It can be deployed", body = AccountArchive)))]
async fn get(
    State(archives): State<Arc<Archives>>,
    Named(id): Named,
    caller: Caller,
) -> Result<Json<AccountArchive>, Problem> {
    Ok(Json(told(archives.get(&caller.require(Scope::Read)?.account_id, &id).await?)))
}

/// Removes an archive. Needs scope `deploy`. Sandboxes that were made from it go on.
#[utoipa::path(delete, path = "/sandbox-archives/{id}", operation_id = "remove_archive", tag = "archives",
    params(("id" = String, Path, description = "The archive's id")),
    responses((status = 204, description = "Gone")))]
async fn remove(
    State(archives): State<Arc<Archives>>,
    Named(id): Named,
    caller: Caller,
) -> Result<StatusCode, Problem> {
    archives.remove(&caller.require(Scope::Deploy)?.account_id, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The account's archives, newest first, as the command line asks for them.
#[utoipa::path(get, path = "/archives", operation_id = "list_archives_as_local", tag = "archives",
    responses((status = 200, description = "Those that can be deployed", body = Vec<AccountArchive>)))]
async fn list_as_local(archives: State<Arc<Archives>>, caller: Caller) -> Result<Json<Vec<AccountArchive>>, Problem> {
    list(archives, caller).await
}

/// Removes an archive, as the command line asks for it. Needs scope `deploy`.
#[utoipa::path(delete, path = "/archives/{id}", operation_id = "remove_archive_as_local", tag = "archives",
    params(("id" = String, Path, description = "The archive's id")),
    responses((status = 204, description = "Gone")))]
async fn remove_as_local(archives: State<Arc<Archives>>, id: Named, caller: Caller) -> Result<StatusCode, Problem> {
    remove(archives, id, caller).await
}

/// Takes a tar.gz in one call. Needs scope `deploy`.
#[utoipa::path(put, path = "/archives", operation_id = "put_archive", tag = "archives", params(ArchiveQuery),
    request_body(content = inline(Binary), content_type = "application/gzip", description = "A tar.gz"),
    responses((status = 201, description = "Checked and kept", body = ArchiveInfo)))]
async fn put(
    State(archives): State<Arc<Archives>>,
    caller: Caller,
    Params(query): Params<ArchiveQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<ArchiveInfo>), Problem> {
    let caller = caller.require(Scope::Deploy)?;
    let archive = archives.put(&caller.account_id, query.name.as_deref(), pieces(&archives, &headers, body)?).await?;
    Ok((StatusCode::CREATED, Json(ArchiveInfo { archive_id: archive.id, size_bytes: archive.size })))
}

/// The body as it streams; one that says it is too large is not begun.
fn pieces(
    archives: &Archives,
    headers: &HeaderMap,
    body: Body,
) -> Result<BoxStream<'static, io::Result<Bytes>>, Problem> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let limit = archives.limits().compressed;
    if length.is_some_and(|length| length > limit) {
        return Err(heyvm_api::ApiError::from(Error::TooLarge { limit }).into());
    }
    Ok(body.into_data_stream().map_err(io::Error::other).boxed())
}

fn told(archive: Archive) -> AccountArchive {
    AccountArchive {
        id: archive.id,
        name: archive.name,
        size_bytes: archive.size,
        created_at: archive.created_at,
        used_by: Vec::new(),
    }
}

/// What URLs of this server begin with, for whoever asks.
struct BaseUrl(String);

impl<S: Send + Sync> FromRequestParts<S> for BaseUrl
where
    PublicUrl: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        if let Some(url) = PublicUrl::from_ref(state).0 {
            return Ok(Self(url.trim_end_matches('/').to_owned()));
        }
        let secure = parts.extensions.get::<Visitor>().is_some_and(|visitor| visitor.secure);
        let host = host(&parts.headers, &parts.uri)
            .ok_or_else(|| Problem::invalid("the request has no Host", "send one, or set the server's public URL"))?;
        Ok(Self(format!("{}://{host}", if secure { "https" } else { "http" })))
    }
}

fn host(headers: &HeaderMap, uri: &Uri) -> Option<Authority> {
    let said = || headers.get(header::HOST)?.to_str().ok()?.parse::<Authority>().ok();
    let host = uri.authority().cloned().or_else(said)?;
    (!host.as_str().contains('@')).then_some(host)
}

#[cfg(test)]
mod tests;
