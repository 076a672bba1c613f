//! Sessions with the broker, one after another, for ever: each consumes every lane until one of
//! them breaks, and at the stop what was sent is finished before the last one is closed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Shared;
use super::care::{CAREFUL_PAUSE, CLEAN_SESSION, Care, LONG_SESSION};
use super::gate::Reason;
use crate::clock::as_millis;
use crate::job::Lane;
use crate::observe::metrics;
use crate::rabbit::consumer::{Deliveries, OpenError};
use crate::rabbit::{Delivery, LinkError, Session};
use crate::retry::backoff;

/// An idle lane that has heard nothing for so many heartbeats of its connection is subscribed to anew. The
/// connection may be well and the consumer gone: a broker can lose one without a word, or believe that it holds
/// deliveries which never arrived, when the leader of a quorum queue changes
/// (<https://github.com/rabbitmq/rabbitmq-server/issues/15473>). Nothing is lost by it otherwise.
const QUIET_HEARTBEATS: u32 = 5;
/// After so many, any lane is, busy or not: of some of its deliveries the broker may believe so, too.
const LONGEST_HEARTBEATS: u32 = 30;

impl Shared {
    /// Session after session, until the stop; then what was sent is finished.
    pub(super) async fn keep_sessions(self: Arc<Self>) {
        let session = self.sessions_until_the_stop().await;
        tracing::info!(jobs = self.jobs.len(), "stopping: finishing what was sent");
        self.jobs.close();
        self.jobs.wait().await;
        if let Some(session) = session {
            session.close().await;
        }
        tracing::info!("stopped");
    }

