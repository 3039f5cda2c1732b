//! The login page in a real browser, in front of private endpoints behind the edge with TLS.
#![allow(clippy::disallowed_methods, reason = "a test may block its own thread")]
#![allow(clippy::unwrap_used)]

mod browser;
mod cloud;

use fantoccini::Locator;

use browser::Browser;
use cloud::{Cloud, PASSWORD};

async fn fill_in(browser: &Browser, email: &str, password: &str) {
    browser.find(Locator::Id("email")).await.unwrap().clear().await.unwrap();
    browser.find(Locator::Id("email")).await.unwrap().send_keys(email).await.unwrap();
    browser.find(Locator::Id("password")).await.unwrap().send_keys(password).await.unwrap();
    browser.find(Locator::Css("button")).await.unwrap().click().await.unwrap();
}

async fn log_out(browser: &Browser, cloud: &Cloud) {
    browser.goto(&cloud.url("login", "/logout")).await.unwrap();
    browser.find(Locator::Css("button")).await.unwrap().click().await.unwrap();
    browser.arrives_at(&cloud.url("login", "/login")).await;
}

/// The whole way, as `javascript` says with or without scripts.
async fn there_and_back(javascript: bool) {
    let cloud = Cloud::start().await;
    let browser = Browser::start(javascript).await;
    let wanted = cloud.url("mine", "/a?b=c");
    browser.goto(&wanted).await.unwrap();
    browser.arrives_at(&cloud.url("login", "/login?return_to=")).await;

    fill_in(&browser, "alice@example.org", "wrong").await;
    let alert = browser.wait().for_element(Locator::Css("[role=alert]")).await.unwrap().text().await.unwrap();
    assert!(alert.contains("wrong e-mail or password"), "{alert}");
    assert!(browser.find(Locator::Id("password")).await.unwrap().prop("value").await.unwrap().unwrap().is_empty());

    fill_in(&browser, "alice@example.org", PASSWORD).await;
    browser.arrives_at(&wanted).await;
    assert_eq!(browser.title().await.unwrap() == "scripts run", javascript);
    let page = browser.source().await.unwrap();
    assert!(page.contains("mine answers") && !page.contains("__heyo_token") && !page.contains("tok-"), "{page}");

    let cookie = browser.get_named_cookie("__heyo_token").await.unwrap();
    assert_eq!(cookie.domain().map(|domain| domain.trim_start_matches('.')), Some(cloud::BASE));
    assert_eq!((cookie.path(), cookie.http_only(), cookie.secure()), (Some("/"), Some(true), Some(true)));
    assert_eq!(cookie.same_site().map(|same| same.to_string()), Some("Lax".into()));
    let ends = cookie.expires_datetime().unwrap().unix_timestamp();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    assert!((3300..=3600).contains(&(ends - now)), "as long as the token: {}", ends - now);

    browser.goto(&cloud.url("also-mine", "/")).await.unwrap();
    assert!(browser.source().await.unwrap().contains("also-mine answers"), "a second endpoint wants no second login");
    browser.goto(&cloud.url("theirs", "/")).await.unwrap();
    assert!(browser.source().await.unwrap().contains("another account"), "another account's stays closed");

    log_out(&browser, &cloud).await;
    assert!(browser.get_named_cookie("__heyo_token").await.is_err());
    assert_eq!(cloud.ended(), 1);
    browser.goto(&wanted).await.unwrap();
    browser.arrives_at(&cloud.url("login", "/login")).await;
}

#[tokio::test]
async fn from_a_private_endpoint_to_the_login_page_and_back() {
    there_and_back(true).await;
}

#[tokio::test]
async fn the_same_without_javascript() {
    there_and_back(false).await;
}

#[tokio::test]
async fn a_login_never_leads_elsewhere() {
    let cloud = Cloud::start().await;
    let browser = Browser::start(true).await;
    for hostile in [
        "https://evil.example/",
        "//evil.example/",
        "javascript:alert(1)",
        "https://mine.heyo.localhost.evil.example/",
        "https://mine.heyo.localhost@evil.example/",
        "\"><script>document.title='owned'</script>",
    ] {
        let query: String = url::form_urlencoded::byte_serialize(hostile.as_bytes()).collect();
        browser.goto(&cloud.url("login", &format!("/login?return_to={query}"))).await.unwrap();
        assert_eq!(browser.title().await.unwrap(), "Log in");
        fill_in(&browser, "alice@example.org", PASSWORD).await;
        browser.arrives_at(&cloud.url("login", "/logout")).await;
        log_out(&browser, &cloud).await;
    }
}

