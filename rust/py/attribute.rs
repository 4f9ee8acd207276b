//! Values of attributes as Python has them: `str`, `bytes`, a list of `bytes`, and `(length, list)` where all have one length.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::tree::Value;

fn strings(all: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u8>>> {
    all.try_iter()?.map(|item| Ok(item?.cast::<PyBytes>()?.as_bytes().to_vec())).collect()
}

impl<'py> FromPyObject<'_, 'py> for Value {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(text) = obj.extract::<String>() {
            return Ok(Self::Text(text));
        }
        if let Ok(bytes) = obj.cast::<PyBytes>() {
            return Ok(Self::Bytes(bytes.as_bytes().to_vec()));
        }
        if let Ok(pair) = obj.cast::<PyTuple>() {
            let (length, all) = pair.extract::<(usize, Bound<'py, PyAny>)>()?;
            return Ok(Self::Fixed(length, strings(&all)?));
        }
        if obj.is_instance_of::<PyList>() {
            return Ok(Self::List(strings(&obj)?));
        }
        Err(PyTypeError::new_err("an attribute must be str, bytes, a list of bytes or its pair with their length"))
    }
}

impl<'py> IntoPyObject<'py> for Value {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        (&self).into_pyobject(py)
    }
}

impl<'py> IntoPyObject<'py> for &Value {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let bytes = |all: &[Vec<u8>]| all.iter().map(|s| PyBytes::new(py, s)).collect::<Vec<_>>();
        Ok(match self {
            Value::Text(text) => text.into_pyobject(py)?.into_any(),
            Value::Bytes(b) => PyBytes::new(py, b).into_any(),
            Value::List(all) => PyList::new(py, bytes(all))?.into_any(),
            Value::Fixed(length, all) => (*length, PyList::new(py, bytes(all))?).into_pyobject(py)?.into_any(),
        })
    }
}