    /// The last session, if there is one at the stop.
    async fn sessions_until_the_stop(self: &Arc<Self>) -> Option<Arc<Session>> {
        let mut failures = 0;
        let mut care = Care::default();
        while !self.stop.is_cancelled() {
            let opened = tokio::select! {
                opened = self.open_session() => opened,
                () = self.stop.cancelled() => return None,
            };
            let mut longest = Duration::MAX;
            let reason = match opened {
                Ok(session) => {
                    let session = Arc::new(session);
                    let began = Instant::now();
                    let lanes = self.permits.len();
                    let ended = self.serve(&session, care.lane(lanes)).await;
                    self.not_consuming("the session with the broker is over");
                    if self.stop.is_cancelled() {
                        return Some(session);
                    }
                    session.close().await;
                    // Nothing went wrong in a careful session that lasted: the next one may begin.
                    let clean = care.lane(lanes).is_some() && began.elapsed() >= CLEAN_SESSION;
                    care.note(&ended, began.elapsed(), lanes);
                    if clean {
                        failures = 0;
                        continue;
                    }
                    if began.elapsed() > LONG_SESSION {
                        failures = 0;
                    }
                    if care.lane(lanes).is_some() {
                        longest = CAREFUL_PAUSE;
                    }
                    ended.to_string()
                }
                Err(error) => error.to_string(),
            };
            failures += 1;
            let delay = self.worker.backoff.reconnect(failures, backoff::chance()).min(longest);
            self.worker.engine.health.set_broker(Err(reason.clone()));
            tracing::warn!(
                error = reason,
                delay_ms = as_millis(delay),
                "not consuming; trying again"
            );
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.stop.cancelled() => {}
            }
        }
        None
    }

    /// Opens a session, once there is a use for one: deliveries that are taken only to be held
    /// through a pause would count against their delivery limit when the broker takes them back.
    async fn open_session(&self) -> Result<Session, OpenError> {
        self.gate.free_of(Reason::Ledger).await;
        self.gate.free_of(Reason::Publishing).await;
        Session::open(&self.worker.plan).await
    }

    /// Consumes every lane, or `only` that one with one delivery at a time (see [`Care`]), until
    /// one of them breaks; returns why.
    async fn serve(self: &Arc<Self>, session: &Arc<Session>, only: Option<usize>) -> LinkError {
        let mut lanes = JoinSet::new();
        // What a new ledger's first session is redelivered was taken by a worker with another one.
        let fresh = self.ledger_is_new().await;
        let careful = only.is_some();
        let served = self.permits.iter().enumerate();
        let served = served.filter(|(index, _)| only.is_none_or(|only| only == *index));
        let (subscribed, mut subscriptions) = mpsc::channel(self.permits.len());
        let mut expected = 0;
        for (_, (size, permits)) in served {
            expected += 1;
            let lane = LaneLoop {
                shared: self.clone(),
                session: session.clone(),
                lane: size.lane,
                prefetch: if careful { 1 } else { size.concurrency },
                permits: permits.clone(),
                all: usize::from(size.concurrency),
                heartbeat: self.worker.plan.options.heartbeat,
                fresh,
            };
            lanes.spawn(lane.run(subscribed.clone()));
        }
        drop(subscribed);
        let ended = tokio::select! {
            ended = lanes.join_next() => ended,
            () = self.follow(&mut subscriptions, expected) => None,
            lost = session.guard_lost() => Some(Ok(Some(lost))),
            () = tokio::time::sleep(CLEAN_SESSION), if careful => {
                Some(Ok(Some(LinkError::Broken("no message of this lane breaks the connection".to_owned()))))
            }
        };
        let reason = match ended {
            Some(Ok(Some(error))) => error,
            _ if self.stop.is_cancelled() => LinkError::Broken("stopping".to_owned()),
            Some(Ok(None)) | None => LinkError::Broken(
                "the session was given up, for the reason that the log gives before this"
                    .to_owned(),
            ),
            Some(Err(error)) => LinkError::Broken(format!("a lane's task died: {error}")),
        };
        if self.stop.is_cancelled() {
            // Each lane gives back what it has not begun.
            while lanes.join_next().await.is_some() {}
        } else {
            session.over.cancel();
            lanes.shutdown().await;
        }
        reason
    }

    /// Follows the lanes as they begin to be consumed, or cannot be; never ends.
    async fn follow(
        &self,
        subscriptions: &mut mpsc::Receiver<(Lane, Subscribed)>,
        expected: usize,
    ) {
        let mut served = Vec::new();
        while let Some((lane, subscribed)) = subscriptions.recv().await {
            let known = served.contains(&lane.as_str());
            if !known && !matches!(subscribed, Subscribed::Not(_)) {
                served.push(lane.as_str());
            }
            metrics::consuming(lane, matches!(subscribed, Subscribed::Consumed));
            match subscribed {
                Subscribed::Consumed | Subscribed::Paused => {
                    metrics::broker_connected(true);
                    self.gate.open(Reason::Broker);
                }
                Subscribed::Not(error) => {
                    served.retain(|one| *one != lane.as_str());
                    tracing::warn!(
                        job.lane = lane.as_str(),
                        error,
                        "this lane cannot be consumed; trying again"
                    );
                    self.worker.engine.health.set_broker(Err(format!("lane {lane}: {error}")));
                    continue;
                }
            }
            if served.len() == expected {
                self.worker.engine.health.set_broker(Ok(()));
                if !known {
                    tracing::info!(lanes = ?served, "consuming");
                }
            }
        }
        // A lane that fails ends the session; nothing more comes then.
        std::future::pending::<()>().await;
    }

    fn not_consuming(&self, why: &str) {
        self.gate.close(Reason::Broker);
        for size in &self.worker.lanes {
            metrics::consuming(size.lane, false);
        }
        metrics::broker_connected(false);
        self.worker.engine.health.set_broker(Err(why.to_owned()));
    }
}

/// One lane of one session.
struct LaneLoop {
    shared: Arc<Shared>,
    session: Arc<Session>,
    lane: Lane,
    prefetch: u16,
    permits: Arc<Semaphore>,
    /// How many of them there are.
    all: usize,
    /// The connection's.
    heartbeat: Duration,
    /// Whether the ledger is new, so that redelivered jobs are a sign that another was lost.
    fresh: bool,
}

/// Whether a lane is consumed.
#[derive(Debug)]
enum Subscribed {
    Consumed,
    /// An operator wants it so.
    Paused,
    /// Why it cannot be.
    Not(String),
}

