//! A cloud of two regions: what is asked for lands there, every server tells of it, and where a region is cut off, only
//! its own sandboxes are out of reach.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use heyvm_e2e::{
    Host, Ran,
    apps::WEB_FLAGS,
    cloud::{Cloud, Machine},
    eventually, http, leaks,
    regions::Regions,
};
use serde_json::{Value, json};

/// How soon a caller learns that a region is cut off.
const SOON: Duration = Duration::from_secs(20);

/// Deploys the tests' web server to a region.
fn deploy(machine: &Machine, app: &std::path::Path, name: &str, region: &str) -> Value {
    let mut arguments = vec!["deploy", app.to_str().expect("a path"), "--name", name, "--region", region];
    arguments.extend(["--size-class", "micro"]);
    arguments.extend(WEB_FLAGS);
    machine.json(&arguments)
}

/// What the edge beside this host answers.
fn status_at(host: &Host, made: &Value) -> u16 {
    let url = format!("{}/health", made["urls"][0]["url"].as_str().expect("a URL"));
    host.inside(|| http::try_get(&url)).map_or(0, |answer| answer.status)
}

/// Name, region and status of what a machine is shown, by name.
fn shown(machine: &Machine) -> Vec<(String, String, String)> {
    let field = |sandbox: &Value, name: &str| sandbox[name].as_str().unwrap_or_default().to_owned();
    let row = |sandbox: &Value| (field(sandbox, "name"), field(sandbox, "region"), field(sandbox, "status"));
    let mut all: Vec<_> = machine.json(&["list"]).as_array().expect("a list").iter().map(row).collect();
    all.sort();
    all
}

fn both() -> Vec<(String, String, String)> {
    [("far", "EU"), ("near", "US")].map(|(name, region)| (name.into(), region.into(), "running".into())).to_vec()
}

/// A call that must be refused because EU cannot be reached, and soon.
#[track_caller]
fn cut_off(machine: &Machine, arguments: &[&str]) {
    let begun = Instant::now();
    let refusal = machine.refused(arguments);
    assert_eq!(refusal.code, "region_unavailable", "{arguments:?}: {}", refusal.message);
    assert!(refusal.message.contains("region EU cannot be reached"), "{}", refusal.message);
    assert!(begun.elapsed() < SOON, "{arguments:?} took {:?}", begun.elapsed());
}

fn running(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("heyvm")
}

