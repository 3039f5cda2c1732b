//! Files in a sandbox.

use std::{collections::VecDeque, io};

use axum::{Json, body::Body, response::Response};
use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use heyvm_agent_protocol::{
    CHUNK,
    v1::{
        FileChunk, ListDirRequest, PackRequest, ReadFileRequest, RemoveRequest, StatRequest, UnpackInput,
        WriteFileInput,
    },
};
use heyvm_api::files::{
    DownloadResponse, FileEntry, FileQuery, ListFilesResponse, UnpackResponse, UploadRequest, UploadResponse,
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use utoipa::IntoParams;

use super::Binary;
use crate::{
    answer::{self, ByteStream, base64 as encoded, text},
    extract::{ContentWithFile, Params, Plane, Who, accepts},
    problem::Problem,
};

const DEFAULT_DIRECTORY: &str = "/workspace";
/// What an upload may unpack to: more than any disk there is.
const MAX_UNPACKED: u64 = 256 << 30;
const MAX_ENTRIES: u64 = 10_000_000;
/// With or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a directory holds.
#[utoipa::path(get, path = "/sandboxes/{id}/files", operation_id = "list_files", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug"), FileQuery),
    responses((status = 200, description = "Sorted by name", body = ListFilesResponse)))]
pub async fn list(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<FileQuery>,
) -> Result<Json<ListFilesResponse>, Problem> {
    let path = below(query.mount_path.as_deref(), query.file_path.as_deref().unwrap_or("."))?;
    let mut client = plane.agent(&who).await?.client().await?;
    let reply = client.list_dir(ListDirRequest { path: path.clone() }).await?.into_inner();
    let mut entries: Vec<FileEntry> = reply
        .entries
        .into_iter()
        .map(|entry| FileEntry {
            name: entry.name,
            kind: entry.kind,
            size: entry.size,
            mode: entry.mode,
            modified: entry.mtime,
            target: Some(entry.target).filter(|target| !target.is_empty()),
        })
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(ListFilesResponse { path, entries, truncated: reply.truncated }))
}

/// One file: JSON with its content in Base64, or the bytes themselves where `application/octet-stream` is accepted.
#[utoipa::path(get, path = "/sandboxes/{id}/files/download", operation_id = "download_file", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug"), FileQuery),
    responses((status = 200, description = "The file", content(
        (DownloadResponse = "application/json"), (inline(Binary) = "application/octet-stream")))))]
pub async fn download(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<FileQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let path = below(query.mount_path.as_deref(), &file_path(query.file_path)?)?;
    let mut client = plane.agent(&who).await?.client().await?;
    let content = chunks(client.read_file(ReadFileRequest { path: path.clone() }).await?.into_inner()).await?;
    if accepts(&headers, "application/octet-stream") {
        return Ok(answer::bytes("application/octet-stream", content));
    }
    let quoted = serde_json::to_string(&path).unwrap_or_default();
    let (counted, size) = counted(content);
    let end = stream::once(async move {
        // By the time this is asked for, all of the content has gone by.
        Ok(Bytes::from(format!("\",\"size\":{}}}\n", size.load(std::sync::atomic::Ordering::Relaxed))))
    });
    let begin = text(format!("{{\"path\":{quoted},\"content\":\""));
    Ok(answer::json(vec![begin, encoded(counted), end.boxed()]))
}

/// Writes one file, whole or not at all; directories on the way are made.
#[utoipa::path(post, path = "/sandboxes/{id}/files/upload", operation_id = "upload_file", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = UploadRequest,
    responses((status = 201, description = "Written", body = UploadResponse)))]
pub async fn upload(
    Plane(plane): Plane,
    Who(who): Who,
    ContentWithFile { 0: request }: ContentWithFile<UploadRequest>,
) -> Result<(StatusCode, Json<UploadResponse>), Problem> {
    let path = below(request.mount_path.as_deref(), &file_path(Some(request.file_path))?)?;
    let content = BASE64.decode(request.content).map_err(|error| {
        Problem::invalid(format!("content is not Base64: {error}"), "encode the file's bytes in Base64")
    })?;
    let mut client = plane.agent(&who).await?.client().await?;
    let first = WriteFileInput { path: path.clone(), create_parents: true, ..WriteFileInput::default() };
    let content = Bytes::from(content);
    let pieces = (0..content.len().div_ceil(CHUNK)).map(move |number| {
        let piece = &content[number * CHUNK..content.len().min((number + 1) * CHUNK)];
        WriteFileInput { data: piece.to_vec(), ..WriteFileInput::default() }
    });
    let reply = client.write_file(stream::iter(std::iter::once(first).chain(pieces))).await?.into_inner();
    Ok((StatusCode::CREATED, Json(UploadResponse { status: "created".into(), path, size: reply.size })))
}

