//! `bulk`: a file of jobs into a file of links, in this process or by way of the workers.

mod begin;
mod dry_run;
mod places;
mod progress;
mod queue;
mod sandbox;
mod verify;
mod written_over;

use std::cell::RefCell;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use futures::TryStreamExt as _;

use super::look::shown;
use super::{Failure, Outcome, block_on, count, resolved, resolved_without_key, say_error};
use crate::bulk::columns::Defaults;
use crate::bulk::given::GivenLinks;
use crate::bulk::input::{Input, Wishes};
use crate::bulk::inside::Inside;
use crate::bulk::layout::{EarlierLink, Layout};
use crate::bulk::output::{Earlier, OutputError, before_of, part_of};
use crate::bulk::{self, Tally};
use crate::config::check::{Ledger, Resolved};
use crate::job::reply::digest;
use crate::job::{CheckoutRequest, Key, Lane, RequestId, Status, printable};
use crate::observe::logging;
use begin::{Begun, begin};
use progress::Shown;
use sandbox::Sandbox;

/// Links of an earlier output that the ledger is asked about at once.
const LINKS_AT_ONCE: usize = 256;

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
        log(&settings)?;
        return block_on(queue::run(&settings, arguments, out))?;
    }
    block_on(async {
        let double = if arguments.sandbox { Some(Sandbox::start(arguments).await?) } else { None };
        let settings = match &double {
            Some(double) => double.settings(file, out)?,
            None if arguments.verify => resolved(file)?,
            None => resolved(file).map_err(sandbox::offer)?,
        };
        places::check(arguments, out, Some(&settings.ledger))?;
        log(&settings)?;
        if arguments.verify {
            return verify::run(&settings, arguments, out).await;
        }
        links(&settings, arguments, out).await
    })?
}

fn log(settings: &Resolved) -> Outcome {
    logging::install(settings.log.0, &settings.log.1)
        .map_err(|why| Failure::Usage(format!("the log: {why}")))
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
    if !carried.is_empty() && carried.len() == input.names().len() {
        say_error(
            "no column is called like a field of a job, so that all rows are of one job but for their ids: is line 1 the header?",
        );
    }
    Ok((input, bytes))
}

/// Begins to read the input, and what an interrupted run has left of its output.
fn opened(
    settings: &Resolved,
    arguments: &Arguments,
    out: &Path,
) -> Result<(Input, Option<u64>, Earlier), Failure> {
    let (input, bytes) = input(settings, arguments)?;
    let layout = Layout::new(input.format(), input.names(), input.shows_ids());
    let earlier = Earlier::look(out, layout, arguments.run(settings))?;
    if earlier.was_interrupted() {
        say_error(&format!("going on with {}", part_of(out).display()));
    }
    Ok((input, bytes, earlier))
}

