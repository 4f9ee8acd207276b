//! Where the directory of an archive lies (§4.3.14 to §4.3.16), found as Python's `zipfile` finds it.
//!
//! What stands before or behind the archive is passed over, as long as only one reading of the file is possible.

use super::fields::{bad, read, u16_at, u32_at, u64_at};
use super::{CENTRAL_HEADER, END, END_64, END_64_LOCATOR, LOCAL_HEADER};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::limits;

/// Bytes of the end record without its comment.
const RECORD: usize = 22;
/// Bytes of the zip64 end record, and of its locator.
const RECORD_64: u64 = 56;
const LOCATOR: u64 = 20;

/// The directory of an archive.
#[derive(Debug)]
pub(super) struct Directory {
    /// Where it starts in the file.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Records.
    pub count: u64,
    /// Bytes before the archive: what is to be added to every offset in it.
    pub prefix: u64,
}

/// # Errors
/// `Archive` where there is no directory, or two readers could take different ones; `Limit`; `Io`.
pub(super) fn directory(file: &dyn ReadAt) -> Result<Directory> {
    let tail = file.len().min((RECORD + usize::from(u16::MAX)) as u64);
    let before = file.len() - tail;
    let bytes = read(file, before, tail)?;
    let at = end_record(&bytes)?;
    let record = &bytes[at..];
    if (u16_at(record, 4)?, u16_at(record, 6)?) != (0, 0) {
        return Err(bad("it is one of several parts"));
    }
    let counts = (u16_at(record, 8)?, u16_at(record, 10)?);
    let (size, start) = (u32_at(record, 12)?, u32_at(record, 16)?);
    if counts.0 != counts.1 {
        return Err(bad("it is one of several parts"));
    }
    let (mut count, mut size, mut start) = (u64::from(counts.1), u64::from(size), u64::from(start));
    let mut end = before + at as u64;
    let mut declared = None;
    if end >= LOCATOR {
        let locator = read(file, end - LOCATOR, LOCATOR)?;
        if locator.starts_with(&END_64_LOCATOR.to_le_bytes()) {
            declared = Some(u64_at(&locator, 8)?);
            end = (end - LOCATOR).checked_sub(RECORD_64).ok_or_else(|| bad("the zip64 end record is cut short"))?;
            let record = read(file, end, RECORD_64)?;
            if !record.starts_with(&END_64.to_le_bytes()) {
                return Err(bad("the zip64 end record is not where its locator says"));
            }
            let large = [u64_at(&record, 32)?, u64_at(&record, 40)?, u64_at(&record, 48)?];
            let limits = [u64::from(u16::MAX), u64::from(u32::MAX), u64::from(u32::MAX)];
            for ((small, large), limit) in [count, size, start].into_iter().zip(large).zip(limits) {
                if small != limit && small != large {
                    return Err(bad("its two end records disagree"));
                }
            }
            [count, size, start] = large;
        }
    }
    let prefix = end.checked_sub(size).and_then(|at| at.checked_sub(start));
    let prefix = prefix.ok_or_else(|| bad("its directory is not where the end record says"))?;
    if declared.is_some_and(|at| at.checked_add(prefix) != Some(end)) {
        return Err(bad("the zip64 end record is not where its locator says"));
    }
    if prefix > 0 {
        check_prefix(file, start)?;
    }
    if count > limits::MAX_MEMBERS || size > limits::MAX_DIRECTORY_BYTES {
        return Err(Error::new(Kind::Limit, "the archive has too many members")
            .with_found(format_args!("at most {}", limits::MAX_MEMBERS), count));
    }
    Ok(Directory { start: start + prefix, size, count, prefix })
}

/// Where the end record starts in the last bytes of a file: at the last signature there is, as in `zipfile`.
fn end_record(bytes: &[u8]) -> Result<usize> {
    let signature = END.to_le_bytes();
    let length = |at: usize| u16_at(bytes, at + 20).map(|n| RECORD + usize::from(n));
    let found: Vec<usize> =
        (0..bytes.len().saturating_sub(3)).filter(|&at| bytes[at..].starts_with(&signature)).collect();
    let &at = found.last().ok_or_else(|| bad("it has no end record"))?;
    if length(at).ok().and_then(|n| at.checked_add(n)).is_none_or(|end| end > bytes.len()) {
        return Err(bad("its end record is cut short"));
    }
    // A reader that trusts the length of the comment would take the other one.
    if found.iter().any(|&other| other != at && length(other).is_ok_and(|n| other + n == bytes.len())) {
        return Err(bad("it has two end records"));
    }
    Ok(at)
}

/// Refuses bytes before the archive with which readers that do not look for them find something else.
fn check_prefix(file: &dyn ReadAt, start: u64) -> Result<()> {
    let starts_with = |at: u64, signature: u32| {
        let found =
            if at.checked_add(4).is_some_and(|end| end <= file.len()) { read(file, at, 4)? } else { Vec::new() };
        Ok::<_, Error>(found == signature.to_le_bytes())
    };
    // An archive whose own directory was cut off, and that holds another archive, looks like this.
    if starts_with(0, LOCAL_HEADER)? || starts_with(start, CENTRAL_HEADER)? || starts_with(start, END)? {
        return Err(bad("its directory is not where the end record says"));
    }
    Ok(())
}
