//! Extents → aligned memory, in file order, in a background thread, with the CRC on the way.
//!
//! The reader runs ahead of whoever takes the tensors by a bounded number of bytes, unless a later tensor is asked
//! for. Every byte of the image passes the CRC, also those between tensors. What is no plain run of bytes is decoded by
//! whoever knows how, in the same thread.
#![allow(unsafe_code)] // writes into blocks that are not shared until they are complete

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ReadAt;
use super::buffer::{Block, OWN_BLOCK};
use crate::error::{Error, Kind, Result};
use crate::h5::ALIGNMENT;

/// Bytes per read of what is small or skipped; larger tensors are read in such steps too, so that the CRC finds them
/// in cache.
const STEP: usize = 256 << 10;

/// Bytes that are decoded together: enough for all threads to be busy to the end.
const BATCH: u64 = 32 << 20;

/// How often a waiting caller is asked whether to go on.
pub const POLL: Duration = Duration::from_millis(100);

/// Called while waiting; an error ends the wait.
pub type Interrupt<'a> = &'a dyn Fn() -> Result<()>;

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
    /// A slot that is all of `block`, with a copy of `bytes`.
    ///
    /// # Panics
    /// When the block has not their size.
    pub fn copy_of(bytes: &[u8], block: Block) -> Self {
        // SAFETY: the block is not shared yet.
        unsafe { block.slot(0, block.len()) }.copy_from_slice(bytes);
        Self { start: 0, len: bytes.len(), block: Arc::new(block) }
    }

    /// A slot of its own with `len` bytes of `source`, read by the calling thread.
    ///
    /// # Errors
    /// `Io`, or what `interrupt` returns.
    pub fn read_from(source: &dyn ReadAt, offset: u64, len: usize, interrupt: Interrupt<'_>) -> Result<Self> {
        const PART: usize = 16 << 20; // milliseconds
        let block = Block::new(len);
        // SAFETY: the block is not shared yet.
        for (i, part) in unsafe { block.slot(0, len) }.chunks_mut(PART).enumerate() {
            if i > 0 {
                interrupt()?;
            }
            source.read_at(part, offset + (i * PART) as u64)?;
        }
        Ok(Self { block: Arc::new(block), start: 0, len })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        assert!(self.start + self.len <= self.block.len());
        // SAFETY: in bounds; the reader finished this slot before it handed it out and never writes it again.
        unsafe { std::slice::from_raw_parts(self.block.as_ptr().add(self.start), self.len) }
    }
}

/// Fills the memory of some tensors that are not plain runs of bytes, by their numbers, from the given file.
pub type Decode = Box<dyn Fn(&dyn ReadAt, &[usize], &mut [&mut [u8]]) -> Result<()> + Send>;

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

/// A read in progress. Dropping it stops the reader.
pub struct Fetch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slots: Vec<Option<Slot>>,
    done: Vec<bool>,
    ahead: u64,
    read: u64,             // bytes of tensors, taken or not
    wanted: Option<usize>, // the tensor somebody waits for
    takers: usize,         // who do
    blocked: bool,         // the reader waits for one of them
    goal: Goal,
    outcome: Option<Result<()>>,
    asked: Option<Instant>, // when a waiting caller was last asked whether to go on
}

/// What the reader is to do; it never takes back the later of two.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Goal {
    /// Be ahead of whoever takes the tensors, by no more than it may.
    #[default]
    Ahead,
    /// Read to the end, whatever the limit.
    All,
    /// Read to the end, and keep nothing more.
    Drain,
    /// Stop.
    Stop,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reader's wait.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.blocked = true;
        let mut state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.blocked = false;
        state
    }

    /// Lets go, and wakes others if they wait for what has changed: to wake somebody for each of 50,000 tensors takes
    /// longer than to read them.
    fn wake(&self, state: MutexGuard<'_, State>, if_so: impl FnOnce(&State) -> bool) {
        let wake = if_so(&state);
        drop(state);
        if wake {
            self.changed.notify_all();
        }
    }

    /// Waits a while; asks between whether to go on.
    fn wait_for<'a>(&'a self, state: MutexGuard<'a, State>, go_on: Interrupt<'_>) -> Result<MutexGuard<'a, State>> {
        let (mut state, _) = self.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner);
        // Others may be woken more often than that, so the time-out alone might never come.
        if state.asked.is_some_and(|asked| asked.elapsed() < POLL) {
            return Ok(state);
        }
        state.asked = Some(Instant::now());
        drop(state);
        go_on()?;
        Ok(self.lock())
    }
}

