//! Copies of one job take turns within a process: the first does the work, the others find its
//! outcome in the ledger.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::job::Key;

type Queue = Arc<tokio::sync::Mutex<()>>;

/// Keys that are being worked on.
#[derive(Debug, Default)]
pub struct Turns {
    queues: Mutex<HashMap<Key, Queue>>,
}

/// The right to work on one key; the next copy's turn comes when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    key: Key,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for the turn of a key.
    pub async fn take(&self, key: &Key) -> Turn<'_> {
        let queue = self.locked().entry(key.clone()).or_default().clone();
        // Made before the wait, so that giving up cleans up as well.
        let mut turn = Turn { turns: self, key: key.clone(), guard: None };
        turn.guard = Some(queue.lock_owned().await);
        turn
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Key, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queues = self.turns.locked();
        drop(self.guard.take());
        // One reference is the map's own: nobody else waits for this key or holds it.
        if queues.get(&self.key).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            queues.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Mode, RequestId};
    use futures::FutureExt as _;

    #[tokio::test]
    async fn copies_take_turns_and_leave_nothing_behind() {
        let turns = Turns::default();
        let key = Key { mode: Mode::Test, request_id: RequestId::parse("a").unwrap() };
        let other = Key { mode: Mode::Live, ..key.clone() };
        let first = turns.take(&key).await;
        assert!(turns.take(&key).now_or_never().is_none(), "the second copy waits");
        assert!(turns.take(&other).now_or_never().is_some(), "another mode is another job");
        drop(first);
        drop(turns.take(&key).await);
        assert!(turns.locked().is_empty());
    }
}
