//! No link is made a second time over one that another ledger has made.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use futures::TryStreamExt as _;

use crate::bulk::inside::Inside;
use crate::bulk::layout::EarlierLink;
use crate::bulk::output::{OutputError, before_of, part_of};
use crate::cli::look::shown;
use crate::config::check::Ledger;
use crate::job::printable;

/// Links of an earlier output that the ledger is asked about at once.
const LINKS_AT_ONCE: usize = 256;

/// Refuses to write over links that this ledger has not made: it would make them a second time.
pub(super) async fn all_made_here(
    inside: &Inside,
    links: impl Iterator<Item = Result<EarlierLink, OutputError>>,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Result<()> {
    let links = futures::stream::iter(links).map_err(anyhow::Error::from);
    let checked = links.map_ok(async |link| made_here(inside, &link, ledger, out).await);
    checked.try_buffered(LINKS_AT_ONCE).try_collect().await
}

async fn made_here(
    inside: &Inside,
    link: &EarlierLink,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Result<()> {
    let EarlierLink { request_id, checkout_id } = link;
    if inside.has_made(request_id, checkout_id).await.with_context(|| shown(ledger))? {
        return Ok(());
    }
    Err(not_made_here(request_id, Some(checkout_id), ledger, out))
}

pub(super) fn not_made_here(
    request_id: &str,
    checkout_id: Option<&str>,
    ledger: &Ledger,
    out: &Path,
) -> anyhow::Error {
    let advice = "Give the ledger that made them (LEDGER_URL)";
    made_elsewhere(request_id, checkout_id, out, &format!("the ledger {}", shown(ledger)), advice)
}

/// Why links are not written over that another ledger has made.
pub(super) fn made_elsewhere(
    request_id: &str,
    checkout_id: Option<&str>,
    out: &Path,
    ledger: &str,
    advice: &str,
) -> anyhow::Error {
    let session = checkout_id.map_or(String::new(), |id| format!(" ({})", printable(id, 128)));
    let files = [out.to_owned(), before_of(out)];
    let file = files.into_iter().find(|file| file.exists()).unwrap_or_else(|| part_of(out));
    anyhow!(
        "{} has a link for {}{session} that {ledger} has not made: its links are of another ledger, key or mode, of a sandbox, or older than ledger.retention, and would be made a second time. {advice}; take rows with older links out of the input, as another --out knows nothing of them; or remove the file if nobody was given its links",
        file.display(),
        printable(request_id, 128),
    )
}
