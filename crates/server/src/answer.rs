//! Answers that take long, and answers that are too large for memory.
//!
//! - [`long`]: a call that tells its progress as server-sent events, or answers plain JSON.
//! - [`escaped`], [`base64`]: bytes as they stand in a JSON string, piece by piece.

use std::{borrow::Cow, convert::Infallible, io, pin::Pin, time::Duration};

use axum::{
    Json,
    body::Body,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use heyvm_api::{ApiError, ErrorCode, error::ErrorBody, system::ProgressEvent};
use heyvm_control_plane::ProgressSink;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::{extract::accepts, problem::Problem};

/// How often a silent event stream says that it is still there.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Bytes on their way.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;

/// Runs a long call. Where `text/event-stream` is accepted its progress is told, and the result is an event; else the
/// answer is the result. When the caller goes away the call is dropped.
pub async fn long<T, F>(headers: &HeaderMap, status: StatusCode, call: impl FnOnce(ProgressSink) -> F) -> Response
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T, ApiError>> + Send + 'static,
{
    let (sink, progress) = mpsc::unbounded_channel();
    if !accepts(headers, "text/event-stream") {
        drop(progress);
        return match call(sink).await {
            Ok(result) => (status, Json(result)).into_response(),
            Err(error) => Problem::from(error).into_response(),
        };
    }
    let keep_alive = KeepAlive::new().interval(HEARTBEAT).text("still here");
    Sse::new(events(Box::pin(call(sink)), progress)).keep_alive(keep_alive).into_response()
}

/// What has begun to change a sandbox goes on when its caller goes away.
pub async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| Err(ApiError::new(ErrorCode::Internal, format!("heyvm failed: {error}"))))
}

struct Running<F> {
    call: Option<Pin<Box<F>>>,
    progress: UnboundedReceiver<ProgressEvent>,
    end: Option<Event>,
}

fn events<T, F>(
    call: Pin<Box<F>>,
    progress: UnboundedReceiver<ProgressEvent>,
) -> impl Stream<Item = Result<Event, Infallible>> + Send
where
    T: Serialize,
    F: Future<Output = Result<T, ApiError>> + Send,
{
    stream::unfold(Running { call: Some(call), progress, end: None }, |mut state| async move {
        if let Some(call) = &mut state.call {
            let end = tokio::select! {
                biased;
                Some(told) = state.progress.recv() => return Some((Ok(event("progress", &told)), state)),
                result = call => match result {
                    Ok(result) => event("result", &result),
                    Err(error) => event("error", &ErrorBody::from(Problem::from(error).into_error())),
                },
            };
            (state.call, state.end) = (None, Some(end));
        }
        // What was told in the last moment comes before the end.
        if let Ok(told) = state.progress.try_recv() {
            return Some((Ok(event("progress", &told)), state));
        }
        state.end.take().map(|end| (Ok(end), state))
    })
}

fn event(kind: &str, data: &impl Serialize) -> Event {
    let text = serde_json::to_string(data).unwrap_or_else(|_| "null".into());
    Event::default().event(kind).data(text)
}

/// Cuts a stream of bytes between characters.
#[derive(Default)]
pub struct Characters {
    /// A character that has begun and not ended.
    begun: Vec<u8>,
}

impl Characters {
    /// What has come so far, up to the last whole character.
    pub fn whole<'a>(&mut self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let mut all = if self.begun.is_empty() {
            Cow::Borrowed(bytes)
        } else {
            let mut joined = std::mem::take(&mut self.begun);
            joined.extend_from_slice(bytes);
            Cow::Owned(joined)
        };
        let end = all.len() - unfinished(&all);
        if end < all.len() {
            self.begun = all[end..].to_vec();
            match &mut all {
                Cow::Borrowed(bytes) => *bytes = &bytes[..end],
                Cow::Owned(bytes) => bytes.truncate(end),
            }
        }
        all
    }

    /// Whether no character has begun that has not ended.
    pub fn is_between(&self) -> bool {
        self.begun.is_empty()
    }

    /// What is left at the end.
    pub fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.begun)
    }
}

/// How many bytes at the end are the beginning of a longer character.
fn unfinished(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let needed = match bytes[bytes.len() - back] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if needed > back { back } else { 0 };
    }
    0
}

