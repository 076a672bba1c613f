//! One copy of a job on its way.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Millis;
use crate::job::{CheckoutRequest, Fingerprint, Key, Lane};

/// How long a delivery is held through a pause: well within the 30 minutes after which RabbitMQ
/// takes an unacked one back. Then it goes to a delay queue, as a new message with a count of its
/// own.
pub const LONGEST_HOLD: Duration = Duration::from_mins(20);

/// One copy of a job, on its way.
#[derive(Debug)]
pub struct Ask {
    /// The ledger's key.
    pub key: Key,
    /// The request.
    pub request: CheckoutRequest,
    /// The body's fingerprint.
    pub fingerprint: Fingerprint,
    /// Where it came from.
    pub lane: Lane,
    /// Its campaign.
    pub campaign: Option<String>,
    /// After which nobody waits.
    pub deadline: Option<Millis>,
    /// When it was published.
    pub published_at: Option<Millis>,
    /// When this copy was first picked up.
    pub picked_up_at: Millis,
    /// Whether the broker delivered this copy before.
    pub redelivered: bool,
    /// Whether it comes from the delay queue of another ledger, which may know a link for it.
    pub elsewhere: bool,
    /// Whether the ledger may well have something to say of it: it was about before.
    pub look_first: bool,
    /// Cancelled when the delivery cannot be acked any more.
    pub session: CancellationToken,
    /// Until when the delivery may be held while nothing is sent for it; see [`LONGEST_HOLD`].
    pub hold_until: Instant,
    /// The lane's permits: none left means that the lane is full.
    pub permits: Arc<Semaphore>,
}
