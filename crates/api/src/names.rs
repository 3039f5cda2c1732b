//! What a name, a slug, a port, a duration and a size class may look like. Both ends ask here.

use std::time::Duration;

use crate::{ApiError, ErrorCode, sandbox::SizeClass};

/// Longest name, in bytes.
pub const MAX_NAME: usize = 63;
/// Longest time that can be waited for.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
/// Disk sizes that can be asked for, in GB.
pub const DISK_GB: std::ops::RangeInclusive<i64> = 1..=250;

/// 1 to 63 letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
pub fn check_name(name: &str) -> Result<(), ApiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let begins = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if begins && name.len() <= MAX_NAME && name.chars().all(allowed) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidName, format!("{name:?} is not a name for a sandbox"))
        .hint("use 1 to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit"))
}

/// Fewest characters of an id that may stand for all of it.
pub const SHORT_ID: usize = 8;

/// Whether `text` may be the beginning of a sandbox's id: at least eight characters of a UUID.
pub fn is_short_id(text: &str) -> bool {
    let allowed = |(at, byte): (usize, u8)| match at {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
    };
    (SHORT_ID..36).contains(&text.len()) && text.bytes().enumerate().all(allowed)
}

/// The one of `ids` that begins with `short`; an error where several do.
pub fn only_one_with(short: &str, mut ids: impl Iterator<Item = String>) -> Result<Option<String>, ApiError> {
    if !is_short_id(short) {
        return Ok(None);
    }
    let first = ids.find(|id| id.starts_with(short));
    if first.is_some() && ids.any(|id| id.starts_with(short)) {
        return Err(ApiError::new(
            ErrorCode::InvalidArgument,
            format!("several sandboxes have an id that begins with {short}"),
        )
        .hint("Give more of the id; heyvm list --all --format json shows whole ids."));
    }
    Ok(first)
}

/// A DNS label in lower case.
pub fn check_slug(slug: &str) -> Result<(), ApiError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let inner = !slug.starts_with('-') && !slug.ends_with('-');
    if !slug.is_empty() && slug.len() <= MAX_NAME && inner && slug.chars().all(allowed) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidName, format!("{slug:?} is not a slug"))
        .hint("use 1 to 63 lower-case letters, digits and '-', neither first nor last"))
}

/// The slug of a name: lower case, everything else a single `-`.
pub fn slugify(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars() {
        if c.is_ascii_alphanumeric() {
            slug.push(c.to_ascii_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_end_matches('-').to_owned()
}

/// Another slug for a name whose own is taken: cut where it would be too long, with `suffix` behind it.
pub fn another_slug(slug: &str, suffix: u16) -> String {
    let kept: String = slug.chars().take(MAX_NAME - 5).collect();
    format!("{kept}-{suffix:04x}")
}

/// 1 to 65535.
pub fn check_port(port: i64) -> Result<u16, ApiError> {
    u16::try_from(port).ok().filter(|port| *port > 0).ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidPort, format!("{port} is not a port")).hint("ports are 1 to 65535")
    })
}

/// A name of the environment.
pub fn check_env_name(name: &str) -> Result<(), ApiError> {
    if !name.is_empty() && !name.contains(['=', '\0']) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("{name:?} is not a name of an environment variable"))
        .hint("write KEY=VALUE"))
}

/// `KEY=VALUE` as two texts.
pub fn parse_env(text: &str) -> Result<(String, String), ApiError> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(ApiError::new(ErrorCode::InvalidArgument, format!("--env {text:?} has no '='"))
            .hint("write --env KEY=VALUE"));
    };
    check_env_name(name)?;
    Ok((name.to_owned(), value.to_owned()))
}

/// One of the size classes.
pub fn parse_size_class(text: &str) -> Result<SizeClass, ApiError> {
    SizeClass::ALL.into_iter().find(|class| class.as_str() == text).ok_or_else(|| {
        let all = SizeClass::ALL.map(SizeClass::as_str).join(", ");
        ApiError::new(ErrorCode::UnknownSizeClass, format!("there is no size class {text:?}"))
            .hint(format!("use one of {all}"))
    })
}

/// `30s`, `2m`, `500ms`; a plain number is seconds.
pub fn parse_duration(what: &str, text: &str) -> Result<Duration, ApiError> {
    let plain = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let duration = plain.or_else(|| humantime::parse_duration(text).ok());
    duration.filter(|duration| *duration <= LONGEST).ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, format!("{what} {text:?} is not a duration of at most 30 days"))
            .hint("write 30s, 2m or 500ms")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "my-agent", "agent_1.2", "7"] {
            check_name(good).unwrap();
        }
        for bad in ["", "-a", "a b", "a/b", "ü", &"x".repeat(64)] {
            assert_eq!(check_name(bad).unwrap_err().code, ErrorCode::InvalidName, "{bad:?}");
        }
    }

    #[test]
    fn slugs() {
        assert_eq!(slugify("My Agent_1.2-"), "my-agent-1-2");
        check_slug("my-agent").unwrap();
        assert_eq!(another_slug("my-agent", 0x2a), "my-agent-002a");
        assert_eq!(another_slug(&"x".repeat(MAX_NAME), 1).len(), MAX_NAME);
        assert!(check_slug("-a").is_err() && check_slug("A").is_err() && check_slug("").is_err());
    }

    #[test]
    fn ports_and_durations() {
        assert_eq!(check_port(70000).unwrap_err().code, ErrorCode::InvalidPort);
        assert_eq!(check_port(0).unwrap_err().code, ErrorCode::InvalidPort);
        assert_eq!(check_port(65535).unwrap(), 65535);
        assert_eq!(parse_duration("--timeout", "30").unwrap(), Duration::from_secs(30));
        assert_eq!(parse_duration("--timeout", "2m").unwrap(), Duration::from_secs(120));
        for bad in ["", "-1", "soon", "1e99", "1e19", "31days"] {
            assert!(parse_duration("--timeout", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn short_ids_are_the_beginning_of_one_uuid() {
        let ids = [
            "cbbe1029-0000-4000-8000-000000000000",
            "cbbe1029-0000-4000-8000-000000000001",
            "0a0a0a0a-0000-4000-8000-000000000000",
        ];
        let find = |short: &str| only_one_with(short, ids.iter().map(|id| (*id).to_owned()));
        assert_eq!(find("0a0a0a0a").unwrap().as_deref(), Some(ids[2]));
        assert_eq!(find("0a0a0a0a-00").unwrap().as_deref(), Some(ids[2]));
        assert_eq!(find("cbbe1029").unwrap_err().code, ErrorCode::InvalidArgument);
        for none in ["0a0a0a0", "0A0A0A0A", "0a0a0a0a0", "ffffffff", "", "web-server"] {
            assert_eq!(find(none).unwrap(), None, "{none}");
        }
    }
}
