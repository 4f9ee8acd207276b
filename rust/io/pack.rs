//! Tensors → compressed chunks, in one pass: cut, transpose and deflate in threads, place, write in order.
//!
//! The caller's thread cuts and writes; a few chunks for every thread are in flight. Who places the chunks is asked
//! between the two, so that no lock of an engine is held while anything is compressed, written or waited for.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use flate2::{Compress, FlushCompress};

use super::emit::{Image, Progress, Sink, Tensors, sized};
use crate::error::{Error, Kind, Result, out_of_memory};
use crate::image::hdf5::filters::shuffle;
use crate::image::{Compression, Engine};
use crate::limits;
use crate::tree::{Dataset, Tree};

/// Datasets of fewer bytes stay as they are: the index of the chunks alone takes 2.6 KB.
pub const WORTH_A_CHUNK: u64 = 16 << 10;
/// More threads than this only take memory: the caller's cannot write faster.
const MAX_THREADS: usize = 16;
/// Chunks in flight for every thread: one at work, one waiting, one done.
const IN_FLIGHT: usize = 3;
/// Bytes of all chunks in flight, unless two have more.
const MAX_IN_FLIGHT: u64 = 256 << 20;

/// Bytes of a chunk that deflate to more than a thousandth, whatever they are.
const SURELY_NO_BOMB: u64 = 256 << 10;

/// Bytes that are deflated, or stored, together.
const SEGMENT: usize = 64 << 10;
/// Bytes of a segment that are tried first.
const SAMPLE: usize = 8 << 10;
/// Segments of fewer bytes are not tried.
const TOO_SHORT: usize = 1 << 10;
/// How they are tried.
const PROBE_LEVEL: u32 = 2;
/// From this level on everything is deflated.
const THOROUGH: u32 = 7;
/// RFC 1950: deflate, window of 32 KiB.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x01];
/// RFC 1951: what one stored block holds.
const STORED_BLOCK: usize = 0xffff;

/// Threads that are worth having for `jobs` pieces of work.
pub(crate) fn threads(jobs: usize) -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(jobs)
}

/// Whether `sink` takes what [`pack`] does to it.
///
/// # Errors
/// `Invalid` for one that cannot be patched.
pub fn check(sink: &dyn Sink) -> Result<()> {
    if sink.can_patch() {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, "a compressed save needs a file object that can seek")
        .with_advice("Save to a path or an io.BytesIO, or without compression."))
}

/// Compresses and writes the tensors of `tree` to `base` of `sink`; returns the bytes of the image and its CRC-32.
///
/// # Errors
/// Those of the engine, of `tensors` and `sink`; `Cancelled`; `Invalid` when a tensor has not its size. The sink must take
/// patches: [`check`].
pub fn pack(
    engine: &dyn Engine,
    tree: &Tree,
    how: Compression,
    tensors: &mut dyn Tensors,
    base: u64,
    sink: &mut dyn Sink,
    progress: &Progress,
) -> Result<(u64, u32)> {
    let shapes: Vec<_> = tree.datasets().iter().map(|d| chunk_shape(d, how.chunk_bytes)).collect();
    let mut placing = engine.lay_out_chunked(tree, &shapes, how)?;
    let mut image = Image::new(base, sink, progress).uncounted();
    image.put_layout(placing.layout(), tree.datasets(), tensors)?;
    let plain = tree.datasets().iter().zip(&shapes).filter(|(_, s)| s.is_none()).map(|(d, _)| d.nbytes).sum();
    progress.written.store(plain, Ordering::Relaxed);

    let count: u64 = tree.datasets().iter().zip(&shapes).filter_map(|(d, s)| Some(cells(d, s.as_ref()?))).sum();
    let threads = threads(count.try_into().unwrap_or(usize::MAX));
    let most = (threads * IN_FLIGHT).min((MAX_IN_FLIGHT / how.chunk_bytes).max(2) as usize);
    let (to, jobs) = channel();
    let jobs = Mutex::new(jobs);
    std::thread::scope(|scope| {
        let (back, done) = channel();
        for n in 0..threads {
            let (jobs, back) = (&jobs, back.clone());
            let started = std::thread::Builder::new().spawn_scoped(scope, move || Worker::new(how).work(jobs, &back));
            match started {
                Err(e) if n == 0 => return Err(Error::new(Kind::Io(e), "cannot start a thread that compresses")),
                Err(_) => break, // fewer do it, too
                Ok(_) => {}
            }
        }
        drop(back);
        let write = |job: &Job| {
            let at = placing.place(job.dataset, &job.start, job.skipped, &job.packed)?;
            progress.written.fetch_add(job.tensor_bytes, Ordering::Relaxed);
            image.put_at(at, &job.packed)
        };
        let mut pipeline = Pipeline { to, done, write, waiting: VecDeque::new(), spare: Vec::new(), first: 0, next: 0 };
        for (i, (dataset, shape)) in tree.datasets().iter().zip(&shapes).enumerate() {
            let Some(shape) = shape else { continue };
            let bytes = sized(tensors.tensor(i)?, dataset)?;
            for_each_chunk(dataset, shape, |start, range, len| {
                let mut job = pipeline.free_job(most)?;
                if progress.cancelled.load(Ordering::Relaxed) {
                    return Err(Error::new(Kind::Cancelled, "the save was cancelled"));
                }
                job.dataset = i;
                job.element = dataset.dtype.size();
                job.start.clear();
                job.start.extend_from_slice(start);
                job.raw.clear();
                job.tensor_bytes = range.len() as u64;
                job.raw.try_reserve(len).map_err(|_| out_of_memory(len))?;
                job.raw.extend_from_slice(&bytes[range]);
                job.raw.resize(len, 0);
                pipeline.send(job);
                Ok(())
            })
            .map_err(|e| e.with_entry(&dataset.path))?;
        }
        while !pipeline.waiting.is_empty() {
            pipeline.write_next()?;
        }
        Result::Ok(())
    })?;

    let layout = placing.finish()?;
    for (at, bytes) in &layout.metadata {
        image.put_at(*at, bytes)?;
    }
    // Without chunks the library may give back, at the end, what was written as zeros before.
    let len = layout.len.max(image.position());
    Ok((len, image.finish(len)?))
}

