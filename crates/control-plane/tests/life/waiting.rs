//! A file that makes whoever opens it wait, as one of a file system that hangs does, holds up nobody else.

use std::{
    fs::{self, File},
    sync::{Arc, mpsc},
    time::Duration,
};

use heyvm_control_plane::{LogQuery, Who};
use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::daemon::Daemon;

/// More than the daemon of these tests has workers.
const MANY: usize = 4;

#[test]
fn a_log_that_cannot_be_opened_yet_keeps_no_worker() {
    let daemon = Daemon::new();
    let id = daemon.create(daemon.request("web")).unwrap().id;
    let log = daemon.home().join("logs").join(&id);
    fs::remove_file(&log).ok();
    mkfifo(&log, Mode::from_bits_truncate(0o600)).unwrap();
    for _ in 0..MANY {
        let plane = Arc::clone(daemon.plane());
        daemon.spawn(async move { plane.logs(&Who::owners("web"), LogQuery::default()).await.map(drop) });
    }
    let (say, answered) = mpsc::channel();
    let plane = Arc::clone(daemon.plane());
    daemon.spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        say.send(plane.get(&Who::owners("web")).await.map(|info| info.id)).unwrap();
    });
    let answer = answered.recv_timeout(Duration::from_secs(10));
    // Those who wait are let go, and find no log any more.
    let aside = log.with_extension("aside");
    fs::rename(&log, &aside).unwrap();
    drop(File::options().write(true).open(aside).unwrap());
    assert_eq!(answer.expect("the workers are free").unwrap(), id);
}
