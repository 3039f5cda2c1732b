//! What may be asked for: a create request becomes a record, or an error that names the field.

use chrono::Utc;
use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{CreateRequest, Status},
};
use rand::seq::IndexedRandom;

use crate::{Config, record::Record};

const DEFAULT_DISK_GIB: u32 = 10;
const DEFAULT_WORKING_DIRECTORY: &str = "/workspace";
const DEFAULT_HEALTH_TIMEOUT: f64 = 120.0;
const MAX_HEALTH_TIMEOUT: f64 = 24.0 * 3600.0;
const TYPES: [&str; 3] = ["shell", "python", "node"];

/// A record in its first state; nothing has been done yet.
pub fn record(request: &CreateRequest, config: &Config) -> Result<Record, ApiError> {
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
    supported(request)?;
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
        disk_gib: disk(request)?,
        archive_id: request.archive_id.clone(),
        created_at: now,
        status_changed_at: now,
        started_at: None,
        ttl_seconds: ttl(request)?,
        env_vars: request.env_vars.clone(),
        image_env: Vec::new(),
        start_command: request.start_command.clone().filter(|command| !command.trim().is_empty()),
        working_directory,
        setup_hooks: request.setup_hooks.clone(),
        health_path: request.health_path.clone(),
        health_timeout_ms: health_timeout(request)?,
        open_ports: ports,
        reason: None,
        warnings: Vec::new(),
        has_run: false,
    })
}

/// What is asked for and cannot be given is an error, never left out in silence.
fn supported(request: &CreateRequest) -> Result<(), ApiError> {
    let unsupported = |what: &str, hint: &str| Err(ApiError::new(ErrorCode::Unsupported, what).hint(hint));
    if let Some(backend) = request.backend_type.as_deref().filter(|backend| *backend != "qemu") {
        return unsupported(&format!("there is no backend {backend:?}"), "leave it out, or use qemu");
    }
    if !request.mounts.is_empty() {
        return unsupported(
            "directories of the host cannot be mounted yet",
            "deploy the directory, or copy it in with heyvm cp",
        );
    }
    if request.is_public == Some(false) {
        return unsupported("private endpoints need accounts, which this version does not have", "leave --private out");
    }
    if let Some(kind) = request.sandbox_type.as_deref().filter(|kind| !TYPES.contains(kind)) {
        return Err(invalid(format!("there is no sandbox type {kind:?}"), "use shell, python or node"));
    }
    Ok(())
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

fn disk(request: &CreateRequest) -> Result<u32, ApiError> {
    let Some(gb) = request.disk_size_gb else { return Ok(DEFAULT_DISK_GIB) };
    u32::try_from(gb)
        .ok()
        .filter(|_| names::DISK_GB.contains(&gb))
        .ok_or_else(|| invalid(format!("disk_size_gb {gb} cannot be had"), "use 1 to 250"))
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

/// Three words that nobody has to remember, as long as they are different.
fn made_up_name() -> String {
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
        }
    }

    #[test]
    fn every_bad_field_has_its_code() {
        let bad: [(CreateRequest, ErrorCode); 10] = [
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
            let error = record(&request, &config()).unwrap_err();
            assert_eq!(error.code, code, "{request:?}");
            assert!(error.hint.is_some(), "{request:?}");
        }
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let record = record(&CreateRequest::default(), &config()).unwrap();
        assert_eq!((record.disk_gib, record.working_directory.as_str()), (10, "/workspace"));
        assert_eq!(record.slug, names::slugify(&record.name));
        assert_eq!(record.expires_at(), None);
    }
}
