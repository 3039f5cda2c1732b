//! Private endpoints: who comes in, and that what opens the door stays at it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use heyvm_edge::{Doorkeeper, Settings, Site, SiteBody, Verdict, Visitor};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};

use crate::{protocols::mirror, support::*};

/// Tokens are `heyo_` and the account, or `heyo_expired`.
struct Keeper;

#[async_trait]
impl Doorkeeper for Keeper {
    async fn admit(&self, credential: &str, account: &str) -> Verdict {
        match credential.strip_prefix("heyo_") {
            None | Some("expired") => Verdict::Unknown,
            Some(own) if own == account => Verdict::Welcome,
            Some(_) => Verdict::Stranger,
        }
    }

    fn is_ours(&self, credential: &str) -> bool {
        credential.starts_with("heyo_")
    }

    fn login_url(&self, return_to: &str) -> Option<String> {
        Some(format!("http://login.localhost/login?return_to={return_to}"))
    }
}

/// `app` is public, `mine` is private to the account `me`.
async fn proxy() -> Proxy {
    let app = app(mirror).await;
    let places = [("app", Place::At(app, "s1")), ("mine", Place::Private(app, "s2", "me"))];
    Proxy::with(&places, Some(Arc::new(Keeper)), None, Settings::default()).await
}

async fn ask(proxy: &Proxy, method: Method, host: &str, headers: &[(&str, &str)]) -> (StatusCode, HeaderMap, String) {
    let mut request = Request::builder().method(method).uri("/a?b=c").header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = proxy.send(request.body(empty()).unwrap()).await;
    let (status, headers) = (response.status(), response.headers().clone());
    (status, headers, text(response).await.1)
}

const PAGE: (&str, &str) = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");

#[tokio::test]
async fn who_asks_decides_the_answer() {
    let proxy = proxy().await;
    let bearer = |token: &str| format!("Bearer {token}");
    let cookie = |token: &str| format!("theme=dark; __heyo_token={token}");
    let page = || (PAGE.0, PAGE.1.to_owned());
    #[allow(clippy::type_complexity)]
    let cases: [(Method, Vec<(&str, String)>, u16); 19] = [
        (Method::GET, vec![], 401),
        (Method::GET, vec![page()], 303),
        (Method::HEAD, vec![page()], 303),
        (Method::POST, vec![page()], 401),
        (
            Method::OPTIONS,
            vec![("origin", "https://else.org".into()), ("access-control-request-method", "PUT".into())],
            401,
        ),
        (Method::GET, vec![("accept", "application/json".into())], 401),
        (Method::GET, vec![page(), ("authorization", bearer("nonsense"))], 401),
        (Method::GET, vec![page(), ("authorization", "Basic YTpi".into())], 401),
        (Method::GET, vec![("authorization", bearer("heyo_expired"))], 401),
        (Method::GET, vec![page(), ("cookie", cookie("heyo_expired"))], 401),
        (Method::GET, vec![("authorization", bearer("heyo_you"))], 403),
        (Method::GET, vec![page(), ("cookie", cookie("heyo_you"))], 403),
        (Method::GET, vec![("authorization", bearer("heyo_me"))], 200),
        (Method::GET, vec![("authorization", "bearer   heyo_me".into())], 200),
        (Method::GET, vec![page(), ("cookie", cookie("heyo_me"))], 200),
        (Method::DELETE, vec![("cookie", cookie("heyo_me"))], 200),
        // A page set a second cookie of the same name: ours is found all the same.
        (Method::GET, vec![("cookie", format!("__heyo_token=heyo_you; {}", cookie("heyo_me")))], 200),
        // Credentials that are said outright go before the cookie.
        (Method::GET, vec![("authorization", bearer("heyo_you")), ("cookie", cookie("heyo_me"))], 403),
        (Method::POST, vec![("cookie", cookie("heyo_me")), ("origin", "http://app.localhost".into())], 403),
    ];
    let mut reached = 0;
    for (method, headers, status) in cases {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let (got, answer, body) = ask(&proxy, method.clone(), "mine.localhost", &headers).await;
        assert_eq!(got, status, "{method} {headers:?}: {body}");
        reached += usize::from(status == 200);
        match status {
            200 => assert!(!body.contains("heyo") && !answer.contains_key("www-authenticate"), "{body}"),
            303 => {
                let back = "http://login.localhost/login?return_to=http://mine.localhost/a?b=c";
                assert_eq!(
                    (&answer["location"], &answer["cache-control"]),
                    (&back.parse().unwrap(), &"no-store".parse().unwrap())
                );
            }
            401 => assert!(answer["www-authenticate"].to_str().unwrap().starts_with("Bearer"), "{answer:?}"),
            _ => {}
        }
        // The app's answer has its mark.
        assert_eq!(answer.contains_key("x-app"), status == 200);
    }
    assert!(proxy.connections() <= reached, "who does not come in makes no connection");
}

