//! Carrying a verdict out: publish what replaces the message, know that it arrived, *then* ack.

mod place;

use std::sync::Arc;
use std::time::Duration;

use super::intake::Unfit;
use super::journey::Verdict;
use crate::clock::{SharedClock, as_duration};
use crate::job::{Key, LedgerSecret, Problem, Refusal, RequestId, Status, reply};
use crate::ledger::{Ledger, Stored};
use crate::observe::metrics;
use crate::rabbit::consumer::Acked;
use crate::rabbit::hop::{Hop, has_hop};
use crate::rabbit::outgoing::Parking;
use crate::rabbit::publisher::Class;
use crate::rabbit::topology::DELAYS;
use crate::rabbit::{Delivery, Envelope, LinkError, Message, Publisher, Topology};
use crate::retry::Backoff;
use place::{Placed, Sent};

/// How often a direct reply may take its connection down before the job is parked.
const DIRECT_TRIES: u32 = 2;

/// What is needed to carry verdicts out.
#[derive(Debug)]
pub struct Settler {
    /// Publishes.
    pub publisher: Publisher,
    /// Publishes direct replies, one at a time on a connection of their own: RabbitMQ 3.10 closes the
    /// whole connection over a malformed address, and only its own job may pay for that.
    pub direct: Publisher,
    /// Names.
    pub topology: Topology,
    /// Of the delays between tries.
    pub backoff: Backoff,
    /// Wall-clock time.
    pub clock: SharedClock,
    /// For notes about parked copies.
    pub ledger: Arc<dyn Ledger>,
    /// Signs hops.
    pub secret: LedgerSecret,
    /// Whether a new session declares a queue of the worker's own that is missing.
    pub declares: bool,
}

/// How a message left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Its replacement is known to be in a queue, and it was acked.
    Acked,
    /// It will be delivered again.
    ComesAgain,
}

/// The last word on one delivery, for the log and the metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The status or what happened instead, e.g. `succeeded`, `delayed`.
    pub verdict: &'static str,
    /// `error.code`, if there is one.
    pub code: Option<String>,
    /// Calls sent.
    pub attempts: u32,
    /// How the message left.
    pub left: Left,
}

/// A delivery, and what is known of it.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// The message.
    pub delivery: &'a Delivery,
    /// Its properties, read.
    pub envelope: &'a Envelope,
    /// Its job's id, where it could be read.
    pub request_id: Option<&'a RequestId>,
}

impl Settler {
    /// Carries a job's verdict out.
    pub async fn carry_out(
        &self,
        case: Case<'_>,
        key: &Key,
        hop: Hop,
        verdict: Verdict,
    ) -> Summary {
        let summary = |verdict, code, attempts, left| Summary { verdict, code, attempts, left };
        match verdict {
            Verdict::Reply(stored) => self.reply(case, key, stored).await,
            Verdict::Conflict(fields) => {
                let refusal = Problem {
                    details: fields,
                    ..Problem::new(
                        "request_id_reused",
                        "this request_id has, or may have, a link for another body",
                    )
                };
                self.answer(case, Status::Conflict, &refusal).await
            }
            Verdict::Delay { wait, why } => {
                let left = self.delay(case.delivery, wait, hop).await;
                summary("delayed", Some(why.to_owned()), 0, left)
            }
            // Each time counts against it, and nothing is wrong with it.
            Verdict::GiveBack if case.delivery.nears_its_limit() => {
                let left = self.delay(case.delivery, Duration::ZERO, hop).await;
                summary("delayed", Some("given_back_often".to_owned()), 0, left)
            }
            Verdict::GiveBack => {
                case.delivery.give_back().await;
                summary("given_back", None, 0, Left::ComesAgain)
            }
            Verdict::Abandon => {
                // Harmless where the session is over; elsewhere nobody else would free the slot.
                case.delivery.give_back().await;
                summary("abandoned", None, 0, Left::ComesAgain)
            }
            Verdict::Damaged(what) => {
                tracing::error!(job.key = %key, what, "a row of the ledger is damaged; the job is parked, as nobody knows whether it has a link; `checkout-worker check --ledger` lists every damaged row");
                self.park(case, "ledger_row_damaged", &what, 0).await
            }
            Verdict::Panicked => self.park_panicked(case).await,
            Verdict::Fatal(error) => {
                tracing::error!(job.key = %key, %error, "the job is left to whoever serves next");
                summary("ledger_stopped", None, 0, Left::ComesAgain)
            }
        }
    }

    /// Answers or parks a delivery that is no job.
    pub async fn refuse(&self, case: Case<'_>, unfit: Unfit) -> Summary {
        match unfit {
            Unfit::Invalid(Refusal { code, message, .. }) => {
                self.answer(case, Status::Invalid, &Problem::new(code, message)).await
            }
            Unfit::Unanswerable(Refusal { code, message, .. }) => {
                self.park(case, code, &message, 0).await
            }
        }
    }

    /// Parks a delivery whose handling panicked.
    pub async fn park_panicked(&self, case: Case<'_>) -> Summary {
        self.park(case, "worker_panicked", "the worker met a bug while it handled this job", 0)
            .await
    }

