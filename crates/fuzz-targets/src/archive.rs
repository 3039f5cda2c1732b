//! Archives: what is kept after the check, and what the agent makes of it.

use std::{io::Write, path::Path};

use flate2::{Compression, write::GzEncoder};
use heyvm_agent::files::unpack::unpack;
use heyvm_bounded_tar::Options;

use crate::outside::Outside;

const BYTES: u64 = 1 << 20;
const ENTRIES: u64 = 100;
const BLOCK: usize = 512;

/// A tar, first as it is, then with checksums that are right: a fuzzer seldom gets them so.
pub fn archive_unpacker(data: &[u8]) {
    unpacked(data);
    let mended = with_checksums(data);
    unpacked(&mended);
    heyvm_archives::check(data, &limits()).ok();
    let mended = gzip(&mended);
    heyvm_archives::check(mended.as_slice(), &limits()).ok();
    heyvm_archives::lies_below(mended.as_slice(), Path::new("/a")).ok();
}

fn limits() -> heyvm_archives::Limits {
    heyvm_archives::Limits { compressed: BYTES, unpacked: BYTES, entries: ENTRIES }
}

fn unpacked(tar: &[u8]) {
    for (clean, root) in [(false, ""), (true, ""), (true, "a")] {
        let place = Outside::new();
        let options = Options::for_a_guest().limits(BYTES, ENTRIES).below(root).expect("a plain path");
        if let Ok(done) = unpack(&place.inside(), clean, &options, tar) {
            assert!(done.bytes <= BYTES && done.entries <= ENTRIES);
        }
        place.check();
    }
    // As the command line takes what a guest sends.
    let place = Outside::new();
    let options = Options::for_the_host().limits(BYTES, ENTRIES);
    if let Ok((done, _)) = heyvm_bounded_tar::unpack(&place.inside(), &options, tar) {
        assert!(done.bytes <= BYTES && done.entries <= ENTRIES);
    }
    place.check();
}

fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut packing = GzEncoder::new(Vec::new(), Compression::fast());
    packing.write_all(tar).expect("memory");
    packing.finish().expect("memory")
}

/// The same with the checksum of every header as it should be.
fn with_checksums(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    let mut at = 0;
    while let Some(header) = tar.get_mut(at..at + BLOCK) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let size = String::from_utf8_lossy(&header[124..135]).into_owned();
        let size = usize::from_str_radix(size.trim_matches(['\0', ' ']), 8).unwrap_or(0);
        at += BLOCK + size.next_multiple_of(BLOCK);
    }
    tar
}
