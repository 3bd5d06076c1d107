//! The state machines, scripted: what goes in, and all that comes out, one line each (see `rig.rs`).

mod claims;
mod faults;
mod leave;
mod offers;
mod overdue;
mod probes;
mod producer;
mod retires;
mod rig;
mod schedulers;
