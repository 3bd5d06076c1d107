//! Device memory, and the host memory that devices may touch.

pub(crate) mod attributes;
pub(crate) mod host;
pub(crate) mod ipc;
mod ledger;
mod name;
mod physical;
pub(crate) mod plain;
mod space;
pub(crate) mod vmm;

pub(crate) use space::{Stamp, is_pageable, now, resolve};
