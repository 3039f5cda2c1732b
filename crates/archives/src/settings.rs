//! Where archives are kept, as an operator says it.

use std::{fmt, path::PathBuf, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut},
};
use serde::Deserialize;

use crate::Error;

/// A store that does not take a connection is not there.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may be silent within an answer.
const SILENCE: Duration = Duration::from_secs(30);
/// What may be repeated is repeated so often, at growing distances.
const RETRIES: usize = 4;
/// And no longer than this after its first time.
const RETRYING: Duration = Duration::from_secs(20);

/// Where archives are kept: `directory = "/path"`, or a table `s3`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settings {
    /// In this directory; it is made when it is not there.
    Directory(PathBuf),
    /// In a bucket.
    S3(S3),
}

/// A bucket of an S3-compatible store. Without keys here, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` in the
/// environment count.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    /// Its name.
    pub bucket: String,
    /// `https://host`, or `http://host:port` within a network that can be trusted; Amazon's own when absent.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Its region; `us-east-1` when absent.
    #[serde(default)]
    pub region: Option<String>,
    /// Names of objects begin with it.
    #[serde(default)]
    pub prefix: String,
    /// Whose bucket it is.
    #[serde(default)]
    pub access_key_id: Option<String>,
    /// The secret that goes with it.
    #[serde(default)]
    pub secret_access_key: Option<String>,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3")
            .field("bucket", &self.bucket)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl S3 {
    pub(crate) fn client(&self) -> Result<AmazonS3, Error> {
        // Fails when another part of the program has chosen one.
        rustls::crypto::ring::default_provider().install_default().ok();
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(&self.bucket)
            .with_region(self.region.as_deref().unwrap_or("us-east-1"))
            .with_conditional_put(S3ConditionalPut::Disabled)
            .with_retry(RetryConfig {
                backoff: BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() },
                max_retries: RETRIES,
                retry_timeout: RETRYING,
            });
        let plain = self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        builder = builder.with_client_options(
            ClientOptions::new()
                .with_allow_http(plain)
                .with_connect_timeout(CONNECT)
                .with_read_timeout(SILENCE)
                .with_timeout_disabled(),
        );
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        match (&self.access_key_id, &self.secret_access_key) {
            (Some(id), Some(secret)) => builder = builder.with_access_key_id(id).with_secret_access_key(secret),
            (None, None) => {}
            _ => return Err(Error::Settings("an access key and its secret go together".into())),
        }
        builder.build().map_err(|error| Error::Settings(crate::error::printable(&error)))
    }
}
