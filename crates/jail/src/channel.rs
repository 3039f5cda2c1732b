//! Messages of JSON with descriptors over a Unix sequenced-packet socket: one `send` is one `receive`.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg,
            sendmsg, setsockopt, socketpair, sockopt,
        },
        time::TimeVal,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// Largest message in bytes.
const MAX_MESSAGE: usize = 128 << 10;
/// Most descriptors in one message.
const MAX_DESCRIPTORS: usize = 32;

/// Two connected ends, both closed on exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// From now on an answer that does not come within `patience` is an error. A conversation that has failed so is over: its
/// answer may still come, and would be taken for the next one's.
pub fn be_patient_for(socket: impl AsFd, patience: Duration) -> io::Result<()> {
    let patience = TimeVal::new(patience.as_secs().try_into().unwrap_or(i64::MAX), patience.subsec_micros().into());
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    Ok(setsockopt(&socket, sockopt::SendTimeout, &patience)?)
}

fn or_late(errno: Errno) -> io::Error {
    match errno {
        Errno::EAGAIN => io::Error::new(io::ErrorKind::TimedOut, "there was no answer in time"),
        errno => errno.into(),
    }
}

/// Sends one message and copies of `descriptors`.
pub fn send(socket: impl AsFd, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too large"));
    }
    let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(or_late)?;
    Ok(())
}

/// Receives one message and its descriptors, closed on exec. `None` at the end of the conversation.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut descriptors = Vec::new();
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received =
        recvmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &mut buffers, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(or_late)?;
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows of them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (length, truncated) = (received.bytes, received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    if truncated {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut off"));
    }
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..length])?, descriptors)))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, io::Write};

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (ours, theirs) = pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&ours, &"hello", &[writer.as_fd()]).unwrap();
        drop(writer);
        let (text, mut descriptors) = receive::<String>(&theirs).unwrap().unwrap();
        assert_eq!(text, "hello");
        File::from(descriptors.remove(0)).write_all(b"through").unwrap();
        let mut read = String::new();
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "through");
    }

    #[test]
    fn the_end_is_none() {
        let (ours, theirs) = pair().unwrap();
        drop(ours);
        assert!(receive::<String>(&theirs).unwrap().is_none());
    }
}
