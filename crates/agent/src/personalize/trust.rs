//! Certificate authorities of the host's, made known to the programs of the sandbox: a host behind an inspecting proxy, or
//! with an authority of its own, could otherwise install no package.
//!
//! They are added to the system's bundle, and put where the distribution's own tool finds them when it writes the bundle
//! again. Programs that bring a bundle along (Node.js, Python's requests) are pointed to them by their variables.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::libc::O_NOFOLLOW;

/// Where Debian, Ubuntu and Alpine keep added authorities; other images get it, too.
const ADDED: &str = "usr/local/share/ca-certificates/heyvm-host.crt";
/// Bundles by distribution; the first is made where an image has none.
const BUNDLES: [&str; 3] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "var/lib/ca-certificates/ca-bundle.pem",
];
const MAX_BUNDLE: u64 = 8 << 20;

/// Adds `certificates`, in PEM, to the bundles below `root`. Doing it again changes nothing.
pub fn install(root: &Path, certificates: &str) -> io::Result<()> {
    if certificates.is_empty() || fs::read_to_string(root.join(ADDED)).is_ok_and(|known| known == certificates) {
        return Ok(());
    }
    let found = BUNDLES.map(|bundle| root.join(bundle)).into_iter().filter(|bundle| bundle.is_file());
    let mut bundles: Vec<PathBuf> = found.collect();
    if bundles.is_empty() {
        bundles.push(root.join(BUNDLES[0]));
    }
    for bundle in bundles {
        append(&bundle, certificates)?;
    }
    let added = root.join(ADDED);
    prepare(&added)?;
    // Last: it says that all of it is done.
    fs::write(added, certificates)
}

fn append(bundle: &Path, certificates: &str) -> io::Result<()> {
    prepare(bundle)?;
    // Links are followed: Alpine's bundle may be one. What is no regular file is left alone.
    let before = match fs::metadata(bundle) {
        Ok(meta) if !meta.is_file() || meta.len() > MAX_BUNDLE => return Ok(()),
        Ok(_) => fs::read_to_string(bundle)?,
        Err(_) => String::new(),
    };
    if before.contains(certificates) {
        return Ok(());
    }
    let separator = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    let real = fs::canonicalize(bundle).unwrap_or_else(|_| bundle.to_owned());
    let mut file = File::options().append(true).create(true).mode(0o644).custom_flags(O_NOFOLLOW).open(real)?;
    file.write_all(format!("{separator}{certificates}").as_bytes())
}

fn prepare(file: &Path) -> io::Result<()> {
    file.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Variables that point programs to the bundle below `root`.
pub fn environment(root: &Path) -> Vec<(String, String)> {
    let bundle = BUNDLES.iter().find(|bundle| root.join(bundle).is_file()).unwrap_or(&BUNDLES[0]);
    let whole = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"].map(|name| (name, *bundle));
    let all = whole.into_iter().chain([("NODE_EXTRA_CA_CERTS", ADDED)]);
    all.map(|(name, path)| (name.to_owned(), format!("/{path}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

    fn variable(root: &Path, wanted: &str) -> String {
        environment(root).into_iter().find(|(name, _)| name == wanted).unwrap().1
    }

    #[test]
    fn authorities_are_added_to_the_systems_bundle_once() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join(BUNDLES[0]);
        prepare(&bundle).unwrap();
        fs::write(&bundle, "theirs").unwrap();
        for _ in 0..2 {
            install(root.path(), OURS).unwrap();
            assert_eq!(fs::read_to_string(&bundle).unwrap(), format!("theirs\n{OURS}"));
        }
        assert_eq!(fs::read_to_string(root.path().join(ADDED)).unwrap(), OURS);
        assert_eq!(variable(root.path(), "SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt");
        assert_eq!(variable(root.path(), "NODE_EXTRA_CA_CERTS"), format!("/{ADDED}"));
        // The host has another one by now.
        let second = OURS.replace("AAAA", "BBBB");
        install(root.path(), &second).unwrap();
        assert_eq!(fs::read_to_string(&bundle).unwrap(), format!("theirs\n{OURS}{second}"));
    }

    #[test]
    fn an_image_without_a_bundle_gets_one_and_another_distributions_is_found() {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), OURS).unwrap();
        assert_eq!(fs::read_to_string(root.path().join(BUNDLES[0])).unwrap(), OURS);
        let fedora = tempfile::tempdir().unwrap();
        prepare(&fedora.path().join(BUNDLES[1])).unwrap();
        fs::write(fedora.path().join(BUNDLES[1]), "theirs\n").unwrap();
        install(fedora.path(), OURS).unwrap();
        assert!(!fedora.path().join(BUNDLES[0]).exists());
        assert_eq!(variable(fedora.path(), "REQUESTS_CA_BUNDLE"), format!("/{}", BUNDLES[1]));
    }

    #[test]
    fn without_authorities_nothing_is_touched() {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), "").unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
