//! `bind` and `unbind`.

use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{BindRequest, BoundPort},
};
use serde_json::json;

use super::{Context, Outcome, path};
use crate::output;

/// `bind`.
#[derive(Debug, clap::Args)]
pub struct BindArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Port in the sandbox
    #[arg(allow_negative_numbers = true)]
    pub port: String,
    /// Answer members of your account alone (needs a server: heyvm login); a bound port becomes private
    #[arg(long)]
    pub private: bool,
    /// Answer everyone, as new ones do; a private port becomes public
    #[arg(long, conflicts_with = "private")]
    pub public: bool,
}

/// `unbind`.
#[derive(Debug, clap::Args)]
pub struct UnbindArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Port in the sandbox
    #[arg(allow_negative_numbers = true)]
    pub port: String,
}

/// A port as it was typed.
pub fn parse_port(text: &str) -> Result<u16, ApiError> {
    let number = text.parse().map_err(|_| {
        ApiError::new(ErrorCode::InvalidPort, format!("{text:?} is not a port")).hint("ports are 1 to 65535")
    })?;
    names::check_port(number)
}

/// Gives a port a URL.
pub async fn bind(context: &Context, args: &BindArgs) -> Outcome {
    let is_public = args.private.then_some(false).or(args.public.then_some(true));
    let request = BindRequest { port: parse_port(&args.port)?.into(), is_public };
    let bound: BoundPort = context.client().await?.post(&path(&args.sandbox, "/proxy"), &request).await?;
    output::answer(context.format, &bound, || bound.endpoint.url.clone());
    Ok(0)
}

/// Takes it away.
pub async fn unbind(context: &Context, args: &UnbindArgs) -> Outcome {
    let port = parse_port(&args.port)?;
    context.client().await?.delete_quietly(&path(&args.sandbox, &format!("/proxy/{port}"))).await?;
    output::answer(context.format, &json!({"port": port, "unbound": true}), || {
        format!("port {port} of {} has no URL any more", args.sandbox)
    });
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_port_is_told_as_such() {
        assert_eq!(parse_port("8080").unwrap(), 8080);
        for bad in ["0", "65536", "-1", "eighty", "", "80 ", "99999999999999999999"] {
            let error = parse_port(bad).unwrap_err();
            assert!(error.code == ErrorCode::InvalidPort && error.hint.is_some(), "{bad:?}: {error:?}");
        }
    }
}
