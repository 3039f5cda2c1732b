//! Both places archives can be in, and archives to put there.

use std::{
    fs, io,
    net::SocketAddr,
    path::Path,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::{Stream, TryStreamExt, stream};
use heyvm_archives::{S3, Settings, Storage};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{net::TcpListener, task::JoinSet};

/// What this server's requests must be signed with.
pub const KEY: &str = "the-key-id";
pub const SECRET: &str = "the-secret-of-it";

/// An S3-compatible server that keeps its objects in a directory.
pub struct Server {
    pub root: tempfile::TempDir,
    address: SocketAddr,
    running: Mutex<JoinSet<()>>,
}

impl Server {
    /// One with an empty bucket, `heyvm`.
    pub async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("heyvm")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self { root, address: listener.local_addr().unwrap(), running: Mutex::default() };
        server.serve(listener);
        server
    }

    fn serve(&self, listener: TcpListener) {
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(self.root.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build();
        let running = async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let service = service.clone();
                connections.spawn(async move {
                    let http = Builder::new(TokioExecutor::new());
                    http.serve_connection(TokioIo::new(stream), service).await.ok();
                });
            }
        };
        self.running.lock().unwrap_or_else(PoisonError::into_inner).spawn(running);
    }

    /// Ends it, with every connection.
    pub async fn stop(&self) {
        let mut running = std::mem::take(&mut *self.running.lock().unwrap());
        running.shutdown().await;
    }

    /// Starts it again where it was.
    pub async fn start_again(&self) {
        self.serve(TcpListener::bind(self.address).await.unwrap());
    }

    pub fn settings(&self) -> S3 {
        S3 {
            bucket: "heyvm".into(),
            endpoint: Some(format!("http://{}", self.address)),
            region: None,
            prefix: "some/prefix".into(),
            access_key_id: Some(KEY.into()),
            secret_access_key: Some(SECRET.into()),
        }
    }
}

/// A storage, and the directory it ends up in.
pub struct Place {
    pub storage: Storage,
    server: Option<Server>,
    directory: tempfile::TempDir,
}

impl Place {
    /// A directory, and a bucket.
    pub async fn both() -> [Self; 2] {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings::Directory(directory.path().join("made/by/itself"));
        let server = Server::start().await;
        let bucket = Storage::open(&Settings::S3(server.settings())).await.unwrap();
        [
            Self { storage: Storage::open(&settings).await.unwrap(), server: None, directory },
            Self { storage: bucket, server: Some(server), directory: tempfile::tempdir().unwrap() },
        ]
    }

    /// Bytes of every file below, the server's own notes about its objects aside.
    pub fn bytes(&self) -> u64 {
        let server = self.server.as_ref().map(|server| server.root.path());
        below(server.unwrap_or(self.directory.path()))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.server.is_some() { "the bucket" } else { "the directory" })
    }
}

fn below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|entry| match entry.file_type().unwrap().is_dir() {
            true => below(&entry.path()),
            false if entry.file_name().to_string_lossy().ends_with(".json") => 0,
            false => entry.metadata().unwrap().len(),
        })
        .sum()
}

/// A tar.gz with one file of so many bytes that no compression makes smaller.
pub fn archive(size: usize) -> Vec<u8> {
    use rand::RngCore;
    let mut content = vec![0; size];
    rand::rng().fill_bytes(&mut content);
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "src/file", content.as_slice()).unwrap();
    builder.into_inner().unwrap().finish().unwrap()
}

/// The bytes as a body brings them.
pub fn body(bytes: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + use<> {
    let pieces: Vec<_> = bytes.chunks(40_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces)
}

/// An object's bytes.
pub async fn read(storage: &Storage, object: &str) -> Vec<u8> {
    let pieces: Vec<Bytes> = storage.read(object).await.unwrap().try_collect().await.unwrap();
    pieces.concat()
}
