//! Whether an archive names its files from the root of the sandbox, as some clients do, or from where it is unpacked to.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use heyvm_bounded_tar::{MAX_HEADER, entries};
use tar::EntryType;

use crate::{Error, check::broken, compression};

/// Whether everything in an archive lies below `directory`, counted from the root: `workspace/app.py` does for
/// `/workspace`. Reads as far as it must to know.
pub fn lies_below(archive: impl Read + Send, directory: &Path) -> Result<bool, Error> {
    let directory: PathBuf = directory.strip_prefix("/").unwrap_or(directory).components().collect();
    let (mut all, mut some) = (true, false);
    entries(compression::tar_of(archive).map_err(broken)?, MAX_HEADER, broken, |entry| {
        let path = entry.path().map_err(broken)?;
        let path = path.strip_prefix(".").unwrap_or(&path);
        let kind = entry.header().entry_type();
        let leads_there = kind == EntryType::Directory && directory.starts_with(path);
        some |= path.starts_with(&directory);
        all = leads_there || kind == EntryType::XGlobalHeader || path.starts_with(&directory);
        Ok(all)
    })?;
    Ok(all && some)
}

#[cfg(test)]
mod tests {
    use std::io;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn archive(names: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for name in names {
            let mut header = tar::Header::new_gnu();
            let kind = if name.ends_with('/') { EntryType::Directory } else { EntryType::Regular };
            header.set_entry_type(kind);
            header.set_size(0);
            tar.append_data(&mut header, name, io::empty()).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn what_is_named_from_the_root_is_told_from_what_is_not() {
        let cases: [(&[&str], &str, bool); 8] = [
            (&["workspace/", "workspace/app.py"], "/workspace", true),
            (&["srv/", "srv/app/", "srv/app/x/y"], "/srv/app/", true),
            (&["./workspace/app.py"], "/workspace", true),
            (&["workspace/app.py", "README"], "/workspace", false),
            (&["workspace2/app.py"], "/workspace", false),
            (&["app.py"], "/workspace", false),
            (&["srv/"], "/srv/app", false),
            (&["srv"], "/srv/app", false),
        ];
        for (names, directory, below) in cases {
            assert_eq!(lies_below(&archive(names)[..], Path::new(directory)).unwrap(), below, "{names:?} {directory}");
        }
        assert!(lies_below(&b"no archive"[..], Path::new("/workspace")).is_err());
    }
}
