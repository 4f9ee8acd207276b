//! Bytes in and out: [`emit`] gathers, checks and writes, [`cast`] narrows, [`pack`] compresses; [`fetch`] reads, checks and hands over; [`buffer`] is memory.

pub mod buffer;
pub mod cast;
pub mod emit;
pub mod fetch;
pub mod pack;

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Context, Error, Kind, Result};

/// Random access to bytes that do not change while they are read.
pub trait ReadAt: Send + Sync {
    /// Bytes there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `Io`, also when the bytes end before `buf` is full.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// The bytes themselves, where they are in memory anyway.
    fn as_slice(&self) -> Option<&[u8]> {
        None
    }

    /// Whether reading runs only code of this crate, so that locks may be held meanwhile.
    fn is_native(&self) -> bool {
        true
    }
}

impl ReadAt for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let source = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or_else(|| end_of_file(offset, buf.len(), ReadAt::len(self)))?;
        buf.copy_from_slice(source);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self)
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> u64 {
        Vec::len(self) as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.as_slice().read_at(buf, offset)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self)
    }
}

/// A file, read at offsets (no seek position, so threads can share it).
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
}

impl FileSource {
    /// The whole of an open file, as long as it is now.
    ///
    /// # Errors
    /// `Io` when its length cannot be had.
    pub fn new(file: File) -> Result<Self> {
        let len = file.metadata().during("cannot read the file's size")?.len();
        Ok(Self { file, len })
    }
}

impl ReadAt for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buf, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => end_of_file(offset, buf.len(), self.len),
            _ => Error::new(Kind::Io(e), format!("cannot read {} bytes at offset {offset}", buf.len())),
        })
    }
}

/// Opens a regular file for reading. Pipes and devices are refused, and never waited for.
///
/// # Errors
/// As opening it; `IsADirectory`, `InvalidInput` for what is neither file nor directory.
pub(crate) fn open_regular(path: &Path) -> std::io::Result<File> {
    let check = |found: Metadata| match found.file_type() {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(std::io::Error::from(ErrorKind::IsADirectory)),
        _ => Err(std::io::Error::new(ErrorKind::InvalidInput, "it is a pipe, a socket or a device, not a file")),
    };
    check(path.metadata()?)?; // opening a device may do something already
    let mut open = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut open, rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    let file = match open.read(true).open(path) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => File::open(path)?, // a lease, which takes a moment to end
        other => other?,
    };
    check(file.metadata()?)?;
    Ok(file)
}

/// A part of something readable.
pub struct Window<'a> {
    source: &'a dyn ReadAt,
    start: u64,
    len: u64,
}

impl<'a> Window<'a> {
    /// `len` bytes from `start`; the caller has checked that they exist.
    pub fn new(source: &'a dyn ReadAt, start: u64, len: u64) -> Self {
        debug_assert!(start.checked_add(len).is_some_and(|end| end <= source.len()));
        Self { source, start, len }
    }
}

impl ReadAt for Window<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.len => self.source.read_at(buf, self.start + offset),
            _ => Err(end_of_file(offset, buf.len(), self.len)),
        }
    }

    fn as_slice(&self) -> Option<&[u8]> {
        self.source.as_slice()?.get(self.start as usize..)?.get(..self.len as usize)
    }
}

fn end_of_file(offset: u64, wanted: usize, len: u64) -> Error {
    Error::new(Kind::Io(std::io::ErrorKind::UnexpectedEof.into()), "the file ends too early")
        .with_found(format_args!("{wanted} bytes at offset {offset}"), format_args!("{len} bytes in all"))
        .with_advice("It was cut short or is still being written; copy or save it again.")
}

#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, buf: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, buf, offset)
}

#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buf, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (buf, offset) = (&mut buf[n..], offset + n as u64),
        }
    }
    Ok(())
}

#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut buf: &[u8], mut offset: u64) -> std::io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, buf, offset)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            n => (buf, offset) = (&buf[n..], offset + n as u64),
        }
    }
    Ok(())
}
