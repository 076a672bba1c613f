//! `make simulate`: many workers under one API budget, in virtual time, seed by seed.
//!
//! The pacer and the loops that lease places and share silence are the program's own; simulated are
//! the database (its arithmetic is in `line.rs`), the network between them, Creem's
//! answers and the clock. Each fleet also loses a worker that holds places, gets new ones, and has one
//! that is told to be quiet. Asked is whether any second ever held more calls than the budget, how much
//! of the budget was used, whether the workers had equal shares, and whether silence was kept. Other fleets have
//! no budget, and a Creem that says "slow down" above a limit: asked is whether they find it together.
//!
//! `cargo test` runs a short form. Options: `--seeds N --from SEED`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test program: it says what is wrong by failing"
)]

mod fleet;
mod learning;
mod line;

use std::process::ExitCode;
use std::time::Duration;

use creem_checkout_worker::job::Lane;
use fleet::{Fleet, Ran, Waited};
use learning::{Learned, Learning};

/// Calls a second, and how long to look: a small budget shows unequal shares only in time.
const BUDGETS: [(f64, u64); 3] = [(20.0, 120), (200.0, 30), (1_000.0, 10)];
const WORKERS: [usize; 4] = [1, 4, 16, 64];
/// How long fleets learn.
const LEARNING: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("budget: test");
        return ExitCode::SUCCESS;
    }
    let option = |name: &str, otherwise: u64| {
        let at = arguments.iter().position(|argument| argument == name);
        at.map_or(otherwise, |at| arguments[at + 1].parse().unwrap())
    };
    let (from, seeds) = (option("--from", 1), option("--seeds", 2));
    let mut wrong = Vec::new();
    println!(
        "lane         budget/s  workers  seconds  most in 1 s  used of it  equal shares  late after silence"
    );
    for lane in Lane::ALL {
        for (per_second, seconds) in BUDGETS {
            for workers in WORKERS {
                let duration = Duration::from_secs(seconds);
                let fleet = |seed| Fleet { seed, per_second, workers, duration, lane };
                let mut all = Vec::new();
                for fleet in (from..from + seeds).map(fleet) {
                    let ran = fleet.run();
                    wrong.extend(judge(&fleet, &ran));
                    all.push(ran);
                }
                println!("{:<11}{}", lane.as_str(), row(per_second, workers, seconds, &all));
            }
        }
    }
    println!();
    println!("buyers beside a campaign at all workers, at a tenth of the budget");
    println!("  budget/s  workers  most in 1 s  used of it  waited p50  p99 (ms)");
    for (per_second, seconds) in BUDGETS {
        for workers in WORKERS {
            let duration = Duration::from_secs(seconds);
            let fleet = |seed| Fleet { seed, per_second, workers, duration, lane: Lane::Bulk };
            let mut all = Vec::new();
            for fleet in (from..from + seeds).map(fleet) {
                let waited = fleet.with_buyers();
                wrong.extend(judge_buyers(&fleet, &waited));
                all.push(waited);
            }
            println!("  {}", row_of_buyers(per_second, workers, &all));
        }
    }
    wrong.extend(learn(from, seeds));
    for what in &wrong {
        eprintln!("{what}");
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Fleets that nobody has told how fast Creem can be asked.
fn learn(from: u64, seeds: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    println!();
    println!("no ceiling: a campaign, and buyers at the same workers or at one of their own");
    println!(
        "   limit/s  workers  buyers  used of it  refused  waited p50  p99 (ms)  after an outage (s)"
    );
    for limit in [30.0, 300.0, 1_000.0] {
        for (workers, mixed) in [(1, false), (4, true), (16, false), (64, true)] {
            let mut all = Vec::new();
            // Half as many: their ten thousands of calls take long.
            for seed in from..from + seeds.div_ceil(2) {
                let learning = Learning { seed, limit, workers, duration: LEARNING, mixed };
                let learned = learning.run();
                wrong.extend(judge_learning(&learning, &learned));
                all.push(learned);
            }
            println!("{}", row_of_learning(limit, workers, mixed, &all));
        }
    }
    for workers in [1, 16] {
        let rate = Learning::quiet(from, workers);
        println!("{workers} workers of a few calls a second: {rate:.0} calls a second in the end");
        // Four times what is made, or what it began with.
        if !(100.0..=f64::from(u32::try_from(workers).unwrap()) * 40.0 + 120.0).contains(&rate) {
            wrong.push(format!("{workers} workers had a rate of {rate} after quiet minutes"));
        }
    }
    wrong
}

/// The worst of all seeds.
fn row_of_learning(limit: f64, workers: usize, mixed: bool, all: &[Learned]) -> String {
    let most = |of: &dyn Fn(&Learned) -> f64| all.iter().map(of).fold(0.0, f64::max);
    format!(
        "{limit:>10}  {workers:>7}  {:>6}  {:>10.3}  {:>7.4}  {:>10.0}  {:>8.0}  {:>19.1}",
        if mixed { "mixed" } else { "apart" },
        1.0 - most(&|learned| 1.0 - learned.used),
        most(&|learned| learned.refused),
        most(&|learned| millis(&learned.waits, 0.5)),
        most(&|learned| millis(&learned.waits, 0.99)),
        most(&|learned| learned.recovered.as_secs_f64())
    )
}

fn millis(waits: &[Duration], at: f64) -> f64 {
    part(waits, at).as_secs_f64() * 1_000.0
}

/// What fleets must not show that learn together.
fn judge_learning(learning: &Learning, learned: &Learned) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut say = |what: String| {
        wrong.push(format!(
            "{what} (seed {}, {} workers, mixed {}, Creem takes {} a second, nobody was told)",
            learning.seed, learning.workers, learning.mixed, learning.limit
        ));
    };
    // One worker by itself is held by the ways to the database and back.
    let least = if learning.capacity() > learning.limit * 2.0 { 0.88 } else { 0.75 };
    if learned.used < least {
        say(format!("only {:.2} of what it takes was used", learned.used));
    }
    // One "slow down" in ten seconds, and what is under way meanwhile, is more of few calls than of many.
    let most = if learning.limit < 100.0 { 0.04 } else { 0.01 };
    if learned.refused > most {
        say(format!("{:.3} of the calls were refused", learned.refused));
    }
    // The way to the database and back is 6 ms now and then, and 240 ms at its worst; while Creem is asked now and then
    // only, places are 50 ms apart.
    let (usual, longest) = (part(&learned.waits, 0.5), part(&learned.waits, 0.99));
    // Where bulk has places, they are the buyers' as they come, which is soon.
    let soon = Duration::from_millis(if learning.mixed { 80 } else { 20 });
    if usual > soon || longest > Duration::from_millis(400) {
        say(format!("buyers waited for {usual:?}, one in a hundred for {longest:?}"));
    }
    if learned.recovered > Duration::from_secs(15) {
        say(format!("after an outage it took {:?}", learned.recovered));
    }
    wrong
}

