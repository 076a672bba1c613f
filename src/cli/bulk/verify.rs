//! `bulk --verify`: whether links still can be paid, and new ones for those that cannot.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use futures::StreamExt as _;

use super::Arguments;
use super::begin::{Begun, begin};
use super::open::source;
use super::summary::interrupted;
use super::written_over::WrittenOver;
use crate::bulk::inside::{Inside, problem};
use crate::bulk::look_up::{GoneTally, ask_for, same_job};
use crate::bulk::output::{begin_anew, part_of, put_in_place, remove_empty};
use crate::bulk::stems::Stems;
use crate::bulk::table::Writer;
use crate::bulk::verify::{Line, Link, Links, Renewal, stem};
use crate::cli::{Failure, Outcome, count, say_error};
use crate::config::check::Resolved;
use crate::job::Status;
use crate::job::reply::rfc3339;

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
    let shown = || arguments.file.display().to_string();
    let (mut links, stems) = opened(settings, arguments)?;
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    let file = begin_anew(out)?;
    let written = || format!("{} cannot be written", part.display());
    let read = WrittenOver::read(out, arguments, settings);
    let mut over = read.inspect_err(|_| remove_empty(&file, &part))?;
    over.keep_part()?;
    file.set_len(0).with_context(written)?;
    // Locked until it is in its place.
    let whole = file.try_clone().with_context(written)?;
    let mut table =
        Writer::like(std::io::BufWriter::new(file), links.format()).with_context(written)?;
    table.record(&links.header()).with_context(written)?;
    let (mut tally, mut broken) = (LinkTally::default(), None);
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
    let seen = GoneTally::default();
    let over = &over;
    let renewing = Renewing { inside: &inside, over, stems: &stems, made: RefCell::default() };
    let looked = futures::stream::iter(rows).map(|(line, new)| look(&renewing, &seen, line, new));
    // In the order of the file. What was renewed behind a slow line is in the ledger until it is written.
    let mut looked = looked.buffered(at_once);
    loop {
        let next = tokio::select! {
            next = looked.next() => next,
            () = stages.hard.cancelled() => return Err(stopped(&part)),
        };
        let Some(looked) = next else { break };
        let now = rfc3339(inside.engine.journey.clock.now());
        table.record(&looked.line.with(looked.link.as_ref(), &now)).with_context(written)?;
        over.note_written(&looked.line, looked.link.as_ref());
        // The next look is to know what this one has made, however it ends.
        if looked.renewed == Some(Status::Succeeded) {
            table.flush().with_context(written)?;
        }
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
    over.check(&inside, &part).await?;
    put_in_place(&whole, &part, out)
        .with_context(|| format!("{} cannot be written", out.display()))?;
    over.forget_kept();
    tally.summary(out, arguments.refresh)
}

/// Begins to read the file; before new links are made, it is looked through for ids that these might have.
fn opened(settings: &Resolved, arguments: &Arguments) -> Result<(Links, Stems), Failure> {
    let open = || -> Result<Links, Failure> {
        let (bytes, _) = source(&arguments.file)?;
        let links = Links::open(bytes, arguments.wishes(settings));
        Ok(links.with_context(|| arguments.file.display().to_string())?)
    };
    if !arguments.refresh {
        return Ok((open()?, Stems::default()));
    }
    let there = std::fs::metadata(&arguments.file).ok();
    if arguments.file.as_os_str() == "-" || there.is_some_and(|about| !about.is_file()) {
        let text = "--refresh reads the file twice, which a pipe does not allow: save it, and give its name";
        return Err(Failure::Usage(text.to_owned()));
    }
    let mut links = open()?;
    if !links.names_the_product() {
        let text = "no column names the product of new links: give the flags of the first run as well (--product …). An output of NDJSON does not hold its jobs: make a file of new jobs for its dead links";
        return Err(Failure::Usage(text.to_owned()));
    }
    let stems = Stems::read(&mut links).with_context(|| arguments.file.display().to_string())?;
    Ok((open()?, stems))
}

fn stopped(part: &Path) -> Failure {
    Failure::Failed(anyhow!(
        "interrupted: {} has what was learned so far; the same command begins again, and makes no link twice",
        part.display()
    ))
}

/// How many lines came to what.
#[derive(Debug, Default)]
struct LinkTally {
    rows: u64,
    words: BTreeMap<&'static str, u64>,
    /// Lines whose link can be paid or was.
    usable: u64,
    dead: u64,
    /// Why one of them could not be learned.
    unknown: Option<String>,
}

