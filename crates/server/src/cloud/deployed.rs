//! The cloud API that existing clients speak: `/sandbox-deploy`, `/deployed-sandboxes`, `/sandbox`, `/proxy-endpoints`,
//! `/public-images`. Each call is one of the cloud's own in other words.

use std::collections::BTreeMap;

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use heyvm_api::{
    ApiError, ErrorCode,
    exec::ExecRequest,
    images::ImageInfo,
    sandbox::{
        BindRequest, CreateRequest, Endpoint, ListFilter, ReasonCode, ReplaceMountRequest, ResizeRequest, SandboxInfo,
        Status,
    },
    start_command::StartCommand,
};
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Full};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Served, forward,
    identity::{Caller, Named},
    local::{self, Told},
};
use crate::{
    answer::to_its_end,
    extract::{Content, Params},
    listing::{page, page_size},
    problem::Problem,
};

/// What clients call the one kind of machine there is.
const DRIVERS: [&str; 5] = ["qemu", "kvm", "libvirt", "firecracker", "firecracker_containerd"];

/// Every call of this API.
pub fn routes() -> OpenApiRouter<Served> {
    OpenApiRouter::new()
        .routes(routes!(deploy))
        .routes(routes!(list))
        .routes(routes!(get, remove))
        .routes(routes!(restart))
        .routes(routes!(set_ttl))
        .routes(routes!(resize))
        .routes(routes!(checkpoint))
        .routes(routes!(restore))
        .routes(routes!(replace_mount))
        .routes(routes!(exec))
        .routes(routes!(read_file))
        .routes(routes!(write_file))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(status))
        .routes(routes!(bind))
        .routes(routes!(public_images))
}

/// Body of `POST /sandbox-deploy`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeployRequest {
    /// Unique among the account's living sandboxes; made up when absent.
    name: Option<String>,
    /// Unpacked to the working directory.
    archive_id: Option<String>,
    /// `US` or `EU`.
    region: Option<String>,
    /// `qemu`, `kvm`, `libvirt`, `firecracker` or `firecracker_containerd`: all of them mean a full VM.
    driver: Option<String>,
    /// Image reference; `ubuntu:24.04` when absent.
    image: Option<String>,
    /// Supervised; when it ends, the sandbox ends. A string is a script for `sh -c`, an array a program and its arguments.
    start_command: Option<StartCommand>,
    /// Ports to bind.
    open_ports: Vec<i64>,
    /// Whether the ports are bound without authentication; default true.
    is_public: Option<bool>,
    /// Seconds until it is destroyed; 0 or absent: never, or the account's ceiling.
    ttl_seconds: Option<i64>,
    /// 1 to 250; 10 when absent.
    disk_size_gb: Option<i64>,
    /// `/workspace` when absent.
    working_directory: Option<String>,
    /// Environment of every command.
    env_vars: Option<BTreeMap<String, String>>,
    /// Run in order after the archive is unpacked.
    setup_hooks: Option<Vec<String>>,
    /// `micro` … `xlarge`; `small` when absent.
    size_class: Option<String>,
    /// HTTP path on the first port that must answer 2xx or 3xx before the sandbox counts as running.
    health_path: Option<String>,
    /// How long that may take; 120 when absent.
    health_timeout_seconds: Option<f64>,
    /// Seconds that the app may take until the head of an answer, 1 to 86400; 60 when absent.
    response_timeout_seconds: Option<i64>,
}

impl DeployRequest {
    fn into_create(self) -> Result<CreateRequest, Problem> {
        if let Some(driver) = self.driver.as_deref().filter(|driver| !DRIVERS.contains(driver)) {
            let hint = format!("use one of {}, or leave it out", DRIVERS.join(", "));
            return Err(ApiError::new(ErrorCode::InvalidArgument, format!("there is no driver {driver:?}"))
                .hint(hint)
                .into());
        }
        Ok(CreateRequest {
            name: self.name,
            archive_id: self.archive_id,
            region: self.region,
            image: self.image,
            start_command: self.start_command,
            open_ports: self.open_ports,
            is_public: self.is_public,
            ttl_seconds: self.ttl_seconds.filter(|ttl| *ttl != 0),
            disk_size_gb: self.disk_size_gb,
            working_directory: self.working_directory,
            env_vars: self.env_vars.unwrap_or_default(),
            setup_hooks: self.setup_hooks.unwrap_or_default(),
            size_class: self.size_class,
            health_path: self.health_path,
            health_timeout_seconds: self.health_timeout_seconds,
            response_timeout_seconds: self.response_timeout_seconds,
            ..CreateRequest::default()
        })
    }
}

