//! A client hangs up at any await point: what was begun comes to its end, and store and memory say the same.

use std::{future::poll_fn, pin::pin, task::Poll};

use futures::{FutureExt, StreamExt, future::BoxFuture};
use heyvm_api::{ApiError, sandbox::*};
use heyvm_control_plane::{Account, Asked, ControlPlane, Who};
use heyvm_store::{EndpointRow, Store};

use crate::daemon::{Daemon, eventually, keyed, sink};

/// No operation has more await points than this.
const MOST_POLLS: usize = 500;

/// Drops `call` at its `polls`-th await point; whether it came to its end before.
async fn dropped_at(call: impl Future, polls: usize) -> bool {
    let (mut call, mut polled) = (pin!(call), 0);
    poll_fn(|context| {
        polled += 1;
        match call.as_mut().poll(context) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if polled >= polls => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// What clients see of one sandbox, in words that can be compared.
fn described(info: &SandboxInfo) -> String {
    let mut ports: Vec<_> = info.urls.iter().map(|url| (url.port, url.is_public, url.subdomain.clone())).collect();
    ports.sort();
    let SandboxInfo { id, name, status, ttl_seconds, size_class, disk_size_gb, checkpoint_at, mounts, .. } = info;
    format!(
        "{id} {name} {status:?} {ttl_seconds:?} {size_class:?} {disk_size_gb} {checkpoint_at:?} {mounts:?} {ports:?}"
    )
}

fn in_memory(daemon: &Daemon) -> Vec<String> {
    let mut all: Vec<_> = daemon.list(ListFilter::All).iter().map(described).collect();
    all.sort();
    all
}

/// The same, read from the database.
fn in_store(daemon: &Daemon, store: &Store) -> Vec<String> {
    let (rows, endpoints) = daemon.run(async { (store.sandboxes().await.unwrap(), store.endpoints().await.unwrap()) });
    let mut all: Vec<_> = rows
        .iter()
        .map(|row| {
            let data: serde_json::Value = serde_json::from_str(&row.data).unwrap();
            let of = |field: &str| data[field].clone();
            let mut info: SandboxInfo = daemon.get(&row.id);
            (info.id, info.name) = (row.id.clone(), row.name.clone());
            info.status = serde_json::from_value(of("status")).unwrap();
            info.ttl_seconds = serde_json::from_value(of("ttl_seconds")).unwrap();
            info.size_class = serde_json::from_value(of("size_class")).unwrap();
            info.disk_size_gb = serde_json::from_value(of("disk_gib")).unwrap();
            info.checkpoint_at = serde_json::from_value(of("checkpoint_at")).unwrap();
            info.mounts = serde_json::from_value(of("mounts")).unwrap();
            let bound = endpoints.iter().filter(|endpoint| endpoint.sandbox_id == row.id);
            let url = |endpoint: &EndpointRow| Endpoint {
                subdomain: endpoint.subdomain.clone(),
                hostname: String::new(),
                url: String::new(),
                local_url: None,
                port: endpoint.port,
                is_public: endpoint.is_public,
            };
            info.urls = bound.map(url).collect();
            described(&info)
        })
        .collect();
    all.sort();
    all
}

fn archive(daemon: &Daemon) -> String {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o644);
    tar.append_data(&mut header, "file", &b"hi"[..]).unwrap();
    let bytes = tar.into_inner().unwrap().finish().unwrap();
    let body = futures::stream::iter([Ok(bytes::Bytes::from(bytes))]).boxed();
    daemon.run(daemon.plane().put_archive(&Account::owner(), None, body)).unwrap().archive_id
}

type Operation = Box<dyn Fn(std::sync::Arc<ControlPlane>) -> BoxFuture<'static, Result<(), ApiError>>>;

/// Every operation that changes a sandbox, each with what must come before it.
fn operations(daemon: &Daemon) -> Vec<(&'static str, Operation)> {
    let host = daemon.home().with_extension("mounted");
    std::fs::create_dir_all(&host).unwrap();
    let archive_id = archive(daemon);
    let web = || Who::owners("web");
    macro_rules! operation {
        ($name:literal, |$plane:ident| $call:expr) => {
            ($name, Box::new(move |$plane: std::sync::Arc<ControlPlane>| async move { $call.await.map(drop) }.boxed()))
        };
    }
    let mount = move |path: &str| Mount {
        host_path: host.to_str().unwrap().into(),
        sandbox_path: path.into(),
        read_only: false,
    };
    let grown = |gb| ResizeRequest { disk_size_gb: Some(gb), size_class: None };
    let class = |name: &str| ResizeRequest { size_class: Some(name.into()), disk_size_gb: None };
    let replaced = ReplaceMountRequest { archive_id, sandbox_path: None, archive_root: None };
    let create = daemon.request("other");
    let keyed_create = daemon.request("keyed");
    let replacing = CreateRequest { replace: true, open_ports: vec![81], ..daemon.request("replaced") };
    vec![
        operation!("ttl", |plane| plane.set_ttl(&web(), Some(600))),
        operation!("no ttl", |plane| plane.set_ttl(&web(), None)),
        operation!("bind", |plane| plane.bind(&web(), BindRequest { port: 80, is_public: None })),
        operation!("unbind", |plane| plane.unbind(&web(), 80)),
        operation!("stop", |plane| plane.stop(&web())),
        operation!("start", |plane| plane.start(&web(), sink())),
        operation!("restart", |plane| plane.restart(&web(), sink())),
        operation!("grow", |plane| plane.resize(&web(), &grown(20), sink())),
        operation!("class", |plane| plane.resize(&web(), &class("medium"), sink())),
        operation!("checkpoint", |plane| plane.checkpoint(&web())),
        operation!("restore", |plane| plane.restore(&web(), sink())),
        ("replace-mount", {
            Box::new(move |plane| {
                let request = replaced.clone();
                async move { plane.replace_mount(&Who::owners("web"), request).await.map(drop) }.boxed()
            })
        }),
        ("stop for a mount", Box::new(|plane| async move { plane.stop(&Who::owners("web")).await.map(drop) }.boxed())),
        ("mount", {
            Box::new(move |plane| {
                let mount = mount("/mounted");
                async move { plane.add_mount(&Who::owners("web"), mount).await.map(drop) }.boxed()
            })
        }),
        ("create", {
            Box::new(move |plane| {
                let request = create.clone();
                async move { plane.create(request, Asked::default(), sink()).await.map(drop) }.boxed()
            })
        }),
        ("create with a key", {
            Box::new(move |plane| {
                let request = keyed_create.clone();
                async move { plane.create(request, keyed("k"), sink()).await.map(drop) }.boxed()
            })
        }),
        ("replace", {
            Box::new(move |plane| {
                let request = replacing.clone();
                async move { plane.create(request, keyed("replace"), sink()).await.map(drop) }.boxed()
            })
        }),
        operation!("remove", |plane| plane.remove(&web())),
    ]
}

#[test]
fn dropped_operations_leave_store_and_memory_the_same() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    daemon.create(CreateRequest { open_ports: vec![80, 81], ..daemon.request("replaced") }).unwrap();
    let store = daemon.run(Store::open(&daemon.home().join("heyvm.db"))).unwrap();
    let agree = |when: &str| {
        eventually(&format!("store and memory agree after {when}"), || {
            let (memory, stored) = (in_memory(&daemon), in_store(&daemon, &store));
            if memory == stored { Ok(()) } else { Err(format!("{memory:#?}\n{stored:#?}")) }
        });
    };
    for (name, operation) in operations(&daemon) {
        let ended = (1..MOST_POLLS).find(|polls| {
            let ended = daemon.run(dropped_at(operation(daemon.plane().clone()), *polls));
            agree(&format!("{name}, dropped at await point {polls}"));
            ended
        });
        assert!(ended.is_some(), "{name} has more than {MOST_POLLS} await points");
    }
    assert_eq!(daemon.get("web").status, Status::Removed);
    daemon.run(store.close());
}

#[test]
fn what_was_begun_comes_to_its_end_without_its_client() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    let first_poll = |call: BoxFuture<'static, Result<(), ApiError>>| assert!(!daemon.run(dropped_at(call, 1)));
    let plane = daemon.plane().clone();
    first_poll(
        async move { plane.bind(&Who::owners("web"), BindRequest { port: 80, is_public: None }).await.map(drop) }
            .boxed(),
    );
    let url = eventually("the port is bound", || daemon.get("web").urls.pop().ok_or_else(String::new));
    assert!(daemon.plane().route(&url.subdomain).is_ok(), "the proxy knows it");
    let plane = daemon.plane().clone();
    first_poll(async move { plane.set_ttl(&Who::owners("web"), Some(3600)).await.map(drop) }.boxed());
    eventually("the time-to-live is set", || daemon.get("web").ttl_seconds.map(drop).ok_or_else(String::new));
    let plane = daemon.plane().clone();
    first_poll(async move { plane.unbind(&Who::owners("web"), 80).await.map(drop) }.boxed());
    eventually("the port is unbound", || if daemon.get("web").urls.is_empty() { Ok(()) } else { Err(String::new()) });
}
