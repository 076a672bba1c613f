//! Several workers, one PostgreSQL, a cluster of three brokers: each of them dies again and again.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::ledger::postgres::Options;
use creem_checkout_worker::ledger::postgres::inspect::Inspector;
use creem_checkout_worker::simulator::Simulator;
use tokio::time::Instant;

use super::Plan;
use super::oracle::{Books, Held};
use super::private::{POSTGRES, Private, Service};
use super::traffic::{self, Load, PREFIX, Traffic, Watch};
use super::workers::{LEASE, Setting, Worker};

pub(crate) const CLUSTER: Service =
    Service { script: "broker-cluster", name: "a cluster of brokers" };
/// How often a worker is killed.
const KILL_EVERY: Duration = Duration::from_secs(2);
/// How long one is frozen: its lease is over, and others have its jobs.
const FROZEN: Duration = Duration::from_secs(LEASE.as_secs() + 2);
/// How long a broker that was killed stays away.
const BROKER_AWAY: Duration = Duration::from_secs(5);

/// `None` where there is no broker or no database to be had.
pub(crate) async fn run(
    plan: &Plan,
    simulator: &Arc<Simulator>,
    directory: &Path,
) -> Option<Books> {
    let count = plan.workers.unwrap_or(4);
    let cluster = CLUSTER.start("chaos").await?;
    let database = POSTGRES.start("chaos").await?;
    let setting = Setting {
        amqp: cluster.url.clone(),
        creem: simulator.url(),
        ledger: database.url.clone(),
        directory: directory.to_owned(),
    };
    let workers = (1..=count)
        .map(|number| Worker::start(setting.clone(), &format!("worker-{number}")))
        .collect();
    let load = Load { jobs: plan.jobs, per_second: Some(plan.rate) };
    let traffic = traffic::start(&cluster.url, load);
    let mut fleet = Fleet { workers, frozen: None, kills: 0, freezes: 0 };
    // What happens to the servers does not wait for what happens to the workers.
    let (servers, ()) = tokio::join!(
        disturb_servers(plan, &cluster, &database, &traffic),
        fleet.disturb(plan, &traffic),
    );
    let mut watch = Watch::new();
    loop {
        let answered = traffic.answered().await;
        if answered >= plan.jobs {
            break;
        }
        watch.see(answered, plan.jobs);
        fleet.workers.iter_mut().for_each(Worker::must_be_alive);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    traffic::drained(&cluster.url).await;
    for worker in fleet.workers {
        worker.stop().await;
    }
    let mut books = traffic.close().await;
    books.faults_of_ours = vec![
        ("workers", count),
        ("workers killed with kill -9", fleet.kills),
        ("workers frozen for 19 s", fleet.freezes),
    ];
    books.faults_of_ours.extend(servers);
    books.close(simulator, held(&database.url).await);
    Some(books)
}

struct Fleet {
    workers: Vec<Worker>,
    /// Which one is frozen, and until when.
    frozen: Option<(usize, Instant)>,
    kills: usize,
    freezes: usize,
}

impl Fleet {
    /// Kills one every two seconds, and freezes one at a time, until everything was published that will
    /// be, and every freeze is over.
    async fn disturb(&mut self, plan: &Plan, traffic: &Traffic) {
        let mut random = fastrand::Rng::with_seed(plan.seed);
        let mut watch = Watch::new();
        let mut tick = tokio::time::interval(KILL_EVERY);
        tick.tick().await;
        loop {
            tick.tick().await;
            self.workers.iter_mut().for_each(Worker::must_be_alive);
            self.freeze_or_wake(plan, &mut random);
            let answered = traffic.answered().await;
            // The last jobs are finished in peace.
            if answered >= plan.jobs * 99 / 100
                && self.frozen.is_none()
                && self.freezes == plan.freezes
            {
                return;
            }
            watch.see(answered + self.freezes, plan.jobs);
            let victim = self.one_awake(&mut random);
            self.workers[victim].kill_and_start().await;
            self.kills += 1;
        }
    }

    fn freeze_or_wake(&mut self, plan: &Plan, random: &mut fastrand::Rng) {
        match self.frozen {
            Some((worker, until)) if until <= Instant::now() => {
                self.workers[worker].signal("CONT");
                self.frozen = None;
            }
            None if self.freezes < plan.freezes => {
                let worker = self.one_awake(random);
                self.workers[worker].signal("STOP");
                self.frozen = Some((worker, Instant::now() + FROZEN));
                self.freezes += 1;
            }
            Some(_) | None => {}
        }
    }

    /// A worker that is not frozen.
    fn one_awake(&self, random: &mut fastrand::Rng) -> usize {
        let frozen = self.frozen.map(|frozen| frozen.0);
        let awake: Vec<usize> =
            (0..self.workers.len()).filter(|worker| Some(*worker) != frozen).collect();
        awake[random.usize(0..awake.len())]
    }
}

/// Restarts the database, kills the broker that leads the queue of jobs, and so on in turn.
async fn disturb_servers(
    plan: &Plan,
    cluster: &Private,
    database: &Private,
    traffic: &Traffic,
) -> Vec<(&'static str, usize)> {
    let (mut restarts, mut kills, mut leaders) = (0, 0, 0);
    for event in 0..plan.restarts {
        let due = plan.jobs * (event + 1) / (plan.restarts + 1);
        let mut watch = Watch::new();
        loop {
            let answered = traffic.answered().await;
            if answered >= due {
                break;
            }
            watch.see(answered, due);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match event % 3 {
            0 => {
                database.act("stop").await;
                restarts += 1;
            }
            1 => {
                kill_leader(cluster).await;
                leaders += 1;
                continue;
            }
            _ => {
                database.act("kill").await;
                kills += 1;
            }
        }
        database.act("start").await;
    }
    vec![
        ("PostgreSQL restarted", restarts),
        ("PostgreSQL killed", kills),
        ("broker leaders killed", leaders),
    ]
}

/// kill -9 of the node that leads the queue of interactive jobs; it comes back after a while.
async fn kill_leader(cluster: &Private) {
    let queue = format!("{PREFIX}.jobs");
    let leader = cluster.ask("leader", &[&queue]).await.unwrap();
    cluster.ask("kill-node", &[&leader]).await.unwrap();
    tokio::time::sleep(BROKER_AWAY).await;
    cluster.ask("start-node", &[&leader]).await.unwrap();
}

pub(crate) async fn held(url: &str) -> Held {
    let options = Options { url: url.to_owned().into(), ca_pem: None };
    let damage = Inspector::open(&options).await.unwrap().report().await.unwrap().damage;
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let rows =
        client.query("SELECT request_id, ambiguous FROM checkout_worker.job", &[]).await.unwrap();
    let ambiguous =
        rows.iter().map(|row| (row.get(0), u32::try_from(row.get::<_, i32>(1)).unwrap())).collect();
    let orphans = client
        .query("SELECT request_id, checkout_id FROM checkout_worker.orphan", &[])
        .await
        .unwrap();
    let orphans = orphans.iter().map(|row| (row.get(0), row.get(1))).collect();
    Held { ambiguous, orphans, damage }
}
