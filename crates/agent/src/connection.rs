//! One connection: the hello, then HTTP/2 until either end is done with it.

use std::{io, sync::Arc};

use heyvm_agent_protocol::{MAX_MESSAGE, hello, v1::agent_server::AgentServer};
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::io::{AsyncRead, AsyncWrite, BufStream};

use crate::service::Service;

/// What a virtio-serial port gives at once.
pub(crate) const READ_BUFFER: usize = 4 << 10;
/// What it takes at once.
pub(crate) const WRITE_BUFFER: usize = 32 << 10;
/// Bytes in flight towards the guest per call.
const STREAM_WINDOW: u32 = 1 << 20;
/// Holds the windows of all calls at once: input that a program does not read must not keep other calls waiting.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;
/// Bytes of one call that wait for the port.
const SEND_BUFFER: usize = 256 << 10;
/// Calls at a time.
const MAX_STREAMS: u32 = 1024;
const FRAME: u32 = 64 << 10;

/// Serves one host over `stream` until it leaves.
pub async fn serve<S>(stream: S, service: Arc<Service>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut stream = BufStream::with_capacity(READ_BUFFER, WRITE_BUFFER, stream);
    hello::answer(&mut stream).await?;
    let calls = AgentServer::from_arc(service).max_decoding_message_size(MAX_MESSAGE);
    http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        // Callers that leave in crowds are no attack: the host is trusted.
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(calls))
        .await
        .map_err(io::Error::other)
}
