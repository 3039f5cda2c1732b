//! The four scripts of the documentation page run as printed, twice in a row.

use std::{fs, process::Command};

use heyvm_e2e::{Host, Ran, host::project};

const SCRIPTS: [&str; 4] = ["agent.py", "automation.sh", "orchestration.py", "rest.py"];

/// A directory with ./my-app and ./worker beside the script, where `heyvm` is on PATH.
fn run(host: &Host, script: &str) -> Ran {
    host.example("my-app", &["python-app", "node-app"]);
    host.example("worker", &["worker"]);
    let path = project().join("tests/seed").join(script);
    let interpreter = if script.ends_with(".py") { "/usr/bin/python3" } else { "bash" };
    let mut command = Command::new(interpreter);
    command.arg(path).current_dir(host.scratch());
    host.environment(&mut command);
    Ran::of(&mut command, b"").succeeded()
}

#[test]
fn python_agent_script() {
    let host = Host::new();
    for _ in 0..2 {
        let out = run(&host, "agent.py").out();
        assert!(out.contains("Deployed: http://") && out.contains("Python version: 3."), "{out}");
    }
    assert_eq!(host.list(&["--stopped"]).len(), 2);
}

#[test]
fn bash_automation_script() {
    let host = Host::new();
    for _ in 0..2 {
        let out = run(&host, "automation.sh").out();
        assert!(out.contains("running at http://") && out.contains("1 test passed"), "{out}");
    }
}

#[test]
fn multi_sandbox_script() {
    let host = Host::new();
    for round in 0..2 {
        let out = run(&host, "orchestration.py").out();
        assert_eq!(
            out.lines().filter(|line| line.starts_with("Worker ") && line.contains(": http://")).count(),
            5,
            "{out}"
        );
        assert_eq!(out.lines().filter(|line| line.ends_with(": running")).count(), 5, "{out}");
        assert_eq!(host.list(&[]).len(), 5);
        // The script leaves its workers to their time-to-live, and a name is taken while its sandbox lives.
        if round == 0 {
            for name in host.names(&[]) {
                host.run(&["rm", "-y", &name]).succeeded();
            }
        }
    }
}

#[test]
fn rest_script() {
    let host = Host::new();
    let _api = crate::api::Server::start(&host, 3000, &[]);
    for _ in 0..2 {
        assert_eq!(run(&host, "rest.py").out(), "hello");
        assert!(host.names(&[]).is_empty());
    }
}

/// The page's text has lost indentation and blank lines, and runs headings on to the line before; words are all there.
#[test]
fn the_scripts_are_as_printed() {
    let page = fs::read_to_string(project().join("tests/seed/page.txt")).expect("the page");
    // Where the page itself lies beside the project, ours is a copy of it.
    if let Ok(original) = fs::read_to_string(project().join("../shared/contract/agentic-workflows.txt")) {
        assert!(page == original, "tests/seed/page.txt is no longer the page");
    }
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines = |text: &str| text.lines().map(words).filter(|line| !line.is_empty()).collect::<Vec<_>>();
    let page = lines(&page).join("\n");
    for script in SCRIPTS {
        let code = fs::read_to_string(project().join("tests/seed").join(script)).expect("script");
        assert!(page.contains(&lines(&code).join("\n")), "{script} differs from the page");
    }
}
