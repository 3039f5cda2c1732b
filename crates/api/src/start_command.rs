//! What a sandbox is there for: a script, or a program and its arguments.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A start command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a script (a string), or a program and its arguments (an array of strings)")]
pub enum StartCommand {
    /// A script for `sh -c`.
    Script(String),
    /// A program, looked up in PATH, and its arguments: no shell is needed.
    Words(Vec<String>),
}

impl StartCommand {
    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Script(script) => script.trim().is_empty(),
            Self::Words(words) => words.first().is_none_or(|program| program.is_empty()),
        }
    }

    /// The script, or the program and its arguments.
    pub fn into_words(self) -> Vec<String> {
        match self {
            Self::Script(script) => vec![script],
            Self::Words(words) => words,
        }
    }

    /// Bytes of all its words.
    pub fn size(&self) -> usize {
        match self {
            Self::Script(script) => script.len(),
            Self::Words(words) => words.iter().map(|word| word.len() + 1).sum(),
        }
    }

    /// Whether it is a script for a shell.
    pub fn is_script(&self) -> bool {
        matches!(self, Self::Script(_))
    }
}

impl From<String> for StartCommand {
    fn from(script: String) -> Self {
        Self::Script(script)
    }
}

impl From<&str> for StartCommand {
    fn from(script: &str) -> Self {
        Self::Script(script.into())
    }
}

/// As it would be typed into a shell.
impl fmt::Display for StartCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::Script(script) => return f.write_str(script),
            Self::Words(words) => words,
        };
        for (index, word) in words.iter().enumerate() {
            let space = if index > 0 { " " } else { "" };
            let is_plain = !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "_-+./:,@%=".contains(c));
            if is_plain {
                write!(f, "{space}{word}")?;
            } else {
                write!(f, "{space}'{}'", word.replace('\'', r"'\''"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn string_is_a_script_and_array_is_words() {
        let parse = |json: &str| serde_json::from_str::<StartCommand>(json);
        let words = parse(r#"["/server", "-m", "it's on"]"#).unwrap();
        assert_eq!(words.to_string(), r"/server -m 'it'\''s on'");
        assert_eq!(serde_json::to_string(&words).unwrap(), r#"["/server","-m","it's on"]"#);
        let script = parse(r#""a | b""#).unwrap();
        assert!(script.is_script() && script.to_string() == "a | b");
        assert_eq!(serde_json::to_string(&script).unwrap(), r#""a | b""#);
        let refused = parse("5").unwrap_err().to_string();
        assert!(refused.contains("array of strings"), "{refused}");
        for empty in [r#""""#, "[]", r#"["", "a"]"#] {
            assert!(parse(empty).unwrap().is_empty(), "{empty}");
        }
    }
}