impl LinkTally {
    fn count(&mut self, looked: &Looked) {
        self.rows += 1;
        let word = looked.link.as_ref().map_or("without a link", Link::as_str);
        let word = if looked.renewed == Some(Status::Succeeded) { "renewed" } else { word };
        *self.words.entry(word).or_default() += 1;
        let link = looked.link.as_ref();
        self.usable += u64::from(link.is_some_and(Link::is_usable));
        self.dead += u64::from(link.is_some_and(Link::is_dead));
        if let (Some(Link::Unknown(why)), None) = (link, &self.unknown) {
            self.unknown = Some(format!("{}: {why}", looked.line.request_id()));
        }
    }

    fn summary(&self, out: &Path, refreshed: bool) -> Outcome {
        let words: Vec<String> =
            self.words.iter().map(|(word, rows)| format!("{rows} {word}")).collect();
        let rows = count(self.rows, "row");
        let text = format!("{rows}: {}: {}", words.join(", "), out.display());
        if self.usable == self.rows {
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

/// What decides whether a new link is made.
struct Renewing<'a> {
    inside: &'a Inside,
    over: &'a WrittenOver<'a>,
    stems: &'a Stems,
    /// The ids of links that this look has made.
    made: RefCell<HashSet<String>>,
}

/// Asks what has become of a line's link, and where it is dead and may be renewed, has a new one made.
async fn look(
    renewing: &Renewing<'_>,
    seen: &GoneTally,
    line: Line,
    new: Option<Renewal>,
) -> Looked {
    let inside = renewing.inside;
    let Some(checkout_id) = line.checkout_id() else {
        return Looked { line, link: None, renewed: None };
    };
    let id = line.request_id();
    let state = seen.judge(ask_for(inside, &id, &checkout_id).await);
    let Some(renewal) = new.filter(|_| state.is_dead()) else {
        return Looked { line, link: Some(state), renewed: None };
    };
    let may = if renewing.stems.is_shared(&id) {
        let stem = stem(&id);
        Err(format!(
            "more than one line is called {stem} or {stem}.rN, as new links are: its new id may be another line's. Make a link under an id of your own"
        ))
    } else {
        same_job(inside, &id, &checkout_id, &renewal).await
    };
    if let Err(why) = may {
        say_error(&format!("{id}: no new link: {why}"));
        return Looked { line, link: Some(state), renewed: Some(Status::Conflict) };
    }
    renew(renewing, line, state, renewal).await
}

/// Has a new link made under the next id that has no dead one: an earlier look may have renewed it before.
async fn renew(
    Renewing { inside, over, made: made_now, .. }: &Renewing<'_>,
    line: Line,
    mut state: Link,
    mut renewal: Renewal,
) -> Looked {
    // Whatever the ledger has forgotten, nothing is made beside a later one.
    if let Some(number) = over.last_renewal(&line.request_id()) {
        renewal.go_on_with(number);
    }
    for _ in 0..MOST_RENEWALS {
        let (id, job) = renewal.next_job();
        let before = match &job {
            // An earlier look may have had it made.
            Ok(request) => inside.known(request.request_id.clone()).await,
            Err(_) => Ok(None),
        };
        let before = match before {
            Ok(before) => before,
            Err(error) => {
                say_error(&format!("{id}: no new link: {error}"));
                return Looked { line, link: Some(state), renewed: Some(Status::Failed) };
            }
        };
        let known = before.as_ref().and_then(|before| before.checkout_id.as_deref());
        if over.has(&id) && !known.is_some_and(|known| over.is_of(&id, known)) {
            say_error(&format!(
                "{id}: no new link: the output has one for it that this ledger has not made"
            ));
            return Looked { line, link: Some(state), renewed: Some(Status::Conflict) };
        }
        let made = match job {
            Ok(request) => inside.make(*request, false).await,
            Err(flaw) => Some(problem(Status::Invalid, flaw.code, &flaw.message)),
        };
        // It is stopped.
        let Some(made) = made else { return Looked { line, link: Some(state), renewed: None } };
        let Some(checkout_id) =
            made.checkout_id.clone().filter(|_| made.status == Status::Succeeded)
        else {
            // The dead link stays, so that the next look finds it again.
            let why = made.error_message.unwrap_or_default();
            say_error(&format!("{id}: no new link: {}: {why}", made.status));
            return Looked { line, link: Some(state), renewed: Some(made.status) };
        };
        // One that was made now is not asked for, by this line or another one of its id: that Creem does not show it
        // yet would say nothing.
        state = if known == Some(&checkout_id) && !made_now.borrow().contains(&id) {
            ask_for(inside, &id, &checkout_id).await
        } else {
            made_now.borrow_mut().insert(id.clone());
            Link::Open
        };
        if !state.is_dead() {
            let line = line.renewed(&id, &made);
            return Looked { line, link: Some(state), renewed: Some(made.status) };
        }
    }
    let id = line.request_id();
    say_error(&format!(
        "{id}: {MOST_RENEWALS} new links are dead as well; the same command looks on"
    ));
    Looked { line, link: Some(state), renewed: None }
}
