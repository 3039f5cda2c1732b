//! Images from files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use heyvm_images::{Error, Image};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    layout::{Blob, Item, Layout, dir, file, gzip, layer, symlink, tar, zstd_layer},
    place::{Place, Root, silent},
};

fn image(second: fn(Vec<Item>) -> Blob) -> Layout {
    let layers = [layer(vec![dir("etc"), file("etc/motd", "one")]), second(vec![dir("etc"), file("etc/motd", "two")])];
    Layout::new(&layers, json!({"Env": ["A=1"], "WorkingDir": "/srv"}))
}

fn written(name: &str, bytes: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn skopeo(layout: &Path, target: &str) {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet", &format!("oci:{}", layout.display()), target]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
}

/// All of a directory as a tar, as `tar -C DIR -c .` has it.
fn packed(dir: &Path) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir).unwrap();
    builder.into_inner().unwrap()
}

fn check(image: &Image, name: &str) {
    assert_eq!((image.name.as_str(), image.source.as_str()), (name, "import"));
    assert_eq!(image.config.env, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(image.config.working_dir.as_deref(), Some("/srv"));
    assert_eq!(Root::of(image).text("etc/motd"), "two");
}

#[tokio::test]
async fn a_docker_save_tar() {
    let place = Place::new(json!({}));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.tar");
    skopeo(image(layer).path(), &format!("docker-archive:{}:example.com/team/app:7", path.display()));
    let imported = place.store.import(&path, None, silent()).await.unwrap();
    check(&imported, "example.com/team/app:7");
    check(&place.store.import(&path, Some("mine"), silent()).await.unwrap(), "mine");
    assert_eq!(place.kept().len(), 1, "the same root is kept once");
    assert_eq!(place.store.list().await.len(), 2);
}

#[tokio::test]
async fn an_oci_layout_as_directory_and_as_tar() {
    let place = Place::new(json!({}));
    let layout = image(zstd_layer);
    let imported = place.store.import(layout.path(), Some("one"), silent()).await.unwrap();
    check(&imported, "one");
    assert_eq!(imported.digest, layout.digest);
    let (_dir, path) = written("layout.tar.gz", gzip(&packed(layout.path())));
    check(&place.store.import(&path, None, silent()).await.unwrap(), "layout");

    // As skopeo writes it, with a tag.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.tar");
    skopeo(layout.path(), &format!("oci-archive:{}:7", path.display()));
    check(&place.store.import(&path, None, silent()).await.unwrap(), "app:7");
}

#[tokio::test]
async fn an_oci_layout_of_several_architectures() {
    let place = Place::new(json!({}));
    let [arm, amd] = ["arm64", "amd64"].map(|name| [layer(vec![file("architecture", name)])]);
    let layout = Layout::multi(&[("arm64", &arm), ("amd64", &amd)]);
    let imported = place.store.import(layout.path(), Some("multi"), silent()).await.unwrap();
    assert_eq!(Root::of(&imported).text("architecture"), "amd64");
    let error = place.store.import(Layout::multi(&[("arm64", &arm)]).path(), Some("arm"), silent()).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains("linux/amd64")), "{error:?}");
}

#[tokio::test]
async fn a_root_tar() {
    let place = Place::new(json!({}));
    let root = || vec![dir("./"), dir("./srv"), dir("./etc"), file("./etc/motd", "hi"), symlink("./bin", "usr/bin")];
    let plain = tar(root());
    let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
    let mut digests = Vec::new();
    for (name, bytes) in [("base.tar", plain.clone()), ("base.tar.gz", gzip(&plain)), ("base.tar.zst", zstd)] {
        let (_dir, path) = written(name, bytes);
        let image = place.store.import(&path, None, silent()).await.unwrap();
        assert_eq!(image.name, "base");
        assert_eq!(Root::of(&image).text("etc/motd"), "hi");
        digests.push(image.digest);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "the same root gives the same image");
}

#[tokio::test]
async fn what_is_no_image_is_refused() {
    let place = Place::new(json!({}));
    let manifest = |layers: &[&str]| json!([{"Config": "config.json", "RepoTags": null, "Layers": layers}]).to_string();
    let docker = |layers: &[&str], more: Vec<Item>| {
        let mut items = vec![file("manifest.json", manifest(layers)), file("config.json", "{}")];
        items.extend(more);
        tar(items)
    };
    let good = tar(vec![dir("etc"), file("etc/motd", "hi")]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("zeros", vec![0; 10_240]),
        ("text", b"this is no image, and no archive either\n".repeat(100)),
        ("short", b"x".to_vec()),
        ("broken-gzip", [&[0x1f, 0x8b][..], &[7; 600]].concat()),
        ("broken-zstd", [&[0x28, 0xb5, 0x2f, 0xfd][..], &[7; 600]].concat()),
        ("broken-xz", [&[0xfd, b'7', b'z', b'X', b'Z', 0][..], &[7; 600]].concat()),
        ("cut", gzip(&good)[..60].to_vec()),
        ("neither", tar(vec![file("readme", "x")])),
        ("bad-json", tar(vec![file("manifest.json", "{")])),
        ("no-index", tar(vec![file("oci-layout", "{}")])),
        ("no-image", tar(vec![file("index.json", r#"{"manifests": []}"#)])),
        ("missing-layer", docker(&["layer.tar"], vec![])),
        ("outside", docker(&["../../../../../../../etc/passwd"], vec![])),
        ("linked", docker(&["layer.tar"], vec![symlink("layer.tar", "/etc/passwd")])),
        ("no-file", docker(&["layer.tar"], vec![dir("layer.tar")])),
        ("device", docker(&["layer.tar"], vec![crate::layout::device("layer.tar", 1, 5)])),
        ("bad-digest", tar(vec![file("index.json", r#"{"manifests": [{"digest": "sha256:../../etc/passwd"}]}"#)])),
        ("no-blob", {
            let digest = format!("sha256:{}", "0".repeat(64));
            tar(vec![file("index.json", json!({"manifests": [{"digest": digest}]}).to_string())])
        }),
    ];
    for (what, bytes) in cases {
        let (_dir, path) = written(what, bytes);
        let result = place.store.import(&path, None, silent()).await;
        assert!(matches!(result, Err(Error::Invalid(_))), "{what}: {result:?}");
        assert!(place.kept().is_empty(), "{what}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(place.store.import(empty.path(), Some("x"), silent()).await, Err(Error::Invalid(_))));
    let missing = empty.path().join("nothing.tar");
    assert!(matches!(place.store.import(&missing, None, silent()).await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_layout_with_a_changed_blob_is_refused() {
    let place = Place::new(json!({}));
    let part = layer(vec![file("data", "x".repeat(1000))]);
    let digest = part.digest();
    let layout = Layout::new(&[part], json!({}));
    let path = layout.blob_path(&digest);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = place.store.import(layout.path(), Some("x"), silent()).await.unwrap_err();
    assert!(matches!(&error, Error::Invalid(text) if text.contains(&digest)), "{error:?}");
    assert!(place.kept().is_empty());
}
