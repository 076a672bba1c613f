//! `bulk --verify`: whether links still can be paid, and new ones for those that cannot.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures::StreamExt as _;

use super::{Arguments, Begun, begin, interrupted, same_file, source};
use crate::bulk::input::Job;
use crate::bulk::inside::{Inside, problem};
use crate::bulk::output::part_of;
use crate::bulk::table::Writer;
use crate::bulk::verify::{Line, Link, Links};
use crate::cli::{Failure, Outcome, say_error};
use crate::config::check::Resolved;
use crate::creem::Seen;
use crate::job::reply::rfc3339;
use crate::job::{Lane, Status};
use crate::retry::{Backoff, backoff};

/// How often one link is asked for.
const TRIES: u32 = 6;
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(20);

/// A line, what was learned of its link, and what came of making another.
struct Looked {
    line: Line,
    link: Option<Link>,
    renewed: Option<Status>,
}

pub(super) async fn run(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let part = part_of(out);
    if same_file(&arguments.file, &part) {
        let text = format!("{} is what would be written over: give another --out", part.display());
        return Err(Failure::Usage(text));
    }
    let (source, _) = source(&arguments.file)?;
    let shown = || arguments.file.display().to_string();
    let mut links = Links::open(source, arguments.wishes(settings)).with_context(shown)?;
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    let written = || format!("{} cannot be written", part.display());
    let file = std::fs::File::create(&part).with_context(written)?;
    let mut table =
        Writer::like(std::io::BufWriter::new(file), links.format()).with_context(written)?;
    table.record(&links.header()).with_context(written)?;
    let (mut tally, mut broken) = (Tally::default(), None);
    let rows = std::iter::from_fn(|| match links.next_line() {
        Ok(line) => line.map(|line| {
            let new = arguments.refresh.then(|| links.renewed(&line));
            (line, new)
        }),
        Err(error) => {
            broken = Some(error);
            None
        }
    });
    let rows = rows.take_while(|_| !stages.soft.is_cancelled());
    let looked = futures::stream::iter(rows).map(|(line, new)| look(&inside, line, new));
    // In the order of the file.
    let mut looked = looked.buffered(at_once);
    loop {
        let next = tokio::select! {
            next = looked.next() => next,
            () = stages.hard.cancelled() => return Err(stopped(&part)),
        };
        let Some(looked) = next else { break };
        let now = rfc3339(inside.engine.journey.clock.now());
        table.record(&looked.line.with(looked.link.as_ref(), &now)).with_context(written)?;
        tally.count(&looked);
    }
    drop(looked);
    tasks.shutdown().await;
    if let Some(fatal) = inside.engine.fatal() {
        return Err(Failure::Failed(fatal.into()));
    }
    if let Some(error) = broken {
        return Err(Failure::Failed(anyhow!(error).context(shown())));
    }
    if stages.soft.is_cancelled() {
        return Err(stopped(&part));
    }
    table.finish().with_context(written)?;
    std::fs::rename(&part, out).with_context(|| format!("{} cannot be written", out.display()))?;
    tally.summary(out)
}

fn stopped(part: &Path) -> Failure {
    Failure::Failed(anyhow!(
        "interrupted: {} has what was learned so far; the same command begins again, and makes no link twice",
        part.display()
    ))
}

/// How many lines came to what.
#[derive(Debug, Default)]
struct Tally {
    rows: u64,
    words: BTreeMap<&'static str, u64>,
    /// Lines whose link can be paid or was.
    well: u64,
    dead: u64,
}

impl Tally {
    fn count(&mut self, looked: &Looked) {
        self.rows += 1;
        let word = looked.link.as_ref().map_or("without a link", Link::as_str);
        let word = if looked.renewed == Some(Status::Succeeded) { "renewed" } else { word };
        *self.words.entry(word).or_default() += 1;
        let link = looked.link.as_ref();
        let well = matches!(link, Some(Link::Open | Link::Processing | Link::Paid));
        self.well += u64::from(well);
        self.dead += u64::from(link.is_some_and(Link::is_dead));
    }

    fn summary(&self, out: &Path) -> Outcome {
        let words: Vec<String> =
            self.words.iter().map(|(word, rows)| format!("{rows} {word}")).collect();
        let text = format!("{} rows: {}: {}", self.rows, words.join(", "), out.display());
        if self.well == self.rows {
            say_error(&text);
            return Ok(());
        }
        let hint = if self.dead > 0 { "; --refresh makes new links for dead ones" } else { "" };
        Err(Failure::Failed(anyhow!("{text}{hint}")))
    }
}

/// Asks what has become of a line's link, and where it is dead and may be renewed, has a new one made.
async fn look(inside: &Inside, line: Line, new: Option<(String, Job)>) -> Looked {
    let Some(checkout_id) = line.checkout_id() else {
        return Looked { line, link: None, renewed: None };
    };
    let state = ask(inside, &checkout_id).await;
    let Some((id, job)) = new.filter(|_| state.is_dead()) else {
        return Looked { line, link: Some(state), renewed: None };
    };
    let made = match job {
        Ok(request) => inside.make(*request).await,
        Err(flaw) => Some(problem(Status::Invalid, flaw.code, &flaw.message)),
    };
    match made {
        Some(made) if made.status == Status::Succeeded => {
            let line = line.renewed(&id, &made);
            Looked { line, link: Some(Link::Open), renewed: Some(made.status) }
        }
        // The dead link stays, so that the next look finds it again.
        Some(made) => {
            let why = made.error_message.unwrap_or_default();
            say_error(&format!("{id}: no new link: {}: {why}", made.status));
            Looked { line, link: Some(state), renewed: Some(made.status) }
        }
        None => Looked { line, link: Some(state), renewed: None },
    }
}

/// Asks Creem about a session, at the pace of all calls.
async fn ask(inside: &Inside, checkout_id: &str) -> Link {
    let journey = &inside.engine.journey;
    let delays = Backoff::try_new(FIRST, LONGEST).expect("half a second is less than twenty");
    let mut tries = 0;
    loop {
        let admitted = async { journey.pacer.pass(journey.pacer.admit(Lane::Bulk).await).await };
        tokio::select! {
            () = admitted => {}
            () = journey.stop.cancelled() => return Link::Unknown("interrupted".to_owned()),
        }
        let asked = tokio::time::Instant::now();
        let seen = journey.creem.look_up(checkout_id).await;
        tries += 1;
        let (Seen::Later { throttled, .. }, true) = (&seen, tries < TRIES) else {
            journey.pacer.taken(asked);
            return seen.into();
        };
        let retry_after = throttled.flatten();
        if throttled.is_some() {
            journey.pacer.slow_down(asked);
        }
        if let Some(delay) = retry_after.filter(|_| throttled.is_some()) {
            journey.pacer.quiet(backoff::clamp_retry_after(delay));
        }
        tokio::time::sleep(delays.delay(tries, retry_after, backoff::chance())).await;
    }
}
