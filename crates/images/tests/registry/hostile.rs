//! Blobs that are not what they should be, and layers that want out.

use std::{fs, path::Path};

use heyvm_images::{Error, Image};
use serde_json::json;
use tar::EntryType;

use crate::{
    layout::{Item, Layout, device, dir, file, hard_link, layer, symlink},
    place::{OPERATOR, Place, Root, silent},
    server::Server,
};

#[tokio::test]
async fn a_tampered_blob_is_refused_and_leaves_nothing() {
    let server = Server::start();
    let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let parts = [layer(vec![file("first", "1")]), layer(vec![file("data", &content)])];
    let digest = parts[1].digest();
    let layout = Layout::new(&parts, json!({"Env": ["A=1"]}));
    let name = server.push(layout.path(), "test/hello:1");
    let config = {
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(layout.blob_path(&layout.digest)).unwrap()).unwrap();
        manifest["config"]["digest"].as_str().unwrap().to_owned()
    };
    for blob in [digest, config, layout.digest.clone()] {
        let path = server.blob(&blob);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        fs::write(&path, &bad).unwrap();
        for reference in [&name, &format!("{}/test/hello@{}", server.host, layout.digest)] {
            let place = Place::using(&server);
            let error = place.store.pull(reference, OPERATOR, silent()).await.unwrap_err();
            assert!(!matches!(error, Error::Io { .. }), "{error:?}");
            assert!(place.store.list().await.is_empty() && place.kept().is_empty(), "{blob}");
        }
        fs::write(&path, &good).unwrap();
    }
    Place::using(&server).store.pull(&name, OPERATOR, silent()).await.unwrap();
}

#[tokio::test]
async fn a_blob_longer_than_its_manifest_says_is_refused() {
    let server = Server::start();
    let part = layer(vec![file("data", "x")]);
    let digest = part.digest();
    let name = server.push(Layout::new(&[part], json!({})).path(), "test/hello:1");
    let path = server.blob(&digest);
    let mut bytes = fs::read(&path).unwrap();
    bytes.resize(bytes.len() + (1 << 20), 0);
    fs::write(&path, bytes).unwrap();
    let place = Place::using(&server);
    let error = place.store.pull(&name, OPERATOR, silent()).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert!(place.kept().is_empty());
}

/// What becomes of an image with these entries over a plain layer.
async fn pulled(place: &Place, server: &Server, items: Vec<Item>) -> Result<Image, Error> {
    let layers = [layer(vec![dir("etc"), file("etc/passwd", "root")]), layer(items)];
    let name = server.push(Layout::new(&layers, json!({})).path(), "test/hostile:1");
    place.store.pull(&name, OPERATOR, silent()).await
}

/// All that is in a directory, but what a store may have.
fn around(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn layers_that_want_out_are_refused() {
    let server = Server::start();
    let place = Place::using(&server);
    let cases: Vec<(&str, Vec<Item>)> = vec![
        ("above", vec![file("../evil", "x")]),
        ("far above", vec![file("a/../../../../evil", "x")]),
        ("a link to a file above", vec![hard_link("evil", "../../../index.json")]),
        ("a link to a file outside", vec![hard_link("evil", "/proc/self/environ")]),
        ("a whiteout of what is above", vec![file(".wh...", "")]),
        ("a file over all", vec![file(".wh.", "")]),
        ("a huge size", vec![file("huge", "x").declaring(1 << 42)]),
        ("a size that is not there", vec![file("large", "x").declaring(1 << 30)]),
        ("a circle", vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "x")]),
        ("an endless name", vec![file("name", vec![b'n'; 8 << 20]).kind(EntryType::GNULongName)]),
    ];
    for (what, items) in cases {
        let result = pulled(&place, &server, items).await;
        assert!(matches!(result, Err(Error::Invalid(_))), "{what}: {result:?}");
        assert!(place.store.list().await.is_empty() && place.kept().is_empty(), "{what}");
        assert_eq!(around(place.home()), ["images", "kernels"], "{what}");
    }
}

#[tokio::test]
async fn names_that_begin_at_the_root_are_below_the_images_root() {
    let server = Server::start();
    let place = Place::using(&server);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("known"), "host").unwrap();
    let out = outside.path().to_str().unwrap();
    let items = vec![
        file(&format!("{out}/absolute"), "x"),
        symlink("link", out),
        file("link/through", "x"),
        file("link/known", "image"),
        symlink("up", "../../../../../../../../../../../../../../../.."),
        file("up/etc/evil-heyvm-test", "x"),
        hard_link("passwd", "/etc/passwd"),
        symlink("etc/shadow", "/etc/shadow"),
    ];
    let image = pulled(&place, &server, items).await.unwrap();
    assert_eq!(around(outside.path()), ["known"]);
    assert_eq!(fs::read_to_string(outside.path().join("known")).unwrap(), "host");
    assert!(!Path::new("/etc/evil-heyvm-test").exists());
    let root = Root::of(&image);
    for name in ["absolute", "through", "known"] {
        assert!(root.has(&format!("{}/{name}", out.trim_start_matches('/'))), "{name}");
    }
    assert!(root.has("etc/evil-heyvm-test"));
    assert_eq!(root.text("passwd"), "root", "the image's own file");
}

#[tokio::test]
async fn a_device_exists_in_the_image_alone() {
    use std::os::unix::fs::FileTypeExt;
    let server = Server::start();
    let place = Place::using(&server);
    let image = pulled(&place, &server, vec![device("null", 1, 3), file("after", "x")]).await.unwrap();
    let root = Root::of(&image);
    assert!(root.has("after"));
    if root.has("null") {
        assert!(root.path("null").symlink_metadata().unwrap().file_type().is_char_device());
    }
    assert_eq!(place.kept(), [image.digest.replace(':', "-")]);
}
