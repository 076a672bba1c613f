//! Rows made into links in this very process, by the journey that workers take.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::layout::Outcome;
use crate::clock::{Millis, as_millis};
use crate::job::reply::Reply;
use crate::job::{CheckoutRequest, Fingerprint, Key, Lane, RequestId, Status};
use crate::ledger::{Known, LedgerError, Stored};
use crate::worker::Fatal;
use crate::worker::ask::{Ask, LONGEST_HOLD};
use crate::worker::engine::Engine;
use crate::worker::gate::Reason;
use crate::worker::journey::Verdict;

/// How long to wait before a job is asked for again that another process has.
const AGAIN: Duration = Duration::from_secs(1);

/// A silence that Creem asks for is told of if it is no shorter.
const LONG_SILENCE: Duration = Duration::from_secs(5);

/// What makes links here.
#[derive(Debug)]
pub struct Inside {
    /// The journey.
    pub engine: Arc<Engine>,
    /// The campaign that all rows belong to.
    pub campaign: Option<String>,
    /// When the run began: then all rows count as published, so that a campaign that is cancelled is so to its
    /// last row.
    pub began_at: Millis,
}

impl Inside {
    /// What all rows wait for, if they do, and what to do about it.
    #[must_use]
    pub fn held(&self) -> Option<Cow<'static, str>> {
        let journey = &self.engine.journey;
        if journey.orders.is_paused(Lane::Bulk) {
            let text = "the bulk lane of this ledger is paused; checkout-worker resume --lane bulk goes on";
            return Some(text.into());
        }
        let reasons = [
            (
                Reason::Key,
                "Creem refuses the API key; Ctrl-C, set the right one, and the same command goes on",
            ),
            (
                Reason::Circuit,
                "at least half of the last calls to Creem failed; one now and then shows whether it is back",
            ),
            (Reason::Ledger, "the ledger cannot be written; it is tried again"),
        ];
        let held = reasons.into_iter().find(|(reason, _)| journey.gate.is_closed_by(*reason));
        let silence = journey.pacer.silence();
        held.map(|(_, text)| text.into())
            .or_else(|| (silence >= LONG_SILENCE).then(|| journey.pacer.explain().1.into()))
    }

    /// What the ledger knows of a job, if it knows it.
    ///
    /// # Errors
    /// If the ledger cannot be asked.
    pub async fn known(&self, request_id: RequestId) -> Result<Option<Known>, LedgerError> {
        let key = Key { mode: self.engine.mode, request_id };
        self.engine.journey.ledger.known(key).await
    }

    /// Whether the ledger has made that link for that id; for what is no id it has made none.
    ///
    /// # Errors
    /// If the ledger cannot be asked.
    pub async fn has_made(&self, request_id: &str, checkout_id: &str) -> Result<bool, LedgerError> {
        let Ok(request_id) = RequestId::parse(request_id) else { return Ok(false) };
        let known = self.known(request_id).await?.and_then(|known| known.checkout_id);
        Ok(known.as_deref() == Some(checkout_id))
    }

    /// Brings a row's job to its end; `None` if it was not begun, because everything ends. With `only_known` its deadline
    /// has passed in 1970: it gets what the ledger has, or `expired`, and Creem is never called.
    pub async fn make(&self, request: CheckoutRequest, only_known: bool) -> Option<Outcome> {
        let journey = &self.engine.journey;
        let secret = &journey.ledger.identity().secret;
        let mut ask = Ask {
            key: Key { mode: self.engine.mode, request_id: request.request_id.clone() },
            fingerprint: Fingerprint::of(&request.members, secret),
            request,
            lane: Lane::Bulk,
            campaign: self.campaign.clone(),
            deadline: only_known.then_some(0),
            published_at: Some(published_at(
                self.began_at,
                journey.clock.now(),
                journey.rules.retention,
            )),
            // A row's time to be tried begins when its turn comes.
            picked_up_at: journey.clock.now(),
            redelivered: false,
            elsewhere: false,
            look_first: false,
            // There is no delivery that could be lost.
            session: CancellationToken::new(),
            hold_until: Instant::now() + LONGEST_HOLD,
            permits: Arc::new(Semaphore::new(0)),
        };
        loop {
            let (verdict, _turn) = journey.run(&ask).await;
            let wait = match verdict {
                Verdict::Reply(stored) => return Some(outcome(&stored)),
                Verdict::Conflict(fields) => return Some(conflict(&fields)),
                Verdict::Damaged(what) => {
                    return Some(problem(Status::Unresolved, "ledger_row_damaged", &what));
                }
                Verdict::Panicked => {
                    let text = "this program met a bug while it handled the row";
                    return Some(problem(Status::Unresolved, "worker_panicked", text));
                }
                Verdict::Fatal(error) => {
                    self.engine.end(Fatal::Broken(error.to_string()));
                    return None;
                }
                Verdict::GiveBack if journey.stop.is_cancelled() => return None,
                // Its lane is paused.
                Verdict::GiveBack => Duration::ZERO,
                Verdict::Delay { wait, .. } => wait,
                Verdict::Abandon => AGAIN,
            };
            let again = async {
                journey.orders.resumed(Lane::Bulk).await;
                tokio::time::sleep(wait).await;
            };
            tokio::select! {
                () = again => {}
                () = journey.stop.cancelled() => return None,
            }
            ask.hold_until = Instant::now() + LONGEST_HOLD;
        }
    }
}

/// What a stored reply says.
fn outcome(stored: &Stored) -> Outcome {
    read_reply(&stored.reply).unwrap_or_else(|| {
        problem(stored.status, "reply_unreadable", "the ledger's reply cannot be read (a bug)")
    })
}

/// What a reply says, if it is one.
#[must_use]
pub fn read_reply(bytes: &[u8]) -> Option<Outcome> {
    let reply: Reply = serde_json::from_slice(bytes).ok()?;
    let (code, message) = reply.error.map(|error| (error.code, error.message)).unzip();
    Some(Outcome {
        status: Status::parse(&reply.status)?,
        checkout_id: reply.checkout_id,
        checkout_url: reply.checkout_url,
        error_code: code,
        error_message: message,
    })
}

fn conflict(fields: &[String]) -> Outcome {
    let text = format!(
        "this request_id has, or may have, a link for another row; they differ in {}",
        fields.join(", ")
    );
    problem(Status::Conflict, "request_id_reused", &text)
}

/// An outcome without a link.
#[must_use]
pub fn problem(status: Status, code: &str, message: &str) -> Outcome {
    Outcome {
        status,
        checkout_id: None,
        checkout_url: None,
        error_code: Some(code.to_owned()),
        error_message: Some(message.to_owned()),
    }
}

/// When a row counts as published that is begun now: with its run, as cancelling means all that were there before, and
/// yet never so long ago that the ledger may have forgotten it, however long the run.
fn published_at(began_at: Millis, now: Millis, retention: Duration) -> Millis {
    began_at.max(now - as_millis(retention / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_a_long_run_do_not_grow_too_old() {
        let day = Duration::from_hours(24);
        let now = as_millis(day * 100);
        let of_a_run = |days: u32| now - published_at(now - as_millis(day * days), now, day * 7);
        assert_eq!(of_a_run(3), as_millis(day * 3));
        assert_eq!(of_a_run(30), as_millis(day * 7 / 2));
    }
}
