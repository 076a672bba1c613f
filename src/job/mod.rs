//! The words of this program: a job, what makes two jobs the same, and how a job can end.
//!
//! Nothing here does I/O or waits. A [`Job`] in hand is a valid job.

pub mod json;
pub mod key;
pub mod lane;
pub mod outcome;
pub mod reply;
pub mod request;
pub mod success_url;

pub use key::{Fingerprint, FingerprintKey, Key, Mode, RequestId};
pub use lane::Lane;
pub use outcome::{Ending, Problem, Status};
pub use request::{CheckoutRequest, Refusal, Rules};
