//! Chunked datasets: the library says where the chunks are; they are read and decoded outside its lock, in threads.

use std::sync::Mutex;

use flate2::{Decompress, FlushDecompress, Status};
use hdf5_metno_sys::h5i::hid_t;
use hdf5_metno_sys::h5z::{H5Z_FILTER_DEFLATE, H5Z_FILTER_FLETCHER32, H5Z_FILTER_SHUFFLE};

use super::ffi::{Chunk, Library};
use crate::error::{Error, Kind, Result, out_of_memory, try_push};
use crate::image::hdf5::filters::unshuffle;
use crate::io::ReadAt;
use crate::io::pack::threads;
use crate::limits;

/// For fewer bytes than this a thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 20;
/// HDF5's own limit on the bytes of a chunk.
const MAX_CHUNK_BYTES: u64 = u32::MAX as u64;

/// A filter that is undone here.
#[derive(Clone, Copy)]
pub(super) enum Filter {
    Deflate,
    Shuffle(usize),
    Fletcher32,
    Lzf,
}

/// The filters of a dataset, and who undoes them.
pub(super) enum Filters {
    /// This crate, in the opposite order.
    Native(Vec<Filter>),
    /// The library.
    Library,
    /// Nobody, since there are some of these numbers.
    Unknown(Vec<usize>),
}

/// The number of h5py's LZF.
const LZF: i32 = 32_000;

pub(super) fn filters(lib: &Library, list: hid_t) -> Result<Filters> {
    let found: Vec<_> = (0..lib.H5Pget_nfilters(list)?).map(|i| lib.filter(list, i as u32)).collect::<Result<_>>()?;
    let native = found.iter().map(|&(id, parameter)| match i32::try_from(id) {
        Ok(H5Z_FILTER_DEFLATE) => Some(Filter::Deflate),
        Ok(H5Z_FILTER_SHUFFLE) => Some(Filter::Shuffle(parameter as usize)),
        Ok(H5Z_FILTER_FLETCHER32) => Some(Filter::Fletcher32),
        Ok(LZF) => Some(Filter::Lzf),
        _ => None,
    });
    Ok(match native.collect() {
        Some(native) => Filters::Native(native),
        None if lib.H5Pall_filters_avail(list)? == 0 => Filters::Unknown(found.into_iter().map(|f| f.0).collect()),
        None => Filters::Library,
    })
}

/// How many chunks a dataset has, written or not, and the bytes of one.
pub(super) fn cells(lib: &Library, list: hid_t, element: usize, shape: &[u64]) -> Result<(u64, u64)> {
    let (chunk, _) = lib.chunk_shape(list)?;
    let bytes = chunk.iter().try_fold(element as u64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0);
    match bytes.filter(|&n| !shape.is_empty() && chunk.len() == shape.len() && n <= MAX_CHUNK_BYTES) {
        // The bytes of the dataset fit 64 bits, so this does.
        Some(bytes) => Ok((shape.iter().zip(&chunk).map(|(s, c)| s.div_ceil(*c)).product(), bytes)),
        None => Err(malformed("chunks have an impossible shape")),
    }
}

/// Calls `each` with the chunks that are in a file of `len` bytes, in any order: no more than there are cells, or bytes
/// for them.
pub(super) fn written(
    lib: &Library,
    len: u64,
    id: hid_t,
    list: hid_t,
    element: usize,
    shape: &[u64],
    mut each: impl FnMut(Chunk) -> Result<()>,
) -> Result<()> {
    let (cells, bytes) = cells(lib, list, element, shape)?;
    let (chunk, _) = lib.chunk_shape(list)?;
    let mut left = cells.min(len / bytes.min(limits::MIN_CHUNK_BYTES));
    let mut outcome = Ok(());
    lib.chunks(id, shape, &chunk, &mut |chunk| {
        outcome = match left.checked_sub(1) {
            Some(rest) => {
                left = rest;
                each(chunk)
            }
            None => Err(malformed("dataset has more chunks than the file can hold")),
        };
        outcome.is_ok()
    })?;
    outcome
}

/// A chunked dataset, ready to be decoded.
pub(super) struct Grid {
    shape: Vec<usize>,
    chunk: Vec<usize>,
    element: usize,
    swap: usize,
    filters: Vec<Filter>,
    raw_edges: bool,
    fill: Option<Vec<u8>>,
    chunks: Vec<Chunk>, // in C order
}

