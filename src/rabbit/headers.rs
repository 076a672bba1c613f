//! The names of the headers of this program's messages; other programs rely on them.

/// Read from a job: after which nobody waits any more.
pub const DEADLINE: &str = "checkout-deadline";
/// Read from a job: its campaign.
pub const CAMPAIGN: &str = "checkout-campaign";
/// Read from a job and carried on: W3C trace context.
pub const TRACEPARENT: &str = "traceparent";
/// Read from a job and carried on: W3C trace state.
pub const TRACESTATE: &str = "tracestate";
/// On a reply.
pub const REQUEST_ID: &str = "checkout-request-id";
/// On a job in a delay queue: what the worker must remember of it, signed.
pub const HOP: &str = "checkout-hop";
/// On everything published: tells one publish from every other of this process.
pub const PUBLISH_ID: &str = "checkout-publish-id";
/// On a parked job: stable name of the reason.
pub const ERROR_CODE: &str = "checkout-error-code";
/// On a parked job: the reason in a sentence.
pub const ERROR_MESSAGE: &str = "checkout-error-message";
/// On a parked job: calls sent for it.
pub const ATTEMPTS: &str = "checkout-attempts";
/// On a parked job: when, RFC 3339.
pub const PARKED_AT: &str = "checkout-parked-at";
/// On a parked job: the queue it came from.
pub const SOURCE_QUEUE: &str = "checkout-source-queue";
/// On a job that is published again: how many of its headers were too large to carry on.
pub const HEADERS_DROPPED: &str = "checkout-headers-dropped";
/// On a job that is published again: its `expiration` property, which would end the copy.
pub const ORIGINAL_EXPIRATION: &str = "checkout-original-expiration";
/// On a job that is published again: its `user_id` property, which the broker would refuse.
pub const ORIGINAL_USER_ID: &str = "checkout-original-user-id";
/// On a job that is published again: its `CC` header, which would multiply the copy.
pub const ORIGINAL_CC: &str = "checkout-original-cc";
/// On a job that is published again: its `BCC` header.
pub const ORIGINAL_BCC: &str = "checkout-original-bcc";

/// Whether the worker writes this header itself, so that a producer's is not carried on.
#[must_use]
pub fn is_ours(name: &str) -> bool {
    [HOP, PUBLISH_ID, ERROR_CODE, ERROR_MESSAGE, ATTEMPTS, PARKED_AT, SOURCE_QUEUE, HEADERS_DROPPED]
        .contains(&name)
        || is_original(name)
}

/// Whether the header keeps, as text, what a job said before it was published again.
#[must_use]
pub fn is_original(name: &str) -> bool {
    [ORIGINAL_EXPIRATION, ORIGINAL_USER_ID, ORIGINAL_CC, ORIGINAL_BCC].contains(&name)
}
