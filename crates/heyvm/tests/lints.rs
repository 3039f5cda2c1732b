//! What holds for every crate of the workspace, beside the lints themselves.

use std::{fs, path::Path};

/// They use the runtime and may wait in it: programs for one user or one guest, and tests. `mounts` has threads of its own.
const MAY_WAIT: [&str; 8] =
    ["agent", "agent-protocol", "api", "e2e", "fuzz-targets", "heyvm", "mounts", "test-services"];

#[test]
fn a_crate_that_serves_everybody_is_held_not_to_wait() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let lints = fs::read(crates.join("../clippy-async.toml")).unwrap();
    let mut held = 0;
    for entry in fs::read_dir(&crates).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let Ok(manifest) = fs::read_to_string(entry.path().join("Cargo.toml")) else { continue };
        let uses_the_runtime = manifest.lines().any(|line| line.starts_with("tokio"));
        if uses_the_runtime && !MAY_WAIT.contains(&name.as_str()) {
            let own = fs::read(entry.path().join("clippy.toml")).unwrap_or_default();
            assert!(own == lints, "crates/{name}/clippy.toml is no link to clippy-async.toml");
            held += 1;
        }
    }
    assert!(held > 5, "{held}");
}