/// What a page of a sandbox can do with its visitor's browser.
#[tokio::test]
async fn a_hostile_sandbox_neither_reads_nor_replaces_nor_uses_the_token() {
    let cloud = Cloud::start().await;
    let browser = Browser::start(true).await;
    browser.goto(&cloud.url("login", "/login")).await.unwrap();
    fill_in(&browser, "alice@example.org", PASSWORD).await;
    browser.arrives_at(&cloud.url("login", "/logout")).await;

    browser.goto(&cloud.url("evil", "/")).await.unwrap();
    let page = browser.source().await.unwrap();
    assert!(page.contains("evil answers") && !page.contains("tok-"), "{page}");
    let seen = browser.execute("return document.cookie", vec![]).await.unwrap();
    assert!(seen.as_str().unwrap().contains("own=1") && !seen.as_str().unwrap().contains("heyo_token=tok"), "{seen}");
    let toss = "document.cookie = '__heyo_token=tok-mallory; domain=heyo.localhost; path=/; secure'; \
                document.cookie = '__heyo_token=tok-mallory; domain=heyo.localhost; path=/deep; secure';";
    browser.execute(toss, vec![]).await.unwrap();
    for path in ["/", "/deep/er"] {
        browser.goto(&cloud.url("mine", path)).await.unwrap();
        let page = browser.source().await.unwrap();
        assert!(page.contains("mine answers") && !page.contains("tok-"), "{path}: {page}");
        assert!(!page.contains("tossed"), "no cookie of another sandbox: {page}");
    }

    browser.goto(&cloud.url("evil", "/")).await.unwrap();
    let before = cloud.posted();
    let forge = format!(
        "const done = arguments[0]; fetch('{}', {{method: 'POST', mode: 'no-cors', credentials: 'include', body: 'x'}})
           .then(() => done('sent'), error => done(String(error)))",
        cloud.url("mine", "/forged")
    );
    assert_eq!(browser.execute_async(&forge, vec![]).await.unwrap(), "sent");
    assert_eq!(cloud.posted(), before, "what one sandbox's page sends with the visitor's cookie reaches no other");
    let own = "const done = arguments[0]; fetch('/own', {method: 'POST', body: 'x'}).then(() => done('sent'))";
    browser.execute_async(own, vec![]).await.unwrap();
    assert_eq!(cloud.posted(), before + 1);
    browser.goto(&cloud.url("mine", "/")).await.unwrap();
    browser.execute_async(own, vec![]).await.unwrap();
    assert_eq!(cloud.posted(), before + 2, "a private app's own page may");

    // A form that posts to the login page, or logs out, from elsewhere.
    browser.goto(&cloud.url("evil", "/")).await.unwrap();
    for path in ["/login", "/logout"] {
        let forge = format!(
            "const done = arguments[0]; fetch('{}', {{method: 'POST', mode: 'no-cors', credentials: 'include', \
             body: new URLSearchParams({{email: 'mallory@example.org', password: '{PASSWORD}', csrf: '0'.repeat(32)}})}})
               .then(() => done('sent'), error => done(String(error)))",
            cloud.url("login", path)
        );
        browser.execute_async(&forge, vec![]).await.unwrap();
    }
    assert_eq!(cloud.ended(), 0, "nobody was logged out");
    browser.goto(&cloud.url("mine", "/")).await.unwrap();
    assert!(browser.source().await.unwrap().contains("mine answers"), "still alice");
}

#[tokio::test]
async fn the_pages_answers_are_guarded_and_its_forms_are_not_taken_from_elsewhere() {
    let cloud = Cloud::start().await;
    let page = cloud.send("GET", "login", "/login?return_to=https%3A%2F%2Fmine.heyo.localhost%2F", &[], "").await;
    for header in [
        "content-security-policy: default-src 'none'; style-src 'self';",
        "x-frame-options: DENY",
        "referrer-policy: same-origin",
        "cache-control: no-store",
        "x-content-type-options: nosniff",
        "strict-transport-security: ",
    ] {
        assert!(page.contains(header), "{header}: {page}");
    }
    assert!(!page.contains("<script") && !page.contains("unsafe"), "{page}");
    let csrf = page.split("__Host-heyo_csrf=").nth(1).unwrap()[..32].to_owned();
    assert!(page.contains(&format!("name=\"csrf\" value=\"{csrf}\"")), "{page}");

    let form = format!(
        "csrf={csrf}&email=alice%40example.org&password={PASSWORD}&return_to=https%3A%2F%2Fmine.heyo.localhost%2Fx"
    );
    let cookie = format!("__Host-heyo_csrf={csrf}");
    let own = cloud.origin("login");
    let post = async |headers: &[(&str, &str)], form: &str| cloud.send("POST", "login", "/login", headers, form).await;
    let good = post(&[("cookie", &cookie), ("origin", &own)], &form).await;
    assert!(good.starts_with("HTTP/1.1 303") && good.contains("location: https://mine.heyo.localhost/x"), "{good}");
    let foreign = cloud.origin("evil");
    let cases: [(&str, Vec<(&str, &str)>); 5] = [
        ("no cookie", vec![("origin", own.as_str())]),
        ("another origin", vec![("cookie", cookie.as_str()), ("origin", foreign.as_str())]),
        ("no origin to tell", vec![("cookie", cookie.as_str()), ("origin", "null")]),
        ("another site's fetch", vec![("cookie", cookie.as_str()), ("sec-fetch-site", "same-site")]),
        ("a cookie without the prefix", vec![("cookie", cookie.trim_start_matches("__Host-"))]),
    ];
    for (why, headers) in cases {
        let refused = post(&headers, &form).await;
        assert!(refused.starts_with("HTTP/1.1 403") && !refused.contains("__heyo_token="), "{why}: {refused}");
    }
    let many = post(&[("cookie", &cookie)], &form.replace("alice", "busy")).await;
    assert!(
        many.starts_with("HTTP/1.1 403") && many.contains("too many"),
        "the accounts' own refusal is shown: {many}"
    );
    let large = post(&[("cookie", &cookie)], &format!("{form}&x={}", "x".repeat(20 << 10))).await;
    assert!(large.starts_with("HTTP/1.1 413"), "{large}");
    let escaped = post(&[("cookie", &cookie)], &form.replace("alice", "%3Cb%3E%22")).await;
    assert!(escaped.contains("&#60;b&#62;&#34;@example.org"), "{escaped}");
}
