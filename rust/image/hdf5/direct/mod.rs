//! The default engine: our own emitter and reader of the HDF5 that h5py and Keras write (its "earliest" format:
//! superblock version 0, symbol-table groups, version 1 object headers, contiguous datasets).
//!
//! libhdf5 takes 25 to 60 µs a dataset for the same; it is the reference this engine is tested against.
//! Section numbers refer to the HDF5 File Format Specification, version 3.0.
#![forbid(unsafe_code)]

pub(in crate::image::hdf5) mod index;
mod layout;

use crate::error::{Error, Kind, Result};
use crate::image::{Engine, EngineKind, Index, Layout};
use crate::io::ReadAt;
use crate::tree::Tree;

/// The signature every HDF5 image starts with.
pub const SIGNATURE: [u8; 8] = *b"\x89HDF\r\n\x1a\n";

/// An address that points nowhere (§"Undefined address").
const UNDEFINED: u64 = u64::MAX;

/// Header message types (§IV.A.2).
mod message {
    pub(super) const DATASPACE: u16 = 0x01;
    pub(super) const LINK_INFO: u16 = 0x02;
    pub(super) const DATATYPE: u16 = 0x03;
    pub(super) const OLD_FILL_VALUE: u16 = 0x04;
    pub(super) const FILL_VALUE: u16 = 0x05;
    pub(super) const LINK: u16 = 0x06;
    pub(super) const EXTERNAL_FILES: u16 = 0x07;
    pub(super) const LAYOUT: u16 = 0x08;
    pub(super) const FILTERS: u16 = 0x0b;
    pub(super) const ATTRIBUTE: u16 = 0x0c;
    pub(super) const CONTINUATION: u16 = 0x10;
    pub(super) const SYMBOL_TABLE: u16 = 0x11;
    pub(super) const ATTRIBUTE_INFO: u16 = 0x15;
    pub(super) const REFERENCE_COUNT: u16 = 0x16;
    /// Known, and of no meaning for who reads values: nothing, group info, comment, times, tables of shared messages, B-tree
    /// sizes, driver, free space, cache.
    pub(super) const PASSED_OVER: [u16; 10] = [0x00, 0x0a, 0x0d, 0x0e, 0x0f, 0x12, 0x13, 0x14, 0x17, 0x18];
}

/// The engine without a C library.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direct;

impl Engine for Direct {
    fn kind(&self) -> EngineKind {
        EngineKind::Direct
    }

    fn lay_out(&self, tree: &Tree) -> Result<Layout> {
        layout::lay_out(tree)
    }

    fn index(&self, image: &dyn ReadAt) -> Result<Index> {
        index::index(image)
    }

    fn read(&self, _image: &dyn ReadAt, paths: &[&str], _out: &mut [&mut [u8]]) -> Result<()> {
        match paths.first() {
            None => Ok(()),
            Some(path) => {
                Err(Error::new(Kind::Unsupported, "the direct engine reads contiguous datasets only").with_entry(path))
            }
        }
    }
}
