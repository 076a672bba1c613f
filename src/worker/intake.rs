//! From a delivery to a job, or to a refusal that can be answered.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::ask::{Ask, LONGEST_HOLD};
use crate::clock::Millis;
use crate::job::{CheckoutRequest, Fingerprint, Key, LedgerSecret, Mode, Refusal, Rules};
use crate::rabbit::envelope::ReplyRules;
use crate::rabbit::{Delivery, Envelope};

/// What intake needs to know.
#[derive(Debug, Clone)]
pub struct Intake {
    /// The rules of bodies.
    pub rules: Rules,
    /// The rules of reply addresses.
    pub replies: ReplyRules,
    /// Creem's world.
    pub mode: Mode,
    /// The ledger's secret.
    pub secret: LedgerSecret,
}

/// A delivery, read.
#[derive(Debug)]
pub struct Read {
    /// Its properties.
    pub envelope: Envelope,
    /// The job, or why it is none.
    pub job: Result<Box<Ask>, Unfit>,
}

/// Why a delivery is no job.
#[derive(Debug)]
pub enum Unfit {
    /// Tell the producer.
    Invalid(Refusal),
    /// It cannot be told: the address is not allowed.
    Unanswerable(Refusal),
}

impl Intake {
    /// Reads a delivery.
    #[must_use]
    pub fn read(&self, delivery: &Delivery, now: Millis, permits: &Arc<Semaphore>) -> Read {
        let (envelope, broken) =
            Envelope::read(&delivery.properties, &delivery.body, &self.secret, delivery.lane);
        let parsed = match broken {
            // The body is read all the same: the answer carries its request_id.
            Some(rule) => Err(Refusal {
                code: rule.code,
                message: rule.message.to_owned(),
                request_id: self.request_id(delivery),
            }),
            None => CheckoutRequest::parse(&delivery.body, &self.rules),
        };
        if !envelope.reply_allowed(&self.replies) {
            let request_id = match &parsed {
                Ok(request) => Some(request.request_id.clone()),
                Err(refusal) => refusal.request_id.clone(),
            };
            let refusal = Refusal {
                code: "reply_to_denied",
                message: "reply_to names a queue that replies must not go to".to_owned(),
                request_id,
            };
            return Read { envelope, job: Err(Unfit::Unanswerable(refusal)) };
        }
        let job = parsed.map_err(Unfit::Invalid).map(|request| {
            Box::new(Ask {
                key: Key { mode: self.mode, request_id: request.request_id.clone() },
                fingerprint: Fingerprint::of(&request.members, &self.secret),
                request,
                lane: delivery.lane,
                campaign: envelope.campaign.clone(),
                deadline: envelope.deadline,
                published_at: envelope.timestamp,
                picked_up_at: envelope.hop.map_or(now, |hop| hop.first_picked_up_at).min(now),
                redelivered: delivery.redelivered
                    || envelope.hop.is_some_and(|hop| hop.redelivered),
                elsewhere: envelope.foreign_hop,
                look_first: delivery.redelivered || envelope.hop.is_some(),
                session: delivery.session.clone(),
                hold_until: delivery.arrived + LONGEST_HOLD,
                permits: permits.clone(),
            })
        });
        Read { envelope, job }
    }

    /// The ledger's key of the job, where its id can be read.
    #[must_use]
    pub fn key(&self, delivery: &Delivery) -> Option<Key> {
        let request_id = self.request_id(delivery)?;
        Some(Key { mode: self.mode, request_id })
    }

    fn request_id(&self, delivery: &Delivery) -> Option<crate::job::RequestId> {
        match CheckoutRequest::parse(&delivery.body, &self.rules) {
            Ok(request) => Some(request.request_id),
            Err(refusal) => refusal.request_id,
        }
    }
}
