//! The store is lost, made again, or restored from a backup: no disk is removed and no VM ended.

use std::fs;

use heyvm_api::{ErrorCode, orphans::RecoverRequest, sandbox::*, system::CheckStatus};
use heyvm_control_plane::{Account, Who};

use crate::{
    adoption::rewrite,
    daemon::{Daemon, eventually, sink},
};

fn recover(daemon: &Daemon, id: &str, name: Option<&str>) -> Result<SandboxInfo, heyvm_api::ApiError> {
    let request = RecoverRequest { name: name.map(Into::into) };
    daemon.run(daemon.plane().recover(&Who::owners(id), request))
}

/// Moves the database away, as `rm heyvm.db` would.
fn lose_the_store(daemon: &Daemon) {
    for name in ["heyvm.db", "heyvm.db-wal", "heyvm.db-shm"] {
        let path = daemon.home().join(name);
        if path.exists() {
            fs::rename(&path, path.with_extension("lost")).unwrap();
        }
    }
}

/// The database and what belongs to it, from names that end in `from` to names that end in `to`.
fn copy_the_store(daemon: &Daemon, from: &str, to: &str) {
    for name in ["heyvm.db", "heyvm.db-wal"] {
        let path = |suffix: &str| daemon.home().join(format!("{name}{suffix}"));
        if path(from).exists() {
            fs::copy(path(from), path(to)).unwrap();
        }
    }
}

fn logging(daemon: &Daemon, name: &str) -> CreateRequest {
    let start_command = Some("echo hello; exec sleep 600".into());
    CreateRequest { start_command, env_vars: [("A".into(), "b".into())].into(), ..daemon.request(name) }
}

#[test]
fn a_lost_store_removes_no_disk_and_ends_no_vm() {
    let mut daemon = Daemon::new();
    let running = daemon.create(logging(&daemon, "running")).unwrap();
    let stopped = daemon.create(daemon.request("stopped")).unwrap();
    let unwanted = daemon.create(daemon.request("unwanted")).unwrap();
    for name in ["stopped", "unwanted"] {
        daemon.run(daemon.plane().stop(&Who::owners(name))).unwrap();
    }
    let disks = daemon.machines.disks();
    daemon.die();
    lose_the_store(&daemon);
    daemon.revive();
    assert!(daemon.list(ListFilter::All).is_empty());
    assert_eq!(daemon.machines.disks(), disks);
    assert_eq!(daemon.machines.running(), std::slice::from_ref(&running.id));

    let orphans = daemon.run(daemon.plane().orphans()).unwrap();
    let mut seen: Vec<_> = orphans.iter().map(|orphan| (orphan.name.as_deref().unwrap(), orphan.running)).collect();
    seen.sort();
    assert_eq!(seen, [("running", true), ("stopped", false), ("unwanted", false)]);
    assert!(orphans.iter().all(|orphan| orphan.size_bytes > 0 && orphan.store_id.is_some()));
    let report = daemon.run(daemon.plane().doctor()).unwrap();
    let check = report.checks.iter().find(|check| check.name == "orphans").unwrap();
    assert_eq!(check.status, CheckStatus::Warn);
    assert!(check.message.contains(&running.id) && check.hint.as_ref().unwrap().contains("heyvm recover"));

    let again = recover(&daemon, &running.id, None).unwrap();
    assert_eq!((again.status, &again.id, again.name.as_str()), (Status::Running, &running.id, "running"));
    assert_eq!((again.start_command, again.env_vars), (running.start_command, running.env_vars));
    assert_eq!(daemon.log("running"), "hello\n", "its log is kept");
    let other = recover(&daemon, &stopped.id[..8], Some("other")).unwrap();
    assert_eq!((other.status, other.name.as_str()), (Status::Stopped, "other"));
    assert_eq!(daemon.run(daemon.plane().start(&Who::owners("other"), sink())).unwrap().id, stopped.id);
    let gone = daemon.run(daemon.plane().remove(&Who::owners(&unwanted.id[..8]))).unwrap();
    assert_eq!((gone.status, gone.name.as_str()), (Status::Removed, "unwanted"));
    assert!(!daemon.machines.disks().contains(&unwanted.id));
    assert!(daemon.run(daemon.plane().orphans()).unwrap().is_empty());

    daemon.die();
    daemon.revive();
    for name in ["running", "other"] {
        assert_eq!(daemon.get(name).status, Status::Running);
    }
}

