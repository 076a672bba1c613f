//! The words of this program: a job, what makes two jobs the same, and how a job can end.
//!
//! Nothing here does I/O or waits. A [`CheckoutRequest`] in hand is a valid one.

pub mod json;
pub mod key;
pub mod lane;
pub mod outcome;
pub mod printable;
pub mod reply;
pub mod request;
pub mod success_url;
mod wire;

pub use key::{Fingerprint, Key, LedgerSecret, Mode, RequestId};
pub use lane::Lane;
pub use outcome::{Ending, Problem, Status};
pub use printable::printable;
pub use request::{CheckoutRequest, Refusal, Rules};
