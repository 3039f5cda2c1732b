//! Output of a command on its way into a JSON document: kept in a file once it is large, never whole in memory.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    str,
};

use base64::{engine::general_purpose::STANDARD, write::EncoderWriter};
use tempfile::SpooledTempFile;

/// More than this goes into an unlinked file.
const IN_MEMORY: usize = 256 << 10;
const BLOCK: usize = 64 << 10;
const REPLACEMENT: &str = "\u{fffd}";

/// What one stream has said so far.
pub struct Spool {
    bytes: SpooledTempFile,
    text: TextCheck,
}

impl Spool {
    /// An empty one.
    pub fn new() -> Self {
        Self { bytes: SpooledTempFile::new(IN_MEMORY), text: TextCheck::default() }
    }

    /// Adds to it.
    pub fn push(&mut self, data: &[u8]) -> io::Result<()> {
        self.text.see(data);
        self.bytes.write_all(data)
    }

    /// Whether all of it is UTF-8.
    pub fn is_text(&self) -> bool {
        !self.text.broken && self.text.unfinished.is_empty()
    }

    /// Writes it as the inside of a JSON string; what is not UTF-8 is replaced.
    pub fn write_escaped(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.bytes.seek(SeekFrom::Start(0))?;
        let (mut unfinished, mut block) = (Vec::new(), vec![0; BLOCK]);
        loop {
            let length = self.bytes.read(&mut block)?;
            if length == 0 {
                return if unfinished.is_empty() { Ok(()) } else { out.write_all(REPLACEMENT.as_bytes()) };
            }
            unfinished.extend_from_slice(&block[..length]);
            let rest = escape_bytes(&unfinished, out)?;
            unfinished.drain(..unfinished.len() - rest);
        }
    }

    /// Writes it in Base64.
    pub fn write_base64(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.bytes.seek(SeekFrom::Start(0))?;
        let mut encoder = EncoderWriter::new(out, &STANDARD);
        io::copy(&mut self.bytes, &mut encoder)?;
        encoder.finish().map(drop)
    }
}

/// Whether bytes that come in pieces are UTF-8.
#[derive(Default)]
struct TextCheck {
    broken: bool,
    /// The beginning of a character whose end has not come yet.
    unfinished: Vec<u8>,
}

impl TextCheck {
    fn see(&mut self, data: &[u8]) {
        if self.broken {
            return;
        }
        // Only the character that was cut in two is copied.
        let mut data = data;
        while let (false, [first, rest @ ..]) = (self.unfinished.is_empty(), data) {
            self.unfinished.push(*first);
            data = rest;
            match str::from_utf8(&self.unfinished) {
                Ok(_) => self.unfinished.clear(),
                Err(error) if error.error_len().is_some() => return self.broken = true,
                Err(_) => {}
            }
        }
        match str::from_utf8(data) {
            Ok(_) => {}
            Err(error) if error.error_len().is_some() => self.broken = true,
            Err(error) => self.unfinished.extend_from_slice(&data[error.valid_up_to()..]),
        }
    }
}

/// Escapes all but a character cut off at the end, and answers how many bytes of it are left.
fn escape_bytes(mut bytes: &[u8], out: &mut impl Write) -> io::Result<usize> {
    loop {
        let error = match str::from_utf8(bytes) {
            Ok(text) => return escape(text, out).map(|()| 0),
            Err(error) => error,
        };
        let (good, bad) = bytes.split_at(error.valid_up_to());
        escape(str::from_utf8(good).unwrap_or_default(), out)?;
        let Some(length) = error.error_len() else { return Ok(bad.len()) };
        out.write_all(REPLACEMENT.as_bytes())?;
        bytes = &bad[length..];
    }
}

/// Writes `text` as the inside of a JSON string.
pub fn escape(text: &str, out: &mut impl Write) -> io::Result<()> {
    let bytes = text.as_bytes();
    let mut written = 0;
    for (at, byte) in bytes.iter().enumerate() {
        let short: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0..=0x1f => b"",
            _ => continue,
        };
        out.write_all(&bytes[written..at])?;
        if short.is_empty() {
            write!(out, "\\u{byte:04x}")?
        } else {
            out.write_all(short)?
        }
        written = at + 1;
    }
    out.write_all(&bytes[written..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spooled(pieces: &[&[u8]]) -> Spool {
        let mut spool = Spool::new();
        pieces.iter().for_each(|piece| spool.push(piece).unwrap());
        spool
    }

    /// What a JSON parser reads back.
    fn told(spool: &mut Spool) -> String {
        let mut document = b"\"".to_vec();
        spool.write_escaped(&mut document).unwrap();
        document.push(b'"');
        serde_json::from_slice(&document).unwrap()
    }

    #[test]
    fn every_character_comes_back_wherever_blocks_end() {
        for character in ["ä", "€", "🦀", "\"", "\\", "\n", "\u{0}", "\u{1f}", "\u{7f}"] {
            for shift in 0..4 {
                let text = "x".repeat(shift) + &character.repeat(BLOCK / character.len() + 9);
                let mut spool = spooled(&[text.as_bytes()]);
                assert!(spool.is_text());
                assert!(told(&mut spool) == text, "{character:?} after {shift}");
            }
        }
    }

    #[test]
    fn text_is_known_as_such_however_it_is_cut() {
        let text = "aä€🦀z".as_bytes();
        for at in 0..=text.len() {
            for to in at..=text.len() {
                assert!(spooled(&[&text[..at], &text[at..to], &text[to..]]).is_text(), "cut at {at} and {to}");
            }
        }
        for bytes in [&b"a\xff"[..], b"\xc3", b"\xe2\x82", b"\xc3a", b"\xed\xa0\x80"] {
            assert!(!spooled(&[bytes]).is_text(), "{bytes:?}");
        }
        assert!(!spooled(&[b"\xc3", b"a"]).is_text());
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_and_whole_in_base64() {
        let mut spool = spooled(&[b"\xff", b"a\xc3", b"(", b"\xe2\x82"]);
        assert_eq!(told(&mut spool), String::from_utf8_lossy(b"\xffa\xc3(\xe2\x82"));
        let mut encoded = Vec::new();
        spool.write_base64(&mut encoded).unwrap();
        assert_eq!(base64::Engine::decode(&STANDARD, encoded).unwrap(), b"\xffa\xc3(\xe2\x82");
    }
}
