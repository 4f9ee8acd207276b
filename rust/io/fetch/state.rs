//! Who reads what: parts and batches are claimed and given back here, under the lock. No threads, no reading.

use std::sync::Arc;

use super::plan::Plan;
use super::{Request, Slot, stopped};
use crate::error::{Error, Kind, Result, try_with_capacity};
use crate::io::buffer::Block;

/// Bytes that are decoded together: enough for all threads to be busy to the end.
const BATCH: u64 = 32 << 20;

/// What the workers are to do; a later one is never taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Goal {
    /// Be ahead of whoever takes the tensors, by no more than `read_ahead`.
    #[default]
    Ahead,
    /// Read to the end, whatever the limit.
    All,
    /// Read to the end, and keep nothing more.
    Drain,
    /// Stop.
    Stop,
}

/// What one worker does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Reads a part of the plan; without `keep` only its checksum counts.
    Part { number: usize, keep: bool },
    /// Decodes these tensors together.
    Batch(Vec<usize>),
}

/// What became of a claim.
pub(super) enum Outcome {
    /// The caller was interrupted: others do all of it again.
    Interrupted,
    /// The worker panicked.
    Panicked,
    /// It was done, or failed; what was complete before is handed out either way.
    Done(Done),
}

/// The work on a claim.
pub(super) struct Done {
    pub(super) result: Result<()>,
    /// Tensors that are complete.
    pub(super) whole: Vec<(usize, Slot)>,
    /// Tensors with a block of their own, and how many more of their bytes were read.
    pub(super) partly: Vec<(usize, u64)>,
    /// Of the part, if there is one to be compared.
    pub(super) crc: u32,
}

/// Who asks for work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asks {
    /// Whether it is a thread of the reader's own; others are callers.
    pub(super) background: bool,
    /// The tensor that a caller waits for.
    pub(super) wants: Option<usize>,
}

/// How far a tensor is.
#[derive(Clone, Debug)]
enum Tensor {
    /// No byte of it was asked for yet, or it shares its block with others.
    Ahead,
    /// In a block of its own, with so many bytes still to come.
    Open(Arc<Block>, u64),
    /// Complete; `None` when it was taken, or has no bytes.
    Done(Option<Slot>),
}

pub(super) struct State {
    tensors: Vec<Tensor>, // plain ones, then those that are decoded
    next: usize,          // the first part that nobody claimed yet
    returned: Vec<usize>, // parts that were interrupted
    crcs: Vec<Option<u32>>,
    active: usize,                    // claims that are out
    decoding: bool,                   // one of them is a batch
    undecoded: usize,                 // all tensors to be decoded before this one are done
    ahead: u64,                       // bytes of tensors that are read or being read, and not taken
    pub(super) read: u64,             // bytes of tensors, taken or not
    pub(super) failed: Option<Error>, // the first failure, until it is the outcome
    pub(super) wanted: Vec<usize>,    // what callers are waiting for
    pub(super) callers: usize,        // that wait
    pub(super) idle: usize,           // background workers that wait
    pub(super) background: usize,     // background workers there are
    pub(super) goal: Goal,
    pub(super) outcome: Option<Result<()>>, // set once, when nobody works any more
}

impl State {
    /// # Errors
    /// `Memory`.
    pub(super) fn new(request: &Request, plan: &Plan) -> Result<Self> {
        let n = request.tensors.len() + request.decoded.len();
        let mut tensors = try_with_capacity(n)?;
        let empty = |len: u64| if len == 0 { Tensor::Done(None) } else { Tensor::Ahead };
        tensors.extend(request.tensors.iter().map(|t| empty(t.len)));
        tensors.resize(n, Tensor::Ahead);
        let mut crcs = try_with_capacity(plan.len())?;
        crcs.resize(plan.len(), None);
        Ok(Self {
            tensors,
            next: 0,
            returned: Vec::new(),
            crcs,
            active: 0,
            decoding: false,
            undecoded: request.tensors.len(),
            ahead: 0,
            read: 0,
            failed: None,
            wanted: Vec::new(),
            callers: 0,
            idle: 0,
            background: 0,
            goal: Goal::Ahead,
            outcome: None,
        })
    }

    /// Whether tensor `i` is complete, taken or not.
    pub(super) fn is_done(&self, i: usize) -> bool {
        matches!(self.tensors[i], Tensor::Done(_))
    }

    /// Takes tensor `i` out, if it is complete and was not taken before.
    pub(super) fn take(&mut self, i: usize) -> Option<Slot> {
        let Tensor::Done(slot) = &mut self.tensors[i] else { return None };
        let slot = slot.take()?;
        self.ahead -= slot.len as u64;
        Some(slot)
    }

    /// Whether there is room for more.
    pub(super) fn has_room(&self, request: &Request) -> bool {
        self.goal >= Goal::All || self.ahead < request.read_ahead
    }

    fn unclaimed(&self, plan: &Plan) -> bool {
        self.next < plan.len() || !self.returned.is_empty()
    }