#[tokio::test]
async fn a_browser_with_an_expired_cookie_is_shown_the_way_to_the_login_page() {
    let (status, _, page) =
        ask(&proxy().await, Method::GET, "mine.localhost", &[PAGE, ("cookie", "__heyo_token=heyo_expired")]).await;
    assert_eq!(status, 401);
    assert!(page.contains("<a href=\"http://login.localhost/login?return_to=http://mine.localhost/a?b=c\">"), "{page}");
}

#[tokio::test]
async fn no_credential_of_ours_reaches_a_sandbox_and_the_apps_own_do() {
    let proxy = proxy().await;
    for host in ["app.localhost", "mine.localhost"] {
        let headers = [
            ("cookie", "a=\"1 2\";b=3; __heyo_token=heyo_me;c"),
            ("cookie", "__heyo_token=heyo_me"),
            ("authorization", "Bearer heyo_me"),
        ];
        let (status, _, told) = ask(&proxy, Method::GET, host, &headers).await;
        assert_eq!(status, 200);
        assert!(told.contains("cookie: a=\"1 2\";b=3;c\n"), "{told}");
        assert!(!told.contains("heyo") && !told.contains("authorization"), "{told}");
    }
    for own in ["Bearer eyJhbGciOiJIUzI1NiJ9.e30.x", "Basic YTpi"] {
        let (_, _, told) = ask(&proxy, Method::GET, "app.localhost", &[("authorization", own)]).await;
        assert!(told.contains(&format!("authorization: {own}")), "{told}");
        let both = [("authorization", own), ("cookie", "__heyo_token=heyo_me")];
        let (status, _, told) = ask(&proxy, Method::GET, "mine.localhost", &both).await;
        assert_eq!(status, 200);
        assert!(told.contains(&format!("authorization: {own}")) && !told.contains("heyo"), "{told}");
    }
}

#[tokio::test]
async fn without_a_doorkeeper_nobody_comes_in() {
    let app = app(mirror).await;
    let proxy = Proxy::start(&[("mine", Place::Private(app, "s", "me"))], Settings::default()).await;
    for headers in [vec![], vec![PAGE], vec![("authorization", "Bearer heyo_me")]] {
        assert_eq!(ask(&proxy, Method::GET, "mine.localhost", &headers).await.0, 401);
    }
}

#[tokio::test]
async fn a_sandbox_sets_no_cookie_beyond_its_own_host() {
    let setting = app(|_| async {
        Response::builder()
            .header("set-cookie", "__heyo_token=evil; Domain=localhost; Path=/")
            .header("set-cookie", "session=1; Domain=.localhost; HttpOnly")
            .header("set-cookie", "plain=2; Path=/")
            .header("clear-site-data", "\"cookies\"")
            .body(empty())
            .unwrap()
    })
    .await;
    let proxy = Proxy::of(setting).await;
    let answer = proxy.send(get("app.localhost", "/")).await;
    let set: Vec<_> = answer.headers().get_all("set-cookie").iter().collect();
    assert_eq!(set, ["session=1; HttpOnly", "plain=2; Path=/"]);
    assert!(!answer.headers().contains_key("clear-site-data"));
}

