//! The commands, what they share, and the one place where an error becomes an exit code.

mod bulk;
mod campaign;
mod check;
mod engine;
mod enqueue;
mod lanes;
mod ledger;
mod look;
mod run;
mod show;
mod tell;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::check::Resolved;
use crate::config::{self, Problem};
use crate::job::Lane;
use crate::rabbit::envelope::is_campaign;

/// Turns create-checkout jobs from RabbitMQ into Creem checkout links: no job lost, never two
/// links for one `request_id`.
#[derive(Debug, Parser)]
#[command(name = "checkout-worker", version, propagate_version = true)]
struct Arguments {
    /// A TOML file over the built-in defaults; the environment wins over both.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: take jobs, ask Creem, publish replies, until SIGTERM.
    Run(run::Arguments),
    /// Say everything that is wrong with configuration and surroundings, each with its fix.
    Check(check::Arguments),
    /// Put jobs into a queue: one by flags, or many from NDJSON.
    Enqueue(Box<enqueue::Arguments>),
    /// Make a file of jobs into a file of links, without a broker or by way of one.
    Bulk(Box<bulk::Arguments>),
    /// Tell what the ledger knows of one `request_id`.
    Show(show::Arguments),
    /// Take no more jobs of a lane, with all workers of the ledger; they wait in RabbitMQ. `bulk` on that ledger waits, too.
    Pause(lanes::Arguments),
    /// Take the jobs of a paused lane again.
    Resume(lanes::Arguments),
    /// What became of the jobs of a campaign; cancel it, or export its links.
    Campaign(campaign::Arguments),
    /// Tell the ledger what only an operator knows, e.g. that it was restored from a backup.
    Ledger(ledger::Arguments),
    /// Delete the queues and exchanges under `topology.prefix`, messages included; for demos and
    /// tests, and refused for the default prefix.
    #[command(hide = true)]
    RemoveTopology,
}

/// Why a command failed, by exit code.
#[derive(Debug)]
enum Failure {
    /// 1
    Failed(anyhow::Error),
    /// 2
    Usage(String),
    /// 78
    Configuration(Vec<Problem>),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

type Outcome = Result<(), Failure>;

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    // Two providers can be in a dependency graph; naming one makes every TLS user agree.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        say_error("TLS was set up twice (a bug)");
    }
    let arguments = Arguments::parse();
    if matches!(arguments.command, Command::Run(_)) {
        with_deep_stacks();
    }
    let file = arguments.config.as_deref();
    let outcome = match &arguments.command {
        Command::Run(command) => run::run(file, command),
        Command::Check(command) => check::run(file, command),
        Command::Enqueue(command) => enqueue::run(file, command),
        Command::Bulk(command) => bulk::run(file, command),
        Command::Show(command) => show::run(file, command),
        Command::Pause(command) => lanes::pause(file, command),
        Command::Resume(command) => lanes::resume(file, command),
        Command::Campaign(command) => campaign::run(file, command),
        Command::Ledger(command) => ledger::run(file, command),
        Command::RemoveTopology => remove_topology(file),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            say_error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
        Err(Failure::Usage(text)) => {
            say_error(&text);
            ExitCode::from(2)
        }
        Err(Failure::Configuration(problems)) => {
            for problem in problems {
                say_error(&problem.to_string());
            }
            ExitCode::from(78)
        }
    }
}

fn remove_topology(file: Option<&std::path::Path>) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    if settings.topology.dead() == "checkout.dead" {
        let text = "the queues of the default prefix may hold real jobs and are never deleted";
        return Err(Failure::Usage(text.to_owned()));
    }
    block_on(async {
        let name = "checkout-worker remove-topology";
        let connection = crate::rabbit::link::connect(&settings.amqp, name).await?;
        settings.topology.delete(&connection).await?;
        Ok(())
    })?
}

/// Starts this program again, as the same process, with stacks that no message can overflow.
///
/// lapin parses nested headers by recursion, on a thread whose stack only this variable sizes: a
/// header frame of 128 KiB holds some 18,000 levels, and an overflow would end the process, take
/// every job in flight along, and come again with the next delivery. Memory that is not used
/// costs nothing.
fn with_deep_stacks() {
    use std::os::unix::process::CommandExt as _;

    const VARIABLE: &str = "RUST_MIN_STACK";
    let needed: u64 = DEEP_STACK.parse().unwrap_or(u64::MAX);
    let set = std::env::vars_os().find(|(name, _)| name == VARIABLE);
    let bytes = set.and_then(|(_, value)| value.to_str()?.parse::<u64>().ok());
    if bytes.is_some_and(|bytes| bytes >= needed) {
        return;
    }
    let mut arguments = std::env::args_os();
    // By its own path, so that it keeps its name in the process list.
    let own = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut again = std::process::Command::new(own);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    let error = again.args(arguments).env(VARIABLE, DEEP_STACK).exec();
    say_error(&format!("going on with small stacks: {error}; set {VARIABLE}={DEEP_STACK}"));
}

