//! What an archive must be before it is kept: a whole tar.gz or tar.zst of files, directories and links that unpacks to
//! no more than allowed. Every byte is someone else's. Names and hard links stay within it; symbolic links may lead
//! anywhere, since they mean the sandbox's files, and no unpacker follows them out.

use std::io::{self, Read};

use heyvm_bounded_tar::{EntryType, MAX_HEADER, MAX_HOLES, entries, inside};

use crate::{Error, compression};

/// Bytes an entry may take beside its content: its header, its padding, a long name.
const AROUND_ENTRY: u64 = 2 << 10;

/// How much an archive may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, compressed.
    pub compressed: u64,
    /// Bytes of all its files.
    pub unpacked: u64,
    /// Files, directories and links.
    pub entries: u64,
}

impl Limits {
    /// Those that hold when nobody says otherwise.
    pub const STANDARD: Self = Self { compressed: 1 << 30, unpacked: 8 << 30, entries: 500_000 };
    /// For the owner of the machine: what the disk holds.
    pub const NONE: Self = Self { compressed: u64::MAX, unpacked: u64::MAX, entries: u64::MAX };
}

impl Default for Limits {
    fn default() -> Self {
        Self::STANDARD
    }
}

/// Reads a tar.gz or tar.zst to its end. Refuses what would leave its directory, is no file, directory or link, unpacks
/// to more than allowed, or is not whole. (`limits.compressed` is for whoever sends the bytes to keep.)
pub fn check(archive: impl Read + Send, limits: &Limits) -> Result<(), Error> {
    let too_much = || {
        let gib = limits.unpacked >> 30;
        Error::Refused(format!("it unpacks to more than {gib} GiB or {} entries", limits.entries))
    };
    let most = limits.unpacked.saturating_add(limits.entries.saturating_mul(AROUND_ENTRY));
    let mut stream = compression::tar_of(archive).map_err(broken)?.take(most.saturating_add(1));
    let (mut count, mut bytes, mut holes) = (0, 0_u64, 0_u64);
    entries(&mut stream, MAX_HEADER, broken, |entry| {
        count += 1;
        let stored = match entry.header().entry_type() {
            EntryType::GNUSparse => entry.header().entry_size().map_err(broken)?.min(entry.size()),
            _ => entry.size(),
        };
        bytes = bytes.saturating_add(stored);
        holes = holes.saturating_add(entry.size() - stored);
        if count > limits.entries || bytes > limits.unpacked || holes > MAX_HOLES {
            return Err(too_much());
        }
        check_entry(entry).map(|()| true)
    })?;
    if count == 0 {
        return Err(Error::Refused("it is empty".into()));
    }
    // The checksum of the last piece comes after the tar's end: what was cut short there is not whole.
    io::copy(&mut stream, &mut io::sink()).map_err(broken)?;
    if stream.limit() == 0 { Err(too_much()) } else { Ok(()) }
}

pub(crate) fn broken(error: io::Error) -> Error {
    Error::Refused(format!("it is no whole tar.gz or tar.zst: {error}"))
}

