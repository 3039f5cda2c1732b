//! The bytes of archives: one object each, in a directory or a bucket, under a name that no other ever had.
//!
//! Small ones are put at once. Larger ones go in parts, and become an object only when the check agrees with the last
//! byte; whatever ends an upload before that takes its parts away. For a server that dies in between, a bucket holds a
//! mark of every upload under way, and a directory its half-written file: [`Storage::sweep`] removes both.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart, aws::AmazonS3, local::LocalFileSystem, path::Path};
use tokio::sync::Semaphore;

use crate::{Error, Limits, Settings, content::Content};

mod parts;

/// Bytes of a part: S3 takes none smaller but the last.
const PART: usize = 5 << 20;
/// Parts of one upload that may be on their way at a time.
const PARTS_UNDER_WAY: usize = 2;
/// Uploads at a time; each may hold `PART * (PARTS_UNDER_WAY + 1)` bytes.
const UPLOADS: usize = 32;
/// A sender that sends nothing for this long has gone.
const STANDSTILL: Duration = Duration::from_secs(60);
/// Directory of the objects.
const OBJECTS: &str = "archives";

/// Where the bytes are. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    backend: Backend,
    prefix: Path,
    uploads: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
enum Backend {
    Directory(Arc<PathBuf>),
    S3(Arc<AmazonS3>),
}

/// What an upload has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Name of the object.
    pub object: String,
    /// SHA-256 of its content, in hex.
    pub hash: String,
    /// Bytes.
    pub size: u64,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its name.
    pub name: String,
    /// When it came to be, by the store's clock.
    pub since: SystemTime,
}

impl Storage {
    /// Opens it, and sees whether it answers.
    pub async fn open(settings: &Settings) -> Result<Self, Error> {
        let (store, backend, prefix): (Arc<dyn ObjectStore>, _, _) = match settings {
            Settings::Directory(dir) => {
                let wanted = dir.clone();
                let made = tokio::task::spawn_blocking(move || make_private(&wanted)).await;
                made.map_err(Error::Internal)?
                    .map_err(|error| Error::Settings(format!("{} cannot be made: {error}", dir.display())))?;
                let store = LocalFileSystem::new_with_prefix(dir).map_err(Error::of_store("opened"))?;
                (Arc::new(store.with_fsync(true)), Backend::Directory(Arc::new(dir.clone())), Path::default())
            }
            Settings::S3(s3) => {
                let client = Arc::new(s3.client()?);
                (Arc::clone(&client) as _, Backend::S3(client), Path::from(s3.prefix.as_str()))
            }
        };
        let opened = Self { store, backend, prefix, uploads: Arc::new(Semaphore::new(UPLOADS)) };
        opened.store.list(Some(&opened.at(OBJECTS))).next().await.transpose().map_err(Error::of_store("listed"))?;
        Ok(opened)
    }

    /// Keeps what comes, if it is an archive within `limits`. What is broken off leaves nothing, also when the caller
    /// goes away.
    pub async fn put(
        &self,
        body: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
        limits: Limits,
    ) -> Result<Stored, Error> {
        let this = self.clone();
        tokio::spawn(async move {
            let _turn = this.uploads.acquire().await;
            let name = uuid::Uuid::new_v4().simple().to_string();
            let mut upload = Upload::Small(BytesMut::new());
            match this.receive(body, limits, &name, &mut upload).await {
                Ok((hash, size)) => {
                    this.complete(upload, &name).await?;
                    Ok(Stored { object: name, hash, size })
                }
                Err(error) => {
                    upload.take_away().await;
                    Err(error)
                }
            }
        })
        .await
        .map_err(Error::Internal)?
    }

    async fn receive(
        &self,
        mut body: impl Stream<Item = io::Result<Bytes>> + Unpin,
        limits: Limits,
        name: &str,
        upload: &mut Upload,
    ) -> Result<(String, u64), Error> {
        let mut content = Content::new(limits);
        loop {
            let next = tokio::time::timeout(STANDSTILL, body.next()).await;
            let Some(piece) = next.map_err(|_| Error::StoodStill(STANDSTILL))? else { return content.finish().await };
            let piece = piece.map_err(Error::BrokenOff)?;
            content.pass(&piece).await?;
            self.take(piece, name, upload).await.map_err(Error::of_store("kept"))?;
        }
    }

