//! Ports and their URLs.

use std::{collections::HashSet, time::Duration};

use heyvm_agent_protocol::v1::MetricsRequest;
use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::ConnectError;
use heyvm_control_plane::Who;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::daemon::{Daemon, free_port, server, sink};

fn bind(daemon: &Daemon, who: &str, port: i64) -> Result<BoundPort, heyvm_api::ApiError> {
    daemon.run(daemon.plane().bind(&Who::owners(who), BindRequest { port, is_public: None }))
}

/// The body of `GET /` by way of a subdomain.
pub fn ask(daemon: &Daemon, subdomain: &str) -> Result<String, ConnectError> {
    daemon.run(async {
        let mut stream = daemon.plane().connect(subdomain).await?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        Ok(answer.rsplit("\r\n").next().unwrap().to_owned())
    })
}

#[test]
fn a_subdomain_leads_to_its_port_as_long_as_it_is_bound() {
    let daemon = Daemon::new();
    let port = free_port();
    let command = Some(server(port, "here").into());
    daemon
        .create(CreateRequest { start_command: command, open_ports: vec![i64::from(port)], ..daemon.request("web") })
        .unwrap();
    let bound = bind(&daemon, "web", i64::from(port)).unwrap();
    assert_eq!(bound.endpoint, daemon.get("web").urls[0], "binding again gives the same URL");
    let subdomain = bound.endpoint.subdomain;
    assert_eq!(ask(&daemon, &subdomain).unwrap(), "here");
    assert!(matches!(ask(&daemon, "nobody"), Err(ConnectError::UnknownSubdomain)));
    let silent = bind(&daemon, "web", 1).unwrap().endpoint.subdomain;
    assert!(matches!(ask(&daemon, &silent), Err(ConnectError::NothingListens(1))));

    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert!(matches!(ask(&daemon, &subdomain), Err(ConnectError::NotRunning(_))));
    let started = daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    assert_eq!(started.urls[0].subdomain, subdomain);
    assert_eq!(ask(&daemon, &subdomain).unwrap(), "here");

    daemon.run(daemon.plane().unbind(&Who::owners("web"), i64::from(port))).unwrap();
    assert!(matches!(ask(&daemon, &subdomain), Err(ConnectError::UnknownSubdomain)));
    let unbound = daemon.run(daemon.plane().unbind(&Who::owners("web"), i64::from(port))).unwrap_err();
    assert_eq!(unbound.code, ErrorCode::PortNotBound);
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert!(matches!(ask(&daemon, &silent), Err(ConnectError::UnknownSubdomain)));
}

#[test]
fn many_are_bound_at_once_and_all_of_them_lead_somewhere() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    let binding: Vec<_> = (1000..1040)
        .map(|port| {
            let plane = daemon.plane().clone();
            // Each port twice: two requests for one port give one URL.
            daemon.spawn(async move {
                plane.bind(&Who::owners("web"), BindRequest { port: port / 2, is_public: None }).await.unwrap()
            })
        })
        .collect();
    let bound: Vec<_> = binding.into_iter().map(|each| daemon.run(each).unwrap().endpoint).collect();
    let subdomains: HashSet<_> = bound.iter().map(|endpoint| endpoint.subdomain.clone()).collect();
    assert_eq!(subdomains.len(), 20);
    for subdomain in subdomains {
        assert!(matches!(ask(&daemon, &subdomain), Err(ConnectError::NothingListens(_))));
    }
    assert_eq!(daemon.run(daemon.plane().endpoints(&Who::owners("web"))).unwrap().len(), 20);
    assert_eq!(bind(&daemon, "web", 70000).unwrap_err().code, ErrorCode::InvalidPort);
}

#[test]
fn waiting_for_a_port() {
    let daemon = Daemon::new();
    let port = free_port();
    daemon
        .create(CreateRequest {
            start_command: Some(format!("sleep 0.7; {}", server(port, "late")).into()),
            ..daemon.request("web")
        })
        .unwrap();
    let wait = |path: Option<&str>, seconds| {
        daemon.run(daemon.plane().wait_for_port(
            &Who::owners("web"),
            i64::from(port),
            path,
            Duration::from_secs_f64(seconds),
        ))
    };
    assert!(!wait(None, 0.01).unwrap());
    assert!(wait(Some("/health"), 10.0).unwrap());
    assert!(!wait(Some("/missing"), 0.5).unwrap());
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!(wait(None, 1.0).unwrap_err().code, ErrorCode::InvalidState);
}

#[test]
fn calls_answer_while_ports_are_flooded() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    let id = daemon.get("web").id;
    daemon.run(async {
        let listener = || tokio::net::TcpListener::bind("127.0.0.1:0");
        let (deaf, loud) = (listener().await.unwrap(), listener().await.unwrap());
        let (deaf_port, loud_port) = (deaf.local_addr().unwrap().port(), loud.local_addr().unwrap().port());
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((stream, _)) = deaf.accept().await {
                kept.push(stream);
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = loud.accept().await {
                tokio::spawn(async move { while stream.write_all(&[b'x'; 16 << 10]).await.is_ok() {} });
            }
        });
        let mut held = Vec::new();
        for _ in 0..40 {
            let mut upload = daemon.plane().connect_to(&id, deaf_port).await.unwrap();
            let quiet = Duration::from_millis(200);
            while let Ok(written) = tokio::time::timeout(quiet, upload.write_all(&[b'x'; 64 << 10])).await {
                written.unwrap();
            }
            held.push(upload);
            held.push(daemon.plane().connect_to(&id, loud_port).await.unwrap());
        }
        let agent = daemon.plane().agent(&Who::owners("web")).await.unwrap();
        let called = async { agent.client().await.unwrap().metrics(MetricsRequest {}).await.unwrap() };
        tokio::time::timeout(Duration::from_secs(120), called).await.expect("the agent does not answer");
        let silent = daemon.plane().connect_to(&id, 1).await;
        assert!(matches!(silent, Err(ConnectError::NothingListens(1))));
    });
}

#[test]
fn ports_of_a_sandbox_are_limited() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    for port in 1..=32 {
        bind(&daemon, "web", port).unwrap();
    }
    let refused = bind(&daemon, "web", 33).unwrap_err();
    assert_eq!(refused.code, ErrorCode::LimitExceeded);
    assert!(refused.message.contains("32") && refused.hint.is_some());
    // A bound one is bound already, and one that is unbound makes room.
    bind(&daemon, "web", 1).unwrap();
    daemon.run(daemon.plane().unbind(&Who::owners("web"), 1)).unwrap();
    bind(&daemon, "web", 33).unwrap();
    let all = CreateRequest { open_ports: (1..=33).collect(), ..daemon.request("other") };
    assert_eq!(daemon.create(all).unwrap_err().code, ErrorCode::LimitExceeded);
}
