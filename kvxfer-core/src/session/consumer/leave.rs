//! Whether a writer may write somewhere now: asked for each write, where the path lets somebody ask.

use super::{Consumer, Phase};
use crate::transport::PROBE_BYTES;
use crate::{Error, ErrorKind, GrantId, Incarnation, Result, SegmentId};

impl Consumer {
    /// Whether a peer may write these bytes by this grant, or, without one, as a probe.
    ///
    /// One whose deadline has passed may, until it is fenced: nobody else is given its pages before.
    ///
    /// # Errors
    /// `Protocol`: it may not, and why.
    pub fn may_write(
        &self,
        peer: Incarnation,
        grant: Option<GrantId>,
        segment: SegmentId,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let refuse = |why: &str| Err(refused(peer, grant, segment, offset, len, why));
        let Some(end) = offset.checked_add(len) else { return refuse("there is no such range") };
        let page = self.config.layout.page_bytes();
        let Some(number) = grant else {
            let pages = u64::from(self.config.geometry.pages_per_segment) * page;
            return match self.pool_writer(segment) == Some(peer) {
                true if offset >= pages && end <= pages + PROBE_BYTES => Ok(()),
                true => refuse("a probe belongs behind the pages"),
                false => refuse("the segment is not its own"),
            };
        };
        let Some(grant) = self.grants.get(&number) else { return refuse("the grant has ended") };
        if grant.peer != peer {
            return refuse("the grant is another peer's");
        }
        if let Phase::Resident { .. } = grant.phase {
            return refuse("the grant is committed");
        }
        let holds = |start: u64, pages: u16| {
            let start = start * page;
            start <= offset && end <= start + u64::from(pages) * page
        };
        let inside = grant
            .extents
            .iter()
            .any(|extent| extent.segment == segment && holds(extent.page.into(), extent.pages));
        match inside {
            true => Ok(()),
            false => refuse("the grant is for other pages"),
        }
    }

    /// Whose a segment is, if there is such a segment.
    fn pool_writer(&self, segment: SegmentId) -> Option<Incarnation> {
        (segment.0 < self.config.geometry.segments).then(|| self.pool.writer(segment)).flatten()
    }
}

fn refused(
    peer: Incarnation,
    grant: Option<GrantId>,
    segment: SegmentId,
    offset: u64,
    len: u64,
    why: &str,
) -> Error {
    let by = grant.map_or("as a probe".to_owned(), |grant| format!("by grant {grant}"));
    ErrorKind::Protocol.error(format!(
        "peer {peer} may not write {len} bytes at {offset} of segment {segment} {by}: {why}"
    ))
}
