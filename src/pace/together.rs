//! How workers learn one rate together: each tells what it has seen of late by going on with the rate that was
//! written down last. Whoever finds that another one was faster goes on with what that one wrote. So nobody leads,
//! nobody waits for anybody, and whoever dies takes nothing along but what it had yet to tell.

use std::time::Duration;

use tokio::time::Instant;

use super::rate::Rate;
use super::seen::Seen;
use super::{Pacer, State};

/// A rate that is to be written down for all who share it.
#[derive(Debug, Clone)]
pub struct Lesson {
    /// After which version; they are numbered.
    pub version: i64,
    /// The rate.
    pub text: String,
    /// When it was so.
    pub at: Instant,
    /// How far apart its calls are.
    pub interval: Duration,
    rate: Rate,
    seen: Seen,
    told_before: Instant,
}

impl Pacer {
    /// Waits until those who share the rate are to be told what was seen here, and what they share from then on.
    /// Whatever comes of it, one of the next three is to be called.
    pub async fn lesson(&self) -> Lesson {
        loop {
            let (due, now) = {
                let (now, mut state) = (Instant::now(), self.state());
                let due = state.seen.due(state.told_at);
                if due.is_some_and(|due| due <= now) {
                    return Self::make_lesson(&mut state, now);
                }
                (due, now)
            };
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(now)), if due.is_some() => {}
                () = self.saw.notified() => {}
            }
        }
    }

    fn make_lesson(state: &mut State, now: Instant) -> Lesson {
        let (seen, mut rate) = (std::mem::take(&mut state.seen), state.rate.clone());
        rate.see(&seen, now);
        let told_before = std::mem::replace(&mut state.told_at, now);
        let (text, interval) = (rate.keep(now), rate.interval());
        Lesson { version: state.version, text, at: now, interval, rate, seen, told_before }
    }

    /// It was written down.
    pub fn written(&self, lesson: Lesson) {
        let mut state = self.state();
        (state.rate, state.version) = (lesson.rate, lesson.version + 1);
    }

    /// It was not: somebody else was faster, and has written `text` so long ago. The next lesson comes at once, and
    /// says the same of that.
    pub fn corrected(&self, lesson: &Lesson, version: i64, text: &str, age: Duration) {
        let (now, mut state) = (Instant::now(), self.state());
        state.seen.join(lesson.seen);
        state.told_at = lesson.told_before;
        let rate = Rate::from_kept(text, age, self.limits.ceiling, now);
        (state.rate, state.version) = (rate, version);
    }

    /// It was not, or nobody knows whether it was.
    pub fn untold(&self, lesson: &Lesson) {
        self.state().seen.join(lesson.seen);
        self.saw.notify_one();
    }

    /// Hears what was written down so long ago.
    pub fn learn(&self, version: i64, text: &str, age: Duration) {
        let (now, mut state) = (Instant::now(), self.state());
        if version > state.version {
            let rate = Rate::from_kept(text, age, self.limits.ceiling, now);
            (state.rate, state.version) = (rate, version);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::pace::Limits;

    fn pacer() -> Pacer {
        Pacer::shared(Limits { ceiling: None, bulk_share: 0.05 })
    }

    fn now_or_never(pacer: &Pacer) -> Option<Lesson> {
        pacer.lesson().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn what_must_be_known_is_told_at_once_and_the_rest_in_its_time() {
        let pacer = pacer();
        let took = async || {
            let since = Instant::now();
            let lesson = pacer.lesson().await;
            pacer.written(lesson);
            since.elapsed()
        };
        let tell_nobody = tokio::time::timeout(Duration::from_secs(60), pacer.lesson()).await;
        assert!(tell_nobody.is_err(), "nothing was seen");
        pacer.slow_down(Instant::now());
        assert_eq!(took().await, Duration::ZERO);
        pacer.slow_down(Instant::now());
        assert_eq!(took().await, Duration::from_millis(20));
        // The first call that is taken after it, and one more.
        tokio::time::advance(Duration::from_millis(5)).await;
        pacer.taken(Instant::now());
        assert_eq!(took().await, Duration::from_millis(15));
        pacer.taken(Instant::now());
        assert_eq!(took().await, Duration::from_millis(400));
        pacer.grant([Instant::now() + Duration::from_secs(9)], true);
        assert!(pacer.admit(crate::job::Lane::Bulk).now_or_never().is_none());
        assert_eq!(took().await, Duration::from_millis(100), "a call has to wait");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_late_says_the_same_of_what_the_other_one_wrote() {
        let (one, other) = (pacer(), pacer());
        for pacer in [&one, &other] {
            pacer.slow_down(Instant::now());
        }
        let (first, late) = (one.lesson().await, other.lesson().await);
        assert_eq!((first.version, late.version), (0, 0));
        let written = first.text.clone();
        one.written(first);
        other.corrected(&late, 1, &written, Duration::from_millis(3));
        let again = now_or_never(&other).expect("it is told at once");
        assert_eq!(again.version, 1);
        let refusals = |text: &str| {
            let kept: serde_json::Value = serde_json::from_str(text).unwrap();
            kept["refused"][0].clone()
        };
        assert_eq!((refusals(&written), refusals(&again.text)), (1.into(), 2.into()));
        other.written(again);
        assert!(now_or_never(&other).is_none(), "it was told");
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_told_is_told_later() {
        let pacer = pacer();
        pacer.slow_down(Instant::now());
        let lesson = pacer.lesson().await;
        pacer.slow_down(Instant::now());
        pacer.untold(&lesson);
        let again = pacer.lesson().await;
        assert_eq!(again.seen.refused.count, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_version_is_heard_only_where_it_is_what_there_is() {
        let (one, fresh) = (pacer(), pacer());
        one.slow_down(Instant::now());
        let lesson = one.lesson().await;
        let slow = lesson.text.clone();
        fresh.learn(7, &slow, Duration::ZERO);
        assert!(fresh.explain().0 < pacer().explain().0, "it is heard");
        let (rate, _) = fresh.explain();
        fresh.learn(6, "", Duration::ZERO);
        assert_eq!(fresh.explain().0.to_bits(), rate.to_bits(), "an answer that came late");
        // A ledger that was restored.
        fresh.slow_down(Instant::now());
        let lesson = fresh.lesson().await;
        fresh.corrected(&lesson, 3, &slow, Duration::ZERO);
        assert_eq!(fresh.lesson().await.version, 3);
    }
}
