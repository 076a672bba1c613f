//! `creem-simulator`: a local Creem with scripted faults, for tests, demos and producers' CI.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};

/// A local Creem: the checkout API with scripted faults. `GET /_simulator/posts` answers every
/// POST it saw as JSON lines, `/_simulator/sessions` every session, `/_simulator/counters` the
/// sums; `PUT /_simulator/faults` replaces the fault script, `PUT /_simulator/sessions/ID/expired` (or
/// `completed`) changes a session.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, default_value = "127.0.0.1:4010")]
    listen: SocketAddr,
    /// The only key to accept; without it, any that begins with `creem_test_` (with --live: with
    /// `creem_` and not with `creem_test_`).
    #[arg(long)]
    api_key: Option<String>,
    /// Before every answer, e.g. 50ms.
    #[arg(long, default_value = "0ms", value_parser = humantime::parse_duration)]
    latency: std::time::Duration,
    /// A fault script: JSON with `seed` and `faults`, see the README.
    #[arg(long)]
    faults: Option<PathBuf>,
    /// Remember the newest so many POSTs and sessions only; all without it.
    #[arg(long)]
    keep: Option<usize>,
    /// A file that gets a JSON line of every session.
    #[arg(long)]
    sessions_file: Option<PathBuf>,
    /// Play the live host instead of the test host.
    #[arg(long)]
    live: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "this is how a command speaks")]
            {
                eprintln!("creem-simulator: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(arguments: Arguments) -> Result<(), String> {
    let mut script = match &arguments.faults {
        None => Script::default(),
        Some(path) => {
            let text = std::fs::read(path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            Script::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?
        }
    };
    if !arguments.latency.is_zero() {
        script.latency_ms = u64::try_from(arguments.latency.as_millis()).unwrap_or(u64::MAX);
    }
    let options = Options {
        api_key: arguments.api_key,
        live: arguments.live,
        script,
        keep: arguments.keep,
        sessions_file: arguments.sessions_file,
    };
    let (simulator, serve) = Simulator::start(arguments.listen, options)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", arguments.listen))?;
    #[expect(clippy::print_stdout, reason = "the address is this program's output")]
    {
        println!("listening on {}", simulator.url());
    }
    tokio::select! {
        () = serve => {}
        _ = tokio::signal::ctrl_c() => {}
        () = terminated() => {}
    }
    Ok(())
}

/// Waits for SIGTERM.
async fn terminated() {
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    }
}
