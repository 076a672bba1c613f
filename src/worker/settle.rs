//! Carrying a verdict out: publish what replaces the message, know that it arrived, *then* ack.

use std::sync::Arc;
use std::time::Duration;

use super::intake::Unfit;
use super::journey::Verdict;
use crate::clock::{SharedClock, as_duration};
use crate::job::{FingerprintKey, Key, Problem, Refusal, RequestId, Status, reply};
use crate::ledger::{Command, Ledger, Stored};
use crate::observe::metrics;
use crate::rabbit::consumer::Acked;
use crate::rabbit::hop::has_hop;
use crate::rabbit::outgoing::Parking;
use crate::rabbit::publisher::Class;
use crate::rabbit::topology::DELAYS;
use crate::rabbit::{Delivery, Envelope, LinkError, Message, Published, Publisher, Topology};
use crate::retry::{Backoff, backoff};

/// How often a full reply queue is tried before the job is parked.
const FULL_TRIES: u32 = 5;
/// How often a direct reply may take its channel down before the job is parked: RabbitMQ 3.10
/// closes the whole connection over a malformed address.
const DIRECT_TRIES: u32 = 2;

/// What is needed to carry verdicts out.
#[derive(Debug)]
pub struct Settler {
    /// Publishes.
    pub publisher: Publisher,
    /// Names.
    pub topology: Topology,
    /// Of the delays between tries.
    pub backoff: Backoff,
    /// Wall-clock time.
    pub clock: SharedClock,
    /// For notes about parked copies.
    pub ledger: Arc<dyn Ledger>,
    /// Signs hops.
    pub secret: FingerprintKey,
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

impl Settler {
    /// Carries a job's verdict out.
    pub async fn carry_out(
        &self,
        delivery: &Delivery,
        envelope: &Envelope,
        key: &Key,
        picked_up_at: i64,
        verdict: Verdict,
    ) -> Summary {
        let summary = |verdict, code, attempts, left| Summary { verdict, code, attempts, left };
        match verdict {
            Verdict::Reply(stored) => self.reply(delivery, envelope, key, stored).await,
            Verdict::Conflict(fields) => {
                let refusal = Problem {
                    details: fields,
                    ..Problem::new(
                        "request_id_reused",
                        "this request_id has, or may have, a link for another body",
                    )
                };
                let left = self
                    .answer(delivery, envelope, Status::Conflict, Some(&key.request_id), &refusal)
                    .await;
                summary("conflict", Some(refusal.code), 0, left)
            }
            Verdict::Delay(wait) => {
                let left = self.delay(delivery, wait, picked_up_at).await;
                summary("delayed", None, 0, left)
            }
            Verdict::GiveBack => {
                delivery.give_back().await;
                summary("given_back", None, 0, Left::ComesAgain)
            }
            Verdict::Abandon => {
                // Harmless where the session is over; elsewhere nobody else would free the slot.
                delivery.give_back().await;
                summary("abandoned", None, 0, Left::ComesAgain)
            }
            Verdict::Damaged(what) => {
                tracing::error!(job.key = %key, what, "a row of the ledger is damaged; the job is parked, as nobody knows whether it has a link");
                let left = self.park(delivery, "ledger_row_damaged", &what, 0).await;
                summary("parked", Some("ledger_row_damaged".to_owned()), 0, left)
            }
            Verdict::Fatal(error) => {
                tracing::error!(job.key = %key, %error, "the job is left to whoever serves next");
                summary("ledger_damaged", None, 0, Left::ComesAgain)
            }
        }
    }

    /// Answers or parks a delivery that is no job.
    pub async fn refuse(&self, delivery: &Delivery, envelope: &Envelope, unfit: Unfit) -> Summary {
        match unfit {
            Unfit::Invalid(Refusal { code, message, request_id }) => {
                let problem = Problem::new(code, message);
                let left = self
                    .answer(delivery, envelope, Status::Invalid, request_id.as_ref(), &problem)
                    .await;
                Summary { verdict: "invalid", code: Some(problem.code), attempts: 0, left }
            }
            Unfit::Unanswerable(Refusal { code, message, .. }) => {
                let left = self.park(delivery, code, &message, 0).await;
                Summary { verdict: "parked", code: Some(code.to_owned()), attempts: 0, left }
            }
        }
    }

    /// Parks a delivery whose handling panicked.
    pub async fn park_panicked(&self, delivery: &Delivery) -> Left {
        self.park(delivery, "worker_panicked", "the worker met a bug while it handled this job", 0)
            .await
    }

    async fn reply(
        &self,
        delivery: &Delivery,
        envelope: &Envelope,
        key: &Key,
        stored: Stored,
    ) -> Summary {
        let summary = |left, stored: &Stored| Summary {
            verdict: stored.status.as_str(),
            code: stored.code.clone(),
            attempts: stored.attempts,
            left,
        };
        if stored.status == Status::Unresolved && !stored.parked {
            // A person needs the job itself; one copy of it, before anybody is told.
            let code = stored.code.as_deref().unwrap_or("unresolved");
            let text = "a session may exist at Creem that nobody was given";
            if self.put_aside(delivery, code, text, stored.attempts).await == Placed::SessionOver {
                return summary(Left::ComesAgain, &stored);
            }
            let parked = Command::Parked { key: key.clone(), fence: stored.fence };
            if let Err(error) = self.ledger.execute(parked).await {
                tracing::warn!(job.key = %key, %error, "a parked copy could not be noted; it may be parked again");
            }
        }
        let message = Message::reply(
            &self.topology,
            envelope,
            Some(&key.request_id),
            stored.reply.as_slice().into(),
            &stored.message_id,
            stored.ended_at,
        );
        let left = self.send_reply(delivery, envelope, message, stored.attempts).await;
        summary(left, &stored)
    }