#[test]
fn a_region_that_is_cut_off_fails_for_its_own_sandboxes_only() {
    let regions = Regions::new();
    let (us, eu) = (&regions.us, &regions.eu);
    let quota = "[quotas]\nmax_running = 3\n";
    let (eu_server, us_server) = (regions.serve(eu, quota), regions.serve(us, quota));
    let key = eu_server.key("ada", "deploy");
    let (here, there) = (Machine::new(&us_server, &key), Machine::new(&eu_server, &key));

    let refusal = here.refused(&["create", "--region", "MOON"]);
    assert_eq!(refusal.code, "unknown_region");
    assert!(refusal.hint.contains("US, EU"), "{}", refusal.hint);
    let app = us.web_app();
    let near = deploy(&here, &app, "near", "US");
    let far = deploy(&here, &app, "far", "EU");
    assert_eq!((&near["region"], &far["region"]), (&json!("US"), &json!("EU")));
    let lies_in = |host: &Host, made: &Value| host.home.join("sandboxes").join(made["id"].as_str().unwrap()).exists();
    assert!(lies_in(us, &near) && lies_in(eu, &far) && !lies_in(us, &far) && !lies_in(eu, &near));
    for (host, machine) in [(us, &here), (eu, &there)] {
        assert_eq!(shown(machine), both());
        assert_eq!((status_at(host, &near), status_at(host, &far)), (200, 200));
    }

    let mut command = here.command();
    command.args(["exec", "far", "--", "sleep 600"]);
    let mut at_work = running(command);
    let sleeping = || there.run(&["exec", "far", "--", "pgrep -x sleep"]).code == 0;
    eventually("the command runs", || sleeping().then_some(()));
    regions.network.cut();
    let cut = Instant::now();
    assert_eq!(here.json(&["get", "near"])["status"], "running");
    here.run(&["exec", "near", "--", "true"]).succeeded();
    assert_eq!(status_at(us, &near), 200);
    let begun = Instant::now();
    assert_eq!(status_at(us, &far), 502);
    assert!(begun.elapsed() < SOON, "the edge took {:?}", begun.elapsed());
    cut_off(&here, &["get", "far"]);
    cut_off(&here, &["exec", "far", "--", "true"]);
    cut_off(&here, &["create", "--name", "third", "--region", "EU", "--size-class", "micro"]);
    let listed = here.json(&["list"]);
    let told = |name: &str| listed.as_array().unwrap().iter().find(|one| one["name"] == name).unwrap();
    assert_eq!(shown(&here), both());
    assert!(told("far")["error_message"].as_str().unwrap().contains("region EU cannot be reached"));
    assert!(told("near")["error_message"].is_null());
    eventually("the command that ran has ended", || at_work.try_wait().unwrap());
    assert_ne!(at_work.wait().unwrap().code(), Some(0), "after {:?}", cut.elapsed());
    // What could not be made counts for nothing: there is room for a third one.
    here.json(&["create", "--name", "third", "--region", "US", "--size-class", "micro"]);

    // Beyond the cut everything goes on for the sandboxes that are there.
    there.run(&["exec", "far", "--", "true"]).succeeded();
    assert_eq!(status_at(eu, &far), 200);
    assert_eq!(status_at(eu, &near), 502);
    eventually("the region ends what nobody waits for any more", || (!sleeping()).then_some(()));

    regions.network.mend();
    eventually("the region is back", || here.run(&["get", "far"]).code.eq(&0).then_some(()));
    here.run(&["exec", "far", "--", "true"]).succeeded();
    eventually("its URL is back", || (status_at(us, &far) == 200).then_some(()));
    here.json(&["rm", "-y", "third"]);
    assert_eq!((shown(&here), shown(&there)), (both(), both()));

    us_server.kill();
    assert_eq!(shown(&there), both());
    there.run(&["exec", "near", "--", "true"]).succeeded();
    assert_eq!((status_at(eu, &near), status_at(eu, &far)), (200, 200));
}

#[test]
fn what_a_server_had_begun_when_it_died_is_there_or_gone() {
    let regions = Regions::new();
    let (us, eu) = (&regions.us, &regions.eu);
    let (eu_server, us_server): (Cloud<'_>, Cloud<'_>) = (regions.serve(eu, ""), regions.serve(us, ""));
    let key = eu_server.key("ada", "deploy");
    let (here, there) = (Machine::new(&us_server, &key), Machine::new(&eu_server, &key));
    let create = ["create", "--name", "half", "--region", "EU", "--size-class", "micro"];
    let mut command = here.command();
    command.args(create);
    let mut client = running(command);
    eventually("the region makes it", || leaks::sandboxes_of(&eu.home).pop());
    us_server.kill();
    assert_ne!(client.wait().unwrap().code(), Some(0));

    let status = eventually("it is there or gone", || {
        let listed = there.json(&["list", "--all"]);
        let half = listed.as_array().unwrap().iter().find(|one| one["name"] == "half")?.clone();
        let status = half["status"].as_str().unwrap_or_default().to_owned();
        ["running", "removed"].contains(&status.as_str()).then_some(status)
    });
    if status == "running" {
        assert_eq!(leaks::machines_of(eu.scratch()).len(), 1);
        there.json(&["rm", "-y", "half"]);
    }
    eventually("nothing of it is left", || {
        (leaks::machines_of(eu.scratch()).is_empty() && leaks::sandboxes_of(&eu.home).is_empty()).then_some(())
    });
    // Its name is free.
    Ran::of(there.command().args(create), b"").succeeded();
}