#[test]
fn a_restored_backup_removes_no_disk_and_ends_no_vm() {
    let mut daemon = Daemon::new();
    let early = daemon.create(daemon.request("early")).unwrap();
    daemon.die();
    copy_the_store(&daemon, "", ".backup");
    daemon.revive();
    let late = daemon.create(daemon.request("late")).unwrap();
    daemon.die();
    lose_the_store(&daemon);
    copy_the_store(&daemon, ".backup", "");
    daemon.revive();
    assert_eq!(daemon.get("early").status, Status::Running);
    let mut running = daemon.machines.running();
    running.sort();
    let mut both = vec![early.id, late.id.clone()];
    both.sort();
    assert_eq!(running, both);
    // Its name is another one's by now.
    daemon.create(daemon.request("late")).unwrap();
    let taken = recover(&daemon, &late.id, None).unwrap_err();
    assert_eq!(taken.code, ErrorCode::NameTaken);
    assert!(taken.hint.unwrap().contains("--name"));
    assert_eq!(recover(&daemon, &late.id, Some("later")).unwrap().status, Status::Running);
    assert_eq!(recover(&daemon, &late.id, None).unwrap_err().code, ErrorCode::InvalidState, "it is no orphan any more");
}

#[test]
fn a_row_that_is_older_than_the_disk_does_not_count() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    let mortal = daemon.create(CreateRequest { ttl_seconds: Some(3600), ..daemon.request("mortal") }).unwrap();
    daemon.run(daemon.plane().set_ttl(&Who::owners("mortal"), None)).unwrap();
    daemon.die();
    // A backup from when one was being made, and the other was to live an hour.
    rewrite(&daemon, &made.id, |data| {
        let mut record: serde_json::Value = serde_json::from_str(data).unwrap();
        (record["status"], record["has_run"], record["revision"]) = ("provisioning".into(), false.into(), 1.into());
        record.to_string()
    });
    rewrite(&daemon, &mortal.id, |data| {
        let mut record: serde_json::Value = serde_json::from_str(data).unwrap();
        (record["ttl_seconds"], record["revision"]) = (1.into(), 1.into());
        record.to_string()
    });
    daemon.revive();
    for name in ["web", "mortal"] {
        assert_eq!((daemon.get(name).status, daemon.get(name).ttl_seconds), (Status::Running, None), "{name}");
    }
    assert_eq!(daemon.machines.running().len(), 2);
}

#[test]
fn a_disk_without_a_note_is_recovered_with_what_it_has() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    daemon.die();
    lose_the_store(&daemon);
    fs::remove_file(daemon.machines.disk(&made.id).join("note")).unwrap();
    daemon.revive();
    let recovered = recover(&daemon, &made.id, Some("web")).unwrap();
    assert_eq!((recovered.status, recovered.disk_size_gb), (Status::Stopped, 10));
    assert!(recovered.warnings.iter().any(|warning| warning.contains("is assumed")), "{:?}", recovered.warnings);
    daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
}

#[test]
fn an_orphan_keeps_its_image_and_is_its_machines_owners() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    lose_the_store(&daemon);
    // The name means another image by now.
    crate::daemon::have_image(daemon.home(), "test:1", "01");
    daemon.revive();
    daemon.create(daemon.request("other")).unwrap();
    daemon.run(daemon.plane().remove(&Who::owners("other"))).unwrap();
    assert!(daemon.home().join("images/sha256-00").exists(), "an orphan's disk lies over it");
    let theirs = Who { account: Account::of_cloud("acme").unwrap(), sandbox: made.id.clone() };
    let refused = daemon.run(daemon.plane().recover(&theirs, RecoverRequest::default())).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Forbidden);
    assert!(daemon.run(daemon.plane().remove(&theirs)).is_err());
    assert!(daemon.machines.running().contains(&made.id));
    daemon.run(daemon.plane().remove(&Who::owners(&made.id))).unwrap();
    eventually("it is gone", || if daemon.machines.disks().is_empty() { Ok(()) } else { Err(String::new()) });
}
