//! Extents → aligned memory, in file order, in a background thread, with the CRC on the way.
//!
//! The reader runs ahead of whoever takes the tensors by a bounded number of bytes, unless a later tensor is asked
//! for. Whoever would have to wait for it reads the next part instead: then there are two readers, and no core idles.
//! Every byte of the image passes the CRC, also those between tensors. What is no plain run of bytes is decoded by
//! whoever knows how, in the reader's thread.
#![allow(unsafe_code)] // writes into blocks that are not shared until they are complete

use std::collections::BTreeMap;
use std::ops::Range;
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

/// Bytes of a part: what one thread reads before it looks for more.
const PART: u64 = OWN_BLOCK as u64;

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

/// A read in progress. Dropping it stops the reader.
pub struct Fetch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    request: Request,
    plan: Vec<Run>,
    order: Vec<usize>, // tensor → its place in the plan
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slots: Vec<Option<Slot>>,
    done: Vec<bool>,
    ahead: u64,                               // bytes of tensors that are read or being read, and not taken
    read: u64,                                // bytes of tensors, taken or not
    run: usize,                               // where the next part begins: in this run of the plan,
    at: u64,                                  // at this byte of it
    parts: usize,                             // how many there were so far
    returned: Vec<Part>,                      // by those who were interrupted
    active: usize,                            // parts being read
    open: BTreeMap<usize, (Arc<Block>, u64)>, // tensors with a block of their own, and the bytes still to come
    checksum: Checksum,
    failed: Option<Error>, // of a helper
    wanted: Option<usize>, // the tensor somebody waits for
    takers: usize,         // who do
    blocked: bool,         // the reader waits for one of them
    goal: Goal,
    outcome: Option<Result<()>>,
    asked: Option<Instant>, // when a waiting caller was last asked whether to go on
}

/// The CRC-32 of the image, put together from those of runs of parts.
#[derive(Default)]
struct Checksum {
    all: crc32fast::Hasher, // of the parts before `next`
    next: usize,
    later: BTreeMap<usize, (usize, crc32fast::Hasher)>,
}

impl Checksum {
    fn add(&mut self, parts: Range<usize>, crc: crc32fast::Hasher) {
        self.later.insert(parts.start, (parts.end, crc));
        while let Some((end, crc)) = self.later.remove(&self.next) {
            self.all.combine(&crc);
            self.next = end;
        }
    }
}

/// What is read in one go.
struct Part {
    number: usize,
    pieces: Vec<Piece>,
    arena: usize, // bytes of the small tensors in it, each at a multiple of the alignment
    keep: bool,
    cut: bool, // by the limit: whoever reads it has the next one as well
}

/// A run of bytes of the image: `at` of a tensor, or between tensors.
struct Piece {
    extent: Extent,
    tensor: Option<usize>,
    at: usize,
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

impl State {
    fn check_stop(&self) -> Result<()> {
        if self.goal == Goal::Stop { Err(stopped()) } else { Ok(()) }
    }

    /// Whether to go on: an error of a helper's is the reader's too.
    fn check(&mut self) -> Result<()> {
        self.check_stop()?;
        self.failed.take().map_or(Ok(()), Err)
    }
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

    /// Whether there is a part to be claimed; waits for those that others are reading, which may come back.
    fn more(&self) -> Result<bool> {
        let mut state = self.lock();
        loop {
            state.check()?;
            if state.run < self.plan.len() || !state.returned.is_empty() {
                return Ok(true);
            }
            if state.active == 0 {
                return Ok(false);
            }
            state = self.wait(state);
        }
    }

    /// Whether a part that is still to be claimed brings tensor `i` nearer.
    fn is_ahead(&self, state: &State, i: usize) -> bool {
        self.order.get(i).is_some_and(|&run| run >= state.run || !state.returned.is_empty())
    }

    /// The next part, if there is one.
    fn claim(&self, state: &mut State) -> Option<Part> {
        let part = state.returned.pop().or_else(|| self.next_part(state))?;
        state.active += 1;
        Some(part)
    }

    fn next_part(&self, state: &mut State) -> Option<Part> {
        let keep = state.goal != Goal::Drain;
        let room = self.request.read_ahead.saturating_sub(state.ahead);
        let most = if state.goal >= Goal::All { PART } else { room.min(PART) };
        let mut part = Part { number: state.parts, pieces: Vec::new(), arena: 0, keep, cut: most < PART };
        let mut len = 0;
        while let Some(&(run, tensor)) = self.plan.get(state.run) {
            let n = (run.len - state.at).min(PART);
            let small = keep && tensor.is_some() && run.len < OWN_BLOCK as u64;
            let arena = if small { part.arena + (n as usize).next_multiple_of(ALIGNMENT as usize) } else { part.arena };
            if !part.pieces.is_empty() && (len + n > most || arena > OWN_BLOCK) {
                break;
            }
            let extent = Extent { offset: run.offset + state.at, len: n };
            part.pieces.push(Piece { extent, tensor, at: state.at as usize });
            (len, part.arena) = (len + n, arena);
            state.ahead += if keep && tensor.is_some() { n } else { 0 };
            state.at += n;
            if state.at == run.len {
                (state.run, state.at) = (state.run + 1, 0);
            }
        }
        if part.pieces.is_empty() {
            return None;
        }
        state.parts += 1;
        Some(part)
    }

