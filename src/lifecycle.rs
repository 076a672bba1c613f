//! The end in two stages: the first signal finishes what was sent, the second leaves at once,
//! and so does the grace period when it is over.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two stages.
#[derive(Debug, Clone, Default)]
pub struct Stages {
    /// Cancelled first: nothing new is begun.
    pub soft: CancellationToken,
    /// Cancelled last: nothing is waited for.
    pub hard: CancellationToken,
}

impl Stages {
    /// Turns signals and the grace period into the stages; resolves when the hard one is reached.
    ///
    /// # Errors
    /// If the operating system gives no signals.
    pub fn follow_signals(
        &self,
        grace: Duration,
    ) -> std::io::Result<impl Future<Output = ()> + Send + use<>> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stages = self.clone();
        Ok(async move {
            tokio::select! {
                name = first(&mut terminate, &mut interrupt) => {
                    tracing::info!(signal = name, "stopping; a second signal leaves at once");
                }
                () = stages.soft.cancelled() => {}
            }
            stages.soft.cancel();
            tokio::select! {
                name = first(&mut terminate, &mut interrupt) => {
                    tracing::warn!(signal = name, "leaving at once; jobs that were not settled will be delivered again, and rows of a file made by the same command");
                }
                () = tokio::time::sleep(grace) => {
                    tracing::warn!(grace_ms = crate::clock::as_millis(grace), "shutdown.grace is over; what was not settled will be delivered again");
                }
            }
            stages.hard.cancel();
        })
    }
}

async fn first(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
