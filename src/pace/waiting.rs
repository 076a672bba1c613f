//! Callers who wait for a place, counted.

use std::sync::atomic::Ordering;

use super::{Pacer, index};
use crate::job::Lane;

/// How many callers wait for a place in each lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiters {
    /// Somebody waits behind them.
    pub interactive: usize,
    /// Nobody does.
    pub bulk: usize,
}

/// Counts a caller as long as it waits.
pub(super) struct Waiting<'a> {
    pacer: &'a Pacer,
    lane: usize,
    ahead: bool,
}

impl<'a> Waiting<'a> {
    pub(super) fn new(pacer: &'a Pacer, lane: Lane, ahead: bool) -> Self {
        let lane = index(lane);
        pacer.waiting[lane].fetch_add(1, Ordering::Relaxed);
        pacer.waiting_ahead.fetch_add(usize::from(ahead), Ordering::Relaxed);
        Self { pacer, lane, ahead }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.pacer.waiting[self.lane].fetch_sub(1, Ordering::Relaxed);
        self.pacer.waiting_ahead.fetch_sub(usize::from(self.ahead), Ordering::Relaxed);
        // It may have been the other lane's turn all along.
        self.pacer.changed.send_replace(());
    }
}