/// A stream of bytes as the inside of a JSON string; what is not UTF-8 is replaced.
pub fn escaped(bytes: ByteStream) -> ByteStream {
    transformed(bytes, Characters::default(), |characters, piece| {
        let whole = match piece {
            Some(piece) => characters.whole(&piece).into_owned(),
            None => characters.rest(),
        };
        let quoted = serde_json::to_string(&String::from_utf8_lossy(&whole)).unwrap_or_default();
        quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default().to_owned()
    })
}

/// A stream of bytes as Base64.
pub fn base64(bytes: ByteStream) -> ByteStream {
    transformed(bytes, Vec::new(), |left: &mut Vec<u8>, piece| {
        let Some(piece) = piece else { return STANDARD.encode(std::mem::take(left)) };
        left.extend_from_slice(&piece);
        let rest = left.split_off(left.len() - left.len() % 3);
        STANDARD.encode(std::mem::replace(left, rest))
    })
}

/// Each piece through `change`, and once more at the end.
fn transformed<S: Send + 'static>(
    bytes: ByteStream,
    state: S,
    change: impl Fn(&mut S, Option<Bytes>) -> String + Send + Copy + 'static,
) -> ByteStream {
    let pieces = stream::try_unfold(Some((bytes, state)), move |state| async move {
        let Some((mut bytes, mut state)) = state else { return Ok(None) };
        match bytes.next().await {
            Some(piece) => {
                let text = change(&mut state, Some(piece?));
                Ok::<_, io::Error>(Some((Bytes::from(text), Some((bytes, state)))))
            }
            None => Ok(Some((Bytes::from(change(&mut state, None)), None))),
        }
    });
    pieces.boxed()
}

/// Text on its way.
pub fn text(text: impl Into<Bytes>) -> ByteStream {
    let text = text.into();
    stream::once(std::future::ready(Ok(text))).boxed()
}

/// A JSON answer that is put together from pieces.
pub fn json(pieces: Vec<ByteStream>) -> Response {
    bytes("application/json", stream::iter(pieces).flatten().boxed())
}

/// An answer of bytes.
pub fn bytes(kind: &'static str, stream: ByteStream) -> Response {
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    async fn all(stream: ByteStream) -> Vec<u8> {
        stream
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
            .unwrap()
    }

    fn in_pieces(bytes: &[u8], size: usize) -> ByteStream {
        let pieces: Vec<_> = bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        stream::iter(pieces).boxed()
    }

    #[tokio::test]
    async fn pieces_make_the_same_text_as_the_whole() {
        let samples: [&[u8]; 6] = [
            b"",
            b"\"quoted\" \\ and \n new line \x00 \x1b",
            "äöü €uro 𝄞 clef".as_bytes(),
            b"\xff\xfe broken \xe2\x82 end \xf0\x9d\x84",
            b"\"",
            b"\"\"",
        ];
        for sample in samples {
            let lossy = String::from_utf8_lossy(sample).into_owned();
            for size in 1..6 {
                let mut json = b"\"".to_vec();
                json.extend(all(escaped(in_pieces(sample, size))).await);
                json.push(b'"');
                assert_eq!(serde_json::from_slice::<String>(&json).unwrap(), lossy, "{sample:?} by {size}");
                assert_eq!(STANDARD.decode(all(base64(in_pieces(sample, size))).await).unwrap(), sample);
            }
        }
    }

    #[tokio::test]
    async fn progress_comes_before_the_result() {
        let headers: HeaderMap = [(header::ACCEPT, "text/event-stream".parse().unwrap())].into_iter().collect();
        let call = |sink: ProgressSink| async move {
            for step in ["image", "vm"] {
                let message = format!("{step} …");
                // Nobody listens where the answer is plain JSON.
                sink.send(ProgressEvent::new(step, message)).ok();
                tokio::task::yield_now().await;
            }
            Ok::<_, ApiError>(42)
        };
        let response = long(&headers, StatusCode::CREATED, call).await;
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        let text = String::from_utf8_lossy(&body);
        let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
        assert_eq!(events, ["progress", "progress", "result"], "{text}");
        assert!(text.contains("data: 42"));
        assert_eq!(long(&HeaderMap::new(), StatusCode::CREATED, call).await.status(), StatusCode::CREATED);
    }
}
