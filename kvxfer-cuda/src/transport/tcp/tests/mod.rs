//! What the conformance suite can't ask: it knows no bytes on the wire, and no writer that means ill.

mod bench;
mod format;
mod leave;
mod openings;
mod pieces;
mod sending;
