//! `deploy` and `create`.

use std::collections::BTreeMap;

use futures::StreamExt;
use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{CreateRequest, SandboxInfo},
    system::ArchiveInfo,
};
use tokio_util::io::ReaderStream;

use super::{Context, Outcome};
use crate::{
    cli::{CreateArgs, DeployArgs, MakeArgs},
    output, pack,
    progress::Progress,
};

/// A directory becomes a running VM with a URL.
pub async fn deploy(context: &Context, args: DeployArgs) -> Outcome {
    let mut request = request(&args.make, args.port)?;
    // Everything that can be refused here is, before a VM is thought of.
    let archive = pack::pack(&args.directory, args.no_ignore)?;
    let client = context.client().await?;
    let bytes = ReaderStream::new(tokio::fs::File::from_std(archive)).map(|piece| piece);
    let uploaded: ArchiveInfo = client.put("/archives", "application/gzip", bytes).await?;
    request.archive_id = Some(uploaded.archive_id);
    make(context, &client, request, &args.make).await
}

/// A sandbox without an app.
pub async fn create(context: &Context, args: CreateArgs) -> Outcome {
    let request = request(&args.make, args.open_port)?;
    let client = context.client().await?;
    make(context, &client, request, &args.make).await
}

async fn make(
    context: &Context,
    client: &heyvm_api::client::Client,
    request: CreateRequest,
    args: &MakeArgs,
) -> Outcome {
    let mut progress = Progress::new();
    let key = args.idempotency_key.as_deref();
    let made = client.post_with_progress("/sandboxes", &request, key, |event| progress.tell(&event)).await;
    drop(progress);
    let info: SandboxInfo = made?;
    for warning in &info.warnings {
        output::note(warning);
    }
    if args.print_id {
        output::line(&info.id);
        return Ok(0);
    }
    output::answer(context.format, &info, || {
        let mut lines = vec![format!("{} is {} ({})", info.name, super::inspect::word(&info.status), info.id)];
        lines.extend(info.urls.iter().map(|url| format!("  {} -> port {}", url.url, url.port)));
        lines.join("\n")
    });
    Ok(0)
}

fn request(args: &MakeArgs, ports: Vec<i64>) -> Result<CreateRequest, ApiError> {
    if !args.mount.is_empty() || !args.volume.is_empty() {
        return Err(ApiError::new(ErrorCode::Unsupported, "--mount and --volume are not part of this version")
            .hint("deploy the directory, or copy it in with heyvm cp"));
    }
    for port in &ports {
        names::check_port(*port)?;
    }
    if let Some(name) = &args.name {
        names::check_name(name)?;
    }
    if let Some(class) = &args.size_class {
        names::parse_size_class(class)?;
    }
    let env = args.env.iter().map(|text| names::parse_env(text)).collect::<Result<BTreeMap<_, _>, _>>()?;
    let health_timeout = names::parse_duration("--health-timeout", &args.health_timeout)?;
    Ok(CreateRequest {
        name: args.name.clone(),
        slug: args.slug.clone(),
        sandbox_type: args.kind.clone(),
        image: args.image.clone(),
        backend_type: args.backend.clone(),
        region: args.region.clone(),
        ttl_seconds: args.ttl_seconds,
        start_command: args.start_command.clone(),
        working_directory: args.working_directory.clone(),
        open_ports: ports,
        is_public: args.private.then_some(false),
        env_vars: env,
        setup_hooks: args.setup_hook.clone(),
        mounts: Vec::new(),
        size_class: args.size_class.clone(),
        disk_size_gb: args.disk_size_gb,
        archive_id: None,
        health_path: args.health_path.clone(),
        health_timeout_seconds: Some(health_timeout.as_secs_f64()),
        keep_on_failure: args.keep_on_failure,
        replace: args.replace,
    })
}
