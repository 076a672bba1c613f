//! Journeys in paused time: how long a delivery is held for which nothing is under
//! way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use creem_checkout_worker::clock::{ManualClock, SharedClock};
use creem_checkout_worker::creem::{Answer as Reached, Client, Options};
use creem_checkout_worker::job::{
    CheckoutRequest, Fingerprint, Lane, Mode, Rules as JobRules, Status,
};
use creem_checkout_worker::ledger::sqlite::SqliteLedger;
use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::ledger::{
    Answer, Command, Identity, JobCommand, Ledger, LedgerError, OnUnknown, Orders, OwnCommand,
    Retention, Standing, State,
};
use creem_checkout_worker::observe::health::Health;
use creem_checkout_worker::pace::breaker::FEWEST;
use creem_checkout_worker::pace::{Limits, Pacer};
use creem_checkout_worker::retry::{Backoff, Policy};
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options as SimulatorOptions, Simulator};
use creem_checkout_worker::worker::ask::{Ask, LONGEST_HOLD};
use creem_checkout_worker::worker::call_time::CallTime;
use creem_checkout_worker::worker::circuit::Circuit;
use creem_checkout_worker::worker::gate::{Gate, Reason};
use creem_checkout_worker::worker::journey::{Journey, Verdict};
use creem_checkout_worker::worker::orders::Orders as WorkerOrders;
use creem_checkout_worker::worker::rules::{LaneRules, Rules};
use creem_checkout_worker::worker::trouble::Trouble;
use creem_checkout_worker::worker::turns::Turns;
use futures::future::BoxFuture;
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ledger::key;
use crate::support::{body, soon};

const START: i64 = 1_795_370_400_000;

struct Bench {
    journey: Journey,
    clock: Arc<ManualClock>,
    directory: TempDir,
}

fn bench() -> Bench {
    // Nobody is there, and nobody is asked.
    bench_with("http://127.0.0.1:1", |ledger| Arc::new(Prompt(ledger)))
}

/// A ledger that is waited for outside of paused time, which would leap on meanwhile.
#[derive(Debug)]
struct Prompt(SqliteLedger);

impl Ledger for Prompt {
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        let answer = futures::executor::block_on(self.0.execute(command));
        Box::pin(std::future::ready(answer))
    }

    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>> {
        self.0.standing()
    }

    fn identity(&self) -> &Identity {
        self.0.identity()
    }

    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        self.0.orders()
    }

    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        self.0.sweep(retention)
    }
}

fn bench_with(creem: &str, wrap: impl FnOnce(SqliteLedger) -> Arc<dyn Ledger>) -> Bench {
    let directory = TempDir::new().unwrap();
    let manual = Arc::new(ManualClock::at(START));
    let clock: SharedClock = manual.clone();
    let path = directory.path().join("ledger.db");
    let ledger = wrap(SqliteLedger::open(&path, clock.clone(), |_| {}).unwrap());
    let lane = LaneRules {
        policy: Policy {
            max_attempts: 8,
            max_elapsed: Duration::from_hours(6),
            backoff: Backoff::try_new(Duration::from_millis(250), Duration::from_mins(1)).unwrap(),
        },
        max_age: None,
    };
    let creem = Options {
        base_url: creem.parse().unwrap(),
        api_key: "creem_test_canary".to_owned().into(),
        mode: Mode::Test,
        request_timeout: Duration::from_secs(10),
        proxy: None,
        ca_pem: None,
        concurrency: 1,
        checkout_hosts: Vec::new(),
    };
    let journey = Journey {
        rules: Rules {
            interactive: lane,
            bulk: lane,
            on_unknown: OnUnknown::Retry,
            request_timeout: Duration::from_secs(10),
            retention: Duration::from_hours(7 * 24),
        },
        creem: Client::new(&creem).unwrap(),
        pacer: Pacer::new(Limits { ceiling: None, bulk_share: 0.05 }),
        gate: Arc::new(Gate::new(clock.clone(), ledger.clone())),
        orders: WorkerOrders::default(),
        circuit: Circuit::new(Duration::from_secs(10)),
        call_time: CallTime::new(Duration::from_secs(10)),
        turns: Turns::default(),
        trouble: Trouble::default(),
        key_accepted_at: tokio::sync::Mutex::default(),
        clock,
        stop: CancellationToken::new(),
        ledger,
    };
    Bench { journey, clock: manual, directory }
}

