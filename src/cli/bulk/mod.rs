//! `bulk`: a file of jobs into a file of links, in this process or by way of the workers.

mod dry_run;
mod places;
mod progress;
mod queue;
mod verify;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::engine;
use super::look::shown;
use super::{Failure, Outcome, block_on, count, resolved, resolved_without_key, say_error};
use crate::bulk::columns::Defaults;
use crate::bulk::input::{Input, Wishes};
use crate::bulk::inside::Inside;
use crate::bulk::output::{Earlier, EarlierLink, Shape, part_of};
use crate::bulk::{self, Tally};
use crate::config::Problem;
use crate::config::check::{Ledger, Resolved};
use crate::job::reply::digest;
use crate::job::{Key, Lane, Mode, RequestId, printable};
use crate::ledger::Standing;
use crate::ledger::sqlite::inspect::Inspector;
use crate::lifecycle::Stages;
use crate::observe::health::Health;
use crate::observe::logging;
use crate::simulator::{Options, Simulator};
use crate::worker::Fatal;
use progress::Shown;

/// How many sessions a sandbox remembers.
const SANDBOX_KEEPS: usize = 1_024;

/// Make a file of jobs into a file of links.
///
/// Reads a table (CSV with `,`, `;` or tabs, as spreadsheets save it as "CSV UTF-8") or NDJSON, and
/// writes a table of links in the same order. A column that is called like a field of a job is that
/// field (`product_id`, `customer.email`, `metadata.KEY`); all others are carried through. Interrupted,
/// it goes on where it was when it is started again.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(super) struct Arguments {
    /// The jobs; `-` is standard input.
    file: PathBuf,
    /// The links. While it grows it is called FILE.part.
    #[arg(long, value_name = "FILE", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// The product of rows that name none.
    #[arg(long, value_name = "PRODUCT_ID")]
    product: Option<String>,
    /// The discount code of rows without one.
    #[arg(long)]
    discount_code: Option<String>,
    /// Where buyers are sent who have paid, where the row does not say.
    #[arg(long)]
    success_url: Option<String>,
    /// Metadata of every row, as often as needed; a row's own wins.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::enqueue::pair)]
    metadata: Vec<(String, String)>,
    /// Comes before each row's `request_id`, or before its number where it has none. The same
    /// prefix for the same file means the same links.
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    request_id_prefix: Option<String>,
    /// The campaign that the rows belong to, at most 64 characters.
    #[arg(long, value_name = "NAME", value_parser = super::campaign)]
    campaign: Option<String>,
    /// A column that is only carried through though it looks like a field, as often as needed.
    #[arg(long, value_name = "COLUMN")]
    carry: Vec<String>,
    /// Only say what is wrong with the rows, each with its line and column.
    #[arg(long, conflicts_with = "sandbox")]
    dry_run: bool,
    /// Let workers make the links: send the rows to the bulk lane, and collect the replies. Needs the broker
    /// and no key.
    #[arg(long, conflicts_with_all = ["dry_run", "sandbox", "verify"])]
    via_queue: bool,
    /// FILE is an output of an earlier run: ask Creem what has become of each of its links, and write them
    /// to --out with the columns `link` (open, processing, paid, expired, gone or unknown) and `checked_at`.
    #[arg(long, conflicts_with_all = ["dry_run", "sandbox"])]
    verify: bool,
    /// Make new links for those that are expired or gone, under a `request_id` of their own (`x.r1` for
    /// `x`), from the line itself and the same flags as before.
    #[arg(long, requires = "verify")]
    refresh: bool,
    /// Play it through: a built-in double of Creem, no key, no network, and a ledger of its own
    /// beside the output.
    #[arg(long)]
    sandbox: bool,
    /// A file that gets a JSON line of every session that the sandbox makes.
    #[arg(long, value_name = "FILE", requires = "sandbox")]
    sandbox_log: Option<PathBuf>,
}

