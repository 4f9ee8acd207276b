//! Layout and tensors → bytes in file order, in one pass: gather, CRC, write.
//!
//! Large tensors are written straight from where they lie, a block at a time, so that the CRC and the write find it
//! in cache; small ones and metadata are gathered into a staging block first. One thread: the kernel's copy into the
//! page cache is the limit, and a second writer of the same file only waits for its lock.
#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Kind, Result};
use crate::image::Layout;
use crate::tree::Dataset;

/// Bytes per write: small enough to stay in the second-level cache, large enough to amortise the call. Writes end at
/// multiples of it in the file, so that the kernel takes large pages for its cache: a quarter faster (ext4, Linux 6.18).
pub const WRITE_BYTES: usize = 256 << 10;

static ZEROS: [u8; 4096] = [0; 4096];

/// The bytes of the tensors, asked for one at a time in file order.
pub trait Tensors {
    /// The bytes of dataset `i` of the tree. They must not change until the next call.
    ///
    /// # Errors
    /// `Caller` when they cannot be had.
    fn tensor(&mut self, i: usize) -> Result<&[u8]>;

    /// Hands the bytes of dataset `i` to `put`, in order and in as many parts as they come in.
    ///
    /// # Errors
    /// Those of [`Tensors::tensor`] and of `put`; `Changed` when it has not its size.
    fn each_part(&mut self, i: usize, dataset: &Dataset, put: Put<'_>) -> Result<()> {
        put(sized(self.tensor(i)?, dataset)?)
    }
}

/// Takes a part of a tensor.
pub type Put<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Where bytes go.
pub trait Sink {
    /// Writes `bytes` at `offset`. Offsets ascend without gaps, except for patches of what was written before.
    ///
    /// # Errors
    /// `Io` or `Caller`.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()>;

    /// Whether what was written can be patched.
    fn can_patch(&self) -> bool {
        true
    }

    /// Announces the size in bytes to come.
    ///
    /// # Errors
    /// `Io` when there is no room for it.
    fn reserve(&mut self, _len: u64) -> Result<()> {
        Ok(())
    }
}

impl Sink for &File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        super::write_all_at(self, bytes, offset)
            .map_err(|e| Error::new(Kind::Io(e), format!("cannot write {} bytes at offset {offset}", bytes.len())))
    }

    /// Asks for the blocks at once, where the file system can: the file is less fragmented, and a full disk is noticed
    /// before anything is written. A hint elsewhere, never emulated.
    fn reserve(&mut self, len: u64) -> Result<()> {
        #[cfg(target_os = "linux")]
        if len > 0 {
            use rustix::{fs, io::Errno};
            if let Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) =
                fs::fallocate(self, fs::FallocateFlags::empty(), 0, len)
            {
                return Err(Error::new(Kind::Io(e.into()), format!("no room for the {len} bytes of this file")));
            }
        }
        let _ = len;
        Ok(())
    }
}

/// Memory of exactly the announced size.
impl Sink for &mut [u8] {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let end = (offset as usize).checked_add(bytes.len());
        let room = end.and_then(|end| self.get_mut(offset as usize..end));
        room.ok_or_else(|| Error::new(Kind::Invalid, "the target buffer is too small"))?.copy_from_slice(bytes);
        Ok(())
    }
}

/// How far a write is, and whether it should stop. Shared with whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes written so far; of tensors that are compressed, before that.
    pub written: AtomicU64,
    /// Set to stop at the next block.
    pub cancelled: AtomicBool,
}

/// Writes the image laid out as `layout` at `base` of `sink`; returns its CRC-32.
///
/// # Errors
/// Those of `tensors` and `sink`; `Cancelled`; `Invalid` when a tensor has not its size.
pub fn emit(
    layout: &Layout,
    datasets: &[Dataset],
    tensors: &mut dyn Tensors,
    base: u64,
    sink: &mut dyn Sink,
    progress: &Progress,
) -> Result<u32> {
    let mut image = Image::new(base, sink, progress);
    image.put_layout(layout, datasets, tensors)?;
    image.finish(layout.len)
}

/// An image that is being written: in order, but for patches of what was left zero. Knows its CRC-32.
pub struct Image<'a> {
    sink: &'a mut dyn Sink,
    base: u64,
    written: u64, // of the image, without what is staged
    stage: Vec<u8>,
    crc: crc32fast::Hasher,
    patches: Vec<(u64, u32)>, // where each ends, and how it changes the checksum of the bytes up to there
    progress: &'a Progress,
    counts: bool, // its bytes are the progress
}

impl<'a> Image<'a> {
    /// An image that begins at `base` of `sink`.
    pub fn new(base: u64, sink: &'a mut dyn Sink, progress: &'a Progress) -> Self {
        let (stage, crc, patches) = (Vec::with_capacity(WRITE_BYTES), crc32fast::Hasher::new(), Vec::new());
        Self { sink, base, written: 0, stage, crc, patches, progress, counts: true }
    }

