//! The local API's calls whose answers tell of sandboxes: what the command line speaks, for the caller's account.

use std::sync::LazyLock;

use axum::{
    Json,
    extract::{Path, State},
    response::{Html, IntoResponse, Response},
};
use heyvm_accounts::Identity;
use heyvm_api::{
    ApiError, ErrorCode,
    accounts::Scope,
    images::{ImageInfo, PullRequest},
    names,
    sandbox::{
        BindRequest, BoundPort, CreateRequest, ListFilter, ReplaceMountRequest, ResizeRequest, SandboxInfo, TtlRequest,
    },
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::{
    Served,
    identity::{Caller, Named},
};
use crate::{
    answer::{long, to_its_end},
    docs,
    extract::{Content, Params, idempotency_key},
    listing::{page, page_size},
    problem::Problem,
};

/// An answer that tells of one sandbox.
pub(super) type Told = Result<Json<SandboxInfo>, Problem>;

/// Query of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    #[serde(default)]
    filter: ListFilter,
    name: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

pub async fn list(
    State(served): State<Served>,
    Caller(identity): Caller,
    Params(query): Params<ListQuery>,
) -> Result<Response, Problem> {
    let size = page_size(query.limit)?;
    let with_removed = query.filter == ListFilter::All;
    let asked = heyvm_cloud::ListQuery { filter: query.filter, with_removed, name: query.name, after: query.cursor };
    page(served.cloud.list(&identity.account_id, &asked, size).await?, size, None)
}

pub async fn inactive(served: State<Served>, caller: Caller) -> Result<Response, Problem> {
    let query = ListQuery { filter: ListFilter::Stopped, name: None, limit: None, cursor: None };
    list(served, caller, Params(query)).await
}

/// What a caller may see of a sandbox: values of its environment for those alone who may run commands in it.
pub(super) fn visible(identity: &Identity, info: SandboxInfo) -> SandboxInfo {
    if identity.scope >= Scope::Exec { info } else { info.without_values() }
}

pub async fn create(
    State(served): State<Served>,
    Caller(identity): Caller,
    headers: HeaderMap,
    Content(request): Content<CreateRequest>,
) -> Result<Response, Problem> {
    let key = idempotency_key(&headers)?;
    let cloud = served.cloud.clone();
    let made = |progress| async move { cloud.create(&identity.account_id, request, key, progress).await };
    Ok(long(&headers, StatusCode::CREATED, made).await)
}

pub async fn get(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let info = served.cloud.get(&identity.account_id, &who).await?;
    Ok(Json(visible(&identity, info)))
}

pub async fn remove(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.remove(&identity.account_id, &who).await }).await?))
}

pub async fn stop(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.stop(&identity.account_id, &who).await }).await?))
}

pub async fn start(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    headers: HeaderMap,
) -> Response {
    let cloud = served.cloud.clone();
    long(&headers, StatusCode::OK, |progress| async move { cloud.start(&identity.account_id, &who, progress).await })
        .await
}

pub async fn restart(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    headers: HeaderMap,
) -> Response {
    let cloud = served.cloud.clone();
    long(&headers, StatusCode::OK, |progress| async move { cloud.restart(&identity.account_id, &who, progress).await })
        .await
}

pub async fn set_ttl(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(request): Content<TtlRequest>,
) -> Told {
    Ok(Json(served.cloud.set_ttl(&identity.account_id, &who, request.ttl_seconds).await?))
}

pub async fn resize(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(request): Content<ResizeRequest>,
) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.resize(&identity.account_id, &who, &request).await }).await?))
}

pub async fn checkpoint(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.checkpoint(&identity.account_id, &who).await }).await?))
}

pub async fn restore(State(served): State<Served>, Caller(identity): Caller, Named(who): Named) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.restore(&identity.account_id, &who).await }).await?))
}

pub async fn replace_mount(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(request): Content<ReplaceMountRequest>,
) -> Told {
    let cloud = served.cloud.clone();
    Ok(Json(to_its_end(async move { cloud.replace_mount(&identity.account_id, &who, request).await }).await?))
}

pub async fn images(State(served): State<Served>, Caller(identity): Caller) -> Result<Json<Vec<ImageInfo>>, Problem> {
    Ok(Json(served.cloud.images(&identity.account_id).await?))
}

pub async fn pull(
    State(served): State<Served>,
    Caller(identity): Caller,
    headers: HeaderMap,
    Content(request): Content<PullRequest>,
) -> Response {
    let cloud = served.cloud.clone();
    long(&headers, StatusCode::OK, |progress| async move { cloud.pull(&identity.account_id, request, progress).await })
        .await
}

pub async fn document() -> impl IntoResponse {
    Json(super::document())
}

pub async fn docs() -> Html<&'static str> {
    static PAGE: LazyLock<String> = LazyLock::new(|| docs::page_of(&super::document()));
    Html(&PAGE)
}

pub async fn endpoints(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
) -> Result<Json<Vec<BoundPort>>, Problem> {
    Ok(Json(served.cloud.endpoints(&identity.account_id, &who).await?))
}

pub async fn bind(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Content(request): Content<BindRequest>,
) -> Result<(StatusCode, Json<BoundPort>), Problem> {
    Ok((StatusCode::CREATED, Json(served.cloud.bind(&identity.account_id, &who, &request).await?)))
}

/// Query of an unbind.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnbindQuery {
    port: Option<i64>,
}

pub async fn unbind(
    State(served): State<Served>,
    Caller(identity): Caller,
    Named(who): Named,
    Params(query): Params<UnbindQuery>,
) -> Result<StatusCode, Problem> {
    let port = query.port.ok_or_else(|| Problem::invalid("the port is missing", "add ?port=8080"))?;
    served.cloud.unbind(&identity.account_id, &who, names::check_port(port)?.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn unbind_port(
    State(served): State<Served>,
    Caller(identity): Caller,
    Path((who, port)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let number = port.parse::<i64>().map_err(|_| {
        ApiError::new(ErrorCode::InvalidPort, format!("{port:?} is not a port")).hint("ports are 1 to 65535")
    })?;
    served.cloud.unbind(&identity.account_id, &who, names::check_port(number)?.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}