impl Grid {
    /// `None` when the library has to read this dataset: for its filters, or since its chunks are so small that to know
    /// where they are takes more memory than the values.
    pub(super) fn new(
        lib: &Library,
        len: u64,
        id: hid_t,
        list: hid_t,
        dtype: hid_t,
        shape: &[u64],
        swap: usize,
    ) -> Result<Option<Self>> {
        let Filters::Native(filters) = filters(lib, list)? else { return Ok(None) };
        let element = lib.H5Tget_size(dtype)?;
        let (chunk, raw_edges) = lib.chunk_shape(list)?;
        if filters.is_empty() && cells(lib, list, element, shape)?.1 < size_of::<Chunk>() as u64 {
            return Ok(None);
        }
        let mut chunks = Vec::new();
        written(lib, len, id, list, element, shape, |chunk| try_push(&mut chunks, chunk))?;
        chunks.sort_unstable_by_key(|c| c.cell);
        if chunks.windows(2).any(|w| w[0].cell == w[1].cell) {
            return Err(malformed("chunks overlap or lie outside of the dataset"));
        }
        let fill = lib.fill_value(list, dtype)?;
        let [shape, chunk] = [shape, &chunk].map(|dims| dims.iter().map(|&d| d as usize).collect());
        Ok(Some(Self { shape, chunk, element, swap, filters, raw_edges, fill, chunks }))
    }

    /// Where a chunk starts, in elements.
    fn start(&self, chunk: &Chunk) -> [usize; limits::MAX_RANK] {
        let mut start = [0; limits::MAX_RANK];
        let mut rest = chunk.cell as usize;
        for d in (0..self.shape.len()).rev() {
            let cells = self.shape[d].div_ceil(self.chunk[d]);
            start[d] = rest % cells * self.chunk[d];
            rest /= cells;
        }
        start
    }

    /// Bytes of all chunks as they are in the file.
    pub(super) fn stored(&self) -> u64 {
        self.chunks.iter().map(|c| c.size).fold(0, u64::saturating_add)
    }

    /// Bytes of a whole chunk.
    fn chunk_bytes(&self) -> usize {
        self.chunk.iter().product::<usize>() * self.element
    }

    /// Splits `out` into bands, one chunk high: they are contiguous and independent of each other.
    fn bands<'a>(&'a self, path: &'a str, out: &'a mut [u8]) -> impl Iterator<Item = Band<'a>> {
        let row = self.shape[1..].iter().product::<usize>() * self.element;
        let cells: usize = (1..self.shape.len()).map(|d| self.shape[d].div_ceil(self.chunk[d])).product();
        let mut rest = &self.chunks[..];
        out.chunks_mut(self.chunk[0].min(self.shape[0]) * row).enumerate().map(move |(i, out)| {
            let after = ((i + 1) * cells) as u64;
            let (chunks, later) = rest.split_at(rest.partition_point(|c| c.cell < after));
            rest = later;
            Band { path, grid: self, chunks, out }
        })
    }
}

/// The part of a dataset that one row of chunks covers.
struct Band<'a> {
    path: &'a str,
    grid: &'a Grid,
    chunks: &'a [Chunk],
    out: &'a mut [u8],
}

/// Reads and decodes everything, `(path, grid, values)` each.
pub(super) fn decode(image: &dyn ReadAt, mut jobs: Vec<(&str, Grid, &mut [u8])>) -> Result<()> {
    let total: usize = jobs.iter().map(|(_, _, out)| out.len()).sum();
    let bands: Vec<_> = jobs.iter_mut().flat_map(|(path, grid, out)| grid.bands(path, out)).collect();
    let threads = threads(bands.len().min(total / WORTH_A_THREAD));
    let queue = Mutex::new(bands.into_iter());
    let work = || {
        let mut scratch = Scratch::new();
        let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        while let Some(band) = next() {
            let path = band.path;
            scratch.band(image, band).map_err(|e| e.with_entry(path))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // Threads that cannot be had are done without.
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        let join = |t: std::thread::ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        others.into_iter().map(join).fold(work(), Result::and)
    })
}

/// Buffers of one thread.
struct Scratch {
    stored: Vec<u8>,
    data: Vec<u8>,
    other: Vec<u8>,
    zlib: Decompress,
}

impl Scratch {
    fn new() -> Self {
        Self { stored: Vec::new(), data: Vec::new(), other: Vec::new(), zlib: Decompress::new(true) }
    }

