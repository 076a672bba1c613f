//! `make simulate`: many workers under one API budget, in virtual time, seed by seed.
//!
//! The pacer and the loops that lease places and share silence are the program's own; simulated are
//! the database (its arithmetic as in `ledger/postgres/budget.rs`), the network between them, Creem's
//! answers and the clock. Each fleet also loses a worker that holds places, gets new ones, and has one
//! that is told to be quiet. Asked is whether any second ever held more calls than the budget, how much
//! of the budget was used, whether the workers had equal shares, and whether silence was kept.
//!
//! `cargo test` runs a short form. Options: `--seeds N --from SEED`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test program: it says what is wrong by failing"
)]

mod fleet;

use std::process::ExitCode;
use std::time::Duration;

use fleet::{Fleet, Ran};

/// Calls a second, and how long to look: a small budget shows unequal shares only in time.
const BUDGETS: [(f64, u64); 3] = [(20.0, 120), (200.0, 30), (1_000.0, 10)];
const WORKERS: [usize; 4] = [1, 4, 16, 64];

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
        "budget/s  workers  seconds  most in 1 s  used of it  equal shares  late after silence"
    );
    for (per_second, seconds) in BUDGETS {
        for workers in WORKERS {
            let mut all = Vec::new();
            for seed in from..from + seeds {
                let fleet =
                    Fleet { seed, per_second, workers, duration: Duration::from_secs(seconds) };
                let ran = fleet.run();
                wrong.extend(judge(&fleet, &ran));
                all.push(ran);
            }
            println!("{}", row(per_second, workers, seconds, &all));
        }
    }
    println!("seeds {from} to {}", from + seeds - 1);
    for line in &wrong {
        eprintln!("WRONG: {line}");
    }
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
    if ran.fairness < 0.9 {
        say(format!("unequal shares: {:.2}, {:?}", ran.fairness, ran.shares));
    }
    wrong
}
