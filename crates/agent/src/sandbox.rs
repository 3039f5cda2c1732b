//! What this sandbox is, as its first call has told it.

use heyvm_agent_protocol::v1::PersonalizeRequest;

use crate::personalize;

/// Told once, by `Personalize`.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Default directory of commands.
    pub working_dir: String,
    /// Whose commands are that name no user; empty for root.
    pub user: String,
    /// Host name.
    pub hostname: String,
}

impl Sandbox {
    /// What the request tells.
    pub fn new(request: PersonalizeRequest) -> Self {
        let defaults = personalize::environment(&request);
        let given: Vec<(String, String)> = request.env.into_iter().map(|v| (v.name, v.value)).collect();
        let is_given = |name: &str| given.iter().any(|(known, _)| known == name);
        let mut env: Vec<_> = defaults.into_iter().filter(|(name, _)| !is_given(name)).collect();
        env.extend(given);
        Self { env, working_dir: request.working_dir, user: request.user, hostname: request.hostname }
    }
}
