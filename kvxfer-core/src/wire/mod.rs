//! Frames and messages.

pub mod message;

pub use message::{Hello, Message, Purpose};
