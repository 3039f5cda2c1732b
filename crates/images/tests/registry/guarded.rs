//! Pulls for a server's accounts: a registry cannot send them into the host's network, and the operator's credentials are
//! not for them. Images that go: the least recently used, never one in use.

use std::net::TcpListener;

use heyvm_images::{Error, Extent, ImageStore, RegistryConfig, Requester, Wanted};
use serde_json::{Value, json};

use crate::{
    layout::{Layout, file, layer},
    liar::{Liar, response},
    place::{OPERATOR, Place, prune, silent, wanted},
    server::{PASSWORD, Server, USER},
};

const TENANT: Requester = Requester::Tenant;
const SECRET: &str = "INTERNAL-SECRET";

fn store(place: &Place, registries: Value, allowed: &[&str]) -> ImageStore {
    let config: RegistryConfig = serde_json::from_value(registries).unwrap();
    let allowed = allowed.iter().map(|name| (*name).to_owned()).collect();
    ImageStore::open(place.home(), config.allowing(allowed)).unwrap()
}

fn inside() -> Liar {
    Liar::new(|_| response("418 I'm a teapot", "", &format!("{{\"token\":\"{SECRET}\"}}")))
}

#[tokio::test]
async fn a_registry_does_not_lead_an_account_inside() {
    let place = Place::new(json!({}));
    type Lie = fn(&str, &str) -> String;
    let lies: [(&str, Lie); 4] = [
        ("a redirect", |inside, _| response("302 Found", &format!("Location: http://{inside}/latest/x\r\n"), "")),
        ("a redirect to TLS", |inside, _| response("307 Moved", &format!("Location: https://{inside}/x\r\n"), "")),
        ("a token service", |inside, head| {
            let realm = format!("WWW-Authenticate: Bearer realm=\"http://{inside}/latest/x\",service=\"x\"\r\n");
            if head.contains("uthorization") {
                response("500 Oops", "", "seen")
            } else {
                response("401 Unauthorized", &realm, "")
            }
        }),
        ("a token service with TLS", |inside, _| {
            response("401 Unauthorized", &format!("WWW-Authenticate: Bearer realm=\"https://{inside}/x\"\r\n"), "")
        }),
    ];
    for (what, lie) in lies {
        let inside = inside();
        let target = inside.host.clone();
        let registry = Liar::new(move |head| lie(&target, head));
        let registries = json!({ &registry.host: {"insecure": true, "username": USER, "password": PASSWORD} });
        let store = store(&place, registries, &[&registry.host]);
        let error = store.pull(&format!("{}/a/b:1", registry.host), TENANT, silent()).await.unwrap_err();
        assert!(matches!(error, Error::Registry { .. }), "{what}: {error:?}");
        assert!(inside.requests().is_empty(), "{what}: {:?}", inside.requests());
        let told = format!("{error:?} {:?}", registry.requests());
        assert!(!told.contains(SECRET) && !told.contains("Basic "), "{what}: {told}");
    }
}

#[tokio::test]
async fn a_name_of_a_loopback_address_is_not_connected_to() {
    let inside = inside();
    let port = inside.host.rsplit(':').next().unwrap();
    let store = store(&Place::new(json!({})), json!({}), &["*"]);
    for host in ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]", "0.0.0.0"] {
        let refused = store.pull(&format!("{host}:{port}/a/b:1"), TENANT, silent()).await;
        assert!(refused.is_err(), "{host}");
        assert!(inside.requests().is_empty(), "{host}: {:?}", inside.requests());
    }
}

#[tokio::test]
async fn a_registrys_words_are_repeated_to_nobody() {
    let registry = Liar::new(|_| response("500 Oops", "", SECRET));
    let place = Place::new(json!({}));
    let store = store(&place, json!({ &registry.host: {"insecure": true} }), &[&registry.host]);
    for requester in [TENANT, OPERATOR] {
        let error = store.pull(&format!("{}/a/b:1", registry.host), requester, silent()).await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains("HTTP 500") && !text.contains(SECRET), "{text}");
    }
}

#[tokio::test]
async fn an_account_pulls_from_allowed_registries_alone() {
    let server = Server::start();
    let name = server.push(Layout::new(&[layer(vec![file("a", "")])], json!({})).path(), "test/hello:1");
    let place = Place::using(&server);
    let error = place.store.pull(&name, TENANT, silent()).await.unwrap_err();
    assert!(matches!(&error, Error::RegistryNotAllowed(host) if *host == server.host), "{error:?}");
    let allowed = store(&place, json!({ &server.host: {"insecure": true} }), &[&server.host]);
    allowed.pull(&name, TENANT, silent()).await.unwrap();
}

