//! Archives: tar.gz files by content hash, looked through before they are kept, and kept as long as a sandbox names them
//! or a day has not passed since they were used. Every byte is somebody else's.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use futures::{StreamExt, stream::BoxStream};
use heyvm_api::{ApiError, ErrorCode, sandbox::Status, system::ArchiveInfo};
use heyvm_images::archive;
use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::{ControlPlane, errors};

/// Largest archive, in bytes, compressed.
const MAX_COMPRESSED: u64 = 1 << 30;
/// What it may unpack to, in bytes.
pub const MAX_UNPACKED: u64 = 8 << 30;
/// And in entries.
pub const MAX_ENTRIES: u64 = 500_000;
/// Bytes in which it is passed on.
const PIECE: usize = 64 << 10;
/// A header, with a long name or extended attributes in front of it, may be this large. It is held in memory.
const MAX_HEADER: u64 = 1 << 20;
/// An archive that no sandbox was made from is kept this long after it was last sent or used.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How often such ones are looked for.
const TIDYING: Duration = Duration::from_secs(3600);
/// Beginning of the names of those that are not whole yet.
const HALF: &str = ".half-";
/// Hex digits of the hash that make an archive's id.
const ID_DIGITS: usize = 32;

impl ControlPlane {
    /// Takes a tar.gz: checks it (paths, kinds, unpacked size), stores it by content hash.
    pub async fn put_archive(&self, mut body: BoxStream<'static, io::Result<Bytes>>) -> Result<ArchiveInfo, ApiError> {
        let dir = directory(&self.config.home);
        let half = Half(dir.join(format!("{HALF}{}", uuid::Uuid::new_v4())));
        let mut file =
            File::options().create_new(true).write(true).open(&half.0).map_err(|e| errors::io("making a file", &e))?;
        let (mut hash, mut size) = (Sha256::new(), 0);
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| {
                ApiError::new(ErrorCode::ArchiveInvalid, format!("the upload broke off: {error}"))
                    .hint("send it again")
                    .step("archive")
            })?;
            size += piece.len() as u64;
            if size > MAX_COMPRESSED {
                return Err(ApiError::new(ErrorCode::TooLarge, "the archive is larger than 1 GiB")
                    .hint("leave files out with .heyvmignore, or fetch them in a setup hook")
                    .step("archive"));
            }
            hash.update(&piece);
            file.write_all(&piece).map_err(|error| errors::io("writing the archive", &error))?;
        }
        let archive_id = format!("ar-{}", &hex::encode(hash.finalize())[..ID_DIGITS]);
        let target = dir.join(&archive_id);
        let (from, to) = (half.0.clone(), target.clone());
        tokio::task::spawn_blocking(move || {
            if to.exists() {
                touch(&to);
            } else {
                look_through(
                    File::open(&from).map_err(|error| errors::io("reading the archive", &error))?,
                    MAX_UNPACKED,
                )?;
                fs::rename(&from, &to).map_err(|error| errors::io("keeping the archive", &error))?;
            }
            Ok::<(), ApiError>(())
        })
        .await
        .map_err(|error| errors::internal(&error))??;
        Ok(ArchiveInfo { archive_id, size_bytes: size })
    }

    /// Removes archives that nobody needs any more, for as long as the daemon runs.
    pub(crate) async fn tidy_archives_forever(self: Arc<Self>) {
        loop {
            let records = self.all().into_iter().map(|sandbox| sandbox.snapshot());
            let living = records.filter(|record| record.status != Status::Removed);
            let named: HashSet<_> = living.filter_map(|record| record.archive_id).collect();
            let dir = directory(&self.config.home);
            let _ = tokio::task::spawn_blocking(move || remove_unused(&dir, &named)).await;
            tokio::time::sleep(TIDYING).await;
        }
    }
}

fn directory(home: &Path) -> PathBuf {
    home.join("archives")
}

/// Makes the directory, and removes from it what a daemon that was killed was still taking.
pub fn prepare(home: &Path) -> io::Result<()> {
    fs::create_dir_all(directory(home))?;
    for entry in fs::read_dir(directory(home))?.flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(HALF)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn remove_unused(dir: &Path, named: &HashSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
        let free = entry.file_name().to_str().is_some_and(|name| name.starts_with("ar-") && !named.contains(name));
        if free
            && age.is_some_and(|age| age > KEPT)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "an archive that nobody needs cannot be removed");
        }
    }
}

/// It is used now.
fn touch(archive: &Path) {
    if let Err(error) = File::open(archive).and_then(|file| file.set_modified(SystemTime::now())) {
        tracing::warn!(%error, path = %archive.display(), "that an archive is used cannot be written down");
    }
}

/// Removed when it goes out of scope, unless it was renamed.
struct Half(PathBuf);