impl Arguments {
    /// What other links of the same rows would be made with.
    fn run(&self, settings: &Resolved) -> String {
        let mut parts = if self.via_queue {
            // Workers have key and ledger.
            vec![format!("queue {}", settings.topology.jobs(Lane::Bulk))]
        } else {
            vec![
                format!("mode {}", settings.creem.mode),
                format!("ledger {}", place(&settings.ledger)),
                format!("sandbox {}", self.sandbox),
            ]
        };
        let flags = [
            ("product", &self.product),
            ("discount_code", &self.discount_code),
            ("success_url", &self.success_url),
            ("request_id_prefix", &self.request_id_prefix),
            ("campaign", &self.campaign),
        ];
        let given = flags.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
        parts.extend(given.map(|(name, value)| format!("{name} {value}")));
        parts.extend(self.carry.iter().map(|column| format!("carry {column}")));
        parts.extend(self.metadata.iter().map(|(key, value)| format!("metadata {key}={value}")));
        let parts: Vec<&[u8]> = parts.iter().map(String::as_bytes).collect();
        format!("{}\n", digest(&parts))
    }

    fn wishes(&self, settings: &Resolved) -> Wishes {
        let (defaults, carry) = (self.defaults(), self.carry.clone());
        Wishes { defaults, carry, rules: settings.job.clone() }
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            product_id: self.product.clone(),
            discount_code: self.discount_code.clone(),
            success_url: self.success_url.clone(),
            metadata: self.metadata.clone(),
            request_id_prefix: self.request_id_prefix.clone(),
        }
    }
}

fn prefix(text: &str) -> Result<String, String> {
    // Numbers alone would be the ids of every other file as well.
    if text.is_empty() {
        Err("give at least one character".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let keys = || arguments.metadata.iter().map(|(key, _)| key);
    if let Some(twice) = keys().enumerate().find(|(at, key)| keys().take(*at).any(|k| k == *key)) {
        let text = format!("--metadata gives {} twice: give each key once", printable(twice.1, 64));
        return Err(Failure::Usage(text));
    }
    let Some(out) = arguments.out.as_deref().filter(|_| !arguments.dry_run) else {
        return dry_run::run(&resolved_without_key(file, None)?, arguments);
    };
    if out.as_os_str() == "-" {
        let text = "--out takes the name of a file, as a run that is interrupted goes on with it";
        return Err(Failure::Usage(text.to_owned()));
    }
    if arguments.via_queue {
        let settings = resolved_without_key(file, None)?;
        places::check(arguments, out, None)?;
        logging::install(settings.log.0, &settings.log.1)
            .map_err(|why| Failure::Usage(format!("the log: {why}")))?;
        return block_on(queue::run(&settings, arguments, out))?;
    }
    block_on(async {
        let sandbox = if arguments.sandbox { Some(Sandbox::start(arguments).await?) } else { None };
        let settings = match &sandbox {
            Some(sandbox) => sandbox.settings(file, out)?,
            None => resolved(file).map_err(with_sandbox)?,
        };
        places::check(arguments, out, Some(&settings.ledger))?;
        logging::install(settings.log.0, &settings.log.1)
            .map_err(|why| Failure::Usage(format!("the log: {why}")))?;
        if arguments.verify {
            return verify::run(&settings, arguments, out).await;
        }
        links(&settings, arguments, out).await
    })?
}

/// Whoever only wants to see it needs no key.
fn with_sandbox(failure: Failure) -> Failure {
    match failure {
        Failure::Configuration(mut problems) => {
            let text = "a run without a key and without Creem is";
            problems.push(Problem::new(text.to_owned(), "checkout-worker bulk --sandbox"));
            Failure::Configuration(problems)
        }
        other @ (Failure::Failed(_) | Failure::Usage(_)) => other,
    }
}

/// The bytes of a file, and how many they are, if that is known.
fn source(path: &Path) -> Result<(Box<dyn Read + Send>, Option<u64>), Failure> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(std::io::stdin()), None));
    }
    let file = File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
    let about = file.metadata().with_context(|| path.display().to_string())?;
    if about.is_dir() {
        return Err(Failure::Usage(format!("{} is a directory: give a file", path.display())));
    }
    Ok((Box::new(file), about.is_file().then_some(about.len())))
}

