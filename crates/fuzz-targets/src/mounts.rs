//! Requests to a mount, one after another.

use std::fs;

use heyvm_mounts::{Directory, HandleBudget, History, Server};

use crate::outside::Outside;

const HEAD: usize = 40;
/// Most requests that are made of one input.
const REQUESTS: usize = 64;

/// Each request is what two bytes say it is long: operation, node, body. Its head is made whole, so that it is read.
pub fn mount_requests(mut data: &[u8]) {
    let place = Outside::new();
    fs::write(place.inside().join("file"), "content").expect("a file");
    let journal = tempfile::tempdir().expect("a directory");
    let history = History::Fresh(journal.path().join("journal"));
    let inside = fs::canonicalize(place.inside()).expect("a directory");
    let directory = Directory::open(&inside).expect("a directory");
    let server = Server::open(directory, false, &history, &HandleBudget::new(1024));
    assert!(server.answer(data).is_none() || data.len() >= HEAD);
    for unique in 1..=REQUESTS {
        let Some((request, rest)) = cut(data) else { break };
        data = rest;
        if let Some(answer) = server.answer(&whole(request, unique as u64)) {
            let length = u32::from_ne_bytes(answer[..4].try_into().expect("four bytes"));
            assert_eq!(length as usize, answer.len());
            assert_eq!(answer[8..16], (unique as u64).to_ne_bytes());
        }
    }
    place.check();
}

fn cut(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_at_checked(2)?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(length.try_into().ok()?)))
}

/// `fuse_in_header` and the body.
fn whole(request: &[u8], unique: u64) -> Vec<u8> {
    let (operation, rest) = request.split_first().unwrap_or((&0, &[]));
    let (node, body) = rest.split_first().unwrap_or((&1, &[]));
    let length = (HEAD + body.len()) as u32;
    let mut bytes = [length.to_ne_bytes(), u32::from(*operation).to_ne_bytes()].concat();
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(u64::from(*node).to_ne_bytes());
    bytes.resize(HEAD, 0);
    bytes.extend(body);
    bytes
}