/// The shape of a dataset's chunks: whole rows of about `limit` bytes, so that a chunk is one range of the
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
    mut f: impl FnMut(&[u64], Range<usize>, usize) -> Result<()>,
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
    tensor_bytes: u64, // without padding
    start: Vec<u64>,
    raw: Vec<u8>,
    packed: Vec<u8>,
    skipped: u32,
    failed: bool,
}

/// The caller's end: a few chunks are on their way, and are written in the order they were sent.
struct Pipeline<W> {
    to: Sender<Job>,
    done: Receiver<Job>,
    write: W,
    waiting: VecDeque<Option<Job>>, // from number `first` on
    spare: Vec<Job>,
    first: u64,
    next: u64,
}

impl<W: FnMut(&Job) -> Result<()>> Pipeline<W> {
    /// A job to fill, when fewer than `most` are on their way.
    fn free_job(&mut self, most: usize) -> Result<Job> {
        while self.waiting.len() >= most {
            self.write_next()?;
        }
        Ok(self.spare.pop().unwrap_or_default())
    }

    fn send(&mut self, mut job: Job) {
        job.number = self.next;
        self.next += 1;
        self.waiting.push_back(None);
        let _ = self.to.send(job); // if nobody is left, `write_next` says so
    }

    /// Waits for one chunk; writes it, and what waited for it.
    fn write_next(&mut self) -> Result<()> {
        let job = self.done.recv().ok().filter(|job| !job.failed);
        let job = job.ok_or_else(|| Error::new(Kind::Internal, "a thread that compresses panicked"))?;
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
    probe: Compress,
    probed: Vec<u8>,
    shuffled: Vec<u8>,
}

impl Worker {
    fn new(how: Compression) -> Self {
        let deflate = |level| Compress::new(flate2::Compression::new(level), false);
        Self { how, zlib: deflate(how.level), probe: deflate(PROBE_LEVEL), probed: Vec::new(), shuffled: Vec::new() }
    }

    fn work(mut self, jobs: &Mutex<Receiver<Job>>, back: &Sender<Job>) {
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
        // Each plane is judged by itself: the first bytes of numbers look random, the last do not.
        let plane = if self.how.shuffle { data.len() / job.element.max(1) } else { data.len() };
        if !self.deflate(data, plane.max(1), &mut job.packed) {
            job.packed.clear();
            job.packed.extend_from_slice(data);
            job.skipped = 1 << u32::from(self.how.shuffle); // deflate comes after shuffle
        }
        self.shuffled = shuffled;
    }

    /// Makes a zlib stream (RFC 1950) of `data`; says whether it is shorter. Parts that would not shrink are stored in
    /// it: three of the four bytes of a weight look random, and to find that out anew takes longer than to compress the
    /// fourth.
    fn deflate(&mut self, data: &[u8], plane: usize, out: &mut Vec<u8>) -> bool {
        let mut ranges: Vec<(Range<usize>, bool)> = Vec::new(); // with whether it shrinks
        let mut start = 0;
        for segment in data.chunks(plane).flat_map(|plane| plane.chunks(SEGMENT)) {
            let shrinks = self.shrinks(segment);
            match ranges.last_mut() {
                Some((range, same)) if *same == shrinks => range.end += segment.len(),
                _ => ranges.push((start..start + segment.len(), shrinks)),
            }
            start += segment.len();
        }
        if !ranges.iter().any(|range| range.1) {
            return false;
        }
        out.clear();
        out.extend(ZLIB_HEADER);
        for (range, shrinks) in ranges {
            let (bytes, last) = (&data[range.clone()], range.end == data.len());
            if shrinks {
                let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
                deflate(&mut self.zlib, bytes, flush, out);
            } else {
                let blocks = bytes.len().div_ceil(STORED_BLOCK);
                for (i, block) in bytes.chunks(STORED_BLOCK).enumerate() {
                    let len = block.len() as u16;
                    out.push(u8::from(last && i + 1 == blocks));
                    out.extend(len.to_le_bytes());
                    out.extend((!len).to_le_bytes());
                    out.extend_from_slice(block);
                }
            }
        }
        out.extend(adler32(data).to_be_bytes());
        out.len() < data.len()
    }