    fn band(&mut self, image: &dyn ReadAt, band: Band) -> Result<()> {
        let Band { grid, chunks, out, .. } = band;
        let cells: usize = (1..grid.shape.len()).map(|d| grid.shape[d].div_ceil(grid.chunk[d])).product();
        if chunks.len() < cells {
            match &grid.fill {
                Some(value) => out.chunks_exact_mut(value.len()).for_each(|element| element.copy_from_slice(value)),
                None => out.fill(0),
            }
        }
        for chunk in chunks {
            self.load(image, grid, chunk, out)?;
        }
        swap(out, grid.swap);
        Ok(())
    }

    /// Reads a chunk, undoes its filters and puts it into its place in the band.
    fn load(&mut self, image: &dyn ReadAt, grid: &Grid, chunk: &Chunk, out: &mut [u8]) -> Result<()> {
        if chunk.address.checked_add(chunk.size).is_none_or(|end| end > image.len()) {
            return Err(malformed("chunk lies outside of the file"));
        }
        let start = grid.start(chunk);
        let edge = (0..grid.shape.len()).any(|d| start[d] + grid.chunk[d] > grid.shape[d]);
        let skipped = if grid.raw_edges && edge { u32::MAX } else { chunk.skipped };
        let expected = grid.chunk_bytes();
        let place = Place::new(grid, start);
        let size = chunk.size as usize;
        let mut data = if let Some(all) = image.as_slice() {
            &all[chunk.address as usize..][..size]
        } else {
            resize(&mut self.stored, size)?;
            image.read_at(&mut self.stored, chunk.address)?;
            &self.stored
        };
        for (i, filter) in grid.filters.iter().enumerate().rev() {
            if skipped >> i & 1 == 1 {
                continue;
            }
            match filter {
                Filter::Fletcher32 => {
                    data = check_fletcher32(data)?;
                    continue;
                }
                // What is inflated may still carry a checksum.
                Filter::Deflate => inflate(&mut self.zlib, data, &mut self.other, expected + 4 * grid.filters.len())?,
                Filter::Lzf => lzf(data, &mut self.other, expected + 4 * grid.filters.len())?,
                Filter::Shuffle(n) => {
                    if let (0, Some(range), true) = (i, place.whole(), data.len() == expected) {
                        unshuffle(data, *n, &mut out[range]); // the last step: no copy
                        return Ok(());
                    }
                    resize(&mut self.other, data.len())?;
                    unshuffle(data, *n, &mut self.other);
                }
            }
            std::mem::swap(&mut self.data, &mut self.other);
            data = &self.data;
        }
        if data.len() != expected {
            return Err(malformed("chunk has a wrong size").with_found(expected, data.len()));
        }
        place.scatter(data, out);
        Ok(())
    }
}

/// Where a chunk goes in its band, cut off at the edges of the dataset.
struct Place<'a> {
    grid: &'a Grid,
    start: [usize; limits::MAX_RANK],
    from: Vec<usize>, // strides in the chunk
    to: Vec<usize>,   // and in the dataset
    inner: usize,     // the dimensions from here on are one range of bytes
    base: usize,
}

impl<'a> Place<'a> {
    fn new(grid: &'a Grid, start: [usize; limits::MAX_RANK]) -> Self {
        let rank = grid.shape.len();
        let strides = |dims: &[usize]| {
            let mut strides = vec![grid.element; rank];
            for d in (1..rank).rev() {
                strides[d - 1] = strides[d] * dims[d];
            }
            strides
        };
        let (from, to) = (strides(&grid.chunk), strides(&grid.shape));
        let mut inner = rank - 1;
        while inner > 0 && grid.chunk[inner] == grid.shape[inner] {
            inner -= 1;
        }
        let base = (1..rank).map(|d| start[d] * to[d]).sum(); // within the band
        Self { grid, start, from, to, inner, base }
    }

    fn extent(&self, d: usize) -> usize {
        self.grid.chunk[d].min(self.grid.shape[d] - self.start[d])
    }

    /// The bytes of the band that are this chunk, if it is one range and nothing of it is cut off.
    fn whole(&self) -> Option<std::ops::Range<usize>> {
        let inner = self.inner;
        let one = (0..inner).all(|d| self.grid.chunk[d] == 1) && self.extent(inner) == self.grid.chunk[inner];
        one.then(|| self.base..self.base + self.grid.chunk[inner] * self.from[inner])
    }