impl Bench {
    fn ask(&self) -> Ask {
        let request = CheckoutRequest::parse(body("a").as_bytes(), &JobRules::default()).unwrap();
        Ask {
            key: key("a"),
            fingerprint: Fingerprint::of(&request.members, &self.journey.ledger.identity().secret),
            request,
            lane: Lane::Interactive,
            campaign: None,
            deadline: None,
            published_at: None,
            picked_up_at: START,
            redelivered: false,
            elsewhere: false,
            look_first: false,
            session: CancellationToken::new(),
            hold_until: Instant::now() + LONGEST_HOLD,
            permits: Arc::new(Semaphore::new(1)),
        }
    }

    async fn held(&self, what: &str, ask: Ask, time: Duration) {
        let began = Instant::now();
        let travelled = tokio::time::timeout(LONGEST_HOLD * 2, self.journey.run(&ask)).await;
        let (verdict, _) = travelled.unwrap_or_else(|_| panic!("{what}: held too long"));
        assert!(matches!(verdict, Verdict::Delay { .. }), "{what}: {verdict:?}");
        assert_eq!(began.elapsed().as_secs(), time.as_secs(), "{what}");
        let inspector = Inspector::open(&self.directory.path().join("ledger.db"));
        assert_eq!(inspector.unwrap().row(&key("a")).unwrap(), None, "{what}: no attempt");
    }
}

#[tokio::test(start_paused = true)]
async fn a_delivery_is_held_for_so_long_and_no_longer_whatever_it_waits_for() {
    for reason in [Reason::Key, Reason::Publishing, Reason::Ledger] {
        let bench = bench();
        bench.journey.gate.close(reason);
        bench.held(reason.as_str(), bench.ask(), LONGEST_HOLD).await;
    }
    let bench = bench();
    let _turn = bench.journey.turns.take(&key("a")).await;
    bench.held("the turn of another copy", bench.ask(), LONGEST_HOLD).await;
}

#[tokio::test(start_paused = true)]
async fn a_job_in_a_full_lane_makes_room_while_the_key_is_refused_but_not_at_once() {
    let bench = bench();
    bench.journey.gate.close(Reason::Key);
    let full = Ask { permits: Arc::new(Semaphore::new(0)), ..bench.ask() };
    bench.held("a full lane", full, Duration::from_secs(5)).await;
    let silent = self::bench();
    silent.journey.pacer.quiet(Duration::from_mins(5));
    let full = Ask { permits: Arc::new(Semaphore::new(0)), ..silent.ask() };
    silent.held("a full lane while Creem wants silence", full, Duration::from_secs(5)).await;
    let hurried =
        Ask { permits: Arc::new(Semaphore::new(0)), deadline: Some(i64::MAX), ..bench.ask() };
    bench.held("a job with a deadline keeps its place", hurried, LONGEST_HOLD).await;
}

#[tokio::test]
async fn a_creem_that_cannot_be_reached_costs_time_and_no_attempt() {
    let bench = bench();
    let ask = bench.ask();
    let path = bench.directory.path().join("ledger.db");
    let tried = crate::support::eventually("it is tried", || async {
        let row = Inspector::open(&path).unwrap().row(&key("a")).unwrap();
        // It may have been tried more than once before it is looked at.
        row.is_some_and(|row| {
            row.state == State::Waiting && row.attempts > 0 && row.attempts == row.free
        })
    });
    tokio::select! {
        (verdict, _) = bench.journey.run(&ask) => panic!("it is not given up: {verdict:?}"),
        () = tried => {}
    }
}

