//! Journeys in paused time: how long a delivery is held for which nothing is under
//! way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use creem_checkout_worker::clock::{ManualClock, SharedClock};
use creem_checkout_worker::creem::{Client, Options};
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
use creem_checkout_worker::pace::{Limits, Pacer};
use creem_checkout_worker::retry::{Backoff, Policy};
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options as SimulatorOptions, Simulator};
use creem_checkout_worker::worker::ask::{Ask, LONGEST_HOLD};
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
use crate::support::body;

const START: i64 = 1_795_370_400_000;

struct Bench {
    journey: Journey,
    clock: Arc<ManualClock>,
    directory: TempDir,
}

fn bench() -> Bench {
    // Nobody is there, and nobody is asked.
    bench_with("http://127.0.0.1:1", |ledger| Arc::new(ledger))
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
        circuit: Circuit::default(),
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