/// Begins to read the input; how many bytes it has, if that is known.
fn input(settings: &Resolved, arguments: &Arguments) -> Result<(Input, Option<u64>), Failure> {
    let path = &arguments.file;
    let (source, bytes) = source(path)?;
    let input = Input::open(source, arguments.wishes(settings))
        .with_context(|| path.display().to_string())?;
    let carried: Vec<&str> = input.carried().collect();
    if !carried.is_empty() {
        say_error(&format!("carried through, and no part of the jobs: {}", carried.join(", ")));
    }
    Ok((input, bytes))
}

async fn links(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let (input, bytes) = input(settings, arguments)?;
    let shape = Shape::new(input.format(), input.names(), input.shows_ids());
    let earlier = Earlier::look(out, shape, arguments.run(settings))?;
    if earlier.was_interrupted() {
        say_error(&format!("going on with {}", part_of(out).display()));
    }
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    if let Some(link) = earlier.link() {
        // A sandbox's lead nowhere.
        if arguments.sandbox || !is_of_a_sandbox(link, out) {
            made_here(&inside, link, &settings.ledger, out).await?;
        }
    }
    let mut shown = Shown::new(bytes);
    let made = bulk::run(
        input,
        earlier,
        at_once,
        |_, request| inside.make(request),
        &stages.soft,
        |progress| shown.tell(progress),
    );
    let made = tokio::select! {
        made = made => made,
        () = stages.hard.cancelled() => return Err(interrupted(0, out)),
    };
    shown.finish();
    tasks.shutdown().await;
    if let Some(fatal) = inside.engine.fatal() {
        return Err(Failure::Failed(fatal.into()));
    }
    summary(&made?, arguments, out)
}

/// Whether the sandbox that writes that output has made the link.
fn is_of_a_sandbox(link: &EarlierLink, out: &Path) -> bool {
    let Ok(request_id) = RequestId::parse(&link.request_id) else { return false };
    let key = Key { mode: Mode::Test, request_id };
    let row = Inspector::open(&sandbox_ledger(out)).ok().and_then(|ledger| ledger.row(&key).ok());
    row.flatten().is_some_and(|row| row.checkout_id.as_ref() == Some(&link.checkout_id))
}

fn sandbox_ledger(out: &Path) -> PathBuf {
    let mut ledger = out.as_os_str().to_owned();
    ledger.push(".sandbox-ledger.db");
    ledger.into()
}

/// Refuses to write over links that this ledger has not made: it would make each a second time.
async fn made_here(
    inside: &Inside,
    link: &EarlierLink,
    ledger: &Ledger,
    out: &Path,
) -> Result<(), Failure> {
    let EarlierLink { request_id, checkout_id } = link;
    if let Ok(request_id) = RequestId::parse(request_id) {
        let key = Key { mode: inside.engine.mode, request_id };
        let known = inside.engine.journey.ledger.known(key).await;
        let known = known.with_context(|| shown(ledger))?.and_then(|known| known.checkout_id);
        if known.as_ref() == Some(checkout_id) {
            return Ok(());
        }
    }
    Err(Failure::Failed(anyhow!(
        "{} has a link for {} ({}) that the ledger {} has not made: its links are of another ledger, key or mode, of a sandbox, or older than ledger.retention, and would be made a second time. Give that ledger (LEDGER_URL) or another --out, or remove the file if nobody was given its links",
        out.display(),
        printable(request_id, 128),
        printable(checkout_id, 128),
        place(ledger)
    )))
}

/// Where a ledger is, wherever one stands.
fn place(ledger: &Ledger) -> String {
    match ledger {
        Ledger::File(path) => {
            std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
        }
        Ledger::Database(_) => shown(ledger),
    }
}

/// What makes links, and what it needs beside it.
struct Begun {
    inside: Inside,
    stages: Stages,
    tasks: JoinSet<()>,
    /// How many rows at once.
    at_once: usize,
}