#[tokio::test]
async fn the_time_in_which_its_lane_is_paused_counts_against_no_job() {
    let any = ([127, 0, 0, 1], 0).into();
    let script = Script::parse(br#"{"faults":[{"request_id":"a","kind":"status","status":500}]}"#);
    let options = SimulatorOptions { script: script.unwrap(), ..SimulatorOptions::default() };
    let (simulator, serve) = Simulator::start(any, options).await.unwrap();
    tokio::spawn(serve);
    let mut bench = bench_with(&simulator.url(), |ledger| Arc::new(ledger));
    let hour = Duration::from_hours(1);
    bench.journey.rules.interactive.policy = Policy {
        max_attempts: u32::MAX,
        max_elapsed: hour.mul_f64(1.5),
        backoff: Backoff::try_new(hour, hour).unwrap(),
    };
    let journey = &bench.journey;
    let health = Health::default();
    let order = async |order: OwnCommand| {
        journey.ledger.tell(order).await.unwrap();
        journey.orders.look(&*journey.ledger, &health).await;
    };
    let ask = || Ask { published_at: Some(START), ..bench.ask() };
    let delayed = || async { matches!(journey.run(&ask()).await.0, Verdict::Delay { .. }) };
    assert!(delayed().await);
    order(OwnCommand::PauseLane(Lane::Interactive)).await;
    bench.clock.advance(hour * 2);
    order(OwnCommand::ResumeLane(Lane::Interactive)).await;
    let posts = simulator.log().posts().len();
    assert!(delayed().await, "two hours of a pause are no time");
    assert!(simulator.log().posts().len() > posts, "it was tried");
    // The other lane's pauses are nothing to it.
    order(OwnCommand::PauseLane(Lane::Bulk)).await;
    bench.clock.advance(hour * 2);
    order(OwnCommand::ResumeLane(Lane::Bulk)).await;
    let (verdict, _) = journey.run(&ask()).await;
    let Verdict::Reply(stored) = verdict else { panic!("{verdict:?}") };
    assert_eq!(stored.code.as_deref(), Some("time_exhausted"));
}

/// A ledger whose first settle meets a bug of ours, before or after it has taken effect.
#[derive(Debug)]
struct Buggy {
    ledger: SqliteLedger,
    armed: AtomicBool,
    after: bool,
}

impl Ledger for Buggy {
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        let settle = matches!(command, Command::Job(JobCommand::Settle(_)));
        let bug = settle && self.armed.swap(false, Ordering::SeqCst);
        assert!(!bug || self.after, "a bug");
        let answer = self.ledger.execute(command);
        Box::pin(async move {
            let answer = answer.await;
            assert!(!bug, "a bug");
            answer
        })
    }

    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>> {
        self.ledger.standing()
    }

    fn identity(&self) -> &Identity {
        self.ledger.identity()
    }

    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        self.ledger.orders()
    }

    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        self.ledger.sweep(retention)
    }
}

#[tokio::test]
async fn a_bug_under_a_lease_counts_the_session_that_may_exist() {
    let any = ([127, 0, 0, 1], 0).into();
    let (simulator, serve) = Simulator::start(any, SimulatorOptions::default()).await.unwrap();
    tokio::spawn(serve);
    for (after, status, ambiguous) in [(false, Status::Unresolved, 1), (true, Status::Succeeded, 0)]
    {
        let bench = bench_with(&simulator.url(), |ledger| {
            Arc::new(Buggy { ledger, armed: AtomicBool::new(true), after })
        });
        let (verdict, _) = bench.journey.run(&bench.ask()).await;
        let Verdict::Reply(stored) = verdict else { panic!("{verdict:?}") };
        assert_eq!(stored.status, status);
        let row = crate::ledger::row(&bench.directory.path().join("ledger.db"), "a");
        assert_eq!((row.state, row.ambiguous), (State::Ended(status), ambiguous));
    }
}

/// A Creem that does with the job what a script says, and a journey to it.
async fn with_creem(script: &str) -> (Bench, Arc<Simulator>) {
    let any = ([127, 0, 0, 1], 0).into();
    let script = Script::parse(script.as_bytes()).unwrap();
    let options = SimulatorOptions { script, ..SimulatorOptions::default() };
    let (simulator, serve) = Simulator::start(any, options).await.unwrap();
    tokio::spawn(serve);
    let bench = bench_with(&simulator.url(), |ledger| Arc::new(ledger));
    (bench, simulator)
}

/// A ledger in which something else happens while a claim is written.
struct Meanwhile {
    ledger: Prompt,
    happens: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meanwhile").finish_non_exhaustive()
    }
}

impl Ledger for Meanwhile {
    fn execute(&self, command: Command) -> BoxFuture<'static, Result<Answer, LedgerError>> {
        let claim = matches!(command, Command::Job(JobCommand::Claim(_)));
        let answer = self.ledger.execute(command);
        if claim {
            (self.happens)();
        }
        answer
    }

    fn standing(&self) -> BoxFuture<'static, Result<Standing, LedgerError>> {
        self.ledger.standing()
    }

    fn identity(&self) -> &Identity {
        self.ledger.identity()
    }

    fn orders(&self) -> BoxFuture<'static, Result<Orders, LedgerError>> {
        self.ledger.orders()
    }

    fn sweep(&self, retention: Retention) -> BoxFuture<'static, Result<usize, LedgerError>> {
        self.ledger.sweep(retention)
    }
}

