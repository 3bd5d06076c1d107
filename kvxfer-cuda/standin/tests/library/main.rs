//! The built library as a process sees it that loads it. The configuration is read once, so each test
//! runs in a process of its own: see `play`.

mod devices;
mod faults;
mod harness;
mod memory;
mod sharing;
mod vmm;
