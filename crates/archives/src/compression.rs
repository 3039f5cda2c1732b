//! The tar in an archive, however it is compressed: gzip, as all clients send it, or zstd, which is faster.

use std::io::{self, BufReader, Cursor, Read};

use flate2::read::MultiGzDecoder;

/// How archives are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// What every server takes.
    Gzip,
    /// Ten times as fast.
    Zstd,
}

const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Memory that a frame may ask for, as a power of two: 16 MiB.
const MAX_WINDOW_LOG: u32 = 24;
/// Bytes that are read at a time.
const PIECE: usize = 128 << 10;

/// The tar stream of an archive. What is neither is read as gzip, which says so.
pub fn tar_of<'a>(mut archive: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut magic = Vec::with_capacity(ZSTD.len());
    (&mut archive).take(ZSTD.len() as u64).read_to_end(&mut magic)?;
    let is_zstd = magic == ZSTD;
    let whole = BufReader::with_capacity(PIECE, Cursor::new(magic).chain(archive));
    if !is_zstd {
        return Ok(Box::new(MultiGzDecoder::new(whole)));
    }
    let mut decoder = zstd::Decoder::with_buffer(whole)?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    Ok(Box::new(decoder))
}
