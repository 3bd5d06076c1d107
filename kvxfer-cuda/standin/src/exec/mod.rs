//! Streams, events and what they run.
//!
//! * [`queue`]: the streams' queues, and what somebody waits for
//! * [`adversary`]: which of them runs next; [`run`]: the thread that does it
//! * [`work`], [`copies`], [`launch`]: what is run
//! * [`race`], [`clock`]: unordered accesses to the same bytes
//! * [`streams`], [`events`], [`capture`], [`transfers`], [`batch`], [`values`], [`modules`]: entry points

mod adversary;
pub(crate) mod batch;
pub(crate) mod capture;
mod clock;
mod copies;
pub(crate) mod events;
mod launch;
pub(crate) mod modules;
mod queue;
mod race;
mod run;
pub(crate) mod streams;
pub(crate) mod transfers;
pub(crate) mod values;
mod work;

pub(crate) use capture::may_wait;
pub(crate) use run::fail;
pub(crate) use streams::{enqueue_job, forget_device};
pub(crate) use work::permitted;
