//! The boundary: the only place that names pyo3. Every function here extracts, runs the core detached, converts.
//!
//! Lock order: detach from the interpreter first, then wait or lock; never attach while holding a lock.

#![allow(clippy::needless_pass_by_value)] // arguments are extracted by value

mod attribute;
mod buffer;
mod detached;
pub(crate) mod errors;
mod files;
mod json;
mod load;
mod save;

use pyo3::prelude::*;

/// `hornbeam._core`; documented and typed in `_core.pyi`.
#[pymodule]
mod _core {
    use super::{PyResult, Python};
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::buffer::Block;
    #[pymodule_export]
    use super::files::{
        Directory, FileLock, clear_leftovers, keeps_inode, make_directories, sync, sync_name, write_file,
    };
    #[pymodule_export]
    use super::json::{decode_json, encode_json};
    #[pymodule_export]
    use super::load::{File, Reading, Weights, check_expansion, open};
    #[pymodule_export]
    use super::save::{Plan, Save, commit_indexed, plan};

    /// Before any thread of ours can run.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        #[cfg(all(unix, feature = "libhdf5"))]
        crate::image::hdf5::libhdf5::prepare_for_fork();
        super::files::prepare_for_fork(module.py())
    }

    /// How this extension was built.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("version", env!("CARGO_PKG_VERSION"))?;
        info.set_item("debug", cfg!(debug_assertions))?;
        info.set_item("libhdf5", cfg!(feature = "libhdf5"))?;
        Ok(info)
    }
}
