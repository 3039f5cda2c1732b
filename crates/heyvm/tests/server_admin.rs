//! `heyvm server admin`, as an operator's script uses it.
#![allow(clippy::unwrap_used)] // Clippy sees the tests, but not what they share.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

/// A store in a directory of its own.
struct Operator {
    directory: tempfile::TempDir,
}

impl Operator {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn run(&self, line: &str, input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_heyvm"));
        command.args(["server", "admin"]).args(line.split(' ')).args(["--format", "json"]);
        command.env("HEYO_HOME", self.directory.path()).env("HEYVM_STORE", self.directory.path().join("server.db"));
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        // One that reads nothing may have ended before.
        child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
        child.wait_with_output().unwrap()
    }

    fn json(&self, line: &str, input: &str) -> Value {
        let output = self.run(line, input);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refused(&self, line: &str, input: &str) -> String {
        let output = self.run(line, input);
        assert!(!output.status.success() && output.stdout.is_empty(), "{line} was to be refused");
        let told: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert!(told["error"]["hint"].is_string(), "{told}");
        told["error"]["code"].as_str().unwrap().to_owned()
    }
}

#[test]
fn users_come_and_go() {
    let operator = Operator::new();
    let ada = operator.json("user add Ada@Example.com --account team", "correct horse\n");
    assert_eq!((&ada["email"], &ada["scope"]), (&json!("ada@example.com"), &json!("admin")));
    let bob = operator.json("user add bob@example.com --account team --scope read", "battery staple");
    assert_eq!((&bob["account_id"], &bob["scope"]), (&ada["account_id"], &json!("read")));
    operator.json("user disable ada@example.com", "");
    let listed = operator.json("user list", "");
    let state: Vec<_> = listed.as_array().unwrap().iter().map(|user| user["disabled"].as_bool()).collect();
    assert_eq!(state, [Some(true), Some(false)]);
    operator.json("user enable ada@example.com", "");
    operator.json("user passwd ada@example.com", "another horse\n");
    assert_eq!(operator.refused("user add ada@example.com", "correct horse\n"), "name_taken");
    assert_eq!(operator.refused("user add eve@example.com", "short\n"), "invalid_argument");
    assert_eq!(operator.refused("user add nobody", "correct horse\n"), "invalid_argument");
    assert_eq!(operator.refused("user disable eve@example.com", ""), "not_found");
    assert_eq!(operator.json("user list", "").as_array().unwrap().len(), 2);
}

#[test]
fn keys_come_and_go() {
    let operator = Operator::new();
    operator.json("user add ada@example.com --account team", "correct horse\n");
    let made = operator.json("key create team --name ci --scope exec --expires-in-seconds 3600", "");
    let key = made["api_key"].as_str().unwrap();
    assert!(key.starts_with("heyo_api_") && made["expires_at"].is_string());
    let listed = operator.json("key list --account team", "");
    assert_eq!((&listed[0]["name"], &listed[0]["revoked"]), (&json!("ci"), &json!(false)));
    assert!(!listed.to_string().contains(key));
    let revoked = operator.json(&format!("key revoke {}", made["id"].as_str().unwrap()), "");
    assert_eq!(revoked["revoked"], true);
    assert_eq!(operator.refused("key create nobody", ""), "not_found");
    assert_eq!(operator.refused("key revoke nonsense", ""), "not_found");
    assert_eq!(operator.refused("key create team --scope root", ""), "invalid_argument");
}

#[test]
fn accounts_have_quotas() {
    let operator = Operator::new();
    operator.json("user add ada@example.com", "correct horse\n");
    let set = operator.json("account quota ada@example.com --max-running 3", "");
    assert_eq!(
        (&set["name"], &set["max_running"], &set["max_disk_gb"]),
        (&json!("ada@example.com"), &json!(3), &Value::Null)
    );
    assert_eq!(operator.json("account list", "")[0], set);
    assert_eq!(operator.refused("account quota nobody --max-running 3", ""), "not_found");
    assert_eq!(operator.refused("account quota ada@example.com --max-running -1", ""), "invalid_argument");
}

#[test]
fn a_store_that_cannot_be_opened_is_told_of_without_its_password() {
    for (location, code) in [
        ("postgres://heyvm:hunter2@127.0.0.1:1/heyvm", "host_not_ready"),
        ("mysql://heyvm:hunter2@localhost/heyvm", "host_not_ready"),
        ("", "invalid_argument"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_heyvm"));
        command.args(["server", "admin", "user", "list", "--format", "json"]).env("HEYVM_STORE", location);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let told: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(told["error"]["code"], code, "{told}");
        assert!(!output.status.success() && !told.to_string().contains("hunter2"), "{told}");
    }
}
