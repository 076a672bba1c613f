//! `bulk --via-queue`: the rows as jobs of the bulk lane, and their replies out of a queue of the run's own.
//!
//! The queue is named after the output, so that a run that goes on finds what was answered meanwhile. What was
//! sent twice is answered alike: the workers' ledger sees to that.

use std::cell::Cell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::progress::Shown;
use super::{Arguments, input, interrupted, summary};
use crate::bulk;
use crate::bulk::inside::read_reply;
use crate::bulk::output::{Earlier, EarlierLink, Outcome as Made, Shape, part_of};
use crate::cli::enqueue::publish;
use crate::cli::{Failure, Outcome, say_error};
use crate::clock::{Clock as _, SystemClock};
use crate::config::check::Resolved;
use crate::job::json::Node;
use crate::job::reply::digest;
use crate::job::{CheckoutRequest, Lane, Status, printable};
use crate::lifecycle::Stages;
use crate::rabbit::publisher;
use crate::rabbit::replies::ReplyQueue;
use crate::rabbit::{Message, Publisher, headers};
use crate::retry::Backoff;

/// Rows that are in the queue or on their way back at once.
const AT_ONCE: usize = 2_048;
/// How long no reply comes before that is said.
const SILENCE: Duration = Duration::from_secs(60);

/// Who waits for which reply.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Made>>>>;

pub(super) async fn run(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let (input, bytes) = input(settings, arguments)?;
    let shape = Shape::new(input.format(), input.names(), input.shows_ids());
    let earlier = Earlier::look(out, shape, arguments.run(settings))?;
    if earlier.was_interrupted() {
        say_error(&format!("going on with {}", part_of(out).display()));
    }
    let name = queue_name(settings, out);
    // Replies to a run that is not gone on with may be of other workers, with another key.
    let replies = open(settings, &name, out, !earlier.was_interrupted()).await?;
    let before = Before::new(earlier.link().cloned());
    let stages = Stages::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(stages.follow_signals(settings.grace).context("signals cannot be listened for")?);
    let (publisher, keep) = Publisher::new(
        settings.amqp.clone(),
        "checkout-worker bulk".to_owned(),
        Backoff::of_reconnects(),
        publisher::Shape::WIDE,
        stages.hard.clone(),
    );
    tasks.spawn(keep);
    let waiting = Waiting::default();
    let broken: Arc<Mutex<Option<anyhow::Error>>> = Arc::default();
    let (fails, soft) = (broken.clone(), stages.soft.clone());
    let fail = move |error: anyhow::Error| {
        fails.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        soft.cancel();
    };
    let run = format!("{:08x}", getrandom::u32().context("no random bytes")?);
    tasks.spawn(collect(replies, waiting.clone(), run.clone(), fail.clone()));
    let sender = Sender {
        settings,
        arguments,
        publisher: &publisher,
        reply_to: &name,
        waiting: &waiting,
        run: &run,
    };
    let send = |number: u64, request: CheckoutRequest| {
        let turn = before.turn(&request);
        let (sender, before, stages, fail) = (&sender, &before, &stages, &fail);
        async move {
            tokio::select! {
                made = sender.send_in_turn(before, turn, number, request) => match made {
                    Ok(made) => made,
                    Err(error) => {
                        fail(error.context(format!("row {number}")));
                        None
                    }
                },
                () = stages.soft.cancelled() => None,
            }
        }
    };
    let mut shown = Shown::new(bytes);
    let running = bulk::run(input, earlier, AT_ONCE, send, &stages.soft, |progress| {
        shown.tell(progress);
    });
    let ran = tokio::select! {
        ran = running => ran,
        () = stages.hard.cancelled() => return Err(interrupted(0, out)),
    };
    shown.finish();
    tasks.shutdown().await;
    let broken = broken.lock().unwrap_or_else(PoisonError::into_inner).take();
    ended(&ran?, broken, arguments, out)
}

fn ended(
    tally: &bulk::Tally,
    broken: Option<anyhow::Error>,
    arguments: &Arguments,
    out: &Path,
) -> Outcome {
    match broken {
        Some(error) => Err(Failure::Failed(error.context(format!(
            "stopped after {} rows; the same command goes on with {}",
            tally.rows,
            part_of(out).display()
        )))),
        None => summary(tally, arguments, out),
    }
}

/// Makes the queue for the run's replies, or finds it again.
async fn open(
    settings: &Resolved,
    name: &str,
    out: &Path,
    emptied: bool,
) -> Result<ReplyQueue, Failure> {
    if !settings.replies.allows(name) {
        return Err(Failure::Failed(anyhow!(
            "`replies.allow` does not allow {name}: workers with these settings would park every row; allow {}*",
            settings.topology.run_replies("")
        )));
    }
    let exchange = &settings.topology.replies_exchange;
    let replies =
        ReplyQueue::open_named(&settings.amqp, "checkout-worker bulk", exchange, name, emptied)
            .await;
    let why = || {
        format!(
            "the queue {name} for replies; check AMQP_URL, this user's permissions, and that no other run writes {}",
            out.display()
        )
    };
    Ok(replies.with_context(why)?)
}

