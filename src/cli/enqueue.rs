//! `enqueue`: jobs into a queue, and with `--wait` their replies out of one.

use std::collections::HashSet;
use std::io::{BufRead, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, block_on, count, resolved_without_key, say, say_error};
use crate::clock::{Clock as _, SystemClock};
use crate::config::check::Resolved;
use crate::config::sections::LONGEST;
use crate::job::Lane;
use crate::job::json::Node;
use crate::rabbit::envelope::is_campaign;
use crate::rabbit::headers;
use crate::rabbit::publisher::Class;
use crate::rabbit::replies::ReplyQueue;
use crate::rabbit::{Message, Published, Publisher};

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
    #[arg(long, value_parser = campaign)]
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

fn campaign(text: &str) -> Result<String, String> {
    if is_campaign(text) { Ok(text.to_owned()) } else { Err("give 1-64 characters".to_owned()) }
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("give KEY=VALUE")?;
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
    block_on(enqueue(&settings, arguments))?
}

async fn enqueue(settings: &Resolved, arguments: &Arguments) -> Outcome {
    let stop = CancellationToken::new();
    let replies = if arguments.wait {
        Some(ReplyQueue::open(&settings.amqp, "checkout-worker enqueue --wait").await?)
    } else {
        None
    };
    let (publisher, keep) = Publisher::new(
        settings.amqp.clone(),
        "checkout-worker enqueue".to_owned(),
        settings.backoff,
        stop.clone(),
    );
    let mut tasks = JoinSet::new();
    tasks.spawn(keep);
    // A broker that is not there is an error here, not something to wait for.
    reachable(settings, &publisher).await?;
    let bar = progress();
    let (address, expecting) = match replies {
        Some(replies) => (Some(replies.name().to_owned()), Some(replies)),
        None => (arguments.reply_to.clone(), None),
    };
    let context = Sending {
        settings,
        arguments,
        publisher: &publisher,
        reply_to: address.as_deref(),
        bar: &bar,
    };
    let outcome = match expecting {
        None => context
            .send_all()
            .await
            .map(|sent| say_error(&format!("{} enqueued", count(sent, "job")))),
        Some(replies) => context.send_and_wait(replies).await,
    };
    bar.finish_and_clear();
    stop.cancel();
    tasks.shutdown().await;
    outcome
}

async fn reachable(settings: &Resolved, publisher: &Publisher) -> Outcome {
    let mut state = publisher.state();
    let up = state.wait_for(|state| matches!(state, crate::rabbit::publisher::State::Up));
    match tokio::time::timeout(Duration::from_secs(10), up).await {
        Ok(_) => Ok(()),
        Err(_) => {
            match crate::rabbit::link::connect(&settings.amqp, "checkout-worker enqueue").await {
                Ok(_) => Ok(()),
                Err(error) => Err(Failure::Failed(anyhow!("{error}; check AMQP_URL"))),
            }
        }
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {pos} {msg} {elapsed_precise} {per_sec}");
    style.map_or_else(
        |_| ProgressBar::new_spinner(),
        |style| ProgressBar::new_spinner().with_style(style),
    )
}

/// Bodies of jobs, as they are read.
type Bodies = Box<dyn Iterator<Item = Result<Vec<u8>, Failure>> + Send>;

struct Sending<'a> {
    settings: &'a Resolved,
    arguments: &'a Arguments,
    publisher: &'a Publisher,
    reply_to: Option<&'a str>,
    bar: &'a ProgressBar,
}

