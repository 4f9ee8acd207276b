//! Memory that tensors are read into: aligned so that TensorFlow and JAX can share it, in huge pages where they help.
#![allow(unsafe_code)] // aligned allocation, and handing out disjoint parts of one block

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::error::{Result, out_of_memory};
use crate::image::ALIGNMENT;

/// Bytes of a huge page on every platform that has them for ordinary memory.
const HUGE_PAGE: usize = 2 << 20;
/// From this size on a tensor gets a block of its own, so that a long-lived one pins no other. Small in unit tests, so
/// that a tensor of several parts can be tried often.
pub const OWN_BLOCK: usize = if cfg!(test) { 256 } else { 4 << 20 };

/// Zeroed, aligned, owned memory of fixed size. It may be written through a shared reference ([`Block::slot`]), so
/// whoever shares it must keep slots disjoint.
#[derive(Debug)]
pub struct Block {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Heap(Layout),
    #[cfg(unix)]
    Mapped {
        base: NonNull<u8>,
        len: usize,
    },
}

// SAFETY: the memory is owned, and never accessed but through the methods below.
unsafe impl Send for Block {}
// SAFETY: shared access is by `as_ptr` and `slot`, whose contracts rule out races.
unsafe impl Sync for Block {}

impl Block {
    /// `len` zero bytes at a multiple of 64.
    ///
    /// # Errors
    /// `Memory`.
    pub fn new(len: usize) -> Result<Self> {
        #[cfg(unix)]
        if len >= HUGE_PAGE
            && let Some(block) = Self::mapped(len)
        {
            return Ok(block);
        }
        let layout = Layout::from_size_align(len.max(1), ALIGNMENT as usize).map_err(|_| out_of_memory(len))?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| out_of_memory(len))?;
        Ok(Self { start, len, memory: Memory::Heap(layout) })
    }

    /// Fresh pages at a multiple of the huge page size; zero without being touched.
    #[cfg(unix)]
    fn mapped(len: usize) -> Option<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // A last huge page that is nearly full is worth its rest.
        let pages = len.checked_next_multiple_of(HUGE_PAGE).filter(|pages| pages - len <= len / 16);
        let pages = pages.or_else(|| len.checked_next_multiple_of(4096))?;
        let whole = pages.checked_add(HUGE_PAGE)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping; no existing memory is affected.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), whole, protection, MapFlags::PRIVATE) }.ok()?;
        let base = NonNull::new(base.cast::<u8>())?;
        let skip = base.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: `skip` < HUGE_PAGE, so `skip + pages` stays inside the mapping.
        let start = unsafe { base.add(skip) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside the mapping; the advice changes no content. It is a hint, so errors are fine.
        let _ = unsafe { rustix::mm::madvise(start.as_ptr().cast(), pages, rustix::mm::Advice::LinuxHugepage) };
        Some(Self { start, len, memory: Memory::Mapped { base, len: whole } })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// `len` bytes from `at`, to be written.
    ///
    /// # Panics
    /// When they reach past the end.
    ///
    /// # Safety
    /// Nobody else may read or write these bytes while the slice lives.
    #[allow(clippy::mut_from_ref)] // see the contract
    pub unsafe fn slot(&self, at: usize, len: usize) -> &mut [u8] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "a slot reaches past its block");
        // SAFETY: in bounds (asserted), initialised (zeroed), and exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(at), len) }
    }
}

/// An empty vector with room for `capacity` bytes, in huge pages where there are any: fresh small pages cost more than
/// what is written into them.
pub fn vec_with_capacity(capacity: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(capacity);
    #[cfg(target_os = "linux")]
    if capacity >= 2 * HUGE_PAGE {
        let start = bytes.as_mut_ptr();
        let skip = start.align_offset(HUGE_PAGE);
        let len = (capacity - skip) & !(HUGE_PAGE - 1);
        // SAFETY: the range lies inside the vector's memory; the advice changes no content. It is a hint.
        let _ = unsafe { rustix::mm::madvise(start.add(skip).cast(), len, rustix::mm::Advice::LinuxHugepage) };
    }
    bytes
}

impl Drop for Block {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated in `new` with this layout.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(unix)]
            // SAFETY: mapped in `mapped`; nothing points into it any more.
            Memory::Mapped { base, len } => drop(unsafe { rustix::mm::munmap(base.as_ptr().cast(), len) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zero_and_writable() {
        for len in [0, 1, 63, 4096, HUGE_PAGE - 1, HUGE_PAGE, OWN_BLOCK + 5] {
            let block = Block::new(len).unwrap();
            assert_eq!(block.as_ptr() as usize % 64, 0, "{len}");
            // SAFETY: the only slot.
            let bytes = unsafe { block.slot(0, len) };
            assert!(bytes.iter().all(|&b| b == 0));
            bytes.fill(7);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        for len in [usize::MAX, usize::MAX / 2, 1 << 60, 1 << 50] {
            assert!(matches!(Block::new(len).unwrap_err().kind(), crate::error::Kind::Memory), "{len}");
        }
    }

    #[test]
    #[should_panic(expected = "past its block")]
    fn slots_are_bounded() {
        let block = Block::new(8).unwrap();
        // SAFETY: panics before there is a slice.
        let _ = unsafe { block.slot(4, 5) };
    }
}
