//! From words to a [`Cli`]: whose `--format` it is, and what is said of words that mean nothing.

use std::ffi::{OsStr, OsString};

use clap::{
    CommandFactory, Parser, ValueEnum,
    error::{ContextKind, ErrorKind},
};
use heyvm_api::{ApiError, ErrorCode};

use crate::{
    cli::{Cli, Command},
    output::{self, Format},
};

/// Exit status for a command line that cannot be understood.
const USAGE: i32 = 2;

/// Arguments that were refused, or a help text that was asked for.
#[derive(Debug)]
pub struct Refused {
    error: clap::Error,
    format: Format,
}

/// Reads the arguments. A `--format json` at the end of a command of `exec` is ours, unless `--format` stands before the
/// command.
pub fn parse(arguments: Vec<OsString>) -> Result<Cli, Refused> {
    let format = format_of(&arguments);
    if arguments.len() == 1 {
        // Who types the name alone wants to know what there is.
        let shown = Cli::command().render_help().to_string();
        return Err(Refused { error: Cli::command().error(ErrorKind::DisplayHelp, shown), format });
    }
    let mut cli = Cli::try_parse_from(&arguments).map_err(|error| Refused { error, format })?;
    if cli.command.is_none() && !cli.serve.api {
        let error = Cli::command().error(ErrorKind::MissingSubcommand, "a command is missing");
        return Err(Refused { error, format });
    }
    if let Some(Command::Exec(args)) = &mut cli.command {
        let before = arguments.len().saturating_sub(args.command.len());
        if !arguments[..before].iter().any(|argument| is_format_flag(argument))
            && let Some(format) = take_format(&mut args.command)
        {
            cli.global.format = format;
        }
    }
    Ok(cli)
}

/// Takes the format off the end of a command. Something must be left of the command itself.
fn take_format(command: &mut Vec<String>) -> Option<Format> {
    let (words, format) = trailing_format(command)?;
    if command.len() <= words {
        return None;
    }
    command.truncate(command.len() - words);
    Some(format)
}

fn trailing_format<T: AsRef<OsStr>>(words: &[T]) -> Option<(usize, Format)> {
    match words {
        [.., flag, value] if flag.as_ref() == "--format" => Some((2, format_named(value.as_ref())?)),
        [.., flag] => Some((1, joined_format(flag.as_ref())?)),
        [] => None,
    }
}

/// The format that was asked for, as far as it can be told before the arguments are understood.
fn format_of(arguments: &[OsString]) -> Format {
    let ours = arguments.split(|argument| argument == "--").next().unwrap_or_default();
    let separate = ours.windows(2).filter(|two| two[0] == "--format").find_map(|two| format_named(&two[1]));
    let joined = || ours.iter().find_map(|argument| joined_format(argument));
    separate.or_else(joined).or_else(|| Some(trailing_format(arguments)?.1)).unwrap_or(Format::Text)
}

fn is_format_flag(argument: &OsStr) -> bool {
    argument == "--format" || argument.to_str().is_some_and(|text| text.starts_with("--format="))
}

fn joined_format(argument: &OsStr) -> Option<Format> {
    format_named(OsStr::new(argument.to_str()?.strip_prefix("--format=")?))
}

fn format_named(text: &OsStr) -> Option<Format> {
    Format::from_str(text.to_str()?, false).ok()
}

impl Refused {
    /// Says why, or gives the help that was asked for; answers the exit status.
    pub fn tell(self) -> i32 {
        if !self.error.use_stderr() {
            output::bytes(self.error.render().to_string().as_bytes());
            return 0;
        }
        match self.format {
            Format::Json => output::error(Format::Json, &self.as_error()),
            Format::Text => drop(self.error.print()),
        }
        USAGE
    }

