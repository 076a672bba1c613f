//! What the simulator saw: every POST, every session, in memory for as long as it runs, or the newest ones.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

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
    /// What became of it; `pending` to begin with.
    pub status: String,
}

/// What each line of such a file begins with.
const BEGINS: &[u8; 7] = b"{\"id\":\"";

/// Opens a file of sessions, to go on at its end: on a line of its own, even if another process was killed in the
/// middle of one.
///
/// # Errors
/// If it cannot be opened, read or written to.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    let mut file = File::options().create(true).append(true).open(path)?;
    // A pipe has no end to be looked at, and must not be kept open by its writer.
    if file.metadata()?.is_file() && file.metadata()?.len() > 0 {
        let mut first = Vec::new();
        File::open(path)?.take(BEGINS.len() as u64).read_to_end(&mut first)?;
        // A torn line may be shorter.
        if !BEGINS.starts_with(&first) {
            let text = format!("{} is no log of sessions: name another file", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        let mut last = [0];
        let mut end = File::open(path)?;
        end.seek(SeekFrom::End(-1))?;
        end.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

/// Everything that happened.
#[derive(Debug, Default)]
pub struct Log {
    first: Option<Instant>,
    posts: Vec<Post>,
    sessions: Vec<Session>,
    /// Numbers of sessions, from 0, by their ids.
    by_id: HashMap<String, usize>,
    prefix: String,
    /// How many of each are remembered at least; all without it.
    keep: Option<usize>,
    /// How many of each are not remembered any more.
    forgotten_posts: usize,
    forgotten_sessions: usize,
    /// Where every session is written to as well.
    file: Option<File>,
    /// How many GETs were asked.
    pub gets: usize,
    /// GETs for a session that are yet to be throttled.
    throttled_gets: HashMap<String, usize>,
}

impl Log {
    /// A log that remembers the newest `keep` of each (all without it), and writes every session to a file.
    #[must_use]
    pub fn new(keep: Option<usize>, file: Option<File>) -> Self {
        Self { keep, file, ..Self::default() }
    }

    /// When the first POST came.
    #[must_use]
    pub fn began(&self) -> Option<Instant> {
        self.first
    }

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
        let number = self.by_id.get(id)?;
        self.sessions.get(number.checked_sub(self.forgotten_sessions)?)
    }

    /// Has a session be expired, or paid; whether there is one.
    pub fn set_status(&mut self, id: &str, status: &str) -> bool {
        let at = self.by_id.get(id).and_then(|number| number.checked_sub(self.forgotten_sessions));
        let session = at.and_then(|at| self.sessions.get_mut(at));
        session.map(|session| status.clone_into(&mut session.status)).is_some()
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
        format!("{}{:06}", self.prefix, self.forgotten_sessions + self.sessions.len())
    }

    pub(super) fn add_post(
        &mut self,
        request_id: &str,
        fault: Option<&Fault>,
        body: &[u8],
    ) -> usize {
        forget(&mut self.posts, self.keep, &mut self.forgotten_posts, |_| {});
        let number = self.forgotten_posts + self.posts.len();
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
        let at = number.checked_sub(self.forgotten_posts);
        if let Some(post) = at.and_then(|at| self.posts.get_mut(at)) {
            post.status = Some(status);
            post.session = session.map(str::to_owned);
        }
    }

    pub(super) fn add_session(&mut self, session: Session) -> Session {
        if let Some(file) = &mut self.file {
            let line = json!({"id": session.id, "request_id": session.request_id});
            // In one piece, so that a process that is killed leaves no part of it. Whoever asked for the file
            // reads it; what is missing in it is missed there.
            drop(file.write_all(format!("{line}\n").as_bytes()));
        }
        let by_id = &mut self.by_id;
        forget(&mut self.sessions, self.keep, &mut self.forgotten_sessions, |session| {
            by_id.remove(&session.id);
        });
        let number = self.forgotten_sessions + self.sessions.len();
        self.by_id.insert(session.id.clone(), number);
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
            "posts": self.forgotten_posts + self.posts.len(),
            "gets": self.gets,
            "sessions": self.forgotten_sessions + self.sessions.len(),
            "request_ids_with_sessions": per_request.len(),
            "extra_sessions": extra,
            "faults": faults,
        })
    }
}

/// Forgets the oldest, many at a time, where more than twice as many are there as are to be kept.
fn forget<T>(
    items: &mut Vec<T>,
    keep: Option<usize>,
    forgotten: &mut usize,
    mut each: impl FnMut(&T),
) {
    let Some(keep) = keep.filter(|keep| items.len() >= keep.saturating_mul(2).max(2)) else {
        return;
    };
    let old = items.len() - keep;
    items[..old].iter().for_each(&mut each);
    items.drain(..old);
    *forgotten += old;
}

fn lines<T: Serialize>(items: &[T]) -> String {
    let mut out = String::new();
    for item in items {
        let line = serde_json::to_string(item).unwrap_or_default();
        out.push_str(&line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_gone_on_with_on_a_line_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sessions");
        let line = "{\"id\":\"ch_1\"}\n";
        for (before, line_break) in
            [("", ""), (line, ""), ("{\"i", "\n"), ("{\"id\":\"a\"}\n{\"i", "\n")]
        {
            std::fs::write(&path, before).unwrap();
            open_file(&path).unwrap().write_all(line.as_bytes()).unwrap();
            let after = format!("{before}{line_break}{line}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
        for other in ["{\"precious\":1}\n", "id,name\n", "SQLite format 3\0"] {
            std::fs::write(&path, other).unwrap();
            assert!(open_file(&path).is_err(), "{other}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        }
    }

    #[test]
    fn a_log_that_keeps_few_forgets_the_oldest_and_counts_all() {
        let mut log = Log::new(Some(3), None);
        let mut ids = Vec::new();
        for number in 0..100 {
            let request_id = format!("r{number}");
            let post = log.add_post(&request_id, None, b"{}");
            let id = log.next_id();
            let session = Session {
                id: id.clone(),
                request_id,
                url: String::new(),
                request: Value::Null,
                status: "pending".to_owned(),
            };
            log.add_session(session);
            log.finish_post(post, 200, Some(&id));
            ids.push(id);
        }
        assert!(log.posts().len() <= 6 && log.sessions().len() <= 6);
        assert_eq!(log.posts().last().unwrap().session.as_ref(), ids.last());
        assert_eq!(log.session(&ids[99]).unwrap().request_id, "r99");
        assert!(log.session(&ids[0]).is_none());
        let counters = log.counters();
        assert_eq!((&counters["posts"], &counters["sessions"]), (&json!(100), &json!(100)));
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 100);
    }
}
