//! Tar archives of unknown origin, compressed or not, entry by entry, in bounded memory.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use heyvm_bounded_tar::{Metered, entries};
use tar::Entry;

use crate::Error;

/// What an archive may say between one file's content and the next: headers, long names, attributes. It is held in memory.
const MAX_HEADERS: u64 = 4 << 20;
/// What unpacking xz may take.
const MAX_XZ_MEMORY: u64 = 256 << 20;

/// Shows the entries of an archive, compressed or not, until one answers `false`.
pub fn each(
    file: &Path,
    broken: impl Fn(io::Error) -> Error,
    see: impl FnMut(&mut Entry<'_, Metered<Box<dyn Read>>>) -> Result<bool, Error>,
) -> Result<(), Error> {
    entries(open(file)?, MAX_HEADERS, broken, see).map(drop)
}

/// A file as what it says it is at its beginning: gzip, zstd, xz, or plain.
fn open(path: &Path) -> Result<Box<dyn Read>, Error> {
    let opened = || -> io::Result<Box<dyn Read>> {
        let mut magic = [0; 6];
        let length = File::open(path)?.read(&mut magic)?;
        let file = BufReader::new(File::open(path)?);
        Ok(match &magic[..length] {
            [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(file)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file)?),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => {
                let stream = xz2::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY, xz2::stream::CONCATENATED)?;
                Box::new(xz2::bufread::XzDecoder::new_stream(file, stream))
            }
            _ => Box::new(file),
        })
    };
    opened().map_err(Error::io("reading", path))
}
