//! A public client of the cloud API, heyo-sdk: its own integration tests, unmodified, against our server. The image that
//! they name comes from a registry on loopback.

use std::{path::PathBuf, process::Command};

use heyvm_e2e::{Host, Ran, cloud::Cloud, host, registry::Registry};

/// The root of the image that the test home was prepared with, as a directory.
fn root_of_the_default_image(host: &Host) -> PathBuf {
    let root = host.scratch().join("root");
    let images = heyvm_e2e::leaks::entries(&host::test_home().join("images"));
    let image = images.map(|image| image.join("root.erofs")).find(|root| root.exists()).expect("a prepared image");
    Ran::of(Command::new("fsck.erofs").arg(format!("--extract={}", root.display())).arg(image), b"").succeeded();
    root
}

/// Where `./test` has put the SDK's test programs.
fn test_program(name: &str) -> PathBuf {
    let program = host::project().join("target/sdk/tests").join(name);
    assert!(program.exists(), "{} is not built: run ./test", program.display());
    program
}

#[test]
fn the_sdks_own_tests_pass_unmodified() {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    registry.push("library/ubuntu:24.04", &root_of_the_default_image(&host));
    host.configure(&format!("[registries.\"docker.io\"]\nmirrors = [\"http://{}\"]\n", registry.address));
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("sdk", "deploy");
    for name in ["smoke", "shell_protocol", "kvm_e2e"] {
        let mut program = Command::new(test_program(name));
        program.args(["--ignored", "--nocapture"]).env("HEYO_BASE_URL", &cloud.url).env("HEYO_API_KEY", &key);
        let ran = Ran::of(&mut program, b"").succeeded();
        let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(said.contains("1 passed") && !said.contains("skipping"), "{name}: {said}");
    }
    let (_, images) = cloud.call("GET", "/public-images", &key, &serde_json::Value::Null);
    assert!(images.to_string().contains("ubuntu:24.04"), "the registry's image was not used: {images}");
}
