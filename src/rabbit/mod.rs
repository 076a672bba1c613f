//! RabbitMQ: the one door to lapin. Nothing outside this folder names it.
//!
//! lapin's automatic recovery is off: in 4.12 it can leave a consumer silent for ever without an
//! error. Without it every failure arrives as an error at once; `publisher` rebuilds its connection
//! for ever, with jitter, and `worker::sessions` opens one consuming session after another.

pub mod compare;
pub mod consumer;
pub mod envelope;
pub mod headers;
pub mod hop;
pub mod link;
pub mod outgoing;
pub mod publisher;
pub mod replies;
pub mod topology;

pub use consumer::{Delivery, Session};
pub use envelope::Envelope;
pub use link::{LinkError, Options};
pub use outgoing::Message;
pub use publisher::{Lost, Published, Publisher};
pub use topology::Topology;
