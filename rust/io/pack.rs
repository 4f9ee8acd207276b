//! Tensors → compressed chunks, in one pass: cut, transpose and deflate in threads, place, write in order.
//!
//! The caller's thread cuts and writes; a few chunks for every thread are in flight. Who places the chunks is asked
//! between the two, so that no lock of an engine is held while anything is compressed, written or waited for.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use flate2::{Compress, FlushCompress, Status};

use super::emit::{Image, Progress, Sink, Tensors, sized};
use crate::error::{Error, Kind, Result};
use crate::h5::filters::shuffle;
use crate::h5::{Compression, Engine};
use crate::limits;
use crate::tree::{Dataset, Tree};

/// Datasets of fewer bytes stay as they are: the index of the chunks alone takes 2.6 KB.
pub const WORTH_A_CHUNK: u64 = 16 << 10;
/// More threads than this only take memory: the caller's cannot write faster.
const MAX_THREADS: usize = 16;
/// Chunks in flight for every thread: one at work, one waiting, one done.
const IN_FLIGHT: usize = 3;

/// Bytes of a chunk that deflate to more than a thousandth, whatever they are.
const SURELY_NO_BOMB: u64 = 256 << 10;

/// Bytes that are deflated, or stored, together.
const SEGMENT: usize = 64 << 10;
/// Bytes of a segment that are tried first.
const SAMPLE: usize = 8 << 10;
/// From this level on everything is deflated.
const THOROUGH: u32 = 7;

/// Threads that are worth having for `jobs` pieces of work.
pub(crate) fn threads(jobs: usize) -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(jobs)
}

/// Compresses and writes the tensors of `tree` to `base` of `sink`; returns the bytes of the image and its CRC-32.
///
/// # Errors
/// Those of the engine, of `tensors` and `sink`; `Cancelled`; `Invalid` when a tensor has not its size or the sink
/// cannot be patched.
pub fn pack(
    engine: &dyn Engine,
    tree: &Tree,
    how: Compression,
    tensors: &mut dyn Tensors,
    base: u64,
    sink: &mut dyn Sink,
    progress: &Progress,
) -> Result<(u64, u32)> {
    if !sink.can_patch() {
        return Err(Error::new(Kind::Invalid, "a compressed save needs a file object that can seek")
            .with_advice("Save to a path or an io.BytesIO, or without compression."));
    }
    let shapes: Vec<_> = tree.datasets().iter().map(|d| chunk_shape(d, how.chunk_bytes)).collect();
    let mut placing = engine.lay_out_chunked(tree, &shapes, how)?;
    let mut image = Image::new(base, sink, progress);
    image.put_layout(placing.layout(), tree.datasets(), tensors)?;

    let count: u64 = tree.datasets().iter().zip(&shapes).filter_map(|(d, s)| Some(cells(d, s.as_ref()?))).sum();
    let threads = threads(count.try_into().unwrap_or(usize::MAX));
    let (to, jobs) = channel();
    let jobs = Mutex::new(jobs);
    std::thread::scope(|scope| {
        let (back, done) = channel();
        for _ in 0..threads {
            let (jobs, back) = (&jobs, back.clone());
            scope.spawn(move || Worker::new(how).run(jobs, &back));
        }
        drop(back);
        let write = |job: &Job| {
            let at = placing.place(job.dataset, &job.start, job.skipped, &job.packed)?;
            image.put_at(at, &job.packed)
        };
        let mut line = Line { to, done, write, waiting: VecDeque::new(), spare: Vec::new(), first: 0, next: 0 };
        for (i, (dataset, shape)) in tree.datasets().iter().zip(&shapes).enumerate() {
            let Some(shape) = shape else { continue };
            let bytes = sized(tensors.tensor(i)?, dataset)?;
            for_each_chunk(dataset, shape, |start, range, len| {
                let mut job = line.room(threads * IN_FLIGHT)?;
                job.dataset = i;
                job.element = dataset.dtype.size();
                job.start.clear();
                job.start.extend_from_slice(start);
                job.raw.clear();
                job.raw.extend_from_slice(&bytes[range]);
                job.raw.resize(len, 0);
                line.send(job);
                Ok(())
            })
            .map_err(|e| e.with_entry(&dataset.path))?;
        }
        while !line.waiting.is_empty() {
            line.settle()?;
        }
        Result::Ok(())
    })?;

    let layout = placing.finish()?;
    for (at, bytes) in &layout.metadata {
        image.put_at(*at, bytes)?;
    }
    Ok((layout.len, image.finish(layout.len)?))
}

