//! What has become of a link's session, as far as Creem and the ledger tell.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::inside::Inside;
use super::verify::{Link, Renewal};
use crate::creem::Seen;
use crate::job::key::Comparison;
use crate::job::{Fingerprint, Lane};
use crate::retry::{Backoff, backoff};

/// How often one link is asked for.
const TRIES: u32 = 6;
/// The pause after the first time, at most; it doubles.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(20);

/// Creem's word that there is no such session, for link after link, says more about the key or the API than
/// about the links.
#[derive(Debug, Default)]
pub struct GoneTally {
    gone: AtomicU32,
    found: AtomicU32,
}

/// How many links may be gone before the first one is found.
const MOST_GONE: u32 = 20;

impl GoneTally {
    /// Doubts it, where it is said of too many.
    pub fn judge(&self, state: Link) -> Link {
        if state != Link::Gone {
            self.found.fetch_add(u32::from(!matches!(state, Link::Unknown(_))), Ordering::Relaxed);
            return state;
        }
        let gone = self.gone.fetch_add(1, Ordering::Relaxed);
        if gone >= MOST_GONE && self.found.load(Ordering::Relaxed) == 0 {
            return Link::Unknown(format!(
                "Creem knows none of the first {MOST_GONE} links: is that so, or is something wrong there?"
            ));
        }
        state
    }
}

/// Whether a line and the flags make the job that its link was made for: what they leave out (a discount, the buyer's
/// address) the new link would not have.
///
/// # Errors
/// Why not, in a sentence.
pub async fn same_job(
    inside: &Inside,
    id: &str,
    checkout_id: &str,
    renewal: &Renewal,
) -> Result<(), String> {
    let job = renewal.own_job().map_err(|flaw| flaw.message)?;
    let known = inside.known(job.request_id.clone()).await.map_err(|error| error.to_string())?;
    let Some(known) = known else {
        return Err(format!(
            "this ledger does not know {id} (any more), so nobody can tell whether line and flags make the same job again: make a new file of jobs"
        ));
    };
    if known.checkout_id.as_deref() != Some(checkout_id) {
        return Err(format!(
            "the ledger has another link for {id} than {checkout_id}: has somebody moved cells of the file? Take the run's own output"
        ));
    }
    let secret = &inside.engine.journey.ledger.identity().secret;
    let again = Fingerprint::of(&job.members, secret);
    match known.fingerprint.compare(&again) {
        Comparison::Same => Ok(()),
        Comparison::Differs(fields) => Err(format!(
            "the line and the flags do not make the job that its link was made for: give the flags of the first run; they differ in {}",
            fields.join(", ")
        )),
        Comparison::Unknown => Err("its row was written by a newer version".to_owned()),
    }
}

/// What has become of a row's session. That Creem knows no such session tells something only if it was made
/// with this key: another key's sessions are unknown to it as well, and so is an id that a spreadsheet has bent.
pub async fn ask_for(inside: &Inside, request_id: &str, checkout_id: &str) -> Link {
    let state = ask(inside, checkout_id).await;
    if state != Link::Gone {
        return state;
    }
    let doubt = |text: &str| Link::Unknown(format!("Creem knows no {checkout_id}, {text}"));
    match inside.has_made(request_id, checkout_id).await {
        Ok(true) => Link::Gone,
        Ok(false) => doubt(
            "and this ledger has not made it: is it of another key, mode or ledger, or forgotten after ledger.retention?",
        ),
        Err(error) => doubt(&format!("and the ledger cannot be asked: {error}")),
    }
}

/// Asks Creem about a session, at the pace of all calls.
async fn ask(inside: &Inside, checkout_id: &str) -> Link {
    let journey = &inside.engine.journey;
    let delays = Backoff::try_new(FIRST, LONGEST).expect("half a second is less than twenty");
    let mut tries = 0;
    loop {
        let admitted = async { journey.pacer.keep(journey.pacer.admit(Lane::Bulk).await).await };
        tokio::select! {
            _ = admitted => {}
            () = journey.stop.cancelled() => return interrupted(),
        }
        let asked = tokio::time::Instant::now();
        let seen = journey.creem.look_up(checkout_id).await;
        tries += 1;
        let Seen::Later { throttled, .. } = &seen else {
            journey.pacer.taken(asked);
            return seen.into();
        };
        if throttled.is_some() {
            journey.pacer.slow_down(asked);
        }
        let retry_after = throttled.flatten();
        if let Some(delay) = retry_after {
            journey.pacer.quiet(backoff::clamp_retry_after(delay));
        }
        if tries == TRIES {
            return seen.into();
        }
        tokio::select! {
            () = tokio::time::sleep(delays.delay(tries, retry_after, backoff::chance())) => {}
            () = journey.stop.cancelled() => return interrupted(),
        }
    }
}

fn interrupted() -> Link {
    Link::Unknown("interrupted".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_creem_knows_none_of_the_first_links_says_nothing_of_the_next_one() {
        let seen = GoneTally::default();
        for _ in 0..MOST_GONE {
            assert_eq!(seen.judge(Link::Gone), Link::Gone);
        }
        assert!(matches!(seen.judge(Link::Gone), Link::Unknown(_)));
        // Once one was found, others may be gone.
        assert_eq!(seen.judge(Link::Open), Link::Open);
        assert_eq!(seen.judge(Link::Gone), Link::Gone);
    }
}
