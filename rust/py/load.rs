//! `open`, `File`, `Weights`, `Reading`: a file, the image in it, a read in progress.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffer::{Block, Seekable, source};
use super::detached::{detached, interrupt};
use super::errors::to_py;
use crate::archive::read::{Member, Members};
use crate::error::{Error, Kind, Result};
use crate::image::{Found, Storage};
use crate::io::ReadAt;
use crate::load::{self, Choice};
use crate::tree::Attribute;

pub(super) fn choice(engine: &str) -> PyResult<Choice> {
    match engine {
        "auto" => Ok(Choice::Auto),
        "direct" => Ok(Choice::Direct),
        "libhdf5" => Ok(Choice::LibHdf5),
        "safetensors" => Ok(Choice::Safetensors),
        other => Err(PyValueError::new_err(format!("engine must be 'auto', 'direct' or 'libhdf5', not '{other}'"))),
    }
}

/// An open file: an archive, or a bare weights image.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct File {
    source: Arc<dyn ReadAt>,
    path: Option<PathBuf>,
    members: Option<Members>,
}

#[pyfunction]
#[pyo3(signature = (target, *, archive))]
pub(super) fn open(py: Python<'_>, target: &Bound<'_, PyAny>, archive: bool) -> PyResult<File> {
    let path = target.extract::<PathBuf>().ok();
    let source = match &path {
        Some(path) => detached(py, || load::open(path))?,
        None if target.hasattr("seek")? => Arc::new(Seekable::new(target)?),
        None => source(target)?,
    };
    let read = || archive.then(|| Members::open(&*source)).transpose();
    let members = detached(py, || with_path(read(), path.as_ref()))?;
    Ok(File { source, path, members })
}

/// Refuses datasets of several images, by their positions, that take far more memory, together, than their files say.
#[pyfunction]
pub(super) fn check_expansion(images: Vec<(PyRef<'_, Weights>, Vec<usize>)>) -> PyResult<()> {
    load::check_expansion(images.iter().map(|(w, positions)| (&*w.weights, &positions[..]))).map_err(to_py)
}

fn with_path<T>(result: Result<T>, path: Option<&PathBuf>) -> Result<T> {
    result.map_err(|e| match path {
        Some(path) => e.with_path(path),
        None => e,
    })
}

#[cold]
fn no_such_dataset() -> PyErr {
    PyValueError::new_err("no dataset has this position")
}

/// The NumPy name; `object` for what holds no numbers, as h5py has it.
fn dtype(found: &Found) -> Cow<'static, str> {
    match found.storage {
        Storage::Unreadable(_) => "object".into(),
        _ => found.dtype.name(),
    }
}

impl File {
    fn member(&self, name: &str) -> Result<&Member> {
        let missing = || Error::new(Kind::Archive, format!("There is no item named '{name}' in the archive"));
        self.members.as_ref().and_then(|m| m.get(name)).ok_or_else(missing)
    }
}

#[pymethods]
impl File {
    /// `(name, bytes, stored bytes)` of every member.
    fn members(&self) -> Vec<(String, u64, u64)> {
        let all = self.members.iter().flat_map(Members::iter);
        all.map(|m| (m.name.clone(), m.size, m.stored)).collect()
    }

    /// All bytes of a member, CRC checked.
    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let read = || self.member(name).and_then(|m| m.read(&*self.source, &interrupt));
        let bytes = detached(py, || with_path(read(), self.path.as_ref()))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Refuses a member, or without a name all of them together, that stands for more than `floor` bytes and
    /// `max_expansion` times what it stores.
    fn check_expansion(&self, name: Option<&str>, floor: u64, max_expansion: u64) -> PyResult<()> {
        let checked = match (name, &self.members) {
            (None, Some(members)) => members.check_expansion(floor, max_expansion),
            (None, None) => Ok(()),
            (Some(name), _) => self.member(name).and_then(|m| m.check_expansion(floor, max_expansion)),
        };
        with_path(checked, self.path.as_ref()).map_err(to_py)
    }

    /// What it is, by how it begins.
    fn kind(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        detached(py, || with_path(load::kind(&*self.source), self.path.as_ref()))
    }

    /// Indexes the weights.
    #[pyo3(signature = (*, engine = "auto"))]
    fn weights(&self, py: Python<'_>, engine: &str) -> PyResult<Weights> {
        let choice = choice(engine)?;
        let open =
            || load::Weights::open_interruptibly(Arc::clone(&self.source), self.members.as_ref(), choice, &interrupt);
        let weights = detached(py, || with_path(open(), self.path.as_ref()))?;
        Ok(Weights { weights: Arc::new(weights), path: self.path.clone() })
    }
}

