//! Accounts and their users. Who calls these is the server's operator.

use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{Scope, UserInfo},
};
use heyvm_store::accounts::{AccountRow, Quotas, UserRow};
use uuid::Uuid;

use crate::{
    Accounts,
    errors::{invalid, not_found},
    scope, time,
};

/// Longest address that can be mailed to (RFC 3696, erratum 1690).
const MAX_EMAIL: usize = 254;
const MAX_NAME: usize = 100;

/// Who is the actor of what an operator does.
pub const OPERATOR: &str = "operator";

/// A user to add.
pub struct NewUser<'a> {
    /// E-mail address, in letters of any case.
    pub email: &'a str,
    /// From 8 to 1024 bytes.
    pub password: &'a str,
    /// Id or name of their account, which is made where there is none of the name. Without one they get an account of
    /// their own, named after the e-mail address.
    pub account: Option<&'a str>,
    /// What they may do.
    pub scope: Scope,
}

impl Accounts {
    /// Adds a user.
    ///
    /// # Errors
    /// `invalid_argument` for what is no e-mail address or too short a password; `name_taken` where another user has
    /// the address.
    pub async fn add_user(&self, new: NewUser<'_>) -> Result<UserInfo, ApiError> {
        let email = normalized(new.email)?;
        let taken = || {
            ApiError::new(ErrorCode::NameTaken, format!("there is a user {email} already"))
                .hint("heyvm server admin user list shows them; user passwd gives them another password")
        };
        if self.store.user_of_email(&email).await?.is_some() {
            return Err(taken());
        }
        let name = new.account.unwrap_or(&email);
        let found = self.find_account(name).await?;
        let account = match &found {
            Some(_) => None,
            None => Some(self.new_account(name)?),
        };
        let row = UserRow {
            id: Uuid::new_v4().to_string(),
            account_id: found.or_else(|| account.clone()).map(|account| account.id).unwrap_or_default(),
            password_hash: self.passwords.hash(new.password).await?,
            email: email.clone(),
            scope: new.scope.as_str().into(),
            created_at: self.now(),
            disabled_at: None,
        };
        self.store.add_user(&row, account.as_ref()).await.map_err(|error| match error {
            heyvm_store::Error::Exists => taken(),
            other => other.into(),
        })?;
        self.note(&row.account_id, OPERATOR, "user.add", &email, 201, None).await;
        Ok(info(row))
    }

    /// Every user, oldest first.
    ///
    /// # Errors
    /// Where the store does not answer; so with all that follow.
    pub async fn users(&self) -> Result<Vec<UserInfo>, ApiError> {
        Ok(self.store.users().await?.into_iter().map(info).collect())
    }

    /// Shuts a user out: their sessions end, and their API keys do not count, at once.
    ///
    /// # Errors
    /// `not_found` where there is no such user.
    pub async fn disable_user(&self, email: &str) -> Result<(), ApiError> {
        let user = self.user(email).await?;
        self.store.disable_user(&user.id, self.now()).await?;
        self.note(&user.account_id, OPERATOR, "user.disable", &user.email, 200, None).await;
        Ok(())
    }

    /// Lets a user in again; their API keys count again, their sessions do not.
    ///
    /// # Errors
    /// `not_found` where there is no such user.
    pub async fn enable_user(&self, email: &str) -> Result<(), ApiError> {
        let user = self.user(email).await?;
        self.store.enable_user(&user.id).await?;
        self.note(&user.account_id, OPERATOR, "user.enable", &user.email, 200, None).await;
        Ok(())
    }

    /// Gives a user another password and ends their sessions.
    ///
    /// # Errors
    /// `not_found` where there is no such user; `invalid_argument` for too short a password.
    pub async fn set_password(&self, email: &str, password: &str) -> Result<(), ApiError> {
        let user = self.user(email).await?;
        let hash = self.passwords.hash(password).await?;
        self.store.set_password(&user.id, &hash, self.now()).await?;
        self.note(&user.account_id, OPERATOR, "user.passwd", &user.email, 200, None).await;
        Ok(())
    }

    /// Every account, oldest first.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn accounts(&self) -> Result<Vec<AccountRow>, ApiError> {
        self.store.accounts().await.map_err(Into::into)
    }

    /// The account of this id or name.
    ///
    /// # Errors
    /// `not_found` where there is none.
    pub async fn account(&self, who: &str) -> Result<AccountRow, ApiError> {
        let found = self.find_account(who).await?;
        found.ok_or_else(|| {
            not_found(
                format!("there is no account {who}"),
                "heyvm server admin account list shows them; user add makes one",
            )
        })
    }

    /// Sets what an account may use.
    ///
    /// # Errors
    /// `not_found` where there is no such account.
    pub async fn set_quotas(&self, who: &str, quotas: &Quotas) -> Result<(), ApiError> {
        let account = self.account(who).await?;
        self.store.set_quotas(&account.id, quotas).await?;
        self.note(&account.id, OPERATOR, "account.quotas", &account.name, 200, None).await;
        Ok(())
    }

    async fn find_account(&self, who: &str) -> Result<Option<AccountRow>, ApiError> {
        match self.store.account(who).await? {
            Some(account) => Ok(Some(account)),
            None => self.store.account_named(who).await.map_err(Into::into),
        }
    }

    fn new_account(&self, name: &str) -> Result<AccountRow, ApiError> {
        check_name("an account's name", name)?;
        let id = Uuid::new_v4().to_string();
        Ok(AccountRow { id, name: name.to_owned(), created_at: self.now(), quotas: Quotas::default() })
    }

    async fn user(&self, email: &str) -> Result<UserRow, ApiError> {
        let email = normalized(email)?;
        let found = self.store.user_of_email(&email).await?;
        found.ok_or_else(|| not_found(format!("there is no user {email}"), "heyvm server admin user list shows them"))
    }
}

/// An e-mail address as it is kept. Whether it can be mailed to, only a mail can tell.
pub fn normalized(email: &str) -> Result<String, ApiError> {
    let email = email.trim().to_lowercase();
    let odd = |c: char| c.is_whitespace() || c.is_control();
    let fits = email.split_once('@').is_some_and(|(who, at)| !who.is_empty() && !at.is_empty() && !at.contains('@'));
    if !fits || email.len() > MAX_EMAIL || email.contains(odd) {
        return Err(invalid("email: that is no e-mail address", "give one like ada@example.com"));
    }
    Ok(email)
}

/// A name that people give: neither empty nor long, and one that can be shown.
pub fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    if name.trim().is_empty() || name.chars().count() > MAX_NAME || name.contains(char::is_control) {
        let message = format!("{what} has from 1 to {MAX_NAME} letters, and none that steer a terminal");
        return Err(invalid(message, "choose another one"));
    }
    Ok(())
}

fn info(row: UserRow) -> UserInfo {
    UserInfo {
        id: row.id,
        email: row.email,
        account_id: row.account_id,
        scope: scope(&row.scope),
        created_at: time(row.created_at),
        disabled: row.disabled_at.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_email_address_is_kept_in_lower_case_or_refused() {
        assert_eq!(normalized(" Ada@Example.COM ").unwrap(), "ada@example.com");
        let long = format!("{}@example.com", "a".repeat(250));
        for odd in ["", "ada", "@example.com", "ada@", "a@b@c", "a b@example.com", "a\u{1b}@example.com", &long] {
            assert_eq!(normalized(odd).unwrap_err().code, ErrorCode::InvalidArgument, "{odd}");
        }
    }
}
