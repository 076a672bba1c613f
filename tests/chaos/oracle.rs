//! The books: what went in, what came out, what Creem holds, what the ledger says.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use creem_checkout_worker::simulator::Simulator;

use super::Plan;
use super::traffic::TWICE;

/// A message that came out.
#[derive(Debug)]
pub(crate) struct Message {
    /// From the dead queue instead of the reply queue.
    pub(crate) parked: bool,
    /// The job, by its correlation id.
    pub(crate) id: String,
    /// The reply's id.
    pub(crate) reply_id: String,
    /// Its bytes.
    pub(crate) body: Vec<u8>,
}

#[derive(Debug, Default)]
pub(crate) struct Books {
    pub(crate) published: usize,
    /// What was done to the workers and servers, and how often.
    pub(crate) faults_of_ours: Vec<(&'static str, usize)>,
    replies: HashMap<String, Vec<(String, Vec<u8>)>>,
    parked: HashMap<String, usize>,
    /// Sessions per job: their links, and their ids.
    sessions: HashMap<String, HashMap<String, String>>,
    held: Held,
    posts: usize,
    faults: BTreeMap<String, usize>,
}

/// What the ledger holds at the end.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Ambiguous attempts per job.
    pub(crate) ambiguous: HashMap<String, u32>,
    /// Jobs and sessions of theirs that nobody was given.
    pub(crate) orphans: Vec<(String, String)>,
    /// What cannot be read.
    pub(crate) damage: Vec<String>,
}

impl Books {
    pub(crate) fn note(&mut self, message: Message) {
        if message.parked {
            *self.parked.entry(message.id).or_default() += 1;
        } else {
            self.replies.entry(message.id).or_default().push((message.reply_id, message.body));
        }
    }

    pub(crate) fn answered(&self) -> usize {
        self.replies.len() + self.parked.keys().filter(|id| !self.replies.contains_key(*id)).count()
    }

    /// Takes in what Creem and the ledger hold at the end.
    pub(crate) fn close(&mut self, simulator: &Simulator, held: Held) {
        self.held = held;
        let log = simulator.log();
        self.posts = log.posts().len();
        for post in log.posts() {
            if let Some(fault) = post.fault {
                *self.faults.entry(fault.to_owned()).or_default() += 1;
            }
        }
        for session in log.sessions() {
            self.sessions
                .entry(session.request_id.clone())
                .or_default()
                .insert(session.url.clone(), session.id.clone());
        }
    }

    /// Prints the figures and returns what is wrong. Where nothing went wrong at Creem and no worker died, nothing
    /// may show it either: each job has its link, none is parked, no session is left over.
    pub(crate) fn report(&self, plan: &Plan, calm: bool, took: Duration) -> Vec<String> {
        let mut sums = Sums { wrong: self.held.damage.clone(), ..Sums::default() };
        for job in 0..plan.jobs {
            self.judge(&format!("job-{job}"), job.is_multiple_of(TWICE), &mut sums);
        }
        let published = plan.jobs + plan.jobs.div_ceil(TWICE);
        if self.published != published {
            sums.wrong.push(format!("{} of {published} copies were confirmed", self.published));
        }
        self.judge_orphans(&mut sums);
        if calm {
            let others = sums.statuses.keys().filter(|status| *status != "succeeded").count();
            let parked = self.parked.len();
            if others + parked + sums.extra > 0 {
                sums.wrong.push(format!(
                    "{others} statuses besides succeeded, {parked} jobs parked, {} extra sessions",
                    sums.extra
                ));
            }
        }
        let faulty: usize = self.faults.values().sum();
        if !calm && plan.faults > 0.0 && (faulty == 0 || sums.ambiguous == 0) {
            sums.wrong
                .push("no call met a fault, or none was ambiguous: nothing was tried".to_owned());
        }
        println!("  seed {}: {} jobs in {:.1} s", plan.seed, plan.jobs, took.as_secs_f64());
        println!("  confirmed by the broker     {} (every {TWICE}th twice)", self.published);
        for (what, count) in &self.faults_of_ours {
            println!("  {what:<27} {count}");
        }
        println!(
            "  calls to Creem              {} ({faulty} faulty: {:?})",
            self.posts, self.faults
        );
        println!("  replies by status           {:?}", sums.statuses);
        println!(
            "  repeated replies            {}, with other bytes: {}",
            sums.repeats, sums.unequal
        );
        println!("  tried afresh by the copy    {}", sums.reopened);
        println!("  parked copies               {}", self.parked.values().sum::<usize>());
        println!(
            "  extra sessions at Creem     {}, not counted by the ledger: {}",
            sums.extra, sums.uncounted
        );
        println!("  ambiguous attempts (ledger) {}", sums.ambiguous);
        println!("  orphan sessions (ledger)    {}", self.held.orphans.len());
        println!("  lost jobs                   {}", sums.lost);
        println!(
            "  second URLs                 {}, foreign URLs: {}",
            sums.second_urls, sums.foreign
        );
        println!("  false \"not created\"         {}", sums.false_clean);
        sums.wrong
    }