/// Why no more deliveries are taken.
enum Taken {
    /// The lane is paused, or the worker stops.
    Enough,
    /// The broker might have lost the consumer.
    Resubscribe,
    /// The session is over; why, if that began here.
    Over(Option<LinkError>),
}

impl LaneLoop {
    /// Gives back what was not begun, and what a consumer still gets before it ends.
    async fn leave(
        &self,
        consumer: Option<Deliveries>,
        waiting: VecDeque<Delivery>,
        fresh: bool,
    ) -> Result<(), LinkError> {
        let rest = match consumer {
            Some(deliveries) => deliveries.end().await?,
            None => Vec::new(),
        };
        for delivery in waiting.into_iter().chain(rest) {
            // Whether this ledger may serve it has not been asked of all of them.
            if !delivery.nears_its_limit() || !self.shared.may_serve(&delivery, fresh).await {
                delivery.give_back().await;
                continue;
            }
            // Its lane is paused, or the worker stops: its journey ends at once, by way of a delay queue.
            let permits = Arc::new(Semaphore::new(1));
            let permit =
                permits.clone().try_acquire_owned().expect("a new semaphore has its permit");
            let shared = self.shared.clone();
            self.shared.jobs.spawn(shared.handle(delivery, permits, permit));
        }
        Ok(())
    }

    /// Subscribes; a lane whose queue is missing or forbidden is asked for again and again, while the
    /// others are served. An error is the session's; `None` says that it is over.
    async fn subscribe(
        &self,
        subscribed: &mpsc::Sender<(Lane, Subscribed)>,
    ) -> Result<Option<Deliveries>, LinkError> {
        let topology = &self.shared.worker.plan.topology;
        let mut tries = 0;
        loop {
            let consume = self.session.consume(topology, self.lane, self.prefetch);
            let denied = tokio::select! {
                taken = consume => match taken {
                    Ok(deliveries) => {
                        // The receiver is gone only when the session is.
                        let told = subscribed.send((self.lane, Subscribed::Consumed)).await;
                        return Ok(told.is_ok().then_some(deliveries));
                    }
                    Err(LinkError::Denied(text)) => text,
                    Err(error) => return Err(error),
                },
                () = self.session.over.cancelled() => return Ok(None),
            };
            if subscribed.send((self.lane, Subscribed::Not(denied))).await.is_err() {
                return Ok(None);
            }
            tries += 1;
            tokio::select! {
                () = tokio::time::sleep(self.shared.worker.backoff.ceiling(tries)) => {}
                () = self.session.over.cancelled() => return Ok(None),
                () = self.shared.stop.cancelled() => return Ok(None),
            }
        }
    }

    /// Takes deliveries, but for times in which the lane is paused, until the session breaks (then why) or
    /// the worker stops.
    async fn run(self, subscribed: mpsc::Sender<(Lane, Subscribed)>) -> Option<LinkError> {
        let orders = &self.shared.worker.engine.journey.orders;
        let mut waiting = VecDeque::new();
        let mut renewed = None;
        // What the first consumer is redelivered was taken by another worker; later, it may have been by this one,
        // even if it saw nothing: the broker may have counted deliveries to a consumer that it had lost.
        let mut fresh = self.fresh;
        loop {
            if orders.is_paused(self.lane) {
                let left = self.leave(renewed.take(), std::mem::take(&mut waiting), fresh).await;
                if let Err(error) = left {
                    return Some(error);
                }
                if subscribed.send((self.lane, Subscribed::Paused)).await.is_err() {
                    return None;
                }
                tokio::select! {
                    () = orders.resumed(self.lane) => {}
                    () = self.session.over.cancelled() => return None,
                    () = self.shared.stop.cancelled() => return None,
                }
            }
            let mut intake = match renewed.take() {
                Some(deliveries) => deliveries,
                None => match self.subscribe(&subscribed).await {
                    Ok(Some(deliveries)) => deliveries,
                    Ok(None) => return None,
                    Err(error) => return Some(error),
                },
            };
            match self.take(&mut intake, &mut waiting, fresh).await {
                Taken::Over(reason) => return reason,
                Taken::Enough => {
                    match self.leave(Some(intake), std::mem::take(&mut waiting), fresh).await {
                        Ok(()) => {}
                        Err(_) if self.shared.stop.is_cancelled() => return None,
                        Err(error) => return Some(error),
                    }
                }
                Taken::Resubscribe => match self.resubscribe(intake, fresh, &subscribed).await {
                    Ok(Some((deliveries, rest))) => {
                        renewed = Some(deliveries);
                        waiting = rest;
                    }
                    Ok(None) => return None,
                    Err(error) => return Some(error),
                },
            }
            fresh = false;
            if self.shared.stop.is_cancelled() {
                drop(self.leave(renewed, waiting, fresh).await);
                return None;
            }
        }
    }

