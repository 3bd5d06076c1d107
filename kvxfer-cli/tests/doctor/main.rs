//! `kvxfer doctor`: on machines that are folders, with real agents as peers, and on the stand-in for the CUDA driver.

mod checks;
mod fake;
mod gpus;
mod pairs;
mod program;
mod reports;
