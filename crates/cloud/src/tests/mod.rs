//! The cloud over a real store and a region without VMs.

mod region;

use std::{sync::Arc, time::Duration};

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{CreateRequest, ListFilter, SandboxInfo},
};
use heyvm_store::Store;
use tokio::net::UnixListener;

use crate::{Cloud, Config, ListQuery, Quotas, RegionConfig, Way, sync::Seen};

struct Place {
    directory: tempfile::TempDir,
    location: String,
}

impl Place {
    fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let location = directory.path().join("server.db").to_str().unwrap().to_owned();
        Self { directory, location }
    }

    async fn postgres() -> Self {
        let location = heyvm_test_services::postgres::database().await;
        Self { directory: tempfile::tempdir().unwrap(), location }
    }
}

heyvm_test_services::on_both!(
    many_creates_with_one_key_make_one_sandbox,
    a_server_that_died_after_it_placed_a_sandbox_makes_it_when_asked_again,
    quotas_hold_for_every_operation_that_runs_a_sandbox,
    what_a_region_reports_meanwhile_makes_no_room,
    an_operation_whose_caller_leaves_gives_back_what_it_held,
    values_of_the_environment_stay_with_the_region,
    changes_are_seen_and_what_is_lost_is_found,
    lists_come_in_pages,
);

const ACCOUNT: &str = "acme";

/// One server and its region. The region outlives servers.
struct Server {
    cloud: Arc<Cloud>,
    region: Arc<region::Region>,
    place: Place,
}

impl Server {
    async fn start(place: Place, quotas: Quotas) -> Self {
        let listener = UnixListener::bind(place.directory.path().join("region.sock")).unwrap();
        let region = region::Region::serve(listener);
        let cloud = open(&place, quotas).await;
        Self { cloud, region, place }
    }

    /// Another server over the same store, as after a crash of this one.
    async fn again(&self) -> Arc<Cloud> {
        open(&self.place, Quotas::default()).await
    }

    async fn create(&self, name: &str) -> Result<SandboxInfo, ApiError> {
        create(&self.cloud, named(name), None).await
    }

    async fn is_running(&self, name: &str) -> bool {
        self.cloud.store.placement_named(ACCOUNT, name).await.unwrap().unwrap().running
    }
}

async fn open(place: &Place, quotas: Quotas) -> Arc<Cloud> {
    let archives = heyvm_archives::Settings::Directory(place.directory.path().join("archives"));
    let storage = heyvm_archives::Storage::open(&archives).await.unwrap();
    let way = Way::Local(place.directory.path().join("region.sock"));
    let config = Config {
        regions: vec![RegionConfig { name: "US".into(), way }],
        quotas,
        base_domain: "example.org".into(),
        url_scheme: "https".into(),
        url_port: 443,
    };
    Cloud::open(config, Store::connect(&place.location).await.unwrap(), storage).unwrap()
}

fn named(name: &str) -> CreateRequest {
    CreateRequest { name: Some(name.into()), ..CreateRequest::default() }
}

fn sink() -> heyvm_control_plane::ProgressSink {
    tokio::sync::mpsc::unbounded_channel().0
}

async fn create(cloud: &Arc<Cloud>, request: CreateRequest, key: Option<&str>) -> Result<SandboxInfo, ApiError> {
    cloud.create(ACCOUNT, request, key.map(str::to_owned), sink()).await
}

async fn many_creates_with_one_key_make_one_sandbox(place: Place) {
    let quotas = Quotas { max_running: Some(1), ..Quotas::default() };
    let server = Server::start(place, quotas).await;
    // By two servers, with a name and without one.
    let other = open(&server.place, quotas).await;
    for request in [named("web"), CreateRequest::default()] {
        let creates = (0..8).map(|n| {
            let (cloud, request) = (Arc::clone(if n % 2 == 0 { &server.cloud } else { &other }), request.clone());
            tokio::spawn(async move { create(&cloud, request, Some("race")).await.map(|info| info.id) })
        });
        let mut ids = Vec::new();
        for create in creates.collect::<Vec<_>>() {
            ids.push(create.await.unwrap().unwrap());
        }
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let placed = server.cloud.store.placements_of(ACCOUNT, true, None, 100).await.unwrap();
        assert_eq!(placed.iter().filter(|row| !row.gone).count(), 1);
        let different = CreateRequest { ttl_seconds: Some(60), ..request };
        let refused = create(&server.cloud, different, Some("race")).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::IdempotencyKeyReused);
        // Gone, it gives the key up.
        let mut gone = placed.into_iter().find(|row| !row.gone).unwrap();
        (gone.gone, gone.running, gone.holds_name) = (true, false, false);
        server.cloud.store.update_placement(&gone).await.unwrap();
    }
}