    /// The next thing to do for whoever asks, if there is one.
    pub(super) fn claim(&mut self, request: &Request, plan: &Plan, asks: Asks) -> Option<Claim> {
        if self.goal == Goal::Stop || self.failed.is_some() || self.outcome.is_some() {
            return None;
        }
        // Callers decode nothing, and read nothing that runs code of others, unless there is nobody else.
        let alone = asks.background || self.background == 0;
        let plain = request.tensors.len();
        let wanted = |state: &Self, test: &dyn Fn(usize) -> bool| {
            state.wanted.iter().copied().chain(asks.wants).find(|&i| !state.is_done(i) && test(i))
        };
        if alone
            && !self.decoding
            && self.goal < Goal::Drain
            && let Some(first) = wanted(self, &|i| i >= plain)
        {
            return Some(self.claim_batch(request, first));
        }
        if self.unclaimed(plan) {
            let nearer = |i| plan.completes(i).is_some_and(|last| last >= self.next || !self.returned.is_empty());
            let useful = self.has_room(request) || wanted(self, &nearer).is_some();
            return (useful && (alone || request.source.is_native())).then(|| self.claim_part(plan));
        }
        while self.undecoded < self.tensors.len() && self.is_done(self.undecoded) {
            self.undecoded += 1;
        }
        let decode = self.undecoded < self.tensors.len() && self.goal < Goal::Drain && self.has_room(request);
        (alone && decode && !self.decoding).then(|| self.claim_batch(request, self.undecoded))
    }

    fn claim_part(&mut self, plan: &Plan) -> Claim {
        let number = self.returned.pop().unwrap_or(self.next);
        if number == self.next {
            self.next += 1;
        }
        let keep = self.goal < Goal::Drain;
        self.ahead += if keep { plan.part(number).of_tensors } else { 0 };
        self.active += 1;
        Claim::Part { number, keep }
    }

    /// `first`, and as many of the next ones as are worth it together.
    fn claim_batch(&mut self, request: &Request, first: usize) -> Claim {
        let size = |i: usize| request.decoded[i - request.tensors.len()];
        let room = if self.goal >= Goal::All { u64::MAX } else { request.read_ahead.saturating_sub(self.ahead) };
        let mut rest = room.min(BATCH).saturating_sub(size(first));
        let mut batch = vec![first];
        for i in (first + 1..self.tensors.len()).filter(|&i| !self.is_done(i)) {
            let Some(left) = rest.checked_sub(size(i)) else { break };
            rest = left;
            batch.push(i);
        }
        self.ahead += batch.iter().map(|&i| size(i)).sum::<u64>();
        self.active += 1;
        self.decoding = true;
        Claim::Batch(batch)
    }

    /// The block of a large tensor, which all its parts are read into.
    ///
    /// # Errors
    /// `Memory`.
    pub(super) fn block_of(&mut self, i: usize, len: u64) -> Result<Arc<Block>> {
        if let Tensor::Open(block, _) = &self.tensors[i] {
            return Ok(Arc::clone(block));
        }
        let block = Arc::new(Block::new(len as usize)?);
        self.tensors[i] = Tensor::Open(Arc::clone(&block), len);
        Ok(block)
    }

    /// Ends a claim, whatever became of it.
    pub(super) fn give_back(&mut self, request: &Request, plan: &Plan, claim: Claim, outcome: Outcome) {
        self.active -= 1;
        if matches!(claim, Claim::Batch(_)) {
            self.decoding = false;
        }
        match (outcome, claim) {
            (Outcome::Interrupted, Claim::Part { number, keep }) => {
                self.ahead -= if keep { plan.part(number).of_tensors } else { 0 };
                self.returned.push(number);
            }
            (Outcome::Interrupted, Claim::Batch(batch)) => {
                self.ahead -= batch.iter().map(|&i| request.decoded[i - request.tensors.len()]).sum::<u64>();
            }
            (Outcome::Panicked, _) => self.fail(Error::new(Kind::Internal, "the reader panicked")),
            (Outcome::Done(done), claim) => {
                for (i, n) in done.partly {
                    self.read += n;
                    if let Tensor::Open(block, left) = &mut self.tensors[i] {
                        *left -= n;
                        if *left == 0 {
                            let slot = Slot { len: block.len(), start: 0, block: Arc::clone(block) };
                            self.tensors[i] = Tensor::Done(Some(slot));
                        }
                    }
                }
                for (i, slot) in done.whole {
                    self.read += slot.len as u64;
                    self.tensors[i] = Tensor::Done(Some(slot));
                }
                match (done.result, claim) {
                    (Err(error), _) => self.fail(error),
                    (Ok(()), Claim::Part { number, .. }) => self.crcs[number] = Some(done.crc),
                    (Ok(()), Claim::Batch(_)) => {}
                }
            }
        }
        self.settle(request, plan);
    }

    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }

    /// Sets the outcome, if nobody works and nobody will.
    pub(super) fn settle(&mut self, request: &Request, plan: &Plan) {
        if self.active > 0 || self.outcome.is_some() {
            return;
        }
        let decoded = |s: &Self| s.goal == Goal::Drain || (s.undecoded..s.tensors.len()).all(|i| s.is_done(i));
        let outcome = match self.failed.take() {
            Some(error) => Err(error),
            None if self.goal == Goal::Stop => Err(stopped()),
            None if !self.unclaimed(plan) && decoded(self) => self.check_crc(request, plan),
            None => return,
        };
        self.outcome = Some(outcome);
        for tensor in &mut self.tensors {
            if matches!(tensor, Tensor::Open(..)) {
                *tensor = Tensor::Ahead; // its memory
            }
        }
    }

    /// Folds the checksums of the parts, which together are the image.
    fn check_crc(&self, request: &Request, plan: &Plan) -> Result<()> {
        let Some(expected) = request.crc else { return Ok(()) };
        let mut all = crc32fast::Hasher::new();
        for (number, crc) in self.crcs.iter().enumerate() {
            let crc = crc.expect("all parts were read");
            all.combine(&crc32fast::Hasher::new_with_initial_len(crc, plan.part(number).len));
        }
        let found = all.finalize();
        if found == expected {
            return Ok(());
        }
        Err(Error::new(Kind::Crc, "Bad CRC-32 for the weights")
            .with_found(format_args!("{expected:08x}"), format_args!("{found:08x}"))
            .with_advice("Their bytes changed after they were written; use another copy."))
    }
}