impl Sending<'_> {
    fn message(&self, body: &[u8], number: usize) -> Result<Message, Failure> {
        let now = SystemClock.now();
        let correlation = format!("{number}");
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

    /// Publishes every job; returns how many. Stops at the first that cannot be placed.
    async fn send_all(&self) -> Result<usize, Failure> {
        let mut lines = self.jobs()?;
        let mut in_flight = JoinSet::new();
        let mut sent = 0;
        loop {
            while in_flight.len() < WINDOW {
                let Some(body) = lines.next().transpose()? else { break };
                let message = self.message(&body, sent)?;
                let publisher = self.publisher.clone();
                let number = sent + 1;
                in_flight.spawn(async move { (number, publish(&publisher, message).await) });
                sent += 1;
            }
            match in_flight.join_next().await {
                None => return Ok(sent),
                Some(Err(error)) => return Err(error.into()),
                Some(Ok((number, Err(error)))) => {
                    return Err(Failure::Failed(error.context(format!("job {number}"))));
                }
                Some(Ok((_, Ok(())))) => {
                    self.bar.inc(1);
                    self.bar.set_message("enqueued");
                }
            }
        }
    }

    async fn send_and_wait(&self, mut replies: ReplyQueue) -> Outcome {
        let sent = self.send_all();
        tokio::pin!(sent);
        let mut expected = None;
        let mut answered = HashSet::new();
        let mut unhappy = 0_usize;
        while expected.is_none_or(|expected| answered.len() < expected) {
            tokio::select! {
                count = &mut sent, if expected.is_none() => expected = Some(count?),
                reply = tokio::time::timeout(self.arguments.timeout, replies.next()) => {
                    let reply = if let Ok(reply) = reply { reply? } else {
                        let missing = expected.map_or_else(|| "some".to_owned(), |expected| (expected - answered.len()).to_string());
                        return Err(Failure::Failed(anyhow!("no reply within --timeout; {missing} are missing (is a worker running? `checkout-worker check` tells)")));
                    };
                    let text = String::from_utf8_lossy(&reply.body).into_owned();
                    // A reply can come twice; each job is counted once.
                    if answered.insert(reply.correlation_id) {
                        self.bar.set_message("enqueued and answered");
                        let good = Node::parse(&text).is_ok_and(|node| node.get("status").and_then(Node::as_str) == Some("succeeded"));
                        unhappy += usize::from(!good);
                        self.bar.suspend(|| say(&text));
                    }
                }
            }
        }
        say_error(&format!(
            "{} answered, {} of them with a link",
            count(answered.len(), "job"),
            answered.len() - unhappy
        ));
        if unhappy == 0 {
            Ok(())
        } else {
            Err(Failure::Failed(anyhow!("{} got no link", count(unhappy, "job"))))
        }
    }

    /// The bodies, line by line; a million lines take no more memory than one.
    fn jobs(&self) -> Result<Bodies, Failure> {
        let Some(path) = &self.arguments.file else {
            return Ok(Box::new(std::iter::once(Ok(self.job_from_flags()?))));
        };
        let reader: Box<dyn BufRead + Send> = if path.as_os_str() == "-" {
            Box::new(std::io::BufReader::new(std::io::stdin()))
        } else {
            let file = std::fs::File::open(path)
                .with_context(|| format!("{} cannot be opened", path.display()))?;
            Box::new(std::io::BufReader::new(file))
        };
        let most = self.settings.job.max_bytes;
        let lines = reader.split(b'\n').zip(1_usize..).map(move |(line, number)| {
            let line = line?;
            if line.len() > most {
                let text = format!("line {number} is larger than {most} bytes (job.max_bytes)");
                return Err(Failure::Failed(anyhow!(text)));
            }
            Ok(line)
        });
        Ok(Box::new(lines.filter(|line: &Result<Vec<u8>, Failure>| {
            !line.as_ref().is_ok_and(|line| line.trim_ascii().is_empty())
        })))
    }

    fn job_from_flags(&self) -> Result<Vec<u8>, Failure> {
        let flags = self.arguments;
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
        let metadata: serde_json::Map<_, _> =
            flags.metadata.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        put("metadata", (!metadata.is_empty()).then(|| metadata.into()));
        let body = job.to_string().into_bytes();
        // One job by hand is checked before it is sent; the worker would only say the same later.
        crate::job::CheckoutRequest::parse(&body, &self.settings.job)
            .map_err(|refusal| Failure::Usage(refusal.to_string()))?;
        Ok(body)
    }
}

async fn publish(publisher: &Publisher, message: Message) -> anyhow::Result<()> {
    loop {
        match publisher.publish(Class::Internal, message.clone()).await {
            Ok(Published::Routed) => return Ok(()),
            Ok(Published::Returned(reason)) => {
                return Err(anyhow!(
                    "no queue took it ({reason}): start the worker once, it declares the queues"
                ));
            }
            Ok(Published::Refused) => return Err(anyhow!("the queue refused it: it is full")),
            // The broker may have it: sent again, it is a copy, and copies are answered alike.
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