/// Answer of `POST /sandbox-deploy`.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeployResponse {
    /// Its id.
    id: String,
    /// Its name.
    name: String,
    /// `provisioning`: ask for it until it is `running`, or `failed` with an `error_message`.
    status: Status,
    /// The archive it is made from.
    archive_id: Option<String>,
}

/// Makes a sandbox; answers at once, while it is being made.
#[utoipa::path(post, path = "/sandbox-deploy", operation_id = "cloud_deploy", tag = "cloud", request_body = DeployRequest,
    responses((status = 201, description = "It is being made", body = DeployResponse)))]
async fn deploy(
    State(served): State<Served>,
    Caller(identity): Caller,
    Content(request): Content<DeployRequest>,
) -> Result<(StatusCode, Json<DeployResponse>), Problem> {
    let archive_id = request.archive_id.clone();
    let begun = served.cloud.begin(&identity.account_id, request.into_create()?, None).await?;
    let (id, name) = (begun.id().to_owned(), begun.name().to_owned());
    let cloud = served.cloud.clone();
    tokio::spawn(async move {
        // What becomes of it is written down; nobody waits for the answer.
        if let Err(error) = cloud.carry_out(begun, mpsc::unbounded_channel().0).await {
            tracing::debug!(%error, "a sandbox could not be made");
        }
    });
    Ok((StatusCode::CREATED, Json(DeployResponse { id, name, status: Status::Provisioning, archive_id })))
}

/// Query of the list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct NameQuery {
    /// Only the one with exactly this name.
    name: Option<String>,
    /// How many at most: 1 to 500, the default.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// Where to go on: the `heyvm-next-cursor` of the last page.
    cursor: Option<String>,
}

/// The account's sandboxes that are not gone, newest first.
///
/// A page holds up to 500, and up to 8 MiB. The header `heyvm-next-cursor` says that there are more: send it as `cursor`.
#[utoipa::path(get, path = "/deployed-sandboxes", operation_id = "cloud_list", tag = "cloud", params(NameQuery),
    responses((status = 200, description = "Those asked for", body = Vec<SandboxInfo>)))]
async fn list(
    State(served): State<Served>,
    Caller(identity): Caller,
    Params(query): Params<NameQuery>,
) -> Result<Response, Problem> {
    let size = page_size(query.limit)?;
    let asked =
        heyvm_cloud::ListQuery { filter: ListFilter::All, with_removed: false, name: query.name, after: query.cursor };
    page(served.cloud.list(&identity.account_id, &asked, size).await?, size, None)
}

/// One sandbox.
#[utoipa::path(get, path = "/deployed-sandboxes/{id}", operation_id = "cloud_get", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "The sandbox", body = SandboxInfo)))]
async fn get(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let info = served.cloud.get(&identity.account_id, &who).await?;
    Ok(Json(not_gone(local::visible(&identity, info), &who)?))
}

/// One that could not be made is `failed`; one that was removed is not there.
fn not_gone(info: SandboxInfo, who: &str) -> Result<SandboxInfo, ApiError> {
    let failed = info.reason.as_ref().is_some_and(|reason| reason.code == ReasonCode::FailedStep);
    match info.status {
        Status::Removed if failed => Ok(SandboxInfo { status: Status::Failed, ..info }),
        Status::Removed => Err(ApiError::new(ErrorCode::SandboxNotFound, format!("sandbox {who} was removed"))
            .hint("GET /deployed-sandboxes lists those that are there")),
        _ => Ok(info),
    }
}

/// Destroys a sandbox with its disk and URLs.
#[utoipa::path(delete, path = "/deployed-sandboxes/{id}", operation_id = "cloud_remove", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Gone", body = SandboxInfo)))]
async fn remove(served: State<Served>, caller: Caller, who: Named) -> Told {
    local::remove(served, caller, who).await
}

/// Stop, then start.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/restart", operation_id = "cloud_restart", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running", body = SandboxInfo)))]
async fn restart(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    let restarted = async move { cloud.restart(&identity.account_id, &who, mpsc::unbounded_channel().0).await };
    Ok(Json(to_its_end(restarted).await?))
}

/// Body of `POST /deployed-sandboxes/{id}/ttl`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TtlBody {
    /// Seconds from now; 0: never, or the account's ceiling.
    ttl_seconds: i64,
}

