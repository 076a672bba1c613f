//! What `bulk` is told, and what of it makes other links of the same rows.

use std::path::PathBuf;

use crate::bulk::columns::Defaults;
use crate::bulk::input::Wishes;
use crate::cli::Failure;
use crate::cli::look::shown;
use crate::config::check::Resolved;
use crate::job::reply::digest;
use crate::job::{Lane, printable};

/// Make a file of jobs into a file of links.
///
/// Reads a table (CSV with `,`, `;` or tabs, as spreadsheets save it as "CSV UTF-8") or NDJSON, and
/// writes a table of links in the same order. A column that is called like a field of a job is that
/// field (`product_id`, `customer.email`, `metadata.KEY`); all others are carried through. Interrupted,
/// it goes on where it was when it is started again.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct Arguments {
    /// The jobs, or with --verify an earlier output; `-` is standard input.
    pub(super) file: PathBuf,
    /// The links. While it grows it is called OUT.part.
    #[arg(long, value_name = "OUT", required_unless_present = "dry_run")]
    pub(super) out: Option<PathBuf>,
    /// The product of rows that name none.
    #[arg(long, value_name = "PRODUCT_ID")]
    pub(super) product: Option<String>,
    /// The discount code of rows without one.
    #[arg(long)]
    pub(super) discount_code: Option<String>,
    /// Where buyers are sent who have paid, where the row does not say.
    #[arg(long)]
    pub(super) success_url: Option<String>,
    /// Metadata of every row, as often as needed; a row's own wins.
    #[arg(long, value_name = "KEY=VALUE", value_parser = crate::cli::enqueue::pair)]
    pub(super) metadata: Vec<(String, String)>,
    /// Comes before each row's `request_id`, or before one that follows from its cells where it has none: the same row
    /// under the same prefix has the same link. Ends with `-`, `_`, `.` or `:`.
    #[arg(long, value_name = "PREFIX", value_parser = prefix)]
    pub(super) request_id_prefix: Option<String>,
    /// The campaign that the rows belong to, at most 64 characters.
    #[arg(long, value_name = "NAME", value_parser = crate::cli::campaign)]
    pub(super) campaign: Option<String>,
    /// A column that is only carried through though it looks like a field, as often as needed.
    #[arg(long, value_name = "COLUMN")]
    pub(super) carry: Vec<String>,
    /// Only say what is wrong with the rows, each with its line and column.
    #[arg(long, conflicts_with = "sandbox")]
    pub(super) dry_run: bool,
    /// Let workers make the links: send the rows to the bulk lane, and collect the replies. Needs the broker
    /// and no key.
    #[arg(long, conflicts_with_all = ["dry_run", "sandbox", "verify"])]
    pub(super) via_queue: bool,
    /// FILE is an output of an earlier run: ask Creem what has become of each of its links, and write them
    /// to --out with the columns `link` (open, processing, paid, expired, gone or unknown) and `checked_at`.
    #[arg(long, conflicts_with_all = ["dry_run", "sandbox"])]
    pub(super) verify: bool,
    /// Make new links for those that are expired or gone, under a `request_id` of their own (`x.r1` for
    /// `x`), from the line itself and the same flags as before.
    #[arg(long, requires = "verify", conflicts_with = "dry_run")]
    pub(super) refresh: bool,
    /// Play it through: a built-in double of Creem, no key, no network, and a ledger of its own
    /// beside the output.
    #[arg(long)]
    pub(super) sandbox: bool,
    /// A file that gets a JSON line of every session that the sandbox makes.
    #[arg(long, value_name = "FILE", requires = "sandbox", conflicts_with = "dry_run")]
    pub(super) sandbox_log: Option<PathBuf>,
}

impl Arguments {
    /// What clap cannot tell.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let keys = || self.metadata.iter().map(|(key, _)| key);
        if let Some(twice) =
            keys().enumerate().find(|(at, key)| keys().take(*at).any(|k| k == *key))
        {
            let text =
                format!("--metadata gives {} twice: give each key once", printable(twice.1, 64));
            return Err(Failure::Usage(text));
        }
        if !self.dry_run && self.out.as_deref().is_some_and(|out| out.as_os_str() == "-") {
            let text =
                "--out takes the name of a file, as a run that is interrupted goes on with it";
            return Err(Failure::Usage(text.to_owned()));
        }
        Ok(())
    }

    /// What other links of the same rows would be made with.
    pub(super) fn made_with(&self, settings: &Resolved) -> String {
        let mut parts = if self.via_queue {
            // Workers have key and ledger.
            vec![format!("queue {}", settings.topology.jobs(Lane::Bulk))]
        } else {
            vec![
                format!("mode {}", settings.creem.mode),
                format!("ledger {}", shown(&settings.ledger)),
                format!("sandbox {}", self.sandbox),
            ]
        };
        let flags = [
            ("product", &self.product),
            ("discount_code", &self.discount_code),
            ("success_url", &self.success_url),
            ("request_id_prefix", &self.request_id_prefix),
            ("campaign", &self.campaign),
        ];
        let given = flags.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
        parts.extend(given.map(|(name, value)| format!("{name} {value}")));
        parts.extend(self.carry.iter().map(|column| format!("carry {column}")));
        parts.extend(self.metadata.iter().map(|(key, value)| format!("metadata {key}={value}")));
        let parts: Vec<&[u8]> = parts.iter().map(String::as_bytes).collect();
        format!("{}\n", digest(&parts))
    }

    pub(super) fn wishes(&self, settings: &Resolved) -> Wishes {
        let (defaults, carry) = (self.defaults(), self.carry.clone());
        Wishes { defaults, carry, rules: settings.job.clone() }
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            product_id: self.product.clone(),
            discount_code: self.discount_code.clone(),
            success_url: self.success_url.clone(),
            metadata: self.metadata.clone(),
            request_id_prefix: self.request_id_prefix.clone(),
        }
    }
}

fn prefix(text: &str) -> Result<String, String> {
    let name = text.trim_end_matches(['-', '_', '.', ':', ' ']);
    if name.is_empty() {
        return Err("give a name that ends with -: autumn-".to_owned());
    }
    if text.ends_with(['-', '_', '.', ':']) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "end it with - (or _ . :), or {name}1 and an id of 2 would come to the same as {name} and one of 12: {name}-"
    ))
}