impl Drop for Half {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn path_of(home: &Path, id: &str) -> Option<PathBuf> {
    let digits = id.strip_prefix("ar-")?;
    let good = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    good.then(|| directory(home).join(id))
}

/// Whether there is an archive of this id. Whoever asks is about to use it.
pub fn check(home: &Path, id: &str) -> Result<(), ApiError> {
    match path_of(home, id).filter(|path| path.exists()) {
        Some(path) => {
            touch(&path);
            Ok(())
        }
        None => Err(ApiError::new(ErrorCode::ArchiveNotFound, format!("there is no archive {id:?}"))
            .hint("upload it again with PUT /archives, or deploy the directory")),
    }
}

/// An archive's tar stream.
pub fn read(home: &Path, id: &str) -> Result<impl Read + Send + use<>, ApiError> {
    check(home, id)?;
    let path = path_of(home, id).unwrap_or_default();
    Ok(MultiGzDecoder::new(File::open(path).map_err(|error| errors::io("opening the archive", &error))?))
}

/// Passes a stream on in pieces until it ends or `take` wants no more.
pub fn feed(mut from: impl Read, mut take: impl FnMut(Vec<u8>) -> bool) -> io::Result<()> {
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        (&mut from).take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() || !take(piece) {
            return Ok(());
        }
    }
}

/// Refuses what would leave its directory, is no file, directory or link, or unpacks to more than allowed.
fn look_through(file: File, max_bytes: u64) -> Result<(), ApiError> {
    let broken = |error: io::Error| refused(format!("it is no whole tar.gz: {error}"));
    let (mut count, mut bytes) = (0, 0_u64);
    archive::entries(MultiGzDecoder::new(file), MAX_HEADER, broken, |entry| {
        count += 1;
        bytes = bytes.saturating_add(entry.size());
        if count > MAX_ENTRIES || bytes > max_bytes {
            return Err(refused(format!("it unpacks to more than {} GiB or {MAX_ENTRIES} entries", max_bytes >> 30)));
        }
        check_entry(entry).map(|()| true)
    })?;
    if count == 0 { Err(refused("it is empty".into())) } else { Ok(()) }
}

fn refused(why: String) -> ApiError {
    ApiError::new(ErrorCode::ArchiveInvalid, why)
        .hint("pack a directory of files, directories and links within it")
        .step("archive")
}

fn check_entry(entry: &tar::Entry<'_, impl Read>) -> Result<(), ApiError> {
    let path = entry.path().map_err(|error| refused(format!("an entry has no readable name: {error}")))?;
    let shown = path.display();
    if !stays_inside(&path) {
        return Err(refused(format!("{shown} leaves its directory")));
    }
    match entry.header().entry_type() {
        EntryType::Regular | EntryType::Directory | EntryType::XGlobalHeader => Ok(()),
        kind @ (EntryType::Symlink | EntryType::Link) => {
            let target = entry.link_name().ok().flatten().unwrap_or_default();
            // A hard link's target counts from the top, a symbolic link's from where it stands.
            let base = if kind == EntryType::Symlink { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
            if target.as_os_str().is_empty() || !stays_inside(&base.join(&target)) {
                return Err(refused(format!("{shown} leads to {}, outside of its directory", target.display())));
            }
            Ok(())
        }
        kind => Err(refused(format!("{shown} is a {kind:?}, which cannot be deployed"))),
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

    type Packing = tar::Builder<GzEncoder<File>>;

    fn archive(build: impl FnOnce(&mut Packing)) -> File {
        use std::io::Seek;
        let file = tempfile::tempfile().unwrap();
        let mut builder = tar::Builder::new(GzEncoder::new(file.try_clone().unwrap(), Compression::fast()));
        build(&mut builder);
        builder.into_inner().unwrap().finish().unwrap();
        (&file).seek(io::SeekFrom::Start(0)).unwrap();
        file
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

    fn refusal(build: impl FnOnce(&mut Packing), max_bytes: u64) -> ApiError {
        look_through(archive(build), max_bytes).unwrap_err()
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
        look_through(plain, MAX_UNPACKED).unwrap();
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
            let error = refusal(|builder| raw(builder, name, kind, target), MAX_UNPACKED);
            assert_eq!(error.code, ErrorCode::ArchiveInvalid, "{name} {kind:?} {target}");
        }
    }

    #[test]
    fn neither_do_nonsense_and_nothing() {
        use std::io::Seek;
        let nonsense = tempfile::tempfile().unwrap();
        (&nonsense).write_all(b"not a gzip file").unwrap();
        (&nonsense).seek(io::SeekFrom::Start(0)).unwrap();
        let error = look_through(nonsense, MAX_UNPACKED).unwrap_err();
        assert!(error.message.starts_with("it is no whole tar.gz"), "{error:?}");
        assert_eq!(refusal(|_| {}, MAX_UNPACKED).message, "it is empty");
    }

    #[test]
    fn neither_do_bombs() {
        let many = |builder: &mut Packing| {
            for _ in 0..=MAX_ENTRIES {
                raw(builder, "a", EntryType::Regular, "");
            }
        };
        let limits = "or 500000 entries";
        assert!(refusal(many, MAX_UNPACKED).message.ends_with(limits));
        let zeros = |builder: &mut Packing| long(builder, EntryType::Regular, (1 << 30) + 1);
        assert_eq!(refusal(zeros, 1 << 30).message, format!("it unpacks to more than 1 GiB {limits}"));
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let error = refusal(|builder| long(builder, kind, 64 << 20), MAX_UNPACKED);
            assert!(error.message.ends_with("a header is too large"), "{kind:?}: {error:?}");
        }
    }

    #[test]
    fn an_id_is_no_path() {
        assert!(check(Path::new("/"), "ar-../../etc/passwd").is_err());
        assert!(check(Path::new("/"), "etc/passwd").is_err());
    }
}
