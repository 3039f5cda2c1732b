//! Requests that no kernel makes.

use std::{fs, path::Path};

use proptest::prelude::*;

use crate::guest::*;

#[test]
fn what_is_no_request_has_no_answer() {
    let guest = Guest::new();
    let good = request(GETATTR, ROOT, &[0; 16]);
    for bad in [&b""[..], b"x", &good[..39], &good[..good.len() - 1], &[&good[..], b"x"].concat()] {
        assert!(guest.server.answer(bad).is_none());
    }
    assert!(guest.server.answer(&request(FORGET, ROOT, &u64::MAX.to_ne_bytes())).is_none());
}

#[test]
fn sizes_that_do_not_fit() {
    let guest = Guest::new();
    fs::write(guest.shared("large"), vec![7; 3 << 20]).unwrap();
    let node = guest.find("large").unwrap();
    let handle = guest.open(node, nix::libc::O_RDWR).unwrap();
    let read = guest.read(node, handle, 0, u32::MAX).unwrap();
    assert_eq!(read.len(), heyvm_mounts::MAX_WRITE as usize, "no more than a piece at a time");
    assert_eq!(guest.read(node, handle, u64::MAX, 10), Err(nix::libc::EINVAL));
    let lying = join(&[&span(handle, 0, 1000, nix::libc::O_RDWR), b"short"]);
    assert_eq!(guest.ask(WRITE, node, &lying), Err(nix::libc::EINVAL));
}

/// All that lies in a directory, with content.
fn snapshot(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.ends_with("shared") && !path.ends_with("journal"))
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap_or_default()))
        .collect();
    found.sort();
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bodies of random bytes and of the words that matter, to every operation, on nodes and handles that there are.
    #[test]
    fn whatever_is_asked_changes_nothing_outside(
        asked in prop::collection::vec((0_u32..60, 0_usize..6, body()), 1..40)
    ) {
        let guest = Guest::new();
        fs::create_dir(guest.shared("dir")).unwrap();
        std::os::unix::fs::symlink("..", guest.shared("up")).unwrap();
        let (file, _) = guest.create(ROOT, "file", nix::libc::O_RDWR, 0o644).unwrap();
        let nodes = [ROOT, guest.find("dir").unwrap(), guest.find("up").unwrap(), file, 0, u64::MAX];
        let before = snapshot(guest.dir.path());
        for (operation, node, body) in asked {
            if let Some(answer) = guest.server.answer(&request(operation, nodes[node], &body)) {
                prop_assert!(answer.len() >= 16);
            }
        }
        prop_assert_eq!(snapshot(guest.dir.path()), before);
    }
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::sample::select(vec!["..", "secret", "up", "dir", "file", "../secret", "/etc", "up/secret", "a"]);
    let piece = prop_oneof![
        words.prop_map(text),
        prop::sample::select(vec![0_u64, 1, 2, u64::MAX]).prop_map(|value| value.to_ne_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..24),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}
