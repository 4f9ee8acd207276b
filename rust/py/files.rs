//! Files and directories by themselves: replaced when the new one is complete, locked, brought to stable storage.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::detached::detached;
use super::errors::to_py;
use crate::commit::{self, Committed, Options};
use crate::error::Context;

/// Why a file was written over instead of being replaced, and what it lost of the old one's attributes.
pub(super) type Outcome = (Option<&'static str>, Option<&'static str>);

pub(super) fn outcome(committed: Committed) -> Outcome {
    (committed.in_place, committed.lost)
}

/// Whether a save writes over the file at this path, so that what has it open sees the new content.
#[pyfunction]
pub(super) fn keeps_inode(py: Python<'_>, path: PathBuf) -> bool {
    py.detach(|| commit::keeps_inode(&path).is_some())
}

/// Removes what crashed saves of this path left beside it.
#[pyfunction]
pub(super) fn clear_leftovers(py: Python<'_>, path: PathBuf) {
    py.detach(|| commit::clear_leftovers(&path));
}

/// Replaces a small file atomically.
#[pyfunction]
#[pyo3(signature = (path, data, *, atomic = true, durable = false))]
pub(super) fn write_file(
    py: Python<'_>,
    path: PathBuf,
    data: Vec<u8>,
    atomic: bool,
    durable: bool,
) -> PyResult<Outcome> {
    detached(py, || commit::write(&path, &data, Options { atomic, durable, queued: false }).map(outcome))
}

/// A directory that replaces another when it is complete; a context manager.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Directory(Mutex<Option<commit::Directory>>, PathBuf);

#[pymethods]
impl Directory {
    #[new]
    #[pyo3(signature = (target, names, *, atomic = true, durable = false))]
    #[allow(clippy::needless_pass_by_value)] // extracted
    fn new(py: Python<'_>, target: PathBuf, names: Vec<String>, atomic: bool, durable: bool) -> PyResult<Self> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let made =
            detached(py, || commit::Directory::create(&target, &names, Options { atomic, durable, queued: false }))?;
        let path = made.path().to_owned();
        Ok(Self(Mutex::new(Some(made)), path))
    }

    #[getter]
    fn path(&self) -> &std::path::Path {
        &self.1
    }

    /// Puts the directory in its place; what it could not take over from the old one.
    fn commit(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        made.map_or(Ok(None), |d| detached(py, || d.commit()))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(made));
    }
}

/// Makes a directory and those above it.
#[pyfunction]
#[pyo3(signature = (path, *, durable = false))]
pub(super) fn make_directories(py: Python<'_>, path: PathBuf, durable: bool) -> PyResult<()> {
    detached(py, || commit::create_directories(&path, durable))
}

/// Brings a file, or a directory with everything in it, to stable storage.
#[pyfunction]
pub(super) fn sync(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    detached(py, || commit::sync(&path))
}

/// Brings the name of a file in its directory to stable storage.
#[pyfunction]
pub(super) fn sync_name(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    detached(py, || commit::sync_name(&path))
}

/// An exclusive lock on a file; a forked child does not hold it.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct FileLock(commit::FileLock);

#[pymethods]
impl FileLock {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let taken =
            commit::FileLock::take(&path).during("cannot lock the file").map_err(|e| to_py(e.with_path(&path)))?;
        if !taken.exclusive {
            let place = path.parent().unwrap_or(&path);
            let what = "the file system has no locks: nothing keeps a second writer from '%s'";
            py.import("logging")?.call_method1("getLogger", ("hornbeam",))?.call_method1("warning", (what, place))?;
        }
        Ok(Self(taken))
    }

    #[getter]
    fn held(&self) -> bool {
        self.0.is_held()
    }

    fn release(&self) {
        self.0.release();
    }
}

#[pyfunction]
fn leave_locks_to_parent() {
    commit::FileLock::leave_to_parent(); // whoever forks, or uses a lock, is attached to the interpreter
}

/// Has a forked child hold none of its parent's locks.
pub(super) fn prepare_for_fork(py: Python<'_>) -> PyResult<()> {
    let Some(register) = py.import("os")?.getattr_opt("register_at_fork")? else { return Ok(()) };
    let options = PyDict::new(py);
    options.set_item("after_in_child", wrap_pyfunction!(leave_locks_to_parent, py)?)?;
    register.call((), Some(&options)).map(drop)
}
