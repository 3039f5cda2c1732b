//! What names and links in an archive may be.

use std::path::{Component, Path, PathBuf};

/// As long as a path may be for the kernel.
const PATH_MAX: usize = 4096;

/// The name without `.`; `None` for one that is absolute, has `..` in it, or is longer than the kernel takes.
pub fn inside(name: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (name.as_os_str().len() < PATH_MAX).then_some(plain)
}

/// Whether a path is relative and never above where it begins.
pub fn stays_inside(path: &Path) -> bool {
    let mut depth = 0_usize;
    path.components().all(|part| match part {
        Component::Normal(_) => {
            depth += 1;
            true
        }
        Component::CurDir => true,
        Component::ParentDir => depth.checked_sub(1).map(|less| depth = less).is_some(),
        Component::RootDir | Component::Prefix(_) => false,
    })
}

/// Whether a symbolic link at `name` leads below the top, whatever other links are there: up no further than to the top,
/// then only down. A `..` behind a name depends on what that name is.
pub fn leads_inside(name: &Path, target: &Path) -> bool {
    let mut up = 0;
    let mut parts = target.components().filter(|part| *part != Component::CurDir).peekable();
    while parts.next_if_eq(&Component::ParentDir).is_some() {
        up += 1;
    }
    up < name.components().count() && parts.all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below() {
        for (name, plain) in [("a/./b/", Some("a/b")), ("./", Some("")), ("", Some("")), ("a/../b", None), ("/a", None)]
        {
            assert_eq!(inside(Path::new(name)).as_deref(), plain.map(Path::new), "{name}");
        }
        assert_eq!(inside(Path::new(&"a/".repeat(3000))), None);
    }

    #[test]
    fn links_are_judged_from_where_they_stand() {
        for (path, good) in [
            ("a", true),
            ("a/../b", true),
            ("a/b/../../c", true),
            ("..", false),
            ("a/../..", false),
            ("a/../../a/b", false),
            ("/etc/passwd", false),
        ] {
            assert_eq!(stays_inside(Path::new(path)), good, "{path}");
        }
        for (name, target, good) in [
            ("a", "b", true),
            ("a", "..", false),
            ("a/up", "../b", true),
            ("a/up", "../../b", false),
            ("a/b", "c/../../..", false),
            ("a", "/etc", false),
        ] {
            assert_eq!(leads_inside(Path::new(name), Path::new(target)), good, "{name} -> {target}");
        }
    }
}
