//! The entries of a tar stream, one after another.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

use tar::Entry;

/// Shows the entries of a tar stream until one answers `false`. Between one entry's content and the next the stream may
/// hold `max_headers` bytes: the tar reader keeps headers in memory whatever size they announce.
pub fn entries<R: Read, E>(
    from: R,
    max_headers: u64,
    broken: impl Fn(io::Error) -> E,
    mut see: impl FnMut(&mut Entry<'_, Metered<R>>) -> Result<bool, E>,
) -> Result<R, E> {
    let left = Rc::new(Cell::new(max_headers));
    let mut archive = tar::Archive::new(Metered { from, left: Rc::clone(&left) });
    let mut entries = archive.entries().map_err(&broken)?;
    loop {
        left.set(max_headers);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(&broken)?;
        left.set(u64::MAX);
        if !see(&mut entry)? {
            break;
        }
        // The rest of its content does not count as a header.
        io::copy(&mut entry, &mut io::sink()).map_err(&broken)?;
    }
    Ok(archive.into_inner().from)
}

/// A stream of which only so much may be read at a time.
pub struct Metered<R> {
    from: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a header is too large"));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.from.read(&mut buffer[..most])?;
        if left != u64::MAX {
            self.left.set(left - count as u64);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use tar::{EntryType, Header};

    use super::*;

    /// As many zeros as anybody wants to read, counted.
    struct Endless(u64);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            buffer.fill(b'x');
            self.0 += buffer.len() as u64;
            Ok(buffer.len())
        }
    }

    #[test]
    fn headers_of_many_gigabytes_are_refused_before_they_are_read() {
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(8 << 30);
            header.set_cksum();
            let mut rest = Endless(0);
            let stream = header.as_bytes().as_slice().chain(&mut rest);
            let error = entries(stream, 1 << 20, |error| error, |_| Ok(true)).err().unwrap();
            assert!(error.to_string().contains("header is too large"), "{kind:?}: {error}");
            assert!(rest.0 <= 1 << 20, "{kind:?}: {} bytes were read", rest.0);
        }
    }
}
