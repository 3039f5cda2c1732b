//! Images that are what their registry says.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use heyvm_images::Extent;
use serde_json::json;

use crate::{
    layout::{Layout, dir, file, hard_link, layer, symlink, zstd_layer},
    place::{OPERATOR, Place, Root, mode, prune, silent, wanted},
    server::Server,
};

#[tokio::test]
async fn an_image_is_pulled_by_tag_and_by_digest() {
    let server = Server::start();
    let layout = Layout::new(&[layer(vec![dir("etc"), file("etc/motd", "hello\n")])], json!({}));
    let name = server.push(layout.path(), "test/hello:1");
    let place = Place::using(&server);

    let image = place.store.pull(&name, OPERATOR, silent()).await.unwrap();
    assert_eq!(
        (image.name.as_str(), image.digest.as_str(), image.source.as_str()),
        (&*name, &*layout.digest, "registry")
    );
    assert_eq!(image.size_bytes, image.rootfs.metadata().unwrap().len());
    assert_eq!(Root::of(&image).text("etc/motd"), "hello\n");
    assert_eq!(place.store.list().await, std::slice::from_ref(&image));
    assert_eq!(place.store.get(&name).await, Some(image.clone()));
    assert_eq!(place.store.get(&image.digest).await, Some(image.clone()));

    let by_digest = format!("{}/test/hello@{}", server.host, layout.digest);
    let same = place.store.pull(&by_digest, OPERATOR, silent()).await.unwrap();
    assert_eq!((same.digest, same.rootfs), (image.digest.clone(), image.rootfs));
    assert_eq!(place.kept(), [image.digest.replace(':', "-")]);

    // What is here is not asked for again.
    drop(server);
    for reference in [&name, &by_digest] {
        let resolved = place.store.resolve(&wanted(reference, "ubuntu:24.04"), silent()).await.unwrap();
        assert_eq!((resolved.image.name, resolved.substituted), (reference.clone(), None));
    }
    place.store.remove(&by_digest).await.unwrap();
    assert!(place.store.get(&name).await.is_some());
    place.store.remove(&name).await.unwrap();
    assert!(place.store.list().await.is_empty() && place.kept().is_empty());
}

#[tokio::test]
async fn a_name_without_tag_or_registry_means_what_it_means_to_docker() {
    let server = Server::start();
    let name = server.push(Layout::new(&[layer(vec![file("a", "")])], json!({})).path(), "library/thing:latest");
    let place = Place::new(json!({"docker.io": {"mirrors": [format!("http://{}", server.host)]}}));
    let image = place.store.pull("thing", OPERATOR, silent()).await.unwrap();
    assert_eq!(image.name, "thing");
    for same in ["thing:latest", "library/thing", "docker.io/library/thing:latest"] {
        assert_eq!(place.store.get(same).await.map(|image| image.digest), Some(image.digest.clone()), "{same}");
    }
    for other in ["thing:1", "thing2", name.as_str(), ""] {
        assert_eq!(place.store.get(other).await, None, "{other}");
    }
    assert!(place.store.remove("thing:latest").await.is_err(), "who removes means the name that is listed");
}

#[tokio::test]
async fn layers_lie_over_each_other_and_hide_what_they_say() {
    let server = Server::start();
    let layers = [
        layer(vec![
            dir("usr/bin"),
            symlink("bin", "usr/bin"),
            file("usr/bin/tool", "one").mode(0o755),
            dir("gone"),
            file("gone/file", "x"),
            dir("opaque"),
            file("opaque/old", "x"),
            file("opaque/kept-name", "old"),
            dir("etc"),
            file("etc/hidden", "x"),
            file("etc/shown", "x"),
        ]),
        zstd_layer(vec![
            file("bin/tool", "two").mode(0o4755).owned_by(0, 12),
            hard_link("bin/same", "usr/bin/tool"),
            file(".wh.gone", ""),
            dir("opaque"),
            file("opaque/kept-name", "new"),
            // After an entry of its own layer: it hides what was below, not that.
            file("opaque/.wh..wh..opq", ""),
            file("etc/.wh.hidden", ""),
        ]),
        layer(vec![
            dir("home/user").owned_by(1000, 1000),
            file("home/user/.profile", "p").owned_by(1000, 1000).mode(0o600),
            file("srv/untold/x", "x"),
        ]),
    ];
    let layout = Layout::new(&layers, json!({}));
    let name = server.push(layout.path(), "test/layers:1");
    let place = Place::using(&server);
    let image = place.store.pull(&name, OPERATOR, silent()).await.unwrap();
    let root = Root::of(&image);
    assert_eq!(root.text("usr/bin/tool"), "two");
    assert_eq!(root.text("usr/bin/same"), "two");
    assert_eq!(root.path("bin").read_link().unwrap().to_str(), Some("usr/bin"));
    assert!(!root.has("gone") && !root.has("etc/hidden") && !root.has("opaque/old"));
    assert!(root.has("etc/shown") && !root.has("opaque/.wh..wh..opq"));
    assert_eq!(root.text("opaque/kept-name"), "new");

    let meta = |name: &str| root.path(name).metadata().unwrap();
    assert_eq!(
        meta("usr/bin/tool").mtime(),
        1_600_000_000,
        "compiled Python files are valid for their source's time alone"
    );
    assert_eq!(meta("home/user").mtime(), 1_600_000_000);
    assert_eq!(meta("etc").mtime(), 1_600_000_000, "the second layer changes it, but tells no other time");
    let other = Place::using(&server);
    let again = other.store.pull(&name, OPERATOR, silent()).await.unwrap();
    let [one, two] = [&image, &again].map(|image| std::fs::read(&image.rootfs).unwrap());
    assert!(one == two, "templates of the image stay valid when it is pulled anew");
    if nix::unistd::getuid().is_root() {
        assert_eq!((meta("usr/bin/tool").uid(), meta("usr/bin/tool").gid()), (0, 12));
        assert_eq!(mode(&image, "usr/bin/tool"), 0o4755);
        assert_eq!((meta("home/user/.profile").uid(), meta("home/user").gid()), (1000, 1000));
        assert_eq!(meta("home/user/.profile").permissions().mode() & 0o7777, 0o600);
    }
}

