//! Accounts of a cloud are strangers to each other: every call of the server's document, with what is another's.

use heyvm_e2e::{
    Host,
    apps::packed,
    cloud::Cloud,
    http::{self, Answer},
};
use serde_json::{Map, Value, json};

/// Calls that anybody may make: they give credentials out, or say nothing that is anybody's.
const OPEN: [&str; 8] = [
    "/health",
    "/openapi.json",
    "/docs",
    "/.well-known/jwks.json",
    "/api/auth/login",
    "/api/auth/refresh",
    "/api/auth/logout",
    "/api/api-keys/exchange",
];
/// The one call whose URL is the credential.
const SIGNED: &str = "/sandbox-archives/{id}/content";
/// GETs that act, show what is in a sandbox, or tell of the account itself: scope `read` is not enough for them.
const MORE_THAN_READING: &[&str] = &[
    "/sandboxes/{id}/exec",
    "/sandboxes/{id}/files",
    "/sandboxes/{id}/files/download",
    "/sandboxes/{id}/files/tar",
    "/deployed-sandboxes/{id}/shell-stream",
    "/api/api-keys",
    "/api/audit",
];

/// What one account has.
struct Owned {
    sandbox: String,
    archive: String,
    key: String,
}

/// One operation of the document.
struct Call<'d> {
    document: &'d Value,
    path: &'d str,
    method: String,
    operation: &'d Value,
}

impl<'d> Call<'d> {
    fn all(document: &'d Value) -> Vec<Self> {
        let paths = document["paths"].as_object().expect("paths");
        let calls = paths.iter().flat_map(|(path, item)| {
            item.as_object().expect("operations").iter().map(move |(method, operation)| Self {
                document,
                path,
                method: method.to_uppercase(),
                operation,
            })
        });
        calls.collect()
    }

    fn body_schema(&self) -> Option<&'d Value> {
        let body = self.operation.get("requestBody")?;
        Some(self.resolved(&body["content"]["application/json"]["schema"])).filter(|schema| schema.is_object())
    }

    fn resolved(&self, schema: &'d Value) -> &'d Value {
        let variants = schema["oneOf"].as_array();
        let schema = variants.and_then(|all| all.iter().find(|one| one["type"] != "null")).unwrap_or(schema);
        match schema["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
            Some(name) => &self.document["components"]["schemas"][name],
            None => schema,
        }
    }

    /// A body that is as it should be and names what `owned` tells of, wherever it can.
    fn body(&self, owned: &Owned) -> Option<Value> {
        let schema = self.body_schema()?;
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut body = Map::new();
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let value = match name.as_str() {
                "sandbox_id" => json!(owned.sandbox),
                "archive_id" => json!(owned.archive),
                "size_class" => json!("micro"),
                "port" => json!(9999),
                "content" => json!("aGVsbG8="),
                "file_path" => json!("stranger"),
                "sandbox_path" => json!("/workspace"),
                "command" => json!("touch /workspace/stranger"),
                _ if !required.contains(&name.as_str()) => continue,
                _ if field["type"] == "integer" || field["type"][0] == "integer" => json!(60),
                _ => json!("x"),
            };
            body.insert(name.clone(), value);
        }
        Some(Value::Object(body))
    }

    /// Whether it can name what is somebody's: in its path or its body.
    fn names_somebodys(&self) -> bool {
        let schema = self.body_schema();
        self.path.contains("{id}")
            || schema.is_some_and(|schema| {
                ["sandbox_id", "archive_id"].iter().any(|name| schema["properties"].get(name).is_some())
            })
    }

    fn path_of(&self, owned: &Owned) -> String {
        let id = match self.path {
            path if path.starts_with("/sandbox-archives/") || path.starts_with("/archives/") => &owned.archive,
            path if path.starts_with("/api/api-keys/") => &owned.key,
            _ => &owned.sandbox,
        };
        let path = self.path.replace("{id}", id).replace("{port}", "8080");
        let parameters = self.operation["parameters"].as_array().into_iter().flatten();
        let query: Vec<String> = parameters
            .filter(|parameter| parameter["in"] == "query")
            .filter_map(|parameter| match parameter["name"].as_str()? {
                "port" => Some("port=8080".into()),
                // Nothing listens there.
                "timeout_seconds" => Some("timeout_seconds=1".into()),
                name if parameter["required"] == true => Some(format!("{name}=web.py")),
                _ => None,
            })
            .collect();
        format!("{path}?{}", query.join("&")).trim_end_matches('?').to_owned()
    }

    fn send(&self, cloud: &Cloud<'_>, token: Option<&str>, owned: &Owned) -> Answer {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let mut headers = vec![("accept", "application/json")];
        if let Some(bearer) = &bearer {
            headers.push(("authorization", bearer));
        }
        let content = self.operation["requestBody"]["content"].as_object();
        if let Some((kind, _)) = content.and_then(|content| content.iter().next()) {
            headers.push(("content-type", kind));
        }
        if self.operation["responses"].get("101").is_some() {
            headers.extend([
                ("connection", "upgrade"),
                ("upgrade", "websocket"),
                ("sec-websocket-version", "13"),
                ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ]);
        }
        let body = self.body(owned).map(|body| body.to_string()).unwrap_or_default();
        http::call(&self.method, &format!("{}{}", cloud.url, self.path_of(owned)), &headers, body)
    }

    fn changes(&self) -> bool {
        self.method != "GET" || MORE_THAN_READING.contains(&self.path)
    }
}

