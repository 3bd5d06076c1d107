//! What a message may hold. All limits of the protocol are here.
//!
//! Lists and strings end at a constant, so what a session keeps for one message is bounded, and numbers
//! that only make sense together do. The largest message within the bounds fits into a frame.

pub use crate::layout::MAX_STRING;
use crate::layout::{KvLayout, MAX_LAYERS};
use crate::path::{Ability, Refusal};
use crate::wire::message::{Chunk, ClaimStatus, Granted, Hello, Message};
use crate::{Error, ErrorKind};

/// Longest body of a frame, in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// Longest body of a frame until the hellos have passed, in bytes.
pub const MAX_HELLO: usize = 1 << 10;
/// Longest path in a hello, in bytes.
pub const MAX_PATH: usize = 512;
/// Longest name in a hello, in bytes.
pub const MAX_NAME: usize = 256;
/// Most chunks in an offer or claim, indices into them, or grants in a renewal.
pub const MAX_CHUNKS: usize = 16 << 10;
/// Most grants in one message that gives them.
pub const MAX_GRANTS: usize = 4 << 10;
/// Most extents in such a message, over all its grants.
pub const MAX_EXTENTS: usize = 32 << 10;
/// Longest name of a transport, in bytes.
pub const MAX_TRANSPORT: usize = 64;
/// Longest description of a segment by its transport, in bytes.
pub const MAX_BLOB: usize = 64 << 10;
/// Most paths that a side speaks of.
pub const MAX_PATHS: usize = 16;
/// Longest description of a side by a transport, in bytes.
pub const MAX_ABILITY: usize = 4 << 10;

/// A text cut to what a message may hold, for reasons that quote something of unknown length.
pub fn reason(text: impl Into<String>) -> String {
    let mut text = text.into();
    text.truncate(text.floor_char_boundary(MAX_STRING));
    text
}

/// Checks a hello.
///
/// # Errors
/// [`ErrorKind::Protocol`], naming the field and its length.
pub fn check_hello(hello: &Hello) -> Result<(), Error> {
    at_most("unix_path", hello.unix_path.as_ref().map_or(0, String::len), MAX_PATH)?;
    at_most("name", hello.name.len(), MAX_NAME)
}

/// Checks a message.
///
/// # Errors
/// [`ErrorKind::Protocol`], naming the field and its value.
pub fn check(message: &Message) -> Result<(), Error> {
    match message {
        Message::Bye { reason, .. } => text("reason", reason),
        Message::Attach { layout, paths, .. } => {
            check_layout(layout)?;
            check_abilities(paths)
        }
        Message::Examine { paths, .. } => check_abilities(paths),
        Message::Attached { path, refused } => {
            at_most("path", path.len(), MAX_TRANSPORT)?;
            check_refusals(refused)
        }
        Message::Examined { path, refused } => {
            at_most("path", path.as_ref().map_or(0, String::len), MAX_TRANSPORT)?;
            check_refusals(refused)
        }
        Message::Offer { request, chunks, .. } | Message::Claim { request, chunks, .. } => {
            text("request", request)?;
            check_chunks(chunks)
        }
        Message::Withdraw { chunks, .. }
        | Message::Have { chunks, .. }
        | Message::Pending { chunks, .. }
        | Message::Pushed { chunks, .. } => at_most("chunks", chunks.len(), MAX_CHUNKS),
        Message::Refused { chunks, reason, .. } => {
            at_most("chunks", chunks.len(), MAX_CHUNKS)?;
            text("reason", reason)
        }
        Message::Commit { sums, .. } => at_most("sums", sums.len(), MAX_LAYERS),
        Message::Renew { grants } => at_most("grants", grants.len(), MAX_CHUNKS),
        Message::Granted { grants, .. } => check_grants(grants),
        Message::Segment { transport, blob, .. } => {
            at_most("transport", transport.len(), MAX_TRANSPORT)?;
            at_most("blob", blob.len(), MAX_BLOB)
        }
        Message::Claimed { status: ClaimStatus { ready, coming, .. }, .. } if ready > coming => {
            refuse(format!("claim with {ready} chunks ready of {coming}"))
        }
        Message::Release { keep_from, keep_to, .. } if keep_from > keep_to => {
            refuse(format!("release that keeps chunks {keep_from} to {keep_to}"))
        }
        Message::Ping
        | Message::Abort { .. }
        | Message::FenceAck { .. }
        | Message::Told { .. }
        | Message::Retired { .. }
        | Message::Probed { .. }
        | Message::Retire { .. }
        | Message::Busy { .. }
        | Message::CommitAck { .. }
        | Message::Revoke { .. }
        | Message::Ask { .. }
        | Message::Claimed { .. }
        | Message::Release { .. }
        | Message::Ended { .. } => Ok(()),
    }
}

fn check_layout(layout: &KvLayout) -> Result<(), Error> {
    layout.validate().or_else(|error| refuse(error.to_string()))
}

fn check_abilities(abilities: &[Ability]) -> Result<(), Error> {
    at_most("paths", abilities.len(), MAX_PATHS)?;
    abilities.iter().try_for_each(|ability| {
        at_most("path", ability.path.len(), MAX_TRANSPORT)?;
        match &ability.able {
            Ok(blob) => at_most("blob", blob.len(), MAX_ABILITY),
            Err(why) => text("why", why),
        }
    })
}

fn check_refusals(refused: &[Refusal]) -> Result<(), Error> {
    at_most("refused", refused.len(), MAX_PATHS)?;
    refused.iter().try_for_each(|refusal| {
        at_most("path", refusal.path.len(), MAX_TRANSPORT)?;
        text("why", &refusal.why)
    })
}

fn check_chunks(chunks: &[Chunk]) -> Result<(), Error> {
    at_most("chunks", chunks.len(), MAX_CHUNKS)?;
    match chunks.iter().position(|chunk| chunk.tokens == 0) {
        Some(i) => refuse(format!("chunk {i} of 0 tokens")),
        None => Ok(()),
    }
}

fn check_grants(grants: &[Granted]) -> Result<(), Error> {
    at_most("grants", grants.len(), MAX_GRANTS)?;
    at_most("extents", grants.iter().map(|grant| grant.extents.len()).sum(), MAX_EXTENTS)?;
    for extent in grants.iter().flat_map(|grant| &grant.extents) {
        if extent.pages == 0 || extent.page.checked_add(u32::from(extent.pages)).is_none() {
            return refuse(format!("extent of {} pages from {} on", extent.pages, extent.page));
        }
    }
    Ok(())
}

fn text(what: &str, text: &str) -> Result<(), Error> {
    at_most(what, text.len(), MAX_STRING)
}

fn at_most(what: &str, found: usize, most: usize) -> Result<(), Error> {
    if found <= most {
        Ok(())
    } else {
        refuse(format!("{what} of length {found}, at most {most} allowed"))
    }
}

fn refuse(about: String) -> Result<(), Error> {
    Err(ErrorKind::Protocol.error(about))
}