/// The shape of a dataset's chunks: runs of whole rows of about `limit` bytes, so that a chunk is one run of the
/// tensor. `None` for what stays as it is.
fn chunk_shape(dataset: &Dataset, limit: u64) -> Option<Vec<u64>> {
    if dataset.shape.is_empty() || dataset.nbytes < WORTH_A_CHUNK {
        return None;
    }
    // A chunk of zeros shrinks more the larger it is: too much for Keras' limit on large datasets.
    let limit = if dataset.nbytes > limits::BOMB_FLOOR_BYTES { limit.min(SURELY_NO_BOMB) } else { limit };
    let mut chunk = dataset.shape.clone();
    let mut bytes = dataset.nbytes;
    for dim in &mut chunk {
        if bytes <= limit {
            break;
        }
        let row = bytes / *dim;
        let most = (limit / row).max(1);
        *dim = dim.div_ceil(dim.div_ceil(most)); // as equal as can be: the last one is padded
        bytes = row * *dim;
    }
    Some(chunk)
}

/// How many chunks a dataset has.
fn cells(dataset: &Dataset, chunk: &[u64]) -> u64 {
    dataset.shape.iter().zip(chunk).map(|(s, c)| s.div_ceil(*c)).product()
}

/// Calls `f(start, range of the tensor's bytes, bytes of a whole chunk)` for every chunk, in order.
fn for_each_chunk(
    dataset: &Dataset,
    chunk: &[u64],
    mut f: impl FnMut(&[u64], std::ops::Range<usize>, usize) -> Result<()>,
) -> Result<()> {
    let shape = &dataset.shape;
    // Before this dimension a chunk is one element high, behind it as long as the tensor.
    let cut = chunk.iter().position(|&c| c > 1).unwrap_or(chunk.len() - 1);
    let row = shape[cut + 1..].iter().product::<u64>() as usize * dataset.dtype.size();
    let mut start = vec![0; shape.len()];
    let mut at = 0;
    loop {
        let rows = chunk[cut].min(shape[cut] - start[cut]) as usize;
        f(&start, at..at + rows * row, chunk[cut] as usize * row)?;
        at += rows * row;
        let Some(d) = (0..=cut).rev().find(|&d| start[d] + chunk[d] < shape[d]) else { return Ok(()) };
        start[d] += chunk[d];
        start[d + 1..].fill(0);
    }
}

/// A chunk on its way.
#[derive(Default)]
struct Job {
    number: u64,
    dataset: usize,
    element: usize,
    start: Vec<u64>,
    raw: Vec<u8>,
    packed: Vec<u8>,
    skipped: u32,
    failed: bool,
}

/// The caller's end: chunks go out as there is room and are written in the order they went.
struct Line<W> {
    to: Sender<Job>,
    done: Receiver<Job>,
    write: W,
    waiting: VecDeque<Option<Job>>, // from number `first` on
    spare: Vec<Job>,
    first: u64,
    next: u64,
}

impl<W: FnMut(&Job) -> Result<()>> Line<W> {
    /// A job to fill, when fewer than `most` are on their way.
    fn room(&mut self, most: usize) -> Result<Job> {
        while self.waiting.len() >= most {
            self.settle()?;
        }
        Ok(self.spare.pop().unwrap_or_default())
    }

    fn send(&mut self, mut job: Job) {
        job.number = self.next;
        self.next += 1;
        self.waiting.push_back(None);
        let _ = self.to.send(job); // if nobody is left, `settle` says so
    }

    /// Waits for one chunk; writes it, and what waited for it.
    fn settle(&mut self) -> Result<()> {
        let job = self.done.recv().ok().filter(|job| !job.failed);
        let job = job.ok_or_else(|| Error::new(Kind::Invalid, "a thread that compresses panicked"))?;
        let place = (job.number - self.first) as usize;
        self.waiting[place] = Some(job);
        while let Some(job) = self.waiting.front_mut().and_then(Option::take) {
            self.waiting.pop_front();
            self.first += 1;
            (self.write)(&job)?;
            self.spare.push(job);
        }
        Ok(())
    }
}

/// A thread that compresses.
struct Worker {
    how: Compression,
    zlib: Compress,
    storing: bool, // whether `zlib` stores just now
    shuffled: Vec<u8>,
    probe: Compress,
    probed: Vec<u8>,
}

impl Worker {
    fn new(how: Compression) -> Self {
        let zlib = Compress::new(flate2::Compression::new(how.level), true);
        let probe = Compress::new(flate2::Compression::fast(), false);
        Self { how, zlib, storing: false, shuffled: Vec::new(), probe, probed: Vec::with_capacity(SAMPLE) }
    }

    fn run(mut self, jobs: &Mutex<Receiver<Job>>, back: &Sender<Job>) {
        let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        while let Ok(mut job) = next() {
            job.failed = catch_unwind(AssertUnwindSafe(|| self.compress(&mut job))).is_err();
            if back.send(job).is_err() {
                return;
            }
        }
    }

    /// Transposes and deflates a chunk; one that gets no smaller stays as it is.
    fn compress(&mut self, job: &mut Job) {
        let mut shuffled = std::mem::take(&mut self.shuffled);
        let data = if self.how.shuffle && job.element > 1 {
            shuffled.resize(job.raw.len(), 0);
            shuffle(&job.raw, job.element, &mut shuffled);
            &shuffled
        } else {
            &job.raw
        };
        job.skipped = 0;
        if self.deflate(data, &mut job.packed).is_none() {
            job.packed.clear();
            job.packed.extend_from_slice(data);
            job.skipped = 1 << u32::from(self.how.shuffle); // deflate comes after shuffle
        }
        self.shuffled = shuffled;
    }

