//! The newest output of the start command, each byte at its offset in everything it has ever printed.

use std::collections::VecDeque;

/// One stretch of output from one of the two streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Of its first byte.
    pub offset: u64,
    /// Whether it came from standard error.
    pub stderr: bool,
    /// At least one byte.
    pub data: Vec<u8>,
}

/// Keeps at most so many bytes.
pub struct Ring {
    pieces: VecDeque<Piece>,
    held: usize,
    capacity: usize,
    end: u64,
}

impl Ring {
    /// An empty ring; memory is taken as it is needed.
    pub fn new(capacity: usize) -> Self {
        Self { pieces: VecDeque::new(), held: 0, capacity, end: 0 }
    }

    #[cfg(test)]
    /// Offset of the byte that will come next.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Adds output; the oldest makes room for it.
    pub fn push(&mut self, stderr: bool, data: &[u8]) {
        self.end += data.len() as u64;
        let data = &data[data.len().saturating_sub(self.capacity)..];
        if data.is_empty() {
            return;
        }
        // Short pieces are joined, so that a program that prints letter by letter takes no more memory than its letters.
        match self.pieces.back_mut().filter(|last| last.stderr == stderr && last.data.len() < self.capacity / 16) {
            Some(last) => last.data.extend_from_slice(data),
            None => self.pieces.push_back(Piece { offset: self.end - data.len() as u64, stderr, data: data.to_vec() }),
        }
        self.held += data.len();
        while self.held > self.capacity {
            self.drop_oldest(self.held - self.capacity);
        }
    }

    fn drop_oldest(&mut self, excess: usize) {
        let Some(oldest) = self.pieces.front_mut() else { return };
        if oldest.data.len() <= excess {
            self.held -= oldest.data.len();
            self.pieces.pop_front();
        } else {
            oldest.data.drain(..excess);
            oldest.offset += excess as u64;
            self.held -= excess;
        }
    }

    /// At most `most` bytes of one stream from `offset` on, or from the oldest that is held; `None` at the end.
    pub fn read(&self, offset: u64, most: usize) -> Option<Piece> {
        let index = self.pieces.partition_point(|piece| piece.offset + piece.data.len() as u64 <= offset);
        let piece = self.pieces.get(index)?;
        let skip = usize::try_from(offset.saturating_sub(piece.offset)).unwrap_or(0);
        let data = &piece.data[skip..];
        let data = &data[..data.len().min(most)];
        Some(Piece { offset: piece.offset + skip as u64, stderr: piece.stderr, data: data.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(ring: &Ring, mut offset: u64, most: usize) -> (u64, Vec<u8>) {
        let first = ring.read(offset, most).map_or(offset, |piece| piece.offset);
        let mut all = Vec::new();
        while let Some(piece) = ring.read(offset, most) {
            assert!(!piece.data.is_empty() && piece.data.len() <= most);
            offset = piece.offset + piece.data.len() as u64;
            all.extend(piece.data);
        }
        assert_eq!(offset, ring.end());
        (first, all)
    }

    #[test]
    fn streams_keep_their_order() {
        let mut ring = Ring::new(1024);
        ring.push(false, b"one ");
        ring.push(false, b"two ");
        ring.push(true, b"oops ");
        ring.push(false, b"three");
        let piece = ring.read(0, 1024).unwrap();
        assert_eq!((piece.stderr, piece.data.as_slice()), (false, &b"one two "[..]));
        let piece = ring.read(8, 1024).unwrap();
        assert_eq!((piece.stderr, piece.offset, piece.data.as_slice()), (true, 8, &b"oops "[..]));
        assert_eq!(read_all(&ring, 0, 3), (0, b"one two oops three".to_vec()));
        assert_eq!(ring.read(6, 1).unwrap().data, b"o");
        assert_eq!(ring.read(18, 9), None);
        assert_eq!(ring.read(u64::MAX, 9), None);
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut ring = Ring::new(64);
        for n in 0..100_u8 {
            ring.push(n % 3 == 0, &[n; 3]);
        }
        let everything: Vec<u8> = (0..100_u8).flat_map(|n| [n; 3]).collect();
        assert_eq!(read_all(&ring, 0, 7), (300 - 64, everything[300 - 64..].to_vec()));
    }

    #[test]
    fn one_push_may_be_larger_than_the_ring() {
        let mut ring = Ring::new(8);
        ring.push(false, b"before");
        ring.push(false, b"0123456789");
        assert_eq!(read_all(&ring, 0, 100), (8, b"23456789".to_vec()));
    }
}
