//! What a worker does, in the background or in the thread of a caller that would have to wait.
#![allow(unsafe_code)] // writes into blocks that are not shared until they are complete

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::plan::{Piece, Plan};
use super::state::{Asks, Claim, Done, Goal, Outcome, State};
use super::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering};
use super::{Extent, Interrupt, POLL, Patience, Request, Slot, stopped};
use crate::error::{Result, try_with_capacity};
use crate::image::ALIGNMENT;
use crate::io::ReadAt;
use crate::io::buffer::{Block, OWN_BLOCK};

/// Bytes per read of what is small or skipped; larger tensors are read in such steps too, so that the CRC finds them
/// in cache.
const STEP: usize = 256 << 10;

/// What all workers of a read share.
pub(super) struct Shared {
    request: Request,
    plan: Plan,
    state: Mutex<State>,
    idle: Condvar,    // background workers wait for something to do
    changed: Condvar, // callers wait for a tensor or the outcome
    stop: AtomicBool, // as the goal says, without the lock
}

/// One worker.
pub(super) struct Worker<'a> {
    asks: Asks,
    patience: Option<Patience<'a>>, // of a caller
    interrupted: bool,
    stage: Vec<u8>,
    staged: Range<u64>,
    end: u64, // of what is worth staging
}

impl<'a> Worker<'a> {
    /// In the thread of a caller, who waits for a tensor or for all of them.
    pub(super) fn caller(interrupt: Interrupt<'a>, wants: Option<usize>) -> Self {
        Self::new(Asks { background: false, wants }, Some(Patience::new(interrupt)))
    }

    fn new(asks: Asks, patience: Option<Patience<'a>>) -> Self {
        Self { asks, patience, interrupted: false, stage: Vec::new(), staged: 0..0, end: 0 }
    }

    /// Asks the caller from time to time whether to go on.
    fn poll(&mut self) -> Result<()> {
        let Some(patience) = &mut self.patience else { return Ok(()) };
        patience.ask().inspect_err(|_| self.interrupted = true)
    }
}

/// A claim while it is worked on. Dropped, also by a panic, it is given back.
struct Claimed<'a> {
    shared: &'a Shared,
    claim: Option<Claim>,
    outcome: Outcome,
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let Some(claim) = self.claim.take() else { return };
        let outcome = std::mem::replace(&mut self.outcome, Outcome::Panicked);
        let mut state = self.shared.lock();
        state.give_back(&self.shared.request, &self.shared.plan, claim, outcome);
        self.shared.wake_all(&state);
    }
}

impl Shared {
    pub(super) fn new(request: Request, plan: Plan, state: State) -> Self {
        let (idle, changed) = (Condvar::new(), Condvar::new());
        Self { request, plan, state: Mutex::new(state), idle, changed, stop: AtomicBool::new(false) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    pub(super) fn wake_idle(&self) {
        self.idle.notify_all();
    }

    fn wake_all(&self, state: &State) {
        if state.idle > 0 {
            self.idle.notify_all();
        }
        if state.callers > 0 {
            self.changed.notify_all();
        }
    }

    pub(super) fn set_goal(&self, goal: Goal) {
        let mut state = self.lock();
        state.goal = state.goal.max(goal);
        if goal == Goal::Stop {
            self.stop.store(true, Ordering::Relaxed);
        }
        state.settle(&self.request, &self.plan);
        self.wake_all(&state);
    }

    /// A background thread: works until there is an outcome.
    pub(super) fn run_in_background(&self) {
        let mut worker = Worker::new(Asks { background: true, wants: None }, None);
        // Nothing interrupts it, so it ends without an error.
        let _ = self.work(&mut worker, |state| (state.outcome.is_some() || state.goal == Goal::Stop).then_some(()));
    }

    /// Does what there is to do until `end` has an answer, and waits where there is nothing.
    ///
    /// # Errors
    /// What the worker's interrupt returns.
    pub(super) fn work<T>(&self, worker: &mut Worker<'_>, mut end: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let mut state = self.lock();
        loop {
            if let Some(answer) = end(&mut state) {
                return Ok(answer);
            }
            match state.claim(&self.request, &self.plan, worker.asks) {
                Some(claim) => {
                    drop(state);
                    self.perform(claim, worker)?;
                    state = self.lock();
                }
                None if worker.asks.background => {
                    state.idle += 1;
                    state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
                    state.idle -= 1;
                }
                None => {
                    state = self.wait(state, worker);
                    if worker.patience.as_ref().is_some_and(Patience::is_over) {
                        drop(state);
                        worker.poll()?;
                        state = self.lock();
                    }
                }
            }
        }
    }

    /// A caller's wait, of no more than [`POLL`]; says what it is for.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, worker: &Worker<'_>) -> MutexGuard<'a, State> {
        state.wanted.extend(worker.asks.wants);
        state.callers += 1;
        if state.idle > 0 {
            self.idle.notify_all();
        }
        let (mut state, _) = self.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner);
        state.callers -= 1;
        if let Some(at) = worker.asks.wants.and_then(|i| state.wanted.iter().position(|&wanted| wanted == i)) {
            state.wanted.swap_remove(at);
        }
        state
    }

