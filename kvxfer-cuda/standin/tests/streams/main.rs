//! Streams of the stand-in: what is ordered works under every seed, and each way to forget an order
//! is caught. The bugs are planted here, in the caller.

#![expect(unreachable_pub, reason = "a test has no users")]

#[macro_use]
mod harness;
mod capture;
mod events;
mod kernels;
mod life;
mod planted;
mod races;
