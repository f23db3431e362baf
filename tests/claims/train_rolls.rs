//! Runs of the trainer go on through a server that is rolled, and take no step twice.

use super::follow::{begin, n_steps, until};
use super::{Place, assert_same_adapters, run};
use offshoot_tests::TestServer;
use offshoot_tests::child::{Child, Starting};
use offshoot_tests::proxy::Proxy;
use offshoot_trainer::CancelToken;
use std::path::PathBuf;

#[tokio::test(flavor = "multi_thread")]
async fn runs_go_on_through_a_server_that_is_rolled() {
    let place = Place::new();
    let mut config = place.server();
    config.store.dir = place.dir.path().join("undisturbed");
    let server = TestServer::start_with(config).await;
    let long = |endpoint: &str, output: &str| {
        let mut options = place.options_at(endpoint, output);
        options.steps.max_steps = Some(40);
        (options.output.save_interval, options.evaluation.interval) = (15, 1000);
        options
    };
    let straight = run(long(&server.endpoint(), "straight")).await;
    server.drain().await;

    let mut config = place.server();
    config.session.snapshot_seconds = 0.0;
    let mut child = Child::start_with(&config);
    let proxy = Proxy::start(child.address()).await.unwrap();
    let outputs = ["one", "two"];
    let dirs: Vec<PathBuf> = outputs.iter().map(|name| place.dir.path().join(name)).collect();
    let running =
        outputs.map(|output| begin(long(&proxy.endpoint(), output), CancelToken::default()));
    for roll in 0..4 {
        let before: Vec<u64> = dirs.iter().map(|dir| n_steps(dir)).collect();
        until("two steps of each", async || {
            dirs.iter().zip(&before).all(|(dir, before)| n_steps(dir) >= before + 2)
        })
        .await;
        assert!(running.iter().all(|run| !run.is_finished()), "too quick to be disturbed");
        if roll % 2 == 0 {
            config.store.wait_seconds = 0.0;
            child.drain();
            child = Child::start_with(&config);
        } else {
            config.store.wait_seconds = 60.0;
            // The runs shall not come to their end meanwhile.
            proxy.hold(true);
            let next = Starting::begin(&config);
            next.standby();
            proxy.hold(false);
            child.terminate();
            let next = next.ready();
            assert!(child.ended().success());
            child = next;
        }
        proxy.set_upstream(Some(child.address()));
    }
    for run in running {
        let found = run.await.unwrap().unwrap();
        assert!(found.rollbacks.is_empty(), "{:?}", found.rollbacks);
        assert_eq!(found.losses, straight.losses);
        assert_same_adapters(found.adapter.as_ref().unwrap(), straight.adapter.as_ref().unwrap());
    }
    child.drain();
}
