//! `login`, `logout`, `whoami`.

use std::io::{self, BufRead, IsTerminal, Write};

use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{LoginRequest, Tokens, WhoAmI},
};
use serde_json::json;
use url::Url;

use super::{Context, Outcome};
use crate::{
    credentials::{self, Cloud, Login},
    output, password,
};

/// `login`.
#[derive(Debug, clap::Args)]
pub struct LoginArgs {
    /// E-mail address; asked for when absent
    #[arg(long)]
    pub email: Option<String>,
    /// Log in with an API key; `-` reads it from standard input, as HEYO_API_KEY does from the environment
    #[arg(long, value_name = "KEY", num_args = 0..=1, default_missing_value = "-", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// Logs in and keeps the credentials for later commands.
pub async fn login(context: &Context, args: LoginArgs) -> Outcome {
    let cloud = context.cloud.clone().ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, "there is no server to log in to")
            .hint("heyvm login --cloud-url https://api.example.org; without a server sandboxes run on this machine")
    })?;
    let key = args.api_key.or_else(|| std::env::var("HEYO_API_KEY").ok().filter(|key| !key.is_empty()));
    let login = match key {
        Some(key) if key == "-" => with_key(&cloud, secret("API key: ")?).await?,
        Some(key) => with_key(&cloud, key).await?,
        None => with_password(&cloud, args.email).await?,
    };
    credentials::keep(&context.home, &login)?;
    let answer = json!({"account_id": login.account_id, "email": login.email, "cloud_url": cloud.url});
    output::answer(context.format, &answer, || {
        format!("logged in at {} as {}", cloud.url, login.email.as_deref().unwrap_or(&login.account_id))
    });
    Ok(0)
}

async fn with_password(cloud: &Cloud, email: Option<String>) -> Result<Login, ApiError> {
    let email = match email {
        Some(email) => email,
        None => asked("e-mail: ")?,
    };
    let password = secret("password: ")?;
    let request = LoginRequest { email, password };
    let tokens: Tokens = credentials::server(&cloud.auth_url).post("/api/auth/login", &request).await?;
    Ok(Login::of(tokens, cloud.url.clone(), other(cloud)))
}

/// A key is good for as long as nobody revokes it, so it is what is kept.
async fn with_key(cloud: &Cloud, key: String) -> Result<Login, ApiError> {
    let who: WhoAmI = credentials::server(&cloud.url).with_bearer(&key)?.get("/api/auth/whoami").await?;
    Ok(Login {
        access_token: key,
        refresh_token: None,
        expires_at: None,
        cloud_url: Some(cloud.url.clone()),
        auth_url: other(cloud),
        account_id: who.account_id,
        email: who.email,
    })
}

fn other(cloud: &Cloud) -> Option<Url> {
    Some(cloud.auth_url.clone()).filter(|url| *url != cloud.url)
}

/// Ends the login, at the server too. Logging out twice succeeds.
pub async fn logout(context: &Context) -> Outcome {
    let kept = credentials::kept(&context.home).unwrap_or_default();
    credentials::forget(&context.home)?;
    if let Some(login) = &kept
        && let (Some(url), Some(refresh_token)) =
            (login.auth_url.as_ref().or(login.cloud_url.as_ref()), &login.refresh_token)
    {
        let request = heyvm_api::accounts::RefreshRequest { refresh_token: refresh_token.clone() };
        // It is forgotten here in any case; what the server keeps ends by itself.
        if let Err(error) = credentials::server(url).post::<serde_json::Value>("/api/auth/logout", &request).await {
            output::note(&format!("the server was not told: {}", error.message));
        }
    }
    output::answer(context.format, &json!({"logged_out": true, "was_logged_in": kept.is_some()}), || match kept {
        Some(_) => "logged out; commands use this machine again".into(),
        None => "nobody was logged in".into(),
    });
    Ok(0)
}

/// Who commands are to the server.
pub async fn whoami(context: &Context) -> Outcome {
    let Some(cloud) = &context.cloud else {
        let answer = json!({"account_id": null, "local": true, "home": context.home});
        output::answer(context.format, &answer, || "nobody is logged in: sandboxes run on this machine".into());
        return Ok(0);
    };
    let who: WhoAmI = cloud.client(&context.home).await?.get("/api/auth/whoami").await?;
    let mut answer = serde_json::to_value(&who).unwrap_or_default();
    answer["cloud_url"] = json!(cloud.url);
    output::answer(context.format, &answer, || {
        let name = who.email.as_deref().unwrap_or("an API key");
        format!("{name} (account {}) at {}", who.account_id, cloud.url)
    });
    Ok(0)
}

fn asked(prompt: &str) -> Result<String, ApiError> {
    if io::stdin().is_terminal() {
        write!(io::stderr(), "{prompt}").ok();
    }
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|error| no_input(&error.to_string()))?;
    let line = line.trim();
    if line.is_empty() { Err(no_input("nothing was typed")) } else { Ok(line.to_owned()) }
}

fn secret(prompt: &str) -> Result<String, ApiError> {
    let secret = password::read(prompt).map_err(|error| no_input(&error.to_string()))?;
    if secret.is_empty() { Err(no_input("nothing was typed")) } else { Ok(secret) }
}

fn no_input(why: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, format!("there is nothing to log in with: {why}"))
        .hint("--email with the password on standard input, or --api-key - with the key on it")
}
