//! What a run in this process needs before its first row: the ledger, and what makes links with it.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::task::JoinSet;

use super::Arguments;
use crate::bulk::inside::Inside;
use crate::cli::look::shown;
use crate::cli::{Failure, engine, say_error};
use crate::config::check::{Ledger, Resolved};
use crate::job::Lane;
use crate::ledger::Standing;
use crate::lifecycle::Stages;
use crate::observe::health::Health;
use crate::worker::Fatal;

/// What makes links, and what it needs beside it.
pub(super) struct Begun {
    pub(super) inside: Inside,
    pub(super) stages: Stages,
    pub(super) tasks: JoinSet<()>,
    /// How many rows at once.
    pub(super) at_once: usize,
}

/// Opens the ledger and puts together what makes links; `None` if the program is stopped before.
pub(super) async fn begin(
    settings: &Resolved,
    arguments: &Arguments,
) -> Result<Option<Begun>, Failure> {
    let stages = Stages::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(stages.follow_signals(settings.grace).context("signals cannot be listened for")?);
    let health = Health::default();
    let new = matches!(&settings.ledger, Ledger::File(path) if !path.exists());
    let opened = engine::open(&settings.ledger, &health, &stages).await;
    let opened = opened.map_err(|failure| at_the_ledger(failure, &settings.ledger))?;
    let Some(opened) = opened else { return Ok(None) };
    if opened.ledger.identity().standing == Standing::Refused {
        return Err(Failure::Failed(Fatal::EmptyLedger.into()));
    }
    if new {
        say_error(&format!(
            "a new ledger, which knows of no links yet: {}",
            shown(&settings.ledger)
        ));
    }
    let began_at = opened.clock.now();
    let mut engine = engine::engine(settings, opened, health, stages.soft.clone())?;
    // No row is older than this run: it is begun when its turn comes.
    engine.journey.rules.bulk.max_age = None;
    let engine = Arc::new(engine);
    engine.look().await;
    // Before the first outcome: whoever removes old ones is to know.
    let told = engine.tell_retention().await;
    told.with_context(|| shown(&settings.ledger))?;
    engine.watch(&mut tasks);
    let (broken, soft) = (engine.clone(), stages.soft.clone());
    tasks.spawn(async move {
        broken.broken().await;
        soft.cancel();
    });
    let size = settings.lanes.iter().find(|size| size.lane == Lane::Bulk);
    let at_once = size.map_or(1, |size| usize::from(size.concurrency));
    let inside = Inside { engine, campaign: arguments.campaign.clone(), began_at };
    Ok(Some(Begun { inside, stages, tasks, at_once }))
}

fn at_the_ledger(failure: Failure, ledger: &Ledger) -> Failure {
    match failure {
        Failure::Failed(error) => Failure::Failed(error.context(shown(ledger))),
        other @ (Failure::Usage(_) | Failure::Configuration(_)) => other,
    }
}
