//! Messages to bytes and back.
//!
//! Each side of a connection sends eight bytes, [`MAGIC`], then frames. All numbers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      4  len: bytes of the body, at most MAX_FRAME (MAX_HELLO until the hellos have passed)
//!      4      2  version: 0 in a hello, then the negotiated version of the protocol
//!      6      2  kind: 0 hello, 1 message
//!      8     16  incarnation of the sender
//!     24    len  body: Hello or Message in postcard's format
//! ```
//!
//! The first frame is the hello, and no other is. Its body is the same in all versions of the
//! protocol: it is what finds the version.
//!
//! Invariants: a decoder holds at most one frame of the current limit, decoding allocates in
//! proportion to the frame (postcard bounds what it reserves by the bytes that are left), every
//! body is consumed to its last byte and within [`bounds`], and after an error
//! nothing more comes out. No input panics.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::bounds::{self, MAX_FRAME, MAX_HELLO};
use super::message::{Hello, Message};
use crate::{Error, ErrorKind, Incarnation};

/// The first bytes of a connection, each way.
pub const MAGIC: [u8; 8] = *b"KVXFER\r\n";
/// Bytes of a frame before its body.
pub const HEADER: usize = 24;
/// The version that a hello's frame carries.
pub const HELLO_VERSION: u16 = 0;

/// Buffers that grew beyond this are given back once they are empty, in bytes.
const KEEP: usize = 64 << 10;

const KIND_HELLO: u16 = 0;
const KIND_MESSAGE: u16 = 1;

/// What a frame carries. Its sender's incarnation is the hello's: the decoder sees to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The first one.
    Hello(Hello),
    /// Any other.
    Message(Message),
}

/// Appends [`MAGIC`] and the frame of a hello to `out`.
///
/// # Errors
/// [`ErrorKind::Protocol`]: the hello is out of [`bounds`]; `out` is as before.
pub fn encode_hello(hello: &Hello, out: &mut Vec<u8>) -> Result<(), Error> {
    bounds::check_hello(hello)?;
    let before = out.len();
    out.extend_from_slice(&MAGIC);
    append(hello, HELLO_VERSION, KIND_HELLO, hello.incarnation, MAX_HELLO, out)
        .inspect_err(|_| out.truncate(before))
}

/// Appends the frame of a message to `out`. `incarnation` is the sender's, `version` the negotiated one.
///
/// # Errors
/// [`ErrorKind::Protocol`]: the message is out of [`bounds`]; `out` is as before.
pub fn encode(
    message: &Message,
    incarnation: Incarnation,
    version: u16,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    bounds::check(message)?;
    append(message, version, KIND_MESSAGE, incarnation, MAX_FRAME, out)
}

fn append<T: Serialize>(
    body: &T,
    version: u16,
    kind: u16,
    incarnation: Incarnation,
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&incarnation.0);
    let written = postcard::serialize_with_flavor(body, Append(out));
    let len = out.len() - start - HEADER;
    if written.is_err() || len > limit {
        out.truncate(start);
        return Err(protocol(format!("a frame of {len} bytes, at most {limit} allowed")));
    }
    out[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(())
}