    async fn answer(
        &self,
        delivery: &Delivery,
        envelope: &Envelope,
        status: Status,
        request_id: Option<&RequestId>,
        problem: &Problem,
    ) -> Left {
        let body = reply::encode_answer(status, request_id.map(RequestId::as_str), problem);
        let message_id = reply::answer_message_id(&delivery.body, &body);
        let message = Message::reply(
            &self.topology,
            envelope,
            request_id,
            body.as_slice().into(),
            &message_id,
            self.clock.now(),
        );
        self.send_reply(delivery, envelope, message, 0).await
    }

    /// Publishes a reply; if no queue takes it, parks the job instead. Then acks.
    async fn send_reply(
        &self,
        delivery: &Delivery,
        envelope: &Envelope,
        message: Result<Message, LinkError>,
        attempts: u32,
    ) -> Left {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                return self.park(delivery, "reply_unroutable", &error.to_string(), attempts).await;
            }
        };
        let direct = envelope.reply_to.as_ref().is_some_and(|target| target.direct);
        let most_lost = if direct { DIRECT_TRIES } else { u32::MAX };
        match self.publish(delivery, Class::Replies, message, most_lost).await {
            Sent::Routed => {
                metrics::reply("confirmed");
                if let Some(at) = envelope.timestamp {
                    metrics::latency(delivery.lane, as_duration(self.clock.now() - at));
                }
                ack(delivery).await
            }
            Sent::Nowhere(reason) => {
                metrics::reply("unroutable");
                self.park(delivery, "reply_unroutable", &reason, attempts).await
            }
            Sent::SessionOver => Left::ComesAgain,
        }
    }

    /// Lets the job come back after about `wait`: the longest delay that is not longer, or the
    /// shortest there is; what is left is waited for when it is back.
    async fn delay(&self, delivery: &Delivery, wait: Duration, picked_up_at: i64) -> Left {
        let (name, _) = DELAYS.iter().rev().find(|(_, delay)| *delay <= wait).unwrap_or(&DELAYS[0]);
        let message = Message::hop(
            &self.topology,
            delivery.lane,
            name,
            &delivery.properties,
            delivery.body.clone(),
            picked_up_at,
            &self.secret,
        );
        let placed = self.place(delivery, message, "the job cannot be delayed").await;
        ack_if_placed(delivery, placed).await
    }

    async fn park(&self, delivery: &Delivery, code: &str, text: &str, attempts: u32) -> Left {
        let placed = self.put_aside(delivery, code, text, attempts).await;
        ack_if_placed(delivery, placed).await
    }

    /// Puts a copy of the job into the dead queue, without acking the job.
    async fn put_aside(
        &self,
        delivery: &Delivery,
        code: &str,
        text: &str,
        attempts: u32,
    ) -> Placed {
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
            tracing::warn!(code, source_queue = queue, error = text, "a job was parked");
        }
        placed
    }

    /// Publishes to one of our own queues, for as long as that takes: there is no other place
    /// for the job, so it is held, and after the session it comes again.
    async fn place(
        &self,
        delivery: &Delivery,
        message: Result<Message, LinkError>,
        what: &str,
    ) -> Placed {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(%error, what);
                return Placed::SessionOver;
            }
        };
        let mut tries = 0;
        loop {
            match self.publish(delivery, Class::Internal, message.clone(), u32::MAX).await {
                Sent::Routed => return Placed::InQueue,
                Sent::SessionOver => return Placed::SessionOver,
                Sent::Nowhere(error) => {
                    tracing::error!(
                        error,
                        what,
                        "one of the worker's own queues does not take it; was it deleted?"
                    );
                    tries += 1;
                    if !self.wait_before_retry(delivery, tries).await {
                        return Placed::SessionOver;
                    }
                }
            }
        }
    }

    /// Publishes until the broker has said something final, or the delivery is not ours any more.
    async fn publish(
        &self,
        delivery: &Delivery,
        class: Class,
        message: Message,
        most_lost: u32,
    ) -> Sent {
        let (mut lost, mut refused) = (0, 0);
        loop {
            let published = tokio::select! {
                published = self.publisher.publish(class, message.clone()) => published,
                () = delivery.session.cancelled() => return Sent::SessionOver,
            };
            let tries = match published {
                Ok(Published::Routed) => return Sent::Routed,
                Ok(Published::Returned(reason)) => return Sent::Nowhere(reason),
                Ok(Published::Refused) => {
                    refused += 1;
                    if class == Class::Replies {
                        metrics::reply("refused");
                    }
                    if refused >= FULL_TRIES {
                        return Sent::Nowhere("the queue refused it: it is full".to_owned());
                    }
                    refused
                }
                Err(reason) => {
                    lost += 1;
                    tracing::debug!(error = %reason, "publishing again");
                    if lost >= most_lost {
                        return Sent::Nowhere(format!(
                            "publishing to it broke the channel {lost} times: {reason}"
                        ));
                    }
                    lost
                }
            };
            if !self.wait_before_retry(delivery, tries).await {
                return Sent::SessionOver;
            }
        }
    }

    /// Waits before another try; says whether the delivery is still ours.
    async fn wait_before_retry(&self, delivery: &Delivery, tries: u32) -> bool {
        tokio::select! {
            () = tokio::time::sleep(self.backoff.delay(tries, None, backoff::chance())) => true,
            () = delivery.session.cancelled() => false,
        }
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

/// What became of a message for one of our own queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placed {
    /// Confirmed and routed; the delivery may be acked.
    InQueue,
    /// The delivery is not ours any more and will come again.
    SessionOver,
}

/// What became of publishing.
enum Sent {
    Routed,
    Nowhere(String),
    SessionOver,
}
