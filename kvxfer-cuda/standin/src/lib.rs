//! A driver for tests: see `README.md`.
//!
//! Each entry point of the driver is one item of an [`abi::entries!`] block, under its real name. No
//! panic leaves them, and faults are injected before them.

#[macro_use]
mod abi;

mod config;
mod contexts;
mod devices;
mod errors;
mod exec;
mod faults;
mod memory;
mod report;
mod state;
mod symbols;