    async fn take(&self, piece: Bytes, name: &str, upload: &mut Upload) -> object_store::Result<()> {
        if let Upload::Small(bytes) = upload {
            bytes.extend_from_slice(&piece);
            if bytes.len() > PART {
                let parts = self.parts(name).await?;
                let mut parts = WriteMultipart::new_with_chunk_size(parts, PART);
                parts.put(std::mem::take(bytes).freeze());
                *upload = Upload::Large(parts);
            }
            return Ok(());
        }
        if let Upload::Large(parts) = upload {
            parts.wait_for_capacity(PARTS_UNDER_WAY).await?;
            parts.put(piece);
        }
        Ok(())
    }

    async fn complete(&self, upload: Upload, name: &str) -> Result<(), Error> {
        let done = match upload {
            Upload::Small(bytes) => self.store.put(&self.object(name), bytes.freeze().into()).await,
            // Takes the parts away itself when it fails.
            Upload::Large(parts) => parts.finish().await,
        };
        done.map(drop).map_err(Error::of_store("kept"))
    }

    /// Its bytes as they come.
    pub async fn read(&self, name: &str) -> Result<BoxStream<'static, io::Result<Bytes>>, Error> {
        let found = self.store.get(&self.object(name)).await.map_err(Error::of_object("read"))?;
        Ok(found.into_stream().map_err(io::Error::other).boxed())
    }

    /// Whether it is there.
    pub async fn exists(&self, name: &str) -> Result<bool, Error> {
        match self.store.head(&self.object(name)).await.map_err(Error::of_object("read")) {
            Ok(_) => Ok(true),
            Err(Error::Missing) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes it. Removing what is not there succeeds.
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        match self.store.delete(&self.object(name)).await.map_err(Error::of_object("removed")) {
            Err(Error::Missing) => Ok(()),
            other => other,
        }
    }

    /// Every object.
    pub fn objects(&self) -> BoxStream<'static, Result<Object, Error>> {
        let listed = self.store.list(Some(&self.at(OBJECTS)));
        let object = |found: object_store::ObjectMeta| {
            let name = found.location.filename().unwrap_or_default().to_owned();
            Object { name, since: found.last_modified.into() }
        };
        listed.map(move |found| found.map(object).map_err(Error::of_store("listed"))).boxed()
    }

    /// Removes what uploads left behind whose server died more than `age` ago.
    pub async fn sweep(&self, age: Duration) -> Result<(), Error> {
        match &self.backend {
            Backend::Directory(dir) => {
                let dir = dir.join(OBJECTS);
                let swept = tokio::task::spawn_blocking(move || remove_half_written(&dir, age)).await;
                swept.map_err(Error::Internal)
            }
            Backend::S3(s3) => parts::sweep(s3, &self.at(parts::MARKS), age).await.map_err(Error::of_store("swept")),
        }
    }

    async fn parts(&self, name: &str) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        match &self.backend {
            Backend::Directory(_) => self.store.put_multipart(&self.object(name)).await,
            Backend::S3(s3) => {
                let mark = self.at(parts::MARKS).join(name);
                Ok(Box::new(parts::Marked::begin(Arc::clone(s3), self.object(name), mark).await?))
            }
        }
    }

    fn object(&self, name: &str) -> Path {
        self.at(OBJECTS).join(name)
    }

    fn at(&self, directory: &str) -> Path {
        self.prefix.clone().join(directory)
    }
}

/// What has come of an upload.
enum Upload {
    Small(BytesMut),
    Large(WriteMultipart),
}

impl Upload {
    async fn take_away(self) {
        let Self::Large(mut parts) = self else { return };
        // A part that is still on its way could arrive after the others are gone.
        while parts.wait_for_capacity(0).await.is_err() {}
        if let Err(error) = parts.abort().await {
            tracing::warn!(error = crate::error::printable(&error), "a broken-off upload stays until the next sweep");
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn make_private(dir: &std::path::Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A file that is not whole yet has a `#` in its name, and a number behind it.
#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn remove_half_written(dir: &std::path::Path, age: Duration) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let half = entry.file_name().to_str().is_some_and(|name| name.contains('#'));
        let changed = entry.metadata().and_then(|meta| meta.modified()).ok();
        let old = changed.and_then(|time| time.elapsed().ok()).is_some_and(|elapsed| elapsed >= age);
        if half
            && old
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "half an archive cannot be removed");
        }
    }
}