#[tokio::test]
async fn the_operators_credentials_and_what_they_gave_are_the_operators() {
    let server = Server::with_password();
    let name = server.push(Layout::new(&[layer(vec![file("a", "")])], json!({})).path(), "test/hello:1");
    let place = Place::new(json!({}));
    let known = json!({ &server.host: {"insecure": true, "username": USER, "password": PASSWORD} });
    let store = store(&place, known, &[&server.host]);
    let error = store.pull(&name, TENANT, silent()).await.unwrap_err();
    assert!(error.to_string().contains("wants a user name and password"), "{error}");

    let image = store.pull(&name, OPERATOR, silent()).await.unwrap();
    assert!(image.private);
    let tenants = Wanted { requester: TENANT, ..wanted(&name, "ubuntu:24.04") };
    assert!(store.resolve(&tenants, silent()).await.is_err(), "it is here, but not for accounts");
    assert!(store.resolve(&Wanted { named: Some(image.digest.clone()), ..tenants }, silent()).await.is_err());
    // What every account runs is the operator's choice.
    let default = Wanted { named: None, default_image: name.clone(), full: false, requester: TENANT };
    assert_eq!(store.resolve(&default, silent()).await.unwrap().image.digest, image.digest);
}

#[tokio::test]
async fn a_silent_registry_is_asked_once_for_the_default_image_and_never_where_none_was_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let place = Place::new(json!({ &host: {"insecure": true} }));
    let default = format!("{host}/base:1");
    let tar = place.home().join("base.tar");
    std::fs::write(&tar, crate::layout::tar(vec![file("etc/x", "")])).unwrap();
    let stands_in = name_of_the_stand_in();
    place.store.import(&tar, Some(&stands_in), silent()).await.unwrap();

    let unnamed = Wanted { named: None, ..wanted("", &default) };
    let named = wanted(&default, &default);
    let resolved = place.store.resolve(&unnamed, silent()).await.unwrap();
    assert_eq!((resolved.image.name, resolved.stands_in, resolved.substituted), (stands_in.clone(), true, None));
    let first = place.store.resolve(&named, silent()).await.unwrap();
    let note = first.substituted.unwrap();
    assert!(note.contains(&default) && note.contains(&stands_in), "{note}");

    // By now something listens there. It must not be asked again so soon.
    let listener = TcpListener::bind(&host).unwrap();
    listener.set_nonblocking(true).unwrap();
    for wanted in [&unnamed, &named] {
        assert!(place.store.resolve(wanted, silent()).await.unwrap().stands_in);
        assert!(listener.accept().is_err());
    }
}

/// As os-release(5) of this host has it.
fn name_of_the_stand_in() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
        line.trim_matches('"').to_owned()
    };
    format!("heyvm/{}:{}", field("ID"), field("VERSION_ID"))
}

#[tokio::test]
async fn the_least_recently_used_images_go_first_and_never_one_in_use() {
    let server = Server::start();
    let place = Place::using(&server);
    let mut images = Vec::new();
    for name in ["one", "two", "three", "four"] {
        let layout = Layout::new(&[layer(vec![file("name", name)])], json!({}));
        let reference = server.push(layout.path(), &format!("test/{name}:1"));
        images.push(place.store.pull(&reference, OPERATOR, silent()).await.unwrap());
    }
    let tar = place.home().join("base.tar");
    std::fs::write(&tar, crate::layout::tar(vec![file("etc/x", "")])).unwrap();
    let imported = place.store.import(&tar, Some("mine:1"), silent()).await.unwrap();
    // File times may be coarse.
    std::thread::sleep(std::time::Duration::from_millis(50));
    place.store.touch(&images[0].digest).await;

    let all: u64 = images.iter().chain([&imported]).map(|image| image.size_bytes).sum();
    let removed = prune(&place.store, &[&images[1].digest], Extent::Budget(all - 1)).await;
    assert_eq!(removed, [images[2].name.clone()], "the second is older, but in use");
    let removed = prune(&place.store, &[&images[1].digest], Extent::Budget(0)).await;
    assert_eq!(removed, [images[3].name.clone(), images[0].name.clone()], "the first was used since");
    let left: Vec<String> = place.store.list().await.into_iter().map(|image| image.name).collect();
    assert_eq!(left, [images[1].name.clone(), "mine:1".into()]);
    assert_eq!(prune(&place.store, &[], Extent::All).await.len(), 2);
    assert!(place.kept().is_empty(), "{:?}", place.kept());
}
