//! `bind` and `unbind`.

use heyvm_api::{
    names,
    sandbox::{BindRequest, BoundPort},
};
use serde_json::json;

use super::{Context, Outcome, path};
use crate::{
    cli::{BindArgs, UnbindArgs},
    output,
};

/// Gives a port a URL.
pub async fn bind(context: &Context, args: &BindArgs) -> Outcome {
    names::check_port(args.bind_port)?;
    let request = BindRequest { port: args.bind_port, is_public: args.private.then_some(false) };
    let bound: BoundPort = context.client().await?.post(&path(&args.sandbox, "/proxy"), &request).await?;
    output::answer(context.format, &bound, || bound.endpoint.url.clone());
    Ok(0)
}

/// Takes it away.
pub async fn unbind(context: &Context, args: &UnbindArgs) -> Outcome {
    names::check_port(args.bind_port)?;
    let rest = format!("/proxy/{}", args.bind_port);
    context.client().await?.delete_quietly(&path(&args.sandbox, &rest)).await?;
    output::answer(context.format, &json!({"port": args.bind_port, "unbound": true}), || {
        format!("port {} of {} has no URL any more", args.bind_port, args.sandbox)
    });
    Ok(0)
}