/// A name that the same output has again.
fn queue_name(settings: &Resolved, out: &Path) -> String {
    let whole = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    settings.topology.run_replies(&digest(&[whole.as_os_str().as_encoded_bytes()])[..16])
}

/// Between a row's own part of a correlation id and the run's.
const BETWEEN: char = '~';

/// Takes every reply to whoever waits for it.
async fn collect(
    mut replies: ReplyQueue,
    waiting: Waiting,
    run: String,
    fail: impl Fn(anyhow::Error),
) {
    loop {
        let reply = match tokio::time::timeout(SILENCE, replies.next()).await {
            Err(_) => {
                say_error(
                    "no reply for a minute: is a worker running for these queues, is the bulk lane paused, is its rate limit low? What was parked is not answered: look into the dead queue. Ctrl-C and the same command ask again",
                );
                continue;
            }
            Ok(Err(error)) => return fail(anyhow!(error)),
            Ok(Ok(reply)) => reply,
        };
        let Some(made) = read_reply(&reply.body) else { continue };
        let (row, of) = reply.correlation_id.split_once(BETWEEN).unwrap_or_default();
        // A link is one whichever run asked for it; why an earlier one got none says nothing of this one.
        if of != run && made.status != Status::Succeeded {
            continue;
        }
        // Nobody waits for the second of two replies, nor for one to a row that was written before.
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waits) = waiting.remove(row) {
            drop(waits.send(made));
        }
    }
}

/// A link that an earlier run has left: whoever does not know it would make all of them a second time. So rows behind
/// the one that it is of wait until the workers have given that one the same again.
struct Before {
    link: Option<EarlierLink>,
    met: Cell<bool>,
    known: watch::Sender<bool>,
}

/// When a row may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Now,
    /// And its reply decides about those behind it.
    First,
    Behind,
}

impl Before {
    fn new(link: Option<EarlierLink>) -> Self {
        Self { link, met: Cell::new(false), known: watch::Sender::new(false) }
    }

    /// Asked for each row, in their order.
    fn turn(&self, request: &CheckoutRequest) -> Turn {
        let Some(link) = &self.link else { return Turn::Now };
        if self.met.get() {
            return Turn::Behind;
        }
        let first = link.request_id == request.request_id.as_str();
        self.met.set(first);
        if first { Turn::First } else { Turn::Now }
    }

    fn judge(&self, made: &Made) -> anyhow::Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        if made.status == Status::Succeeded && made.checkout_id.as_ref() != Some(&link.checkout_id)
        {
            return Err(anyhow!(
                "the output has a link for {} ({}) that the workers' ledger has not made: its links are of another ledger, key or mode, or older than ledger.retention, and would be made a second time. Give another --out, or remove the file if nobody was given its links",
                printable(&link.request_id, 128),
                printable(&link.checkout_id, 128)
            ));
        }
        self.known.send_replace(true);
        Ok(())
    }
}

struct Sender<'a> {
    settings: &'a Resolved,
    arguments: &'a Arguments,
    publisher: &'a Publisher,
    reply_to: &'a str,
    waiting: &'a Waiting,
    /// Tells this run's replies from those of one that was interrupted.
    run: &'a str,
}

impl Sender<'_> {
    async fn send_in_turn(
        &self,
        before: &Before,
        turn: Turn,
        number: u64,
        request: CheckoutRequest,
    ) -> anyhow::Result<Option<Made>> {
        if turn == Turn::Behind {
            before.known.subscribe().wait_for(|known| *known).await?;
        }
        let made = self.send(number, request).await?;
        if let (Turn::First, Some(made)) = (turn, &made) {
            before.judge(made)?;
        }
        Ok(made)
    }

    /// Publishes a row's job and waits for its reply.
    async fn send(&self, number: u64, request: CheckoutRequest) -> anyhow::Result<Option<Made>> {
        let mut body = Vec::new();
        Node::Object(request.members).write_to(&mut body);
        // A reply from before the input was changed must not be taken for this row's.
        let row = format!("{number}-{}", &digest(&[&body])[..16]);
        let correlation = format!("{row}{BETWEEN}{}", self.run);
        let message = Message::job(
            &self.settings.topology,
            Lane::Bulk,
            Arc::from(body),
            Some(self.reply_to),
            &correlation,
            SystemClock.now(),
        )?;
        let message = match &self.arguments.campaign {
            Some(campaign) => message.with_header(headers::CAMPAIGN, campaign),
            None => message,
        };
        let (waits, made) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(row, waits);
        publish(self.publisher, message).await?;
        Ok(made.await.ok())
    }
}
