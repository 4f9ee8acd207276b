//! The metadata of an image, read in pages, and as much of it as a file of its size may ask for.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};

use super::malformed;
use crate::error::{Error, Kind, Result, try_with_capacity};
use crate::io::ReadAt;
use crate::io::fetch::Slot;
use crate::limits;

/// Bytes read at once where metadata and payload alternate: what the HDF5 library allocates for metadata at a time.
pub(super) const PAGE: u64 = 2048;
/// Pages kept while a file is indexed: 1 MiB.
const CACHED_PAGES: usize = 512;

/// The image in pages; or all of it, where it is in memory.
pub(super) struct Pages<'a> {
    pub(super) image: &'a dyn ReadAt,
    slice: Option<&'a [u8]>,
    prefix: Option<Slot>, // in huge pages: a first touch takes longer than the copy
    cache: RefCell<Cache>,
    left: Cell<u64>, // bytes that may still be asked for
}

/// The pages read last, each in the one place that its number gives it: a file is walked nearly in order, so a page
/// seldom comes back, and little memory stays in the processor's cache.
#[derive(Default)]
struct Cache {
    numbers: Vec<u64>,
    memory: Vec<u8>,
}

impl Cache {
    /// Page `number`, read if it is not there.
    fn page(&mut self, image: &dyn ReadAt, number: u64) -> Result<&[u8]> {
        if self.memory.is_empty() {
            self.memory = vec![0; CACHED_PAGES * PAGE as usize];
            self.numbers = vec![u64::MAX; CACHED_PAGES];
        }
        let place = number as usize % CACHED_PAGES;
        let start = number * PAGE;
        let page = &mut self.memory[place * PAGE as usize..][..PAGE.min(image.len() - start) as usize];
        if self.numbers[place] != number {
            self.numbers[place] = u64::MAX; // half of it may be overwritten
            image.read_at(page, start)?;
            self.numbers[place] = number;
        }
        Ok(page)
    }
}

impl<'a> Pages<'a> {
    pub(super) fn new(image: &'a dyn ReadAt) -> Self {
        let left = (64 << 10) + image.len().saturating_mul(limits::MAX_METADATA_READS);
        Self { image, slice: image.as_slice(), prefix: None, cache: RefCell::default(), left: Cell::new(left) }
    }

    pub(super) fn prefix(&mut self, n: u64) -> Result<()> {
        if self.slice.is_none() {
            self.prefix = Some(Slot::read_from(self.image, 0, n.min(self.image.len()) as usize, &|| Ok(()))?);
        }
        Ok(())
    }

    /// Counts what something takes: work and memory stay in proportion to the image, whatever leads where in it.
    pub(super) fn spend(&self, bytes: usize) -> Result<()> {
        let left = self.left.get().checked_sub(bytes as u64);
        self.left.set(left.ok_or_else(|| {
            Error::new(Kind::Limit, "too much metadata for a file of this size")
                .with_advice("Its structures lead to the same places again and again, as no writer makes them.")
        })?);
        Ok(())
    }

    /// `n` bytes at `offset`, borrowed where they are in memory.
    pub(super) fn get(&self, offset: u64, n: usize) -> Result<Cow<'_, [u8]>> {
        self.spend(n)?;
        let end = offset.checked_add(n as u64).filter(|&end| end <= self.image.len());
        let end = end.ok_or_else(|| malformed("an address points outside the file"))?;
        for memory in [self.slice, self.prefix.as_ref().map(Slot::bytes)].into_iter().flatten() {
            if let Some(bytes) = memory.get(offset as usize..end as usize) {
                return Ok(Cow::Borrowed(bytes));
            }
        }
        let mut out = try_with_capacity(n)?;
        let mut cache = self.cache.borrow_mut();
        let mut at = offset;
        while at < end {
            let page = cache.page(self.image, at / PAGE)?;
            let from = (at % PAGE) as usize;
            let take = (page.len() - from).min((end - at) as usize);
            out.extend_from_slice(&page[from..from + take]);
            at += take as u64;
        }
        Ok(Cow::Owned(out))
    }
}
