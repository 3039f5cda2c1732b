//! `deploy` and `create`.

use std::{collections::BTreeMap, fs::File, path::PathBuf};

use futures::TryStreamExt;
use heyvm_api::{
    ApiError, ErrorCode,
    client::Client,
    names,
    sandbox::{CreateRequest, SandboxInfo},
    system::{ArchiveInfo, ProgressEvent},
};
use serde_json::json;
use tokio_util::io::ReaderStream;

use super::{Context, Outcome, bind::parse_port, completions, encoded, list::word, mount};
use crate::{
    archive,
    output::{self, Format},
    progress::Progress,
};

/// What deploy and create have alike.
#[derive(Debug, clap::Args)]
pub struct MakeArgs {
    /// Name; unique among living sandboxes
    #[arg(short, long)]
    pub name: Option<String>,
    /// URL-safe name; made from the name when absent
    #[arg(long)]
    pub slug: Option<String>,
    /// Image, for example ubuntu:24.04
    #[arg(long, add = completions::images())]
    pub image: Option<String>,
    /// What the image must have: shell, python, node, or full (compilers)
    #[arg(long = "type")]
    pub kind: Option<String>,
    /// VM backend [possible values: qemu]
    #[arg(long)]
    pub backend: Option<String>,
    /// Long-running process to keep the sandbox alive
    #[arg(long)]
    pub start_command: Option<String>,
    /// Directory of commands
    #[arg(short, long)]
    pub working_directory: Option<String>,
    /// HTTP path to poll for readiness
    #[arg(long)]
    pub health_path: Option<String>,
    /// How long to wait for readiness
    #[arg(long, default_value = "120s")]
    pub health_timeout: String,
    /// micro, mini, small, medium, large or xlarge
    #[arg(long, add = completions::size_classes())]
    pub size_class: Option<String>,
    /// Disk in GB, 1 to 250
    #[arg(long, allow_negative_numbers = true)]
    pub disk_size_gb: Option<i64>,
    /// US or EU: where it is to run; refused where there is no such region
    #[arg(long)]
    pub region: Option<String>,
    /// Environment variable KEY=VALUE (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub env: Vec<String>,
    /// Shell command to run before the start command (repeatable)
    #[arg(long)]
    pub setup_hook: Vec<String>,
    /// Destroy it after this many seconds
    #[arg(long, conflicts_with = "no_ttl", allow_negative_numbers = true)]
    pub ttl_seconds: Option<i64>,
    /// Keep it until it is removed (the default)
    #[arg(long)]
    pub no_ttl: bool,
    /// Require authentication on bound ports: they answer members of your account alone (needs a server: heyvm login)
    #[arg(long)]
    pub private: bool,
    /// Let the sandbox use a directory of this machine, live; with :ro behind it for reading alone (repeatable)
    #[arg(short = 'v', long, value_name = "HOST:SANDBOX")]
    pub mount: Vec<String>,
    /// Mount a volume (refused: not in this version)
    #[arg(long)]
    pub volume: Vec<String>,
    /// Keep the half-made sandbox when a step fails
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Take over name and URLs of the living sandbox of this name, once this one is healthy
    #[arg(long)]
    pub replace: bool,
    /// The same key gives the same sandbox: safe to repeat
    #[arg(long)]
    pub idempotency_key: Option<String>,
    /// Print the id alone
    #[arg(long)]
    pub print_id: bool,
}

/// `deploy`.
#[derive(Debug, clap::Args)]
pub struct DeployArgs {
    /// Directory with the app
    pub directory: PathBuf,
    /// Port to expose publicly, at a URL of its own (repeatable)
    #[arg(short, long, allow_negative_numbers = true)]
    pub port: Vec<String>,
    /// Take also what .gitignore, .heyvmignore and the default list leave out
    #[arg(long)]
    pub no_ignore: bool,
    #[command(flatten)]
    pub make: MakeArgs,
}

/// `create`.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Port to expose publicly, at a URL of its own (repeatable)
    #[arg(short = 'p', long, visible_alias = "port", allow_negative_numbers = true)]
    pub open_port: Vec<String>,
    #[command(flatten)]
    pub make: MakeArgs,
}