    /// Whether a segment is worth deflating, by a sample from its middle.
    fn shrinks(&mut self, segment: &[u8]) -> bool {
        if self.how.level == 0 {
            return false;
        }
        if self.how.level >= THOROUGH || segment.len() < TOO_SHORT {
            return true;
        }
        let n = segment.len().min(SAMPLE);
        let sample = &segment[(segment.len() - n) / 2..][..n];
        self.probed.clear();
        deflate(&mut self.probe, sample, FlushCompress::Finish, &mut self.probed);
        self.probed.len() < n - n / 32
    }
}

/// Appends `data`, deflated from a fresh start, to `out`.
fn deflate(zlib: &mut Compress, data: &[u8], flush: FlushCompress, out: &mut Vec<u8>) {
    // More room than deflate ever takes: with less, zlib-rs 0.6.8 can panic.
    out.reserve(data.len() + data.len() / 7 + 256);
    zlib.reset();
    let done = zlib.compress_vec(data, out, flush);
    assert!(done.is_ok() && zlib.total_in() == data.len() as u64, "there is room");
}

/// The checksum of a zlib stream.
fn adler32(data: &[u8]) -> u32 {
    const MODULUS: u32 = 65_521;
    const LANES: usize = 32;
    let (mut a, mut b) = (1u32, 0u32);
    for part in data.chunks(4096) {
        // So short that nothing overflows before the remainders are taken; checking that would cost the vectors.
        let (blocks, rest) = part.as_chunks::<LANES>();
        for block in blocks {
            let (mut sum, mut weighted) = (0u32, 0u32);
            for (i, &d) in block.iter().enumerate() {
                sum = sum.wrapping_add(d.into());
                weighted = weighted.wrapping_add(u32::from(d).wrapping_mul((LANES - i) as u32));
            }
            b = b.wrapping_add(a.wrapping_mul(LANES as u32)).wrapping_add(weighted);
            a = a.wrapping_add(sum);
        }
        for &d in rest {
            a += u32::from(d);
            b += a;
        }
        (a, b) = (a % MODULUS, b % MODULUS);
    }
    b << 16 | a
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

    /// Every way through a chunk, checked by the inflater that reads it: random, parts of both kinds, zeros, odd sizes.
    #[test]
    fn chunks_inflate_to_what_they_were() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let noise: Vec<u8> = (0..300_001).map(|_| random()).collect();
        let text: Vec<u8> = noise.iter().map(|b| b % 5).collect();
        let mixtures = [
            noise.clone(),
            text.clone(),
            vec![0; 300_000],
            [&text[..100_000], &noise[..150_000], &text[..30_000]].concat(),
            [&noise[..100_000], &text[..150_000], &noise[..70_000]].concat(),
            [&noise[..5], &text[..9000]].concat(),
        ];
        for level in 0..=9 {
            for shuffle in [false, true] {
                let how = Compression { level, shuffle, chunk_bytes: 1 << 20 };
                let mut worker = Worker::new(how);
                for raw in &mixtures {
                    let mut job = Job { raw: raw.clone(), element: 4, ..Job::default() };
                    worker.compress(&mut job);
                    let skipped = job.skipped == 1 << u32::from(shuffle);
                    let mut inflated = Vec::with_capacity(raw.len() + 1);
                    if skipped {
                        inflated.extend_from_slice(&job.packed);
                    } else {
                        let mut zlib = flate2::Decompress::new(true);
                        let status = zlib.decompress_vec(&job.packed, &mut inflated, flate2::FlushDecompress::Finish);
                        assert_eq!(status.unwrap(), flate2::Status::StreamEnd);
                        assert_eq!(zlib.total_in(), job.packed.len() as u64);
                    }
                    let mut back = inflated.clone();
                    if shuffle {
                        crate::image::hdf5::filters::unshuffle(&inflated, 4, &mut back);
                    }
                    assert!(back == *raw, "level {level}, {} bytes", raw.len());
                    assert_eq!(skipped, level == 0 || *raw == noise, "level {level}, {} bytes", raw.len());
                }
            }
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
