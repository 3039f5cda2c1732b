//! What this sandbox is, as its first call has told it.

use heyvm_agent_protocol::v1::PersonalizeRequest;

/// Told once, by `Personalize`.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Default directory of commands.
    pub working_dir: String,
    /// Host name.
    pub hostname: String,
}

impl Sandbox {
    /// What the request tells.
    pub fn new(request: PersonalizeRequest) -> Self {
        let env = request.env.into_iter().map(|variable| (variable.name, variable.value)).collect();
        Self { env, working_dir: request.working_dir, hostname: request.hostname }
    }
}