/// Sets the time-to-live anew, from now on.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/ttl", operation_id = "cloud_set_ttl", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = TtlBody,
    responses((status = 200, description = "Set", body = SandboxInfo)))]
async fn set_ttl(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(body): Content<TtlBody>,
) -> Told {
    let ttl = Some(body.ttl_seconds).filter(|ttl| *ttl != 0);
    Ok(Json(served.cloud.set_ttl(&identity.account_id, &who, ttl).await?))
}

/// Another size class, or a larger disk.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/resize", operation_id = "cloud_resize", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ResizeRequest,
    responses((status = 200, description = "Resized", body = SandboxInfo)))]
async fn resize(served: State<Served>, caller: Caller, who: Named, request: Content<ResizeRequest>) -> Told {
    local::resize(served, caller, who, request).await
}

/// Keeps a copy of the disk as it is now.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/checkpoint", operation_id = "cloud_checkpoint", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Kept", body = SandboxInfo)))]
async fn checkpoint(served: State<Served>, caller: Caller, who: Named) -> Told {
    local::checkpoint(served, caller, who).await
}

/// Goes back to the copy.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/restore", operation_id = "cloud_restore", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running from the copy", body = SandboxInfo)))]
async fn restore(served: State<Served>, caller: Caller, who: Named) -> Told {
    local::restore(served, caller, who).await
}

/// Puts an archive's content in place of a directory.
#[utoipa::path(post, path = "/deployed-sandboxes/{id}/replace-mount", operation_id = "cloud_replace_mount", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ReplaceMountRequest,
    responses((status = 200, description = "Replaced", body = SandboxInfo)))]
async fn replace_mount(
    served: State<Served>,
    caller: Caller,
    who: Named,
    request: Content<ReplaceMountRequest>,
) -> Told {
    local::replace_mount(served, caller, who, request).await
}

/// Body of `POST /sandbox/{id}/exec`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExecBody {
    /// A script for `sh -c`; with `args`, a program.
    command: String,
    /// Its arguments.
    args: Option<Vec<String>>,
    /// Where it runs.
    cwd: Option<String>,
    /// On top of the sandbox's environment.
    env: Option<BTreeMap<String, String>>,
}

/// Runs a command and answers when it has ended.
#[utoipa::path(post, path = "/sandbox/{id}/exec", operation_id = "cloud_exec", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ExecBody,
    responses((status = 200, description = "It has ended, with whatever exit code", body = heyvm_api::exec::ExecResponse)))]
async fn exec(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(body): Content<ExecBody>,
) -> Result<Response, Problem> {
    let request = ExecRequest {
        command: body.command,
        args: body.args,
        cwd: body.cwd,
        env: body.env.unwrap_or_default(),
        ..ExecRequest::default()
    };
    let bytes = serde_json::to_vec(&request).unwrap_or_default();
    pass_on(&served, &identity.account_id, &who, Method::POST, "/execute", bytes).await
}

/// Body of `POST /sandbox/{id}/read-file`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadBody {
    /// Directory the path is below; `/workspace` when absent.
    mount_path: Option<String>,
    /// Path below it.
    file_path: String,
}

impl ReadBody {
    fn as_query(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("file_path", &self.file_path);
        if let Some(mount_path) = &self.mount_path {
            query.append_pair("mount_path", mount_path);
        }
        query.finish()
    }
}

/// One file, its content in Base64.
#[utoipa::path(post, path = "/sandbox/{id}/read-file", operation_id = "cloud_read_file", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ReadBody,
    responses((status = 200, description = "The file", body = heyvm_api::files::DownloadResponse)))]
async fn read_file(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(body): Content<ReadBody>,
) -> Result<Response, Problem> {
    let path = format!("/files/download?{}", body.as_query());
    pass_on(&served, &identity.account_id, &who, Method::GET, &path, Vec::new()).await
}

/// Writes one file, whole or not at all; directories on the way are made.
#[utoipa::path(post, path = "/sandbox/{id}/write-file", operation_id = "cloud_write_file", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = heyvm_api::files::UploadRequest,
    responses((status = 201, description = "Written", body = heyvm_api::files::UploadResponse)))]
async fn write_file(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    request: Request,
) -> Result<Response, Problem> {
    let place = served.cloud.find(&identity.account_id, &who).await?;
    forward::to(&place, "/files/upload", request, std::future::ready(())).await
}