    fn as_error(&self) -> ApiError {
        let text = self.error.render().to_string();
        let sentence = text.split("\n\n").next().unwrap_or_default();
        let sentence = sentence.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ");
        let usage = self.error.get(ContextKind::Usage).map(|usage| usage.to_string()).unwrap_or_default();
        let usage = usage.trim_start_matches("Usage: ").split_whitespace().collect::<Vec<_>>().join(" ");
        let hint = match usage.as_str() {
            "" => "heyvm --help lists the commands, heyvm COMMAND --help the flags of one".into(),
            usage => format!("usage: {usage}"),
        };
        ApiError::new(ErrorCode::InvalidArgument, sentence).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Result<Cli, Refused> {
        parse(["heyvm"].iter().chain(line).map(OsString::from).collect())
    }

    fn exec(line: &[&str]) -> (Format, Vec<String>) {
        let cli = parsed(line).unwrap_or_else(|refused| panic!("{line:?}: {}", refused.error));
        match cli.command {
            Some(Command::Exec(args)) => (cli.global.format, args.command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_format_behind_the_command_is_ours() {
        let command = vec!["python3".to_owned(), "-c".into(), "x".into()];
        assert_eq!(
            exec(&["exec", "a", "--", "python3", "-c", "x", "--format", "json"]),
            (Format::Json, command.clone())
        );
        assert_eq!(exec(&["exec", "a", "--", "python3", "-c", "x", "--format=json"]), (Format::Json, command.clone()));
        assert_eq!(exec(&["exec", "a", "--", "python3", "-c", "x", "--format", "text"]), (Format::Text, command));
    }

    #[test]
    fn unless_one_stands_before_the_dashes() {
        for before in [&["--format", "text"][..], &["--format=text"]] {
            let line = [&["exec"], before, &["a", "--", "prog", "--format", "json"]].concat();
            let expected = vec!["prog".to_owned(), "--format".into(), "json".into()];
            assert_eq!(exec(&line), (Format::Text, expected));
        }
        let (format, command) = exec(&["--format", "json", "exec", "a", "--", "prog", "--format", "text"]);
        assert_eq!((format, command.len()), (Format::Json, 3));
    }

    #[test]
    fn a_format_that_is_all_of_the_command_or_none_we_know_is_the_commands() {
        assert_eq!(exec(&["exec", "a", "--", "--format", "json"]).1, ["--format", "json"]);
        assert_eq!(exec(&["exec", "a", "--", "--format=json"]).1, ["--format=json"]);
        assert_eq!(exec(&["exec", "a", "--", "prog", "--format", "xml"]).1, ["prog", "--format", "xml"]);
        assert_eq!(exec(&["exec", "a", "--", "prog", "--format", "json", "x"]).1.len(), 4);
    }

    #[test]
    fn docker_users_habits_work() {
        for line in [&["ls"][..], &["ps", "-a", "-q"]] {
            assert!(matches!(parsed(line).unwrap().command, Some(Command::List(_))), "{line:?}");
        }
        assert!(matches!(parsed(&["rm", "-f", "a", "b"]).unwrap().command, Some(Command::Rm(args)) if args.yes));
        let line = ["deploy", ".", "-n", "web", "-p", "80", "-e", "A=1", "-v", "/a:/b", "-w", "/srv"];
        let Some(Command::Deploy(args)) = parsed(&line).unwrap().command else { panic!("no deploy") };
        assert_eq!(
            (args.port, args.make.env, args.make.mount),
            (vec!["80".into()], vec!["A=1".into()], vec!["/a:/b".into()])
        );
        let Some(Command::Create(args)) = parsed(&["create", "--port", "80"]).unwrap().command else {
            panic!("no create")
        };
        assert_eq!(args.open_port, ["80"]);
    }

    #[test]
    fn dashes_before_the_command_are_needed_by_none_but_a_first_word_with_one() {
        let words = |line: &[&str]| exec(line).1;
        assert_eq!(words(&["exec", "a", "echo", "x"]), ["echo", "x"]);
        assert_eq!(words(&["exec", "-it", "a", "bash"]), ["bash"]);
        assert_eq!(
            words(&["exec", "a", "--timeout", "2s", "ls", "-la", "--timeout", "x"]),
            ["ls", "-la", "--timeout", "x"]
        );
        assert_eq!(words(&["exec", "a", "sh", "-c", "x", "--", "y"]), ["sh", "-c", "x", "--", "y"]);
        assert_eq!(words(&["exec", "a", "--", "-x"]), ["-x"]);
        assert_eq!(
            exec(&["exec", "a", "echo", "x", "--format", "json"]),
            (Format::Json, vec!["echo".into(), "x".into()])
        );
        assert_eq!(exec(&["exec", "--format", "text", "a", "b", "--format", "json"]).1.len(), 3);
        assert!(parsed(&["exec", "a"]).is_err() && parsed(&["exec", "a", "-x"]).is_err());
    }

    #[test]
    fn flags_of_exec_are_those_that_users_of_docker_know() {
        let cli =
            parsed(&["exec", "-it", "-e", "A=1", "-e", "B=2", "-w", "/srv", "-u", "web", "a", "sh", "-i"]).unwrap();
        let Some(Command::Exec(args)) = cli.command else { panic!("not exec") };
        assert!(args.interactive && args.tty && !args.no_stdin && !args.detach);
        assert_eq!(
            (args.env, args.cwd, args.user),
            (vec!["A=1".into(), "B=2".into()], Some("/srv".into()), Some("web".into()))
        );
        assert_eq!(args.command, ["sh", "-i"]);
        for refused in
            [&["exec", "-in", "a", "b"][..], &["exec", "-dt", "a", "b"], &["exec", "-d", "--session", "s", "a", "b"]]
        {
            assert!(parsed(refused).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn refusals_follow_the_format_that_was_asked_for() {
        for line in [
            &["list", "--nonsense", "--format", "json"][..],
            &["--format=json"],
            &["exec", "a", "--nonsense", "--", "b", "--format", "json"],
            &["exec", "a", "--format", "json"],
        ] {
            let refused = parsed(line).unwrap_err();
            assert_eq!(refused.format, Format::Json, "{line:?}");
            let error = refused.as_error();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(!error.message.contains('\n') && error.hint.is_some(), "{error:?}");
        }
        assert!(parsed(&["list", "--nonsense"]).unwrap_err().as_error().message.contains("--nonsense"));
    }

    #[test]
    fn the_api_needs_no_command_and_its_port_is_not_that_of_deploy() {
        let cli = parsed(&["--api", "--port", "3000"]).unwrap();
        assert!(cli.serve.api && cli.serve.port == 3000 && cli.command.is_none());
        assert!(parsed(&[]).is_err() && parsed(&["--port", "3000"]).is_err());
        let cli = parsed(&["deploy", ".", "--port", "8080", "--port", "9090"]).unwrap();
        assert_eq!(cli.serve.port, 3000);
        assert!(matches!(cli.command, Some(Command::Deploy(args)) if args.port == ["8080", "9090"]));
    }
}
