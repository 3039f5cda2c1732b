//! Images that nobody gives, registries that are not there or want a password, mirrors that stand in.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt};

use base64::{Engine, prelude::BASE64_STANDARD};
use heyvm_images::{Error, ImageStore, RegistryConfig};
use serde_json::{Value, json};

use crate::{
    layout::{Layout, file, layer},
    place::{OPERATOR, Place, Root, silent, wanted},
    server::{PASSWORD, Server, USER},
};

fn hello() -> Layout {
    Layout::new(&[layer(vec![file("hello", "hi")])], json!({}))
}

/// A port at which nothing listens.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn mirrors(hosts: &[&str]) -> Value {
    json!({"mirrors": hosts.iter().map(|host| format!("http://{host}")).collect::<Vec<_>>()})
}

#[tokio::test]
async fn a_missing_image_is_not_found() {
    let server = Server::start();
    server.push(hello().path(), "test/hello:1");
    let place = Place::using(&server);
    let absent = format!("sha256:{}", "0".repeat(64));
    for name in ["test/hello:2".to_owned(), "test/nothing:1".to_owned(), format!("test/hello@{absent}")] {
        let name = format!("{}/{name}", server.host);
        let error = place.store.pull(&name, OPERATOR, silent()).await.unwrap_err();
        assert!(matches!(&error, Error::NotFound(missing) if *missing == name), "{error:?}");
        // What the registry knows to be missing is not replaced, even if it is the default.
        let error = place.store.resolve(&wanted(&name, &name), silent()).await.unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error:?}");
    }
    for name in ["", "UPPER:1", "a b", "x@sha256:1"] {
        assert!(matches!(place.store.pull(name, OPERATOR, silent()).await, Err(Error::Invalid(_))), "{name}");
    }
    assert!(place.store.list().await.is_empty() && place.kept().is_empty());
}

#[tokio::test]
async fn a_registry_that_is_down_is_named_with_the_reason() {
    let host = nobody();
    let place = Place::new(json!({ &host: {"insecure": true} }));
    let error = place.store.pull(&format!("{host}/test/hello:1"), OPERATOR, silent()).await.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&host) && text.contains("refused"), "{text}");
    assert!(place.kept().is_empty());
}

#[tokio::test]
async fn a_registry_with_a_password_gives_to_those_who_know_it() {
    let server = Server::with_password();
    let name = server.push(hello().path(), "test/hello:1");
    let with = |password: &str| {
        Place::new(json!({ &server.host: {"insecure": true, "username": USER, "password": password} }))
    };

    let image = with(PASSWORD).store.pull(&name, OPERATOR, silent()).await.unwrap();
    assert_eq!(image.name, name);

    let error = with("wrong-guess").store.pull(&name, OPERATOR, silent()).await.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("refuses the user name and password") && !text.contains("wrong-guess"), "{text}");

    let place = Place::using(&server);
    let error = place.store.pull(&name, OPERATOR, silent()).await.unwrap_err();
    assert!(error.to_string().contains("wants a user name and password"), "{error}");
    assert!(place.kept().is_empty());
}

#[tokio::test]
async fn dockers_credentials_are_used_where_there_are_no_others() {
    let server = Server::with_password();
    let name = server.push(hello().path(), "test/hello:1");
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("config.json");
    let auth = BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
    fs::write(&path, json!({"auths": { &server.host: {"auth": auth} }}).to_string()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let store = |registry: Value| {
        let config: RegistryConfig = serde_json::from_value(json!({ &server.host: registry })).unwrap();
        ImageStore::open(home.path(), config.with_docker_config(&path)).unwrap()
    };
    store(json!({"insecure": true})).pull(&name, OPERATOR, silent()).await.unwrap();
    let own = store(json!({"insecure": true, "username": USER, "password": "wrong"}));
    assert!(own.pull(&name, OPERATOR, silent()).await.is_err(), "the configuration comes first");
}

#[tokio::test]
async fn a_mirror_stands_in_for_docker_io() {
    let server = Server::start();
    server.push(hello().path(), "library/ubuntu:24.04");
    let place = Place::new(json!({"docker.io": mirrors(&[&nobody(), &server.host])}));
    let resolved = place.store.resolve(&wanted("ubuntu:24.04", "ubuntu:24.04"), silent()).await.unwrap();
    assert_eq!((resolved.image.name.as_str(), resolved.substituted), ("ubuntu:24.04", None));
    assert_eq!(Root::of(&resolved.image).text("hello"), "hi");
}

#[tokio::test]
async fn the_registry_is_asked_for_what_its_mirrors_lack() {
    let [mirror, registry] = [Server::start(), Server::start()];
    let name = registry.push(hello().path(), "test/hello:1");
    let mut known = mirrors(&[&mirror.host]);
    known["insecure"] = json!(true);
    let place = Place::new(json!({ &registry.host: known }));
    place.store.pull(&name, OPERATOR, silent()).await.unwrap();

    // It may have what its mirror has not: while it is silent, nobody knows.
    drop(registry);
    let error = place.store.pull(&name, OPERATOR, silent()).await.unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&format!("{} has no such image", mirror.host)) && text.contains("refused"), "{text}");
}

#[tokio::test]
async fn a_registrys_password_is_not_for_its_mirrors() {
    let mirror = Server::with_password();
    let name = mirror.push(hello().path(), "test/hello:1").replace(&mirror.host, "registry.invalid");
    let mut registry = mirrors(&[&mirror.host]);
    registry["username"] = json!(USER);
    registry["password"] = json!(PASSWORD);
    let error =
        Place::new(json!({"registry.invalid": registry})).store.pull(&name, OPERATOR, silent()).await.unwrap_err();
    assert!(error.to_string().contains("wants a user name and password"), "{error}");

    let own = json!({"username": USER, "password": PASSWORD});
    let place = Place::new(json!({"registry.invalid": mirrors(&[&mirror.host]), &mirror.host: own}));
    place.store.pull(&name, OPERATOR, silent()).await.unwrap();
}
