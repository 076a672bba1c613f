//! `bulk --sandbox`: a double of Creem in this process, and a ledger of its own beside the output.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio_util::task::AbortOnDropHandle;

use super::Arguments;
use crate::bulk::layout::EarlierLink;
use crate::bulk::output::{EarlierLinks, OutputError};
use crate::cli::{Failure, settings_without_key};
use crate::config::check::{Ledger, NO_KEY, Resolved};
use crate::config::{self, Problem};
use crate::job::{Key, Mode, RequestId};
use crate::ledger::sqlite::inspect::Inspector;
use crate::simulator::{Options, Simulator};

/// What the names of their ledgers end in.
const ENDS: &str = ".sandbox-ledger.db";
/// How many sessions it remembers.
const KEEPS: usize = 1_024;

/// A double of Creem in this process.
pub(super) struct Sandbox {
    url: String,
    _serving: AbortOnDropHandle<()>,
}

impl Sandbox {
    pub(super) async fn start(arguments: &Arguments) -> Result<Self, Failure> {
        let options = Options {
            keep: Some(KEEPS),
            sessions_file: arguments.sandbox_log.clone(),
            ..Options::default()
        };
        let anywhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let started = Simulator::start(anywhere, options).await;
        let (simulator, serve) = started.context("the sandbox cannot be started")?;
        #[expect(clippy::disallowed_methods, reason = "it ends with its handle")]
        let serving = AbortOnDropHandle::new(tokio::spawn(serve));
        Ok(Self { url: simulator.url(), _serving: serving })
    }

    /// The settings, but for whatever leads to a real Creem or a real ledger.
    pub(super) fn settings(&self, file: Option<&Path>, out: &Path) -> Result<Resolved, Failure> {
        let mut settings = settings_without_key(file)?;
        settings.creem.api_key = Some("creem_test_sandbox".to_owned().into());
        settings.creem.base_url = Some(self.url.clone());
        settings.creem.proxy = None;
        settings.creem.ca_file = None;
        settings.creem.checkout_hosts.clear();
        settings.ledger.url = "sqlite:sandbox".to_owned().into();
        let mut resolved = config::resolve(&settings).map_err(Failure::Configuration)?;
        // Not by way of a text, which some names are no part of.
        resolved.ledger = Ledger::File(ledger_beside(out));
        Ok(resolved)
    }
}

/// Whoever only wants to see it needs no key.
pub(super) fn offer(failure: Failure) -> Failure {
    match failure {
        Failure::Configuration(mut problems)
            if problems.iter().any(|problem| problem.is(NO_KEY)) =>
        {
            let text = "to try it without a key and without Creem";
            let fix = "add --sandbox to the same command: its links lead nowhere";
            problems.push(Problem::new(text.to_owned(), fix));
            Failure::Configuration(problems)
        }
        other @ (Failure::Failed(_) | Failure::Usage(_) | Failure::Configuration(_)) => other,
    }
}

/// Whether the sandbox that writes that output has made all of these links.
///
/// # Errors
/// If the links cannot be read.
pub(super) fn has_made_all(links: EarlierLinks, out: &Path) -> Result<bool, OutputError> {
    let Ok(ledger) = Inspector::open(&ledger_beside(out)) else { return Ok(false) };
    for link in links {
        let EarlierLink { request_id, checkout_id } = link?;
        let Ok(request_id) = RequestId::parse(&request_id) else { return Ok(false) };
        let key = Key { mode: Mode::Test, request_id };
        let made = ledger.row(&key).ok().flatten().and_then(|row| row.checkout_id);
        if made != Some(checkout_id) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Refuses a sandbox's ledger where links are to be real.
pub(in crate::cli) fn refuse_its_ledger(ledger: &Ledger) -> Result<(), Failure> {
    let Ledger::File(path) = ledger else { return Ok(()) };
    // By whichever name.
    let file = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    if !file.as_os_str().as_encoded_bytes().ends_with(ENDS.as_bytes()) {
        return Ok(());
    }
    Err(Failure::Configuration(vec![Problem::new(
        format!(
            "`ledger.url`: {} is the ledger of a sandbox, whose links lead nowhere",
            path.display()
        ),
        "name another file, or unset LEDGER_URL",
    )]))
}

pub(super) fn ledger_beside(out: &Path) -> PathBuf {
    let mut ledger = out.as_os_str().to_owned();
    ledger.push(ENDS);
    ledger.into()
}
