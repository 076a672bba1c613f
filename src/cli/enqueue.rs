//! `enqueue`: jobs into a queue, and with `--wait` their replies out of one.

use std::collections::HashSet;
use std::io::{BufRead, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, block_on, count, resolved_without_key, say, say_error};
use crate::bulk::table::BOM;
use crate::clock::{Clock as _, SystemClock};
use crate::config::check::Resolved;
use crate::config::sections::LONGEST;
use crate::job::Lane;
use crate::job::json::Node;
use crate::rabbit::headers;
use crate::rabbit::link::{self, LinkError};
use crate::rabbit::publisher::{Class, Shape, State};
use crate::rabbit::replies::{Received, ReplyQueue};
use crate::rabbit::{Message, Published, Publisher};
use crate::retry::Backoff;

/// How often a publish may be lost with its channel before that is taken for the broker's answer.
const MOST_LOST: u32 = 20;
/// How often a job is refused, half a second apart, before the queue is taken to be full.
const MOST_REFUSED: u32 = 10;
/// Publishes in flight at once.
const WINDOW: usize = 256;

/// Put jobs into a lane's queue, confirmed.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// NDJSON, one job a line; `-` is standard input. Without it, one job from the flags below.
    #[arg(value_name = "FILE", conflicts_with_all = ["request_id", "product_id", "units", "email", "discount_code", "success_url", "metadata"])]
    file: Option<PathBuf>,
    /// The job's idempotency key.
    #[arg(long, requires = "product_id")]
    request_id: Option<String>,
    /// The product.
    #[arg(long, requires = "request_id")]
    product_id: Option<String>,
    /// How many of it.
    #[arg(long)]
    units: Option<u32>,
    /// The buyer's address.
    #[arg(long)]
    email: Option<String>,
    /// A discount code.
    #[arg(long)]
    discount_code: Option<String>,
    /// Where a buyer who has paid is sent.
    #[arg(long)]
    success_url: Option<String>,
    /// Metadata, as often as needed.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// The lane.
    #[arg(long, default_value = "interactive", value_parser = super::lane)]
    lane: Lane,
    /// Send replies to this queue instead of the configured one.
    #[arg(long, conflicts_with = "wait")]
    reply_to: Option<String>,
    /// After which nobody waits any more, from now, e.g. 30s.
    #[arg(long, value_parser = span)]
    deadline: Option<Duration>,
    /// The campaign's name.
    #[arg(long, value_parser = super::campaign)]
    campaign: Option<String>,
    /// Wait for the replies and print each, one JSON object a line. Exit code 1 if a job got no link.
    #[arg(long)]
    wait: bool,
    /// How long to wait for the next reply before giving up.
    #[arg(long, default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

fn span(text: &str) -> Result<Duration, String> {
    let span = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if span <= LONGEST { Ok(span) } else { Err("give at most 3650d".to_owned()) }
}

pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=VALUE")?;
    if key.trim().is_empty() || key.contains(char::is_control) {
        return Err("give KEY=VALUE with a key of printable characters".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) fn run(file: Option<&Path>, arguments: &Arguments) -> Outcome {
    let settings = resolved_without_key(file, None)?;
    if let Some(queue) = &arguments.reply_to
        && settings.topology.denies_replies_to(queue)
    {
        let text =
            format!("--reply-to {queue}: replies must not go to a queue of the worker's own");
        return Err(Failure::Usage(text));
    }
    let jobs = jobs(&settings, arguments)?;
    block_on(enqueue(&settings, arguments, jobs))?
}

async fn enqueue(settings: &Resolved, arguments: &Arguments, jobs: Jobs) -> Outcome {
    let stop = CancellationToken::new();
    // A broker that is not there is an error here, not something to wait for.
    let replies = if arguments.wait {
        let exchange = &settings.topology.replies_exchange;
        let queue =
            ReplyQueue::open(&settings.amqp, "checkout-worker enqueue --wait", exchange).await;
        Some(queue.map_err(|error| {
            anyhow!("{error}; check AMQP_URL, this user's permissions, and replies.exchange")
        })?)
    } else {
        None
    };
    let (publisher, keep) = Publisher::new(
        settings.amqp.clone(),
        "checkout-worker enqueue".to_owned(),
        Backoff::of_reconnects(),
        Shape::WIDE,
        stop.clone(),
    );
    let mut tasks = JoinSet::new();
    tasks.spawn(keep);
    reachable(settings, &publisher).await?;
    let address = replies.as_ref().map(|replies| replies.name().to_owned());
    let reply_to = address.as_deref().or(arguments.reply_to.as_deref());
    let bar = progress();
    let sending = Sending { settings, arguments, publisher: &publisher, reply_to, bar: &bar };
    let outcome = match replies {
        None => sending
            .send_all(jobs)
            .await
            .map(|sent| format!("{} enqueued", count(sent as u64, "job"))),
        Some(replies) => sending.send_and_wait(jobs, replies).await,
    };
    bar.finish_and_clear();
    stop.cancel();
    tasks.shutdown().await;
    say_error(&outcome?);
    Ok(())
}

/// How long a broker that is not there is waited for.
const REACHABLE: Duration = Duration::from_secs(10);

async fn reachable(settings: &Resolved, publisher: &Publisher) -> Outcome {
    let no = |error: LinkError| Failure::Failed(anyhow!("{error}; check AMQP_URL"));
    let asked = || link::connect(&settings.amqp, "checkout-worker enqueue");
    match asked().await {
        Ok(_) => {}
        // It may be starting.
        Err(error @ LinkError::Unreachable { .. }) => {
            say_error(&format!("{error}; trying for {}", humantime::format_duration(REACHABLE)));
        }
        Err(error) => return Err(no(error)),
    }
    let mut state = publisher.state();
    let up = state.wait_for(|state| matches!(state, State::Up));
    match tokio::time::timeout(REACHABLE, up).await {
        Ok(_) => Ok(()),
        Err(_) => asked().await.map(|_| ()).map_err(no),
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed_precise}");
    style.map_or_else(
        |_| ProgressBar::new_spinner(),
        |style| ProgressBar::new_spinner().with_style(style),
    )
}

/// Jobs with the numbers of their lines, as they are read.
type Jobs = Box<dyn Iterator<Item = anyhow::Result<(usize, Vec<u8>)>> + Send>;

struct Sending<'a> {
    settings: &'a Resolved,
    arguments: &'a Arguments,
    publisher: &'a Publisher,
    reply_to: Option<&'a str>,
    bar: &'a ProgressBar,
}

