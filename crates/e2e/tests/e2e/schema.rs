//! Both APIs against their own documents: schemathesis sends what a document allows and what it does not, and finds no
//! answer of 5xx and none that the document does not tell of.

use std::{fs, path::PathBuf, process::Command};

use heyvm_e2e::{
    Host, Ran,
    cloud::Cloud,
    host,
    registry::{Registry, free_port},
};
use serde_json::json;

use crate::api::Server;

/// HEYVM_SCHEMATHESIS, else what `./test` has installed.
fn schemathesis() -> PathBuf {
    let installed = || host::project().join("target/schemathesis/bin/schemathesis");
    let program = std::env::var_os("HEYVM_SCHEMATHESIS").map_or_else(installed, PathBuf::from);
    assert!(program.exists(), "{} is not installed: run ./test", program.display());
    program
}

/// The image that is here: to name it asks no registry.
fn image(host: &Host) -> String {
    host.json(&["images"])[0]["name"].as_str().expect("a prepared image").to_owned()
}

/// A host whose own images and kernels may be changed, with a registry that has none.
fn host_with_a_registry() -> (Host, Registry) {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    let own = format!("[registries.\"{}\"]\ninsecure = true\n", registry.address);
    host.configure(&own);
    (host, registry)
}

/// Runs schemathesis against the server at `url`. The first of the sandboxes is there throughout, the second one is stopped,
/// resized and the like. HEYVM_SCHEMA_SEED has it try other inputs than usual.
fn conforms(host: &Host, registry: &Registry, url: &str, sandboxes: [&str; 2], arguments: &[&str]) {
    let settings = host::project().join("tests/schema");
    let directory = host.scratch().join("schemathesis");
    fs::create_dir(&directory).expect("directory");
    let mut command = Command::new(schemathesis());
    command.arg("--config-file").arg(settings.join("schemathesis.toml")).arg("run").arg(format!("{url}/openapi.json"));
    command.args(["--no-color"]).args(arguments);
    if let Ok(seed) = std::env::var("HEYVM_SCHEMA_SEED") {
        command.args(["--seed", &seed]);
    }
    host.environment(&mut command);
    command.env("PYTHONPATH", &settings).env("PYTHONDONTWRITEBYTECODE", "1").env("SCHEMATHESIS_HOOKS", "hooks");
    let [steady, moving] = sandboxes;
    command.env("SCHEMA_STEADY", steady).env("SCHEMA_MOVING", moving).env("SCHEMA_REGISTRY", &registry.address);
    command.env("SCHEMA_IMAGE", image(host));
    let ran = Ran::of(command.current_dir(&directory), b"");
    assert_eq!(ran.code, 0, "{}\n{}", ran.out(), ran.err());
    println!("{}", ran.out());
}

#[test]
fn the_local_api_answers_as_its_document_says() {
    let (host, registry) = host_with_a_registry();
    let here = image(&host);
    let [steady, moving] = [(); 2].map(|()| host.create(&["--image", &here, "--open-port", "8080"]));
    let api = Server::start(&host, free_port(), &[]);
    // With the token, so that the calls that touch the host are tried, too.
    let credentials = format!("Authorization: {}", api.credentials());
    conforms(&host, &registry, &api.url, [&steady.id, &moving.id], &["-H", &credentials]);
}

#[test]
fn the_clouds_api_answers_as_its_document_says() {
    let (host, registry) = host_with_a_registry();
    // Without a limit it would have dozens of machines come up at once.
    let cloud = Cloud::over(&host, None, "[quotas]\nmax_running = 8\n");
    let key = cloud.key("ada", "admin");
    let here = image(&host);
    let sandboxes = [(); 2].map(|()| {
        let (status, made) = cloud.call("POST", "/sandboxes", &key, &json!({"size_class": "micro", "image": here}));
        assert_eq!(status, 201, "{made}");
        made["id"].as_str().unwrap().to_owned()
    });
    let credentials = format!("Authorization: Bearer {key}");
    conforms(&host, &registry, &cloud.url, [&sandboxes[0], &sandboxes[1]], &["-H", &credentials]);
}