    /// Replaces a consumer. The new one is there before the old one ends, so that workers who ask see the lane
    /// served. Returns it with what the old one still got; `None` ends the session.
    async fn resubscribe(
        &self,
        before: Deliveries,
        fresh: bool,
        subscribed: &mpsc::Sender<(Lane, Subscribed)>,
    ) -> Result<Option<(Deliveries, VecDeque<Delivery>)>, LinkError> {
        tracing::debug!(job.lane = self.lane.as_str(), "consuming the lane anew");
        let topology = &self.shared.worker.plan.topology;
        let deliveries = match self.session.consume(topology, self.lane, self.prefetch).await {
            Ok(deliveries) => deliveries,
            // The queue is gone or forbidden by now. The old consumer may still serve, or be lost.
            Err(LinkError::Denied(error)) => {
                let told = subscribed.send((self.lane, Subscribed::Not(error))).await;
                return Ok(told.is_ok().then(|| (before, VecDeque::new())));
            }
            Err(error) => return Err(error),
        };
        if subscribed.send((self.lane, Subscribed::Consumed)).await.is_err() {
            return Ok(None);
        }
        let mut rest = VecDeque::new();
        for delivery in before.end().await? {
            if !self.shared.may_serve(&delivery, fresh).await {
                return Ok(None);
            }
            rest.push_back(delivery);
        }
        Ok(Some((deliveries, rest)))
    }

    /// Takes deliveries and has each brought to its end, as the lane's permits allow.
    async fn take(
        &self,
        intake: &mut Deliveries,
        waiting: &mut VecDeque<Delivery>,
        fresh: bool,
    ) -> Taken {
        let mut permit: Option<OwnedSemaphorePermit> = None;
        let began = Instant::now();
        let quiet = self.heartbeat * QUIET_HEARTBEATS;
        let (mut heard, mut look) = (began, began + quiet);
        loop {
            tokio::select! {
                biased;
                () = self.shared.stop.cancelled() => return Taken::Enough,
                () = self.session.over.cancelled() => return Taken::Over(None),
                () = self.shared.worker.engine.journey.orders.paused(self.lane) => return Taken::Enough,
                granted = self.permits.clone().acquire_owned(), if permit.is_none() => {
                    let Ok(granted) = granted else { return Taken::Over(None) };
                    permit = Some(granted);
                }
                // Read even while the lane is full, or a broken session would go unnoticed. What
                // waits here is bounded by the prefetch.
                delivery = intake.next() => match delivery {
                    Ok(delivery) if self.shared.may_serve(&delivery, fresh).await => {
                        heard = Instant::now();
                        waiting.push_back(delivery);
                    }
                    Ok(_) => return Taken::Over(None),
                    Err(error) => return Taken::Over(Some(error)),
                },
                () = tokio::time::sleep_until(look) => {
                    let free = self.permits.available_permits() + usize::from(permit.is_some());
                    let idle = free == self.all && waiting.is_empty();
                    if idle && heard.elapsed() >= quiet
                        || waiting.is_empty() && began.elapsed() >= self.heartbeat * LONGEST_HEARTBEATS
                    {
                        return Taken::Resubscribe;
                    }
                    look = Instant::now() + quiet;
                }
            }
            if permit.is_some()
                && let Some(delivery) = waiting.pop_front()
                && let Some(permit) = permit.take()
            {
                let shared = self.shared.clone();
                self.shared.jobs.spawn(shared.handle(delivery, self.permits.clone(), permit));
            }
        }
    }
}