impl Sending<'_> {
    fn message(&self, body: &[u8], line: usize) -> Result<Message, Failure> {
        let now = SystemClock.now();
        let correlation = line.to_string();
        let mut message = Message::job(
            &self.settings.topology,
            self.arguments.lane,
            Arc::from(body),
            self.reply_to,
            &correlation,
            now,
        )?;
        if let Some(deadline) = self.arguments.deadline {
            let at = now + crate::clock::as_millis(deadline);
            message = message.with_header(headers::DEADLINE, &crate::job::reply::rfc3339(at));
        }
        if let Some(campaign) = &self.arguments.campaign {
            message = message.with_header(headers::CAMPAIGN, campaign);
        }
        Ok(message)
    }

    /// Publishes every job; returns how many. Stops at the first that cannot be read or placed.
    async fn send_all(&self, mut jobs: Jobs) -> Result<usize, Failure> {
        let mut in_flight = JoinSet::new();
        let mut confirmed = 0;
        let stopped = |confirmed: usize, error: anyhow::Error| {
            Failure::Failed(error.context(format!(
                "stopped after {} had been enqueued",
                count(confirmed as u64, "job")
            )))
        };
        let mut unreadable = None;
        loop {
            while in_flight.len() < WINDOW && unreadable.is_none() {
                match jobs.next() {
                    None => break,
                    Some(Err(error)) => unreadable = Some(error),
                    Some(Ok((line, body))) => {
                        let message = self.message(&body, line)?;
                        let publisher = self.publisher.clone();
                        in_flight.spawn(async move { (line, publish(&publisher, message).await) });
                    }
                }
            }
            match in_flight.join_next().await {
                None => match unreadable {
                    None => return Ok(confirmed),
                    Some(error) => return Err(stopped(confirmed, error)),
                },
                Some(Err(error)) => return Err(error.into()),
                Some(Ok((line, Err(error)))) => {
                    return Err(stopped(confirmed, error.context(format!("line {line}"))));
                }
                Some(Ok((_, Ok(())))) => {
                    confirmed += 1;
                    self.bar.set_message(format!("{confirmed} enqueued"));
                    self.bar.tick();
                }
            }
        }
    }

    /// Publishes every job and prints every reply.
    async fn send_and_wait(&self, jobs: Jobs, mut replies: ReplyQueue) -> Result<String, Failure> {
        let sent = self.send_all(jobs);
        tokio::pin!(sent);
        let mut expected = None;
        let mut answered = HashSet::new();
        let mut unhappy = 0_usize;
        while expected.is_none_or(|expected| answered.len() < expected) {
            tokio::select! {
                count = &mut sent, if expected.is_none() => expected = Some(count?),
                reply = tokio::time::timeout(self.arguments.timeout, replies.next()) => {
                    let Ok(reply) = reply else { return Err(silence(answered.len(), expected)) };
                    let reply = reply?;
                    // A reply can come twice; each job is counted once.
                    if answered.insert(reply.correlation_id.clone()) {
                        unhappy += usize::from(!self.show(&reply));
                        self.bar.set_message(format!("{} answered", answered.len()));
                    }
                }
            }
        }
        let happy = answered.len() - unhappy;
        let text = format!(
            "{} answered, {happy} of them with a link",
            count(answered.len() as u64, "job")
        );
        if unhappy == 0 { Ok(text) } else { Err(Failure::Failed(anyhow!(text))) }
    }

    /// Prints a reply, and beside the output the line of a job that got no link; says whether it
    /// got one.
    fn show(&self, reply: &Received) -> bool {
        let text = String::from_utf8_lossy(&reply.body);
        let node = Node::parse(&text).ok();
        let status = node.as_ref().and_then(|node| node.get("status")).and_then(Node::as_str);
        let happy = status == Some("succeeded");
        self.bar.suspend(|| {
            say(&text);
            if !happy && self.arguments.file.is_some() {
                say_error(&format!("line {}: {}", reply.correlation_id, status.unwrap_or("?")));
            }
        });
        happy
    }
}

