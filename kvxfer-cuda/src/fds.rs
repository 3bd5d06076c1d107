//! File descriptors over Unix sockets.
//!
//! At most [`MAX_FDS`] travel with one message. What is received is close-on-exec; a message whose
//! control data the kernel had to cut short is refused, and whatever descriptors did arrive with it
//! are closed.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors that one message carries.
pub const MAX_FDS: usize = 16;

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// Sends `bytes`, and `fds` with the first of them. Returns how many bytes went out, which on a
/// stream may be fewer; the descriptors have then gone, and the rest is sent without them.
///
/// # Errors
/// `InvalidInput` when there are more than [`MAX_FDS`] descriptors, or descriptors but no byte to
/// carry them; otherwise what `sendmsg` says, `WouldBlock` on a full non-blocking socket included.
/// Nothing was sent then.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS || (bytes.is_empty() && !fds.is_empty()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} descriptors with {} bytes: at most {MAX_FDS} travel, with at least one byte",
                fds.len(),
                bytes.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(fits, "the buffer has room for {MAX_FDS} descriptors");
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// Receives into `buffer`, and appends the descriptors that came with it to `fds`. Returns how many
/// bytes came in: 0 is the end of the stream.
///
/// # Errors
/// `InvalidData` when the sender passed more descriptors than [`MAX_FDS`], or this process had no
/// room for them, or a datagram was longer than `buffer`: the message is spoilt, and all its
/// descriptors are closed. Otherwise what `recvmsg` says.
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut bytes = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let kept = fds.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let cut = received.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC);
    if cut || fds.len() - kept > MAX_FDS {
        fds.truncate(kept);
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "a message came cut short: it held more than {MAX_FDS} descriptors, or more than \
                 this process may still open"
            ),
        ));
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn bytes_and_descriptors_arrive_together_and_close_on_exec() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = null();
        let sent = send_with_fds(&left, b"two", &[file.as_fd(), left.as_fd()]).unwrap();
        assert_eq!(sent, 3);

        let (mut buffer, mut fds) = ([0; 8], Vec::new());
        assert_eq!(recv_with_fds(&right, &mut buffer, &mut fds).unwrap(), 3);
        assert_eq!(&buffer[..3], b"two");
        assert_eq!(fds.len(), 2);
        assert!(fds.iter().all(|fd| fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)));
    }

    #[test]
    fn messages_are_not_merged_across_descriptors() {
        let (mut left, right) = UnixStream::pair().unwrap();
        let file = null();
        left.write_all(b"plain").unwrap();
        send_with_fds(&left, b"first", &[file.as_fd()]).unwrap();
        send_with_fds(&left, b"second", &[file.as_fd()]).unwrap();

        let (mut buffer, mut fds, mut bytes, mut order) = ([0; 64], Vec::new(), 0, Vec::new());
        while bytes < 16 {
            bytes += recv_with_fds(&right, &mut buffer, &mut fds).unwrap();
            order.push((bytes, fds.len()));
        }
        // Whatever the kernel merges, no descriptor comes before its message's first byte.
        for &(bytes, fds) in &order {
            assert!(fds <= usize::from(bytes > 5) + usize::from(bytes > 10), "{order:?}");
        }
        assert_eq!(order.last(), Some(&(16, 2)));
    }

    #[test]
    fn the_end_of_the_stream_is_zero_bytes() {
        let (left, right) = UnixStream::pair().unwrap();
        drop(left);
        assert_eq!(recv_with_fds(&right, &mut [0; 8], &mut Vec::new()).unwrap(), 0);
    }

    #[test]
    fn what_cannot_be_sent_is_refused_before_it_is() {
        let (left, _right) = UnixStream::pair().unwrap();
        let file = null();
        let many = [file.as_fd(); MAX_FDS + 1];
        for (bytes, fds) in [(&b"x"[..], &many[..]), (b"", &many[..1])] {
            let error = send_with_fds(&left, bytes, fds).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn too_many_descriptors_spoil_the_message_and_are_closed() {
        let (left, right) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let fds = vec![writer.as_fd(); MAX_FDS * 2];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS * 2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&left, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();

        let mut kept = vec![OwnedFd::from(null())];
        let error = recv_with_fds(&right, &mut [0; 8], &mut kept).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(kept.len(), 1);

        // The pipe ends only when every copy of its writing end is closed.
        drop(writer);
        assert_eq!(io::read_to_string(reader).unwrap(), "");
    }
}
