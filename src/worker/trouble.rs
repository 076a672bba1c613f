//! Says aloud when Creem gives no usable answers, and when it does again: single failures are the
//! retries' business, but an outage must not look like silence.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::creem::Answer;

/// So many calls in a row without a usable answer are an outage.
const IN_A_ROW: u32 = 5;
/// An outage that goes on is named again this often.
const AGAIN: Duration = Duration::from_mins(1);

/// Follows the answers of all jobs.
#[derive(Debug, Default)]
pub struct Trouble(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    in_a_row: u32,
    said: Option<Instant>,
}

impl Trouble {
    /// Takes note of an answer.
    pub fn note(&self, answer: &Answer) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (Answer::NotMade { reason } | Answer::Unknown { reason, .. }) = answer else {
            if state.said.is_some() {
                tracing::info!("Creem answers again");
            }
            *state = State::default();
            return;
        };
        state.in_a_row = state.in_a_row.saturating_add(1);
        let due = state.said.is_none_or(|said| said.elapsed() >= AGAIN);
        if state.in_a_row >= IN_A_ROW && due {
            tracing::warn!(
                error = reason,
                calls = state.in_a_row,
                "Creem gives no usable answers; jobs are tried again within retry.max_attempts and lanes.*.max_elapsed. Check creem.base_url, the network and Creem's status page"
            );
            state.said = Some(Instant::now());
        }
    }

    /// Whether an outage has been named and is not over.
    #[must_use]
    pub fn is_said(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).said.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_named_once_it_is_one_and_until_it_is_over() {
        let trouble = Trouble::default();
        let failed = Answer::NotMade { reason: "connection refused".to_owned() };
        let throttled = Answer::Throttled { retry_after: None };
        for _ in 0..IN_A_ROW - 1 {
            trouble.note(&failed);
        }
        trouble.note(&throttled);
        for _ in 0..IN_A_ROW - 1 {
            trouble.note(&failed);
        }
        assert!(!trouble.is_said(), "an answer in between breaks the row");
        trouble.note(&failed);
        assert!(trouble.is_said());
        trouble.note(&throttled);
        assert!(!trouble.is_said());
    }
}