/// All that an account sees of its own.
fn view(cloud: &Cloud<'_>, key: &str, owned: &Owned) -> Value {
    let get = |path: &str| {
        let (status, mut answer) = cloud.call("GET", path, key, &Value::Null);
        assert_eq!(status, 200, "{path}: {answer}");
        for entry in answer.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            // This look itself uses a key, and time goes on.
            entry.remove("last_used_at");
            entry.remove("uptime_secs");
        }
        answer
    };
    json!({
        "sandboxes": get("/deployed-sandboxes"),
        "ports": get(&format!("/sandboxes/{}/proxy", owned.sandbox)),
        "files": get(&format!("/sandboxes/{}/files", owned.sandbox)),
        "archives": get("/sandbox-archives"),
        "keys": get("/api/api-keys"),
        "commands": get(&format!("/sandboxes/{}/files?mount_path=/tmp", owned.sandbox)),
    })
}

fn archive(cloud: &Cloud<'_>, key: &str, directory: &std::path::Path) -> String {
    let bearer = format!("Bearer {key}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/gzip")];
    let kept = http::call("PUT", &format!("{}/archives", cloud.url), &headers, packed(".", directory));
    assert_eq!(kept.status, 201, "{}", kept.text());
    kept.json()["archive_id"].as_str().expect("archive_id").to_owned()
}

/// An account with one of everything: a running sandbox with a bound port, an archive, an API key.
fn settle(cloud: &Cloud<'_>, host: &Host, key: &str) -> Owned {
    let call = |method: &str, path: &str, body: Value| {
        let (status, answer) = cloud.call(method, path, key, &body);
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer["id"].as_str().unwrap_or_default().to_owned()
    };
    let archive = archive(cloud, key, &host.web_app());
    let create = json!({"name": "web", "size_class": "micro", "archive_id": archive, "open_ports": [8080]});
    let sandbox = call("POST", "/sandboxes", create);
    let key = call("POST", "/api/api-keys", json!({"name": "mine", "scope": "read"}));
    Owned { sandbox, archive, key }
}

#[test]
fn no_call_reaches_what_is_another_accounts() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let (ada, bob) = (cloud.key("ada", "admin"), cloud.key("bob", "admin"));
    let owned = settle(&cloud, &host, &ada);
    let before = view(&cloud, &ada, &owned);
    let document = http::get(&format!("{}/openapi.json", cloud.url)).json();
    let calls = Call::all(&document);
    assert!(calls.len() > 50, "{} calls", calls.len());

    let mut reached = Vec::new();
    for call in &calls {
        if call.names_somebodys() && !OPEN.contains(&call.path) {
            let answer = call.send(&cloud, Some(&bob), &owned);
            let code = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default()["error"]["code"].clone();
            if answer.status != 403 || code != "forbidden" {
                reached.push(format!("{} {}: {} {}", call.method, call.path, answer.status, answer.text()));
            }
        }
    }
    assert!(reached.is_empty(), "with another's ids, not 403:\n{}", reached.join("\n"));

    // Names and slugs are an account's own: another's mean nothing.
    for name in ["web", before["sandboxes"][0]["slug"].as_str().unwrap_or("web")] {
        assert_eq!(cloud.call("GET", &format!("/deployed-sandboxes/{name}"), &bob, &Value::Null).0, 404, "{name}");
    }
    for list in ["/sandboxes?filter=all", "/sandboxes/inactive", "/deployed-sandboxes", "/sandbox-archives"] {
        assert_eq!(cloud.call("GET", list, &bob, &Value::Null), (200, json!([])), "{list}");
    }
    let (_, keys) = cloud.call("GET", "/api/api-keys", &bob, &Value::Null);
    assert!(keys.as_array().is_some_and(|keys| keys.len() == 1 && keys[0]["id"] != *owned.key), "{keys}");
    let (_, log) = cloud.call("GET", "/api/audit?limit=1000", &ada, &Value::Null);
    assert!(!log.to_string().contains("/restart"), "what a stranger tried is in the owner's log: {log}");
    assert_eq!(view(&cloud, &ada, &owned), before, "a stranger has changed something");

    let (mut open, mut allowed) = (Vec::new(), Vec::new());
    let reader = cloud.key("ada", "read");
    let before = view(&cloud, &ada, &owned);
    for call in calls.iter().filter(|call| !OPEN.contains(&call.path) && call.path != SIGNED) {
        for token in [None, Some("nonsense"), Some("heyo_api_nonsense")] {
            let answer = call.send(&cloud, token, &owned);
            if answer.status != 401 || answer.json()["error"]["code"] != "unauthorized" {
                open.push(format!("{} {} {token:?}: {} {}", call.method, call.path, answer.status, answer.text()));
            }
        }
        let answer = call.send(&cloud, Some(&reader), &owned);
        if (answer.status == 403) != call.changes() || answer.status >= 500 {
            allowed.push(format!("{} {}: {} {}", call.method, call.path, answer.status, answer.text()));
        }
    }
    assert!(open.is_empty(), "without credentials, not 401:\n{}", open.join("\n"));
    assert!(allowed.is_empty(), "with a key that reads:\n{}", allowed.join("\n"));
    assert_eq!(view(&cloud, &ada, &owned), before, "a key that reads has changed something");
}
