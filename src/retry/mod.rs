//! What may be tried again, when, and why not for ever.
//!
//! Pure: time and chance come in as arguments. There is one retry layer in this program, and
//! this is it: the HTTP client retries nothing by itself, and a job's attempts are counted in
//! the ledger, so that neither a restart nor a second copy of the job starts the count anew.

pub mod backoff;
pub mod pauses;
pub mod policy;

pub use self::backoff::Backoff;
pub use pauses::Pauses;
pub use policy::{Next, Policy};
