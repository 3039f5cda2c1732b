//! Where a file's data lies: what is between is holes, which a tar names instead of holding their zeros.

use std::{fs::File, io, os::unix::fs::MetadataExt};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Pieces of data that are named at most; a file of more is packed as if its holes were data.
const MAX_PIECES: usize = 20_000;

/// Offset and length of a piece of data.
pub type Piece = (u64, u64);

/// The pieces of data in the first `size` bytes of a file, the last of which ends at `size` (and may be empty); `None`
/// for a file without holes. Leaves the file's position anywhere.
pub fn pieces(file: &File, size: u64) -> io::Result<Option<Vec<Piece>>> {
    if file.metadata()?.blocks().saturating_mul(512) >= size {
        return Ok(None);
    }
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let begin = match seek(file, SeekFrom::Data(at)) {
            Ok(begin) => begin.min(size),
            Err(Errno::NXIO) => size,
            // Not every file system knows of holes.
            Err(_) => return Ok(None),
        };
        if begin == size {
            break;
        }
        let end = seek(file, SeekFrom::Hole(begin))?.min(size);
        if end <= begin || pieces.len() == MAX_PIECES {
            return Ok(None);
        }
        pieces.push((begin, end - begin));
        at = end;
    }
    match pieces.last() {
        Some((0, length)) if pieces.len() == 1 && *length == size => Ok(None),
        Some((begin, length)) if begin + length == size => Ok(Some(pieces)),
        _ => {
            pieces.push((size, 0));
            Ok(Some(pieces))
        }
    }
}
