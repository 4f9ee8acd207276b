//! The one mapping from [`Error`] to Python exceptions; the classes are in `hornbeam/errors.py`.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Error, Kind, posix_name};

/// The Python exception for `error`, with its place as attributes.
pub(crate) fn to_py(error: Error) -> PyErr {
    if !matches!(error.kind(), Kind::Caller(_)) {
        return Python::attach(|py| build(py, &error).unwrap_or_else(|e| e));
    }
    match error.into_kind() {
        Kind::Caller(e) => match e.downcast::<PyErr>() {
            Ok(e) => *e,
            Err(e) => PyRuntimeError::new_err(e.to_string()),
        },
        _ => unreachable!("checked above"),
    }
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let kind = match error.kind() {
        Kind::Io(_) => "io",
        Kind::Archive => "archive",
        Kind::Crc => "crc",
        Kind::Image => "image",
        Kind::Json(_) => "json",
        Kind::Limit => "limit",
        Kind::Unsafe => "unsafe",
        Kind::Unsupported => "unsupported",
        Kind::Invalid | Kind::Changed | Kind::Internal | Kind::Caller(_) => "invalid",
        Kind::Cancelled => "cancelled",
        Kind::Memory => "memory",
    };
    let place = PyDict::new(py);
    place.set_item("path", error.path().map(|p| p.to_string_lossy()))?;
    place.set_item("member", error.member())?;
    place.set_item("entry", error.entry())?;
    place.set_item("expected", error.expected())?;
    place.set_item("found", error.found())?;
    if let Kind::Io(io) = error.kind() {
        place.set_item("errno", errno(py, io)?)?;
    }
    let make = py.import("hornbeam.errors")?.getattr("_from_core")?;
    Ok(PyErr::from_value(make.call((kind, error.to_string()), Some(&place))?))
}

/// The number that Python's `errno` gives the error. The system's own, except on Windows, where it is another kind of
/// number: there, and for Rust's own errors, the kind decides.
fn errno(py: Python<'_>, io: &std::io::Error) -> PyResult<Option<i32>> {
    match (io.raw_os_error(), posix_name(io.kind())) {
        (Some(number), _) if !cfg!(windows) => Ok(Some(number)),
        (_, Some(name)) => py.import("errno")?.getattr_opt(name)?.map(|number| number.extract()).transpose(),
        _ => Ok(None),
    }
}
