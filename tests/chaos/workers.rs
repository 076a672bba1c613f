//! The workers, as processes that a run may kill.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use super::traffic::PREFIX;

/// What `creem.request_timeout` is; a lease is 15 s longer.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// What a lease lasts.
pub(crate) const LEASE: Duration = Duration::from_secs(17);

/// Where a worker finds everything.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) amqp: String,
    pub(crate) creem: String,
    pub(crate) ledger: String,
    /// For its log.
    pub(crate) directory: PathBuf,
}

/// A worker, started again and again.
pub(crate) struct Worker {
    setting: Setting,
    log: PathBuf,
    child: Child,
}

impl Worker {
    /// A first start, with a ledger that is known to be new: whoever dies before it has served for a
    /// minute would otherwise make others suspect that an older ledger was lost.
    pub(crate) fn start(setting: Setting, name: &str) -> Self {
        let log = setting.directory.join(format!("{name}.log"));
        let child = spawn(&setting, &log, &["run", "--accept-empty-ledger"]);
        Self { setting, log, child }
    }

    /// A worker that ends by itself is an error.
    pub(crate) fn must_be_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("a worker ended by itself ({status}); see {}", self.log.display());
        }
    }

    /// kill -9, and another one in its place.
    pub(crate) async fn kill_and_start(&mut self) {
        self.must_be_alive();
        self.child.kill().await.unwrap();
        self.child = spawn(&self.setting, &self.log, &["run"]);
    }

    /// Stops it as a user would.
    pub(crate) async fn stop(mut self) {
        self.must_be_alive();
        self.signal("TERM");
        let status = tokio::time::timeout(Duration::from_secs(40), self.child.wait()).await;
        let status =
            status.unwrap_or_else(|_| panic!("a worker does not stop; see {}", self.log.display()));
        assert!(status.unwrap().success(), "a worker's end; see {}", self.log.display());
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.unwrap().success());
    }
}

fn spawn(setting: &Setting, log: &Path, arguments: &[&str]) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    let timeout = format!("{}ms", REQUEST_TIMEOUT.as_millis());
    Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
        .args(arguments)
        .env_clear()
        .env("AMQP_URL", &setting.amqp)
        .env("CREEM_API_KEY", "creem_test_chaos")
        .env("CREEM_BASE_URL", &setting.creem)
        .env("LEDGER_URL", &setting.ledger)
        .env("CHECKOUT_WORKER__TOPOLOGY__PREFIX", PREFIX)
        .env("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0")
        .env("CHECKOUT_WORKER__CREEM__REQUEST_TIMEOUT", timeout)
        .env("CHECKOUT_WORKER__RETRY__LONGEST", "4s")
        .env("CHECKOUT_WORKER__AMQP__HEARTBEAT", "5s")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}