#[tokio::test]
async fn a_deadline_that_passes_while_the_claim_is_written_costs_no_call() {
    let any = ([127, 0, 0, 1], 0).into();
    let (simulator, serve) = Simulator::start(any, SimulatorOptions::default()).await.unwrap();
    tokio::spawn(serve);
    let passing: Arc<std::sync::OnceLock<Arc<ManualClock>>> = Arc::default();
    let clock = passing.clone();
    let bench = bench_with(&simulator.url(), |ledger| {
        let happens = move || {
            if let Some(clock) = clock.get() {
                clock.advance(Duration::from_secs(6));
            }
        };
        Arc::new(Meanwhile { ledger: Prompt(ledger), happens: Box::new(happens) })
    });
    passing.set(bench.clock.clone()).unwrap();
    let hurried = Ask { deadline: Some(START + 5_000), ..bench.ask() };
    let (status, code) = bench.status(&hurried).await;
    assert_eq!((status, code.as_deref()), (Status::Expired, Some("deadline_passed")));
    assert_eq!(simulator.log().posts().len(), 0, "nobody waits for it");
    let row = bench.row();
    assert_eq!((row.attempts, row.ambiguous), (0, 0), "nothing was sent");
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_closes_while_a_place_is_waited_for_holds_the_call() {
    let mut bench = bench();
    bench.journey.pacer = Pacer::new(Limits { ceiling: Some(1.0), bulk_share: 0.05 });
    bench.journey.pacer.admit(Lane::Interactive).await;
    let closes = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        bench.journey.gate.close(Reason::Key);
    };
    tokio::join!(bench.held("a key that is refused", bench.ask(), LONGEST_HOLD), closes);
}

const FAILS: &str = r#"{"faults":[{"request_id":"a","kind":"status","status":500}]}"#;

impl Bench {
    fn row(&self) -> creem_checkout_worker::ledger::Row {
        crate::ledger::row(&self.directory.path().join("ledger.db"), "a")
    }

    fn backoff(&mut self, delay: Duration) {
        self.journey.rules.interactive.policy.backoff = Backoff::try_new(delay, delay).unwrap();
    }

    async fn status(&self, ask: &Ask) -> (Status, Option<String>) {
        let (verdict, _) = self.journey.run(ask).await;
        let Verdict::Reply(stored) = verdict else { panic!("{verdict:?}") };
        (stored.status, stored.code)
    }

    /// Brings a job to a wait that is not spent in place, and that wait to its end; what for.
    async fn delayed(&self) -> &'static str {
        let ask = self.ask();
        // Short ones pass in place.
        let time_passes = async {
            const STEP: Duration = Duration::from_millis(5);
            loop {
                tokio::time::sleep(STEP).await;
                self.clock.advance(STEP);
            }
        };
        let verdict = tokio::select! {
            (verdict, _) = self.journey.run(&ask) => verdict,
            () = time_passes => unreachable!("it never ends"),
        };
        let Verdict::Delay { wait, why } = verdict else { panic!("{verdict:?}") };
        self.clock.advance(wait);
        why
    }

    /// So many calls to Creem have failed.
    fn failed_calls(&self, calls: u32) {
        let Journey { circuit, gate, pacer, .. } = &self.journey;
        for _ in 0..calls {
            let failed = Reached::NotMade { reason: "connection refused".to_owned() };
            circuit.note(&failed, None, gate, pacer);
        }
    }
}

#[tokio::test]
async fn a_call_that_shows_whether_creem_is_back_is_no_attempt_of_the_job() {
    let (mut bench, simulator) = with_creem(FAILS).await;
    bench.journey.rules.interactive.policy.max_attempts = 1;
    let circuit = &bench.journey.circuit;
    bench.failed_calls(FEWEST);
    let ask = bench.ask();
    let probed = crate::support::eventually("a probe fails", || async {
        simulator.log().posts().len() == 1 && bench.row().state == State::Waiting
    });
    tokio::select! {
        (verdict, _) = bench.journey.run(&ask) => panic!("it is not given up: {verdict:?}"),
        () = circuit.keep_time() => unreachable!("it never ends"),
        () = probed => {}
    }
    let row = bench.row();
    assert_eq!((row.attempts, row.free, row.ambiguous), (1, 1, 1), "a session may exist");
}

