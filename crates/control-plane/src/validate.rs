//! What may be asked for: a create request becomes a record, or an error that names the field.

use chrono::Utc;
use heyvm_api::{
    ApiError, ErrorCode, limits, names,
    sandbox::{CreateRequest, ResizeRequest, RestartPolicy, SizeClass, Status},
};
use rand::seq::IndexedRandom;

use crate::{Account, Config, archives, mounts, record::Record};

const DEFAULT_DISK_GIB: u32 = 10;
/// Where commands run and archives go when nobody says otherwise.
pub const DEFAULT_WORKING_DIRECTORY: &str = "/workspace";
const DEFAULT_HEALTH_TIMEOUT: f64 = 120.0;
const MAX_RESPONSE_TIMEOUT: u32 = 86_400;
const MAX_HEALTH_TIMEOUT: f64 = 24.0 * 3600.0;
const TYPES: [&str; 4] = ["shell", "python", "node", "full"];

/// A record in its first state; nothing has been done yet.
pub fn record(request: &CreateRequest, account: &Account, config: &Config) -> Result<Record, ApiError> {
    limits::check_create(request)?;
    let name = match &request.name {
        Some(name) => {
            names::check_name(name)?;
            name.clone()
        }
        None => made_up_name(),
    };
    let slug = match &request.slug {
        Some(slug) => {
            names::check_slug(slug)?;
            slug.clone()
        }
        None => names::slugify(&name),
    };
    supported(request, account)?;
    let ports = request.open_ports.iter().map(|port| names::check_port(*port)).collect::<Result<Vec<_>, _>>()?;
    for (name, value) in &request.env_vars {
        names::check_env_name(name)?;
        if value.contains('\0') {
            return Err(invalid(format!("the value of {name} has a NUL in it"), "environment variables are text"));
        }
    }
    let working_directory = request.working_directory.clone().unwrap_or_else(|| DEFAULT_WORKING_DIRECTORY.into());
    if !working_directory.starts_with('/') {
        return Err(invalid(format!("working_directory {working_directory:?} is not absolute"), "begin it with /"));
    }
    if request.health_path.as_ref().is_some_and(|path| !path.starts_with('/')) {
        return Err(invalid("health_path does not begin with /".into(), "for example /health"));
    }
    if request.health_path.is_some() && ports.is_empty() {
        return Err(invalid("health_path needs a port".into(), "name the port with --port (open_ports)"));
    }
    let size_class = match &request.size_class {
        Some(text) => names::parse_size_class(text)?,
        None => Default::default(),
    };
    let now = Utc::now();
    Ok(Record {
        id: uuid::Uuid::new_v4().to_string(),
        account: account.clone(),
        name,
        slug,
        status: Status::Provisioning,
        waiting_to_replace: false,
        removing: false,
        image: request.image.clone().unwrap_or_else(|| config.default_image.clone()),
        image_digest: None,
        image_requested: None,
        region: region(request, config)?,
        size_class,
        disk_gib: request.disk_size_gb.map_or(Ok(DEFAULT_DISK_GIB), disk)?,
        checkpoint_at: None,
        archive_id: request.archive_id.clone(),
        archive_root: request.archive_root.as_deref().map(archives::root).transpose()?,
        created_at: now,
        status_changed_at: now,
        started_at: None,
        ttl_seconds: ttl(request)?,
        env_vars: request.env_vars.clone(),
        image_env: Vec::new(),
        image_run: Default::default(),
        start_command: request.start_command.clone().filter(|command| !command.is_empty()),
        working_directory,
        setup_hooks: request.setup_hooks.clone(),
        health_path: request.health_path.clone(),
        health_timeout_ms: health_timeout(request)?,
        response_timeout_seconds: request.response_timeout_seconds.map(response_timeout).transpose()?,
        open_ports: ports,
        ports_are_public: request.is_public,
        fingerprint: String::new(),
        mounts: mounts::check(&request.mounts)?,
        directories: Default::default(),
        reason: None,
        warnings: Vec::new(),
        has_run: false,
        revision: 0,
        restart: request.restart.unwrap_or_default(),
        restart_count: 0,
        restarts_in_a_row: 0,
        next_start_at: None,
    })
}

