//! Lists page by page: a JSON array of what fits, and headers that say where to go on.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use heyvm_api::{headers, limits};
use http::{HeaderValue, header};
use serde::Serialize;

use crate::problem::Problem;

/// A page ends behind the entry that reaches this size, so that every client can read every page.
const PAGE_BYTES: usize = 8 << 20;

/// How many entries are asked for: at least one, and no more than a page holds.
pub fn page_size(asked: Option<usize>) -> Result<usize, Problem> {
    match asked {
        None => Ok(limits::PAGE.most),
        Some(0) => Err(Problem::invalid("a limit of 0 lists nothing", "use 1 to 500, or leave it out")),
        Some(asked) => {
            limits::PAGE.check(asked)?;
            Ok(asked)
        }
    }
}

/// A page of at most `size` of `entries`, which come with their cursors. `revision` goes with the last page.
pub fn page<T: Serialize>(
    entries: impl IntoIterator<Item = (String, T)>,
    size: usize,
    revision: Option<String>,
) -> Result<Response, Problem> {
    let mut body = vec![b'['];
    let (mut count, mut last, mut is_cut) = (0, None, false);
    for (cursor, entry) in entries {
        if count >= size || body.len() >= PAGE_BYTES {
            is_cut = true;
            break;
        }
        if count > 0 {
            body.push(b',');
        }
        serde_json::to_writer(&mut body, &entry).map_err(|error| {
            heyvm_api::ApiError::new(heyvm_api::ErrorCode::Internal, format!("could not write the list: {error}"))
        })?;
        (count, last) = (count + 1, Some(cursor));
    }
    body.push(b']');
    let mut response = Body::from(body).into_response();
    let head = response.headers_mut();
    head.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let (name, value) = if is_cut { (headers::NEXT_CURSOR, last) } else { (headers::REVISION, revision) };
    if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
        head.insert(name, value);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(response: Response) -> (Option<String>, Option<String>, Vec<String>) {
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let (next, revision) = (header(headers::NEXT_CURSOR), header(headers::REVISION));
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (next, revision, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn a_page_ends_at_its_size_and_says_where_to_go_on() {
        let entries = |count: usize, bytes: usize| (0..count).map(move |n| (n.to_string(), "x".repeat(bytes)));
        let all = read(page(entries(3, 1), 3, Some("r".into())).unwrap()).await;
        assert_eq!((all.0, all.1, all.2.len()), (None, Some("r".into()), 3));
        let cut = read(page(entries(4, 1), 3, Some("r".into())).unwrap()).await;
        assert_eq!((cut.0, cut.1, cut.2.len()), (Some("2".into()), None, 3));
        let none = read(page(entries(0, 0), 3, None).unwrap()).await;
        assert_eq!((none.0, none.2.len()), (None, 0));
        // However large entries are, a page has one at least.
        let large = read(page(entries(3, PAGE_BYTES), 500, None).unwrap()).await;
        assert_eq!((large.0, large.2.len()), (Some("0".into()), 1));
        assert!(page_size(Some(0)).is_err() && page_size(Some(501)).is_err());
        assert_eq!((page_size(None).unwrap(), page_size(Some(1)).unwrap()), (500, 1));
    }
}