/// Opens the ledger and puts together what makes links; `None` if the program is stopped before.
async fn begin(settings: &Resolved, arguments: &Arguments) -> Result<Option<Begun>, Failure> {
    let stages = Stages::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(stages.follow_signals(settings.grace).context("signals cannot be listened for")?);
    let health = Health::default();
    let new = matches!(&settings.ledger, Ledger::File(path) if !path.exists());
    let opened = engine::open(&settings.ledger, &health, &stages).await;
    let opened = opened.map_err(|failure| at_the_ledger(failure, &settings.ledger))?;
    let Some(opened) = opened else { return Ok(None) };
    if opened.ledger.identity().standing == Standing::Refused {
        return Err(Failure::Failed(Fatal::EmptyLedger.into()));
    }
    if new {
        say_error(&format!(
            "a new ledger, which knows of no links yet: {}",
            place(&settings.ledger)
        ));
    }
    let began_at = opened.clock.now();
    let engine = Arc::new(engine::engine(settings, opened, health, stages.soft.clone())?);
    engine.look().await;
    engine.watch(&mut tasks);
    let (broken, soft) = (engine.clone(), stages.soft.clone());
    tasks.spawn(async move {
        broken.broken().await;
        soft.cancel();
    });
    let size = settings.lanes.iter().find(|size| size.lane == Lane::Bulk);
    let at_once = size.map_or(1, |size| usize::from(size.concurrency));
    let inside = Inside { engine, campaign: arguments.campaign.clone(), began_at };
    Ok(Some(Begun { inside, stages, tasks, at_once }))
}

fn at_the_ledger(failure: Failure, ledger: &Ledger) -> Failure {
    match failure {
        Failure::Failed(error) => Failure::Failed(error.context(shown(ledger))),
        other @ (Failure::Usage(_) | Failure::Configuration(_)) => other,
    }
}

fn interrupted(rows: u64, out: &Path) -> Failure {
    let kept = if rows == 0 { String::new() } else { format!(" after {rows} rows") };
    Failure::Failed(anyhow!(
        "interrupted{kept}; the same command goes on with {}",
        part_of(out).display()
    ))
}

/// The last words, and whether all is well.
fn summary(tally: &Tally, arguments: &Arguments, out: &Path) -> Outcome {
    if !tally.whole {
        return Err(interrupted(tally.rows, out));
    }
    let rows = count(usize::try_from(tally.rows).unwrap_or(usize::MAX), "row");
    let mut text = format!("{rows}, {} with a link", tally.linked());
    for (status, rows) in tally.statuses.iter().filter(|(status, _)| **status != "succeeded") {
        text = format!("{text}, {rows} {status}");
    }
    text = format!("{text}: {}", out.display());
    if arguments.sandbox {
        text.push_str(" (a sandbox: the links lead nowhere)");
    }
    if tally.linked() == tally.rows && tally.shared == 0 {
        say_error(&text);
        return Ok(());
    }
    if tally.linked() < tally.rows {
        text.push_str(
            ". The columns error_code and error_message say why; the same command tries those rows again and keeps the links",
        );
    }
    if tally.shared > 0 {
        text = format!(
            "{text}. Of all rows {} have the request_id of an earlier one, and so no link of their own: --dry-run names them",
            tally.shared
        );
    }
    Err(Failure::Failed(anyhow!(text)))
}

/// A double of Creem in this process.
struct Sandbox {
    url: String,
    _serving: AbortOnDropHandle<()>,
}

impl Sandbox {
    async fn start(arguments: &Arguments) -> Result<Self, Failure> {
        let options = Options {
            keep: Some(SANDBOX_KEEPS),
            sessions_file: arguments.sandbox_log.clone(),
            ..Options::default()
        };
        let anywhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let started = Simulator::start(anywhere, options).await;
        let (simulator, serve) = started.context("the sandbox cannot be started")?;
        #[expect(clippy::disallowed_methods, reason = "it ends with its handle")]
        let serving = AbortOnDropHandle::new(tokio::spawn(serve));
        Ok(Self { url: simulator.url(), _serving: serving })
    }

    /// The settings, but for whatever leads to a real Creem or a real ledger.
    fn settings(&self, file: Option<&Path>, out: &Path) -> Result<Resolved, Failure> {
        let mut settings = super::settings_without_key(file)?;
        settings.creem.api_key = Some("creem_test_sandbox".to_owned().into());
        settings.creem.base_url = Some(self.url.clone());
        settings.creem.proxy = None;
        settings.creem.ca_file = None;
        settings.creem.checkout_hosts.clear();
        settings.ledger.url = format!("sqlite:{}", sandbox_ledger(out).display()).into();
        crate::config::resolve(&settings).map_err(Failure::Configuration)
    }
}