async fn links(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let (input, bytes, earlier) = opened(settings, arguments, out)?;
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    let mut links = earlier.links().peekable();
    // A sandbox's lead nowhere.
    let of_a_sandbox = |link: &Result<EarlierLink, _>| {
        !arguments.sandbox && link.as_ref().is_ok_and(|link| sandbox::has_made(link, out))
    };
    let mut given = GivenLinks::default();
    if links.peek().is_some_and(|link| !of_a_sandbox(link)) {
        tokio::select! {
            checked = all_made_here(&inside, links, &settings.ledger, out) => checked?,
            () = stages.soft.cancelled() => return Err(interrupted(0, out)),
        }
        given = GivenLinks::read(earlier.links())?;
    }
    let (given, broken) = (RefCell::new(given), RefCell::new(None));
    let fail = |error: anyhow::Error| {
        broken.borrow_mut().get_or_insert(error);
        stages.soft.cancel();
    };
    let prove = async |proof: bulk::Proof| {
        let last = proof.given.map(|given| {
            let request_id = given.request.request_id.as_str().to_owned();
            Ok(EarlierLink { request_id, checkout_id: given.checkout_id })
        });
        let cut_off = proof.cut_off.chain(last).inspect(|link| {
            if let Ok(EarlierLink { request_id, checkout_id }) = link {
                given.borrow_mut().note(request_id, checkout_id);
            }
        });
        let checked = tokio::select! {
            checked = all_made_here(&inside, cut_off, &settings.ledger, out) => checked,
            () = stages.soft.cancelled() => return false,
        };
        checked.map_err(&fail).is_ok()
    };
    let make = |_, request: CheckoutRequest| {
        let (inside, given, fail) = (&inside, &given, &fail);
        async move {
            let id = request.request_id.clone();
            // The ledger may have forgotten it since all were looked for.
            let only_known = given.borrow().has(id.as_str());
            let made = inside.make(request, only_known).await?;
            if only_known && !given.borrow().fits(id.as_str(), &made) {
                fail(not_made_here(id.as_str(), None, &settings.ledger, out));
                return None;
            }
            Some(made)
        }
    };
    let mut shown = Shown::new(bytes);
    let ran = bulk::run(input, earlier, at_once, prove, make, &stages.soft, |progress| {
        shown.tell(progress);
    });
    let ran = tokio::select! {
        ran = ran => ran,
        () = stages.hard.cancelled() => return Err(interrupted(0, out)),
    };
    shown.finish();
    tasks.shutdown().await;
    if let Some(fatal) = inside.engine.fatal() {
        return Err(Failure::Failed(fatal.into()));
    }
    let broken = broken.take();
    queue::ended(&ran?, broken, arguments, out)
}

/// Refuses to write over links that this ledger has not made: it would make them a second time.
async fn all_made_here(
    inside: &Inside,
    links: impl Iterator<Item = Result<EarlierLink, OutputError>>,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Result<()> {
    let links = futures::stream::iter(links).map_err(anyhow::Error::from);
    let checked = links.map_ok(async |link| made_here(inside, &link, ledger, out).await);
    checked.try_buffered(LINKS_AT_ONCE).try_collect().await
}

async fn made_here(
    inside: &Inside,
    link: &EarlierLink,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Result<()> {
    let EarlierLink { request_id, checkout_id } = link;
    if let Ok(request_id) = RequestId::parse(request_id) {
        let key = Key { mode: inside.engine.mode, request_id };
        let known = inside.engine.journey.ledger.known(key).await;
        let known = known.with_context(|| shown(ledger))?.and_then(|known| known.checkout_id);
        if known.as_ref() == Some(checkout_id) {
            return Ok(());
        }
    }
    Err(not_made_here(request_id, Some(checkout_id), ledger, out))
}

fn not_made_here(
    request_id: &str,
    checkout_id: Option<&str>,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Error {
    let advice = "Give the ledger that made them (LEDGER_URL)";
    made_elsewhere(request_id, checkout_id, out, &format!("the ledger {}", place(ledger)), advice)
}

/// Why links are not written over that another ledger has made.
fn made_elsewhere(
    request_id: &str,
    checkout_id: Option<&str>,
    out: &Path,
    ledger: &str,
    advice: &str,
) -> anyhow::Error {
    let session = checkout_id.map_or(String::new(), |id| format!(" ({})", printable(id, 128)));
    let files = [out.to_owned(), before_of(out)];
    let file = files.into_iter().find(|file| file.exists()).unwrap_or_else(|| part_of(out));
    anyhow!(
        "{} has a link for {}{session} that {ledger} has not made: its links are of another ledger, key or mode, of a sandbox, or older than ledger.retention, and would be made a second time. {advice}; take rows with older links out of the input, as another --out knows nothing of them; or remove the file if nobody was given its links",
        file.display(),
        printable(request_id, 128),
    )
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
    if tally.statuses.contains_key(Status::Conflict.as_str()) {
        text.push_str(
            ". A conflict: that request_id has a link for another job, which the flags and cells of its run bring back",
        );
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