    /// A part for somebody who waits for tensor `wanted`, or for all.
    fn part_for(&self, state: &mut State, wanted: Option<usize>) -> Option<Part> {
        let useful = match state.goal {
            Goal::Stop => false,
            Goal::All | Goal::Drain => true,
            Goal::Ahead => state.ahead < self.request.read_ahead || wanted.is_some_and(|i| self.is_ahead(state, i)),
        };
        if useful && state.failed.is_none() && self.request.source.is_ours() { self.claim(state) } else { None }
    }

    /// Reads a part in the thread of somebody who would wait otherwise.
    fn help<'a>(&'a self, part: Part, reader: &mut Reader<'a>) -> Result<()> {
        let mut crc = crc32fast::Hasher::new();
        let result = self.read_part(&part, reader, &mut crc);
        // All that the reader needs to know comes with the end of the part, or it might be done too early.
        let mut state = self.lock();
        state.active -= 1;
        let mut interrupted = Ok(());
        match result {
            Ok(()) => state.checksum.add(part.number..part.number + 1, crc),
            Err(error) if reader.interrupted => {
                state.returned.push(part);
                interrupted = Err(error);
            }
            Err(error) => state.failed = state.failed.take().or(Some(error)),
        }
        drop(state);
        self.changed.notify_all();
        interrupted
    }

    /// Reads a part, and hands out the tensors that it completes.
    fn read_part(&self, part: &Part, reader: &mut Reader<'_>, crc: &mut crc32fast::Hasher) -> Result<()> {
        let checked = self.request.crc.is_some();
        let mut update = |bytes: &[u8]| {
            if checked {
                crc.update(bytes);
            }
        };
        reader.end = match part.pieces.last() {
            Some(last) if !part.cut => last.extent.offset + last.extent.len,
            _ => self.request.image.len,
        };
        let arena = Arc::new(Block::new(part.arena));
        let mut used = 0;
        let mut whole = Vec::new();
        let mut partly = Vec::new();
        let mut read = || {
            for piece in &part.pieces {
                let len = piece.extent.len as usize;
                match piece.tensor.filter(|_| part.keep) {
                    None if checked => reader.each(piece.extent, &mut update)?,
                    None => {}
                    Some(i) if self.request.tensors[i].len < OWN_BLOCK as u64 => {
                        let start = used;
                        used = (start + len).next_multiple_of(ALIGNMENT as usize);
                        // SAFETY: the arena is this part's alone until its slots are handed out, and they do not overlap.
                        reader.fill(piece.extent, unsafe { arena.slot(start, len) }, &mut update)?;
                        whole.push((i, Slot { block: Arc::clone(&arena), start, len }));
                    }
                    Some(i) => {
                        let block = self.block_of(i);
                        // SAFETY: a piece is read by one thread at a time, pieces do not overlap, and the block is not
                        // handed out before all of them were read.
                        reader.fill(piece.extent, unsafe { block.slot(piece.at, len) }, &mut update)?;
                        partly.push((i, piece.extent.len));
                    }
                }
            }
            Ok(())
        };
        let result = read();
        if result.is_err() && reader.interrupted {
            return result; // all of it will be read again
        }
        let mut state = self.lock();
        for (i, n) in partly {
            state.read += n;
            let (_, left) = state.open.get_mut(&i).expect("open until it is complete");
            *left -= n;
            if *left == 0 {
                let (block, _) = state.open.remove(&i).expect("just seen");
                whole.push((i, Slot { len: block.len(), start: 0, block }));
                state.read -= whole[whole.len() - 1].1.len as u64; // counted piece by piece
            }
        }
        for (i, slot) in whole {
            state.read += slot.len as u64;
            state.slots[i] = Some(slot);
            state.done[i] = true;
        }
        let wake = state.takers > 0;
        drop(state);
        if wake {
            self.changed.notify_all();
        }
        result
    }

