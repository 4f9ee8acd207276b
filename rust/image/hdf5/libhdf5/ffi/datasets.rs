//! Types, values and chunks of datasets.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

use sys::h5::{H5free_memory, haddr_t, hsize_t};
use sys::h5d::{H5D_fill_value_t, H5Dchunk_iter, H5Dread};
use sys::h5i::hid_t;
use sys::h5p::{H5Pfill_value_defined, H5Pget_chunk, H5Pget_chunk_opts, H5Pget_fill_value, H5Pget_filter2};
use sys::h5s::{H5S_class_t, H5Sget_simple_extent_dims, H5Sget_simple_extent_npoints};
use sys::h5t::{H5Tget_fields, H5Tget_member_name, H5Tget_member_value};

use super::{Library, check, failure, sys};
use crate::error::{Error, Kind, Result};

/// A chunk of a dataset: its number (in C order, of the places for chunks), where its bytes are, which filters were
/// skipped.
pub(in super::super) struct Chunk {
    pub(in super::super) cell: u64,
    pub(in super::super) skipped: u32,
    pub(in super::super) address: u64,
    pub(in super::super) size: u64,
}

/// A fill value is in a message of the object header, whose size has 16 bits.
const MAX_FILL_BYTES: usize = 1 << 16;

impl Library {
    /// The value of a member of an enumeration over one-byte integers.
    pub(in super::super) fn value(&self, enumeration: hid_t, member: c_uint) -> Result<u8> {
        let mut value = 0u8;
        if self.H5Tget_size(enumeration)? != 1 {
            return Err(Error::new(Kind::Unsupported, "enumeration is not of one byte"));
        }
        // SAFETY: lock held, the library writes the one byte just checked.
        let status = unsafe { H5Tget_member_value(enumeration, member, (&raw mut value).cast()) };
        check(status.into(), "H5Tget_member_value")?;
        Ok(value)
    }

    /// The name of a member of a compound or enumeration.
    pub(in super::super) fn member_name(&self, dtype: hid_t, member: c_uint) -> Result<String> {
        // SAFETY: lock held; the library returns null or a C string that it allocated for us.
        unsafe {
            let name = H5Tget_member_name(dtype, member);
            if name.is_null() {
                return Err(failure("H5Tget_member_name"));
            }
            let text = CStr::from_ptr(name).to_string_lossy().into_owned();
            H5free_memory(name.cast());
            Ok(text)
        }
    }

    /// `[sign position, exponent position, exponent bits, mantissa position, mantissa bits]` of a float.
    pub(in super::super) fn float_fields(&self, dtype: hid_t) -> Result<[usize; 5]> {
        let mut fields = [0; 5];
        let [sign, exponent_at, exponent, mantissa_at, mantissa] = &mut fields;
        // SAFETY: lock held; five places for five numbers.
        check(
            unsafe { H5Tget_fields(dtype, sign, exponent_at, exponent, mantissa_at, mantissa) }.into(),
            "H5Tget_fields",
        )?;
        Ok(fields)
    }

    /// Dimensions of a dataset; none where it has no elements.
    pub(in super::super) fn shape(&self, dataset: hid_t) -> Result<Vec<u64>> {
        Ok(self.dimensions(*self.H5Dget_space(dataset)?)?.unwrap_or_default())
    }

    /// Dimensions; empty for a scalar, `None` for a dataspace without elements of its own (null).
    pub(in super::super) fn dimensions(&self, space: hid_t) -> Result<Option<Vec<u64>>> {
        if self.H5Sget_simple_extent_type(space)? == H5S_class_t::H5S_NULL as usize {
            return Ok(None);
        }
        let mut dims = [0; sys::h5s::H5S_MAX_RANK as usize];
        // SAFETY: lock held; the library knows no more dimensions than `H5S_MAX_RANK` and checks that on reading.
        let rank = unsafe { H5Sget_simple_extent_dims(space, dims.as_mut_ptr(), ptr::null_mut()) };
        Ok(Some(dims[..check(rank.into(), "H5Sget_simple_extent_dims")?].to_vec()))
    }

    /// All elements of a dataset, in the file's own representation; `out` must be of their size.
    pub(in super::super) fn read_all(&self, dataset: hid_t, dtype: hid_t, out: &mut [u8]) -> Result<()> {
        let space = self.H5Dget_space(dataset)?;
        // SAFETY: lock held, no pointers.
        let points = check(unsafe { H5Sget_simple_extent_npoints(*space) }, "H5Sget_simple_extent_npoints")?;
        if points.checked_mul(self.H5Tget_size(dtype)?) != Some(out.len()) {
            return Err(Error::new(Kind::Image, "dataset changed its size while it was read"));
        }
        // SAFETY: lock held; all points of `dtype` fill `out` exactly.
        check(unsafe { H5Dread(dataset, dtype, 0, 0, 0, out.as_mut_ptr().cast()) }.into(), "H5Dread").map(drop)
    }

