//! The engine on the C library: the reference for the direct engine, and the reader of every other legal HDF5 file.
//!
//! `ffi` makes the C library safe to call (lock, identifiers, errors) and `driver` gives it its bytes; neither knows
//! what a weights file is. `write` lays out, `read` indexes, `chunks` decodes chunked data outside the lock.
//!
//! libhdf5 itself is not memory-safe on hostile files (the HDF Group says so). This engine narrows what reaches it: no
//! plugins, one image and never a second file, nothing but groups and plain datasets. It cannot repair the library.

mod chunks;
mod driver;
mod ffi;
mod read;
mod write;

#[cfg(unix)]
pub use ffi::prepare_for_fork;

use crate::error::Result;
use crate::image::{Chunked, Compression, Engine, EngineKind, Index, Layout};
use crate::io::ReadAt;
use crate::tree::Tree;

/// The engine on `hdf5-metno-sys`. Its calls into the library are serialised by the process-wide HDF5 lock.
#[derive(Clone, Copy, Debug, Default)]
pub struct LibHdf5;

impl Engine for LibHdf5 {
    fn kind(&self) -> EngineKind {
        EngineKind::LibHdf5
    }

    fn lay_out(&self, tree: &Tree) -> Result<Layout> {
        write::lay_out(tree)
    }

    fn lay_out_chunked(&self, tree: &Tree, chunks: &[Option<Vec<u64>>], how: Compression) -> Result<Box<dyn Chunked>> {
        Ok(Box::new(write::Placing::new(tree, chunks, how)?))
    }

    fn index(&self, image: &dyn ReadAt) -> Result<Index> {
        read::index(image)
    }

    fn read(&self, image: &dyn ReadAt, paths: &[&str], out: &mut [&mut [u8]]) -> Result<()> {
        read::read(image, paths, out)
    }
}