/// Seen to hold the deepest nesting that a frame of 128 KiB can carry; without optimisation a
/// level takes several times as much.
const DEEP_STACK: &str = if cfg!(debug_assertions) { "1073741824" } else { "67108864" };

/// A lane on the command line.
fn lane(text: &str) -> Result<Lane, String> {
    Lane::parse(text).ok_or_else(|| "a lane is `interactive` or `bulk`".to_owned())
}

/// The name of a campaign.
fn campaign(text: &str) -> Result<String, String> {
    let fine = is_campaign(text).then(|| text.to_owned());
    fine.ok_or_else(|| "give 1-64 printable characters".to_owned())
}

/// A number of things, in English.
fn count(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// One line on standard error.
fn say_error(text: &str) {
    use std::io::Write as _;
    // Whoever closed standard error does not want to hear it.
    drop(writeln!(std::io::stderr(), "checkout-worker: {}", shown_safely(text)));
}

/// Nothing that is shown moves a cursor or turns a line round: names of files, columns and cells are strangers'.
fn shown_safely(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if turns || c.is_control() && !matches!(c, '\n' | '\t') {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// One line on standard output.
fn say(text: &str) {
    use std::io::Write as _;
    match writeln!(std::io::stdout(), "{text}") {
        // A reader that went away (`| head`) is no error of ours.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            say_error(&format!("standard output cannot be written: {error}"));
            std::process::exit(1);
        }
        Ok(()) | Err(_) => {}
    }
}

/// The environment as a map.
fn environment() -> Result<BTreeMap<String, String>, Failure> {
    let mut environment = BTreeMap::new();
    let mut unreadable = Vec::new();
    for (name, value) in std::env::vars_os() {
        let Ok(name) = name.into_string() else { continue };
        match value.into_string() {
            Ok(value) => {
                environment.insert(name, value);
            }
            // A setting of ours must not be passed over in silence.
            Err(_) if config::is_ours(&name) => unreadable
                .push(Problem::new(format!("{name} is not UTF-8"), "give its value as UTF-8 text")),
            Err(_) => {}
        }
    }
    if unreadable.is_empty() { Ok(environment) } else { Err(Failure::Configuration(unreadable)) }
}

fn resolved(file: Option<&std::path::Path>) -> Result<Resolved, Failure> {
    let settings = config::load(file, &environment()?).map_err(Failure::Configuration)?;
    config::resolve(&settings).map_err(Failure::Configuration)
}

/// The settings; a key that cannot be read is as good as none.
fn settings_without_key(file: Option<&std::path::Path>) -> Result<config::Settings, Failure> {
    config::load_without_key(file, &environment()?).map_err(Failure::Configuration)
}

/// Standing in for what a command does not need: `enqueue` and `show` work without a Creem key.
fn resolved_without_key(
    file: Option<&std::path::Path>,
    mode: Option<&str>,
) -> Result<Resolved, Failure> {
    let mut settings = settings_without_key(file)?;
    let stand_in = match mode {
        Some("prod") => "creem_stand_in",
        Some(_) => "creem_test_stand_in",
        None => "",
    };
    let empty = |key: &secrecy::SecretString| secrecy::ExposeSecret::expose_secret(key).is_empty();
    if settings.creem.api_key.as_ref().is_none_or(empty) || !stand_in.is_empty() {
        let stand_in = if stand_in.is_empty() { "creem_test_stand_in" } else { stand_in };
        settings.creem.api_key = Some(stand_in.to_owned().into());
        settings.creem.base_url = None;
    }
    config::resolve(&settings).map_err(Failure::Configuration)
}

/// A runtime for a command.
fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    let result = runtime.block_on(work);
    // Threads of libraries may hang on a dead peer; nothing of ours is left to do.
    runtime.shutdown_background();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn what_is_shown_moves_no_cursor() {
        let text = "a\u{1b}[2Jb\u{9b}c\u{202e}d\tä\n";
        assert_eq!(super::shown_safely(text), "a\\u{1b}[2Jb\\u{9b}c\\u{202e}d\tä\n");
    }

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }

    #[test]
    fn no_command_takes_a_secret_where_the_process_list_shows_it() {
        fn names(command: &clap::Command) -> Vec<String> {
            let own = command.get_arguments().map(|argument| argument.get_id().to_string());
            own.chain(command.get_subcommands().flat_map(names)).collect()
        }
        let names = names(&super::Arguments::command());
        assert!(names.contains(&"reply_to".to_owned()), "the walk reaches subcommands");
        for secret in ["key", "password", "secret", "url", "token"] {
            let found = names.iter().find(|name| name.split('_').any(|word| word == secret));
            // The buyer's way back is a URL, and no secret.
            assert!(found.is_none_or(|name| name == "success_url"), "{found:?}");
        }
    }
}
