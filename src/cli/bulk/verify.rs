//! `bulk --verify`: whether links still can be paid, and new ones for those that cannot.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures::StreamExt as _;

use super::{Arguments, Begun, begin, interrupted, source};
use crate::bulk::inside::{Inside, problem};
use crate::bulk::output::{begin_anew, part_of};
use crate::bulk::table::Writer;
use crate::bulk::verify::{Line, Link, Links, Renewal};
use crate::cli::{Failure, Outcome, count, say_error};
use crate::config::check::Resolved;
use crate::creem::Seen;
use crate::job::key::Comparison;
use crate::job::reply::rfc3339;
use crate::job::{CheckoutRequest, Fingerprint, Key, Lane, RequestId, Status};
use crate::ledger::Known;
use crate::retry::{Backoff, backoff};

/// How often one link is asked for.
const TRIES: u32 = 6;
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(20);
/// How many renewals of one link are looked through at once.
const MOST_RENEWALS: u32 = 100;

/// A line, what was learned of its link, and what came of making another.
struct Looked {
    line: Line,
    link: Option<Link>,
    renewed: Option<Status>,
}

pub(super) async fn run(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let part = part_of(out);
    is_ours(out, arguments, settings)?;
    let file = begin_anew(out)?;
    let (source, _) = source(&arguments.file)?;
    let shown = || arguments.file.display().to_string();
    let mut links = Links::open(source, arguments.wishes(settings)).with_context(shown)?;
    if arguments.refresh && !links.names_the_product() {
        let text = "no column names the product of new links: give the flags of the first run as well (--product …)";
        return Err(Failure::Usage(text.to_owned()));
    }
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    let written = || format!("{} cannot be written", part.display());
    let mut table =
        Writer::like(std::io::BufWriter::new(file), links.format()).with_context(written)?;
    table.record(&links.header()).with_context(written)?;
    let (mut tally, mut broken) = (Tally::default(), None);
    let rows = std::iter::from_fn(|| match links.next_line() {
        Ok(line) => line.map(|line| {
            let new = arguments.refresh.then(|| links.renewal(&line));
            (line, new)
        }),
        Err(error) => {
            broken = Some(error);
            None
        }
    });
    let rows = rows.take_while(|_| !stages.soft.is_cancelled());
    let seen = Seen404::default();
    let looked = futures::stream::iter(rows).map(|(line, new)| look(&inside, &seen, line, new));
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
    tally.summary(out, arguments.refresh)
}

/// What is there must be a file of links as well.
fn is_ours(out: &Path, arguments: &Arguments, settings: &Resolved) -> Result<(), Failure> {
    let shown = || out.display().to_string();
    // Asked before it is opened: a pipe would wait for somebody at its other end.
    match std::fs::metadata(out) {
        Ok(about) if about.is_file() && about.len() > 0 => {}
        // What is no file at all is refused where the output is begun.
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::Failed(anyhow!(error).context(shown()))),
    }
    let file = std::fs::File::open(out).with_context(shown)?;
    if Links::open(file, arguments.wishes(settings)).is_err() {
        let text = format!(
            "{} is there and is no file of links: give another --out, or remove it",
            out.display()
        );
        return Err(Failure::Failed(anyhow!(text)));
    }
    Ok(())
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
    /// Why one of them could not be learned.
    unknown: Option<String>,
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
        if let (Some(Link::Unknown(why)), None) = (link, &self.unknown) {
            self.unknown = Some(format!("{}: {why}", looked.line.request_id()));
        }
    }

    fn summary(&self, out: &Path, refreshed: bool) -> Outcome {
        let words: Vec<String> =
            self.words.iter().map(|(word, rows)| format!("{rows} {word}")).collect();
        let rows = count(usize::try_from(self.rows).unwrap_or(usize::MAX), "row");
        let text = format!("{rows}: {}: {}", words.join(", "), out.display());
        if self.well == self.rows {
            say_error(&text);
            return Ok(());
        }
        let mut hint = String::new();
        if self.dead > 0 && !refreshed {
            hint.push_str("; --verify --refresh, with the flags of the first run, makes new links for dead ones");
        }
        if let Some(why) = &self.unknown {
            hint = format!("{hint}; unknown, for instance: {why}");
        }
        Err(Failure::Failed(anyhow!("{text}{hint}")))
    }
}

/// Asks what has become of a line's link, and where it is dead and may be renewed, has a new one made.
async fn look(inside: &Inside, seen: &Seen404, line: Line, new: Option<Renewal>) -> Looked {
    let Some(checkout_id) = line.checkout_id() else {
        return Looked { line, link: None, renewed: None };
    };
    let id = line.request_id();
    let state = seen.judge(ask_for(inside, &id, &checkout_id).await);
    let Some(renewal) = new.filter(|_| state.is_dead()) else {
        return Looked { line, link: Some(state), renewed: None };
    };
    if let Err(why) = same_job(inside, &id, &renewal).await {
        say_error(&format!("{id}: no new link: {why}"));
        return Looked { line, link: Some(state), renewed: Some(Status::Conflict) };
    }
    renew(inside, line, state, renewal).await
}

