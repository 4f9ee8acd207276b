//! Numbers and blocks of bytes of an archive, and the error for what is none.

use crate::error::{Error, Kind, Result, try_with_capacity};
use crate::io::ReadAt;

#[cold]
pub(super) fn bad(what: &str) -> Error {
    Error::new(Kind::Archive, format!("not a valid archive: {what}"))
        .with_advice("The file is damaged, cut short or no archive; use another copy.")
}

fn bytes_at<const N: usize>(b: &[u8], at: usize) -> Result<[u8; N]> {
    let found = b.get(at..).and_then(|b| b.first_chunk());
    found.copied().ok_or_else(|| bad("a record is cut short"))
}

pub(super) fn u16_at(b: &[u8], at: usize) -> Result<u16> {
    bytes_at(b, at).map(u16::from_le_bytes)
}

pub(super) fn u32_at(b: &[u8], at: usize) -> Result<u32> {
    bytes_at(b, at).map(u32::from_le_bytes)
}

pub(super) fn u64_at(b: &[u8], at: usize) -> Result<u64> {
    bytes_at(b, at).map(u64::from_le_bytes)
}

/// `n` bytes of the file from `at`.
pub(super) fn read(file: &dyn ReadAt, at: u64, n: u64) -> Result<Vec<u8>> {
    if at.checked_add(n).is_none_or(|end| end > file.len()) {
        return Err(bad("a record lies outside the file"));
    }
    let mut out = try_with_capacity(n as usize)?;
    out.resize(n as usize, 0);
    file.read_at(&mut out, at)?;
    Ok(out)
}