async fn a_server_that_died_after_it_placed_a_sandbox_makes_it_when_asked_again(place: Place) {
    let server = Server::start(place, Quotas::default()).await;
    let begun = server.cloud.begin(ACCOUNT, named("web"), Some("k")).await.unwrap();
    let id = begun.id().to_owned();
    drop(begun);
    assert!(server.region.creates.lock().unwrap().is_empty());
    let made = create(&server.again().await, named("web"), Some("k")).await.unwrap();
    assert_eq!(made.id, id);
    let creates = server.region.creates.lock().unwrap();
    assert_eq!(creates.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&id]);
}

async fn quotas_hold_for_every_operation_that_runs_a_sandbox(place: Place) {
    let server = Server::start(place, Quotas { max_running: Some(1), ..Quotas::default() }).await;
    server.create("a").await.unwrap();
    server.cloud.checkpoint(ACCOUNT, "a").await.unwrap();
    server.cloud.stop(ACCOUNT, "a").await.unwrap();
    server.create("b").await.unwrap();
    for refused in [
        server.create("c").await,
        server.cloud.start(ACCOUNT, "a", sink()).await,
        server.cloud.restart(ACCOUNT, "a", sink()).await,
        server.cloud.restore(ACCOUNT, "a").await,
    ] {
        assert_eq!(refused.unwrap_err().code, ErrorCode::QuotaExceeded);
    }
    assert_eq!(server.region.running(), 1);
    // What runs already needs no more room.
    server.cloud.restart(ACCOUNT, "b", sink()).await.unwrap();
    server.cloud.restore(ACCOUNT, "b").await.unwrap();
    server.cloud.stop(ACCOUNT, "b").await.unwrap();
    server.cloud.restore(ACCOUNT, "a").await.unwrap();
    assert_eq!(server.region.running(), 1);
}

async fn what_a_region_reports_meanwhile_makes_no_room(place: Place) {
    let server = Server::start(place, Quotas { max_running: Some(1), ..Quotas::default() }).await;
    for name in ["a", "b"] {
        server.create(name).await.unwrap();
        server.cloud.stop(ACCOUNT, name).await.unwrap();
    }
    server.region.halted.send_replace(true);
    let cloud = Arc::clone(&server.cloud);
    let restoring = tokio::spawn(async move { cloud.restore(ACCOUNT, "a").await });
    eventually(async || server.is_running("a").await).await;
    // The region says that it is stopped, as it is while its disk is put back.
    server.cloud.sync(&server.cloud.regions[0], &mut Seen::default()).await.unwrap();
    assert_eq!(server.cloud.start(ACCOUNT, "b", sink()).await.unwrap_err().code, ErrorCode::QuotaExceeded);
    server.region.halted.send_replace(false);
    restoring.await.unwrap().unwrap();
    assert_eq!(server.region.running(), 1);
}

async fn an_operation_whose_caller_leaves_gives_back_what_it_held(place: Place) {
    let server = Server::start(place, Quotas { max_running: Some(1), ..Quotas::default() }).await;
    for name in ["a", "b"] {
        server.create(name).await.unwrap();
        server.cloud.stop(ACCOUNT, name).await.unwrap();
    }
    server.region.halted.send_replace(true);
    let cloud = Arc::clone(&server.cloud);
    let starting = tokio::spawn(async move { cloud.start(ACCOUNT, "a", sink()).await });
    eventually(async || server.is_running("a").await).await;
    starting.abort();
    assert!(starting.await.unwrap_err().is_cancelled());
    server.region.halted.send_replace(false);
    eventually(async || server.region.running() == 1).await;
    // It runs, and counts; once it is stopped nothing of it is held.
    eventually(async || {
        server.cloud.stop(ACCOUNT, "a").await.unwrap();
        server.cloud.start(ACCOUNT, "b", sink()).await.is_ok()
    })
    .await;
    assert_eq!(server.region.running(), 1);
}