/// Lets postcard write to the end of a vector.
struct Append<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Append<'_> {
    type Output = ();

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(data);
        Ok(())
    }

    fn try_push(&mut self, data: u8) -> postcard::Result<()> {
        self.0.push(data);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Where a connection stands.
#[derive(Clone, Debug)]
enum Phase {
    /// Before the magic.
    Start,
    /// Before the hello.
    Greeting,
    /// The hello is out, and was not accepted yet.
    Waiting,
    /// Messages of that version.
    Open(u16),
    /// Nothing more comes out.
    Failed(Error),
}

/// Bytes of one connection to frames.
///
/// ```
/// # use kvxfer_core::wire::{Decoder, Frame};
/// # fn received(decoder: &mut Decoder, mut bytes: &[u8]) -> kvxfer_core::Result<()> {
/// while !bytes.is_empty() {
///     let taken = decoder.push(bytes);
///     bytes = &bytes[taken..];
///     while let Some(frame) = decoder.next()? {
///         match frame {
///             Frame::Hello(_) => decoder.accept(1), // or later, or close
///             Frame::Message(_) => {}
///         }
///     }
///     # if taken == 0 { break }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Decoder {
    phase: Phase,
    /// The hello's.
    peer: Option<Incarnation>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are done with.
    start: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// For a new connection.
    pub fn new() -> Self {
        Self { phase: Phase::Start, peer: None, buffer: Vec::new(), start: 0 }
    }

    /// Takes bytes in the order of their arrival, and says how many of them: the buffer is bounded
    /// by one frame of the current limit. After [`Decoder::next`] has answered `None` there is room
    /// for at least one byte, except between a hello and its [`Decoder::accept`]. After an error
    /// all bytes are taken and ignored.
    #[must_use = "bytes that were not taken have to be pushed again"]
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = match self.phase {
            Phase::Failed(_) => return bytes.len(),
            Phase::Start => MAGIC.len() + HEADER + MAX_HELLO,
            Phase::Greeting | Phase::Waiting => HEADER + MAX_HELLO,
            Phase::Open(_) => HEADER + MAX_FRAME,
        };
        let taken = bytes.len().min(room.saturating_sub(self.buffered()));
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() {
            self.buffer.shrink_to(KEEP);
        }
        self.buffer.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// Bytes taken that no frame came out of yet. Not 0 at the end of a connection: it broke off.
    pub fn buffered(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The sender of everything on this connection, once its hello is out.
    pub fn peer(&self) -> Option<Incarnation> {
        self.peer
    }

    /// Accepts the hello: from here on messages of that version come out. Without effect except
    /// after a hello.
    pub fn accept(&mut self, version: u16) {
        if let Phase::Waiting = self.phase {
            self.phase = Phase::Open(version);
        }
    }

    /// The next frame, or `None` until more bytes, or [`Decoder::accept`], have come.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`], and from then on the same again: these are not kvxfer's bytes (the
    /// error says what they look like), or no frame that may come now, or it is out of [`bounds`].
    /// The connection is of no further use.
    #[expect(clippy::should_implement_trait, reason = "an iterator would have to end")]
    pub fn next(&mut self) -> Result<Option<Frame>, Error> {
        self.advance().inspect_err(|error| {
            self.phase = Phase::Failed(error.clone());
            (self.buffer, self.start) = (Vec::new(), 0);
        })
    }

    fn advance(&mut self) -> Result<Option<Frame>, Error> {
        if let Phase::Start = self.phase {
            let Some((magic, _)) = self.buffer[self.start..].split_first_chunk::<8>() else {
                return Ok(None);
            };
            if *magic != MAGIC {
                return Err(not_kvxfer(magic));
            }
            self.start += MAGIC.len();
            self.phase = Phase::Greeting;
        }
        let (limit, version, kind) = match &self.phase {
            Phase::Failed(error) => return Err(error.clone()),
            Phase::Start | Phase::Waiting => return Ok(None),
            Phase::Greeting => (MAX_HELLO, HELLO_VERSION, KIND_HELLO),
            Phase::Open(version) => (MAX_FRAME, *version, KIND_MESSAGE),
        };
        let Some((header, rest)) = self.buffer[self.start..].split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::parse(header);
        // Before the body is waited for.
        let len = header.check(limit, version, kind, self.peer)?;
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        let frame = if kind == KIND_HELLO {
            let hello: Hello = decode(body)?;
            bounds::check_hello(&hello)?;
            if hello.incarnation != header.incarnation {
                let about =
                    format!("hello of {} in a frame of {}", hello.incarnation, header.incarnation);
                return Err(protocol(about));
            }
            self.peer = Some(hello.incarnation);
            self.phase = Phase::Waiting;
            Frame::Hello(hello)
        } else {
            let message: Message = decode(body)?;
            bounds::check(&message)?;
            Frame::Message(message)
        };
        self.start += HEADER + len;
        Ok(Some(frame))
    }
}

struct Header {
    len: u32,
    version: u16,
    kind: u16,
    incarnation: Incarnation,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Self {
        let [l0, l1, l2, l3, v0, v1, k0, k1, incarnation @ ..] = *bytes;
        Self {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            version: u16::from_le_bytes([v0, v1]),
            kind: u16::from_le_bytes([k0, k1]),
            incarnation: Incarnation(incarnation),
        }
    }

    /// The body's length, when such a frame may come now.
    fn check(
        &self,
        limit: usize,
        version: u16,
        kind: u16,
        peer: Option<Incarnation>,
    ) -> Result<usize, Error> {
        let Self { len, incarnation, .. } = self;
        if self.kind != kind {
            return Err(protocol(format!("frame of kind {}, expected {kind}", self.kind)));
        }
        if self.version != version {
            return Err(protocol(format!("frame of version {}, expected {version}", self.version)));
        }
        if peer.is_some_and(|peer| peer != *incarnation) {
            return Err(protocol(format!("frame of {incarnation} on another's connection")));
        }
        match usize::try_from(*len) {
            Ok(len) if len <= limit => Ok(len),
            _ => Err(protocol(format!("a frame of {len} bytes, at most {limit} allowed"))),
        }
    }
}

/// A whole body. What is left over is an error: two sides that read one body differently do not go on.
fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => {
            Err(protocol(format!("{} bytes too many in a frame of {}", rest.len(), body.len())))
        }
        Err(error) => Err(protocol(format!("a body of {} bytes: {error}", body.len()))),
    }
}

fn not_kvxfer(start: &[u8; 8]) -> Error {
    const HTTP: [&[u8]; 9] = [
        b"GET ",
        b"POST ",
        b"PUT ",
        b"HEAD ",
        b"PRI * ",
        b"OPTIONS ",
        b"DELETE ",
        b"CONNECT ",
        b"HTTP/",
    ];
    let looks = match start {
        [0x14..=0x17, 3, ..] => "TLS".to_string(),
        _ if HTTP.iter().any(|word| start.starts_with(&word[..word.len().min(8)])) => {
            "HTTP".to_string()
        }
        _ => format!("neither HTTP nor TLS: \"{}\"", start.escape_ascii()),
    };
    protocol(format!("not a kvxfer agent; the first bytes look like {looks}"))
        .fix("check the peer's host and port: it is the agent's own port, not the server's")
}

fn protocol(about: String) -> Error {
    ErrorKind::Protocol.error(about)
}