/// The index of a weights image.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Weights {
    weights: Arc<load::Weights>,
    path: Option<PathBuf>,
}

#[pymethods]
impl Weights {
    #[getter]
    fn engine(&self) -> &'static str {
        self.weights.engine().name()
    }

    #[getter]
    fn has_crc(&self) -> bool {
        self.weights.has_crc()
    }

    /// `(path, attributes)` of every group.
    fn groups(&self) -> Vec<(String, Vec<Attribute>)> {
        self.weights.index().groups.clone()
    }

    /// `(path, dtype, shape, attributes)` of every dataset.
    #[allow(clippy::type_complexity)] // one row of a table
    fn datasets(&self) -> Vec<(String, String, Vec<u64>, Vec<Attribute>)> {
        let row = |d: &Found| (d.path.clone(), dtype(d).into_owned(), d.shape.clone(), d.attributes.clone());
        self.weights.index().datasets.iter().map(row).collect()
    }

    /// Attributes of the root.
    #[getter]
    fn attributes(&self) -> Vec<Attribute> {
        self.weights.index().attributes.clone()
    }

    /// The positions of those whose bytes are not in the file as they are.
    fn decoded(&self) -> Vec<usize> {
        self.weights.decoded().collect()
    }

    /// The paths of `datasets()`.
    fn names(&self) -> Vec<&str> {
        self.weights.index().datasets.iter().map(|d| &*d.path).collect()
    }

    /// `(dtype, shape, bytes, attributes, offset in the file)` of one dataset.
    #[allow(clippy::type_complexity)] // one row of a table
    fn dataset(&self, i: usize) -> PyResult<(Cow<'static, str>, &[u64], u64, &[Attribute], Option<u64>)> {
        let d = self.weights.index().datasets.get(i).ok_or_else(no_such_dataset)?;
        Ok((dtype(d), &d.shape, d.nbytes, &d.attributes, self.weights.offset(i)))
    }

    /// Some bytes of a dataset.
    fn read(&self, py: Python<'_>, i: usize, start: u64, stop: u64) -> PyResult<Block> {
        if i >= self.weights.index().datasets.len() {
            return Err(no_such_dataset());
        }
        let read = || with_path(self.weights.read_part(i, start, stop, &interrupt), self.path.as_ref());
        detached(py, read).map(Block::new)
    }

    /// Starts to read datasets by their position in `datasets()`.
    #[pyo3(signature = (wanted, *, verify = true, read_ahead))]
    fn fetch(&self, py: Python<'_>, wanted: Vec<usize>, verify: bool, read_ahead: u64) -> PyResult<Reading> {
        if wanted.iter().any(|&i| i >= self.weights.index().datasets.len()) {
            return Err(no_such_dataset());
        }
        let reading = detached(py, || with_path(self.weights.fetch(&wanted, verify, read_ahead), self.path.as_ref()))?;
        Ok(Reading { reading: Some(reading), path: self.path.clone() })
    }
}

/// A read in progress.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Reading {
    reading: Option<load::Reading>, // until it is dropped
    path: Option<PathBuf>,
}

impl Reading {
    fn reading(&self) -> &load::Reading {
        self.reading.as_ref().expect("there until it is dropped")
    }
}

/// The reader is waited for, and may itself wait for the interpreter.
impl Drop for Reading {
    fn drop(&mut self) {
        let reading = self.reading.take();
        Python::attach(|py| py.detach(|| drop(reading)));
    }
}

#[pymethods]
impl Reading {
    #[getter]
    fn nbytes(&self) -> u64 {
        self.reading().nbytes()
    }

    #[getter]
    fn done(&self) -> u64 {
        self.reading().done()
    }

    /// Waits for a dataset and takes it; `None` if it was taken before. A ValueError when there is none at `i`.
    fn take(&self, py: Python<'_>, i: usize) -> PyResult<Option<Block>> {
        let slot = detached(py, || with_path(self.reading().take(i, &interrupt), self.path.as_ref()))?;
        Ok(slot.map(Block::new))
    }

    /// Waits until every byte was read and checked.
    #[pyo3(signature = (*, drop_rest = false))]
    fn complete(&self, py: Python<'_>, drop_rest: bool) -> PyResult<()> {
        detached(py, || with_path(self.reading().complete(drop_rest, &interrupt), self.path.as_ref()))
    }
}
