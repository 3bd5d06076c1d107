//! The bytes on a data connection; [`super`] has the tables.

use kvxfer_core::{Error, ErrorKind, GrantId, Incarnation, PostId, Result, SegmentId};

/// What each side says first.
pub(super) const MAGIC: [u8; 8] = *b"KVXDATA\n";
/// Of what follows; below 256.
pub(super) const VERSION: u8 = 1;

/// A secret that opens one connection.
pub(super) type Token = [u8; 16];

/// Whether two secrets are the same, in a time that does not tell how much of them is.
pub(super) fn same(a: &Token, b: &Token) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b))) == 0
}

/// The most spans of a frame; a post with more is sent as several.
pub(super) const SPANS: usize = 256;

const LAST: u32 = 1;
const GRANTED: u32 = 2;

/// The dialler's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) stream: u32,
    pub(super) token: Token,
    pub(super) writer: Incarnation,
}

/// The answer to an opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) stream: u32,
    pub(super) owner: Incarnation,
}

/// The beginning of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) post: PostId,
    pub(super) grant: Option<GrantId>,
    /// Of all spans.
    pub(super) bytes: u64,
    /// From 1 to [`SPANS`].
    pub(super) spans: u32,
    /// Whether the post ends with this frame.
    pub(super) last: bool,
}

/// Where some of a frame's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) segment: SegmentId,
    /// Which of the memories that were behind the segment.
    pub(super) generation: u32,
    pub(super) offset: u64,
    /// At least 1.
    pub(super) len: u64,
}

/// The target's answer to a post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    pub(super) post: PostId,
    /// `false`: the memory behind a segment had been replaced, and bytes for the old one were dropped.
    pub(super) stored: bool,
}

impl Opening {
    pub(super) const BYTES: usize = 48;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        concat([
            &MAGIC,
            &u32::from(VERSION).to_le_bytes(),
            &self.stream.to_le_bytes(),
            &self.token,
            &self.writer.0,
        ])
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut fields = Fields(bytes);
        greeting(&mut fields)?;
        let stream = fields.u32()?;
        Ok(Self { stream, token: fields.take()?, writer: Incarnation(fields.take()?) })
    }
}

impl Answer {
    pub(super) const BYTES: usize = 32;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        concat([
            &MAGIC,
            &u32::from(VERSION).to_le_bytes(),
            &self.stream.to_le_bytes(),
            &self.owner.0,
        ])
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut fields = Fields(bytes);
        greeting(&mut fields)?;
        Ok(Self { stream: fields.u32()?, owner: Incarnation(fields.take()?) })
    }
}

impl Head {
    pub(super) const BYTES: usize = 32;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut flags = if self.last { LAST } else { 0 };
        flags |= if self.grant.is_some() { GRANTED } else { 0 };
        concat([
            &self.post.0.to_le_bytes(),
            &self.grant.map_or(0, |grant| grant.0).to_le_bytes(),
            &self.bytes.to_le_bytes(),
            &self.spans.to_le_bytes(),
            &flags.to_le_bytes(),
        ])
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut fields = Fields(bytes);
        let (post, grant, bytes) = (PostId(fields.u64()?), fields.u64()?, fields.u64()?);
        let (spans, flags) = (fields.u32()?, fields.u32()?);
        let grant = match (flags & GRANTED != 0, grant) {
            (true, grant) => Some(GrantId(grant)),
            (false, 0) => None,
            (false, grant) => {
                return Err(wrong(format!("post {post} is a probe, by grant {grant}")));
            }
        };
        if flags & !(LAST | GRANTED) != 0 {
            return Err(wrong(format!("post {post} has the unknown flags {flags:#x}")));
        }
        if spans == 0 || spans as usize > SPANS {
            return Err(wrong(format!("post {post} has a frame of {spans} spans")));
        }
        Ok(Self { post, grant, bytes, spans, last: flags & LAST != 0 })
    }
}

impl Span {
    pub(super) const BYTES: usize = 24;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        concat([
            &self.segment.0.to_le_bytes(),
            &self.generation.to_le_bytes(),
            &self.offset.to_le_bytes(),
            &self.len.to_le_bytes(),
        ])
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut fields = Fields(bytes);
        let (segment, generation) = (SegmentId(fields.u32()?), fields.u32()?);
        Ok(Self { segment, generation, offset: fields.u64()?, len: fields.u64()? })
    }

    /// Replaces `spans` by those of a frame, which are as long as its head says.
    pub(super) fn decode_all(head: &Head, bytes: &[u8], spans: &mut Vec<Self>) -> Result<()> {
        spans.clear();
        let mut total = Some(0_u64);
        for bytes in bytes.as_chunks().0 {
            let span = Self::decode(bytes)?;
            total = total.and_then(|total| total.checked_add(span.len)).filter(|_| span.len > 0);
            spans.push(span);
        }
        if total != Some(head.bytes) || spans.len() != head.spans as usize {
            let post = head.post;
            return Err(wrong(format!(
                "the spans of post {post} are not its {} bytes",
                head.bytes
            )));
        }
        Ok(())
    }
}

impl Ack {
    pub(super) const BYTES: usize = 16;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        concat([&self.post.0.to_le_bytes(), &u64::from(self.stored).to_le_bytes()])
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut fields = Fields(bytes);
        match (PostId(fields.u64()?), fields.u64()?) {
            (post, stored @ 0..=1) => Ok(Self { post, stored: stored == 1 }),
            (post, other) => Err(wrong(format!("post {post} ended with {other}"))),
        }
    }
}

fn greeting(fields: &mut Fields<'_>) -> Result<()> {
    if fields.take()? != MAGIC {
        return Err(wrong("it speaks something else"));
    }
    match fields.u32()? {
        version if version == u32::from(VERSION) => Ok(()),
        other => Err(ErrorKind::VersionMismatch
            .error(format!("data connections of version {other}, {VERSION} is spoken here"))
            .fix("run the same version of kvxfer on both sides")),
    }
}

pub(super) fn wrong(about: impl Into<String>) -> Error {
    ErrorKind::Protocol.error(about)
}

/// Parts that are `N` bytes together.
fn concat<const N: usize, const M: usize>(parts: [&[u8]; M]) -> [u8; N] {
    let mut whole = [0; N];
    let mut rest = &mut whole[..];
    for part in parts {
        let (here, behind) = rest.split_at_mut(part.len());
        here.copy_from_slice(part);
        rest = behind;
    }
    debug_assert!(rest.is_empty());
    whole
}

/// Reads one field after the other.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (field, rest) =
            self.0.split_first_chunk().ok_or_else(|| wrong("it ends in the middle of a field"))?;
        self.0 = rest;
        Ok(*field)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }
}