/// One request of ours, and the region's answer as it comes.
async fn pass_on(
    served: &Served,
    account: &str,
    who: &str,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<Response, Problem> {
    let place = served.cloud.find(account, who).await?;
    let body = Body::new(Full::from(body).map_err(|never| match never {}));
    let request = Request::builder().method(method).header(header::CONTENT_TYPE, "application/json").body(body);
    let request =
        request.map_err(|error| Problem::invalid(error.to_string(), "GET /openapi.json describes every field"))?;
    forward::to(&place, path, request, std::future::ready(())).await
}

/// Goes on from the disk. Starting a running one succeeds.
#[utoipa::path(post, path = "/sandbox/{id}/start", operation_id = "cloud_start", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Running", body = SandboxInfo)))]
async fn start(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    let started = async move { cloud.start(&identity.account_id, &who, mpsc::unbounded_channel().0).await };
    Ok(Json(to_its_end(started).await?))
}

/// Ends the VM and keeps the disk. Stopping a stopped one succeeds.
#[utoipa::path(post, path = "/sandbox/{id}/stop", operation_id = "cloud_stop", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "Stopped", body = SandboxInfo)))]
async fn stop(served: State<Served>, caller: Caller, who: Named) -> Told {
    local::stop(served, caller, who).await
}

/// How a sandbox is.
#[utoipa::path(get, path = "/sandbox/{id}/status", operation_id = "cloud_status", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 200, description = "The sandbox", body = SandboxInfo)))]
async fn status(served: State<Served>, caller: Caller, who: Named) -> Told {
    get(served, caller, who).await
}

/// Body of `POST /proxy-endpoints/for-deployed`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EndpointBody {
    /// The sandbox: id, name or slug.
    sandbox_id: String,
    /// Port in it, 1 to 65535.
    port: i64,
    /// Default true.
    is_public: Option<bool>,
}

/// Gives a port a URL, or makes a bound one public or private.
#[utoipa::path(post, path = "/proxy-endpoints/for-deployed", operation_id = "cloud_bind", tag = "cloud",
    request_body = EndpointBody, responses((status = 201, description = "Bound", body = Endpoint)))]
async fn bind(
    State(served): State<Served>,
    Caller(identity): Caller,
    Content(body): Content<EndpointBody>,
) -> Result<(StatusCode, Json<Endpoint>), Problem> {
    let request = BindRequest { port: body.port, is_public: body.is_public };
    let bound = served.cloud.bind(&identity.account_id, &body.sandbox_id, &request).await?;
    Ok((StatusCode::CREATED, Json(bound.endpoint)))
}

/// Query of the images.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImagesQuery {
    /// Only those that this driver runs.
    backend: Option<String>,
}

/// Images that are ready in the default region.
#[derive(Debug, Serialize, ToSchema)]
pub struct PublicImages {
    /// All of them.
    images: Vec<PublicImage>,
}

/// One image.
#[derive(Debug, Serialize, ToSchema)]
pub struct PublicImage {
    /// What a deploy names it by.
    id: String,
    /// The same.
    name: String,
    /// A few words.
    description: String,
    /// The driver that was asked for, or `qemu`.
    backend_type: String,
    /// `oci`.
    format: String,
    /// Bytes of its root file system.
    size_bytes: u64,
    /// When it came here.
    created_at: DateTime<Utc>,
}

/// Images that are ready; any other one is fetched from its registry by the first deploy that names it.
#[utoipa::path(get, path = "/public-images", operation_id = "cloud_images", tag = "cloud", params(ImagesQuery),
    responses((status = 200, description = "All of them", body = PublicImages)))]
async fn public_images(
    State(served): State<Served>,
    Caller(identity): Caller,
    Params(query): Params<ImagesQuery>,
) -> Result<Response, Problem> {
    let backend = query.backend.unwrap_or_else(|| "qemu".into());
    if !DRIVERS.contains(&backend.as_str()) {
        return Ok(Json(PublicImages { images: Vec::new() }).into_response());
    }
    let found = served.cloud.images(&identity.account_id).await?;
    let image = |image: ImageInfo| PublicImage {
        id: image.name.clone(),
        description: if image.is_default { "what a sandbox runs that names no image".into() } else { image.source },
        name: image.name,
        backend_type: backend.clone(),
        format: "oci".into(),
        size_bytes: image.size_bytes,
        created_at: image.created_at,
    };
    Ok(Json(PublicImages { images: found.into_iter().map(image).collect() }).into_response())
}
