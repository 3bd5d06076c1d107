//! The other process: it owns the segment, poisons it, and looks at each word that arrived.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvxfer_core::Incarnation;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_cuda::device::DevicePool;
use kvxfer_cuda::driver::{Device, DevicePtr, Pinned, Priority, Stream, cuda};
use kvxfer_cuda::fds::{recv_with_fds, send_with_fds};
use kvxfer_cuda::transport::cuda_ipc;

use super::work::{Job, POISON, SEGMENT, Size, content};
use crate::Result;
use crate::child::Words;

/// The role of this process.
pub const ROLE: &str = "gpu-consumer";
/// The one writer.
pub const WRITER: Incarnation = Incarnation([7; 16]);
/// What is looked at at a time.
const PIECE: u64 = 16 << 20;

// What the other process asks for. Each is answered by one word.
/// One more handle of the segment; the answer is the length of its blob.
pub const HANDLE: u64 = 0;
/// To poison it.
pub const CLEAR: u64 = 1;
/// Whether exactly the blocks of a job are there: how many words are not as they should be.
pub const VERIFY: u64 = 2;

/// Serves until the parent has gone.
///
/// # Errors
/// No memory, no driver.
pub fn serve(mut socket: Words) -> Result<()> {
    let Some([ordinal, layer, layers]) = socket.command()? else { return Ok(()) };
    let size = Size { layer, layers, rounds: 0, blocks: &[] };
    let device = Device::open(cuda()?, ordinal as u32)?;
    let mut pool = DevicePool::new(&device, 1, size.pool())?;
    let stream = device.stream(Priority::Default)?;
    let staging = device.pinned(PIECE.min(size.pool()))?;
    while let Some([what, block, scattered, seed]) = socket.command()? {
        let segment = pool.at(SEGMENT, 0, size.pool())?;
        match what {
            HANDLE => give(&mut socket, &mut pool)?,
            CLEAR => {
                stream.fill(segment, POISON, size.pool())?;
                stream.synchronize()?;
                socket.send(&[0])?;
            }
            _ => {
                let job = Job::of([block, scattered, seed]);
                socket.send(&[wrong(&stream, &staging, segment, &job, &size)?])?;
            }
        }
    }
    Ok(())
}

fn give(socket: &mut Words, pool: &mut DevicePool) -> Result<()> {
    let handle = cuda_ipc::export(pool, SEGMENT, WRITER)?;
    socket.send(&[handle.blob.len() as u64])?;
    send_with_fds(&socket.0, &handle.blob, &[handle.fds[0].as_fd()])?;
    Ok(())
}

/// Asks the consumer for a handle.
///
/// # Errors
/// It has gone.
pub fn ask_for_handle(socket: &mut Words, size: &Size) -> Result<SegmentHandle> {
    let [len] = socket.ask(&[HANDLE, 0, 0, 0])?;
    let (mut blob, mut fds) = (vec![0; len as usize], Vec::new());
    let received = recv_with_fds(&socket.0, &mut blob, &mut fds)?;
    if received != blob.len() || fds.len() != 1 {
        return Err(format!("{received} bytes and {} descriptors are no handle", fds.len()).into());
    }
    Ok(SegmentHandle { blob, bytes: size.pool(), fds })
}

/// How many words are not what the job should have left.
fn wrong(
    stream: &Stream,
    staging: &Arc<Pinned>,
    segment: DevicePtr,
    job: &Job,
    size: &Size,
) -> Result<u64> {
    let mut source_of = vec![None; (size.pool() / job.block) as usize];
    for (from, to) in job.table(size) {
        source_of[to as usize] = Some(from);
    }
    let piece = job.block.min(staging.bytes());
    let (mut seen, mut expected) = (vec![0; staging.bytes() as usize], vec![0; piece as usize]);
    let mut wrong = 0;
    for offset in (0..size.pool()).step_by(seen.len()) {
        let len = staging.bytes().min(size.pool() - offset);
        let seen = &mut seen[..len as usize];
        stream.download(staging, 0, segment.offset(offset), len)?;
        stream.synchronize()?;
        staging.read(0, seen)?;
        for (part, at) in seen.chunks_exact(piece as usize).zip((offset..).step_by(piece as usize))
        {
            match source_of[(at / job.block) as usize] {
                Some(from) => content(u64::from(from) * job.block + at % job.block, &mut expected),
                None => expected.fill(POISON),
            }
            if part != expected {
                let words = part.chunks_exact(8).zip(expected.chunks_exact(8));
                wrong += words.filter(|(seen, expected)| seen != expected).count() as u64;
            }
        }
    }
    Ok(wrong)
}