/// Whether a request can be carried out anywhere; where, is not looked at.
pub fn check(request: &CreateRequest, account: &Account) -> Result<(), ApiError> {
    let nowhere = Config {
        home: "/nonexistent".into(),
        base_domain: String::new(),
        url_scheme: String::new(),
        url_port: 0,
        regions: request.region.clone().into_iter().collect(),
        default_image: String::new(),
        images: Default::default(),
        guest: Default::default(),
    };
    record(request, account, &nowhere).map(drop)
}

/// What is asked for and cannot be given is an error, never left out in silence.
fn supported(request: &CreateRequest, account: &Account) -> Result<(), ApiError> {
    let unsupported = |what: &str, hint: &str| Err(ApiError::new(ErrorCode::Unsupported, what).hint(hint));
    if let Some(backend) = request.backend_type.as_deref().filter(|backend| *backend != "qemu") {
        return unsupported(&format!("there is no backend {backend:?}"), "leave it out, or use qemu");
    }
    if let [_, ..] = request.mounts.as_slice() {
        account.must_be_owner("mounting a directory of the host")?;
    }
    check_privacy(request.is_public, account)?;
    check_restart(request.restart.unwrap_or_default(), account)?;
    if let Some(kind) = request.sandbox_type.as_deref().filter(|kind| !TYPES.contains(kind)) {
        return Err(invalid(format!("there is no sandbox type {kind:?}"), "use shell, python, node or full"));
    }
    Ok(())
}

/// A private endpoint answers the members of an account.
pub fn check_privacy(is_public: Option<bool>, account: &Account) -> Result<(), ApiError> {
    if is_public != Some(false) || !account.is_owner() {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Unsupported, "private endpoints need a server, which knows who may use them")
        .hint("log in to one with heyvm login, or leave --private out"))
}

/// What is started again by itself would pass by an account's quota of running sandboxes.
pub fn check_restart(restart: RestartPolicy, account: &Account) -> Result<(), ApiError> {
    if restart == RestartPolicy::Never || account.is_owner() {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Unsupported, format!("restart {:?} is not supported by a server", restart.as_str()))
        .hint("Leave --restart out, or use --local."))
}

