//! Tar archives of unknown origin, compressed or not, entry by entry, in bounded memory.

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
    rc::Rc,
};

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
    entries(open(file)?, MAX_HEADERS, broken, see)
}

/// Shows the entries of a tar stream until one answers `false`. Between one entry's content and the next it may say
/// `max_headers` bytes: the tar reader holds headers in memory whatever their size.
pub fn entries<R: Read, E>(
    from: R,
    max_headers: u64,
    broken: impl Fn(io::Error) -> E,
    mut see: impl FnMut(&mut Entry<'_, Metered<R>>) -> Result<bool, E>,
) -> Result<(), E> {
    let left = Rc::new(Cell::new(max_headers));
    let mut archive = tar::Archive::new(Metered { from, left: Rc::clone(&left) });
    let mut entries = archive.entries().map_err(&broken)?;
    loop {
        left.set(max_headers);
        let Some(entry) = entries.next() else { return Ok(()) };
        let mut entry = entry.map_err(&broken)?;
        left.set(u64::MAX);
        if !see(&mut entry)? {
            return Ok(());
        }
        // What is left over of it shall not count as a header.
        io::copy(&mut entry, &mut io::sink()).map_err(&broken)?;
    }
}

/// An archive of which only so much may be read at a time.
pub struct Metered<R> {
    from: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a header is too large"));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.from.read(&mut buffer[..most])?;
        self.left.set(left - count as u64);
        Ok(count)
    }
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
