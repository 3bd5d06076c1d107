//! Who may write where, by which leave.

use kvxfer_core::transport::PROBE_BYTES;
use kvxfer_core::wire::Message;
use kvxfer_core::{ErrorKind, GrantId, Incarnation, SegmentId};

use crate::rig::{A, B, Decode, layout, ms};

impl Decode {
    fn may(
        &self,
        peer: Incarnation,
        grant: Option<u64>,
        segment: u32,
        at: u64,
        len: u64,
    ) -> String {
        let (grant, segment) = (grant.map(GrantId), SegmentId(segment));
        match self.consumer.may_write(peer, grant, segment, at, len) {
            Ok(()) => "yes".into(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Protocol);
                let text = error.to_string();
                text.rsplit_once(": ").unwrap().1.into()
            }
        }
    }
}

#[test]
fn a_writer_writes_to_the_pages_of_its_grant_until_that_ends() {
    let (mut decode, page) = (Decode::with(2, 4), layout(1, 1).page_bytes());
    decode.offer(1, 1, "ab");
    // Grants 1 and 2 have a page each, in that order.
    let yes = |decode: &Decode, at, len| decode.may(A, Some(1), 0, at, len);
    assert_eq!(yes(&decode, 0, page), "yes");
    assert_eq!(yes(&decode, 3, 2), "yes");
    for (at, len) in [(0, page + 1), (page, 1), (page - 1, 2), (4 * page, 1)] {
        assert_eq!(yes(&decode, at, len), "the grant is for other pages", "{at} {len}");
    }
    assert_eq!(yes(&decode, u64::MAX, 2), "there is no such range");
    assert_eq!(decode.may(A, Some(1), 1, 0, page), "the grant is for other pages");
    assert_eq!(decode.may(A, Some(1), 9, 0, page), "the grant is for other pages");
    assert_eq!(decode.may(A, Some(2), 0, page, page), "yes");
    assert_eq!(decode.may(B, Some(1), 0, 0, page), "the grant is another peer's");
    assert_eq!(decode.may(A, Some(9), 0, 0, page), "the grant has ended");

    // What is committed is not written to any more.
    decode.commit(1, 1);
    assert_eq!(yes(&decode, 0, page), "the grant is committed");
    // What has expired may be: nobody else has those pages, until they are given back.
    decode.wait(ms(300));
    assert_eq!(decode.may(A, Some(2), 0, page, page), "yes");
    decode.hear(1, Message::FenceAck { grant: GrantId(2) });
    assert_eq!(decode.may(A, Some(2), 0, page, page), "the grant has ended");
}

#[test]
fn a_probe_goes_behind_the_pages_of_ones_own_segment() {
    let (mut decode, page) = (Decode::with(2, 4), layout(1, 1).page_bytes());
    decode.join(2, B);
    decode.offer(1, 1, "a");
    let end = 4 * page;
    assert_eq!(decode.may(A, None, 0, end, PROBE_BYTES), "yes");
    assert_eq!(decode.may(A, None, 0, end, PROBE_BYTES + 1), "a probe belongs behind the pages");
    assert_eq!(decode.may(A, None, 0, end - 1, 2), "a probe belongs behind the pages");
    for (peer, segment) in [(B, 0), (A, 1), (A, 9)] {
        assert_eq!(decode.may(peer, None, segment, end, 1), "the segment is not its own");
    }
}