    /// Leaves it to the caller to say how far it is.
    pub(super) fn uncounted(mut self) -> Self {
        self.counts = false;
        self
    }

    /// Writes everything that a layout places, zeros between.
    ///
    /// # Errors
    /// As [`emit`].
    pub fn put_layout(&mut self, layout: &Layout, datasets: &[Dataset], tensors: &mut dyn Tensors) -> Result<()> {
        enum Item<'a> {
            Metadata(&'a [u8]),
            Tensor(usize),
        }
        let mut items: Vec<(u64, Item<'_>)> = layout.metadata.iter().map(|(at, m)| (*at, Item::Metadata(m))).collect();
        items.extend(layout.offsets.iter().enumerate().filter_map(|(i, at)| Some(((*at)?, Item::Tensor(i)))));
        items.sort_by_key(|item| item.0); // stable, and sorted already for the direct engine
        for (at, item) in items {
            self.zeros_up_to(at)?;
            match item {
                Item::Metadata(bytes) => self.put(bytes)?,
                Item::Tensor(i) => tensors.each_part(i, &datasets[i], &mut |part| self.put(part))?,
            }
        }
        self.zeros_up_to(layout.len)
    }

    /// Writes `bytes` at `at`: behind everything so far, or over zeros, where the sink can be patched.
    ///
    /// # Errors
    /// Those of the sink; `Cancelled`.
    pub fn put_at(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        if at >= self.position() {
            self.zeros_up_to(at)?;
            return self.put(bytes);
        }
        let end = at + bytes.len() as u64;
        if end > self.position() {
            self.zeros_up_to(end)?;
        }
        self.flush()?;
        self.sink.write_at(bytes, self.base + at)?;
        let mut zeros = crc32fast::Hasher::new();
        bytes.chunks(ZEROS.len()).for_each(|part| zeros.update(&ZEROS[..part.len()]));
        self.patches.push((end, crc32fast::hash(bytes) ^ zeros.finalize()));
        Ok(())
    }

    /// Writes what is left of `len` bytes; returns the CRC-32 of all of them.
    ///
    /// # Errors
    /// Those of the sink; `Cancelled`.
    pub fn finish(mut self, len: u64) -> Result<u32> {
        self.zeros_up_to(len)?;
        self.flush()?;
        // A checksum is linear: that of the image is that of the image without a patch, exclusive or that of the patch
        // alone, moved over the bytes behind it.
        let moved = |&(end, crc): &(u64, u32)| {
            let mut crc = crc32fast::Hasher::new_with_initial(crc);
            crc.combine(&crc32fast::Hasher::new_with_initial_len(0, len - end));
            crc.finalize()
        };
        Ok(self.patches.iter().map(moved).fold(self.crc.finalize(), |crc, patch| crc ^ patch))
    }

    /// Bytes of the image so far.
    pub(super) fn position(&self) -> u64 {
        self.written + self.stage.len() as u64
    }

    fn zeros_up_to(&mut self, at: u64) -> Result<()> {
        loop {
            match at.checked_sub(self.position()) {
                None => return Err(Error::new(Kind::Internal, "the layout overlaps itself")),
                Some(0) => return Ok(()),
                Some(gap) => self.put(&ZEROS[..gap.min(ZEROS.len() as u64) as usize])?,
            }
        }
    }

    /// Stages what does not reach the next multiple of `WRITE_BYTES` in the file; writes the rest from where it lies.
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        loop {
            let room = WRITE_BYTES - (self.base + self.position()) as usize % WRITE_BYTES;
            if bytes.len() < room {
                self.stage.extend_from_slice(bytes);
                return Ok(());
            }
            let (head, rest) = bytes.split_at(room);
            if self.stage.is_empty() {
                self.write(head)?;
            } else {
                self.stage.extend_from_slice(head);
                self.flush()?;
            }
            bytes = rest;
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut stage = std::mem::take(&mut self.stage);
        if !stage.is_empty() {
            self.write(&stage)?;
            stage.clear();
        }
        self.stage = stage;
        Ok(())
    }

    fn write(&mut self, block: &[u8]) -> Result<()> {
        if self.progress.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Cancelled, "the save was cancelled"));
        }
        self.crc.update(block);
        self.sink.write_at(block, self.base + self.written)?;
        self.written += block.len() as u64;
        if self.counts {
            self.progress.written.store(self.written, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The bytes, which must be as many as the dataset has.
pub(crate) fn sized<'a>(bytes: &'a [u8], dataset: &Dataset) -> Result<&'a [u8]> {
    if bytes.len() as u64 == dataset.nbytes {
        return Ok(bytes);
    }
    Err(Error::new(Kind::Changed, "a tensor changed its size while it was saved")
        .with_found(format_args!("{} bytes", dataset.nbytes), format_args!("{} bytes", bytes.len()))
        .with_entry(&dataset.path))
}
