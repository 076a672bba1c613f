//! A ledger on a test's bench, whichever back-end it has.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::clock::{Clock as _, ManualClock, SharedClock};
use creem_checkout_worker::job::json::Node;
use creem_checkout_worker::job::{Ending, Fingerprint, Lane, LedgerSecret, Mode};
use creem_checkout_worker::ledger::postgres::{self, PostgresLedger};
use creem_checkout_worker::ledger::sqlite::SqliteLedger;
use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::ledger::*;
use tempfile::TempDir;

use super::key;
use crate::support::postgres::database;

pub(super) const START: i64 = 1_795_370_400_000;

/// Which back-end a test meets.
pub(super) enum Backend {
    Sqlite,
    /// The URL of a server.
    Postgres(String),
}

impl Backend {
    async fn place(&self) -> Place {
        match self {
            Self::Sqlite => Place::File(TempDir::new().unwrap()),
            Self::Postgres(server) => Place::Database(database(server).await),
        }
    }
}

enum Place {
    File(TempDir),
    /// The URL of a database of the test's own.
    Database(String),
}

async fn inspector(url: &str) -> postgres::inspect::Inspector {
    let options = postgres::Options { url: url.to_owned().into(), ca_pem: None };
    postgres::inspect::Inspector::open(&options).await.unwrap()
}

/// A ledger under test that can be closed and opened again, as a new process would.
pub(super) struct Bench {
    place: Place,
    pub(super) clock: Arc<ManualClock>,
    pub(super) ledger: Option<Arc<dyn Ledger>>,
    on_unknown: OnUnknown,
}

impl Bench {
    pub(super) async fn new(backend: &Backend, on_unknown: OnUnknown) -> Self {
        let mut bench = Self {
            place: backend.place().await,
            clock: Arc::new(ManualClock::at(START)),
            ledger: None,
            on_unknown,
        };
        bench.reopen().await;
        bench
    }

    /// Where the embedded ledger is.
    pub(super) fn path(&self) -> PathBuf {
        let Place::File(directory) = &self.place else { panic!("not a file") };
        directory.path().join("ledger.db")
    }

    /// Where the shared ledger is.
    pub(super) fn url(&self) -> &str {
        let Place::Database(url) = &self.place else { panic!("not a database") };
        url
    }

    /// Closes the ledger and opens it again, as the next process would.
    pub(super) async fn reopen(&mut self) {
        self.ledger = None;
        self.ledger = Some(self.another().await);
    }

    /// Another process on the same shared ledger, or the only one on an embedded ledger.
    pub(super) async fn another(&self) -> Arc<dyn Ledger> {
        let clock: SharedClock = self.clock.clone();
        match &self.place {
            Place::File(_) => Arc::new(SqliteLedger::open(&self.path(), clock, |_| {}).unwrap()),
            Place::Database(url) => {
                let options = postgres::Options { url: url.clone().into(), ca_pem: None };
                let time = postgres::Time::Given(clock);
                Arc::new(PostgresLedger::open(&options, time, |_| {}).await.unwrap())
            }
        }
    }

    /// The process dies, and another one comes; a shared ledger learns of it when the lease is over.
    pub(super) async fn die(&mut self) {
        self.reopen().await;
        if matches!(self.place, Place::Database(_)) {
            self.clock.advance(Duration::from_secs(26));
        }
    }

    pub(super) async fn look(&self, id: &str) -> Option<Row> {
        match &self.place {
            Place::File(_) => Inspector::open(&self.path()).unwrap().row(&key(id)).unwrap(),
            Place::Database(url) => inspector(url).await.row(&key(id)).await.unwrap(),
        }
    }

    pub(super) async fn row(&self, id: &str) -> Row {
        self.look(id).await.expect("the ledger has a row")
    }

    pub(super) async fn orphans(&self, id: &str) -> Vec<KnownOrphan> {
        match &self.place {
            Place::File(_) => Inspector::open(&self.path()).unwrap().orphans(&key(id)).unwrap(),
            Place::Database(url) => inspector(url).await.orphans(&key(id)).await.unwrap(),
        }
    }

    pub(super) fn ledger(&self) -> &Arc<dyn Ledger> {
        self.ledger.as_ref().unwrap()
    }

    /// Removes what ended before that, as a worker does that keeps outcomes of test jobs for so long.
    pub(super) async fn sweep(&self, before: i64) -> usize {
        let keep = self.clock.now() - before;
        self.ledger().sweep(Retention { mode: Mode::Test, keep }).await.unwrap()
    }

    pub(super) fn claimant(&self, id: &str, units: u32) -> Claimant {
        claimant(&self.ledger().identity().secret, id, units, self.clock.now(), self.on_unknown)
    }

    pub(super) fn request(claimant: Claimant) -> ClaimRequest {
        ClaimRequest { claimant, token: token(), lease: Duration::from_secs(25), max_attempts: 8 }
    }

    pub(super) async fn claim(&self, id: &str) -> Claim {
        self.claim_as(self.claimant(id, 1)).await
    }

    pub(super) async fn claim_as(&self, claimant: Claimant) -> Claim {
        self.ledger().claim(Self::request(claimant)).await.unwrap()
    }

    pub(super) async fn lease(&self, id: &str) -> Lease {
        let claim = self.claim(id).await;
        let Claim::Granted(lease) = claim else { panic!("{claim:?}") };
        lease
    }

    pub(super) async fn settle(
        &self,
        id: &str,
        lease: Lease,
        attempt: Attempt,
        next: Next,
    ) -> Settle {
        let request =
            SettleRequest { key: key(id), lease, attempt, next, on_unknown: self.on_unknown };
        self.ledger().settle(request).await.unwrap()
    }

    pub(super) async fn end(&self, id: &str, ending: Ending) -> Stored {
        let lease = self.lease(id).await;
        let settle = self.settle(id, lease, Attempt::Counted, Next::End(ending)).await;
        let Settle::Ended(stored) = settle else { panic!("{settle:?}") };
        stored
    }

    pub(super) async fn close(&self, id: &str, ending: Ending) -> Claim {
        let request = CloseRequest { claimant: self.claimant(id, 1), ending };
        self.ledger().close(request).await.unwrap()
    }

    pub(super) fn later(&self) {
        self.clock.advance(Duration::from_secs(1));
    }
}

/// A copy of a job, picked up now.
pub(super) fn claimant(
    secret: &LedgerSecret,
    id: &str,
    units: u32,
    now: i64,
    on_unknown: OnUnknown,
) -> Claimant {
    let node = Node::parse(&format!(r#"{{"request_id":"{id}","units":{units}}}"#)).unwrap();
    Claimant {
        key: key(id),
        fingerprint: Fingerprint::of(node.as_object().unwrap(), secret),
        product_id: "prod_1".into(),
        lane: Lane::Interactive,
        campaign: None,
        published_at: None,
        picked_up_at: now,
        redelivered: false,
        elsewhere: false,
        on_unknown,
    }
}