    /// Does what was claimed.
    ///
    /// # Errors
    /// What the worker's interrupt returns; other errors are the outcome of the read.
    fn perform(&self, claim: Claim, worker: &mut Worker<'_>) -> Result<()> {
        let mut claimed = Claimed { shared: self, claim: Some(claim), outcome: Outcome::Panicked };
        let mut done = Done { result: Ok(()), whole: Vec::new(), partly: Vec::new(), crc: 0 };
        done.result = match claimed.claim.as_ref().expect("just set") {
            Claim::Part { number, keep } => self.read_part(*number, *keep, worker, &mut done),
            Claim::Batch(batch) => self.decode(batch, &mut done),
        };
        if !worker.interrupted {
            claimed.outcome = Outcome::Done(done);
            return Ok(());
        }
        claimed.outcome = Outcome::Interrupted;
        done.result
    }

    /// Reads a part, and notes the tensors that it completes.
    fn read_part(&self, number: usize, keep: bool, worker: &mut Worker<'_>, done: &mut Done) -> Result<()> {
        let mut crc = crc32fast::Hasher::new();
        let checked = self.request.crc.is_some();
        let mut update = |bytes: &[u8]| {
            if checked {
                crc.update(bytes);
            }
        };
        let (part, pieces) = (self.plan.part(number), self.plan.pieces(number));
        worker.end = pieces.last().map_or(0, |last| last.extent.offset + last.extent.len);
        let arena = Arc::new(Block::new(if keep { part.arena } else { 0 })?);
        let mut used = 0;
        done.whole = try_with_capacity(if keep { pieces.len() } else { 0 })?;
        for &Piece { extent, tensor } in pieces {
            let len = extent.len as usize;
            match tensor.filter(|_| keep) {
                None if checked => self.each(worker, extent, &mut update)?,
                None => {}
                Some((i, _)) if self.request.tensors[i].len < OWN_BLOCK as u64 => {
                    let start = used;
                    used = (start + len).next_multiple_of(ALIGNMENT as usize);
                    // SAFETY: the arena is this part's alone until its slots are handed out, and they do not overlap.
                    self.fill(worker, extent, unsafe { arena.slot(start, len) }, &mut update)?;
                    done.whole.push((i, Slot { block: Arc::clone(&arena), start, len }));
                }
                Some((i, at)) => {
                    let block = self.lock().block_of(i, self.request.tensors[i].len)?;
                    // SAFETY: a part is claimed by one worker at a time, pieces do not overlap, and the block is not
                    // handed out before all of them were read.
                    self.fill(worker, extent, unsafe { block.slot(at, len) }, &mut update)?;
                    done.partly.push((i, extent.len));
                }
            }
        }
        done.crc = crc.finalize();
        Ok(())
    }

    /// Decodes tensors together.
    fn decode(&self, batch: &[usize], done: &mut Done) -> Result<()> {
        let plain = self.request.tensors.len();
        let size = |i: usize| self.request.decoded[i - plain];
        let mut blocks = try_with_capacity(batch.len())?;
        for &i in batch {
            blocks.push(Block::new(size(i) as usize)?);
        }
        // SAFETY: each block has one slot, and is not shared yet.
        let mut slots: Vec<_> = blocks.iter().map(|block| unsafe { block.slot(0, block.len()) }).collect();
        let numbers: Vec<_> = batch.iter().map(|i| i - plain).collect();
        (self.request.decode)(&UntilStopped(self), &numbers, &mut slots)?;
        drop(slots);
        let slot = |block: Block| Slot { start: 0, len: block.len(), block: Arc::new(block) };
        done.whole = batch.iter().copied().zip(blocks.into_iter().map(slot)).collect();
        Ok(())
    }

    /// Fills `out` with the extent: from what is staged, then directly where it is large.
    fn fill(&self, worker: &mut Worker<'_>, extent: Extent, out: &mut [u8], each: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            self.go_on(worker)?;
            let at = extent.offset + done as u64;
            let rest = out.len() - done;
            let n = if rest >= STEP && !worker.staged.contains(&at) {
                self.request.source.read_at(&mut out[done..done + STEP], self.request.image.offset + at)?;
                STEP
            } else {
                let staged = self.staged(worker, at)?;
                let n = rest.min(staged.len());
                out[done..done + n].copy_from_slice(&staged[..n]);
                n
            };
            each(&out[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn each(&self, worker: &mut Worker<'_>, extent: Extent, each: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut at = extent.offset;
        let end = extent.offset + extent.len;
        while at < end {
            self.go_on(worker)?;
            let staged = self.staged(worker, at)?;
            let n = staged.len().min((end - at) as usize);
            each(&staged[..n]);
            at += n as u64;
        }
        Ok(())
    }

    fn go_on(&self, worker: &mut Worker<'_>) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        worker.poll()
    }

    /// Bytes of the image from `at` on: at least one, as many as were read together with it.
    fn staged<'w>(&self, worker: &'w mut Worker<'_>, at: u64) -> Result<&'w [u8]> {
        if !worker.staged.contains(&at) {
            let n = (worker.end - at).min(STEP as u64);
            worker.staged = 0..0; // nothing, should the read fail
            worker.stage.resize(n as usize, 0);
            self.request.source.read_at(&mut worker.stage, self.request.image.offset + at)?;
            worker.staged = at..at + n;
        }
        Ok(&worker.stage[(at - worker.staged.start) as usize..])
    }
}

/// The file, until nobody wants it any more.
struct UntilStopped<'a>(&'a Shared);

impl ReadAt for UntilStopped<'_> {
    fn len(&self) -> u64 {
        self.0.request.source.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.0.stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        self.0.request.source.read_at(buf, offset)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        self.0.request.source.as_slice().filter(|_| !self.0.stop.load(Ordering::Relaxed))
    }
}
