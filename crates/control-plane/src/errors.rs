//! Failures of the parts below, as the outside is told of them: one place for code, sentence and hint.

use heyvm_api::{ApiError, ErrorCode, error::with_causes};

/// What to do when a sandbox's disk is full: `exec`, `cp` out of it and a restart work all the same.
const DISK_FULL: &str = "remove files in the sandbox (heyvm exec NAME -- du -xh / shows the largest), or give it more room: \
                         heyvm resize NAME --disk-size-gb N";
const TOO_MUCH: &str = "send less at a time, or free memory and processes in the sandbox";

/// The store failed: the log has why, the caller has no use for it.
pub fn store(error: heyvm_store::Error) -> ApiError {
    match error {
        heyvm_store::Error::NameTaken => ApiError::new(ErrorCode::NameTaken, "a living sandbox has this name")
            .hint("use another name, remove the other sandbox, or deploy with --replace"),
        heyvm_store::Error::SlugTaken => ApiError::new(ErrorCode::NameTaken, "a living sandbox has this slug")
            .hint("use another slug, or remove the other sandbox"),
        other => internal(&other),
    }
}

/// A failure that is ours.
pub fn internal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::error!(error = with_causes(error), "internal error");
    ApiError::new(ErrorCode::Internal, with_causes(error)).hint("the daemon's log has the details")
}

/// The VM did not do as it should.
pub fn vm(error: heyvm_vm::Error) -> ApiError {
    use heyvm_vm::Error;
    match error {
        Error::HostNotReady { what, hint } => ApiError::new(ErrorCode::HostNotReady, what).hint(hint),
        Error::OutOfResources { what } => out_of(&what),
        Error::Boot { what, console_tail } => ApiError::new(ErrorCode::VmFailed, format!("the VM {what}"))
            .hint("try again; `heyvm doctor` says whether this host is fit")
            .log_tail(console_tail),
        Error::GuestClock(_) => ApiError::new(ErrorCode::VmFailed, error.to_string())
            .hint("try again when the host is less busy; `heyvm doctor` says whether it is fit"),
        Error::NotResumed { ref console_tail, .. } => ApiError::new(ErrorCode::VmFailed, error.to_string())
            .hint("try again; `heyvm doctor` says whether this host is fit")
            .log_tail(console_tail.clone()),
        Error::NoCheckpoint => {
            ApiError::new(ErrorCode::InvalidState, "the sandbox has no checkpoint").hint("heyvm checkpoint makes one")
        }
        Error::NotGrown(_) => ApiError::new(ErrorCode::InvalidState, error.to_string())
            .hint("what is on this disk cannot grow: a new sandbox can have a larger one"),
        Error::TooSlow(_) => ApiError::new(ErrorCode::Timeout, error.to_string())
            .hint("stop the sandbox first: then it may take as long as it takes"),
        Error::Unreachable(why) => {
            ApiError::new(ErrorCode::SandboxUnreachable, format!("the sandbox's agent does not answer: {why}"))
                .hint("heyvm restart brings a sandbox back that does not answer")
        }
        other => internal(&other),
    }
}

/// An image could not be had.
pub fn image(error: heyvm_images::Error) -> ApiError {
    use heyvm_images::Error;
    match error {
        Error::NotFound(name) => ApiError::new(ErrorCode::ImageNotFound, format!("no image {name} here"))
            .hint("heyvm images lists those here; heyvm pull or heyvm images import brings others"),
        Error::Registry { name, why } => {
            ApiError::new(ErrorCode::RegistryUnavailable, format!("no registry gave {name}: {why}"))
                .hint("name a mirror or credentials under [registries] in config.toml, or: heyvm images import FILE")
        }
        Error::RegistryNotAllowed(registry) => {
            ApiError::new(ErrorCode::Forbidden, format!("images from {registry} are not allowed on this server")).hint(
                "use an image of an allowed registry; the server's operator lists those in [images] of config.toml",
            )
        }
        Error::Invalid(why) => ApiError::new(ErrorCode::ImageInvalid, why),
        Error::HostNotReady { what, hint } => ApiError::new(ErrorCode::HostNotReady, what).hint(hint),
        Error::OutOfResources(what) => out_of(what),
        other => internal(&other),
    }
}

/// A call to a sandbox's agent failed. The guest writes the message: it is cut and stripped.
pub fn agent(status: &tonic::Status) -> ApiError {
    use tonic::Code;
    let text: String = status.message().chars().filter(|c| !c.is_control()).take(300).collect();
    match status.code() {
        Code::NotFound => ApiError::new(ErrorCode::FileNotFound, text),
        Code::AlreadyExists => ApiError::new(ErrorCode::FileConflict, text),
        Code::InvalidArgument => ApiError::new(ErrorCode::InvalidArgument, text),
        Code::ResourceExhausted => {
            let is_full = status.message().contains(heyvm_agent_protocol::DISK_FULL);
            ApiError::new(ErrorCode::OutOfResources, text).hint(if is_full { DISK_FULL } else { TOO_MUCH })
        }
        Code::PermissionDenied => ApiError::new(ErrorCode::Forbidden, text),
        Code::FailedPrecondition => ApiError::new(ErrorCode::InvalidState, text),
        _ => ApiError::new(ErrorCode::SandboxUnreachable, format!("the sandbox's agent failed: {text}"))
            .hint("heyvm get says whether the sandbox still runs"),
    }
}

/// The host cannot give what is needed.
pub fn out_of(what: &str) -> ApiError {
    ApiError::new(ErrorCode::OutOfResources, format!("the host is out of {what}"))
        .hint("heyvm list --all shows what can be removed")
}

/// A file operation on the host failed.
pub fn io(doing: &str, error: &std::io::Error) -> ApiError {
    if error.kind() == std::io::ErrorKind::StorageFull {
        return out_of("disk space");
    }
    tracing::error!(%error, doing, "file operation failed");
    ApiError::new(ErrorCode::Internal, format!("{doing}: {error}")).hint("the daemon's log has the details")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_is_answered_with_what_to_do() {
        let full =
            agent(&tonic::Status::resource_exhausted(format!("cannot write /a: {}", heyvm_agent_protocol::DISK_FULL)));
        assert_eq!(full.code, ErrorCode::OutOfResources);
        assert!(full.hint.unwrap().contains("heyvm resize"));
        let large = agent(&tonic::Status::resource_exhausted("more than 7 entries"));
        assert!(!large.hint.unwrap().contains("resize"));
    }
}
