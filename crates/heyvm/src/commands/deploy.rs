//! `deploy` and `create`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use heyvm_api::{
    ApiError, ErrorCode,
    client::Client,
    names,
    sandbox::{CreateRequest, RestartPolicy, SandboxInfo},
    system::ArchiveInfo,
};
use heyvm_bounded_tar::Problem;
use serde_json::json;

use super::{Context, Outcome, bind::parse_port, completions, encoded, list::word, mount};
use crate::{
    archive::{self, Compressor, Limits, Plan},
    outgoing::{self, Outgoing},
    output::{self, Format},
    progress::Progress,
};

/// What `--restart` takes.
pub(super) const RESTART_POLICIES: [&str; 3] = ["never", "on-failure", "always"];

/// The policy of this name.
pub(super) fn restart_policy(name: &str) -> Option<RestartPolicy> {
    [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always].into_iter().find(|one| one.as_str() == name)
}

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
    /// Time that an app may take to begin its answer, for example 10m
    #[arg(long, value_name = "DURATION")]
    pub response_timeout: Option<String>,
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
    /// Start it again when it ended by itself: never (the default), on-failure or always
    #[arg(long, value_name = "POLICY", value_parser = RESTART_POLICIES)]
    pub restart: Option<String>,
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
    let plan = plan(context, &args.directory, args.no_ignore)?;
    let client = context.client().await?;
    request.archive_id = Some(send(context, &client, plan, None).await?.archive_id);
    make(context, &client, request, &args.make).await
}

/// A sandbox without an app.
pub async fn create(context: &Context, args: CreateArgs) -> Outcome {
    let request = request(context, &args.make, &args.open_port)?;
    let client = context.client().await?;
    make(context, &client, request, &args.make).await
}

/// Looks through a directory that is to be sent; says what of it is ignored.
pub(super) fn plan(context: &Context, directory: &Path, no_ignore: bool) -> Result<Plan, ApiError> {
    let progress = Progress::new(format!("looking through {}", directory.display()));
    let plan = Plan::of(directory, no_ignore);
    drop(progress);
    let plan = plan?;
    if context.cloud.is_some() {
        plan.check(&Limits::STANDARD)?;
    }
    if let Some(note) = plan.ignored() {
        output::note(&note);
    }
    Ok(plan)
}

/// Sends a directory as an archive while it is packed; one with a name is kept.
pub(super) async fn send(
    context: &Context,
    client: &Client,
    plan: Plan,
    name: Option<&str>,
) -> Result<ArchiveInfo, ApiError> {
    let progress = Progress::new("packing");
    let line = progress.line();
    let (outgoing, body) = outgoing::pipe();
    let compression = context.compression();
    let packing = tokio::task::spawn_blocking(move || {
        let mut packed = Compressor::new(compression, outgoing).map_err(Problem::Output)?;
        let note = plan.write(&mut packed, |bytes| line.moved("packing", bytes))?;
        packed.finish().and_then(Outgoing::finish).map_err(Problem::Output)?;
        Ok::<_, Problem>(note)
    });
    let sent = client.put(&archives_path(name), "application/gzip", body).await;
    let packed = packing.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    drop(progress);
    match (packed, sent) {
        // The server has said why it takes no more.
        (Err(Problem::Output(_)) | Ok(_), Err(error)) => Err(error),
        (Err(problem), _) => Err(archive::refuse(&problem)),
        (Ok(note), Ok(kept)) => {
            note.iter().for_each(|note| output::note(note));
            Ok(kept)
        }
    }
}

/// Where archives are sent to.
pub(super) fn archives_path(name: Option<&str>) -> String {
    name.map_or_else(|| "/archives".into(), |name| format!("/archives?name={}", encoded(name)))
}

async fn make(context: &Context, client: &Client, request: CreateRequest, args: &MakeArgs) -> Outcome {
    // Programs read standard error as errors in JSON: nothing else goes there.
    let progress = match context.format {
        Format::Text => Progress::streaming("making the sandbox"),
        Format::Json => Progress::new("making the sandbox"),
    };
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

/// In whole seconds, rounded up.
fn response_timeout(text: &str) -> Result<i64, ApiError> {
    let seconds = names::parse_duration("--response-timeout", text)?.as_secs_f64().ceil();
    Ok(seconds as i64)
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
        start_command: args.start_command.clone().map(Into::into),
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
        response_timeout_seconds: args.response_timeout.as_deref().map(response_timeout).transpose()?,
        keep_on_failure: args.keep_on_failure,
        restart: args.restart.as_deref().and_then(restart_policy),
        replace: args.replace,
    })
}
