//! What the benchmarks share. Run them with `make bench`.
//!
//! * `benches/micro.rs`: single parts, measured by criterion.
//! * `benches/transfer.rs`: bytes between two processes, beside what this machine's memory can do at that very moment.
//! * `benches/gpu.rs`: copies on a GPU, by `make bench-gpu`; `make gpu-check` measures them beside a plain copy.
//!
//! The rules: memory is touched before, threads are pinned, block tables are scattered by a seeded generator, ways to do
//! the same take turns, and what is compared are medians of ratios of neighbours in time. Data is verified in a first
//! and in a last pass, which are not timed.

pub mod child;
pub mod churn;
pub mod copies;
pub mod gpu;
pub mod handover;
pub mod machine;
pub mod network;
pub mod random;
pub mod report;
pub mod stats;
pub mod transfer;

/// Any error, to be printed.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