impl Fetch {
    /// Starts to read.
    ///
    /// # Errors
    /// `Hdf5` when tensors overlap or leave the image, `Io` when there is no thread to be had.
    pub fn start(request: Request) -> Result<Self> {
        let plan = plan(&request)?;
        let n = request.tensors.len() + request.decoded.len();
        let state = State { slots: vec![None; n], done: vec![false; n], ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let in_thread = Arc::clone(&shared);
        let run = move || {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&request, &plan, &in_thread)));
            let outcome = caught.unwrap_or_else(|_| Err(Error::new(Kind::Invalid, "the reader thread panicked")));
            in_thread.lock().outcome = Some(outcome);
            in_thread.changed.notify_all();
        };
        let thread = std::thread::Builder::new().name("hornbeam-fetch".into()).spawn(run);
        let thread = thread.map_err(|e| Error::new(Kind::Io(e), "cannot start the reader thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Bytes of tensors that were read so far.
    pub fn read(&self) -> u64 {
        self.shared.lock().read
    }

    /// Waits for tensor `i` and takes it; a second call for the same tensor gets `None`.
    ///
    /// # Errors
    /// Whatever stopped the reader before it got there.
    pub fn take(&self, i: usize, interrupt: Interrupt<'_>) -> Result<Option<Slot>> {
        let mut state = self.shared.lock();
        loop {
            if state.done[i] {
                let slot = state.slots[i].take();
                state.ahead -= slot.as_ref().map_or(0, |s| s.len as u64);
                self.shared.wake(state, |state| state.blocked);
                return Ok(slot);
            }
            if let Some(outcome) = &mut state.outcome {
                tell(outcome)?;
                return Ok(None);
            }
            state.wanted = Some(i);
            state.takers += 1;
            self.shared.changed.notify_all();
            state = self.shared.wait_for(state, interrupt).inspect_err(|_| self.shared.lock().takers -= 1)?;
            state.takers -= 1;
        }
    }

    /// Waits until every byte was read and the CRC was found right; the tensors stay to be taken.
    ///
    /// # Errors
    /// `Crc`, or whatever stopped the reader.
    pub fn complete(&self, interrupt: Interrupt<'_>) -> Result<()> {
        self.finish(Goal::All, interrupt)
    }

    /// As [`Fetch::complete`], but drops what was not taken.
    ///
    /// # Errors
    /// `Crc`, or whatever stopped the reader.
    pub fn drain(&self, interrupt: Interrupt<'_>) -> Result<()> {
        self.finish(Goal::Drain, interrupt)
    }

    fn finish(&self, goal: Goal, interrupt: Interrupt<'_>) -> Result<()> {
        let mut state = self.shared.lock();
        state.goal = state.goal.max(goal);
        self.shared.changed.notify_all();
        loop {
            if let Some(outcome) = &mut state.outcome {
                return tell(outcome);
            }
            state = self.shared.wait_for(state, interrupt)?;
        }
    }
}

/// The error is told once; whoever asks later learns that there was one.
fn tell(outcome: &mut Result<()>) -> Result<()> {
    if outcome.is_ok() {
        return Ok(());
    }
    let again = Error::new(Kind::Io(std::io::Error::other("an earlier read failed")), "cannot read");
    std::mem::replace(outcome, Err(again))
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.shared.lock().goal = Goal::Stop;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs of the image in order: a tensor, or what lies between.
type Run = (Extent, Option<usize>);

fn plan(request: &Request) -> Result<Vec<Run>> {
    let mut order: Vec<usize> = (0..request.tensors.len()).filter(|&i| request.tensors[i].len > 0).collect();
    order.sort_unstable_by_key(|&i| request.tensors[i].offset);
    let mut runs = Vec::with_capacity(order.len() * 2 + 1);
    let mut at = 0;
    let gap = |from: u64, to: u64, runs: &mut Vec<Run>| {
        if to > from && request.crc.is_some() {
            runs.push((Extent { offset: from, len: to - from }, None));
        }
    };
    for i in order {
        let tensor = request.tensors[i];
        let end = tensor.offset.checked_add(tensor.len).filter(|&end| end <= request.image.len);
        let Some(end) = end.filter(|_| tensor.offset >= at) else {
            return Err(Error::new(Kind::Hdf5, "malformed HDF5: two tensors share bytes, or one leaves the file"));
        };
        gap(at, tensor.offset, &mut runs);
        runs.push((tensor, Some(i)));
        at = end;
    }
    gap(at, request.image.len, &mut runs);
    Ok(runs)
}

/// The reader: fills slots in file order.
fn read(request: &Request, plan: &[Run], shared: &Shared) -> Result<()> {
    {
        let mut state = shared.lock();
        for (i, tensor) in request.tensors.iter().enumerate() {
            state.done[i] = tensor.len == 0;
        }
    }
    let mut order = vec![0; request.tensors.len()]; // position in the plan
    for (position, (_, i)) in plan.iter().enumerate() {
        i.iter().for_each(|&i| order[i] = position);
    }
    let mut crc = request.crc.map(|_| crc32fast::Hasher::new());
    let mut reader = Reader { request, shared, stage: Vec::new(), staged: 0..0 };
    let mut decoder = Decoder { request, shared };
    let mut arena: Option<(Arc<Block>, usize)> = None;
    for (position, &(extent, tensor)) in plan.iter().enumerate() {
        let keep = decoder.turn(|i| order.get(i).is_some_and(|&p| p >= position))? == Turn::Keep;
        match tensor.filter(|_| keep) {
            None if crc.is_none() => {}
            None => reader.each(extent, &mut |bytes| crc.iter_mut().for_each(|c| c.update(bytes)))?,
            Some(i) => {
                let len = extent.len as usize;
                let (block, start) = if len >= OWN_BLOCK {
                    (Arc::new(Block::new(len)), 0)
                } else {
                    if arena.as_ref().is_none_or(|(block, used)| used + len > block.len()) {
                        // The last arena is no larger than what is still to come.
                        let mut rest = 0;
                        for (next, _) in plan[position..].iter().filter(|run| run.1.is_some()) {
                            rest = (rest + next.len).next_multiple_of(ALIGNMENT);
                            if rest >= OWN_BLOCK as u64 {
                                break;
                            }
                        }
                        arena = Some((Arc::new(Block::new(rest.clamp(len as u64, OWN_BLOCK as u64) as usize)), 0));
                    }
                    let (block, used) = arena.as_mut().expect("just made");
                    let start = *used;
                    *used = (start + len).next_multiple_of(ALIGNMENT as usize);
                    (Arc::clone(block), start)
                };
                // SAFETY: slots of a block are handed out once and do not overlap; this one is not shared yet.
                reader.fill(extent, unsafe { block.slot(start, len) }, &mut |bytes| {
                    crc.iter_mut().for_each(|c| c.update(bytes));
                })?;
                let mut state = shared.lock();
                state.slots[i] = Some(Slot { block, start, len });
                state.done[i] = true;
                state.ahead += extent.len;
                state.read += extent.len;
                shared.wake(state, |state| state.wanted == Some(i) || state.takers > 1);
            }
        }
    }
    decoder.rest()?;
    match (crc.map(crc32fast::Hasher::finalize), request.crc) {
        (Some(found), Some(expected)) if found != expected => Err(Error::new(Kind::Crc, "Bad CRC-32 for the weights")
            .with_found(format_args!("{expected:08x}"), format_args!("{found:08x}"))
            .with_advice("Their bytes changed after they were written; use another copy.")),
        _ => Ok(()),
    }
}

fn stopped() -> Error {
    Error::new(Kind::Cancelled, "the read was cancelled")
}

/// Whether to read on, and to keep it.
#[derive(PartialEq, Eq)]
enum Turn {
    Keep,
    Drop,
}

/// Decodes what is asked for when it is asked for, and the rest at the end.
struct Decoder<'a> {
    request: &'a Request,
    shared: &'a Shared,
}

impl Decoder<'_> {
    /// Waits until there is room for more, or somebody waits for a tensor that is `ahead`.
    fn turn(&mut self, ahead: impl Fn(usize) -> bool) -> Result<Turn> {
        let mut state = self.shared.lock();
        loop {
            if state.goal == Goal::Stop {
                return Err(stopped());
            }
            if state.goal == Goal::Drain {
                return Ok(Turn::Drop);
            }
            let asked = state.wanted.filter(|&i| !state.done[i]);
            if let Some(i) = asked.filter(|&i| i >= self.request.tensors.len()) {
                drop(state);
                self.decode(i)?;
                state = self.shared.lock();
            } else if state.goal == Goal::All || asked.is_some_and(&ahead) || state.ahead < self.request.read_ahead {
                return Ok(Turn::Keep);
            } else {
                state = self.shared.wait(state);
            }
        }
    }

    fn rest(&mut self) -> Result<()> {
        let all = self.request.tensors.len()..self.request.tensors.len() + self.request.decoded.len();
        for i in all {
            while !self.shared.lock().done[i] {
                match self.turn(|_| false)? {
                    Turn::Keep if self.shared.lock().done[i] => {} // somebody waited for it meanwhile
                    Turn::Keep => self.decode(i)?,
                    Turn::Drop => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Decodes a tensor, and as many of the next ones as are worth it together.
    fn decode(&mut self, first: usize) -> Result<()> {
        let known = self.request.tensors.len();
        let size = |i: usize| self.request.decoded[i - known];
        let mut batch = vec![first];
        {
            let state = self.shared.lock();
            let room =
                if state.goal == Goal::All { u64::MAX } else { self.request.read_ahead.saturating_sub(state.ahead) };
            let mut rest = room.min(BATCH).saturating_sub(size(first));
            for i in (first + 1..known + self.request.decoded.len()).filter(|&i| !state.done[i]) {
                let Some(left) = rest.checked_sub(size(i)) else { break };
                rest = left;
                batch.push(i);
            }
        }
        let blocks: Vec<_> = batch.iter().map(|&i| Arc::new(Block::new(size(i) as usize))).collect();
        // SAFETY: each block has one slot, and is not shared yet.
        let mut slots: Vec<_> = blocks.iter().map(|block| unsafe { block.slot(0, block.len()) }).collect();
        let numbers: Vec<_> = batch.iter().map(|i| i - known).collect();
        let source = UntilStopped { source: &*self.request.source, shared: self.shared };
        (self.request.decode)(&source, &numbers, &mut slots)?;
        let mut state = self.shared.lock();
        for (i, block) in batch.into_iter().zip(blocks) {
            state.ahead += block.len() as u64;
            state.read += block.len() as u64;
            state.slots[i] = Some(Slot { start: 0, len: block.len(), block });
            state.done[i] = true;
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }
}

/// The file, until nobody wants it any more.
struct UntilStopped<'a> {
    source: &'a dyn ReadAt,
    shared: &'a Shared,
}

impl ReadAt for UntilStopped<'_> {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.shared.lock().goal == Goal::Stop {
            return Err(stopped());
        }
        self.source.read_at(buf, offset)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        self.source.as_slice().filter(|_| self.shared.lock().goal != Goal::Stop)
    }
}

/// Reads what is small in large steps, until it is told to stop.
struct Reader<'a> {
    request: &'a Request,
    shared: &'a Shared,
    stage: Vec<u8>,
    staged: std::ops::Range<u64>,
}