/// Creem's word that there is no such session, for link after link, says more about the key or the API than
/// about the links.
#[derive(Debug, Default)]
struct Seen404 {
    gone: AtomicU32,
    found: AtomicU32,
}

/// How many links may be gone before the first one is found.
const MOST_GONE: u32 = 20;

impl Seen404 {
    fn judge(&self, state: Link) -> Link {
        if state != Link::Gone {
            self.found.fetch_add(u32::from(!matches!(state, Link::Unknown(_))), Ordering::Relaxed);
            return state;
        }
        let gone = self.gone.fetch_add(1, Ordering::Relaxed);
        if gone >= MOST_GONE && self.found.load(Ordering::Relaxed) == 0 {
            return Link::Unknown(format!(
                "Creem knows none of the first {MOST_GONE} links: is that so, or is something wrong there?"
            ));
        }
        state
    }
}

/// Whether a line and the flags make the job that its link was made for: what they leave out (a discount, the buyer's
/// address) the new link would not have.
async fn same_job(inside: &Inside, id: &str, renewal: &Renewal) -> Result<(), String> {
    let job = renewal.own_job().map_err(|flaw| flaw.message)?;
    let key = Key { mode: inside.engine.mode, request_id: job.request_id.clone() };
    let ledger = &inside.engine.journey.ledger;
    let known = ledger.known(key).await.map_err(|error| error.to_string())?;
    let Some(known) = known else {
        return Err(format!(
            "this ledger does not know {id} (any more), so nobody can tell whether line and flags make the same job again: make a new file of jobs"
        ));
    };
    let again = Fingerprint::of(&job.members, &ledger.identity().secret);
    match known.fingerprint.compare(&again) {
        Comparison::Same => Ok(()),
        Comparison::Differs(fields) => Err(format!(
            "the line and the flags do not make the job that its link was made for: give the flags of the first run; they differ in {}",
            fields.join(", ")
        )),
        Comparison::Unknown => Err("its row was written by a newer version".to_owned()),
    }
}

/// Has a new link made under the next id that has no dead one: an earlier look may have renewed it before.
async fn renew(inside: &Inside, line: Line, mut state: Link, mut renewal: Renewal) -> Looked {
    for _ in 0..MOST_RENEWALS {
        let (id, job) = renewal.next_job();
        let before = match &job {
            Ok(request) => known_before(inside, request).await,
            Err(_) => false,
        };
        let made = match job {
            Ok(request) => inside.make(*request).await,
            Err(flaw) => Some(problem(Status::Invalid, flaw.code, &flaw.message)),
        };
        let Some(made) = made else { break };
        let Some(checkout_id) =
            made.checkout_id.clone().filter(|_| made.status == Status::Succeeded)
        else {
            // The dead link stays, so that the next look finds it again.
            let why = made.error_message.unwrap_or_default();
            say_error(&format!("{id}: no new link: {}: {why}", made.status));
            return Looked { line, link: Some(state), renewed: Some(made.status) };
        };
        // One that was made now is not asked for: that Creem does not show it yet would say nothing.
        state = if before { ask_for(inside, &id, &checkout_id).await } else { Link::Open };
        if !state.is_dead() {
            let line = line.renewed(&id, &made);
            return Looked { line, link: Some(state), renewed: Some(made.status) };
        }
    }
    Looked { line, link: Some(state), renewed: None }
}

/// Whether an earlier look has had that job made; where the ledger cannot be asked, none has.
async fn known_before(inside: &Inside, request: &CheckoutRequest) -> bool {
    let key = Key { mode: inside.engine.mode, request_id: request.request_id.clone() };
    matches!(inside.engine.journey.ledger.known(key).await, Ok(Some(_)))
}

/// What has become of a row's session. That Creem knows no such session tells something only if it was made
/// with this key: another key's sessions are unknown to it as well, and so is an id that a spreadsheet has bent.
async fn ask_for(inside: &Inside, request_id: &str, checkout_id: &str) -> Link {
    let state = ask(inside, checkout_id).await;
    if state != Link::Gone {
        return state;
    }
    let doubt = |text: &str| Link::Unknown(format!("Creem knows no {checkout_id}, {text}"));
    let Ok(request_id) = RequestId::parse(request_id) else {
        return doubt("and the row's request_id is none");
    };
    let key = Key { mode: inside.engine.mode, request_id };
    match inside.engine.journey.ledger.known(key).await {
        Ok(Some(Known { checkout_id: Some(known), .. })) if known == checkout_id => Link::Gone,
        Ok(_) => doubt(
            "and this ledger has not made it: is it of another key, mode or ledger, or forgotten after ledger.retention?",
        ),
        Err(error) => doubt(&format!("and the ledger cannot be asked: {error}")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_creem_knows_none_of_the_first_links_says_nothing_of_the_next_one() {
        let seen = Seen404::default();
        for _ in 0..MOST_GONE {
            assert_eq!(seen.judge(Link::Gone), Link::Gone);
        }
        assert!(matches!(seen.judge(Link::Gone), Link::Unknown(_)));
        // Once one was found, others may be gone.
        assert_eq!(seen.judge(Link::Open), Link::Open);
        assert_eq!(seen.judge(Link::Gone), Link::Gone);
    }
}
