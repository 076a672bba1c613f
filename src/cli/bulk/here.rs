//! The links, made in this process with a ledger of its own.

use std::cell::RefCell;
use std::path::Path;

use super::begin::{Begun, begin};
use super::guard::{all_made_here, not_made_here};
use super::open::opened;
use super::progress::Shown;
use super::summary::{ended, interrupted};
use super::{Arguments, sandbox};
use crate::bulk;
use crate::bulk::given::GivenLinks;
use crate::bulk::inside::Inside;
use crate::bulk::layout::EarlierLink;
use crate::bulk::output::Earlier;
use crate::cli::{Failure, Outcome};
use crate::config::check::Resolved;
use crate::job::CheckoutRequest;

pub(super) async fn run(settings: &Resolved, arguments: &Arguments, out: &Path) -> Outcome {
    let (input, bytes, mut earlier) = opened(settings, arguments, out)?;
    let Some(Begun { inside, stages, mut tasks, at_once }) = begin(settings, arguments).await?
    else {
        return Err(interrupted(0, out));
    };
    let given = tokio::select! {
        given = given_before(&inside, &mut earlier, settings, arguments, out) => given?,
        () = stages.soft.cancelled() => return Err(interrupted(0, out)),
    };
    let (given, broken) = (RefCell::new(given), RefCell::new(None));
    let fail = |error: anyhow::Error| {
        broken.borrow_mut().get_or_insert(error);
        stages.soft.cancel();
    };
    let prove = async |proof: bulk::Proof| {
        let last = proof.given.map(|given| {
            let request_id = given.request.request_id.as_str().to_owned();
            Ok(EarlierLink { request_id, checkout_id: given.checkout_id })
        });
        let cut_off = proof.cut_off.chain(last).inspect(|link| {
            if let Ok(EarlierLink { request_id, checkout_id }) = link {
                given.borrow_mut().note(request_id, checkout_id);
            }
        });
        let checked = tokio::select! {
            checked = all_made_here(&inside, cut_off, &settings.ledger, out) => checked,
            () = stages.soft.cancelled() => return false,
        };
        checked.map_err(&fail).is_ok()
    };
    let make = |_, request: CheckoutRequest| {
        let (inside, given, fail) = (&inside, &given, &fail);
        async move {
            let id = request.request_id.clone();
            // The ledger may have forgotten it since all were looked for.
            let only_known = given.borrow().has(id.as_str());
            let made = inside.make(request, only_known).await?;
            if only_known && !given.borrow().fits(id.as_str(), &made) {
                fail(not_made_here(id.as_str(), None, &settings.ledger, out));
                return None;
            }
            Some(made)
        }
    };
    let mut shown = Shown::new(bytes);
    let ran = bulk::run(input, earlier, at_once, prove, make, &stages.soft, |progress| {
        shown.tell(progress, inside.held().as_deref());
    });
    let ran = tokio::select! {
        ran = ran => ran,
        () = stages.hard.cancelled() => return Err(interrupted(0, out)),
    };
    shown.finish();
    tasks.shutdown().await;
    if let Some(fatal) = inside.engine.fatal() {
        return Err(Failure::Failed(fatal.into()));
    }
    let broken = broken.take();
    ended(&ran?, broken, arguments, out)
}

/// The links that the output had before, each of which this ledger has made.
async fn given_before(
    inside: &Inside,
    earlier: &mut Earlier,
    settings: &Resolved,
    arguments: &Arguments,
    out: &Path,
) -> anyhow::Result<GivenLinks> {
    if arguments.sandbox {
        earlier.rehearse();
    } else if sandbox::has_made_all(earlier.links_of_output(), out)? {
        earlier.let_output_go();
    }
    all_made_here(inside, earlier.links(), &settings.ledger, out).await?;
    Ok(GivenLinks::read(earlier.links())?)
}
