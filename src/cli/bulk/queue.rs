//! `bulk --via-queue`: the rows as jobs of the bulk lane, and their replies out of a queue of the run's own.
//!
//! The queue is named after the output, so that replies to a run that was killed have somewhere to go until it
//! goes on. What was sent twice is answered alike: the workers' ledger sees to that.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::Arguments;
use super::guard::made_elsewhere;
use super::open::opened;
use super::progress::Shown;
use super::summary::{ended, interrupted};
use crate::bulk;
use crate::bulk::given::GivenLinks;
use crate::bulk::inside::read_reply;
use crate::bulk::layout::{EarlierLink, Outcome as Made};
use crate::bulk::output::OutputError;
use crate::cli::enqueue::publish;
use crate::cli::{Failure, Outcome, say_error};
use crate::clock::{Clock as _, Millis, SystemClock};
use crate::config::check::Resolved;
use crate::job::json::Node;
use crate::job::reply::{digest, rfc3339};
use crate::job::{CheckoutRequest, Lane, Status};
use crate::lifecycle::Stages;
use crate::rabbit::publisher;
use crate::rabbit::replies::ReplyQueue;
use crate::rabbit::{Message, Publisher, headers};
use crate::retry::Backoff;

/// Rows that are in the queue or on their way back at once.
const AT_ONCE: usize = 2_048;
/// How long no reply comes before that is said.
const SILENCE: Duration = Duration::from_secs(15);

/// A deadline that is over, in milliseconds before now.
const LONG_AGO: Millis = 24 * 3_600_000;

/// Who waits for which reply.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Made>>>>;

pub(super) async fn run(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let (input, bytes, earlier) = opened(settings, arguments, out)?;
    let name = queue_name(settings, out);
    let replies = open(settings, &name, out).await?;
    let links = GivenLinks::read(earlier.links()).with_context(|| out.display().to_string())?;
    let precheck = Precheck::new(links, out);
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
        let turn = precheck.turn(request.request_id.as_str());
        let (sender, precheck, stages, fail) = (&sender, &precheck, &stages, &fail);
        async move {
            tokio::select! {
                made = sender.send_in_turn(precheck, turn, number, request) => match made {
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
    // The part may be of other workers, whatever the queues are called.
    let noted = |proof| precheck.note_all(proof).map_err(|error| fail(error.into()));
    let prove = async |proof: bulk::Proof| match noted(proof) {
        Ok(Some(given)) => send(given.number, given.request).await.is_some(),
        noted => noted.is_ok(),
    };
    let running = bulk::run(input, earlier, AT_ONCE, prove, send, &stages.soft, |progress| {
        shown.tell(progress, None);
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

/// Makes the queue for the run's replies, or finds it again.
async fn open(settings: &Resolved, name: &str, out: &Path) -> Result<ReplyQueue, Failure> {
    if !settings.replies.allows(name) {
        return Err(Failure::Failed(anyhow!(
            "`replies.allow` does not allow {name}: workers with these settings would park every row; allow {}*",
            settings.topology.run_replies("")
        )));
    }
    let exchange = &settings.topology.replies_exchange;
    let replies =
        ReplyQueue::open_named(&settings.amqp, "checkout-worker bulk", exchange, name).await;
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
                    "no reply for 15 s: is a worker running for these queues, is the bulk lane paused, is its rate limit low? What was parked is not answered: look into the dead queue. Ctrl-C and the same command ask again",
                );
                continue;
            }
            Ok(Err(error)) => return fail(anyhow!(error)),
            Ok(Ok(reply)) => reply,
        };
        let Some(made) = read_reply(&reply.body) else { continue };
        let (row, of) = reply.correlation_id.split_once(BETWEEN).unwrap_or_default();
        // An earlier run's may be of other workers, with another key; this run's own follows.
        if of != run {
            continue;
        }
        // Nobody waits for the second of two replies, nor for one to a row that was written before.
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waits) = waiting.remove(row) {
            drop(waits.send(made));
        }
    }
}

/// Sees to it that no row is given a second link by workers that do not know its first: they may have another
/// ledger, or one that has forgotten it. A row with a link is sent with a deadline that is over, so
/// that it gets what the ledger has, or nothing. Rows without one wait, from the first with one on, until the
/// workers have shown that they know one.
struct Precheck<'a> {
    links: RefCell<GivenLinks>,
    out: &'a Path,
    met: Cell<bool>,
    known: watch::Sender<bool>,
}

/// How a row may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// At once.
    Free,
    /// At once, and only to learn what the ledger has.
    Probe,
    /// When a probe has shown that the workers know a link.
    Held,
}

impl<'a> Precheck<'a> {
    fn new(links: GivenLinks, out: &'a Path) -> Self {
        let (links, known) = (RefCell::new(links), watch::Sender::new(false));
        Self { links, out, met: Cell::new(false), known }
    }

    /// Takes note of an interrupted run's links; returns the row that is to show whether the workers know them.
    fn note_all(&self, proof: bulk::Proof) -> Result<Option<bulk::Given>, OutputError> {
        let mut links = self.links.borrow_mut();
        for link in proof.cut_off {
            let EarlierLink { request_id, checkout_id } = link?;
            links.note(&request_id, &checkout_id);
        }
        if let Some(given) = &proof.given {
            links.note(given.request.request_id.as_str(), &given.checkout_id);
        }
        Ok(proof.given)
    }

    /// Asked for each row, in their order.
    fn turn(&self, request_id: &str) -> Turn {
        if self.links.borrow().has(request_id) {
            self.met.set(true);
            Turn::Probe
        } else if self.met.get() {
            Turn::Held
        } else {
            Turn::Free
        }
    }

    /// A ledger that has the link answers the same job with it, and another one with a conflict.
    fn judge(&self, request_id: &str, made: &Made) -> anyhow::Result<()> {
        if !self.links.borrow().fits(request_id, made) {
            let status = made.status;
            let ledger = format!("the workers' ledger (it says {status})");
            let advice = "Use the workers that made them";
            return Err(made_elsewhere(request_id, None, self.out, &ledger, advice));
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
    /// Tells this run's replies from those of an earlier one.
    run: &'a str,
}

impl Sender<'_> {
    async fn send_in_turn(
        &self,
        precheck: &Precheck<'_>,
        turn: Turn,
        number: u64,
        request: CheckoutRequest,
    ) -> anyhow::Result<Option<Made>> {
        if turn == Turn::Held {
            precheck.known.subscribe().wait_for(|known| *known).await?;
        }
        let id = request.request_id.clone();
        let made = self.send(number, request, turn == Turn::Probe).await?;
        if let (Turn::Probe, Some(made)) = (turn, &made) {
            precheck.judge(id.as_str(), made)?;
        }
        if made.as_ref().is_some_and(|made| made.status == Status::Cancelled) {
            // What is published from now on would be served.
            anyhow::bail!(
                "its campaign was cancelled, so nothing more is sent. Run the command again only if these rows are to be sold after all"
            );
        }
        Ok(made)
    }

    /// Publishes a row's job and waits for its reply; `only_known`, it gets none but what the ledger has.
    async fn send(
        &self,
        number: u64,
        request: CheckoutRequest,
        only_known: bool,
    ) -> anyhow::Result<Option<Made>> {
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
        let message = if only_known {
            // Longer ago than clocks differ.
            message.with_header(headers::DEADLINE, &rfc3339(SystemClock.now() - LONG_AGO))
        } else {
            message
        };
        let (waits, made) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(row, waits);
        publish(self.publisher, message).await?;
        Ok(made.await.ok())
    }
}
