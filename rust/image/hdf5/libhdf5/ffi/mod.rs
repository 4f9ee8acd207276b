//! The C library, made safe to call: one lock, identifiers that close themselves, failures as [`Error`].
#![allow(unsafe_code)] // this is where the C library is called
#![allow(non_snake_case)] // wrappers keep the names of what they wrap
#![allow(clippy::unused_self)] // `&self` is the proof that the lock is held

mod create;
mod datasets;
mod lock;
mod objects;

use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use hdf5_metno_sys as sys;
use sys::h5::herr_t;
use sys::h5e::{H5E_DEFAULT, H5E_direction_t, H5E_error2_t, H5Ewalk2};
use sys::h5f::{H5F_ACC_RDONLY, H5F_ACC_TRUNC, H5Fcreate, H5Fopen};
use sys::h5i::{H5Idec_ref, hid_t};
use sys::h5p::{H5Pget_sizes, H5Pset_driver};
use sys::h5s::H5S_class_t;
use sys::h5t::H5T_class_t;

use super::driver::{Disk, NAME};
use crate::error::{Error, Kind, Result};

pub(super) use create::VarString;
pub(super) use datasets::Chunk;
#[cfg(unix)]
pub use lock::prepare_for_fork;
pub(super) use lock::{Library, library};
pub(super) use objects::Object;

/// An identifier of the library, closed when dropped, which must be before the lock is released.
pub(super) struct Id<'l>(hid_t, PhantomData<&'l Library>);

impl Deref for Id<'_> {
    type Target = hid_t;

    fn deref(&self) -> &hid_t {
        &self.0
    }
}

impl Drop for Id<'_> {
    fn drop(&mut self) {
        // SAFETY: the borrowed `Library` proves that the lock is held; the library checks the identifier.
        unsafe { H5Idec_ref(self.0) };
    }
}

impl Id<'_> {
    /// Leaves it open until its file is closed.
    pub(super) fn leave_open(self) -> hid_t {
        let id = self.0;
        std::mem::forget(self);
        id
    }
}

/// A file that is being written, and stays open while the lock is not held.
pub(super) struct OpenFile {
    id: hid_t,
    disk: NonNull<Disk<'static>>, // of its own, and no `Box`, which may not be moved while the library has a pointer into it
}

// SAFETY: the disk is owned, and the library uses it only inside of calls, under its lock.
unsafe impl Send for OpenFile {}

