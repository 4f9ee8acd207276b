//! Memory across the boundary, by the buffer protocol: what Python passes to the core, and what the core hands out.
#![allow(unsafe_code)] // the buffer protocol is pointers

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::buffer::{PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

use super::detached::caller;
use crate::error::{Error, Kind, Result, out_of_memory};
use crate::io::ReadAt;
use crate::io::emit::Sink;
use crate::io::fetch::Slot;

/// C-contiguous memory of a Python object, kept alive and not resized while this lives.
pub(super) struct Buffer(PyUntypedBuffer);

impl Buffer {
    pub(super) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("the buffer is not C-contiguous"));
        }
        Ok(Self(buffer))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the exporter keeps `len_bytes` bytes at `buf_ptr` alive until the buffer is released, which is when
        // `self` is dropped. The protocol cannot promise that nobody writes to them meanwhile: `values/tensors.py` lends
        // only memory that no one changes (see docs/threads.md), and a racing write would spoil values, not memory.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast(), self.0.len_bytes()) }
    }
}

/// The file of an `io.BytesIO`.
impl ReadAt for Buffer {
    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.bytes().read_at(buf, offset)
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.bytes())
    }
}

/// Writable memory of a Python object as a sink; what comes behind its end is kept aside.
pub(super) struct Memory {
    target: PyBuffer<u8>,
    base: u64,
    pub(super) tail: Vec<u8>,
}

impl Memory {
    pub(super) fn new(object: &Bound<'_, PyAny>, base: u64) -> PyResult<Self> {
        let target = PyBuffer::get(object)?;
        if target.readonly() || !target.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not writable or not C-contiguous"));
        }
        Ok(Self { target, base, tail: Vec::new() })
    }
}

impl Sink for Memory {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let at = (offset - self.base) as usize;
        let size = self.target.len_bytes();
        let inside = bytes.len().min(size.saturating_sub(at));
        if inside > 0 {
            // SAFETY: `at + inside` ≤ `size`; the memory is writable, alive while `target` is, and used by nobody else: it was
            // made for this save (see `flows/saves.py`).
            let memory = unsafe { std::slice::from_raw_parts_mut(self.target.buf_ptr().cast::<u8>(), size) };
            memory[at..at + inside].copy_from_slice(&bytes[..inside]);
        }
        let rest = &bytes[inside..];
        if rest.is_empty() {
            return Ok(());
        }
        let at = (at + inside) - size;
        if at + rest.len() > self.tail.len() {
            let more = at + rest.len() - self.tail.len();
            self.tail.try_reserve(more).map_err(|_| out_of_memory(more))?;
            self.tail.resize(at + rest.len(), 0);
        }
        self.tail[at..at + rest.len()].copy_from_slice(rest);
        Ok(())
    }
}

/// A Python file object as a sink, written in order; patched where it can seek.
pub(super) struct Stream {
    pub(super) file: Py<PyAny>,
    pub(super) seekable: bool,
    pub(super) raw: bool, // an io.RawIOBase, which may take less than it is given
    pub(super) position: u64,
}

impl Sink for Stream {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        Python::attach(|py| {
            let file = self.file.bind(py);
            let write = || -> PyResult<()> {
                let back = offset != self.position;
                if back {
                    file.call_method1("seek", (offset,))?;
                }
                let mut rest = bytes;
                while !rest.is_empty() {
                    let taken = file.call_method1("write", (rest,))?;
                    if !self.raw {
                        break; // what others return means nothing to zipfile either
                    }
                    match taken.extract::<Option<usize>>()? {
                        Some(n) if n > 0 => rest = &rest[n.min(rest.len())..],
                        _ => return Err(PyOSError::new_err("the file object takes no more bytes")),
                    }
                }
                if back {
                    file.call_method1("seek", (self.position,))?;
                }
                Ok(())
            };
            write().map_err(caller)
        })?;
        if offset == self.position {
            self.position += bytes.len() as u64;
        }
        Ok(())
    }

    fn can_patch(&self) -> bool {
        self.seekable
    }
}

/// A seekable Python file object, read at offsets.
pub(super) struct Seekable {
    file: Py<PyAny>,
    len: u64,
    lock: std::sync::Mutex<()>, // seek and read belong together
}

impl Seekable {
    pub(super) fn new(file: &Bound<'_, PyAny>) -> PyResult<Self> {
        let len = file.call_method1("seek", (0, 2))?.extract()?;
        Ok(Self { file: file.clone().unbind(), len, lock: std::sync::Mutex::new(()) })
    }
}

impl ReadAt for Seekable {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _guard = self.lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let read = |py: Python<'_>| -> PyResult<bool> {
            let file = self.file.bind(py);
            file.call_method1("seek", (offset,))?;
            let mut done = 0;
            while done < buf.len() {
                let part = file.call_method1("read", (buf.len() - done,))?;
                let part: &[u8] = part.extract()?;
                if part.is_empty() {
                    return Ok(false);
                }
                let Some(room) = buf.get_mut(done..done + part.len()) else {
                    return Err(PyOSError::new_err("the file object returned more bytes than were asked for"));
                };
                room.copy_from_slice(part);
                done += part.len();
            }
            Ok(true)
        };
        if Python::attach(read).map_err(caller)? {
            return Ok(());
        }
        Err(Error::new(Kind::Io(std::io::ErrorKind::UnexpectedEof.into()), "the file object ended early"))
    }

    fn is_native(&self) -> bool {
        false
    }
}

/// A tensor's bytes: 64-byte aligned memory of the core, which Python has by the buffer protocol (writable).
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Block(Slot);

impl Block {
    pub(super) fn new(slot: Slot) -> Self {
        Self(slot)
    }
}

#[pymethods]
impl Block {
    fn __len__(&self) -> usize {
        self.0.len
    }

    // SAFETY: the view points into a slot that `slf` keeps alive; the view holds a reference to `slf`. A slot is handed
    // out once, so writes through it race with nobody but other holders of the same Python object.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let slot = &slf.get().0;
        let start = slot.as_ptr(); // no reference: whoever has an earlier view may be writing
        // SAFETY: as above; `view` is valid by the protocol.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), slot.len.cast_signed(), 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// The buffer of a Python object as a file to read.
pub(super) fn source(object: &Bound<'_, PyAny>) -> PyResult<Arc<dyn ReadAt>> {
    Ok(Arc::new(Buffer::new(object)?))
}
