//! `server admin`: accounts, users and API keys, in the store itself.

use std::io::{self, IsTerminal};

use clap::Subcommand;
use heyvm_accounts::{Account, Accounts, NewUser, Quotas};
use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{ApiKeyInfo, CreateKeyRequest, Scope, UserInfo},
    error::with_causes,
};
use heyvm_store::Store;
use serde_json::{Value, json};

use super::super::{Context, Outcome};
use crate::{output, password};

/// Examples below the help text.
pub const EXAMPLES: &str = "\
A password is asked for at the terminal, or read from standard input up to the end of its first line.

Examples:
  export HEYVM_STORE=postgres://heyvm:PASSWORD@db.example/heyvm
  heyvm server admin user add ada@example.com --account team
  heyvm server admin key create team --name ci --scope deploy --format json";

/// `server admin`.
#[derive(Debug, clap::Args)]
pub struct AdminArgs {
    /// The server's store: the path of an SQLite database, or postgres://USER:PASSWORD@HOST/DATABASE; a password is
    /// better kept in HEYVM_STORE, since others can read command lines
    #[arg(long, global = true, env = "HEYVM_STORE", hide_env_values = true, value_name = "PATH or URL")]
    store: Option<String>,
    #[command(subcommand)]
    command: AdminCommand,
}

/// Whom it is about.
#[derive(Debug, Subcommand)]
enum AdminCommand {
    /// People with a password
    #[command(subcommand)]
    User(UserCommand),
    /// API keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Accounts and their quotas
    #[command(subcommand)]
    Account(AccountCommand),
}

/// What can be done with users.
#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Add a user; the password is asked for, or read from standard input
    Add {
        /// E-mail address
        email: String,
        /// Name or id of their account, which is made if there is none of the name [default: one of their own]
        #[arg(long)]
        account: Option<String>,
        /// What they may do: read, exec, deploy or admin, each with all before it
        #[arg(long, default_value_t = Scope::Admin)]
        scope: Scope,
    },
    /// List users
    List,
    /// Shut a user out: sessions end at once, and API keys they made do not count
    Disable {
        /// E-mail address
        email: String,
    },
    /// Let a user in again
    Enable {
        /// E-mail address
        email: String,
    },
    /// Give a user another password, asked for or read from standard input; their sessions end
    Passwd {
        /// E-mail address
        email: String,
    },
}

/// What can be done with API keys.
#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key for an account and print it, this once
    Create {
        /// Name or id of the account
        account: String,
        /// What to call it
        #[arg(long)]
        name: Option<String>,
        /// What it may do: read, exec, deploy or admin, each with all before it
        #[arg(long, default_value_t = Scope::Deploy)]
        scope: Scope,
        /// Seconds until it ends [default: it does not end]
        #[arg(long, value_name = "SECONDS")]
        expires_in_seconds: Option<u64>,
    },
    /// List keys, without the keys themselves
    List {
        /// Name or id of an account [default: all]
        #[arg(long)]
        account: Option<String>,
    },
    /// Revoke a key, and end what was begun with it, at once
    Revoke {
        /// The key's id
        id: String,
    },
}

/// What can be done with accounts.
#[derive(Debug, Subcommand)]
enum AccountCommand {
    /// List accounts
    List,
    /// Set an account's quotas; those not named become the server's defaults again
    Quota {
        /// Name or id of the account
        account: String,
        #[command(flatten)]
        quotas: QuotaArgs,
    },
}

/// What an account may use.
#[derive(Debug, clap::Args)]
struct QuotaArgs {
    /// Sandboxes running at a time
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_running: Option<i64>,
    /// Thousandths of a processor, of all that run
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_vcpu_millis: Option<i64>,
    /// Memory of all that run, in MiB
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_memory_mib: Option<i64>,
    /// Disk of all, in GB
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_disk_gb: Option<i64>,
    /// Archives together, in MiB; the same content counts once
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_archive_mib: Option<i64>,
    /// Longest time-to-live, in seconds
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    max_ttl_seconds: Option<i64>,
}

/// Whatever is to be done.
pub async fn admin(context: &Context, args: AdminArgs) -> Outcome {
    let store = open(&store_of(args.store)?).await?;
    let accounts = Accounts::administer(store.clone())?;
    let outcome = match args.command {
        AdminCommand::User(command) => user(context, &accounts, command).await,
        AdminCommand::Key(command) => key(context, &accounts, command).await,
        AdminCommand::Account(command) => account(context, &accounts, command).await,
    };
    store.close().await;
    outcome
}

/// Where the store is: as `--store` or HEYVM_STORE say.
fn store_of(named: Option<String>) -> Result<String, ApiError> {
    named.filter(|store| !store.is_empty()).ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, "the server's store is not named")
            .hint("set HEYVM_STORE, or say --store, to the path or postgres:// URL that the server has")
    })
}

async fn open(location: &str) -> Result<Store, ApiError> {
    Store::connect(location).await.map_err(|error| {
        ApiError::new(ErrorCode::HostNotReady, format!("the store cannot be opened: {}", with_causes(&error)))
            .hint("--store or HEYVM_STORE name it; a database must be there already")
    })
}

