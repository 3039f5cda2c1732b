//! One sandbox in a test.

use serde_json::Value;

use crate::{Host, Ran, eventually, http};

/// A sandbox of a [`Host`].
pub struct Vm<'h> {
    /// Where it runs.
    pub host: &'h Host,
    /// Its id.
    pub id: String,
    /// What `create` or `deploy` answered.
    pub made: Value,
}

impl<'h> Vm<'h> {
    /// The sandbox that an answer of `create` or `deploy` tells of.
    #[track_caller]
    pub fn of(host: &'h Host, made: Value) -> Self {
        let id = made["id"].as_str().unwrap_or_else(|| panic!("no id in {made}")).to_owned();
        Self { host, id, made }
    }

    /// Runs a program in it, standard output and error apart.
    pub fn exec(&self, command: &[&str]) -> Ran {
        self.exec_with(&[], command, b"")
    }

    /// Runs a program in it with options of `exec` and standard input.
    pub fn exec_with(&self, options: &[&str], command: &[&str], input: &[u8]) -> Ran {
        Ran::of(self.host.command().arg("exec").args(options).arg(&self.id).arg("--").args(command), input)
    }

    /// Runs a shell script in it, which must succeed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Ran {
        self.exec(&["sh", "-c", script]).succeeded()
    }

    /// What `get` says of it now.
    #[track_caller]
    pub fn info(&self) -> Value {
        self.host.json(&["get", &self.id])
    }

    /// Its status now.
    #[track_caller]
    pub fn status(&self) -> String {
        self.info()["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until it has this status and gives the reason.
    #[track_caller]
    pub fn becomes(&self, status: &str) -> Value {
        eventually(&format!("{} becomes {status}", self.id), || {
            let info = self.info();
            (info["status"] == status).then(|| info["reason"].clone())
        })
    }

    /// The URL of its first port, with this path.
    #[track_caller]
    pub fn url(&self, path: &str) -> String {
        let url = self.made["urls"][0]["url"].as_str().unwrap_or_else(|| panic!("no URL in {}", self.made));
        format!("{}{path}", url.trim_end_matches('/'))
    }

    /// GET of a path at its first URL.
    #[track_caller]
    pub fn get(&self, path: &str) -> http::Answer {
        http::get(&self.url(path))
    }

    /// A command of the command line that takes the sandbox's id, with its JSON answer: `vm.does("stop")`.
    #[track_caller]
    pub fn does(&self, command: &str) -> Value {
        match command {
            "rm" => self.host.json(&["rm", "-y", &self.id]),
            _ => self.host.json(&[command, &self.id]),
        }
    }
}