#[tokio::test]
async fn what_the_image_says_about_running_it_is_kept() {
    let server = Server::start();
    let run = json!({"Env": ["PATH=/usr/bin", "EMPTY=", "EQUAL=a=b"], "WorkingDir": "/srv/app", "Cmd": ["x", "-y"],
        "Entrypoint": ["/entry"], "User": "app:staff", "StopSignal": "SIGQUIT",
        "ExposedPorts": {"8080/tcp": {}, "80": {}, "53/udp": {}, "nonsense": {}}});
    let name = server.push(Layout::new(&[layer(vec![file("a", "")])], run).path(), "test/config:1");
    let place = Place::using(&server);
    place.store.pull(&name, OPERATOR, silent()).await.unwrap();
    let config = place.store.get(&name).await.unwrap().config;
    let env = [("PATH", "/usr/bin"), ("EMPTY", ""), ("EQUAL", "a=b")].map(|(n, v)| (n.to_owned(), v.to_owned()));
    assert_eq!((config.env.clone(), config.working_dir.as_deref()), (env.to_vec(), Some("/srv/app")));
    assert_eq!(
        (config.entrypoint.as_slice(), config.cmd.as_slice()),
        (&["/entry".to_owned()][..], &["x".to_owned(), "-y".into()][..])
    );
    assert_eq!((config.user.as_deref(), config.stop_signal.as_deref()), (Some("app:staff"), Some("SIGQUIT")));
    assert_eq!(config.exposed_ports, [80, 8080], "TCP alone");
}

#[tokio::test]
async fn an_index_gives_the_image_of_this_architecture() {
    let server = Server::start();
    let [arm, amd] = ["arm64", "amd64"].map(|name| [layer(vec![file("architecture", name)])]);
    let layout = Layout::multi(&[("arm64", &arm), ("amd64", &amd)]);
    let name = server.push(layout.path(), "test/multi:1");
    let place = Place::using(&server);
    for reference in [name, format!("{}/test/multi@{}", server.host, layout.digest)] {
        let image = place.store.pull(&reference, OPERATOR, silent()).await.unwrap();
        assert_eq!(Root::of(&image).text("architecture"), "amd64");
    }

    let other = server.push(Layout::multi(&[("arm64", &arm)]).path(), "test/other:1");
    let error = place.store.pull(&other, OPERATOR, silent()).await.unwrap_err();
    assert!(
        matches!(&error, heyvm_images::Error::Invalid(_)) && error.to_string().contains("linux/amd64"),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_image_whose_name_has_moved_on_stays_as_long_as_it_is_used() {
    let server = Server::start();
    let version = |text: &str| Layout::new(&[layer(vec![file("version", text)])], json!({}));
    let name = server.push(version("one").path(), "test/app:1");
    let place = Place::using(&server);
    let old = place.store.pull(&name, OPERATOR, silent()).await.unwrap();
    server.push(version("two").path(), "test/app:1");
    let new = place.store.pull(&name, OPERATOR, silent()).await.unwrap();
    assert_ne!((&old.digest, &old.root_digest), (&new.digest, &new.root_digest));
    assert_eq!(place.store.get(&name).await, Some(new.clone()));
    let beyond = Extent::Budget(u64::MAX);
    assert!(prune(&place.store, &[&old.digest], beyond).await.is_empty());
    let kept = place.store.with_digest(&old.digest).await.unwrap();
    assert_eq!((&kept.name, &kept.rootfs, Root::of(&kept).text("version")), (&old.digest, &old.rootfs, "one".into()));
    assert_eq!(prune(&place.store, &[], beyond).await, std::slice::from_ref(&old.digest));
    assert_eq!(place.store.with_digest(&old.digest).await, None);
    assert_eq!(place.kept(), [new.digest.replace(':', "-")]);
}
