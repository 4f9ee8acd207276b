//! What must hold for any bytes. Run by the fuzz targets (cargo-fuzz, nightly Rust) and by `tests/soak.rs` (any Rust).

#![allow(unsafe_code)] // an allocator is called with raw memory

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use hornbeam::archive::read::Members;
use hornbeam::error::Kind;
use hornbeam::image::{Found, Storage};
use hornbeam::io::ReadAt;
use hornbeam::json::{Encoder, Limits, decode_value, encode_value};
use hornbeam::load::{Choice, Weights};

/// Tensors of more bytes are legal, where chunks are missing: zeros cost no file.
const MOST: u64 = 1 << 24;

/// The system's allocator, with a count of what all threads have and of the most that they had. Memory of the HDF5 library
/// is not in it.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(more: usize, less: usize) {
    let before = LIVE.fetch_add(more, Relaxed);
    PEAK.fetch_max(before + more, Relaxed);
    LIVE.fetch_sub(less, Relaxed);
}

// SAFETY: the calls are handed on as they come.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size()); // both, for a moment
        // SAFETY: as the caller's.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What `f` returns, if it never had more than `most` bytes. Nothing else may run meanwhile.
fn bounded<T>(what: &str, most: usize, f: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let value = f();
    let taken = PEAK.load(Relaxed) - before;
    assert!(taken <= most, "{what} took {taken} bytes of memory, of {most} that it may");
    value
}

/// What opening and listing a file of `len` bytes may take.
fn for_listing(len: usize) -> usize {
    64 * len + (16 << 20)
}

/// As an archive: an error, or members that can be read.
pub(crate) fn archive(data: &[u8]) {
    let source: Arc<dyn ReadAt> = Arc::new(data.to_vec());
    let listing = for_listing(data.len());
    let Ok(members) = bounded("the directory", listing, || Members::open(&*source)) else { return };
    for member in members.iter().filter(|m| m.size < 1 << 20) {
        if let Ok(bytes) = member.read(&*source, &|| Ok(())) {
            assert_eq!(bytes.len() as u64, member.size);
        }
    }
    // A compressed member is inflated into memory first.
    let size: u64 = members.iter().filter(|m| m.name == "model.weights.h5").map(|m| m.size.min(1 << 30)).sum();
    let most = for_listing(data.len().max(size as usize)) + size as usize;
    if let Ok(weights) =
        bounded("weights of an archive", most, || Weights::open_member(&source, &members, Choice::Auto))
    {
        tensors(weights, data.len());
    }
}

/// As a weights image, by every reader: an error, or tensors that can be read.
pub(crate) fn index(data: &[u8]) {
    for choice in [Choice::Direct, Choice::LibHdf5, Choice::Safetensors] {
        let source: Arc<dyn ReadAt> = Arc::new(data.to_vec());
        let open = || Weights::open(source, choice);
        if let Ok(weights) = bounded(&format!("an index ({choice:?})"), for_listing(data.len()), open) {
            tensors(weights, data.len());
        }
    }
}

/// Reads everything, at once and tensor by tensor.
fn tensors(weights: Weights, len: usize) {
    let weights = Arc::new(weights);
    let datasets = &weights.index().datasets;
    let sizes = datasets.iter().map(|d| d.nbytes).fold(0, u64::saturating_add);
    let sound = |d: &Found| match d.storage {
        Storage::Unreadable(_) => d.nbytes == 0,
        _ => d.dtype.nbytes(&d.shape) == Some(d.nbytes),
    };
    assert!(datasets.iter().all(sound));
    if sizes > MOST {
        return;
    }
    let (all, unreadable): (Vec<usize>, Vec<usize>) =
        (0..datasets.len()).partition(|&i| !matches!(datasets[i].storage, Storage::Unreadable(_)));
    for i in unreadable {
        weights.read_part(i, 0, 0, &|| Ok(())).expect_err("nobody can read it");
    }
    let Ok(reading) = weights.fetch(&all, true, u64::MAX) else { return };
    if let Err(error) = reading.complete(false, &|| Ok(())) {
        assert!(!matches!(error.kind(), Kind::Internal), "{error}");
        return;
    }
    for i in all {
        let whole = reading.take(i, &|| Ok(())).expect("it was read").expect("it was not taken");
        let nbytes = datasets[i].nbytes;
        // Its own bytes (twice), and three buffers of a chunk a thread, which is no more than Deflate makes of the file.
        let most = 2 * nbytes as usize + 3 * 16 * 1032 * len + (1 << 20);
        let read = || weights.read_part(i, 0, nbytes, &|| Ok(()));
        let part = bounded("a tensor", most, read).expect("it was read before");
        assert_eq!(part.bytes(), whole.bytes(), "{}", datasets[i].path);
    }
}

/// As JSON: an error, or a value that encodes to what decodes to it again.
pub(crate) fn json(data: &[u8]) {
    let Ok(value) = decode_value(data, &Limits::FILE) else { return };
    let encode = |value| {
        let mut out = Encoder::new();
        encode_value(value, &mut out);
        out.finish()
    };
    let text = encode(&value);
    let again = decode_value(&text, &Limits::FILE).expect("what we wrote is JSON");
    assert_eq!(encode(&again), text);
}