impl Reader<'_> {
    /// Fills `out` with the extent: from what is staged, then directly where it is large.
    fn fill(&mut self, extent: Extent, out: &mut [u8], each: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            self.go_on()?;
            let at = extent.offset + done as u64;
            let rest = out.len() - done;
            let n = if rest >= STEP && !self.staged.contains(&at) {
                self.request.source.read_at(&mut out[done..done + STEP], self.request.image.offset + at)?;
                STEP
            } else {
                let staged = self.staged(at)?;
                let n = rest.min(staged.len());
                out[done..done + n].copy_from_slice(&staged[..n]);
                n
            };
            each(&out[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn each(&mut self, extent: Extent, each: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut at = extent.offset;
        let end = extent.offset + extent.len;
        while at < end {
            self.go_on()?;
            let staged = self.staged(at)?;
            let n = staged.len().min((end - at) as usize);
            each(&staged[..n]);
            at += n as u64;
        }
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        if self.shared.lock().goal == Goal::Stop { Err(stopped()) } else { Ok(()) }
    }

    /// Bytes of the image from `at` on: at least one, as many as were read together with it.
    fn staged(&mut self, at: u64) -> Result<&[u8]> {
        if !self.staged.contains(&at) {
            let n = (self.request.image.len - at).min(STEP as u64);
            self.stage.resize(n as usize, 0);
            self.request.source.read_at(&mut self.stage, self.request.image.offset + at)?;
            self.staged = at..at + n;
        }
        Ok(&self.stage[(at - self.staged.start) as usize..])
    }
}
