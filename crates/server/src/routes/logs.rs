//! What the start command printed.

use std::io;

use axum::response::Response;
use bytes::Bytes;
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use heyvm_api::sandbox::{LogPiece, LogsResponse};
use heyvm_control_plane::LogChunk;
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
/// `text/plain` and `application/octet-stream` give the bytes themselves, as they come.
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
    let chunks = plane.logs(&who, query.follow).await?;
    if accepts(&headers, "application/x-ndjson") {
        return Ok(answer::bytes("application/x-ndjson", lines(chunks)));
    }
    let raw = chunks.map_ok(|chunk| chunk.data).boxed();
    if query.follow || accepts(&headers, "text/plain") || accepts(&headers, "application/octet-stream") {
        return Ok(answer::bytes("text/plain; charset=utf-8", raw));
    }
    Ok(answer::json(vec![text("{\"logs\":\""), escaped(raw), text("\"}\n")]))
}

/// Each chunk as a line of JSON; characters that are cut in two between chunks are put together.
fn lines(chunks: BoxStream<'static, io::Result<LogChunk>>) -> ByteStream {
    let state = Some((chunks, [Characters::default(), Characters::default()]));
    let lines = stream::try_unfold(state, |state| async move {
        let Some((mut chunks, mut characters)) = state else { return Ok(None) };
        match chunks.next().await.transpose()? {
            Some(chunk) => {
                let whole = characters[usize::from(chunk.stderr)].whole(&chunk.data).into_owned();
                Ok::<_, io::Error>(Some((line(chunk.stderr, &whole), Some((chunks, characters)))))
            }
            None => {
                let [mut stdout, mut stderr] = characters;
                let rest = [line(false, &stdout.rest()), line(true, &stderr.rest())].concat();
                Ok(Some((Bytes::from(rest), None)))
            }
        }
    });
    lines.boxed()
}

fn line(stderr: bool, data: &[u8]) -> Bytes {
    if data.is_empty() {
        return Bytes::new();
    }
    let stream = if stderr { "stderr" } else { "stdout" };
    let piece = LogPiece { stream: stream.into(), text: String::from_utf8_lossy(data).into_owned() };
    let mut json = serde_json::to_vec(&piece).unwrap_or_default();
    json.push(b'\n');
    json.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn streams_are_told_apart_and_characters_kept_whole() {
        let chunk = |stderr, data: &'static [u8]| Ok(LogChunk { stderr, data: Bytes::from_static(data) });
        let chunks =
            vec![chunk(false, b"a\xe2\x82"), chunk(true, b"oh\n"), chunk(false, b"\xacb\xff"), chunk(true, b"\xe2")];
        let json = lines(stream::iter(chunks).boxed());
        let all = json.try_fold(Vec::new(), async |mut all, piece| {
            all.extend_from_slice(&piece);
            Ok(all)
        });
        let text = String::from_utf8(all.await.unwrap()).unwrap();
        let pieces: Vec<LogPiece> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let told: Vec<_> = pieces.iter().map(|piece| (piece.stream.as_str(), piece.text.as_str())).collect();
        let expected = [("stdout", "a"), ("stderr", "oh\n"), ("stdout", "€b\u{fffd}"), ("stderr", "\u{fffd}")];
        assert_eq!(told, expected);
    }
}
