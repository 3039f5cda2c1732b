//! What the start command printed.

use std::io;

use axum::response::Response;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use heyvm_api::sandbox::{LogPiece, LogsResponse, timestamp};
use heyvm_control_plane::{LogChunk, LogQuery};
use http::HeaderMap;
use serde::{Deserialize, Deserializer, de::Error};
use utoipa::IntoParams;

use crate::{
    answer::{self, ByteStream, Characters, escaped, text},
    extract::{Params, Plane, Who, accepts},
    problem::Problem,
};

/// Query of the logs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Go on until the start command ends.
    #[serde(default, deserialize_with = "flag")]
    follow: bool,
    /// Only so many last lines of what there is, both streams together; 0 with `follow` is what comes from now on.
    #[serde(default, deserialize_with = "lines_of")]
    tail: Option<u64>,
    /// Each line whole, with the time at which it began to come: RFC 3339 and a space before it, or `time` of a `LogPiece`.
    #[serde(default, deserialize_with = "flag")]
    timestamps: bool,
}

/// A number of lines.
fn lines_of<'de, D: Deserializer<'de>>(value: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(value)?;
    let lines =
        text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no number of lines, which is 0 or more")));
    lines.map(Some)
}

/// `true`, `1` or nothing at all is yes.
fn flag<'de, D: Deserializer<'de>>(value: D) -> Result<bool, D::Error> {
    match String::deserialize(value)?.as_str() {
        "" | "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        other => Err(D::Error::custom(format!("{other:?} is neither true nor false"))),
    }
}

/// What the start command printed, on both streams in the order of arrival.
///
/// JSON, unless `follow` or `Accept` ask for a stream: `application/x-ndjson` gives a `LogPiece` per line; `follow`,
/// `text/plain` and `application/octet-stream` give the bytes themselves, as they come, with `timestamps` line by line.
#[utoipa::path(get, path = "/sandboxes/{id}/logs", operation_id = "get_logs", tag = "commands",
    params(("id" = String, Path, description = "Id, name or slug"), LogsQuery),
    responses((status = 200, description = "The output", content(
        (LogsResponse = "application/json"), (LogPiece = "application/x-ndjson"), (String = "text/plain")))))]
pub async fn logs(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<LogsQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let LogsQuery { follow, tail, timestamps } = query;
    let chunks = plane.logs(&who, LogQuery { follow, tail, by_line: timestamps }).await?;
    if accepts(&headers, "application/x-ndjson") {
        return Ok(answer::bytes("application/x-ndjson", lines(chunks, timestamps)));
    }
    let raw = chunks.map_ok(move |chunk| if timestamps { stamped(&chunk) } else { chunk.data }).boxed();
    if follow || accepts(&headers, "text/plain") || accepts(&headers, "application/octet-stream") {
        return Ok(answer::bytes("text/plain; charset=utf-8", raw));
    }
    Ok(answer::json(vec![text("{\"logs\":\""), escaped(raw), text("\"}\n")]))
}

/// A line with its time before it.
fn stamped(line: &LogChunk) -> Bytes {
    let time = line.time.map(timestamp).unwrap_or_default();
    [time.as_bytes(), &line.data].concat().into()
}

/// Each chunk as a line of JSON; characters that are cut in two between chunks are put together.
fn lines(chunks: BoxStream<'static, io::Result<LogChunk>>, timestamps: bool) -> ByteStream {
    let state = Some((chunks, [Characters::default(), Characters::default()]));
    let lines = stream::try_unfold(state, move |state| async move {
        let Some((mut chunks, mut characters)) = state else { return Ok(None) };
        match chunks.next().await.transpose()? {
            Some(chunk) => {
                let whole = characters[usize::from(chunk.stderr)].whole(&chunk.data).into_owned();
                let time = chunk.time.filter(|_| timestamps);
                Ok::<_, io::Error>(Some((line(chunk.stderr, time, &whole), Some((chunks, characters)))))
            }
            None => {
                let [mut stdout, mut stderr] = characters;
                let rest = [line(false, None, &stdout.rest()), line(true, None, &stderr.rest())].concat();
                Ok(Some((Bytes::from(rest), None)))
            }
        }
    });
    lines.boxed()
}

fn line(stderr: bool, time: Option<DateTime<Utc>>, data: &[u8]) -> Bytes {
    if data.is_empty() {
        return Bytes::new();
    }
    let stream = if stderr { "stderr" } else { "stdout" };
    let piece = LogPiece { stream: stream.into(), text: String::from_utf8_lossy(data).into_owned(), time };
    let mut json = serde_json::to_vec(&piece).unwrap_or_default();
    json.push(b'\n');
    json.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pieces(chunks: Vec<io::Result<LogChunk>>, timestamps: bool) -> Vec<LogPiece> {
        let json: Vec<_> = lines(stream::iter(chunks).boxed(), timestamps).try_collect().await.unwrap();
        let text = String::from_utf8(json.concat()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn streams_are_told_apart_and_characters_kept_whole() {
        let chunk = |stderr, data: &'static [u8]| {
            Ok(LogChunk { stderr, time: Some(Utc::now()), data: Bytes::from_static(data) })
        };
        let chunks =
            vec![chunk(false, b"a\xe2\x82"), chunk(true, b"oh\n"), chunk(false, b"\xacb\xff"), chunk(true, b"\xe2")];
        let pieces = pieces(chunks, false).await;
        assert!(pieces.iter().all(|piece| piece.time.is_none()), "{pieces:?}");
        let told: Vec<_> = pieces.iter().map(|piece| (piece.stream.as_str(), piece.text.as_str())).collect();
        let expected = [("stdout", "a"), ("stderr", "oh\n"), ("stdout", "€b\u{fffd}"), ("stderr", "\u{fffd}")];
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn timestamp_stands_before_the_line_or_beside_its_text() {
        let time = DateTime::from_timestamp(1, 500_000_000);
        let line = LogChunk { stderr: false, time, data: Bytes::from_static(b"one\n") };
        assert_eq!(stamped(&line), "1970-01-01T00:00:01.500000Z one\n");
        assert_eq!(stamped(&LogChunk { time: None, ..line.clone() }), "one\n");
        let pieces = pieces(vec![Ok(line)], true).await;
        assert_eq!(pieces, [LogPiece { stream: "stdout".into(), text: "one\n".into(), time }]);
    }

    #[tokio::test]
    async fn wrong_parameters_are_named_with_a_hint() {
        let daemon = crate::trials::Daemon::start().await;
        for (query, named) in
            [("tail=-1", "tail"), ("tail=x", "tail"), ("timestamps=maybe", "timestamps"), ("last=3", "last")]
        {
            let request =
                http::Request::get(format!("/sandboxes/web/logs?{query}")).body(axum::body::Body::empty()).unwrap();
            let answer = tower::ServiceExt::oneshot(daemon.router.clone(), request).await.unwrap();
            let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
            let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let error = &error["error"];
            assert_eq!(error["code"], "invalid_argument", "{error}");
            assert!(error["message"].as_str().unwrap().contains(named) && error["hint"].is_string(), "{error}");
        }
    }
}