/// Removes a file, or a directory with all it holds.
#[utoipa::path(delete, path = "/sandboxes/{id}/files", operation_id = "remove_file", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug"), FileQuery),
    responses((status = 204, description = "Gone")))]
pub async fn remove(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<FileQuery>,
) -> Result<StatusCode, Problem> {
    let mount = below(query.mount_path.as_deref(), ".")?;
    let path = below(query.mount_path.as_deref(), &file_path(query.file_path)?)?;
    if path == mount {
        return Err(Problem::invalid("file_path names the directory itself", "name something below mount_path"));
    }
    let mut client = plane.agent(&who).await?.client().await?;
    // Removing what is not there would succeed otherwise.
    client.stat(StatRequest { path: path.clone() }).await?;
    client.remove(RemoveRequest { path, recursive: true }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Query of tar streams.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct TarQuery {
    /// Absolute, or below `/workspace`.
    path: String,
}

/// A file or directory as an uncompressed tar stream.
#[utoipa::path(get, path = "/sandboxes/{id}/files/tar", operation_id = "pack_files", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug"), TarQuery),
    responses((status = 200, description = "The tar", body = inline(Binary), content_type = "application/x-tar")))]
pub async fn pack(Plane(plane): Plane, Who(who): Who, Params(query): Params<TarQuery>) -> Result<Response, Problem> {
    let path = anywhere(&query.path)?;
    let mut client = plane.agent(&who).await?.client().await?;
    let packed = chunks(client.pack(PackRequest { path }).await?.into_inner()).await?;
    Ok(answer::bytes("application/x-tar", packed))
}

/// Unpacks an uncompressed tar stream of any size below a directory, which is made when missing.
#[utoipa::path(put, path = "/sandboxes/{id}/files/tar", operation_id = "unpack_files", tag = "files",
    params(("id" = String, Path, description = "Id, name or slug"), TarQuery),
    request_body(content = inline(Binary), content_type = "application/x-tar", description = "An uncompressed tar"),
    responses((status = 200, description = "Unpacked", body = UnpackResponse)))]
pub async fn unpack(
    Plane(plane): Plane,
    Who(who): Who,
    Params(query): Params<TarQuery>,
    body: Body,
) -> Result<Json<UnpackResponse>, Problem> {
    let path = anywhere(&query.path)?;
    let mut client = plane.agent(&who).await?.client().await?;
    let (sender, receiver) = mpsc::channel(2);
    let first = UnpackInput { path, max_bytes: MAX_UNPACKED, max_entries: MAX_ENTRIES, ..UnpackInput::default() };
    let feeding = async {
        let mut pieces = body.into_data_stream();
        let mut next = first;
        loop {
            // A failure of the agent shows in its reply.
            if sender.send(next).await.is_err() {
                break;
            }
            let Some(piece) = pieces.next().await else { break };
            let data =
                piece.map_err(|error| Problem::invalid(format!("the upload broke off: {error}"), "send it again"))?;
            next = UnpackInput { data: data.into(), ..UnpackInput::default() };
        }
        drop(sender);
        std::future::pending::<()>().await;
        Ok::<(), Problem>(())
    };
    let reply = tokio::select! {
        reply = client.unpack(ReceiverStream::new(receiver)) => reply?.into_inner(),
        Err(broken_off) = feeding => return Err(broken_off),
    };
    Ok(Json(UnpackResponse { bytes: reply.bytes, entries: reply.entries }))
}

