//! `run`: the only place where all parts meet.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;

use super::engine::{self, Opened};
use super::look::shown;
use super::{Failure, Outcome, block_on, count, resolved};
use crate::config::check::{self as config, Resolved};
use crate::job::Lane;
use crate::ledger::Identity;
use crate::lifecycle::Stages;
use crate::observe::health::Health;
use crate::observe::{admin, logging, metrics};
use crate::rabbit::Publisher;
use crate::rabbit::consumer::{Guard, Plan};
use crate::rabbit::publisher::Shape;
use crate::retry::Backoff;
use crate::worker::intake::Intake;
use crate::worker::settle::Settler;
use crate::worker::{LaneSize, Worker};

/// Serve.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The lanes to serve.
    #[arg(long, value_delimiter = ',', default_value = "interactive,bulk", value_parser = super::lane)]
    lanes: Vec<Lane>,
    /// Serve with a new ledger even if the broker redelivers jobs that some worker had taken
    /// before: links of theirs may exist that this ledger does not know.
    #[arg(long)]
    accept_empty_ledger: bool,
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let mut settings = resolved(file)?;
    settings.lanes.retain(|size| arguments.lanes.contains(&size.lane));
    logging::install(settings.log.0, &settings.log.1)
        .map_err(|why| Failure::Usage(format!("the log: {why}")))?;
    let handle = metrics::install().context("the metrics recorder cannot be installed")?;
    block_on(serve(settings, handle, arguments.accept_empty_ledger))?
}

async fn serve(
    settings: Resolved,
    handle: metrics_exporter_prometheus::PrometheusHandle,
    accept_empty_ledger: bool,
) -> Outcome {
    let health = Health::default();
    let stages = Stages::default();
    let mut background = JoinSet::new();
    let (address, admin) = admin::bind(settings.listen, health.clone(), handle)
        .await
        .with_context(|| {
            format!(
                "http.listen: {} cannot be bound; a second worker on one machine needs an address of its own, e.g. CHECKOUT_WORKER__HTTP__LISTEN=127.0.0.1:0",
                settings.listen
            )
        })?;
    background.spawn(admin);
    background.spawn(
        stages
            .follow_signals(settings.grace)
            .context("the signals SIGTERM and SIGINT cannot be listened for")?,
    );
    let stopping = (stages.soft.clone(), health.clone());
    background.spawn(async move {
        stopping.0.cancelled().await;
        stopping.1.set_stopping();
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        mode = settings.creem.mode.as_str(),
        creem = %settings.creem.base_url,
        ledger = shown(&settings.ledger),
        lanes = describe(&settings.lanes),
        http = %address,
        "starting"
    );
    super::bulk::refuse_its_ledger(&settings.ledger)?;
    let opened = engine::open(&settings.ledger, &health, &stages).await?;
    let Some(opened) = opened else { return Ok(()) };
    let worker =
        assemble(&settings, opened, health.clone(), &stages, &mut background, accept_empty_ledger)?;
    let ended = worker.run(stages.soft.clone(), stages.hard.clone()).await;
    // Whatever still runs serves a worker that has ended.
    background.shutdown().await;
    ended?;
    let left: usize = Lane::ALL.into_iter().map(|lane| health.in_flight(lane)).sum();
    if left > 0 {
        let left = count(left as u64, "job");
        return Err(Failure::Failed(anyhow::anyhow!(
            "left before everything was settled: {left} will be delivered again"
        )));
    }
    Ok(())
}

fn assemble(
    settings: &Resolved,
    opened: Opened,
    health: Health,
    stages: &Stages,
    background: &mut JoinSet<()>,
    accept_empty_ledger: bool,
) -> Result<Worker, Failure> {
    let name = |role: &str| format!("checkout-worker {} {role}", std::process::id());
    let (publisher, keep) = Publisher::new(
        settings.amqp.clone(),
        name("publish"),
        Backoff::of_reconnects(),
        Shape::WIDE,
        stages.hard.clone(),
    );
    background.spawn(keep);
    let (direct, keep) = Publisher::new(
        settings.amqp.clone(),
        name("publish direct replies"),
        Backoff::try_new(Duration::from_millis(50), Duration::from_secs(1))
            .expect("50 ms is less than a second"),
        Shape::SINGLE,
        stages.hard.clone(),
    );
    background.spawn(keep);
    let (ledger, clock) = (opened.ledger.clone(), opened.clock.clone());
    let identity = ledger.identity().clone();
    let lanes: Vec<LaneSize> = settings.lanes.clone();
    let engine = Arc::new(engine::engine(settings, opened, health, stages.soft.clone())?);
    Ok(Worker {
        plan: Plan {
            options: settings.amqp.clone(),
            name: name("consume"),
            topology: settings.topology.clone(),
            declare: settings.declare,
            guard: guard(settings, &identity),
        },
        lanes,
        intake: Intake {
            rules: settings.job.clone(),
            replies: settings.replies.clone(),
            mode: settings.creem.mode,
            secret: identity.secret.clone(),
        },
        engine,
        settler: Settler {
            publisher,
            direct,
            topology: settings.topology.clone(),
            backoff: Backoff::of_reconnects(),
            clock: clock.clone(),
            ledger,
            secret: identity.secret,
            declares: settings.declare,
        },
        backoff: Backoff::of_reconnects(),
        accept_empty_ledger,
    })
}

/// Who else may serve the same queues.
fn guard(settings: &Resolved, identity: &Identity) -> Guard {
    match (&settings.ledger, settings.declare) {
        (config::Ledger::File(_), _) => Guard::Alone,
        (config::Ledger::Database(_), false) => Guard::Nothing,
        (config::Ledger::Database(_), true) => {
            // It tells one ledger from another, and a restored one from the one that it is a copy of,
            // and nothing of the secret.
            let restored = identity.restored.unwrap_or(0).to_le_bytes();
            let mac = identity.secret.mac(&[b"mark of the ledger", &restored]);
            let mark = mac.first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
            Guard::Sharing(format!("{mark:032x}"))
        }
    }
}

/// The lane sizes as `lane=concurrency`, for a log line.
fn describe(lanes: &[LaneSize]) -> String {
    lanes
        .iter()
        .map(|size| format!("{}={}", size.lane, size.concurrency))
        .collect::<Vec<_>>()
        .join(" ")
}
