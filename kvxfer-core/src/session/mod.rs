//! The protocol as three state machines: [`Producer`], [`Consumer`] and [`Observer`].
//!
//! Each is fed what happened (a message, a finished copy, the passing of time) together with the
//! time, and keeps a queue of actions for whoever performs I/O. None blocks, reads a clock or
//! touches memory. A message that the protocol does not allow is an error of kind
//! [`ErrorKind::Protocol`](crate::ErrorKind::Protocol): the caller closes that link and nothing else changes.

mod consumer;
mod observer;
#[cfg(not(kvxfer_planted))]
mod planted;
#[cfg(kvxfer_planted)]
pub mod planted;
mod producer;
mod timers;

pub use consumer::{Consumer, ConsumerAction, ConsumerConfig, ConsumerStats, Copied, LoadRequest};
pub use observer::{Observer, ObserverAction};
pub use producer::{Producer, ProducerAction, ProducerConfig, ProducerStats, PushRange};

use crate::{Error, ErrorKind};

fn protocol(about: impl Into<String>) -> Error {
    ErrorKind::Protocol.error(about)
}
