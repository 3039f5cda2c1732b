//! A region that makes no VMs: the daemon's API over a Unix socket, with sandboxes that only have a status.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::watch};

/// How long a sandbox takes to be made or started: long enough for requests to overlap.
const MAKING: Duration = Duration::from_millis(100);

pub struct Region {
    sandboxes: Mutex<BTreeMap<String, Value>>,
    /// Bodies of the creates that came, with the sandbox's id.
    pub creates: Mutex<Vec<(String, Value)>>,
    /// What lists were asked for as changes, and which ids each of them had.
    pub asked_since: Mutex<Vec<String>>,
    pub listed: Mutex<Vec<Vec<String>>>,
    /// Each sandbox's last change.
    changes: Mutex<(u64, BTreeMap<String, u64>)>,
    /// While it is set, what starts is reported as stopped and does not end.
    pub halted: watch::Sender<bool>,
}

impl Region {
    pub fn serve(listener: UnixListener) -> Arc<Self> {
        let region = Arc::new(Self {
            sandboxes: Mutex::default(),
            creates: Mutex::default(),
            asked_since: Mutex::default(),
            listed: Mutex::default(),
            changes: Mutex::default(),
            halted: watch::channel(false).0,
        });
        let routes = Router::new()
            .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
            .route("/sandboxes", get(list).post(create))
            .route("/sandboxes/{id}", get(one))
            .route("/sandboxes/{id}/{operation}", post(operate))
            .with_state(Arc::clone(&region));
        tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        region
    }

    pub fn running(&self) -> usize {
        self.sandboxes.lock().unwrap().values().filter(|info| info["status"] == "running").count()
    }

    fn info(&self, id: &str) -> Option<Value> {
        self.sandboxes.lock().unwrap().get(id).cloned()
    }

    pub fn enter(&self, id: &str, status: &str) {
        if let Some(info) = self.sandboxes.lock().unwrap().get_mut(id) {
            info["status"] = status.into();
        }
        self.changed(id);
    }

    pub fn forget(&self, id: &str) {
        self.sandboxes.lock().unwrap().remove(id);
    }

    fn changed(&self, id: &str) {
        let mut changes = self.changes.lock().unwrap();
        changes.0 += 1;
        let now = changes.0;
        changes.1.insert(id.to_owned(), now);
    }
}

type Answer = (StatusCode, Json<Value>);

async fn create(State(region): State<Arc<Region>>, headers: HeaderMap, Json(body): Json<Value>) -> Answer {
    let id = headers["heyvm-sandbox-id"].to_str().unwrap().to_owned();
    region.creates.lock().unwrap().push((id.clone(), body.clone()));
    let now = chrono::Utc::now().to_rfc3339();
    let made = json!({
        "id": id, "name": body["name"], "slug": body["slug"], "status": "running", "image": "test:1",
        "backend_type": "qemu", "region": "US", "size_class": "small", "disk_size_gb": 10, "is_deployed": false,
        "archive_id": null, "created_at": now, "status_changed_at": now, "uptime_secs": 0, "ttl_seconds": null,
        "expires_at": null, "env_vars": body.get("env_vars").cloned().unwrap_or(json!({})), "start_command": null,
        "working_directory": "/workspace", "setup_hooks": [], "error_message": null, "reason": null, "urls": [],
    });
    tokio::time::sleep(MAKING).await;
    // The same id again gives the same sandbox.
    let info = region.sandboxes.lock().unwrap().entry(id.clone()).or_insert(made).clone();
    region.changed(&id);
    (StatusCode::CREATED, Json(info))
}

async fn operate(State(region): State<Arc<Region>>, Path((id, operation)): Path<(String, String)>) -> Answer {
    if operation == "stop" {
        region.enter(&id, "stopped");
    } else if ["start", "restart", "restore"].contains(&operation.as_str()) {
        region.enter(&id, "stopped");
        region.halted.subscribe().wait_for(|halted| !halted).await.unwrap();
        tokio::time::sleep(MAKING).await;
        region.enter(&id, "running");
    }
    one(State(region), Path(id)).await
}

async fn one(State(region): State<Arc<Region>>, Path(id): Path<String>) -> Answer {
    match region.info(&id) {
        Some(info) => (StatusCode::OK, Json(info)),
        None => (StatusCode::NOT_FOUND, Json(json!({"error": {"code": "sandbox_not_found", "message": "unknown"}}))),
    }
}

#[derive(serde::Deserialize)]
struct Listed {
    since: Option<String>,
    ids: Option<String>,
}

async fn list(State(region): State<Arc<Region>>, Query(query): Query<Listed>) -> (HeaderMap, Json<Value>) {
    let (now, changes) = region.changes.lock().unwrap().clone();
    let after = query.since.map(|since| {
        region.asked_since.lock().unwrap().push(since.clone());
        since.split_once('-').filter(|(run, _)| *run == "00000001").map_or(0, |(_, number)| number.parse().unwrap())
    });
    let mut found: Vec<Value> = region.sandboxes.lock().unwrap().values().cloned().collect();
    let id = |info: &Value| info["id"].as_str().unwrap().to_owned();
    found.retain(|info| after.is_none_or(|after| changes[&id(info)] > after));
    found.retain(|info| query.ids.as_ref().is_none_or(|ids| ids.split(',').any(|asked| asked == id(info))));
    region.listed.lock().unwrap().push(found.iter().map(id).collect());
    let mut headers = HeaderMap::new();
    headers.insert("heyvm-revision", format!("00000001-{now}").parse().unwrap());
    (headers, Json(found.into()))
}
