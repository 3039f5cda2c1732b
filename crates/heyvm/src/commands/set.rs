//! `set` and `edit-ttl`: what a create took, changed.

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{RestartPolicyRequest, SandboxInfo, TtlRequest},
};

use super::{
    Context, Outcome,
    deploy::{RESTART_POLICIES, restart_policy},
    path,
};
use crate::output;

/// `set`.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Remove it after so many seconds, counted from now; none: keep it until it is removed
    #[arg(long, value_name = "SECONDS|none", allow_negative_numbers = true)]
    pub ttl_seconds: Option<String>,
    /// Start it again when it ended by itself: never, on-failure or always
    #[arg(long, value_name = "POLICY", value_parser = RESTART_POLICIES)]
    pub restart: Option<String>,
}

/// `edit-ttl`.
#[derive(Debug, clap::Args)]
pub struct EditTtlArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Remove it after so many seconds, counted from now; none: keep it until it is removed
    #[arg(long, value_name = "SECONDS|none", allow_negative_numbers = true)]
    pub ttl_seconds: String,
}

/// Changes what is given, and nothing else.
pub async fn set(context: &Context, args: SetArgs) -> Outcome {
    // All of it is understood before any of it is changed.
    let ttl = args.ttl_seconds.as_deref().map(ttl).transpose()?;
    let client = context.client().await?;
    let mut changed: Option<SandboxInfo> = None;
    if let Some(restart) = args.restart.as_deref().and_then(restart_policy) {
        let request = RestartPolicyRequest { restart };
        changed = Some(client.post(&path(&args.sandbox, "/restart-policy"), &request).await?);
    }
    if let Some(request) = ttl {
        changed = Some(client.post(&path(&args.sandbox, "/ttl"), &request).await?);
    }
    let Some(info) = changed else { return Err(nothing_to_change()) };
    output::answer(context.format, &info, || {
        let ends = info.expires_at.map_or("never".into(), |at| at.format("%Y-%m-%d %H:%M:%SZ").to_string());
        format!("{}: ends {ends}, restart {}", info.name, info.restart.as_str())
    });
    Ok(0)
}

/// Changes the time-to-live.
pub async fn edit_ttl(context: &Context, args: EditTtlArgs) -> Outcome {
    set(context, SetArgs { sandbox: args.sandbox, ttl_seconds: Some(args.ttl_seconds), restart: None }).await
}

fn ttl(text: &str) -> Result<TtlRequest, ApiError> {
    if text == "none" {
        return Ok(TtlRequest { ttl_seconds: None });
    }
    text.parse().map(|seconds| TtlRequest { ttl_seconds: Some(seconds) }).map_err(|_| {
        ApiError::new(ErrorCode::InvalidArgument, format!("--ttl-seconds {text:?} is no number of seconds"))
            .hint("Use a number from 1 up, or none.")
    })
}

fn nothing_to_change() -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, "nothing to change").hint("Give --ttl-seconds or --restart.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_is_seconds_or_none() {
        assert_eq!(ttl("60").unwrap().ttl_seconds, Some(60));
        assert_eq!(ttl("none").unwrap().ttl_seconds, None);
        for bad in ["", "never", "1h"] {
            assert_eq!(ttl(bad).unwrap_err().code, ErrorCode::InvalidArgument, "{bad}");
        }
    }
}
