//! Which interpreter a start command will want, as far as it tells.

/// What a VM in reserve may have run before it becomes a sandbox's; a sandbox that needs none of it gets one that has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rehearsal {
    /// `python3`, serving HTTP.
    Python,
    /// `node`, serving HTTP.
    Node,
}

impl Rehearsal {
    /// The first interpreter, or program that is written for one, that the command names.
    pub fn of(start_command: &str) -> Option<Self> {
        let words = start_command.split(|c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c)));
        words.filter_map(|word| Self::of_program(word.rsplit('/').next().unwrap_or(word))).next()
    }

    fn of_program(name: &str) -> Option<Self> {
        // python3, python3.12, but not a file of that beginning.
        let is_python = name
            .strip_prefix("python")
            .is_some_and(|version| version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
        match name {
            _ if is_python => Some(Self::Python),
            "uvicorn" | "gunicorn" | "flask" | "hypercorn" | "streamlit" => Some(Self::Python),
            "node" | "nodejs" | "npm" | "npx" | "yarn" | "pnpm" => Some(Self::Node),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_interpreter_counts() {
        for command in ["python3 app.py", "cd web && exec /usr/bin/python3.12 -m http.server", "PORT=1 uvicorn app:app"]
        {
            assert_eq!(Rehearsal::of(command), Some(Rehearsal::Python), "{command}");
        }
        assert_eq!(Rehearsal::of("npm run start -- --script python3"), Some(Rehearsal::Node));
        for command in ["./server", "cat python.txt", "nodes", ""] {
            assert_eq!(Rehearsal::of(command), None, "{command}");
        }
    }
}
