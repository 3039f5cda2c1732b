//! Where a program may be: the PATH of the environment it is given.

use std::ffi::CString;

/// Searched where the environment has no PATH.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A PATH of more directories is cut.
const MAX_DIRECTORIES: usize = 256;

/// Files to try for `name`, in order; none when the name holds a zero byte or is empty.
pub fn candidates(name: &str, path: &str) -> Vec<CString> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.contains('/') {
        return CString::new(name).into_iter().collect();
    }
    // An empty element means the current directory.
    let directories = path.split(':').map(|dir| if dir.is_empty() { "." } else { dir });
    directories.take(MAX_DIRECTORIES).filter_map(|dir| CString::new(format!("{dir}/{name}")).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, path: &str) -> Vec<String> {
        candidates(name, path).into_iter().map(|c| c.into_string().unwrap()).collect()
    }

    #[test]
    fn a_plain_name_is_looked_for_in_every_directory() {
        assert_eq!(texts("ls", "/usr/bin:/bin"), ["/usr/bin/ls", "/bin/ls"]);
        assert_eq!(texts("ls", "/usr/bin::x"), ["/usr/bin/ls", "./ls", "x/ls"]);
    }

    #[test]
    fn a_name_with_a_slash_is_a_path() {
        assert_eq!(texts("./run.sh", "/bin"), ["./run.sh"]);
        assert_eq!(texts("/opt/x", "/bin"), ["/opt/x"]);
    }

    #[test]
    fn impossible_names_are_nowhere() {
        assert!(candidates("", "/bin").is_empty());
        assert!(candidates("a\0b", "/bin").is_empty());
    }
}