fn invalid(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

fn region(request: &CreateRequest, config: &Config) -> Result<String, ApiError> {
    let own = config.regions.first().cloned().unwrap_or_else(|| "US".into());
    match &request.region {
        None => Ok(own),
        Some(asked) if config.regions.contains(asked) => Ok(asked.clone()),
        Some(asked) => Err(ApiError::new(ErrorCode::UnknownRegion, format!("there is no region {asked:?} here"))
            .hint(format!("this machine is {}; leave --region out, or use that", config.regions.join(", ")))),
    }
}

fn disk(gb: i64) -> Result<u32, ApiError> {
    u32::try_from(gb)
        .ok()
        .filter(|_| names::DISK_GB.contains(&gb))
        .ok_or_else(|| invalid(format!("disk_size_gb {gb} cannot be had"), "use 1 to 250"))
}

/// What a sandbox is to become.
#[derive(Debug, Clone, Copy)]
pub enum Resize {
    /// Another size class.
    Class(SizeClass),
    /// A disk of so many GiB.
    Disk(u32),
}

/// Exactly one of the two.
pub fn resize(request: &ResizeRequest) -> Result<Resize, ApiError> {
    match (&request.size_class, request.disk_size_gb) {
        (Some(class), None) => names::parse_size_class(class).map(Resize::Class),
        (None, Some(gb)) => disk(gb).map(Resize::Disk),
        _ => {
            Err(invalid("a resize is of the size class or of the disk".into(), "give one of size_class, disk_size_gb"))
        }
    }
}

fn ttl(request: &CreateRequest) -> Result<Option<i64>, ApiError> {
    check_ttl(request.ttl_seconds)
}

/// A time-to-live is at least a second and at most a hundred years.
pub fn check_ttl(ttl_seconds: Option<i64>) -> Result<Option<i64>, ApiError> {
    match ttl_seconds {
        Some(ttl) if !(1..=3_155_760_000).contains(&ttl) => Err(invalid(
            format!("ttl_seconds {ttl} is no time-to-live"),
            "use a number of seconds from 1 up, or leave it out",
        )),
        other => Ok(other),
    }
}

fn health_timeout(request: &CreateRequest) -> Result<u64, ApiError> {
    let seconds = request.health_timeout_seconds.unwrap_or(DEFAULT_HEALTH_TIMEOUT);
    if !(0.001..=MAX_HEALTH_TIMEOUT).contains(&seconds) {
        return Err(invalid(
            format!("health_timeout_seconds {seconds} is no time-out"),
            "use a number of seconds up to a day",
        ));
    }
    Ok((seconds * 1000.0) as u64)
}

fn response_timeout(seconds: i64) -> Result<u32, ApiError> {
    u32::try_from(seconds).ok().filter(|seconds| (1..=MAX_RESPONSE_TIMEOUT).contains(seconds)).ok_or_else(|| {
        invalid(
            format!("response_timeout_seconds {seconds} is out of range"),
            "use a whole number of seconds, 1 to 86400",
        )
    })
}

/// Three words that nobody has to remember, as long as they are different.
pub fn made_up_name() -> String {
    const HOW: [&str; 16] = [
        "brave", "calm", "clever", "eager", "fast", "gentle", "happy", "keen", "kind", "lucky", "merry", "quiet",
        "sharp", "steady", "swift", "warm",
    ];
    const WHO: [&str; 16] = [
        "badger", "crane", "falcon", "fox", "heron", "ibis", "lynx", "marten", "otter", "owl", "panda", "raven",
        "robin", "seal", "swan", "wolf",
    ];
    let mut random = rand::rng();
    let pick =
        |words: &[&'static str], random: &mut rand::rngs::ThreadRng| words.choose(random).copied().unwrap_or("box");
    let (how, who) = (pick(&HOW, &mut random), pick(&WHO, &mut random));
    format!("{how}-{who}-{:04x}", rand::random::<u16>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            home: "/nowhere".into(),
            base_domain: "localhost".into(),
            url_scheme: "http".into(),
            url_port: 8480,
            regions: vec!["US".into()],
            default_image: "ubuntu:24.04".into(),
            images: Default::default(),
            guest: Default::default(),
        }
    }

    #[test]
    fn every_bad_field_has_its_code() {
        let bad: [(CreateRequest, ErrorCode); 12] = [
            (CreateRequest { open_ports: (1..=33).collect(), ..Default::default() }, ErrorCode::LimitExceeded),
            (CreateRequest { archive_root: Some("a/../..".into()), ..Default::default() }, ErrorCode::InvalidArgument),
            (CreateRequest { name: Some("a b".into()), ..Default::default() }, ErrorCode::InvalidName),
            (CreateRequest { slug: Some("A".into()), ..Default::default() }, ErrorCode::InvalidName),
            (CreateRequest { open_ports: vec![0], ..Default::default() }, ErrorCode::InvalidPort),
            (CreateRequest { open_ports: vec![70000], ..Default::default() }, ErrorCode::InvalidPort),
            (CreateRequest { size_class: Some("giant".into()), ..Default::default() }, ErrorCode::UnknownSizeClass),
            (CreateRequest { region: Some("MOON".into()), ..Default::default() }, ErrorCode::UnknownRegion),
            (CreateRequest { ttl_seconds: Some(0), ..Default::default() }, ErrorCode::InvalidArgument),
            (CreateRequest { disk_size_gb: Some(251), ..Default::default() }, ErrorCode::InvalidArgument),
            (CreateRequest { is_public: Some(false), ..Default::default() }, ErrorCode::Unsupported),
            (CreateRequest { backend_type: Some("docker".into()), ..Default::default() }, ErrorCode::Unsupported),
        ];
        for (request, code) in bad {
            let error = record(&request, &Account::owner(), &config()).unwrap_err();
            assert_eq!(error.code, code, "{request:?}");
            assert!(error.hint.is_some(), "{request:?}");
        }
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let record = record(&CreateRequest::default(), &Account::owner(), &config()).unwrap();
        assert_eq!((record.disk_gib, record.working_directory.as_str()), (10, "/workspace"));
        assert_eq!(record.slug, names::slugify(&record.name));
        assert_eq!(record.expires_at(), None);
    }
}
