//! The protocol as three state machines.