fn silence(answered: usize, expected: Option<usize>) -> Failure {
    let missing = expected.map_or_else(
        || "more are to come".to_owned(),
        |expected| format!("{} more expected", expected - answered),
    );
    Failure::Failed(anyhow!(
        "no reply within --timeout; {} answered, {missing}. Is a worker running for these queues, and did it park a job (its log, and the dead queue)?",
        count(answered as u64, "job")
    ))
}

/// Publishes, and knows that a queue has it.
pub(super) async fn publish(publisher: &Publisher, message: Message) -> anyhow::Result<()> {
    let (mut lost, mut refused) = (0, 0);
    loop {
        match publisher.publish(Class::Internal, message.clone()).await {
            Ok(Published::Routed) => return Ok(()),
            Ok(Published::Returned(reason)) => {
                return Err(anyhow!(
                    "no queue took it ({reason}): start the worker once, it declares the queues"
                ));
            }
            Ok(Published::Refused) if refused >= MOST_REFUSED => {
                return Err(anyhow!("the queue refused it: it is full, or no node leads it"));
            }
            // A cluster may just be electing the queue's next leader.
            Ok(Published::Refused) => {
                refused += 1;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            // The broker may have it: sent again, it is a copy, and copies are answered alike.
            Err(error) if lost >= MOST_LOST => {
                return Err(anyhow!("{error}; check this user's permissions and --reply-to"));
            }
            Err(_) => {
                lost += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Where the jobs come from: flags, a file, or standard input. Nothing is sent if that is wrong.
fn jobs(settings: &Resolved, arguments: &Arguments) -> Result<Jobs, Failure> {
    let Some(path) = &arguments.file else {
        let body = job_from_flags(settings, arguments)?;
        return Ok(Box::new(std::iter::once(Ok((1, body)))));
    };
    if path.as_os_str() == "-" {
        return Ok(lines(std::io::BufReader::new(std::io::stdin()), settings.job.max_bytes));
    }
    let file = std::fs::File::open(path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(Failure::Usage(format!("{} is a directory: give a file", path.display())));
    }
    Ok(lines(std::io::BufReader::new(file), settings.job.max_bytes))
}

/// Jobs line by line; a million lines take no more memory than one, and a line no more than a job.
fn lines(mut reader: impl BufRead + Send + 'static, most: usize) -> Jobs {
    let mut number = 0;
    Box::new(std::iter::from_fn(move || {
        loop {
            number += 1;
            let mut line = Vec::new();
            let mark = if number == 1 { BOM.len() } else { 0 };
            let limit = u64::try_from(most + mark).unwrap_or(u64::MAX).saturating_add(2);
            let read = reader.by_ref().take(limit).read_until(b'\n', &mut line);
            match read.with_context(|| format!("line {number} cannot be read")) {
                Err(error) => return Some(Err(error)),
                Ok(0) => return None,
                Ok(_) => {}
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            if number == 1 && line.starts_with(BOM) {
                line.drain(..BOM.len());
            }
            if line.len() > most {
                let text = format!("line {number} is larger than {most} bytes (job.max_bytes)");
                return Some(Err(anyhow!(text)));
            }
            if !line.trim_ascii().is_empty() {
                return Some(Ok((number, line)));
            }
        }
    }))
}

fn job_from_flags(settings: &Resolved, flags: &Arguments) -> Result<Vec<u8>, Failure> {
    let (Some(request_id), Some(product_id)) = (&flags.request_id, &flags.product_id) else {
        return Err(Failure::Usage("give FILE, or --request-id and --product-id".to_owned()));
    };
    let mut job = serde_json::json!({"request_id": request_id, "product_id": product_id});
    let mut put = |name: &str, value: Option<serde_json::Value>| {
        if let Some(value) = value {
            job[name] = value;
        }
    };
    put("units", flags.units.map(Into::into));
    put("discount_code", flags.discount_code.clone().map(Into::into));
    put("success_url", flags.success_url.clone().map(Into::into));
    put("customer", flags.email.as_ref().map(|email| serde_json::json!({"email": email})));
    let mut names = HashSet::new();
    if let Some((name, _)) = flags.metadata.iter().find(|(name, _)| !names.insert(name)) {
        return Err(Failure::Usage(format!("--metadata {name} is given twice")));
    }
    let metadata: serde_json::Map<_, _> =
        flags.metadata.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    put("metadata", (!metadata.is_empty()).then(|| metadata.into()));
    let body = job.to_string().into_bytes();
    // One job by hand is checked before it is sent; the worker would only say the same later.
    crate::job::CheckoutRequest::parse(&body, &settings.job)
        .map_err(|refusal| Failure::Usage(refusal.to_string()))?;
    Ok(body)
}
