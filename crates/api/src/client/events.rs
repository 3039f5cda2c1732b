//! Server-sent events of an answer. Format: the HTML standard, "server-sent events".

use http_body_util::BodyExt;
use hyper::body::Incoming;

/// Longest event.
const MAX_EVENT: usize = 16 << 20;

/// One event.
pub struct Event {
    pub kind: String,
    pub data: Vec<u8>,
}

/// The events of a body, one after the other.
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    pub fn new(body: Incoming) -> Self {
        Self { body, buffer: Vec::new() }
    }

    /// `None` at the end; an error says how the body broke off.
    pub async fn next(&mut self) -> Result<Option<Event>, String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = event(&block) {
                    return Ok(Some(event));
                }
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend(frame.data_ref().map_or(&[][..], |data| data)),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Ok(None),
            }
            if self.buffer.len() > MAX_EVENT {
                return Err("an event is too long".into());
            }
        }
    }
}

/// `None` for comments, which keep the connection alive.
fn event(block: &[u8]) -> Option<Event> {
    let text = String::from_utf8_lossy(block);
    let (mut kind, mut data) = (String::new(), Vec::new());
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            kind = value.trim().to_owned();
        } else if let Some(value) = line.strip_prefix("data:") {
            if !data.is_empty() {
                data.push(b'\n');
            }
            data.extend(value.strip_prefix(' ').unwrap_or(value).bytes());
        }
    }
    (!kind.is_empty()).then_some(Event { kind, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_from_comments() {
        assert!(event(b": still here\n\n").is_none());
        let found = event(b"event: result\ndata: {\"a\":\ndata: 1}\n\n").unwrap();
        assert_eq!((found.kind.as_str(), found.data.as_slice()), ("result", b"{\"a\":\n1}".as_slice()));
    }
}
