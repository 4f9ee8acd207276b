//! Extents → aligned memory, in file order, by background threads, with the CRC on the way.
//!
//! [`plan`] cuts the image into parts beforehand; [`state`] says who reads which; [`work`] reads them, in the background
//! and in the threads of callers that would have to wait: there are as many workers as cores, and none idles. They run
//! ahead of whoever takes the tensors by a bounded number of bytes, unless a later tensor is asked for. Every byte of the
//! image passes the CRC, also those between tensors. What is not one range of bytes is decoded by whoever knows how, in a
//! background thread.
#![allow(unsafe_code)] // reads from blocks that are complete

mod plan;
mod state;
mod sync;
#[cfg(test)]
mod tests;
mod work;

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ReadAt;
use super::buffer::Block;
use crate::error::{Error, Kind, Result};
use plan::{Plan, plan};
use state::{Goal, State};
use sync::{Builder, JoinHandle};
use work::{Shared, Worker};

/// How often a waiting caller is asked whether to go on.
pub const POLL: Duration = Duration::from_millis(100);

/// Called while waiting; an error ends the wait.
pub type Interrupt<'a> = &'a dyn Fn() -> Result<()>;

/// How often a caller is asked whether to go on; always, where time does not pass.
const ASK: Duration = if cfg!(test) { Duration::ZERO } else { POLL };

/// Asks the caller during long work, in steps of milliseconds, from time to time whether to go on.
pub struct Patience<'a> {
    interrupt: Interrupt<'a>,
    asked: Instant,
}

impl<'a> Patience<'a> {
    /// Work that begins now.
    pub fn new(interrupt: Interrupt<'a>) -> Self {
        Self { interrupt, asked: Instant::now() }
    }

    fn is_over(&self) -> bool {
        self.asked.elapsed() >= ASK
    }

    /// After each step.
    ///
    /// # Errors
    /// What the interrupt returns.
    pub fn ask(&mut self) -> Result<()> {
        if !self.is_over() {
            return Ok(());
        }
        self.asked = Instant::now();
        (self.interrupt)()
    }
}

/// A tensor to be read: `len` bytes at `offset` of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// From the start of the image.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Part of a block that holds one tensor.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Keeps the memory alive.
    pub block: Arc<Block>,
    /// Where the tensor starts in it: a multiple of 64.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl Slot {
    /// A slot of its own with a copy of `bytes`.
    ///
    /// # Errors
    /// `Memory`.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        let block = Block::new(bytes.len())?;
        // SAFETY: the block is not shared yet.
        unsafe { block.slot(0, bytes.len()) }.copy_from_slice(bytes);
        Ok(Self { start: 0, len: bytes.len(), block: Arc::new(block) })
    }

    /// A slot of its own with `len` bytes of `source`, read by the calling thread.
    ///
    /// # Errors
    /// `Memory`, `Io`, or what `interrupt` returns.
    pub fn read_from(source: &dyn ReadAt, offset: u64, len: usize, interrupt: Interrupt<'_>) -> Result<Self> {
        const STEP: usize = 16 << 20; // milliseconds between two interrupts
        let block = Block::new(len)?;
        // SAFETY: the block is not shared yet.
        for (i, part) in unsafe { block.slot(0, len) }.chunks_mut(STEP).enumerate() {
            if i > 0 {
                interrupt()?;
            }
            source.read_at(part, offset + (i * STEP) as u64)?;
        }
        Ok(Self { block: Arc::new(block), start: 0, len })
    }

    /// Where its `len` bytes start. They may be written through it as long as nobody has them by [`Slot::bytes`].
    pub fn as_ptr(&self) -> *mut u8 {
        assert!(self.start + self.len <= self.block.len());
        self.block.as_ptr().wrapping_add(self.start)
    }

    /// The bytes, of a slot whose pointer was not given to somebody who may write.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: in bounds; the reader finished this slot before it handed it out and never writes it again.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

/// Fills the memory of some tensors that are not one range of bytes each, by their numbers, from the given file.
pub type Decode = Box<dyn Fn(&dyn ReadAt, &[usize], &mut [&mut [u8]]) -> Result<()> + Send + Sync>;

/// What is read, and what is known about it beforehand.
pub struct Request {
    /// The file.
    pub source: Arc<dyn ReadAt>,
    /// Where the image starts in it, and its bytes.
    pub image: Extent,
    /// The tensors, each with its bytes in the image; disjoint, in any order.
    pub tensors: Vec<Extent>,
    /// The bytes of those that must be decoded, which are numbered behind `tensors`.
    pub decoded: Vec<u64>,
    /// How they are.
    pub decode: Decode,
    /// Expected CRC-32 of the whole image. Without it, only the tensors are read.
    pub crc: Option<u32>,
    /// Bytes that may be read ahead of what was taken.
    pub read_ahead: u64,
}

/// A read in progress. Dropping it stops the workers. It belongs to the process that started it: in a forked child it
/// cannot be used, and dropping it does nothing, since its threads and its locks are the parent's.
pub struct Fetch {
    shared: ManuallyDrop<Arc<Shared>>,
    threads: Vec<JoinHandle<()>>,
    process: u32,
}

