//! Little-endian fields of metadata: read with [`Fields`], appended with [`Append`].

use super::malformed;
use crate::error::{Error, Result};

/// A piece of metadata. To read past its end is an error, never a panic.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(self, at: usize, n: usize) -> Result<&'a [u8]> {
        at.checked_add(n).and_then(|end| self.0.get(at..end)).ok_or_else(|| malformed("a structure is cut short"))
    }

    pub(super) fn from(self, at: usize) -> Result<Fields<'a>> {
        self.0.get(at..).map(Fields).ok_or_else(|| malformed("a structure is cut short"))
    }

    pub(super) fn u8(self, at: usize) -> Result<u8> {
        Ok(self.bytes(at, 1)?[0])
    }

    pub(super) fn u16(self, at: usize) -> Result<u16> {
        Ok(u16::from_le_bytes(self.bytes(at, 2)?.try_into().expect("two bytes")))
    }

    pub(super) fn u32(self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(at, 4)?.try_into().expect("four bytes")))
    }

    pub(super) fn u64(self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(at, 8)?.try_into().expect("eight bytes")))
    }

    /// An unsigned number of `width` ≤ 8 bytes.
    pub(super) fn uint(self, at: usize, width: usize) -> Result<u64> {
        Ok(self.bytes(at, width)?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    pub(super) fn signature(self, at: usize, expected: [u8; 4]) -> Result<()> {
        let found = self.bytes(at, 4)?;
        if found == expected { Ok(()) } else { Err(wrong_signature(&expected, found)) }
    }
}

#[cold]
fn wrong_signature(expected: &[u8], found: &[u8]) -> Error {
    malformed("a structure has the wrong signature")
        .with_found(String::from_utf8_lossy(expected), String::from_utf8_lossy(found).escape_default())
}

/// Metadata that is being written.
pub(super) trait Append {
    fn put(&mut self, bytes: &[u8]);
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
    /// Adds zeros up to a multiple of so many bytes.
    fn pad(&mut self, multiple: usize);
}

impl Append for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn pad(&mut self, multiple: usize) {
        self.resize(self.len().next_multiple_of(multiple), 0);
    }
}
