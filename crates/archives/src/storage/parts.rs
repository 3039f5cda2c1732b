//! An upload to a bucket in parts, with a mark beside it: an object that holds the upload's id, so that its parts can be
//! found and removed when nobody ends the upload. (Parts are no objects: no list shows them, and they cost.)

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::{
    Error, MultipartId, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, PutResult, UploadPart,
    aws::AmazonS3,
    multipart::{MultipartStore, PartId},
    path::Path,
};

/// Directory of the marks.
pub const MARKS: &str = "uploads";

/// An upload under way.
#[derive(Debug)]
pub struct Marked {
    s3: Arc<AmazonS3>,
    object: Path,
    mark: Path,
    id: MultipartId,
    sent: usize,
    done: Arc<Mutex<Vec<(usize, PartId)>>>,
}

impl Marked {
    /// Begins an upload of `object`.
    pub async fn begin(s3: Arc<AmazonS3>, object: Path, mark: Path) -> object_store::Result<Self> {
        let id = s3.create_multipart(&object).await?;
        let said = format!("{object}\n{id}");
        if let Err(error) = s3.put(&mark, said.into_bytes().into()).await {
            if let Err(error) = s3.abort_multipart(&object, &id).await {
                tracing::warn!(error = crate::error::printable(&error), "an upload without a mark stays in the bucket");
            }
            return Err(error);
        }
        Ok(Self { s3, object, mark, id, sent: 0, done: Arc::default() })
    }

    async fn unmark(&self) {
        if let Err(error) = self.s3.delete(&self.mark).await {
            tracing::warn!(error = crate::error::printable(&error), "an upload's mark stays until the next sweep");
        }
    }
}

#[async_trait]
impl MultipartUpload for Marked {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (s3, object, id, done) =
            (Arc::clone(&self.s3), self.object.clone(), self.id.clone(), Arc::clone(&self.done));
        let index = self.sent;
        self.sent += 1;
        Box::pin(async move {
            let part = s3.put_part(&object, &id, index, data).await?;
            done.lock().unwrap_or_else(PoisonError::into_inner).push((index, part));
            Ok(())
        })
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        let mut done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        done.sort_by_key(|(index, _)| *index);
        let parts = done.into_iter().map(|(_, part)| part).collect();
        let result = self.s3.complete_multipart(&self.object, &self.id, parts).await?;
        self.unmark().await;
        Ok(result)
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.s3.abort_multipart(&self.object, &self.id).await?;
        self.unmark().await;
        Ok(())
    }
}

/// Ends the uploads whose marks are older than `age`. What cannot be ended now is tried again the next time.
pub async fn sweep(s3: &AmazonS3, marks: &Path, age: Duration) -> object_store::Result<()> {
    let before = SystemTime::now() - age;
    let marks: Vec<_> = s3.list(Some(marks)).try_collect().await?;
    for mark in marks.into_iter().filter(|mark| SystemTime::from(mark.last_modified) <= before) {
        if let Err(error) = end(s3, &mark.location).await {
            tracing::warn!(error = crate::error::printable(&error), "a broken-off upload cannot be ended");
        }
    }
    Ok(())
}

async fn end(s3: &AmazonS3, mark: &Path) -> object_store::Result<()> {
    let said = s3.get(mark).await?.bytes().await?;
    if let Some((object, id)) = String::from_utf8_lossy(&said).split_once('\n') {
        match s3.abort_multipart(&Path::parse(object)?, &id.to_owned()).await {
            // It had come to its end, and only its mark was left.
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    s3.delete(mark).await
}