    /// Compares the books of one job.
    fn judge(&self, id: &str, twice: bool, sums: &mut Sums) {
        let replies = self.replies.get(id).map_or(&[][..], Vec::as_slice);
        if replies.is_empty() && !self.parked.contains_key(id) {
            sums.lost += 1;
            sums.wrong.push(format!("{id} has neither a reply nor a parked copy"));
        }
        sums.repeats += replies.len().saturating_sub(1);
        let (mut urls, mut links) = (HashSet::new(), HashSet::new());
        let mut clean = false;
        for (_, body) in replies {
            let reply: serde_json::Value = serde_json::from_slice(body).unwrap();
            let status = reply["status"].as_str().unwrap().to_owned();
            clean |= ["rejected", "failed", "expired", "cancelled"].contains(&status.as_str());
            if status == "unresolved" && !self.parked.contains_key(id) {
                sums.wrong.push(format!("{id} is unresolved, and no copy of it was parked"));
            }
            *sums.statuses.entry(status).or_default() += 1;
            if let Some(url) = reply["checkout_url"].as_str() {
                urls.insert(url.to_owned());
                links.insert(body);
            }
        }
        let outcomes = replies.iter().collect::<HashSet<_>>().len();
        // What was sent again after it had ended without a link was tried afresh, once: that is what a
        // producer sends it again for. A link is given in the same bytes for ever.
        if twice && outcomes == 2 && links.len() <= 1 {
            sums.reopened += 1;
            clean &= links.is_empty();
        } else if outcomes > 1 {
            sums.unequal += 1;
            sums.wrong.push(format!("{id} got replies that differ"));
        }
        self.judge_sessions(id, &urls, clean, sums);
    }

    /// No session that somebody was given is an orphan.
    fn judge_orphans(&self, sums: &mut Sums) {
        for (id, orphan) in &self.held.orphans {
            let told = self.replies.get(id).map_or(&[][..], Vec::as_slice);
            let given = told.iter().any(|(_, body)| {
                let reply: serde_json::Value = serde_json::from_slice(body).unwrap();
                reply["checkout_id"] == orphan.as_str()
            });
            if given {
                sums.wrong
                    .push(format!("{id} was given {orphan}, which the ledger calls an orphan"));
            }
        }
    }

    /// Compares what one job was told with what Creem holds for it and what the ledger counts.
    fn judge_sessions(&self, id: &str, urls: &HashSet<String>, clean: bool, sums: &mut Sums) {
        let sessions: HashSet<String> =
            self.sessions.get(id).into_iter().flatten().map(|(url, _)| url.clone()).collect();
        if urls.len() > 1 {
            sums.second_urls += 1;
            sums.wrong.push(format!("{id} got {} links", urls.len()));
        }
        if !urls.is_subset(&sessions) {
            sums.foreign += 1;
            sums.wrong.push(format!("{id} got a link that was not made for it"));
        }
        if clean && !sessions.is_empty() {
            sums.false_clean += 1;
            sums.wrong
                .push(format!("{id} was told that no session exists, and {} do", sessions.len()));
        }
        let extra = sessions.difference(urls).count();
        let counted = self.held.ambiguous.get(id).copied().unwrap_or(0);
        sums.extra += extra;
        sums.ambiguous += counted;
        let uncounted = extra.saturating_sub(usize::try_from(counted).unwrap());
        if uncounted > 0 {
            sums.uncounted += uncounted;
            sums.wrong
                .push(format!("{id} has {extra} extra sessions, the ledger counts {counted}"));
        }
    }
}

/// The figures of a report.
#[derive(Debug, Default)]
struct Sums {
    wrong: Vec<String>,
    statuses: BTreeMap<String, usize>,
    lost: usize,
    repeats: usize,
    unequal: usize,
    reopened: usize,
    second_urls: usize,
    foreign: usize,
    false_clean: usize,
    extra: usize,
    uncounted: usize,
    ambiguous: u32,
}