/// The worst of all seeds.
fn row(per_second: f64, workers: usize, seconds: u64, all: &[Ran]) -> String {
    let most = all.iter().map(|ran| ran.most_in_a_second).max().unwrap_or(0);
    let used = all.iter().map(|ran| ran.used).fold(f64::INFINITY, f64::min);
    let fairness = all.iter().map(|ran| ran.fairness).fold(f64::INFINITY, f64::min);
    let late: usize = all.iter().map(|ran| ran.in_silence).sum();
    format!(
        "{per_second:>8}  {workers:>7}  {seconds:>7}  {most:>11}  {used:>10.3}  {fairness:>12.3}  {late:>18}"
    )
}

/// What a run must not show.
fn judge(fleet: &Fleet, ran: &Ran) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut say = |what: String| {
        wrong.push(format!(
            "{what} (seed {}, {} workers, {} calls a second)",
            fleet.seed, fleet.workers, fleet.per_second
        ));
    };
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    if ran.most_in_a_second as f64 > fleet.per_second {
        say(format!("{} calls in one second", ran.most_in_a_second));
    }
    if ran.in_silence > 0 {
        say(format!("{} calls later than a second after Creem asked for silence", ran.in_silence));
    }
    // What a worker loses with its life, and a place that nobody was in time for, is not used.
    if fleet.capacity() > fleet.per_second && ran.used < 0.85 {
        say(format!("only {:.2} of the budget was used", ran.used));
    }
    // Who waits is served in turn. Bulk draws lots, which are equal only in time; its jobs are in one queue,
    // and whoever serves it serves them all.
    let fair = if fleet.lane == Lane::Bulk { 0.6 } else { 0.9 };
    if ran.fairness < fair {
        say(format!("unequal shares: {:.2}, {:?}", ran.fairness, ran.shares));
    }
    wrong
}

fn part(waits: &[Duration], part: f64) -> Duration {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index below the length"
    )]
    let at = ((waits.len() as f64 * part) as usize).min(waits.len() - 1);
    waits[at]
}

/// The worst of all seeds.
fn row_of_buyers(per_second: f64, workers: usize, all: &[Waited]) -> String {
    let calls = all.iter().map(|waited| waited.most_in_a_second).max().unwrap_or(0);
    let most = |of: &dyn Fn(&Waited) -> f64| all.iter().map(of).fold(0.0, f64::max);
    format!(
        "{per_second:>8}  {workers:>7}  {calls:>11}  {:>10.3}  {:>10.0}  {:>8.0}",
        1.0 - most(&|waited| 1.0 - waited.used),
        most(&|waited| millis(&waited.waits, 0.5)),
        most(&|waited| millis(&waited.waits, 0.99))
    )
}

/// What buyers must not meet: a line in which the whole campaign stands before them.
fn judge_buyers(fleet: &Fleet, waited: &Waited) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut say = |what: String| {
        wrong.push(format!(
            "{what} (seed {}, {} workers, {} calls a second, buyers beside a campaign)",
            fleet.seed, fleet.workers, fleet.per_second
        ));
    };
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    if waited.most_in_a_second as f64 > fleet.per_second {
        say(format!("{} calls in one second", waited.most_in_a_second));
    }
    if fleet.capacity() > fleet.per_second && waited.used < 0.85 {
        say(format!("only {:.2} of the budget was used", waited.used));
    }
    // A few places, and the way to the database and back, which is 0.2 s at its worst.
    let fair = Duration::from_millis(400).max(Duration::from_secs_f64(6.0 / fleet.per_second));
    let longest = part(&waited.waits, 0.99);
    if longest > fair {
        say(format!("one buyer in a hundred waited for {longest:?}"));
    }
    wrong
}