fn check_entry(entry: &tar::Entry<'_, impl Read>) -> Result<(), Error> {
    let path = entry.path().map_err(|error| Error::Refused(format!("an entry has no readable name: {error}")))?;
    let shown = path.display();
    if inside(&path).is_none() {
        return Err(Error::Refused(format!("{shown} leaves its directory")));
    }
    let target = || entry.link_name().ok().flatten().filter(|target| !target.as_os_str().is_empty());
    match entry.header().entry_type() {
        EntryType::Regular
        | EntryType::Continuous
        | EntryType::GNUSparse
        | EntryType::Directory
        | EntryType::XGlobalHeader => Ok(()),
        EntryType::Symlink if target().is_some() => Ok(()),
        // It counts from the top.
        EntryType::Link if target().is_some_and(|target| inside(&target).is_some()) => Ok(()),
        EntryType::Symlink | EntryType::Link => {
            let target = target().unwrap_or_default();
            Err(Error::Refused(format!("{shown} leads to {}, outside of its directory", target.display())))
        }
        kind => Err(Error::Refused(format!("{shown} is a {kind:?}, which cannot be deployed"))),
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder};
    use tar::Header;

    use super::*;

    type Packing = tar::Builder<GzEncoder<Vec<u8>>>;

    fn archive(build: impl FnOnce(&mut Packing)) -> Vec<u8> {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        build(&mut builder);
        builder.into_inner().unwrap().finish().unwrap()
    }

    /// An entry whose name and target the tar crate itself would refuse to write.
    fn raw(builder: &mut Packing, name: &str, kind: EntryType, target: &str) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
    }

    /// An entry of so many bytes.
    fn long(builder: &mut Packing, kind: EntryType, size: u64) {
        let mut header = Header::new_gnu();
        header.set_path("long").unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        builder.append(&header, io::repeat(b'x').take(size)).unwrap();
    }

    fn refusal(build: impl FnOnce(&mut Packing), limits: &Limits) -> String {
        match check(archive(build).as_slice(), limits) {
            Err(Error::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_plain_one_passes() {
        let plain = archive(|builder| {
            raw(builder, "src/", EntryType::Directory, "");
            raw(builder, "src/a", EntryType::Regular, "");
            raw(builder, "src/b", EntryType::Symlink, "../top");
            raw(builder, "python", EntryType::Symlink, "/usr/bin/python3");
            raw(builder, "up", EntryType::Symlink, "../../x");
            raw(builder, "c", EntryType::Link, "src/a");
            long(builder, EntryType::Regular, 2 << 20);
            long(builder, EntryType::GNULongName, 200);
            raw(builder, "short", EntryType::Regular, "");
        });
        check(plain.as_slice(), &Limits::default()).unwrap();
    }

    #[test]
    fn hostile_ones_do_not() {
        let hostile = [
            ("../a", EntryType::Regular, ""),
            ("a/../../b", EntryType::Regular, ""),
            ("/etc/passwd", EntryType::Regular, ""),
            ("link", EntryType::Symlink, ""),
            ("link", EntryType::Link, "/etc/passwd"),
            ("link", EntryType::Link, "../etc/passwd"),
            ("device", EntryType::Char, ""),
            ("pipe", EntryType::Fifo, ""),
        ];
        for (name, kind, target) in hostile {
            let why = refusal(|builder| raw(builder, name, kind, target), &Limits::default());
            assert!(why.starts_with(name), "{name} {kind:?} {target}: {why}");
        }
    }

    #[test]
    fn neither_do_nonsense_and_nothing() {
        let error = check(&b"not a gzip file"[..], &Limits::default()).unwrap_err();
        assert!(error.to_string().contains("it is no whole tar.gz or tar.zst"), "{error:?}");
        assert_eq!(refusal(|_| {}, &Limits::default()), "it is empty");
    }

    #[test]
    fn neither_does_one_that_is_cut_short_anywhere() {
        let whole = archive(|builder| long(builder, EntryType::Regular, 5000));
        check(whole.as_slice(), &Limits::default()).unwrap();
        for length in 0..whole.len() {
            assert!(check(&whole[..length], &Limits::default()).is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn neither_do_bombs() {
        let limits = Limits { unpacked: 1 << 30, entries: 1000, ..Limits::default() };
        let said = "it unpacks to more than 1 GiB or 1000 entries";
        let many = |builder: &mut Packing| (0..=1000).for_each(|_| raw(builder, "a", EntryType::Regular, ""));
        assert_eq!(refusal(many, &limits), said);
        let zeros = |builder: &mut Packing| long(builder, EntryType::Regular, (1 << 30) + 1);
        assert_eq!(refusal(zeros, &limits), said);
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let why = refusal(|builder| long(builder, kind, 64 << 20), &limits);
            assert!(why.ends_with("a header is too large"), "{kind:?}: {why}");
        }
    }

    #[test]
    fn zstd_is_read_too_whole_and_within_its_window() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_path("long").unwrap();
        header.set_size(5000);
        header.set_cksum();
        builder.append(&header, io::repeat(b'x').take(5000)).unwrap();
        let tar = builder.into_inner().unwrap();
        let packed = |log: u32| {
            let mut packing = zstd::Encoder::new(Vec::new(), 1).unwrap();
            packing.include_checksum(true).unwrap();
            packing.window_log(log).unwrap();
            io::copy(&mut tar.as_slice(), &mut packing).unwrap();
            packing.finish().unwrap()
        };
        let whole = packed(20);
        check(whole.as_slice(), &Limits::default()).unwrap();
        for length in 0..whole.len() {
            assert!(check(&whole[..length], &Limits::default()).is_err(), "{length} of {} bytes", whole.len());
        }
        // It would take as much memory as the window.
        assert!(check(packed(27).as_slice(), &Limits::default()).is_err());
    }

    #[test]
    fn holes_count_as_holes() {
        let sparse = |size: u64| {
            archive(|builder| {
                let mut header = Header::new_gnu();
                header.set_path("holes").unwrap();
                header.set_entry_type(EntryType::GNUSparse);
                header.set_size(0);
                let gnu = header.as_gnu_mut().unwrap();
                gnu.set_real_size(size);
                gnu.sparse[0].set_offset(size);
                gnu.sparse[0].set_length(0);
                header.set_cksum();
                builder.append(&header, io::empty()).unwrap();
            })
        };
        let small = Limits { unpacked: 1 << 20, entries: 10, ..Limits::default() };
        check(sparse(2 << 20).as_slice(), &small).unwrap();
        check(sparse(1 << 60).as_slice(), &small).unwrap_err();
    }

    #[test]
    fn neither_does_a_bomb_behind_the_end() {
        let small = Limits { unpacked: 1 << 20, entries: 10, ..Limits::default() };
        let mut bomb = archive(|builder| raw(builder, "a", EntryType::Regular, ""));
        let mut more = GzEncoder::new(Vec::new(), Compression::fast());
        io::copy(&mut io::repeat(0).take(4 << 20), &mut more).unwrap();
        bomb.extend(more.finish().unwrap());
        let error = check(bomb.as_slice(), &small).unwrap_err();
        assert!(error.to_string().contains("unpacks to more than"), "{error}");
    }
}