    /// The block of a large tensor, all of whose pieces are read into it.
    fn block_of(&self, i: usize) -> Arc<Block> {
        let len = self.request.tensors[i].len;
        let mut state = self.lock();
        let (block, _) = state.open.entry(i).or_insert_with(|| (Arc::new(Block::new(len as usize)), len));
        Arc::clone(block)
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
        let mut order = vec![0; request.tensors.len()];
        for (position, (_, tensor)) in plan.iter().enumerate() {
            tensor.iter().for_each(|&i| order[i] = position);
        }
        let n = request.tensors.len() + request.decoded.len();
        let mut state = State { slots: vec![None; n], done: vec![false; n], ..State::default() };
        for (done, tensor) in state.done.iter_mut().zip(&request.tensors) {
            *done = tensor.len == 0;
        }
        let shared = Arc::new(Shared { request, plan, order, state: Mutex::new(state), changed: Condvar::new() });
        let in_thread = Arc::clone(&shared);
        let run = move || {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&in_thread)));
            let outcome = caught.unwrap_or_else(|_| Err(Error::new(Kind::Invalid, "the reader thread panicked")));
            let mut state = in_thread.lock();
            state.outcome = Some(outcome);
            state.open.clear();
            drop(state);
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
        let mut reader = None;
        let mut state = self.shared.lock();
        loop {
            if state.done[i] {
                let slot = state.slots[i].take();
                state.ahead -= slot.as_ref().map_or(0, |s| s.len as u64);
                // To wake the reader for each of 50,000 tensors takes longer than to read them.
                let wake = state.blocked;
                drop(state);
                if wake {
                    self.shared.changed.notify_all();
                }
                return Ok(slot);
            }
            if let Some(outcome) = &mut state.outcome {
                tell(outcome)?;
                return Ok(None);
            }
            state.wanted = Some(i);
            if let Some(part) = self.shared.part_for(&mut state, Some(i)) {
                drop(state);
                self.shared.help(part, reader.get_or_insert_with(|| Reader::new(&self.shared, Some(interrupt))))?;
                state = self.shared.lock();
                continue;
            }
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
        let mut reader = None;
        loop {
            if let Some(outcome) = &mut state.outcome {
                return tell(outcome);
            }
            if let Some(part) = self.shared.part_for(&mut state, None) {
                drop(state);
                self.shared.help(part, reader.get_or_insert_with(|| Reader::new(&self.shared, Some(interrupt))))?;
                state = self.shared.lock();
                continue;
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

/// The reader: one part after the other, as long as there is one and it may.
fn read(shared: &Shared) -> Result<()> {
    let mut reader = Reader::new(shared, None);
    let mut decoder = Decoder { request: &shared.request, shared };
    let mut run = 0..0; // parts that were read one after the other
    let mut crc = crc32fast::Hasher::new();
    while shared.more()? {
        decoder.turn(|state, i| shared.is_ahead(state, i))?;
        let Some(part) = shared.claim(&mut shared.lock()) else { continue };
        if part.number != run.end {
            if !run.is_empty() {
                shared.lock().checksum.add(run, std::mem::take(&mut crc));
            }
            run = part.number..part.number;
        }
        run.end += 1;
        shared.read_part(&part, &mut reader, &mut crc)?;
        shared.lock().active -= 1;
    }
    decoder.rest()?;
    let mut state = shared.lock();
    if !run.is_empty() {
        state.checksum.add(run, crc);
    }
    let found = std::mem::take(&mut state.checksum).all.finalize();
    match shared.request.crc {
        Some(expected) if found != expected => Err(Error::new(Kind::Crc, "Bad CRC-32 for the weights")
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
    fn turn(&mut self, ahead: impl Fn(&State, usize) -> bool) -> Result<Turn> {
        let mut state = self.shared.lock();
        loop {
            state.check()?;
            if state.goal == Goal::Drain {
                return Ok(Turn::Drop);
            }
            let asked = state.wanted.filter(|&i| !state.done[i]);
            if let Some(i) = asked.filter(|&i| i >= self.request.tensors.len()) {
                drop(state);
                self.decode(i)?;
                state = self.shared.lock();
            } else if state.goal == Goal::All
                || asked.is_some_and(|i| ahead(&state, i))
                || state.ahead < self.request.read_ahead
            {
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
                match self.turn(|_, _| false)? {
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
    shared: &'a Shared,
    interrupt: Option<Interrupt<'a>>,
    asked: Instant, // whether to go on
    interrupted: bool,
    stage: Vec<u8>,
    staged: Range<u64>,
    end: u64, // of what is worth staging
}

impl<'a> Reader<'a> {
    fn new(shared: &'a Shared, interrupt: Option<Interrupt<'a>>) -> Self {
        let (asked, interrupted, stage, staged) = (Instant::now(), false, Vec::new(), 0..0);
        Self { shared, interrupt, asked, interrupted, stage, staged, end: 0 }
    }

    /// Fills `out` with the extent: from what is staged, then directly where it is large.
    fn fill(&mut self, extent: Extent, out: &mut [u8], each: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            self.go_on()?;
            let at = extent.offset + done as u64;
            let rest = out.len() - done;
            let n = if rest >= STEP && !self.staged.contains(&at) {
                let request = &self.shared.request;
                request.source.read_at(&mut out[done..done + STEP], request.image.offset + at)?;
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

    fn go_on(&mut self) -> Result<()> {
        self.shared.lock().check_stop()?;
        if let Some(interrupt) = self.interrupt
            && self.asked.elapsed() >= POLL
        {
            self.asked = Instant::now();
            interrupt().inspect_err(|_| self.interrupted = true)?;
        }
        Ok(())
    }

    /// Bytes of the image from `at` on: at least one, as many as were read together with it.
    fn staged(&mut self, at: u64) -> Result<&[u8]> {
        if !self.staged.contains(&at) {
            let n = (self.end - at).min(STEP as u64);
            self.stage.resize(n as usize, 0);
            let request = &self.shared.request;
            request.source.read_at(&mut self.stage, request.image.offset + at)?;
            self.staged = at..at + n;
        }
        Ok(&self.stage[(at - self.staged.start) as usize..])
    }
}
