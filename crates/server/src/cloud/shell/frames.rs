//! What goes over a shell's WebSocket, as existing clients speak it.

use std::collections::BTreeMap;

use axum::extract::ws::Message;
use bytes::{BufMut, Bytes, BytesMut};
use heyvm_api::{ApiError, exec::PtySize};
use serde::{Deserialize, Serialize};

/// First byte of input.
const STDIN: u8 = 1;
/// First byte of output.
const STDOUT: u8 = 2;
/// Columns or rows of a terminal: no screen has more, and programs allocate by them.
const MAX_SIDE: u32 = 4096;

/// A client's first frame.
#[derive(Debug, Default, Deserialize)]
pub struct Init {
    cols: Option<u32>,
    rows: Option<u32>,
    /// On top of the sandbox's environment.
    #[serde(default)]
    pub env: Option<BTreeMap<String, String>>,
    /// The sandbox's working directory when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// The session it had before.
    #[serde(default, rename = "sessionId")]
    pub session_id: Option<String>,
}

impl Init {
    /// The terminal's size; 80 by 24 when absent.
    pub fn size(&self) -> Result<PtySize, Fault> {
        size(self.cols.unwrap_or(80), self.rows.unwrap_or(24))
    }
}

/// What a client says.
#[derive(Debug)]
pub enum Said {
    /// First frame.
    Init(Init),
    /// Bytes for the terminal.
    Input(Bytes),
    /// The terminal has another size now.
    Resize(PtySize),
    /// Output up to this number has come.
    Ack(u64),
    /// It wants no more of this session.
    Close,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Text {
    Init(Init),
    Resize { cols: u32, rows: u32 },
    Ack { seq: u64 },
    Close,
}

impl Said {
    /// What a frame means; `None` for those that only show that somebody is there.
    pub fn read(message: Message) -> Result<Option<Self>, Fault> {
        Ok(Some(match message {
            Message::Binary(frame) => match frame.first() {
                Some(&STDIN) => Self::Input(frame.slice(1..)),
                _ => {
                    return Err(Fault::new(
                        "invalid_frame",
                        "a binary frame of no known kind: input begins with a byte 1",
                    ));
                }
            },
            Message::Text(text) => match serde_json::from_str(text.as_str()) {
                Ok(Text::Init(init)) => Self::Init(init),
                Ok(Text::Resize { cols, rows }) => Self::Resize(size(cols, rows)?),
                Ok(Text::Ack { seq }) => Self::Ack(seq),
                Ok(Text::Close) => Self::Close,
                Err(error) => {
                    return Err(Fault::new("invalid_frame", format!("a text frame that is not understood: {error}")));
                }
            },
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => return Ok(None),
        }))
    }
}

fn size(cols: u32, rows: u32) -> Result<PtySize, Fault> {
    let side = |given: u32| u16::try_from(given).ok().filter(|side| (1..=MAX_SIDE).contains(&u32::from(*side)));
    match (side(cols), side(rows)) {
        (Some(cols), Some(rows)) => Ok(PtySize { cols, rows }),
        _ => Err(Fault::new("invalid_size", format!("{cols} by {rows} is no terminal's size: use 1 to {MAX_SIDE}"))),
    }
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    code: String,
    message: String,
}

impl Fault {
    /// With a stable code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }

    /// There is no such session, or not any more. Clients know this code.
    pub fn expired() -> Self {
        Self::new("session_expired", "there is no such session any more: begin another")
    }
}

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        let hint = error.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
        Self { code: error.code.as_str(), message: format!("{}{hint}", error.message) }
    }
}

/// What the server says.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The session is there.
    Ready { session_id: String, last_seq: u64 },
    /// Output.
    Output { seq: u64, bytes: Bytes },
    /// The shell has ended; the last frame.
    Exit { code: i32 },
    /// It goes no further; the last frame.
    Error(Fault),
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Told<'a> {
    Ready {
        #[serde(rename = "sessionId")]
        session_id: &'a str,
        #[serde(rename = "lastSeq")]
        last_seq: u64,
    },
    Exit {
        code: i32,
    },
    Error {
        code: &'a str,
        message: &'a str,
    },
}

impl Answer {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Exit { .. } | Self::Error(_))
    }

    /// As a frame.
    pub fn frame(&self) -> Message {
        let told = match self {
            Self::Output { seq, bytes } => {
                let mut frame = BytesMut::with_capacity(9 + bytes.len());
                frame.put_u8(STDOUT);
                frame.put_u64(*seq);
                frame.put_slice(bytes);
                return Message::Binary(frame.freeze());
            }
            Self::Ready { session_id, last_seq } => Told::Ready { session_id, last_seq: *last_seq },
            Self::Exit { code } => Told::Exit { code: *code },
            Self::Error(fault) => Told::Error { code: &fault.code, message: &fault.message },
        };
        Message::text(serde_json::to_string(&told).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Said>, Fault> {
        Said::read(Message::text(text))
    }

    #[test]
    fn what_clients_say_is_understood() {
        let Ok(Some(Said::Init(init))) = read(r#"{"type":"init","cols":100,"rows":30,"cwd":"/","sessionId":"a"}"#)
        else {
            panic!()
        };
        assert_eq!((init.size().unwrap().cols, init.session_id.as_deref()), (100, Some("a")));
        assert!(matches!(read(r#"{"type":"resize","cols":1,"rows":4096}"#), Ok(Some(Said::Resize(_)))));
        assert!(matches!(read(r#"{"type":"ack","seq":18446744073709551615}"#), Ok(Some(Said::Ack(u64::MAX)))));
        assert!(matches!(read(r#"{"type":"close"}"#), Ok(Some(Said::Close))));
        let input = Said::read(Message::Binary(Bytes::from_static(b"\x01ls\n")));
        assert!(matches!(input, Ok(Some(Said::Input(bytes))) if bytes == "ls\n"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for text in [
            "",
            "{",
            "[]",
            "null",
            r#"{"type":"no"}"#,
            r#"{"type":"ack","seq":-1}"#,
            r#"{"type":"resize","cols":0,"rows":1}"#,
            r#"{"type":"resize","cols":1,"rows":100000}"#,
            r#"{"type":"resize","cols":99999999999,"rows":1}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        for frame in [&b""[..], b"\x02a", b"\x00", b"ls"] {
            assert!(Said::read(Message::Binary(Bytes::from_static(frame))).is_err(), "{frame:?}");
        }
        assert!(Init { cols: Some(0), ..Init::default() }.size().is_err());
    }

    #[test]
    fn output_has_its_number_before_it() {
        let frame = Answer::Output { seq: 258, bytes: Bytes::from_static(b"hi") }.frame();
        assert_eq!(frame, Message::Binary(Bytes::from_static(b"\x02\0\0\0\0\0\0\x01\x02hi")));
        let exit = Answer::Exit { code: 3 }.frame();
        assert_eq!(exit, Message::text(r#"{"type":"exit","code":3}"#));
    }
}
