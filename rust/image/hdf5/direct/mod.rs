//! The default engine: our own emitter and reader of the HDF5 that h5py and Keras write (its "earliest" format:
//! superblock version 0, symbol-table groups, version 1 object headers, contiguous datasets).
//!
//! `object` walks an image, `layout` writes one; both speak of messages (`message`) and of the structures around them
//! (`structure`), and neither knows an offset in one.
//!
//! libhdf5 takes 25 to 60 µs a dataset for the same; it is the reference this engine is tested against.
//! Section numbers refer to the HDF5 File Format Specification, version 3.0.
#![forbid(unsafe_code)]

mod fields;
mod layout;
mod lookup3;
mod message;
pub(in crate::image::hdf5) mod object;
mod pages;
mod structure;

use crate::error::{Error, Kind, Result};
use crate::image::{Engine, EngineKind, Index, Layout};
use crate::io::ReadAt;
use crate::tree::Tree;

/// The signature every HDF5 image starts with.
pub const SIGNATURE: [u8; 8] = *b"\x89HDF\r\n\x1a\n";

/// An address that points nowhere (§"Undefined address").
const UNDEFINED: u64 = u64::MAX;

#[cold]
fn malformed(what: &str) -> Error {
    Error::new(Kind::Image, format!("malformed HDF5: {what}")).with_advice("The file is damaged; use another copy.")
}

#[cold]
fn unsupported(what: &str) -> Error {
    Error::new(Kind::Unsupported, format!("the direct engine does not read {what}"))
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
        object::index(image)
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
