//! One client's WebSocket: its first frame finds or makes the session, then frames go both ways until either end is over.

use std::{sync::Arc, time::Duration};

use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use heyvm_api::client::Client;
use tokio::sync::{
    mpsc::{self, Receiver},
    oneshot,
};

use super::{
    Owner, Shells,
    frames::{Answer, Fault, Init, Said},
    session::{Handle, Told},
};

/// How long a client may take for its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(30);
/// How often a client is asked whether it is there. Clients give up after a minute of silence.
const PING: Duration = Duration::from_secs(15);
/// A client of which nothing was heard for this long is gone.
const SILENCE: Duration = Duration::from_secs(45);
/// How long a client may take to take its last frame.
const LAST_FRAME: Duration = Duration::from_secs(5);
/// Frames between session and socket.
const UNDER_WAY: usize = 8;

/// Serves a client to its end, or until its credentials have lapsed: then the shell ends, too.
pub async fn serve(
    socket: WebSocket,
    shells: Arc<Shells>,
    owner: Owner,
    daemon: Client,
    lapsed: impl Future<Output = ()>,
) {
    let (mut outgoing, mut incoming) = socket.split();
    if let Err(fault) = converse(&mut outgoing, &mut incoming, &shells, &owner, &daemon, lapsed).await {
        tokio::time::timeout(LAST_FRAME, async {
            outgoing.send(Answer::Error(fault).frame()).await.ok();
            outgoing.close().await.ok();
        })
        .await
        .ok();
    }
}

async fn converse(
    outgoing: &mut SplitSink<WebSocket, Message>,
    incoming: &mut SplitStream<WebSocket>,
    shells: &Arc<Shells>,
    owner: &Owner,
    daemon: &Client,
    lapsed: impl Future<Output = ()>,
) -> Result<(), Fault> {
    let first = tokio::time::timeout(FIRST_FRAME, first_frame(incoming)).await;
    let Some(init) = first.map_err(|_| Fault::new("invalid_frame", "no init came"))?? else { return Ok(()) };
    let size = init.session_id.is_some().then(|| init.size()).transpose()?;
    let session = shells.session(init, owner, daemon).await?;
    let (answers, mut coming) = mpsc::channel(UNDER_WAY);
    let (number, numbered) = oneshot::channel();
    session.tell(Told::Attach { size, answers, number }).await;
    let from = numbered.await.map_err(|_| Fault::expired())?;
    let ended = tokio::select! {
        () = carry_out(outgoing, &mut coming) => Ok(()),
        heard = carry_in(incoming, &session, from) => heard,
        () = lapsed => {
            session.tell(Told::Close { from }).await;
            return Err(Fault::new("unauthorized", "the credentials are no longer valid"));
        }
    };
    session.tell(Told::Detach { from }).await;
    ended
}

async fn first_frame(incoming: &mut SplitStream<WebSocket>) -> Result<Option<Init>, Fault> {
    while let Some(message) = incoming.next().await {
        match Said::read(message.map_err(|_| unreadable())?)? {
            Some(Said::Init(init)) => return Ok(Some(init)),
            Some(_) => return Err(Fault::new("invalid_frame", "the first frame must be init")),
            None => {}
        }
    }
    Ok(None)
}

/// The session's answers to the client, no faster than it takes them.
async fn carry_out(outgoing: &mut SplitSink<WebSocket, Message>, answers: &mut Receiver<Answer>) {
    let mut ping = tokio::time::interval(PING);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let (frame, is_last) = tokio::select! {
            answer = answers.recv() => match answer {
                Some(answer) => (answer.frame(), answer.is_last()),
                // Another connection has taken the session over while this one took nothing.
                None => return,
            },
            _ = ping.tick() => (Message::Ping(Bytes::new()), false),
        };
        if outgoing.send(frame).await.is_err() {
            return;
        }
        if is_last {
            tokio::time::timeout(LAST_FRAME, outgoing.close()).await.ok();
            return;
        }
    }
}

/// The client's frames to the session, until the client goes, or says what cannot be meant.
async fn carry_in(incoming: &mut SplitStream<WebSocket>, session: &Handle, from: u64) -> Result<(), Fault> {
    loop {
        let Ok(Some(message)) = tokio::time::timeout(SILENCE, incoming.next()).await else { return Ok(()) };
        let told = match Said::read(message.map_err(|_| unreadable())?)? {
            Some(Said::Input(bytes)) => Told::Input { from, bytes },
            Some(Said::Resize(size)) => Told::Resize { from, size },
            Some(Said::Ack(seq)) => Told::Ack { from, seq },
            Some(Said::Close) => Told::Close { from },
            Some(Said::Init(_)) => return Err(Fault::new("invalid_frame", "init comes first, and once")),
            None => continue,
        };
        if !session.tell(told).await {
            // It has said its last word: that comes by the other direction.
            std::future::pending::<()>().await;
        }
    }
}

fn unreadable() -> Fault {
    Fault::new("invalid_frame", "a frame is larger than 1 MiB, or breaks the WebSocket protocol")
}
