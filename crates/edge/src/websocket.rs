//! WebSocket over HTTP/2 (RFC 8441), translated to HTTP/1.1's upgrade, which is what apps in sandboxes know.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{
    HeaderMap, HeaderValue, Method, Request, Version,
    header::{SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY},
};
use hyper::ext::Protocol;

/// What an extended CONNECT asks for; `None` for every other request.
pub fn asked<B>(request: &Request<B>) -> Option<&str> {
    let extended = request.version() == Version::HTTP_2 && request.method() == Method::CONNECT;
    request.extensions().get::<Protocol>().filter(|_| extended).map(Protocol::as_str)
}

/// Makes the head of an extended CONNECT that of an upgrade, whose protocol it gives.
pub fn to_upgrade(head: &mut http::request::Parts) -> HeaderValue {
    head.method = Method::GET;
    let key = STANDARD.encode(rand::random::<[u8; 16]>());
    if let Ok(key) = HeaderValue::from_str(&key) {
        head.headers.insert(SEC_WEBSOCKET_KEY, key);
    }
    HeaderValue::from_static("websocket")
}

/// Makes the answer to an upgrade that to an extended CONNECT: success is 200, and nothing proves that a key was read.
pub fn to_connected(headers: &mut HeaderMap) {
    headers.remove(SEC_WEBSOCKET_ACCEPT);
    headers.remove(http::header::CONNECTION);
    headers.remove(http::header::UPGRADE);
    headers.remove(http::header::CONTENT_LENGTH);
}
