//! Archives as the kernel unpacks them at boot. Format: Documentation/driver-api/early-userspace/buffer-format.rst ("newc").

use std::io::{self, Write};

/// Writes entries in the order given; the same entries give the same bytes.
pub struct Archive<W: Write> {
    out: W,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    /// An archive into `out`.
    pub fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    /// A directory.
    pub fn dir(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, 0o040_755, (0, 0), &[])
    }

    /// A regular file.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, 0o100_000 | permissions, (0, 0), data)
    }

    /// A character device.
    pub fn device(&mut self, name: &str, permissions: u32, number: (u32, u32)) -> io::Result<()> {
        self.entry(name, 0o020_000 | permissions, number, &[])
    }

    /// Writes the end mark.
    pub fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the file is too large"))?;
        let links = 1;
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), device it is (2), length of the name, checksum
        let fields = [self.next_inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        self.next_inode += 1;
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        pad(&mut self.out, 110 + name.len() + 1)?;
        self.out.write_all(data)?;
        pad(&mut self.out, data.len())
    }
}

/// Everything begins at a multiple of four bytes.
fn pad(out: &mut impl Write, length: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..length.next_multiple_of(4) - length])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries as the kernel reads them: name, mode, data.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let (head, rest) = bytes.split_at(110);
            assert_eq!(&head[..6], b"070701");
            let field = |at: usize| {
                let digits = std::str::from_utf8(&head[6 + 8 * at..][..8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&rest[..name_size]).unwrap().strip_suffix('\0').unwrap().to_owned();
            let data = &bytes[(110 + name_size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert_eq!((field(0), data.len()), (0, 0));
                return entries;
            }
            entries.push((name, mode, data[..size].to_vec()));
            bytes = &data[size.next_multiple_of(4)..];
        }
    }

    #[test]
    fn the_kernel_reads_what_is_written() {
        let mut archive = Archive::new(Vec::new());
        archive.dir("dir").unwrap();
        archive.file("dir/odd", 0o755, b"12345").unwrap();
        archive.device("dev", 0o600, (5, 1)).unwrap();
        let bytes = archive.finish().unwrap();
        let expected = [("dir", 0o040_755, &b""[..]), ("dir/odd", 0o100_755, b"12345"), ("dev", 0o020_600, b"")];
        assert_eq!(read(&bytes), expected.map(|(name, mode, data)| (name.to_owned(), mode, data.to_vec())));
    }
}
