//! What needs a GPU, or the stand-in for its driver: see the `gpu-check` binary.

pub mod suite;
