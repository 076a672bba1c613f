//! A cluster of three brokers that loses its leader, is restarted node by node, and loses its majority,
//! while two workers serve: nothing else goes wrong here, so nobody may notice.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::simulator::Simulator;

use super::fleet::{CLUSTER, held};
use super::oracle::Books;
use super::private::{POSTGRES, Private};
use super::traffic::{self, Load, PREFIX, Traffic, Watch};
use super::workers::{Setting, Worker};

/// Jobs a second while all that happens.
const RATE: usize = 50;
/// Jobs that are answered before each event, and while a node is away.
const BETWEEN: usize = 100;

/// `None` where there is no cluster or no database to be had.
pub(crate) async fn run(
    jobs: usize,
    simulator: &Arc<Simulator>,
    directory: &Path,
) -> Option<Books> {
    let cluster = CLUSTER.start("calm").await?;
    let database = POSTGRES.start("calm").await?;
    let setting = Setting {
        amqp: cluster.url.clone(),
        creem: simulator.url(),
        ledger: database.url.clone(),
        directory: directory.to_owned(),
    };
    let mut workers =
        ["one", "two"].map(|name| Worker::start(setting.clone(), &format!("calm-{name}")));
    let traffic = traffic::start(&cluster.url, Load { jobs, per_second: Some(RATE) });
    let mut progress = Progress { traffic: &traffic, workers: &mut workers, jobs };
    for queue in ["replies", "jobs"] {
        progress.answers(BETWEEN).await;
        let leader = leader(&cluster, queue).await;
        cluster.ask("kill-node", &[&leader]).await.unwrap();
        // All goes on without that node.
        progress.answers(BETWEEN).await;
        cluster.ask("start-node", &[&leader]).await.unwrap();
    }
    cluster.ask("rolling-restart", &[]).await.unwrap();
    progress.answers(BETWEEN).await;
    for node in ["1", "2"] {
        cluster.ask("kill-node", &[node]).await.unwrap();
    }
    for node in ["1", "2"] {
        cluster.ask("start-node", &[node]).await.unwrap();
    }
    progress.answers(jobs).await;
    traffic::drained(&cluster.url).await;
    for worker in workers {
        worker.stop().await;
    }
    let mut books = traffic.close().await;
    books.faults_of_ours = vec![
        ("broker leaders killed", 2),
        ("rolling restarts", 1),
        ("times no majority was left", 1),
    ];
    books.close(simulator, held(&database.url).await);
    Some(books)
}

async fn leader(cluster: &Private, queue: &str) -> String {
    cluster.ask("leader", &[&format!("{PREFIX}.{queue}")]).await.unwrap()
}

struct Progress<'a> {
    traffic: &'a Traffic,
    workers: &'a mut [Worker],
    jobs: usize,
}

impl Progress<'_> {
    /// Waits for so many more answers, or the last one.
    async fn answers(&mut self, more: usize) {
        let due = (self.traffic.answered().await + more).min(self.jobs);
        let mut watch = Watch::new();
        loop {
            let answered = self.traffic.answered().await;
            if answered >= due {
                return;
            }
            watch.see(answered, due);
            self.workers.iter_mut().for_each(Worker::must_be_alive);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