    /// Deflates `data` into fewer bytes, or not at all. Runs that would not shrink are stored within the stream: three
    /// of the four bytes of a weight look random, and to find that out takes longer than to compress the fourth.
    fn deflate(&mut self, data: &[u8], out: &mut Vec<u8>) -> Option<()> {
        out.clear();
        out.reserve_exact(data.len());
        let mut runs: Vec<(&[u8], bool)> = Vec::new(); // with whether to store it
        let (mut start, mut end) = (0, 0);
        for segment in data.chunks(SEGMENT) {
            let store = !self.shrinks(segment);
            match runs.last_mut() {
                Some((run, stored)) if *stored == store => *run = &data[start..end + segment.len()],
                _ => {
                    start = end;
                    runs.push((segment, store));
                }
            }
            end += segment.len();
        }
        if runs.iter().all(|run| run.1) {
            return None;
        }
        self.zlib.reset();
        for (i, &(run, store)) in runs.iter().enumerate() {
            if store != self.storing {
                // Nothing is pending: the stream was just reset or flushed.
                self.zlib.set_level(flate2::Compression::new(if store { 0 } else { self.how.level })).ok()?;
                self.storing = store;
            }
            let last = i + 1 == runs.len();
            let (from, before) = (self.zlib.total_in(), out.len());
            let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
            let status = self.zlib.compress_vec(run, out, flush).ok()?;
            let taken = self.zlib.total_in() - from == run.len() as u64 && out.len() > before;
            if !taken || (last && status != Status::StreamEnd) || out.len() >= data.len() {
                return None; // no room
            }
        }
        Some(())
    }

    /// Whether a segment is worth deflating, by a sample from its middle.
    fn shrinks(&mut self, segment: &[u8]) -> bool {
        if self.how.level == 0 {
            return false;
        }
        if self.how.level >= THOROUGH || segment.len() < 2 * SAMPLE {
            return true;
        }
        let sample = &segment[(segment.len() - SAMPLE) / 2..][..SAMPLE];
        self.probed.clear();
        self.probe.reset();
        let status = self.probe.compress_vec(sample, &mut self.probed, FlushCompress::Finish);
        matches!(status, Ok(Status::StreamEnd)) && self.probed.len() < SAMPLE - SAMPLE / 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn dataset(shape: &[u64], dtype: DType) -> Dataset {
        let nbytes = dtype.nbytes(shape).unwrap();
        Dataset { path: "x".into(), dtype, shape: shape.to_vec(), attributes: vec![], nbytes }
    }

    #[test]
    fn chunks_are_runs_that_cover_the_tensor() {
        for (shape, limit) in [
            (vec![1 << 20], 4096),
            (vec![1000, 1000], 4096),
            (vec![1000, 1000], 1000),
            (vec![3, 1, 70_001], 10_000),
            (vec![1, 1, 5000], 1 << 30),
            (vec![7, 11, 13, 17], 1000),
            (vec![5000, 1, 1], 1),
        ] {
            let d = dataset(&shape, DType::F32);
            let chunk = chunk_shape(&d, limit).unwrap();
            assert!(chunk.iter().zip(&shape).all(|(c, s)| (1..=*s).contains(c)));
            assert!(chunk.iter().product::<u64>() * 4 <= limit.max(4), "{chunk:?}");
            let (mut end, mut count, mut starts) = (0, 0, Vec::new());
            for_each_chunk(&d, &chunk, |start, range, len| {
                assert!(range.start == end && range.len() <= len);
                let mut first = 0;
                for (s, n) in start.iter().zip(&shape) {
                    first = first * n + s;
                }
                assert_eq!(first as usize * 4, range.start);
                starts.push(start.to_vec());
                (end, count) = (range.end, count + 1);
                Ok(())
            })
            .unwrap();
            assert_eq!((end as u64, count), (d.nbytes, cells(&d, &chunk)));
            assert!(starts.is_sorted());
        }
        for small in [dataset(&[], DType::F32), dataset(&[4095], DType::F32), dataset(&[1 << 20, 0], DType::F32)] {
            assert_eq!(chunk_shape(&small, 1 << 20), None);
        }
    }

    /// Stock Keras refuses a dataset of over 4 GiB that stands for more than 1,000 times what it stores.
    #[test]
    fn zeros_are_not_compressed_into_a_bomb() {
        let chunk = chunk_shape(&dataset(&[2 << 30], DType::F32), 1 << 20).unwrap();
        let how = Compression { level: 9, shuffle: true, chunk_bytes: 1 << 20 };
        let raw = vec![0; chunk[0] as usize * 4];
        let mut job = Job { raw, element: 4, ..Job::default() };
        Worker::new(how).compress(&mut job);
        assert!(job.packed.len() * 1000 > job.raw.len(), "{} bytes for {}", job.packed.len(), job.raw.len());
    }
}
