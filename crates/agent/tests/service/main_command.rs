//! The start command.

use heyvm_agent_protocol::v1::{main_event, *};
use tonic::{Code, Streaming};

use crate::harness::{Agent, Client, PATIENCE, eventually, program, script};

async fn start(client: &mut Client, start: ExecStart) -> Result<i32, tonic::Status> {
    Ok(client
        .start_main(StartMainRequest { start: Some(start), ..StartMainRequest::default() })
        .await?
        .into_inner()
        .pid)
}

async fn watch(client: &mut Client, from_offset: u64) -> Streaming<MainEvent> {
    client.watch_main(WatchMainRequest { from_offset }).await.unwrap().into_inner()
}

/// Everything up to the exit: the two streams, the first offset, the exit.
async fn to_the_end(mut events: Streaming<MainEvent>) -> (String, String, u64, Exit) {
    let (mut stdout, mut stderr, mut first) = (String::new(), String::new(), None);
    loop {
        let event = tokio::time::timeout(PATIENCE, events.message()).await.expect("the watch hangs").unwrap();
        match event.and_then(|event| event.kind).expect("no exit") {
            main_event::Kind::Log(log) => {
                first.get_or_insert(log.offset);
                let to = if log.stderr { &mut stderr } else { &mut stdout };
                to.push_str(&String::from_utf8(log.data).unwrap());
            }
            main_event::Kind::Exit(exit) => {
                assert_eq!(events.message().await.unwrap(), None, "something after the exit");
                return (stdout, stderr, first.unwrap_or_default(), exit);
            }
        }
    }
}

#[tokio::test]
async fn watchers_see_all_of_it_whenever_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::personalized(dir.path());
    let mut client = agent.client().await;
    assert_eq!(client.watch_main(WatchMainRequest::default()).await.unwrap_err().code(), Code::NotFound);
    let text = "echo one; echo bad >&2; until [ -e go ]; do sleep 0.02; done; echo two; exit 5";
    assert!(start(&mut client, script(text)).await.unwrap() > 0);
    let early = watch(&mut client, 0).await;
    assert_eq!(start(&mut client, script("true")).await.unwrap_err().code(), Code::AlreadyExists);
    // Another connection: the command belongs to none.
    drop(client);
    let mut client = agent.client().await;
    let middle = watch(&mut client, 4).await;
    std::fs::write(dir.path().join("go"), "").unwrap();
    let (stdout, stderr, _, exit) = to_the_end(early).await;
    assert_eq!((&*stdout, &*stderr, exit.code), ("one\ntwo\n", "bad\n", 5));
    let (stdout, _, first, _) = to_the_end(middle).await;
    assert!(stdout.ends_with("two\n") && first == 4, "{stdout} from {first}");
    let late = watch(&mut client, 0).await;
    assert_eq!(to_the_end(late).await.0, "one\ntwo\n");
}

#[tokio::test]
async fn it_can_be_started_again_after_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    start(&mut client, script("echo first")).await.unwrap();
    to_the_end(watch(&mut client, 0).await).await;
    start(&mut client, script("echo second")).await.unwrap();
    let (stdout, _, first, exit) = to_the_end(watch(&mut client, 6).await).await;
    assert_eq!((&*stdout, first, exit.code), ("second\n", 6, 0));
}

#[tokio::test]
async fn only_the_newest_output_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    start(
        &mut client,
        script("i=0; while [ $i -lt 300 ]; do head -c 9999 /dev/zero | tr '\\0' x; echo; i=$((i+1)); done"),
    )
    .await
    .unwrap();
    // Once it has ended: whoever watches meanwhile may well see everything.
    to_the_end(watch(&mut client, 0).await).await;
    let (stdout, _, first, _) = to_the_end(watch(&mut client, 0).await).await;
    assert_eq!(first + stdout.len() as u64, 3_000_000);
    assert!((900_000..=1 << 20).contains(&stdout.len()), "{} bytes", stdout.len());
}

#[tokio::test]
async fn what_cannot_be_started_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    let refused = start(&mut client, program(&["no-such-program"])).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().contains("no-such-program"), "{refused}");
    let terminal = ExecStart { pty: Some(Pty::default()), ..program(&["true"]) };
    assert_eq!(start(&mut client, terminal).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_daemon_that_is_left_behind_does_not_hold_up_the_exit() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    start(&mut client, script("(sleep 0.5; echo later > later; echo later) & echo now")).await.unwrap();
    let (stdout, _, _, exit) = to_the_end(watch(&mut client, 0).await).await;
    assert_eq!((&*stdout, exit.code), ("now\n", 0));
    eventually("it goes on", || dir.path().join("later").exists()).await;
}