/// How many background workers read it: as many as there are cores with a few parts for each, since it takes time to
/// start one, and one less, since callers that would wait read too. None for what takes less time than a start, or where
/// memory is short: a thread that starts while others take the last of it is ended by the C library, with the process.
fn workers(request: &Request, plan: &Plan) -> usize {
    const PARTS_EACH: usize = 4;
    const SMALL: u64 = 1 << 20;
    const THREADS: u64 = 16 << 20; // stacks, and what the allocator sets up for each
    let sum = |sizes: &mut dyn Iterator<Item = u64>| sizes.fold(0, u64::saturating_add);
    let decoded = sum(&mut request.decoded.iter().copied());
    if plan.len() <= 1 && sum(&mut (0..plan.len()).map(|n| plan.part(n).len)).saturating_add(decoded) <= SMALL {
        return 0;
    }
    let ahead = sum(&mut request.tensors.iter().map(|t| t.len)).saturating_add(decoded).min(request.read_ahead);
    if Block::new(ahead.saturating_add(THREADS) as usize).is_err() {
        return 0;
    }
    if !request.source.is_native() {
        return 1; // its own lock lets one read at a time
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores - 1).min(plan.len() / PARTS_EACH).max(1)
}

impl Fetch {
    /// Starts to read.
    ///
    /// # Errors
    /// `Image` when tensors overlap or leave the image, `Memory`.
    pub fn start(request: Request) -> Result<Self> {
        let plan = plan(&request.tensors, request.image.len, request.crc.is_some(), request.read_ahead)?;
        let wanted = workers(&request, &plan);
        Self::with_workers(request, plan, wanted)
    }

    /// Starts to read with at most so many background workers; when none can be started, callers do all the work.
    fn with_workers(request: Request, plan: Plan, wanted: usize) -> Result<Self> {
        let mut state = State::new(&request, &plan)?;
        state.settle(&request, &plan); // there may be nothing to do
        let shared = Arc::new(Shared::new(request, plan, state));
        let mut threads = Vec::with_capacity(wanted);
        for _ in 0..wanted {
            let own = Arc::clone(&shared);
            shared.lock().background += 1;
            let started = Builder::new().name("hornbeam-fetch".into()).spawn(move || own.run_in_background());
            let Ok(thread) = started else {
                shared.lock().background -= 1;
                break;
            };
            threads.push(thread);
        }
        Ok(Self { shared: ManuallyDrop::new(shared), threads, process: std::process::id() })
    }

    fn is_of_this_process(&self) -> bool {
        std::process::id() == self.process
    }

    fn check_process(&self) -> Result<()> {
        if self.is_of_this_process() {
            return Ok(());
        }
        Err(Error::new(Kind::Cancelled, "this read belongs to the process that started it, not to a forked child")
            .with_advice("Open the file again in the child."))
    }

    /// Bytes of tensors that were read so far; 0 in a forked child.
    pub fn read(&self) -> u64 {
        if self.is_of_this_process() { self.shared.lock().read } else { 0 }
    }

    /// Waits for tensor `i` and takes it; a second call for the same tensor gets `None`.
    ///
    /// # Errors
    /// Whatever stopped the workers before they got there, what `interrupt` returns, `Cancelled` in a forked child.
    pub fn take(&self, i: usize, interrupt: Interrupt<'_>) -> Result<Option<Slot>> {
        self.check_process()?;
        let shared = &**self.shared;
        shared.work(&mut Worker::caller(interrupt, Some(i)), |state| {
            if state.is_done(i) {
                let slot = state.take(i);
                // To wake workers for each of 50,000 tensors takes longer than to read them.
                if state.idle > 0 && state.has_room(shared.request()) {
                    shared.wake_idle();
                }
                return Some(Ok(slot));
            }
            state.outcome.as_mut().map(|outcome| report(outcome).map(|()| None))
        })?
    }

    /// Waits until every byte was read and the CRC was found right; the tensors stay to be taken.
    ///
    /// # Errors
    /// `Crc`, or as [`Fetch::take`].
    pub fn complete(&self, interrupt: Interrupt<'_>) -> Result<()> {
        self.finish(Goal::All, interrupt)
    }

    /// As [`Fetch::complete`], but drops what was not taken.
    ///
    /// # Errors
    /// `Crc`, or as [`Fetch::take`].
    pub fn drain(&self, interrupt: Interrupt<'_>) -> Result<()> {
        self.finish(Goal::Drain, interrupt)
    }

    fn finish(&self, goal: Goal, interrupt: Interrupt<'_>) -> Result<()> {
        self.check_process()?;
        self.shared.set_goal(goal);
        self.shared.work(&mut Worker::caller(interrupt, None), |state| state.outcome.as_mut().map(report))?
    }
}

/// The outcome; an error is returned once, and whoever asks later learns that there was one.
fn report(outcome: &mut Result<()>) -> Result<()> {
    if outcome.is_ok() {
        return Ok(());
    }
    let again = Error::new(Kind::Io(std::io::Error::other("an earlier read failed")), "cannot read");
    std::mem::replace(outcome, Err(again))
}

fn stopped() -> Error {
    Error::new(Kind::Cancelled, "the read was cancelled")
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut self.threads);
        if !self.is_of_this_process() {
            std::mem::forget(threads); // they are not here, and their locks may be held for ever
            return;
        }
        self.shared.set_goal(Goal::Stop);
        for thread in threads {
            let _ = thread.join(); // a panic is the outcome already
        }
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.shared) };
    }
}