/// A directory becomes a running VM with a URL.
pub async fn deploy(context: &Context, args: DeployArgs) -> Outcome {
    let mut request = request(context, &args.make, &args.port)?;
    // Everything that can be refused here is, before a VM is thought of.
    let progress = Progress::new(format!("packing {}", args.directory.display()));
    let archive = archive::pack(&args.directory, args.no_ignore, |done| progress.line().moved("packing", done))?;
    drop(progress);
    let client = context.client().await?;
    request.archive_id = Some(send(&client, archive, None).await?.archive_id);
    make(context, &client, request, &args.make).await
}

/// A sandbox without an app.
pub async fn create(context: &Context, args: CreateArgs) -> Outcome {
    let request = request(context, &args.make, &args.open_port)?;
    let client = context.client().await?;
    make(context, &client, request, &args.make).await
}

/// Passes an archive on to whoever makes sandboxes of it; one with a name is kept.
pub(super) async fn send(client: &Client, archive: File, name: Option<&str>) -> Result<ArchiveInfo, ApiError> {
    let total = archive.metadata().ok().map(|meta| meta.len());
    let progress = Progress::new("passing the archive on");
    let (line, mut sent) = (progress.line(), 0);
    let bytes = ReaderStream::new(tokio::fs::File::from_std(archive)).inspect_ok(move |piece| {
        sent += piece.len() as u64;
        let message = "passing the archive on".into();
        line.tell(&ProgressEvent { step: "archive".into(), message, done: Some(sent), total });
    });
    let path = name.map_or_else(|| "/archives".into(), |name| format!("/archives?name={}", encoded(name)));
    client.put(&path, "application/gzip", bytes).await
}

async fn make(context: &Context, client: &Client, request: CreateRequest, args: &MakeArgs) -> Outcome {
    let progress = Progress::new("making the sandbox");
    let key = args.idempotency_key.as_deref();
    let made = client.post_with_progress("/sandboxes", &request, key, |event| progress.tell(&event)).await;
    drop(progress);
    let info: SandboxInfo = made?;
    for warning in &info.warnings {
        output::note(warning);
    }
    if args.print_id {
        match context.format {
            Format::Text => output::line(&info.id),
            Format::Json => output::json(&json!({"id": info.id})),
        }
        return Ok(0);
    }
    output::answer(context.format, &info, || {
        let mut lines = vec![format!("{} is {} ({})", info.name, word(&info.status), info.id)];
        lines.extend(info.urls.iter().map(|url| format!("  {} -> port {}", url.url, url.port)));
        lines.join("\n")
    });
    Ok(0)
}

/// What no daemon of this version can give, before anything is packed or uploaded.
fn supported(context: &Context, args: &MakeArgs) -> Result<(), ApiError> {
    let unsupported = |what: &str, hint: &str| Err(ApiError::new(ErrorCode::Unsupported, what).hint(hint));
    if !args.volume.is_empty() {
        return unsupported(
            "--volume: there are no volumes in this version",
            "stop keeps a sandbox's disk; heyvm cp copies",
        );
    }
    if args.private && context.cloud.is_none() {
        let hint = "log in to one with heyvm login, or leave --private out";
        return unsupported("--private: only a heyvm server knows whom to let in", hint);
    }
    Ok(())
}

fn request(context: &Context, args: &MakeArgs, ports: &[String]) -> Result<CreateRequest, ApiError> {
    supported(context, args)?;
    let ports = ports.iter().map(|text| parse_port(text).map(i64::from)).collect::<Result<_, _>>()?;
    if let Some(name) = &args.name {
        names::check_name(name)?;
    }
    if let Some(slug) = &args.slug {
        names::check_slug(slug)?;
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
        mounts: args.mount.iter().map(|text| mount::parse(text)).collect::<Result<_, _>>()?,
        size_class: args.size_class.clone(),
        disk_size_gb: args.disk_size_gb,
        archive_id: None,
        archive_root: None,
        health_path: args.health_path.clone(),
        health_timeout_seconds: Some(health_timeout.as_secs_f64()),
        keep_on_failure: args.keep_on_failure,
        replace: args.replace,
    })
}
