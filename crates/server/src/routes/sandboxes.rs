//! Sandboxes: create, find, stop, start, remove.

use std::sync::Arc;

use axum::{Json, response::Response};
use heyvm_api::{
    limits,
    sandbox::{
        CreateRequest, ListFilter, Mount, ReplaceMountRequest, ResizeRequest, RestartPolicyRequest, SandboxInfo,
        TtlRequest,
    },
};
use heyvm_control_plane::{self as plane, Account};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::{
    answer::{long, to_its_end},
    extract::{Content, For, Params, Plane, Who, Whose, asked},
    listing::{page, page_size},
    problem::Problem,
    routes::restricted,
};

/// Query of the list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// `living` (the default), `stopped` or `all`.
    #[serde(default)]
    filter: ListFilter,
    /// Only those with exactly this name.
    name: Option<String>,
    /// How many at most: 1 to 500, the default.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// Where to go on: the `heyvm-next-cursor` of the last page.
    cursor: Option<String>,
    /// Of a daemon alone: those that changed since: the `heyvm-revision` of the last list, or the `heyvm-next-cursor` while there is one.
    since: Option<String>,
    /// Of a daemon alone: only these, up to 500 ids with commas between them.
    ids: Option<String>,
}

/// Sandboxes, newest first.
///
/// A page holds up to 500, and up to 8 MiB. The header `heyvm-next-cursor` says that there are more: send it as `cursor`.
/// The last page has the header `heyvm-revision`: sent as `since` it lists what has changed from then on, longest
/// unchanged first.
#[utoipa::path(get, path = "/sandboxes", operation_id = "list_sandboxes", tag = "sandboxes", params(ListQuery),
    responses((status = 200, description = "Those asked for", body = Vec<SandboxInfo>)))]
pub async fn list(
    Plane(plane): Plane,
    Whose(account): Whose,
    headers: HeaderMap,
    Params(query): Params<ListQuery>,
) -> Result<Response, Problem> {
    let since = query.since.as_deref().map(revision).transpose()?;
    if since.is_some() && query.cursor.is_some() {
        return Err(Problem::invalid("cursor and since are for different lists", "send one of them"));
    }
    // Values of the environment are for its owner, who asks for their own sandboxes without a server in between.
    let values = account.as_ref().is_some_and(Account::is_owner) && !restricted::is_restricted(&headers);
    let size = page_size(query.limit)?;
    let ids: Option<Vec<String>> = query.ids.map(|ids| ids.split(',').map(str::to_owned).collect());
    limits::PAGE.check(ids.as_ref().map_or(0, Vec::len))?;
    let asked = plane::ListQuery { filter: query.filter, account, name: query.name, ids, after: query.cursor, since };
    let listing = plane.list_pages(&asked)?;
    let entries =
        listing.sandboxes(&plane).map(|(cursor, info)| (cursor, if values { info } else { info.without_values() }));
    page(entries, size, Some(listing.revision.to_string()))
}

fn revision(text: &str) -> Result<plane::Revision, Problem> {
    text.parse().map_err(|()| {
        Problem::invalid(
            "since is not a revision of a list",
            "send the heyvm-revision of the last list, or leave it out",
        )
    })
}

/// Makes a sandbox; answers when it is running, and healthy where a health path is given.
///
/// With `Accept: text/event-stream` the answer is a stream of events: `progress` (a `ProgressEvent`), then `result` (the
/// sandbox) or `error` (an `ErrorBody`). Going away undoes the sandbox, unless the request has an idempotency key.
#[utoipa::path(post, path = "/sandboxes", operation_id = "create_sandbox", tag = "sandboxes",
    request_body = CreateRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same key gives the same sandbox")),
    responses((status = 201, description = "It is running", body = SandboxInfo)))]
pub async fn create(
    Plane(plane): Plane,
    For(account): For,
    headers: HeaderMap,
    Content(request): Content<CreateRequest>,
) -> Result<Response, Problem> {
    restricted::check_create(&plane, &headers, &request)?;
    let asked = asked(account, &headers)?;
    Ok(long(&headers, StatusCode::CREATED, |progress| async move { plane.create(request, asked, progress).await })
        .await)
}

/// Stopped and failed sandboxes.
#[utoipa::path(get, path = "/sandboxes/inactive", operation_id = "list_inactive_sandboxes", tag = "sandboxes",
    responses((status = 200, description = "Newest first", body = Vec<SandboxInfo>)))]
pub async fn inactive(plane: Plane, account: Whose, headers: HeaderMap) -> Result<Response, Problem> {
    let query =
        ListQuery { filter: ListFilter::Stopped, name: None, limit: None, cursor: None, since: None, ids: None };
    list(plane, account, headers, Params(query)).await
}