async fn user(context: &Context, accounts: &Accounts, command: UserCommand) -> Outcome {
    match command {
        UserCommand::Add { email, account, scope } => {
            let password = new_password()?;
            let new = NewUser { email: &email, password: &password, account: account.as_deref(), scope };
            let user = accounts.add_user(new).await?;
            output::answer(context.format, &user, || {
                format!("{} is a user of account {}", user.email, user.account_id)
            });
        }
        UserCommand::List => {
            let users = accounts.users().await?;
            output::answer(context.format, &users, || users_table(&users));
        }
        UserCommand::Disable { email } => {
            accounts.disable_user(&email).await?;
            output::answer(context.format, &json!({"email": email, "disabled": true}), || {
                format!("{email} is shut out")
            });
        }
        UserCommand::Enable { email } => {
            accounts.enable_user(&email).await?;
            output::answer(context.format, &json!({"email": email, "disabled": false}), || {
                format!("{email} may log in")
            });
        }
        UserCommand::Passwd { email } => {
            accounts.set_password(&email, &new_password()?).await?;
            let text = || format!("{email} has another password, and must log in again");
            output::answer(context.format, &json!({"email": email, "changed": true}), text);
        }
    }
    Ok(0)
}

fn users_table(users: &[UserInfo]) -> String {
    let row = |user: &UserInfo| {
        let state = if user.disabled { "disabled" } else { "" };
        vec![user.email.clone(), user.account_id.clone(), user.scope.to_string(), state.into()]
    };
    output::table(&["EMAIL", "ACCOUNT", "SCOPE", ""], &users.iter().map(row).collect::<Vec<_>>())
}

async fn key(context: &Context, accounts: &Accounts, command: KeyCommand) -> Outcome {
    match command {
        KeyCommand::Create { account, name, scope, expires_in_seconds } => {
            let request = CreateKeyRequest { name, scope: Some(scope), expires_in_seconds };
            let created = accounts.issue_key(&account, &request).await?;
            output::answer(context.format, &created, || created.api_key.clone());
        }
        KeyCommand::List { account } => {
            let account = match account {
                Some(account) => Some(accounts.account(&account).await?.id),
                None => None,
            };
            let keys = accounts.keys(account.as_deref()).await?;
            output::answer(context.format, &keys, || keys_table(&keys));
        }
        KeyCommand::Revoke { id } => {
            let key = accounts.revoke_key(None, &id).await?;
            output::answer(context.format, &key, || format!("{} ({}…) is revoked", key.name, key.prefix));
        }
    }
    Ok(0)
}

fn keys_table(keys: &[ApiKeyInfo]) -> String {
    let row = |key: &ApiKeyInfo| {
        let last = key.last_used_at.map(|at| at.format("%F %R").to_string()).unwrap_or("never".into());
        let state = if key.revoked { "revoked" } else { "" };
        let prefix = format!("{}…", key.prefix);
        vec![
            key.id.clone(),
            key.name.clone(),
            prefix,
            key.scope.to_string(),
            key.account_id.clone(),
            last,
            state.into(),
        ]
    };
    let head = ["ID", "NAME", "KEY", "SCOPE", "ACCOUNT", "LAST USED", ""];
    output::table(&head, &keys.iter().map(row).collect::<Vec<_>>())
}

async fn account(context: &Context, accounts: &Accounts, command: AccountCommand) -> Outcome {
    match command {
        AccountCommand::List => {
            let all = accounts.accounts().await?;
            let documents: Vec<_> = all.iter().map(account_document).collect();
            output::answer(context.format, &documents, || accounts_table(&all));
        }
        AccountCommand::Quota { account, quotas } => {
            let quotas = Quotas {
                max_running: quotas.max_running,
                max_vcpu_millis: quotas.max_vcpu_millis,
                max_memory_mib: quotas.max_memory_mib,
                max_disk_gb: quotas.max_disk_gb,
                max_archive_mib: quotas.max_archive_mib,
                max_ttl_seconds: quotas.max_ttl_seconds,
            };
            accounts.set_quotas(&account, &quotas).await?;
            let account = accounts.account(&account).await?;
            output::answer(context.format, &account_document(&account), || {
                accounts_table(std::slice::from_ref(&account))
            });
        }
    }
    Ok(0)
}

fn account_document(account: &Account) -> Value {
    json!({
        "id": account.id,
        "name": account.name,
        "max_running": account.quotas.max_running,
        "max_vcpu_millis": account.quotas.max_vcpu_millis,
        "max_memory_mib": account.quotas.max_memory_mib,
        "max_disk_gb": account.quotas.max_disk_gb,
        "max_archive_mib": account.quotas.max_archive_mib,
        "max_ttl_seconds": account.quotas.max_ttl_seconds,
    })
}

fn accounts_table(accounts: &[Account]) -> String {
    let quota = |value: Option<i64>| value.map_or("default".into(), |value| value.to_string());
    let row = |account: &Account| {
        let Quotas { max_running, max_vcpu_millis, max_memory_mib, max_disk_gb, max_archive_mib, max_ttl_seconds } =
            account.quotas;
        let quotas =
            [max_running, max_vcpu_millis, max_memory_mib, max_disk_gb, max_archive_mib, max_ttl_seconds].map(quota);
        [vec![account.id.clone(), account.name.clone()], quotas.to_vec()].concat()
    };
    let head = ["ID", "NAME", "RUNNING", "VCPU MILLIS", "MEMORY MIB", "DISK GB", "ARCHIVE MIB", "TTL SECONDS"];
    output::table(&head, &accounts.iter().map(row).collect::<Vec<_>>())
}

/// A password: twice from the terminal, which does not show it, or a line of standard input. Never from the command
/// line, which others can read.
fn new_password() -> Result<String, ApiError> {
    let unread = |error: io::Error| {
        ApiError::new(ErrorCode::InvalidArgument, format!("the password cannot be read: {error}"))
            .hint("type it at a terminal, or give it on standard input")
    };
    let first = password::read("Password: ").map_err(unread)?;
    if io::stdin().is_terminal() && password::read("Once more: ").map_err(unread)? != first {
        return Err(ApiError::new(ErrorCode::InvalidArgument, "the two passwords differ").hint("try again"));
    }
    Ok(first)
}
