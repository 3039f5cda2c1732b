//! Images and guest kernels on the daemon's machine.

use axum::{Json, extract::Path, response::Response};
use heyvm_api::images::{
    ImageInfo, ImportRequest, KernelInfo, KernelRequest, PruneRequest, PruneResponse, PullRequest,
};
use http::{HeaderMap, StatusCode};

use crate::{
    answer::{long, to_its_end},
    extract::{Content, For, Plane},
    problem::Problem,
};

/// Images here.
#[utoipa::path(get, path = "/images", operation_id = "list_images", tag = "images",
    responses((status = 200, description = "All of them", body = Vec<ImageInfo>)))]
pub async fn list(Plane(plane): Plane, For(account): For) -> Result<Json<Vec<ImageInfo>>, Problem> {
    Ok(Json(plane.images(&account).await?))
}

/// Fetches an image from its registry.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/images/pull", operation_id = "pull_image", tag = "images", request_body = PullRequest,
    responses((status = 200, description = "It is here", body = ImageInfo)))]
pub async fn pull(
    Plane(plane): Plane,
    For(account): For,
    headers: HeaderMap,
    Content(request): Content<PullRequest>,
) -> Response {
    long(&headers, StatusCode::OK, |progress| async move { plane.pull_image(request, &account, progress).await }).await
}

/// Removes images that no sandbox uses.
///
/// The default image stays, and what was imported, unless `all` is set.
#[utoipa::path(post, path = "/images/prune", operation_id = "prune_images", tag = "images", request_body = PruneRequest,
    responses((status = 200, description = "They are gone", body = PruneResponse)))]
pub async fn prune(
    Plane(plane): Plane,
    For(account): For,
    Content(request): Content<PruneRequest>,
) -> Result<Json<PruneResponse>, Problem> {
    account.must_be_owner("removing images")?;
    Ok(Json(to_its_end(async move { plane.prune_unused_images(request).await }).await?))
}

/// Takes an image from a file on the daemon's machine.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/images/import", operation_id = "import_image", tag = "images",
    request_body = ImportRequest, responses((status = 200, description = "It is here", body = ImageInfo)))]
pub async fn import(
    Plane(plane): Plane,
    For(account): For,
    headers: HeaderMap,
    Content(request): Content<ImportRequest>,
) -> Result<Response, Problem> {
    account.must_be_owner("importing an image")?;
    Ok(long(&headers, StatusCode::OK, |progress| async move { plane.import_image(request, progress).await }).await)
}

/// Makes sure that the guest kernel, the default image and its template are there.
///
/// With `Accept: text/event-stream` the answer is a stream of events, as for `create_sandbox`.
#[utoipa::path(post, path = "/images/prepare", operation_id = "prepare_default_image", tag = "images",
    responses((status = 200, description = "The default image", body = ImageInfo)))]
pub async fn prepare(Plane(plane): Plane, For(account): For, headers: HeaderMap) -> Result<Response, Problem> {
    account.must_be_owner("preparing the default image")?;
    Ok(long(&headers, StatusCode::OK, |progress| async move { plane.prepare_default(progress).await }).await)
}

/// Removes an image that no sandbox runs.
#[utoipa::path(delete, path = "/images/{*name}", operation_id = "remove_image", tag = "images",
    params(("name" = String, Path, description = "Its reference; slashes may stand as they are")),
    responses((status = 204, description = "Gone")))]
pub async fn remove(Plane(plane): Plane, For(account): For, Path(name): Path<String>) -> Result<StatusCode, Problem> {
    account.must_be_owner("removing an image")?;
    plane.remove_image(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a guest kernel from an unpacked package on the daemon's machine.
#[utoipa::path(post, path = "/kernels/import", operation_id = "import_kernel", tag = "images",
    request_body = KernelRequest, responses((status = 200, description = "It is here", body = KernelInfo)))]
pub async fn import_kernel(
    Plane(plane): Plane,
    For(account): For,
    Content(request): Content<KernelRequest>,
) -> Result<Json<KernelInfo>, Problem> {
    account.must_be_owner("importing a kernel")?;
    let version = plane.import_kernel(&request.path).await?;
    Ok(Json(KernelInfo { version }))
}
