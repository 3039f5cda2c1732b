//! SPECIFICATION.md names tests that are there, and numbers that are each one's own.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

fn sources(directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.extension() {
            _ if path.is_dir() => sources(&path, found)?,
            Some(extension) if extension == "rs" => found.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// Names of all functions below crates/.
fn functions(project: &Path) -> io::Result<HashSet<String>> {
    let mut paths = Vec::new();
    sources(&project.join("crates"), &mut paths)?;
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let mut functions = HashSet::new();
    for path in paths {
        let text = fs::read_to_string(path)?;
        let names = text.split("fn ").skip(1).map(|rest| rest.split(|letter| !is_word(letter)).next().unwrap_or(""));
        functions.extend(names.map(str::to_owned));
    }
    Ok(functions)
}

/// What stands between backticks and looks like a test: `deploy::the_hello_example_answers`, or four words and more.
fn named_tests(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2).filter_map(|quoted| {
        let looks_like_one = quoted.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c));
        let name = quoted.rsplit("::").next()?;
        let is_one = looks_like_one && !name.is_empty() && (quoted.contains("::") || name.matches('_').count() >= 3);
        is_one.then_some(name)
    })
}

#[test]
fn every_test_that_it_names_is_there() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let functions = functions(&project).unwrap();
    let specification = fs::read_to_string(project.join("SPECIFICATION.md")).unwrap();
    let (mut numbers, mut named) = (HashSet::new(), 0);
    for line in specification.lines() {
        let number =
            line.strip_prefix("| ").and_then(|rest| rest.split(' ').next()).and_then(|n| n.parse::<u32>().ok());
        assert!(number.is_none_or(|number| numbers.insert(number)), "another row has this number: {line}");
        for name in named_tests(line) {
            named += 1;
            assert!(functions.contains(name), "{name} is nowhere: {line}");
        }
    }
    assert!(named > 100 && numbers.len() > 100, "{named} tests in {} rows", numbers.len());
}