#[tokio::test]
async fn a_call_that_shows_whether_creem_is_back_has_all_the_time_that_a_call_may_take() {
    let (bench, simulator) = with_creem(r#"{"latency_ms":600,"faults":[]}"#).await;
    let Journey { circuit, gate, .. } = &bench.journey;
    bench.failed_calls(FEWEST);
    let hurried = Ask { deadline: Some(START + 300), ..bench.ask() };
    let told = tokio::select! {
        told = bench.status(&hurried) => told,
        () = circuit.keep_time() => unreachable!("it never ends"),
    };
    assert_eq!((told.0, simulator.log().posts().len()), (Status::Succeeded, 1));
    assert!(gate.is_open(), "Creem is back");
}

#[tokio::test]
async fn calls_that_deadlines_cut_short_say_nothing_of_creem_and_are_soon_not_begun() {
    let (bench, simulator) = with_creem(r#"{"latency_ms":2000,"faults":[]}"#).await;
    let Journey { call_time, gate, .. } = &bench.journey;
    bench.failed_calls(FEWEST - 1);
    let hurried = Ask { deadline: Some(START + 300), ..bench.ask() };
    let passes = async {
        simulator.posts_arrived(1).await;
        bench.clock.advance(Duration::from_millis(300));
    };
    tokio::join!(bench.status(&hurried), passes);
    assert!(gate.is_open(), "one more failure would have closed it");
    for _ in 0..20 {
        call_time.note(Duration::from_secs(2));
    }
    let next = Ask { deadline: Some(START + 1_300), picked_up_at: START + 400, ..bench.ask() };
    bench.clock.advance(Duration::from_millis(100));
    assert_ne!(soon("an end", bench.status(&next)).await.0, Status::Succeeded);
    assert_eq!(simulator.log().posts().len(), 1, "it would have made a session for nobody");
}

#[tokio::test]
async fn a_call_that_was_not_answered_in_half_of_its_time_is_a_failure_whatever_the_deadline() {
    let (mut bench, simulator) = with_creem(r#"{"latency_ms":5000,"faults":[]}"#).await;
    bench.journey.rules.request_timeout = Duration::from_millis(600);
    bench.failed_calls(FEWEST - 1);
    let hurried = Ask { deadline: Some(START + 500), ..bench.ask() };
    let passes = async {
        simulator.posts_arrived(1).await;
        bench.clock.advance(Duration::from_millis(500));
    };
    let ((status, _), ()) = tokio::join!(bench.status(&hurried), passes);
    assert_eq!(status, Status::Unresolved);
    assert!(bench.journey.gate.is_held_only_by(Reason::Circuit));
}

#[tokio::test]
async fn a_link_that_did_not_come_is_fetched_ahead_of_the_line() {
    let script = r#"{"latency_ms":200,"faults":[{"request_id":"a","kind":"no_url"}]}"#;
    let (mut bench, simulator) = with_creem(script).await;
    bench.journey.rules.request_timeout = Duration::from_secs(2);
    bench.journey.pacer = Pacer::new(Limits { ceiling: Some(20.0), bulk_share: 0.05 });
    let ask = bench.ask();
    let line = async {
        simulator.posts_arrived(1).await;
        let callers = (0..64).map(|_| async {
            loop {
                bench.journey.pacer.admit(Lane::Interactive).await.come().await;
            }
        });
        futures::future::join_all(callers).await;
    };
    tokio::select! {
        told = bench.status(&ask) => assert_eq!(told.0, Status::Succeeded),
        () = line => unreachable!("it never ends"),
    }
}

#[tokio::test]
async fn a_retry_that_is_not_earned_yet_waits_for_the_budget_again() {
    let (mut bench, simulator) = with_creem(FAILS).await;
    bench.journey.rules.interactive.policy.max_elapsed = Duration::from_mins(1);
    bench.journey.rules.interactive.policy.max_attempts = 100;
    bench.backoff(Duration::from_secs(5));
    bench.delayed().await;
    let made = (simulator.log().posts().len(), bench.row().attempts);
    let Journey { circuit, gate, pacer, .. } = &bench.journey;
    while circuit.spend_retry(Lane::Interactive) {}
    for _ in 0..1_000 {
        circuit.promise_retry(Lane::Interactive, Duration::MAX).unwrap();
    }
    for _ in 0..2 {
        assert_eq!(bench.delayed().await, "retry_budget", "and that is no time");
    }
    assert_eq!((simulator.log().posts().len(), bench.row().attempts), made);
    for _ in 0..1_000 {
        circuit.note(&Reached::Throttled { retry_after: None }, None, gate, pacer);
    }
    assert_ne!(bench.delayed().await, "retry_budget");
    assert!(simulator.log().posts().len() > made.0, "a tenth of a thousand");
}

#[tokio::test]
async fn a_job_that_is_parked_takes_nothing_of_the_retry_budget() {
    let (mut bench, _simulator) = with_creem(FAILS).await;
    bench.journey.rules.on_unknown = OnUnknown::Park;
    let told = bench.status(&bench.ask()).await;
    assert_eq!(told, (Status::Unresolved, Some("outcome_unknown".to_owned())));
    let at_once =
        || bench.journey.circuit.promise_retry(Lane::Interactive, Duration::ZERO).is_some();
    assert!(std::iter::repeat_with(at_once).take(10).all(|at_once| at_once));
}

#[tokio::test]
async fn a_wait_for_the_retry_budget_takes_no_pause_back() {
    let (mut bench, _simulator) = with_creem(FAILS).await;
    bench.journey.rules.interactive.policy.max_elapsed = Duration::from_mins(1);
    bench.journey.rules.interactive.policy.max_attempts = 100;
    bench.backoff(Duration::from_secs(5));
    bench.delayed().await;
    bench.journey.gate.close(Reason::Key);
    bench.clock.advance(Duration::from_mins(10));
    bench.journey.gate.open(Reason::Key);
    for _ in 0..200 {
        bench.journey.circuit.promise_retry(Lane::Interactive, Duration::MAX).unwrap();
    }
    for _ in 0..5 {
        bench.delayed().await;
    }
}

#[tokio::test]
async fn what_a_spent_retry_budget_makes_a_job_wait_is_no_time() {
    let (mut bench, _simulator) = with_creem(FAILS).await;
    bench.journey.rules.interactive.policy.max_elapsed = Duration::from_mins(1);
    for _ in 0..1_000 {
        bench.journey.circuit.promise_retry(Lane::Interactive, Duration::MAX).unwrap();
    }
    for _ in 0..2 {
        let (verdict, _) = bench.journey.run(&bench.ask()).await;
        let Verdict::Delay { wait, .. } = verdict else { panic!("{verdict:?}") };
        assert!(wait > Duration::from_mins(2), "{wait:?}");
        bench.clock.advance(wait);
    }
}

#[tokio::test]
async fn a_back_off_leaves_time_for_a_call_before_the_deadline_and_a_retry_after_does_not() {
    let (mut bench, simulator) = with_creem(FAILS).await;
    bench.backoff(Duration::from_hours(5));
    let hurried = || Ask { deadline: Some(START + 60_000), ..bench.ask() };
    let (verdict, _) = bench.journey.run(&hurried()).await;
    let Verdict::Delay { wait, .. } = verdict else { panic!("{verdict:?}") };
    assert!(wait <= Duration::from_secs(30), "{wait:?}");
    bench.clock.advance(wait);
    simulator.set_script(
        Script::parse(
            br#"{"faults":[{"request_id":"a","kind":"status","status":503,"retry_after":"3600"}]}"#,
        )
        .unwrap(),
    );
    // A call was made whose outcome nobody knows.
    let expected = (Status::Unresolved, Some("deadline_passed".to_owned()));
    assert_eq!(bench.status(&hurried()).await, expected);
    // And nobody calls before Creem wants it.
    assert!(bench.journey.pacer.silence() > Duration::from_mins(4));
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_time_is_over_before_creem_wants_to_be_asked_expires_at_once() {
    let bench = bench();
    bench.journey.pacer.quiet(Duration::from_mins(4));
    let began = Instant::now();
    let hurried = Ask { deadline: Some(START + 60_000), ..bench.ask() };
    let expected = (Status::Expired, Some("deadline_passed".to_owned()));
    assert_eq!(bench.status(&hurried).await, expected);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn a_job_that_its_lane_finds_too_old_expires_without_a_call() {
    let (mut bench, simulator) = with_creem(r#"{"faults":[]}"#).await;
    bench.journey.rules.interactive.max_age = Some(Duration::from_mins(1));
    let old = Ask { published_at: Some(START - 60_001), ..bench.ask() };
    assert_eq!(bench.status(&old).await, (Status::Expired, Some("max_age".to_owned())));
    assert_eq!(simulator.log().posts().len(), 0);
    let young = Ask { published_at: Some(START - 30_000), picked_up_at: START + 1, ..bench.ask() };
    bench.clock.advance(Duration::from_secs(1));
    assert_eq!(bench.status(&young).await.0, Status::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_job_expires_while_it_waits_for_its_place() {
    let mut bench = bench();
    bench.journey.pacer = Pacer::new(Limits { ceiling: Some(0.001), bulk_share: 0.05 });
    bench.journey.pacer.admit(Lane::Interactive).await;
    let hurried = Ask { deadline: Some(START + 60_000), ..bench.ask() };
    let began = Instant::now();
    let time = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            bench.clock.advance(Duration::from_secs(1));
        }
    };
    let expired = tokio::select! {
        expired = bench.status(&hurried) => expired,
        () = time => unreachable!("it never ends"),
    };
    assert_eq!(expired, (Status::Expired, Some("deadline_passed".to_owned())));
    assert!(began.elapsed() <= Duration::from_secs(61), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_call_ends_with_the_jobs_deadline() {
    let (bench, simulator) = with_creem(r#"{"faults":[{"request_id":"a","kind":"hang"}]}"#).await;
    let hurried = Ask { deadline: Some(START + 300), ..bench.ask() };
    // Well before a call would end by itself.
    let most = Duration::from_secs(8);
    let passes = async {
        simulator.posts_arrived(1).await;
        bench.clock.advance(Duration::from_millis(300));
    };
    let expired =
        tokio::time::timeout(most, async { tokio::join!(bench.status(&hurried), passes).0 });
    let expired = expired.await.unwrap();
    assert_eq!(expired, (Status::Unresolved, Some("deadline_passed".to_owned())));
}

#[tokio::test]
async fn what_the_ledger_has_is_told_whatever_holds_calls_back() {
    let (mut bench, simulator) = with_creem(r#"{"faults":[]}"#).await;
    assert_eq!(bench.status(&bench.ask()).await.0, Status::Succeeded);
    for reason in [Reason::Key, Reason::Circuit] {
        bench.journey.gate.close(reason);
        let told = soon("what is stored", bench.status(&bench.ask())).await;
        assert_eq!(told.0, Status::Succeeded);
        bench.journey.gate.open(reason);
    }
    // Nor does one that was about before wait for a place that it does not need.
    bench.journey.pacer = Pacer::new(Limits { ceiling: Some(0.001), bulk_share: 0.05 });
    bench.journey.pacer.admit(Lane::Interactive).await;
    let again = Ask { look_first: true, ..bench.ask() };
    assert_eq!(soon("what is stored", bench.status(&again)).await.0, Status::Succeeded);
    // Nor does one whose deadline passes while another copy has the turn.
    let turn = bench.journey.turns.take(&key("a")).await;
    let late = Ask { deadline: Some(START - 1), ..bench.ask() };
    assert_eq!(soon("what is stored", bench.status(&late)).await.0, Status::Succeeded);
    drop(turn);
    assert_eq!(simulator.log().posts().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_late_copy_of_a_job_that_is_yet_to_be_parked_waits_for_its_turn() {
    let bench = bench();
    let lost = Ask { elsewhere: true, ..bench.ask() };
    assert_eq!(bench.status(&lost).await.0, Status::Unresolved);
    let turn = bench.journey.turns.take(&key("a")).await;
    let late = Ask { deadline: Some(START - 1), ..bench.ask() };
    let (verdict, _) = bench.journey.run(&late).await;
    assert!(matches!(verdict, Verdict::Delay { .. }), "its turn did not come: {verdict:?}");
    drop(turn);
    let again = Ask { deadline: Some(START - 1), ..bench.ask() };
    assert_eq!(bench.status(&again).await.0, Status::Unresolved);
}

#[tokio::test(start_paused = true)]
async fn a_place_without_a_call_is_the_next_ones() {
    let mut bench = bench();
    let late = Ask { deadline: Some(START - 1), ..bench.ask() };
    assert_eq!(bench.status(&late).await.0, Status::Expired);
    bench.journey.pacer = Pacer::new(Limits { ceiling: Some(0.001), bulk_share: 0.05 });
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(bench.status(&bench.ask()).await.0, Status::Expired, "what is stored");
    }
    assert!(began.elapsed() < Duration::from_mins(1), "{:?}", began.elapsed());
}
