//! What an archive must be before it is kept: a whole tar.gz of files, directories and links that stay within it, and
//! that unpacks to no more than allowed. Every byte is somebody else's.

use std::{
    io::{self, Read},
    path::{Component, Path},
};

use flate2::read::MultiGzDecoder;
use heyvm_images::archive;
use tar::EntryType;

use crate::Error;

/// A header, with a long name or extended attributes in front of it, may be this large. It is held in memory.
pub(crate) const MAX_HEADER: u64 = 1 << 20;
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
}

impl Default for Limits {
    fn default() -> Self {
        Self::STANDARD
    }
}

/// Reads a tar.gz to its end. Refuses what would leave its directory, is no file, directory or link, unpacks to more
/// than allowed, or is not whole. (`limits.compressed` is for whoever sends the bytes to keep.)
pub fn check(tar_gz: impl Read, limits: &Limits) -> Result<(), Error> {
    let too_much = || {
        let gib = limits.unpacked >> 30;
        Error::Refused(format!("it unpacks to more than {gib} GiB or {} entries", limits.entries))
    };
    let most = limits.unpacked.saturating_add(limits.entries.saturating_mul(AROUND_ENTRY));
    let mut stream = MultiGzDecoder::new(tar_gz).take(most.saturating_add(1));
    let (mut count, mut bytes) = (0, 0_u64);
    archive::entries(&mut stream, MAX_HEADER, broken, |entry| {
        count += 1;
        bytes = bytes.saturating_add(entry.size());
        if count > limits.entries || bytes > limits.unpacked {
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
    Error::Refused(format!("it is no whole tar.gz: {error}"))
}

fn check_entry(entry: &tar::Entry<'_, impl Read>) -> Result<(), Error> {
    let path = entry.path().map_err(|error| Error::Refused(format!("an entry has no readable name: {error}")))?;
    let shown = path.display();
    if !stays_inside(&path) {
        return Err(Error::Refused(format!("{shown} leaves its directory")));
    }
    match entry.header().entry_type() {
        EntryType::Regular | EntryType::Directory | EntryType::XGlobalHeader => Ok(()),
        kind @ (EntryType::Symlink | EntryType::Link) => {
            let target = entry.link_name().ok().flatten().unwrap_or_default();
            // A hard link's target counts from the top, a symbolic link's from where it stands.
            let base = if kind == EntryType::Symlink { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
            if target.as_os_str().is_empty() || !stays_inside(&base.join(&target)) {
                let target = target.display();
                return Err(Error::Refused(format!("{shown} leads to {target}, outside of its directory")));
            }
            Ok(())
        }
        kind => Err(Error::Refused(format!("{shown} is a {kind:?}, which cannot be deployed"))),
    }
}

/// Relative, and never above where it began.
fn stays_inside(path: &Path) -> bool {
    let mut depth = 0_i64;
    for part in path.components() {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => return false,
        };
        if depth < 0 {
            return false;
        }
    }
    true
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
            ("link", EntryType::Symlink, "/etc"),
            ("a/link", EntryType::Symlink, "../../etc"),
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
        assert!(error.to_string().contains("it is no whole tar.gz"), "{error:?}");
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