    /// The fill value in the representation of `dtype`, if one was set.
    pub(in super::super) fn fill_value(&self, dcpl: hid_t, dtype: hid_t) -> Result<Option<Vec<u8>>> {
        let mut status = H5D_fill_value_t::H5D_FILL_VALUE_DEFAULT;
        // SAFETY: lock held; the library writes one of its enumerators.
        check(unsafe { H5Pfill_value_defined(dcpl, &raw mut status) }.into(), "H5Pfill_value_defined")?;
        if status != H5D_fill_value_t::H5D_FILL_VALUE_USER_DEFINED {
            return Ok(None);
        }
        let size = self.H5Tget_size(dtype)?;
        if size > MAX_FILL_BYTES {
            return Err(Error::new(Kind::Image, "fill value is larger than an object header can hold"));
        }
        let mut value = vec![0; size];
        // SAFETY: lock held; the library writes one element of `dtype`.
        check(unsafe { H5Pget_fill_value(dcpl, dtype, value.as_mut_ptr().cast()) }.into(), "H5Pget_fill_value")?;
        Ok(Some(value))
    }

    /// Dimensions of a chunk, and whether chunks at the edge skip the filters.
    pub(in super::super) fn chunk_shape(&self, dcpl: hid_t) -> Result<(Vec<u64>, bool)> {
        let (mut dims, mut options) = ([0; 32], 0);
        // SAFETY: lock held; the library writes at most as many dimensions as it is told there is room for.
        let rank = unsafe {
            check(H5Pget_chunk_opts(dcpl, &raw mut options).into(), "H5Pget_chunk_opts")?;
            check(H5Pget_chunk(dcpl, 32, dims.as_mut_ptr()).into(), "H5Pget_chunk")?
        };
        let dims = dims.get(..rank).ok_or_else(|| Error::new(Kind::Image, "chunk has too many dimensions"))?;
        Ok((dims.to_vec(), options & sys::h5d::H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS != 0))
    }

    /// Number and first parameter of a filter.
    pub(in super::super) fn filter(&self, dcpl: hid_t, index: c_uint) -> Result<(usize, u32)> {
        let (mut flags, mut count, mut values, mut config) = (0, 8, [0; 8], 0);
        let out = (&raw mut flags, &raw mut count, values.as_mut_ptr(), &raw mut config);
        // SAFETY: lock held; `count` says how many parameters there is room for, and no name is asked for.
        let id = unsafe { H5Pget_filter2(dcpl, index, out.0, out.1, out.2, 0, ptr::null_mut(), out.3) };
        Ok((check(id.into(), "H5Pget_filter2")?, if count > 0 { values[0] } else { 0 }))
    }

    /// Calls `each` with every chunk of a dataset that is in the file, until it says no; `shape` and `chunk` are the
    /// dataset's.
    ///
    /// # Errors
    /// `Image`, also for a chunk outside of the dataset or between the places for chunks.
    pub(in super::super) fn chunks(
        &self,
        dataset: hid_t,
        shape: &[u64],
        chunk: &[u64],
        each: &mut dyn FnMut(Chunk) -> bool,
    ) -> Result<()> {
        struct Visit<'a> {
            shape: &'a [u64],
            chunk: &'a [u64],
            each: &'a mut dyn FnMut(Chunk) -> bool,
            misplaced: bool,
        }
        extern "C" fn visit(
            start: *const hsize_t,
            skipped: c_uint,
            address: haddr_t,
            size: hsize_t,
            data: *mut c_void,
        ) -> c_int {
            // SAFETY: `data` is the `Visit` below, whose rank the library's record has too (checked by the caller).
            let (start, visit) = unsafe {
                let visit = &mut *data.cast::<Visit>();
                (std::slice::from_raw_parts(start, visit.shape.len()), visit)
            };
            let mut cell = 0;
            for ((&start, &size), &step) in start.iter().zip(visit.shape).zip(visit.chunk) {
                if start >= size || !start.is_multiple_of(step) {
                    visit.misplaced = true;
                    return 1;
                }
                cell = cell * size.div_ceil(step) + start / step; // no more than elements, whose bytes fit 64 bits
            }
            c_int::from(!(visit.each)(Chunk { cell, skipped, address, size }))
        }
        let mut all = Visit { shape, chunk, each, misplaced: false };
        // SAFETY: lock held; `visit` has the callback's type and `all` outlives the call.
        let status = unsafe { H5Dchunk_iter(dataset, 0, Some(visit), (&raw mut all).cast()) };
        check(status.into(), "H5Dchunk_iter")?;
        if all.misplaced {
            return Err(Error::new(Kind::Image, "chunks overlap or lie outside of the dataset"));
        }
        Ok(())
    }
}
