//! One worker with the embedded ledger, and a broker that goes down.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::simulator::Simulator;

use super::Plan;
use super::oracle::{Books, Held};
use super::private::{BROKER, Private};
use super::traffic::{self, Load, Traffic, Watch};
use super::workers::{Setting, Worker};

/// `None` where there is no broker to be had.
pub(crate) async fn run(
    plan: &Plan,
    simulator: &Arc<Simulator>,
    directory: &Path,
) -> Option<Books> {
    let broker = BROKER.start("chaos").await?;
    let ledger = directory.join("ledger.db");
    let setting = Setting {
        amqp: broker.url.clone(),
        creem: simulator.url(),
        ledger: format!("sqlite:{}", ledger.display()),
        directory: directory.to_owned(),
    };
    let mut worker = Worker::start(setting, "worker");
    let traffic = traffic::start(&broker.url, Load { jobs: plan.jobs, per_second: None });
    disturb(plan, &broker, &mut worker, &traffic).await;
    wait_for_answers(&traffic, plan.jobs, &mut worker).await;
    traffic::drained(&broker.url).await;
    worker.stop().await;
    let mut books = traffic.close().await;
    books.faults_of_ours = vec![
        ("worker killed with kill -9", plan.kills),
        ("broker restarted or killed", plan.restarts),
    ];
    books.close(simulator, held(&ledger));
    Some(books)
}

/// Faults, spread over the jobs: each comes when its share of them has been answered.
async fn disturb(plan: &Plan, broker: &Private, worker: &mut Worker, traffic: &Traffic) {
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let events = plan.kills + plan.restarts;
    for event in 0..events {
        // Somewhere in its share of the run, as the seed has it.
        let share = plan.jobs / (events + 1);
        let within = random.usize(0..share.max(1));
        let due = share * event + share / 2 + within;
        wait_for_answers(traffic, due.min(plan.jobs.saturating_sub(1)), worker).await;
        // The restarts lie evenly among the kills.
        let restarts_by = |event: usize| event * plan.restarts / events;
        if restarts_by(event + 1) > restarts_by(event) {
            broker.act(if event % 2 == 0 { "restart" } else { "kill" }).await;
            broker.act("start").await;
        } else {
            worker.kill_and_start().await;
        }
    }
}

/// Waits until so many distinct jobs have an answer.
async fn wait_for_answers(traffic: &Traffic, count: usize, worker: &mut Worker) {
    let mut watch = Watch::new();
    loop {
        let answered = traffic.answered().await;
        if answered >= count {
            return;
        }
        watch.see(answered, count);
        worker.must_be_alive();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn held(ledger: &Path) -> Held {
    let inspector = Inspector::open(ledger).unwrap();
    let report = inspector.report();
    let mut held = Held { damage: report.damage, ..Held::default() };
    inspector
        .rows(|row| {
            let (key, row) = row.unwrap();
            held.ambiguous.insert(key.request_id.to_string(), row.ambiguous);
            for orphan in inspector.orphans(&key).unwrap() {
                held.orphans.push((key.request_id.to_string(), orphan.checkout_id));
            }
        })
        .unwrap();
    held
}