    fn scatter(&self, data: &[u8], out: &mut [u8]) {
        let bytes = self.extent(self.inner) * self.from[self.inner];
        let mut at = vec![0; self.inner];
        loop {
            let source: usize = at.iter().zip(&self.from).map(|(i, s)| i * s).sum();
            let target = self.base + at.iter().zip(&self.to).map(|(i, s)| i * s).sum::<usize>();
            out[target..target + bytes].copy_from_slice(&data[source..source + bytes]);
            let Some(d) = (0..self.inner).rev().find(|&d| at[d] + 1 < self.extent(d)) else { return };
            at[d] += 1;
            at[d + 1..].fill(0);
        }
    }
}

/// Inflates a zlib stream to at most `limit` bytes.
fn inflate(zlib: &mut Decompress, data: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<()> {
    let possible = (data.len() as u64).saturating_mul(limits::MAX_DEFLATE) + 64;
    out.clear();
    let most = (limit as u64).min(possible) as usize;
    out.try_reserve(most).map_err(|_| out_of_memory(most))?;
    zlib.reset(true);
    match zlib.decompress_vec(data, out, FlushDecompress::Finish) {
        Ok(Status::StreamEnd) if out.len() <= limit => Ok(()),
        Ok(_) => Err(malformed("compressed chunk is cut short or larger than its shape says")),
        Err(e) => Err(malformed(&format!("compressed chunk is damaged ({e})"))),
    }
}

/// Undoes h5py's LZF (liblzf's format: up to 32 bytes as they are, and copies of up to 264 of the last 8192) to at
/// most `limit` bytes.
fn lzf(data: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<()> {
    let damaged = || malformed("chunk compressed with lzf is damaged");
    out.clear();
    let mut rest = data.iter();
    while let Some(&control) = rest.next() {
        let control = usize::from(control);
        let length = if control < 32 { control + 1 } else { control >> 5 };
        if control < 32 {
            let (plain, behind) = rest.as_slice().split_at_checked(length).ok_or_else(damaged)?;
            grow(out, length, limit)?;
            out.extend_from_slice(plain);
            rest = behind.iter();
            continue;
        }
        let more = if length == 7 { usize::from(*rest.next().ok_or_else(damaged)?) } else { 0 };
        let length = length + more + 2;
        let distance = ((control & 31) << 8 | usize::from(*rest.next().ok_or_else(damaged)?)) + 1;
        let from = out.len().checked_sub(distance).ok_or_else(damaged)?;
        grow(out, length, limit)?;
        for at in from..from + length {
            out.push(out[at]); // it may reach into itself
        }
    }
    Ok(())
}

/// Makes room for `more` bytes, if there are no more than `limit` then.
fn grow(out: &mut Vec<u8>, more: usize, limit: usize) -> Result<()> {
    if out.len() + more > limit {
        return Err(malformed("compressed chunk is larger than its shape says"));
    }
    out.try_reserve(more).map_err(|_| out_of_memory(out.len() + more))
}

/// Gives a vector that many bytes.
fn resize(bytes: &mut Vec<u8>, len: usize) -> Result<()> {
    bytes.try_reserve(len.saturating_sub(bytes.len())).map_err(|_| out_of_memory(len))?;
    bytes.resize(len, 0);
    Ok(())
}

/// What stands before the checksum at the end, which must match.
fn check_fletcher32(data: &[u8]) -> Result<&[u8]> {
    let Some((body, stored)) = data.split_last_chunk::<4>() else { return Err(malformed("chunk has no checksum")) };
    let stored = u32::from_le_bytes(*stored);
    let fold = |sum: u32| (sum & 0xffff) + (sum >> 16);
    let (mut a, mut b) = (0u32, 0u32);
    for block in body.chunks(720) {
        for pair in block.chunks(2) {
            a += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            b += a;
        }
        (a, b) = (fold(a), fold(b));
    }
    let sum = fold(b) << 16 | fold(a);
    // HDF5 before 1.6.3 stored the bytes of each half the other way round.
    if sum != stored && (sum.swap_bytes().rotate_left(16)) != stored {
        return Err(malformed("chunk does not match its checksum"));
    }
    Ok(body)
}

/// Reverses every `n` bytes: big-endian to little-endian.
pub(super) fn swap(data: &mut [u8], n: usize) {
    if n > 1 {
        data.chunks_exact_mut(n).for_each(<[u8]>::reverse);
    }
}

fn malformed(what: &str) -> Error {
    Error::new(Kind::Image, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_cut_off_at_the_edges() {
        for (shape, chunk) in [(vec![5usize, 7], vec![2usize, 3]), (vec![5, 7, 4], vec![2, 7, 4]), (vec![3], vec![8])] {
            let rank = shape.len();
            let cells: Vec<usize> = (0..rank).map(|d| shape[d].div_ceil(chunk[d])).collect();
            let element = |at: &[usize]| at.iter().fold(0, |n, i| n * 10 + i) as u8 + 1;
            let unravel = |mut i: usize, dims: &[usize]| {
                let mut at = vec![0; dims.len()];
                for d in (0..dims.len()).rev() {
                    (at[d], i) = (i % dims[d], i / dims[d]);
                }
                at
            };
            // Each chunk stands at its own place in the "file", its elements numbered by their place in the dataset.
            let (mut file, mut chunks) = (Vec::new(), Vec::new());
            for cell in 0..cells.iter().product() {
                let start: Vec<usize> = unravel(cell, &cells).iter().zip(&chunk).map(|(i, c)| i * c).collect();
                let n: usize = chunk.iter().product();
                chunks.push(Chunk { cell: cell as u64, skipped: 0, address: file.len() as u64, size: n as u64 });
                file.extend((0..n).map(|i| {
                    let at: Vec<usize> = unravel(i, &chunk).iter().zip(&start).map(|(i, s)| i + s).collect();
                    if at.iter().zip(&shape).all(|(i, s)| i < s) { element(&at) } else { 0 }
                }));
            }
            let mut out = vec![0; shape.iter().product()];
            let want: Vec<u8> = (0..out.len()).map(|i| element(&unravel(i, &shape))).collect();
            let grid =
                Grid { shape, chunk, element: 1, swap: 1, filters: vec![], raw_edges: false, fill: None, chunks };
            decode(&file, vec![("x", grid, &mut out)]).unwrap();
            assert_eq!(out, want);
        }
    }

    /// As liblzf and h5py have it; what is cut short, reaches before the start or grows too long is refused.
    #[test]
    fn lzf_is_undone_and_bounded() {
        let mut out = Vec::new();
        for (data, wanted) in [
            (&b""[..], &b""[..]),
            (b"\x02abc", b"abc"),
            (b"\x02abc\x20\x02", b"abcabc"),          // three bytes, from three before
            (b"\x00a\xe0\x03\x00", b"aaaaaaaaaaaaa"), // 7 + 3 + 2 of the last byte
            (b"\x01ab\x60\x01\x00c", b"abababac"),
        ] {
            lzf(data, &mut out, 13).unwrap();
            assert_eq!(out, wanted);
        }
        for bad in [&b"\x02ab"[..], b"\x00a\x20", b"\x00a\xe0\x03", b"\x00a\x20\x01", b"\x20\x00", b"\x00a\xe0\x04\x00"]
        {
            lzf(bad, &mut out, 13).unwrap_err();
        }
    }

    #[test]
    fn filters_check_what_they_undo() {
        let mut out = Vec::new();
        let sum = |d: &[u8]| {
            d.chunks(2).fold((0u32, 0u32), |(a, b), p| {
                let a = (a + (u32::from(p[0]) << 8 | u32::from(p[1]))) % 65535;
                (a, (b + a) % 65535)
            })
        };
        let (a, b) = sum(b"abcdef");
        let mut data = b"abcdef".to_vec();
        data.extend((b << 16 | a).to_le_bytes());
        assert_eq!(check_fletcher32(&data).unwrap(), b"abcdef");
        data[0] ^= 1;
        check_fletcher32(&data).unwrap_err();

        let packed = {
            use std::io::Write;
            let mut z = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            z.write_all(&[7; 10_000]).unwrap();
            z.finish().unwrap()
        };
        let mut zlib = Decompress::new(true);
        inflate(&mut zlib, &packed, &mut out, 10_000).unwrap();
        assert_eq!(out, [7; 10_000]);
        inflate(&mut zlib, &packed, &mut out, 5_000).unwrap_err();
        inflate(&mut zlib, &packed[..packed.len() / 2], &mut out, 10_000).unwrap_err();
    }
}