impl OpenFile {
    /// Creates a file in memory; `f` says how, and puts into it what it returns.
    pub(super) fn create<T>(
        how: impl FnOnce(&Library) -> Result<Id<'_>>,
        f: impl FnOnce(&Library, hid_t) -> Result<T>,
    ) -> Result<(Self, T)> {
        let mut file = Self { id: 0, disk: NonNull::from(Box::leak(Box::<Disk<'static>>::default())) };
        file.id = library(|lib| Ok(lib.open(file.disk(), &how(lib)?, true)?.leave_open()))?;
        let made = file.with(f)?;
        Ok((file, made))
    }

    /// Runs `f` with the library locked.
    pub(super) fn with<T>(&self, f: impl FnOnce(&Library, hid_t) -> Result<T>) -> Result<T> {
        library(|lib| f(lib, self.id)).map_err(|e| self.disk().take_error().unwrap_or(e))
    }

    pub(super) fn disk(&self) -> &Disk<'static> {
        // SAFETY: there until `self` is dropped, and only ever shared.
        unsafe { self.disk.as_ref() }
    }

    /// Writes out what the library still holds, and closes the file.
    pub(super) fn close(mut self) -> Result<Disk<'static>> {
        self.with(Library::H5Fclose).inspect_err(|_| self.id = -1)?; // the library may still use the disk
        self.id = 0;
        Ok(self.disk().take())
    }
}

/// Closes the file, and with it what is open in it, before its disk goes.
impl Drop for OpenFile {
    fn drop(&mut self) {
        let closed = self.id == 0 || self.id > 0 && library(|lib| lib.H5Fclose(self.id)).is_ok();
        if closed {
            // SAFETY: it was leaked in `create`, and the library has closed the file that used it.
            drop(unsafe { Box::from_raw(self.disk.as_ptr()) });
        }
    }
}

/// The error for a failed call, with the innermost message of the library.
#[cold]
fn failure(call: &str) -> Error {
    extern "C" fn first(_: c_uint, error: *const H5E_error2_t, data: *mut c_void) -> herr_t {
        // SAFETY: `data` is the `String` below, and the library passes a valid record with a C string or null.
        unsafe {
            if !(*error).desc.is_null() {
                *data.cast::<String>() = CStr::from_ptr((*error).desc).to_string_lossy().into_owned();
            }
        }
        1 // stop
    }
    let mut message = String::from("unknown error");
    // SAFETY: only called while the lock is held; the callback has the type of `H5E_walk2_t` and outlives the call.
    unsafe { H5Ewalk2(H5E_DEFAULT, H5E_direction_t::H5E_WALK_UPWARD, Some(first), (&raw mut message).cast()) };
    Error::new(Kind::Image, format!("the HDF5 library reports \"{message}\" ({call})"))
}

/// A count or code, or the error that a negative one stands for.
fn check(value: i64, call: &str) -> Result<usize> {
    usize::try_from(value).map_err(|_| failure(call))
}

fn owned<'l>(id: hid_t, call: &str) -> Result<Id<'l>> {
    if id < 0 { Err(failure(call)) } else { Ok(Id(id, PhantomData)) }
}

/// Wraps calls whose arguments are numbers and identifiers, all of which the library checks.
macro_rules! wrap {
    (@out Id, $value:expr, $name:expr) => { owned($value as i64, $name) };
    (@out usize, $value:expr, $name:expr) => { check($value as i64, $name) };
    ($($module:ident::$name:ident($($arg:ident: $type:ty),*) -> $out:tt;)*) => {
        impl Library {$(
            pub(super) fn $name(&self, $($arg: $type),*) -> Result<wrap!(@type $out)> {
                // SAFETY: `self` proves that the lock is held, and there are no pointers among the arguments.
                let value = unsafe { sys::$module::$name($($arg),*) };
                #[allow(trivial_numeric_casts, clippy::cast_lossless, clippy::cast_possible_wrap, clippy::unnecessary_cast)]
                { wrap!(@out $out, value, stringify!($name)) }
            }
        )*}
    };
    (@type Id) => { Id<'_> };
    (@type usize) => { usize };
}

wrap! {
    h5p::H5Pcreate(class: hid_t) -> Id;
    h5p::H5Pset_libver_bounds(fapl: hid_t, low: sys::h5f::H5F_libver_t, high: sys::h5f::H5F_libver_t) -> usize;
    h5p::H5Pset_alignment(fapl: hid_t, threshold: u64, alignment: u64) -> usize;
    h5p::H5Pset_meta_block_size(fapl: hid_t, bytes: u64) -> usize;
    h5p::H5Pset_cache(fapl: hid_t, unused: c_int, slots: usize, bytes: usize, preemption: f64) -> usize;
    h5p::H5Pset_shuffle(dcpl: hid_t) -> usize;
    h5p::H5Pset_deflate(dcpl: hid_t, level: c_uint) -> usize;
    h5p::H5Pset_layout(dcpl: hid_t, layout: sys::h5d::H5D_layout_t) -> usize;
    h5p::H5Pset_alloc_time(dcpl: hid_t, when: sys::h5d::H5D_alloc_time_t) -> usize;
    h5p::H5Pset_fill_time(dcpl: hid_t, when: sys::h5d::H5D_fill_time_t) -> usize;
    h5p::H5Pset_obj_track_times(ocpl: hid_t, track: u8) -> usize;
    h5p::H5Pset_char_encoding(lcpl: hid_t, set: sys::h5t::H5T_cset_t) -> usize;
    h5p::H5Pget_layout(dcpl: hid_t) -> usize;
    h5p::H5Pget_external_count(dcpl: hid_t) -> usize;
    h5p::H5Pget_nfilters(dcpl: hid_t) -> usize;
    h5p::H5Pall_filters_avail(dcpl: hid_t) -> usize;
    h5f::H5Fget_create_plist(file: hid_t) -> Id;
    h5f::H5Fclose(file: hid_t) -> usize;
    h5s::H5Screate(class: H5S_class_t) -> Id;
    h5s::H5Sget_simple_extent_type(space: hid_t) -> usize;
    h5t::H5Tcopy(from: hid_t) -> Id;
    h5t::H5Tcreate(class: H5T_class_t, size: usize) -> Id;
    h5t::H5Tenum_create(base: hid_t) -> Id;
    h5t::H5Tset_size(dtype: hid_t, size: usize) -> usize;
    h5t::H5Tset_cset(dtype: hid_t, set: sys::h5t::H5T_cset_t) -> usize;
    h5t::H5Tget_cset(dtype: hid_t) -> usize;
    h5t::H5Tset_strpad(dtype: hid_t, padding: sys::h5t::H5T_str_t) -> usize;
    h5t::H5Tget_class(dtype: hid_t) -> usize;
    h5t::H5Tget_size(dtype: hid_t) -> usize;
    h5t::H5Tget_order(dtype: hid_t) -> usize;
    h5t::H5Tget_precision(dtype: hid_t) -> usize;
    h5t::H5Tget_offset(dtype: hid_t) -> usize;
    h5t::H5Tget_sign(dtype: hid_t) -> usize;
    h5t::H5Tget_ebias(dtype: hid_t) -> usize;
    h5t::H5Tget_norm(dtype: hid_t) -> usize;
    h5t::H5Tget_nmembers(dtype: hid_t) -> usize;
    h5t::H5Tget_member_type(dtype: hid_t, member: c_uint) -> Id;
    h5t::H5Tget_member_offset(dtype: hid_t, member: c_uint) -> usize;
    h5t::H5Tget_super(dtype: hid_t) -> Id;
    h5d::H5Dclose(dataset: hid_t) -> usize;
    h5d::H5Dget_space(dataset: hid_t) -> Id;
    h5d::H5Dget_type(dataset: hid_t) -> Id;
    h5d::H5Dget_create_plist(dataset: hid_t) -> Id;
    h5d::H5Dget_storage_size(dataset: hid_t) -> usize; // reads every entry of an index of chunks
    h5d::H5Dget_offset(dataset: hid_t) -> usize; // an error where there is none
}

impl Library {
    /// Opens the disk as an HDF5 file: the library never sees another one.
    pub(super) fn open<'l>(&'l self, disk: &'l Disk, fapl: &Id, create: bool) -> Result<Id<'l>> {
        let info = ptr::from_ref(disk);
        // SAFETY: the library copies `info`. The identifier borrows `disk`, which therefore outlives the file: the
        // driver asks for the strong close degree, so closing the file closes whatever is still open in it.
        unsafe {
            check(H5Pset_driver(**fapl, self.driver, (&raw const info).cast()).into(), "H5Pset_driver")?;
            if create {
                owned(H5Fcreate(NAME.as_ptr(), H5F_ACC_TRUNC, 0, **fapl), "H5Fcreate")
            } else {
                owned(H5Fopen(NAME.as_ptr(), H5F_ACC_RDONLY, **fapl), "H5Fopen")
            }
        }
    }

    /// Bytes of an address and of a length in this file.
    pub(super) fn sizes(&self, file: hid_t) -> Result<(usize, usize)> {
        let (mut address, mut length) = (0, 0);
        let list = self.H5Fget_create_plist(file)?;
        // SAFETY: lock held; two places for two numbers.
        check(unsafe { H5Pget_sizes(*list, &raw mut address, &raw mut length) }.into(), "H5Pget_sizes")?;
        Ok((address, length))
    }
}

fn c_string(text: impl AsRef<[u8]>) -> Result<CString> {
    CString::new(text.as_ref()).map_err(|_| Error::new(Kind::Invalid, "name or value holds a NUL character"))
}
