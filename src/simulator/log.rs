//! What the simulator saw: every POST, every session, in memory for as long as it runs.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::script::Fault;

/// One POST to `/v1/checkouts`.
#[derive(Debug, Clone, Serialize)]
pub struct Post {
    /// Its number, from 0.
    pub number: usize,
    /// When it came, in microseconds since the first one.
    pub arrived_us: u64,
    /// The id in its body, or nothing.
    pub request_id: String,
    /// The fault it drew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<&'static str>,
    /// The status of its answer; 0 for a connection that was cut, absent while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The session it made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// The body as it was sent.
    pub body: String,
}

/// A checkout session.
#[derive(Debug, Clone, Serialize)]
pub struct Session {
    /// Its id.
    pub id: String,
    /// The id it was made for.
    pub request_id: String,
    /// Its link.
    pub url: String,
    /// The request it was made from.
    pub request: Value,
}

/// Everything that happened.
#[derive(Debug, Default)]
pub struct Log {
    first: Option<Instant>,
    posts: Vec<Post>,
    sessions: Vec<Session>,
    by_id: HashMap<String, usize>,
    prefix: String,
    /// How many GETs were asked.
    pub gets: usize,
    /// GETs for a session that are yet to be throttled.
    throttled_gets: HashMap<String, usize>,
}

impl Log {
    /// Has the next GETs for a session throttled.
    pub fn throttle_gets(&mut self, id: &str, times: usize) {
        self.throttled_gets.insert(id.to_owned(), times);
    }

    /// Whether this GET for a session is to be throttled; counts it.
    pub fn throttles_get(&mut self, id: &str) -> bool {
        let left = self.throttled_gets.get_mut(id);
        left.and_then(|left| left.checked_sub(1).map(|less| *left = less)).is_some()
    }

    /// Every POST, in the order of arrival.
    #[must_use]
    pub fn posts(&self) -> &[Post] {
        &self.posts
    }

    /// Every session, in the order of making.
    #[must_use]
    pub fn sessions(&self) -> &[Session] {
        &self.sessions
    }

    /// A session by its id.
    #[must_use]
    pub fn session(&self, id: &str) -> Option<&Session> {
        self.by_id.get(id).and_then(|at| self.sessions.get(*at))
    }

    /// How many POSTs came for that id.
    #[must_use]
    pub fn posts_for(&self, request_id: &str) -> usize {
        self.posts.iter().filter(|post| post.request_id == request_id).count()
    }

    /// Sessions per `request_id`.
    #[must_use]
    pub fn sessions_per_request(&self) -> HashMap<&str, usize> {
        let mut count = HashMap::new();
        for session in &self.sessions {
            *count.entry(session.request_id.as_str()).or_insert(0) += 1;
        }
        count
    }

    pub(super) fn next_id(&mut self) -> String {
        if self.prefix.is_empty() {
            // Ids must differ between two runs of the simulator too.
            let mut random = [0_u8; 4];
            getrandom::fill(&mut random).unwrap_or_default();
            self.prefix = format!("ch_sim{:08x}", u32::from_le_bytes(random));
        }
        format!("{}{:06}", self.prefix, self.sessions.len())
    }

    pub(super) fn add_post(
        &mut self,
        request_id: &str,
        fault: Option<&Fault>,
        body: &[u8],
    ) -> usize {
        let number = self.posts.len();
        let first = *self.first.get_or_insert_with(Instant::now);
        self.posts.push(Post {
            number,
            arrived_us: u64::try_from(first.elapsed().as_micros()).unwrap_or(u64::MAX),
            request_id: request_id.to_owned(),
            fault: fault.map(|fault| fault.kind.name()),
            status: None,
            session: None,
            body: String::from_utf8_lossy(body).into_owned(),
        });
        number
    }

    pub(super) fn finish_post(&mut self, number: usize, status: u16, session: Option<&str>) {
        if let Some(post) = self.posts.get_mut(number) {
            post.status = Some(status);
            post.session = session.map(str::to_owned);
        }
    }

    pub(super) fn add_session(&mut self, session: Session) -> Session {
        self.by_id.insert(session.id.clone(), self.sessions.len());
        self.sessions.push(session.clone());
        session
    }

    pub(super) fn post_lines(&self) -> String {
        lines(&self.posts)
    }

    pub(super) fn session_lines(&self) -> String {
        lines(&self.sessions)
    }

    pub(super) fn counters(&self) -> Value {
        let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
        for fault in self.posts.iter().filter_map(|post| post.fault) {
            *faults.entry(fault).or_default() += 1;
        }
        let per_request = self.sessions_per_request();
        let extra: usize = per_request.values().map(|count| count - 1).sum();
        json!({
            "posts": self.posts.len(),
            "gets": self.gets,
            "sessions": self.sessions.len(),
            "request_ids_with_sessions": per_request.len(),
            "extra_sessions": extra,
            "faults": faults,
        })
    }
}

fn lines<T: Serialize>(items: &[T]) -> String {
    let mut out = String::new();
    for item in items {
        let line = serde_json::to_string(item).unwrap_or_default();
        writeln!(out, "{line}").unwrap_or_default();
    }
    out
}
