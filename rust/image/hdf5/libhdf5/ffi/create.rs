//! What is created while a file is laid out.

use std::ffi::{CStr, c_int};
use std::ptr;

use sys::h5a::{H5Acreate2, H5Awrite};
use sys::h5d::{H5Dcreate2, H5Dwrite_chunk};
use sys::h5g::H5Gcreate2;
use sys::h5i::hid_t;
use sys::h5p::H5Pset_chunk;
use sys::h5s::{H5S_class_t, H5Screate_simple};
use sys::h5t::{H5T_str_t, H5Tenum_insert, H5Tinsert};

use super::super::driver::Disk;
use super::{Id, Library, c_string, check, owned, sys};
use crate::error::{Error, Kind, Result};

// What the bindings lack or declare wrongly.
// SAFETY: signatures and layouts are those of the headers of HDF5 2.2.0, which is linked statically at that version.
unsafe extern "C" {
    static H5T_IEEE_F16LE_g: hid_t;
}

impl Library {
    pub(in super::super) fn create_group(&self, at: hid_t, name: &str, lcpl: hid_t, gcpl: hid_t) -> Result<Id<'_>> {
        let name = c_string(name)?;
        // SAFETY: lock held; `name` is a C string that outlives the call.
        owned(unsafe { H5Gcreate2(at, name.as_ptr(), lcpl, gcpl, 0) }, "H5Gcreate2")
    }

    /// `lists`: how to create the link and the dataset.
    pub(in super::super) fn create_dataset(
        &self,
        at: hid_t,
        name: &str,
        dtype: hid_t,
        space: hid_t,
        lists: [hid_t; 2],
    ) -> Result<Id<'_>> {
        let name = c_string(name)?;
        // SAFETY: as above.
        owned(unsafe { H5Dcreate2(at, name.as_ptr(), dtype, space, lists[0], lists[1], 0) }, "H5Dcreate2")
    }

    pub(in super::super) fn set_chunk(&self, dcpl: hid_t, shape: &[u64]) -> Result<()> {
        let rank = c_int::try_from(shape.len()).unwrap_or(c_int::MAX); // the library refuses more than 32
        // SAFETY: lock held; the library reads `shape.len()` dimensions.
        check(unsafe { H5Pset_chunk(dcpl, rank, shape.as_ptr()) }.into(), "H5Pset_chunk").map(drop)
    }

    /// Has the library find a place for a chunk, filtered but for what `skipped` says, of a dataset on `disk`.
    pub(in super::super) fn place_chunk(
        &self,
        disk: &Disk,
        dataset: hid_t,
        start: &[u64],
        skipped: u32,
        bytes: &[u8],
    ) -> Result<u64> {
        let mut at = [0; sys::h5s::H5S_MAX_RANK as usize]; // as many as the library can read
        at.iter_mut().zip(start).for_each(|(to, &i)| *to = i);
        disk.place(bytes, || {
            // SAFETY: lock held; the library reads an index for each dimension, and `bytes.len()` bytes.
            let status =
                unsafe { H5Dwrite_chunk(dataset, 0, skipped, at.as_ptr(), bytes.len(), bytes.as_ptr().cast()) };
            check(status.into(), "H5Dwrite_chunk").map(drop)
        })
    }

    /// Writes an attribute of variable-length strings: one, or with `row` as many as there are.
    pub(in super::super) fn write_strings(
        &self,
        at: hid_t,
        name: &str,
        dtype: &VarString,
        strings: &[&[u8]],
        row: bool,
    ) -> Result<()> {
        if !row && strings.len() != 1 {
            return Err(Error::new(Kind::Internal, "a scalar attribute has one string"));
        }
        let name = c_string(name)?;
        let values = strings.iter().map(c_string).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<_> = values.iter().map(|v| v.as_ptr()).collect();
        let shape = [strings.len() as u64];
        let space = self.create_space(if row { &shape } else { &[] })?;
        // SAFETY: as above; variable-length strings are passed as pointers to them, one for each element.
        unsafe {
            let attribute: Id = owned(H5Acreate2(at, name.as_ptr(), *dtype.0, *space, 0, 0), "H5Acreate2")?;
            check(H5Awrite(*attribute, *dtype.0, pointers.as_ptr().cast()).into(), "H5Awrite")?;
        }
        Ok(())
    }

    /// Writes an attribute that is a row of strings of one length, padded with NULs.
    pub(in super::super) fn write_fixed(
        &self,
        at: hid_t,
        name: &str,
        strings: &[Vec<u8>],
        length: usize,
    ) -> Result<()> {
        let name = c_string(name)?;
        let dtype = self.H5Tcopy(*sys::h5t::H5T_C_S1)?;
        self.H5Tset_size(*dtype, length)?;
        self.H5Tset_strpad(*dtype, H5T_str_t::H5T_STR_NULLPAD)?;
        let space = self.create_space(&[strings.len() as u64])?;
        let mut bytes = vec![0u8; strings.len() * length];
        bytes.chunks_mut(length).zip(strings).for_each(|(to, s)| to.iter_mut().zip(s).for_each(|(to, &b)| *to = b));
        // SAFETY: as above; the library reads as many bytes as the space has elements of the type.
        unsafe {
            let attribute: Id = owned(H5Acreate2(at, name.as_ptr(), *dtype, *space, 0, 0), "H5Acreate2")?;
            check(H5Awrite(*attribute, *dtype, bytes.as_ptr().cast()).into(), "H5Awrite")?;
        }
        Ok(())
    }

    /// Writes an attribute that is a row of no numbers.
    pub(in super::super) fn write_nothing(&self, at: hid_t, name: &str) -> Result<()> {
        let name = c_string(name)?;
        let space = self.create_space(&[0])?;
        // SAFETY: as above; nothing is written.
        owned(unsafe { H5Acreate2(at, name.as_ptr(), *sys::h5t::H5T_IEEE_F64LE, *space, 0, 0) }, "H5Acreate2").map(drop)
    }

    pub(in super::super) fn create_space(&self, shape: &[u64]) -> Result<Id<'_>> {
        if shape.is_empty() {
            return self.H5Screate(H5S_class_t::H5S_SCALAR);
        }
        let rank = c_int::try_from(shape.len()).unwrap_or(c_int::MAX); // the library refuses more than 32
        // SAFETY: lock held; the library reads `shape.len()` dimensions.
        owned(unsafe { H5Screate_simple(rank, shape.as_ptr(), ptr::null()) }, "H5Screate_simple")
    }

    pub(in super::super) fn add_member(
        &self,
        compound: hid_t,
        name: &CStr,
        offset: usize,
        member: hid_t,
    ) -> Result<()> {
        // SAFETY: lock held, `name` is a C string.
        check(unsafe { H5Tinsert(compound, name.as_ptr(), offset, member) }.into(), "H5Tinsert").map(drop)
    }

    /// Adds a value to an enumeration over one-byte integers.
    pub(in super::super) fn add_value(&self, enumeration: hid_t, name: &CStr, value: u8) -> Result<()> {
        if self.H5Tget_size(enumeration)? != 1 {
            return Err(Error::new(Kind::Internal, "enumeration is not of one byte"));
        }
        // SAFETY: lock held, `name` is a C string, the library reads the one byte just checked.
        let status = unsafe { H5Tenum_insert(enumeration, name.as_ptr(), (&raw const value).cast()) };
        check(status.into(), "H5Tenum_insert").map(drop)
    }

    /// The type of variable-length strings.
    pub(in super::super) fn var_string(&self, set: sys::h5t::H5T_cset_t) -> Result<VarString<'_>> {
        let dtype = self.H5Tcopy(*sys::h5t::H5T_C_S1)?;
        self.H5Tset_size(*dtype, sys::h5t::H5T_VARIABLE)?;
        self.H5Tset_cset(*dtype, set)?;
        Ok(VarString(dtype))
    }

    /// `H5T_IEEE_F16LE`, which the bindings lack.
    pub(in super::super) fn f16(&self) -> hid_t {
        // SAFETY: set by `H5open` and never changed after.
        unsafe { H5T_IEEE_F16LE_g }
    }
}

/// A variable-length string type (a type of its own because values of it are pointers).
pub(in super::super) struct VarString<'l>(Id<'l>);
