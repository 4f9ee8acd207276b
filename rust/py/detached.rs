//! Running the core without holding the interpreter.

use pyo3::prelude::*;

use super::errors::to_py;
use crate::error::{Error, Kind, Result};

/// Runs `f` detached, so that other Python threads go on; maps its error.
pub(super) fn detached<T: Send>(py: Python<'_>, f: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(f).map_err(to_py)
}

/// Ctrl-C while waiting: the waiting core gives up with the exception.
pub(super) fn interrupt() -> Result<()> {
    #[allow(clippy::redundant_closure_for_method_calls)] // the method is not general enough in its lifetime
    Python::attach(|py| py.check_signals()).map_err(caller)
}

/// Carries a Python exception through the core.
pub(super) fn caller(e: PyErr) -> Error {
    Error::new(Kind::Caller(Box::new(e)), "the caller failed")
}
