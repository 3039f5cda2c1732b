//! VMs and disks that no record names: listed, and taken up again.

use axum::Json;
use heyvm_api::{
    orphans::{OrphanInfo, RecoverRequest},
    sandbox::SandboxInfo,
};

use crate::{
    extract::{Content, For, Plane, Who},
    problem::Problem,
};

/// VMs and disks that no record names, as after the daemon's store was lost. `DELETE /sandboxes/{id}` removes one.
#[utoipa::path(get, path = "/orphans", operation_id = "list_orphans", tag = "sandboxes",
    responses((status = 200, description = "They stay until they are recovered or removed", body = Vec<OrphanInfo>)))]
pub async fn list(Plane(plane): Plane, For(account): For) -> Result<Json<Vec<OrphanInfo>>, Problem> {
    account.must_be_owner("listing orphans")?;
    Ok(Json(plane.orphans().await?))
}

/// Makes an orphan a sandbox again: running where its VM runs, else stopped.
#[utoipa::path(post, path = "/sandboxes/{id}/recover", operation_id = "recover_sandbox", tag = "sandboxes",
    params(("id" = String, Path, description = "The orphan's id")), request_body = RecoverRequest,
    responses((status = 200, description = "A sandbox again", body = SandboxInfo)))]
pub async fn recover(
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<RecoverRequest>,
) -> Result<Json<SandboxInfo>, Problem> {
    Ok(Json(plane.recover(&who, request).await?))
}