/// One sandbox; also one that was removed within the last day.
#[utoipa::path(get, path = "/sandboxes/{id}", operation_id = "get_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "The sandbox", body = SandboxInfo)))]
pub async fn get(Plane(plane): Plane, Who(who): Who, headers: HeaderMap) -> Result<Json<SandboxInfo>, Problem> {
    let info = plane.get(&who).await?;
    Ok(Json(if restricted::is_restricted(&headers) { info.without_values() } else { info }))
}

/// Destroys a sandbox with its disk and URLs. Removing a removed one succeeds.
#[utoipa::path(delete, path = "/sandboxes/{id}", operation_id = "remove_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Gone", body = SandboxInfo)))]
pub async fn remove(Plane(plane): Plane, Who(who): Who) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(to_its_end(async move { Arc::clone(&plane).remove(&who).await }).await?))
}

/// Ends the VM and keeps the disk. Stopping a stopped one succeeds.
#[utoipa::path(post, path = "/sandboxes/{id}/stop", operation_id = "stop_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Stopped", body = SandboxInfo)))]
pub async fn stop(Plane(plane): Plane, Who(who): Who) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(to_its_end(async move { Arc::clone(&plane).stop(&who).await }).await?))
}

/// Goes on from the disk and runs the start command again. Starting a running one succeeds.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/sandboxes/{id}/start", operation_id = "start_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running", body = SandboxInfo)))]
pub async fn start(Plane(plane): Plane, Who(who): Who, headers: HeaderMap) -> Response {
    long(&headers, StatusCode::OK, |progress| async move { plane.start(&who, progress).await }).await
}

/// Stop, then start.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/sandboxes/{id}/restart", operation_id = "restart_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running", body = SandboxInfo)))]
pub async fn restart(Plane(plane): Plane, Who(who): Who, headers: HeaderMap) -> Response {
    long(&headers, StatusCode::OK, |progress| async move { plane.restart(&who, progress).await }).await
}

/// Another size class, with which a running sandbox is started again, or a larger disk, with which it goes on.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/sandboxes/{id}/resize", operation_id = "resize_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ResizeRequest,
    responses((status = 200, description = "It has that size", body = SandboxInfo)))]
pub async fn resize(
    Plane(plane): Plane,
    Who(who): Who,
    headers: HeaderMap,
    Content(request): Content<ResizeRequest>,
) -> Response {
    long(&headers, StatusCode::OK, |progress| async move { plane.resize(&who, &request, progress).await }).await
}

/// Keeps a copy of the disk as it is now, in place of the one before.
#[utoipa::path(post, path = "/sandboxes/{id}/checkpoint", operation_id = "checkpoint_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Kept", body = SandboxInfo)))]
pub async fn checkpoint(Plane(plane): Plane, Who(who): Who) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(plane.checkpoint(&who).await?))
}

/// Goes back to the checkpoint: stops, puts the disk back, starts.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/sandboxes/{id}/restore", operation_id = "restore_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running", body = SandboxInfo)))]
pub async fn restore(Plane(plane): Plane, Who(who): Who, headers: HeaderMap) -> Response {
    long(&headers, StatusCode::OK, |progress| async move { plane.restore(&who, progress).await }).await
}

/// Sets the time-to-live anew, from now on.
#[utoipa::path(post, path = "/sandboxes/{id}/ttl", operation_id = "set_sandbox_ttl", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = TtlRequest,
    responses((status = 200, description = "Set", body = SandboxInfo)))]
pub async fn set_ttl(
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<TtlRequest>,
) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(plane.set_ttl(&who, request.ttl_seconds).await?))
}

/// Sets whether it is started again when it ended by itself.
#[utoipa::path(post, path = "/sandboxes/{id}/restart-policy", operation_id = "set_restart_policy", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = RestartPolicyRequest,
    responses((status = 200, description = "Set", body = SandboxInfo)))]
pub async fn set_restart_policy(
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<RestartPolicyRequest>,
) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(plane.set_restart_policy(&who, request.restart).await?))
}

/// Puts an archive's content in place of everything in a directory of a running sandbox: all of it, or nothing changes.
#[utoipa::path(post, path = "/sandboxes/{id}/replace-mount", operation_id = "replace_mount", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ReplaceMountRequest,
    responses((status = 200, description = "Replaced", body = SandboxInfo)))]
pub async fn replace_mount(
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<ReplaceMountRequest>,
) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(to_its_end(async move { plane.replace_mount(&who, request).await }).await?))
}

/// Mounts a directory of the daemon's host into a sandbox: at once where it runs, else when it starts.
///
/// Over TCP it needs the token that `heyvm --api` made at its start, as does a create with mounts.
#[utoipa::path(post, path = "/sandboxes/{id}/mounts", operation_id = "add_mount", tag = "sandboxes",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = Mount,
    responses((status = 200, description = "Mounted", body = SandboxInfo)))]
pub async fn add_mount(
    Plane(plane): Plane,
    Who(who): Who,
    Content(mount): Content<Mount>,
) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(plane.add_mount(&who, mount).await?))
}