    async fn reply(&self, case: Case<'_>, key: &Key, stored: Stored) -> Summary {
        let summary = Summary {
            verdict: stored.status.as_str(),
            code: stored.code.clone(),
            attempts: stored.attempts,
            left: Left::ComesAgain,
        };
        if stored.status == Status::Unresolved && !stored.parked {
            // A person needs the job itself; one copy of it, before anybody is told.
            let code = stored.code.as_deref().unwrap_or("unresolved");
            let text = "a session may exist at Creem that nobody was given";
            if self.put_aside(case, code, text, stored.attempts).await == Placed::SessionOver {
                return summary;
            }
            if let Err(error) = self.ledger.parked(key.clone(), stored.fence).await {
                tracing::warn!(job.key = %key, %error, "a parked copy could not be noted; it may be parked again");
            }
        }
        let message = Message::reply(
            &self.topology,
            case.envelope,
            Some(&key.request_id),
            stored.reply.as_slice().into(),
            &stored.message_id,
            stored.ended_at,
        );
        self.send_reply(case, message, summary).await
    }

    async fn answer(&self, case: Case<'_>, status: Status, problem: &Problem) -> Summary {
        let id = case.request_id;
        let body = reply::encode_answer(status, id.map(RequestId::as_str), problem);
        let message_id = reply::answer_message_id(&case.delivery.body, &body);
        let message = Message::reply(
            &self.topology,
            case.envelope,
            id,
            body.as_slice().into(),
            &message_id,
            self.clock.now(),
        );
        let summary = Summary {
            verdict: status.as_str(),
            code: Some(problem.code.clone()),
            attempts: 0,
            left: Left::ComesAgain,
        };
        self.send_reply(case, message, summary).await
    }

    /// Publishes a reply; if no queue takes it, parks the job instead. Then acks. `summary` is the
    /// word on the job where the reply arrives.
    async fn send_reply(
        &self,
        case: Case<'_>,
        message: Result<Message, LinkError>,
        summary: Summary,
    ) -> Summary {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                let text = error.to_string();
                return self.park(case, "reply_unroutable", &text, summary.attempts).await;
            }
        };
        let Case { delivery, envelope, .. } = case;
        let direct = envelope.reply_to.as_ref().is_some_and(|target| target.direct);
        let (publisher, most_lost) =
            if direct { (&self.direct, DIRECT_TRIES) } else { (&self.publisher, u32::MAX) };
        match self.publish(publisher, delivery, Class::Replies, message, most_lost).await {
            Sent::Routed => {
                metrics::reply("confirmed");
                if let Some(at) = envelope.timestamp {
                    metrics::latency(delivery.lane, as_duration(self.clock.now() - at));
                }
                Summary { left: ack(delivery).await, ..summary }
            }
            Sent::Nowhere(reason) => {
                metrics::reply("unroutable");
                self.park(case, "reply_unroutable", &reason, summary.attempts).await
            }
            Sent::Full => {
                metrics::reply("unroutable");
                let text = "the reply queue refused it: it is full, or no node leads it";
                self.park(case, "reply_unroutable", text, summary.attempts).await
            }
            Sent::SessionOver => summary,
        }
    }

    /// Lets the job come back after about `wait`: the longest delay that is not longer, or the
    /// shortest there is; what is left is waited for when it is back.
    async fn delay(&self, delivery: &Delivery, wait: Duration, hop: Hop) -> Left {
        let (name, _) = DELAYS.iter().rev().find(|(_, delay)| *delay <= wait).unwrap_or(&DELAYS[0]);
        let message = Message::hop(
            &self.topology,
            delivery.lane,
            name,
            &delivery.properties,
            delivery.body.clone(),
            hop,
            &self.secret,
        );
        let placed = self.place(delivery, message, "the job cannot be delayed").await;
        ack_if_placed(delivery, placed).await
    }

    async fn park(&self, case: Case<'_>, code: &str, text: &str, attempts: u32) -> Summary {
        let placed = self.put_aside(case, code, text, attempts).await;
        let left = ack_if_placed(case.delivery, placed).await;
        Summary { verdict: "parked", code: Some(code.to_owned()), attempts, left }
    }

    /// Puts a copy of the job into the dead queue, without acking the job.
    async fn put_aside(&self, case: Case<'_>, code: &str, text: &str, attempts: u32) -> Placed {
        let delivery = case.delivery;
        let queue = self.topology.jobs(delivery.lane);
        let parking = Parking {
            code,
            message: text,
            attempts,
            at: self.clock.now(),
            source_queue: &queue,
            hopped: has_hop(&delivery.properties, &delivery.body, &self.secret, delivery.lane),
        };
        let message =
            Message::parked(&self.topology, &delivery.properties, delivery.body.clone(), &parking);
        let placed = self.place(delivery, message, "the job cannot be parked").await;
        if placed == Placed::InQueue {
            metrics::parked(code);
            let id = case.request_id.map_or("-", RequestId::as_str);
            tracing::warn!(
                job.request_id = id,
                job.code = code,
                source_queue = queue,
                error = text,
                "a job was parked"
            );
        }
        placed
    }
}

async fn ack_if_placed(delivery: &Delivery, placed: Placed) -> Left {
    match placed {
        Placed::InQueue => ack(delivery).await,
        Placed::SessionOver => Left::ComesAgain,
    }
}

async fn ack(delivery: &Delivery) -> Left {
    match delivery.ack().await {
        Acked::Sent => Left::Acked,
        Acked::TooLate => Left::ComesAgain,
    }
}