#[tokio::test]
async fn a_websocket_opens_with_the_token_and_not_without() {
    let echo = bare(|stream| async move {
        let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() || socket.send(message).await.is_err() {
                break;
            }
        }
    })
    .await;
    let places = [("mine", Place::Private(echo, "s", "me"))];
    let proxy = Proxy::with(&places, Some(Arc::new(Keeper)), None, Settings::default()).await;
    let open = async |headers: &[(&'static str, &str)]| {
        let mut request = "ws://mine.localhost/".into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        tokio_tungstenite::client_async(request, proxy.connect().await).await
    };
    let refused = |error: tokio_tungstenite::tungstenite::Error| match error {
        tokio_tungstenite::tungstenite::Error::Http(answer) => answer.status().as_u16(),
        other => panic!("{other}"),
    };
    assert_eq!(refused(open(&[]).await.unwrap_err()), 401);
    assert_eq!(refused(open(&[("authorization", "Bearer heyo_you")]).await.unwrap_err()), 403);
    let hijacked = [("cookie", "__heyo_token=heyo_me"), ("origin", "http://app.localhost")];
    assert_eq!(refused(open(&hijacked).await.unwrap_err()), 403, "another sandbox's page");
    for headers in [
        vec![("authorization", "Bearer heyo_me")],
        vec![("cookie", "__heyo_token=heyo_me"), ("origin", "http://mine.localhost")],
    ] {
        let (mut socket, _) = open(&headers).await.unwrap();
        socket.send(Message::text("hello")).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));
    }
}

#[tokio::test]
async fn grpc_and_events_come_in_with_the_token() {
    let proxy = proxy().await;
    for (kind, spoken) in [("application/grpc", "HTTP/2.0"), ("text/event-stream", "HTTP/1.1")] {
        let call = |token: &str| {
            Request::post("http://mine.localhost/package.Service/Call")
                .header("content-type", kind)
                .header("te", "trailers")
                .header("authorization", format!("Bearer {token}"))
                .body(empty())
                .unwrap()
        };
        let mut sender = proxy.http2().await;
        for (token, status) in [("heyo_expired", 401), ("heyo_you", 403)] {
            assert_eq!(sender.send_request(call(token)).await.unwrap().status(), status);
        }
        let (status, told) = text(sender.send_request(call("heyo_me")).await.unwrap()).await;
        assert_eq!(status, 200);
        assert!(told.contains(spoken) && !told.contains("heyo"), "{told}");
    }
}

/// Says who asks.
struct Lodge;

#[async_trait]
impl Site for Lodge {
    fn has(&self, host: &str) -> bool {
        host == "login.localhost" || host == "localhost"
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<SiteBody> {
        let visitor = *request.extensions().get::<Visitor>().unwrap();
        let cookie = request.headers().get("cookie").map(|value| value.to_str().unwrap().to_owned());
        let told = format!("{} {} {}", visitor.scheme(), visitor.address, cookie.unwrap_or_default());
        Response::new(Full::new(Bytes::from(told)).map_err(|never| match never {}).boxed_unsync())
    }
}

#[tokio::test]
async fn our_own_hosts_answer_for_themselves_and_trusted_proxies_are_believed() {
    let app = app(mirror).await;
    let settings = Settings { trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()], ..Settings::default() };
    let places = [("app", Place::At(app, "s1")), ("login", Place::At(app, "s2"))];
    let proxy = Proxy::with(&places, Some(Arc::new(Keeper)), Some(Arc::new(Lodge)), settings).await;
    let headers = [
        ("cookie", "__heyo_token=heyo_me"),
        ("x-forwarded-for", "6.6.6.6, 1.2.3.4"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-port", "1"),
    ];
    for host in ["login.localhost:8480", "localhost"] {
        let (_, answer, told) = ask(&proxy, Method::GET, host, &headers).await;
        assert_eq!(told, "https 1.2.3.4 __heyo_token=heyo_me");
        assert!(answer.contains_key("strict-transport-security"));
    }
    let (_, _, told) = ask(&proxy, Method::GET, "app.localhost", &headers).await;
    for line in [
        "x-forwarded-for: 1.2.3.4\n",
        "x-forwarded-proto: https\n",
        "x-forwarded-port: 443\n",
        "forwarded: for=1.2.3.4;host=\"app.localhost\";proto=https\n",
    ] {
        assert!(told.contains(line), "{told}");
    }
    let (_, answer, _) = ask(&proxy, Method::GET, "login.localhost", &[]).await;
    assert!(!answer.contains_key("strict-transport-security"), "not over plain HTTP");
}