/// The agent's chunks as bytes. An error before the first one is the call's own.
async fn chunks(mut stream: Streaming<FileChunk>) -> Result<ByteStream, Problem> {
    let first = stream.message().await?;
    let first = stream::iter(first.map(|chunk| Ok(Bytes::from(chunk.data))));
    let rest = stream.map(|chunk| chunk.map(|chunk| Bytes::from(chunk.data)).map_err(io::Error::other));
    Ok(first.chain(rest).boxed())
}

/// A stream that counts its bytes.
fn counted(stream: ByteStream) -> (ByteStream, std::sync::Arc<std::sync::atomic::AtomicU64>) {
    let size = std::sync::Arc::<std::sync::atomic::AtomicU64>::default();
    let count = std::sync::Arc::clone(&size);
    let stream = stream.inspect_ok(move |piece| {
        count.fetch_add(piece.len() as u64, std::sync::atomic::Ordering::Relaxed);
    });
    (stream.boxed(), size)
}

fn file_path(path: Option<String>) -> Result<String, Problem> {
    path.filter(|path| !path.is_empty()).ok_or_else(|| Problem::invalid("file_path is missing", "name the file"))
}

/// An absolute path, or one below the default directory.
fn anywhere(path: &str) -> Result<String, Problem> {
    if path.is_empty() {
        return Err(Problem::invalid("path is empty", "name a file or directory in the sandbox"));
    }
    let absolute = if path.starts_with('/') { path.to_owned() } else { format!("{DEFAULT_DIRECTORY}/{path}") };
    resolved(&absolute).map(|parts| join(&parts)).ok_or_else(|| leaves(path, "/"))
}

/// The path of a file below a directory, which it may not leave.
fn below(mount: Option<&str>, file: &str) -> Result<String, Problem> {
    let mount = mount.filter(|mount| !mount.is_empty()).unwrap_or(DEFAULT_DIRECTORY);
    let directory = resolved(mount).filter(|_| mount.starts_with('/')).ok_or_else(|| {
        Problem::invalid(format!("mount_path {mount:?} is not an absolute path"), "use a path like /workspace")
    })?;
    let path = if file.starts_with('/') { file.to_owned() } else { format!("{mount}/{file}") };
    let parts = resolved(&path).filter(|parts| {
        let (parts, directory) = (parts.iter(), directory.iter());
        directory.len() <= parts.len() && parts.zip(directory).all(|(a, b)| a == b)
    });
    parts.map(|parts| join(&parts)).ok_or_else(|| leaves(file, mount))
}

fn leaves(path: &str, directory: &str) -> Problem {
    Problem::invalid(
        format!("{path:?} is not a path below {directory}"),
        "leave \"..\" out, or name another mount_path",
    )
}

/// The components of an absolute path without `.` and `..`; `None` when it goes above the root or holds a zero byte.
fn resolved(path: &str) -> Option<VecDeque<&str>> {
    let mut parts = VecDeque::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop_back()?),
            part if part.contains('\0') => return None,
            part => parts.push_back(part),
        }
    }
    Some(parts)
}

fn join(parts: &VecDeque<&str>) -> String {
    parts.iter().fold(String::new(), |path, part| path + "/" + part) + if parts.is_empty() { "/" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_their_directory() {
        let good = [
            (None, "script.py", "/workspace/script.py"),
            (None, "./a//b/../c", "/workspace/a/c"),
            (None, "/workspace/x", "/workspace/x"),
            (None, ".", "/workspace"),
            (Some("/srv/app/"), "a", "/srv/app/a"),
            (Some("/"), "etc/hosts", "/etc/hosts"),
            (Some("/"), ".", "/"),
        ];
        for (mount, file, path) in good {
            assert_eq!(below(mount, file).unwrap(), path);
        }
        let bad = [
            (None, "../etc/passwd"),
            (None, "a/../../etc/passwd"),
            (None, "/etc/passwd"),
            (None, "/workspacex/a"),
            (None, "../../../.."),
            (None, "a\0b"),
            (Some("relative"), "a"),
            (Some("/srv/../.."), "a"),
        ];
        for (mount, file) in bad {
            assert!(below(mount, file).is_err(), "{mount:?} {file:?}");
        }
        assert_eq!(anywhere("x/y").unwrap(), "/workspace/x/y");
        assert_eq!(anywhere("/tmp/../etc").unwrap(), "/etc");
        assert!(anywhere("/..").is_err() && anywhere("").is_err());
    }
}