async fn values_of_the_environment_stay_with_the_region(place: Place) {
    let server = Server::start(place, Quotas::default()).await;
    let env_vars = [("TOKEN".to_owned(), "of the tests".to_owned())].into();
    let made = create(&server.cloud, CreateRequest { env_vars, ..named("web") }, None).await.unwrap();
    assert_eq!(made.env_vars["TOKEN"], "of the tests");
    server.cloud.sync(&server.cloud.regions[0], &mut Seen::default()).await.unwrap();
    let row = server.cloud.store.placement(&made.id).await.unwrap().unwrap();
    assert!(row.info.contains("TOKEN") && !row.info.contains("of the tests"), "{}", row.info);
    let begun = server.cloud.begin(ACCOUNT, named("other"), None).await.unwrap();
    let row = server.cloud.store.placement(begun.id()).await.unwrap().unwrap();
    assert!(!row.info.contains("of the tests"));
}

async fn changes_are_seen_and_what_is_lost_is_found(place: Place) {
    let server = Server::start(place, Quotas::default()).await;
    let mut seen = Seen::default();
    let region = &server.cloud.regions[0];
    let (a, b) = (server.create("a").await.unwrap(), server.create("b").await.unwrap());
    server.cloud.sync(region, &mut seen).await.unwrap();
    assert!(server.region.asked_since.lock().unwrap().iter().all(|since| since == "00000000-0"));
    server.region.enter(&a.id, "stopped");
    server.cloud.sync(region, &mut seen).await.unwrap();
    assert!(!server.is_running("a").await && server.is_running("b").await);
    // The last question was for changes alone, and was answered with one.
    assert_ne!(server.region.asked_since.lock().unwrap().last().unwrap(), "00000000-0");
    assert_eq!(server.region.listed.lock().unwrap().last().unwrap(), std::slice::from_ref(&a.id));
    // A region that forgot one, long after that was made.
    server.region.forget(&b.id);
    let mut row = server.cloud.store.placement(&b.id).await.unwrap().unwrap();
    (row.created_at, row.changed_at) = (1, 1);
    server.cloud.store.update_placement(&row).await.unwrap();
    server.cloud.sync(region, &mut Seen::default()).await.unwrap();
    assert!(server.cloud.store.placement(&b.id).await.unwrap().unwrap().gone);
    assert!(!server.cloud.store.placement(&a.id).await.unwrap().unwrap().gone);
}

async fn lists_come_in_pages(place: Place) {
    let server = Server::start(place, Quotas::default()).await;
    for name in ["a", "b", "c"] {
        server.create(name).await.unwrap();
    }
    server.cloud.stop(ACCOUNT, "b").await.unwrap();
    let list = async |filter, after, size| {
        let query = ListQuery { filter, after, with_removed: filter == ListFilter::All, name: None };
        server.cloud.list(ACCOUNT, &query, size).await.unwrap()
    };
    let names = |page: &[(String, SandboxInfo)]| page.iter().map(|(_, info)| info.name.clone()).collect::<Vec<_>>();
    let mut all = names(&list(ListFilter::All, None, 10).await);
    let first = list(ListFilter::All, None, 1).await;
    let rest = list(ListFilter::All, Some(first[0].0.clone()), 10).await;
    assert_eq!((first.len(), [&names(&first)[..1], &names(&rest)].concat()), (2, all.clone()));
    all.sort();
    assert_eq!(all, ["a", "b", "c"]);
    assert_eq!(list(ListFilter::Living, None, 10).await.len(), 2);
    assert_eq!(names(&list(ListFilter::Stopped, None, 1).await), ["b"]);
    let query = ListQuery { after: Some("1.x".into()), ..ListQuery::default() };
    assert_eq!(server.cloud.list(ACCOUNT, &query, 1).await.unwrap_err().code, ErrorCode::InvalidArgument);
}

async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "it did not come about");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
