//! The books: what went in, what came out, what Creem holds, what the ledger says.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::simulator::Simulator;

use super::Plan;

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
    pub(crate) kills: usize,
    pub(crate) restarts: usize,
    replies: HashMap<String, Vec<(String, Vec<u8>)>>,
    parked: HashMap<String, usize>,
    /// Sessions per job: how many, and their links.
    sessions: HashMap<String, HashSet<String>>,
    /// Ambiguous attempts per job, by the ledger.
    ambiguous: HashMap<String, u32>,
    posts: usize,
    faults: BTreeMap<String, usize>,
    damage: Vec<String>,
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
    pub(crate) fn close(&mut self, simulator: &Simulator, ledger: &Path) {
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
                .insert(session.url.clone());
        }
        let inspector = Inspector::open(ledger).unwrap();
        self.damage = inspector.report().damage;
        inspector
            .rows(|key, row| {
                self.ambiguous.insert(key.request_id.to_string(), row.unwrap().ambiguous);
            })
            .unwrap();
    }

    /// Prints the figures and returns what is wrong.
    pub(crate) fn report(&self, plan: &Plan, took: Duration) -> Vec<String> {
        let mut sums = Sums { wrong: self.damage.clone(), ..Sums::default() };
        for job in 0..plan.jobs {
            self.judge(&format!("job-{job}"), &mut sums);
        }
        if self.published != plan.jobs {
            sums.wrong.push(format!("{} of {} jobs were confirmed", self.published, plan.jobs));
        }
        let faulty: usize = self.faults.values().sum();
        println!("chaos, seed {}: {} jobs in {:.1} s", plan.seed, plan.jobs, took.as_secs_f64());
        println!("  confirmed by the broker     {}", self.published);
        println!("  worker killed with kill -9  {}", self.kills);
        println!("  broker restarted or killed  {}", self.restarts);
        println!(
            "  calls to Creem              {} ({faulty} faulty: {:?})",
            self.posts, self.faults
        );
        println!("  replies by status           {:?}", sums.statuses);
        println!(
            "  repeated replies            {}, with other bytes: {}",
            sums.repeats, sums.unequal
        );
        println!("  parked copies               {}", self.parked.values().sum::<usize>());
        println!(
            "  extra sessions at Creem     {}, not counted by the ledger: {}",
            sums.extra, sums.uncounted
        );
        println!("  ambiguous attempts (ledger) {}", sums.ambiguous);
        println!("  lost jobs                   {}", sums.lost);
        println!(
            "  second URLs                 {}, foreign URLs: {}",
            sums.second_urls, sums.foreign
        );
        println!("  false \"not created\"         {}", sums.false_clean);
        sums.wrong
    }

    /// Compares the books of one job.
    fn judge(&self, id: &str, sums: &mut Sums) {
        let replies = self.replies.get(id).map_or(&[][..], Vec::as_slice);
        if replies.is_empty() && !self.parked.contains_key(id) {
            sums.lost += 1;
            sums.wrong.push(format!("{id} has neither a reply nor a parked copy"));
        }
        sums.repeats += replies.len().saturating_sub(1);
        if replies.iter().collect::<HashSet<_>>().len() > 1 {
            sums.unequal += 1;
            sums.wrong.push(format!("{id} got replies that differ"));
        }
        let mut urls = HashSet::new();
        let mut clean = false;
        for (_, body) in replies {
            let reply: serde_json::Value = serde_json::from_slice(body).unwrap();
            let status = reply["status"].as_str().unwrap().to_owned();
            clean |= ["rejected", "failed", "expired", "cancelled"].contains(&status.as_str());
            if status == "unresolved" && !self.parked.contains_key(id) {
                sums.wrong.push(format!("{id} is unresolved, and no copy of it was parked"));
            }
            *sums.statuses.entry(status).or_default() += 1;
            urls.extend(reply["checkout_url"].as_str().map(str::to_owned));
        }
        self.judge_sessions(id, &urls, clean, sums);
    }

    /// Compares what one job was told with what Creem holds for it and what the ledger counts.
    fn judge_sessions(&self, id: &str, urls: &HashSet<String>, clean: bool, sums: &mut Sums) {
        let none = HashSet::new();
        let sessions = self.sessions.get(id).unwrap_or(&none);
        if urls.len() > 1 {
            sums.second_urls += 1;
            sums.wrong.push(format!("{id} got {} links", urls.len()));
        }
        if !urls.is_subset(sessions) {
            sums.foreign += 1;
            sums.wrong.push(format!("{id} got a link that was not made for it"));
        }
        if clean && !sessions.is_empty() {
            sums.false_clean += 1;
            sums.wrong
                .push(format!("{id} was told that no session exists, and {} do", sessions.len()));
        }
        let extra = sessions.difference(urls).count();
        let counted = self.ambiguous.get(id).copied().unwrap_or(0);
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
    second_urls: usize,
    foreign: usize,
    false_clean: usize,
    extra: usize,
    uncounted: usize,
    ambiguous: u32,
}
