//! The C library, made safe to call: one lock, identifiers that close themselves, failures as [`Error`].
#![allow(unsafe_code)] // this is where the C library is called
#![allow(non_snake_case)] // wrappers keep the names of what they wrap
#![allow(clippy::unused_self)] // `&self` is the proof that the lock is held

#[cfg(unix)]
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::{self, NonNull};
#[cfg(unix)]
use std::sync::MutexGuard;
use std::sync::{Mutex, OnceLock, PoisonError};

use hdf5_metno_sys as sys;
use sys::h5::{
    H5_ITER_CONT, H5_index_t, H5_iter_order_t, H5dont_atexit, H5free_memory, H5open, haddr_t, herr_t, hsize_t,
};
use sys::h5a::{H5Acreate2, H5Aget_space, H5Aget_type, H5Aiterate2, H5Aopen, H5Aread, H5Awrite};
use sys::h5d::{H5D_fill_value_t, H5Dchunk_iter, H5Dcreate2, H5Dread, H5Dwrite_chunk};
use sys::h5e::{H5E_DEFAULT, H5E_direction_t, H5E_error2_t, H5Eset_auto2, H5Ewalk2};
use sys::h5f::{H5F_ACC_RDONLY, H5F_ACC_TRUNC, H5Fcreate, H5Fopen};
use sys::h5g::{H5G_info_t, H5G_storage_type_t, H5Gcreate2, H5Gget_info, H5Gopen2};
use sys::h5i::{H5Idec_ref, hid_t};
use sys::h5o::{
    H5O_INFO_BASIC, H5O_INFO_NUM_ATTRS, H5O_info2_t, H5O_token_t, H5O_type_t, H5Oget_info3, H5Oopen_by_token,
};
use sys::h5p::{
    H5Pfill_value_defined, H5Pget_chunk, H5Pget_chunk_opts, H5Pget_fill_value, H5Pget_filter2, H5Pget_sizes,
    H5Pset_chunk, H5Pset_driver,
};
use sys::h5s::{H5S_class_t, H5Screate_simple, H5Sget_simple_extent_dims, H5Sget_simple_extent_npoints};
use sys::h5t::{
    H5T_class_t, H5T_str_t, H5Tenum_insert, H5Tget_fields, H5Tget_member_name, H5Tget_member_value, H5Tinsert,
};

use super::driver::{CLASS, Class, Disk, NAME};
use crate::error::{Error, Kind, Result, try_push, try_with_capacity};
use crate::image::hdf5::{ALLOCATION, Budget, string_count};

// What the bindings lack or declare wrongly.
// SAFETY: signatures and layouts are those of the headers of HDF5 2.2.0, which is linked statically at that version.
unsafe extern "C" {
    fn H5FDregister(class: *const Class) -> hid_t;
    fn H5PLset_loading_state(flags: c_uint) -> herr_t;
    /// Here because `H5L_info2_t` has an `enum` where a hostile file can put any number.
    fn H5Literate2(
        group: hid_t,
        index: c_int,
        order: c_int,
        from: *mut hsize_t,
        f: extern "C" fn(hid_t, *const c_char, *const LinkInfo, *mut c_void) -> herr_t,
        data: *mut c_void,
    ) -> herr_t;
    fn H5Lget_info2(group: hid_t, name: *const c_char, info: *mut LinkInfo, lapl: hid_t) -> herr_t;
    static H5T_IEEE_F16LE_g: hid_t;
    #[cfg(unix)]
    fn pthread_atfork(before: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> c_int;
}

/// Proof that the HDF5 lock is held and the library is running. Cannot leave its thread.
pub(super) struct Library {
    driver: hid_t,
    not_send: PhantomData<*const ()>,
}

/// Taken before the HDF5 lock, for `fork`: `parking_lot` keeps its waiting threads in a table with locks of its own, and a
/// child could inherit one of those; a std mutex has no such thing.
static GATE: Mutex<()> = Mutex::new(());

/// Runs `f` with the library locked. Must not be called from a [`crate::io::ReadAt`] that `f` reads.
pub(super) fn library<T>(f: impl FnOnce(&Library) -> Result<T>) -> Result<T> {
    static DRIVER: OnceLock<hid_t> = OnceLock::new();
    let _gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
    let _guard = sys::LOCK.lock();
    match *DRIVER.get_or_init(start) {
        driver if driver > 0 => f(&Library { driver, not_send: PhantomData }),
        _ => Err(Error::new(Kind::Unsupported, "the HDF5 library does not start")),
    }
}

/// Starts the library: no clean-up at exit (other threads may still read), no plugins, no messages on stderr.
fn start() -> hid_t {
    #[cfg(unix)]
    // SAFETY: the handlers touch the gate only.
    unsafe {
        pthread_atfork(before_fork, after_fork, after_fork)
    };
    // SAFETY: the lock is held; `CLASS` is what this version of the library expects and is copied.
    unsafe {
        H5dont_atexit();
        if H5open() < 0 || H5PLset_loading_state(0) < 0 || H5Eset_auto2(H5E_DEFAULT, None, ptr::null_mut()) < 0 {
            return -1;
        }
        H5FDregister(&CLASS)
    }
}

#[cfg(unix)]
thread_local! {
    static FORKING: Cell<Option<MutexGuard<'static, ()>>> = const { Cell::new(None) };
}

/// A child of `fork` has this thread only: the library must be at rest, and no lock held by another thread.
#[cfg(unix)]
extern "C" fn before_fork() {
    let gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = FORKING.try_with(|held| held.set(Some(gate))); // fails in a thread that is ending: then it is unlocked again
}

#[cfg(unix)]
extern "C" fn after_fork() {
    let _ = FORKING.try_with(Cell::take);
}

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
    Error::new(Kind::Hdf5, format!("the HDF5 library reports \"{message}\" ({call})"))
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

/// A link of a group: its name, its kind (0 hard, 1 soft, 64 external, more user-defined) and, if hard, its target.
pub(super) struct Link {
    pub(super) name: Vec<u8>,
    pub(super) kind: c_int,
    token: [u8; 16],
}

/// `H5L_info2_t`; the union holds a token or a length.
#[repr(C)]
struct LinkInfo {
    kind: c_int,
    ordered: u8,
    order: i64,
    set: c_int,
    token: Token,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Token([u8; 16]);

/// A chunk of a dataset: its number (in C order, of the places for chunks), where its bytes are, which filters were
/// skipped.
pub(super) struct Chunk {
    pub(super) cell: u64,
    pub(super) skipped: u32,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// What an object is.
pub(super) struct Object<'l> {
    pub(super) id: Id<'l>,
    pub(super) kind: H5O_type_t,
    pub(super) attributes: u64,
    /// How many hard links lead to it, as it says.
    pub(super) links: u32,
    /// Identifies the object within its file.
    pub(super) token: [u8; 16],
}

/// What a callback gathers, up to a limit.
struct Gathered<'a, T> {
    items: Vec<T>,
    limit: usize,
    budget: &'a mut Budget,
    failed: Option<Error>,
}

impl<'a, T> Gathered<'a, T> {
    fn new(limit: usize, budget: &'a mut Budget) -> Self {
        Self { items: Vec::new(), limit, budget, failed: None }
    }

    /// Keeps what `make` makes of `name`, if both have room; otherwise the library is to stop.
    fn add(&mut self, name: &CStr, make: impl FnOnce(&CStr) -> T) -> c_int {
        let room = || Error::new(Kind::Limit, "too many links or attributes").with_found(self.limit, "more");
        let kept = if self.items.len() < self.limit { Ok(()) } else { Err(room()) };
        let kept = kept.and_then(|()| self.budget.spend(2 * size_of::<T>() + ALLOCATION + name.count_bytes()));
        match kept.and_then(|()| try_push(&mut self.items, make(name))) {
            Ok(()) => H5_ITER_CONT,
            Err(error) => {
                self.failed = Some(error);
                1
            }
        }
    }

    fn done(self) -> Result<Vec<T>> {
        self.failed.map_or(Ok(self.items), Err)
    }
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

    pub(super) fn create_group(&self, at: hid_t, name: &str, lcpl: hid_t, gcpl: hid_t) -> Result<Id<'_>> {
        let name = c_string(name)?;
        // SAFETY: lock held; `name` is a C string that outlives the call.
        owned(unsafe { H5Gcreate2(at, name.as_ptr(), lcpl, gcpl, 0) }, "H5Gcreate2")
    }

    pub(super) fn open_group(&self, at: hid_t, name: &str) -> Result<Id<'_>> {
        let name = c_string(name)?;
        // SAFETY: as above.
        owned(unsafe { H5Gopen2(at, name.as_ptr(), 0) }, "H5Gopen2")
    }

    /// `lists`: how to create the link and the dataset.
    pub(super) fn create_dataset(
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

    pub(super) fn set_chunk(&self, dcpl: hid_t, shape: &[u64]) -> Result<()> {
        let rank = c_int::try_from(shape.len()).unwrap_or(c_int::MAX); // the library refuses more than 32
        // SAFETY: lock held; the library reads `shape.len()` dimensions.
        check(unsafe { H5Pset_chunk(dcpl, rank, shape.as_ptr()) }.into(), "H5Pset_chunk").map(drop)
    }

    /// Has the library find a place for a chunk, filtered but for what `skipped` says, of a dataset on `disk`.
    pub(super) fn place_chunk(
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
    pub(super) fn write_strings(
        &self,
        at: hid_t,
        name: &str,
        dtype: &VarString,
        strings: &[&[u8]],
        row: bool,
    ) -> Result<()> {
        if !row && strings.len() != 1 {
            return Err(Error::new(Kind::Invalid, "a scalar attribute has one string"));
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
    pub(super) fn write_fixed(&self, at: hid_t, name: &str, strings: &[Vec<u8>], length: usize) -> Result<()> {
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
    pub(super) fn write_nothing(&self, at: hid_t, name: &str) -> Result<()> {
        let name = c_string(name)?;
        let space = self.create_space(&[0])?;
        // SAFETY: as above; nothing is written.
        owned(unsafe { H5Acreate2(at, name.as_ptr(), *sys::h5t::H5T_IEEE_F64LE, *space, 0, 0) }, "H5Acreate2").map(drop)
    }

    pub(super) fn create_space(&self, shape: &[u64]) -> Result<Id<'_>> {
        if shape.is_empty() {
            return self.H5Screate(H5S_class_t::H5S_SCALAR);
        }
        let rank = c_int::try_from(shape.len()).unwrap_or(c_int::MAX); // the library refuses more than 32
        // SAFETY: lock held; the library reads `shape.len()` dimensions.
        owned(unsafe { H5Screate_simple(rank, shape.as_ptr(), ptr::null()) }, "H5Screate_simple")
    }

    pub(super) fn add_member(&self, compound: hid_t, name: &CStr, offset: usize, member: hid_t) -> Result<()> {
        // SAFETY: lock held, `name` is a C string.
        check(unsafe { H5Tinsert(compound, name.as_ptr(), offset, member) }.into(), "H5Tinsert").map(drop)
    }

    /// Adds a value to an enumeration over one-byte integers.
    pub(super) fn add_value(&self, enumeration: hid_t, name: &CStr, value: u8) -> Result<()> {
        if self.H5Tget_size(enumeration)? != 1 {
            return Err(Error::new(Kind::Invalid, "enumeration is not of one byte"));
        }
        // SAFETY: lock held, `name` is a C string, the library reads the one byte just checked.
        let status = unsafe { H5Tenum_insert(enumeration, name.as_ptr(), (&raw const value).cast()) };
        check(status.into(), "H5Tenum_insert").map(drop)
    }

    /// The value of a member of an enumeration over one-byte integers.
    pub(super) fn value(&self, enumeration: hid_t, member: c_uint) -> Result<u8> {
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
    pub(super) fn member_name(&self, dtype: hid_t, member: c_uint) -> Result<String> {
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
    pub(super) fn float_fields(&self, dtype: hid_t) -> Result<[usize; 5]> {
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
    pub(super) fn shape(&self, dataset: hid_t) -> Result<Vec<u64>> {
        Ok(self.dimensions(*self.H5Dget_space(dataset)?)?.unwrap_or_default())
    }

    /// Dimensions; empty for a scalar, `None` for a dataspace without elements of its own (null).
    pub(super) fn dimensions(&self, space: hid_t) -> Result<Option<Vec<u64>>> {
        if self.H5Sget_simple_extent_type(space)? == H5S_class_t::H5S_NULL as usize {
            return Ok(None);
        }
        let mut dims = [0; sys::h5s::H5S_MAX_RANK as usize];
        // SAFETY: lock held; the library knows no more dimensions than `H5S_MAX_RANK` and checks that on reading.
        let rank = unsafe { H5Sget_simple_extent_dims(space, dims.as_mut_ptr(), ptr::null_mut()) };
        Ok(Some(dims[..check(rank.into(), "H5Sget_simple_extent_dims")?].to_vec()))
    }

    /// Links of a group as they are stored, at most `limit`: in another order the library would first gather them itself,
    /// names and all, and a file may have one long name many times.
    pub(super) fn links(&self, group: hid_t, limit: usize, budget: &mut Budget) -> Result<Vec<Link>> {
        extern "C" fn each(_: hid_t, name: *const c_char, info: *const LinkInfo, data: *mut c_void) -> herr_t {
            // SAFETY: the library passes a C string and a record; `data` is the `Gathered` below.
            unsafe {
                let (kind, token) = ((*info).kind, (*info).token.0);
                let make = |name: &CStr| Link { name: name.to_bytes().to_vec(), kind, token };
                (*data.cast::<Gathered<_>>()).add(CStr::from_ptr(name), make)
            }
        }
        let mut all = Gathered::new(limit, budget);
        let (by, order) = (H5_index_t::H5_INDEX_NAME as c_int, H5_iter_order_t::H5_ITER_NATIVE as c_int);
        // SAFETY: lock held; `each` has the callback's type and `all` outlives the call.
        let status = unsafe { H5Literate2(group, by, order, &mut 0, each, (&raw mut all).cast()) };
        check(status.into(), "H5Literate2")?;
        all.done()
    }

    /// Whether the links of a group are in a symbol table, which has to be in order.
    pub(super) fn is_symbol_table(&self, group: hid_t) -> Result<bool> {
        let mut info = std::mem::MaybeUninit::<H5G_info_t>::zeroed();
        // SAFETY: lock held; the library fills the record, whose kind is a number that it computes itself.
        let info = unsafe {
            check(H5Gget_info(group, info.as_mut_ptr()).into(), "H5Gget_info")?;
            info.assume_init()
        };
        Ok(info.storage_type == H5G_storage_type_t::H5G_STORAGE_TYPE_SYMBOL_TABLE)
    }

    /// The link of that name, which is one component of a path.
    pub(super) fn link(&self, group: hid_t, name: &str) -> Result<Link> {
        let c_name = c_string(name)?;
        let mut info = LinkInfo { kind: -1, ordered: 0, order: 0, set: 0, token: Token([0; 16]) };
        // SAFETY: lock held; the library fills the record it is given.
        check(unsafe { H5Lget_info2(group, c_name.as_ptr(), &raw mut info, 0) }.into(), "H5Lget_info2")?;
        Ok(Link { name: c_name.into_bytes(), kind: info.kind, token: info.token.0 })
    }

    /// The object a hard link leads to. By address: no name is looked up, no other link followed.
    pub(super) fn follow(&self, file: hid_t, link: &Link) -> Result<Object<'_>> {
        // SAFETY: lock held; a token is 16 plain bytes.
        let token = unsafe { std::mem::transmute::<[u8; 16], H5O_token_t>(link.token) };
        // SAFETY: lock held; the library checks the address in the token.
        self.object(owned(unsafe { H5Oopen_by_token(file, token) }, "H5Oopen_by_token")?)
    }

    pub(super) fn object<'l>(&'l self, id: Id<'l>) -> Result<Object<'l>> {
        let mut info = std::mem::MaybeUninit::<H5O_info2_t>::uninit();
        // SAFETY: lock held; the library fills in what is asked for and zeroes the rest, and computes the kind itself.
        let info = unsafe {
            let status = H5Oget_info3(*id, info.as_mut_ptr(), H5O_INFO_BASIC | H5O_INFO_NUM_ATTRS);
            check(status.into(), "H5Oget_info3")?;
            info.assume_init()
        };
        // SAFETY: as in `follow`.
        let token = unsafe { std::mem::transmute::<H5O_token_t, [u8; 16]>(info.token) };
        Ok(Object { id, kind: info.type_, attributes: info.num_attrs, links: info.rc, token })
    }

    /// Names of the attributes of an object, in the order they are stored, at most `limit`.
    pub(super) fn attribute_names(&self, object: hid_t, limit: usize, budget: &mut Budget) -> Result<Vec<CString>> {
        extern "C" fn each(_: hid_t, name: *const c_char, _: *const sys::h5a::H5A_info_t, data: *mut c_void) -> herr_t {
            // SAFETY: as in `links`.
            unsafe { (*data.cast::<Gathered<_>>()).add(CStr::from_ptr(name), CStr::to_owned) }
        }
        let mut all = Gathered::new(limit, budget);
        let (by, order) = (H5_index_t::H5_INDEX_NAME, H5_iter_order_t::H5_ITER_NATIVE);
        // SAFETY: as in `links`.
        let status = unsafe { H5Aiterate2(object, by, order, &mut 0, Some(each), (&raw mut all).cast()) };
        check(status.into(), "H5Aiterate2")?;
        all.done()
    }

    /// The attribute of an object, its type and its shape.
    pub(super) fn attribute(&self, object: hid_t, name: &CStr) -> Result<StringAttribute<'_>> {
        // SAFETY: lock held; `name` is a C string that outlives the call.
        unsafe {
            let id: Id = owned(H5Aopen(object, name.as_ptr(), 0), "H5Aopen")?;
            let dtype: Id = owned(H5Aget_type(*id), "H5Aget_type")?;
            let space: Id = owned(H5Aget_space(*id), "H5Aget_space")?;
            let shape = self.dimensions(*space)?;
            let string = self.H5Tget_class(*dtype)? == H5T_class_t::H5T_STRING as usize;
            let variable = string && check(sys::h5t::H5Tis_variable_str(*dtype).into(), "H5Tis_variable_str")? > 0;
            let utf8 = string && self.H5Tget_cset(*dtype)? == sys::h5t::H5T_cset_t::H5T_CSET_UTF8 as usize;
            Ok(StringAttribute { id, dtype, shape, string, variable, utf8 })
        }
    }

    /// The strings of an attribute of variable-length ones.
    pub(super) fn read_strings(&self, attribute: &StringAttribute<'_>, count: usize) -> Result<Vec<Vec<u8>>> {
        if !attribute.variable || attribute.count() != Some(count) {
            return Err(Error::new(Kind::Invalid, "attribute is no row of so many strings"));
        }
        let mut texts = try_with_capacity(count)?;
        texts.resize(count, ptr::null_mut::<c_char>());
        let mut values = try_with_capacity(count)?;
        // SAFETY: lock held; the library sets as many pointers as the attribute has elements, to strings that it
        // allocates and we free, or to null.
        unsafe {
            let status = H5Aread(*attribute.id, *attribute.dtype, texts.as_mut_ptr().cast());
            for text in texts {
                let text = ptr::NonNull::new(text);
                values.push(text.map_or_else(Vec::new, |text| CStr::from_ptr(text.as_ptr()).to_bytes().to_vec()));
                text.map(|text| H5free_memory(text.as_ptr().cast()));
            }
            check(status.into(), "H5Aread")?;
            Ok(values)
        }
    }

    /// The strings of an attribute of `count` ones that take `size` bytes each, without their padding.
    pub(super) fn read_fixed(
        &self,
        attribute: &StringAttribute<'_>,
        count: usize,
        size: usize,
    ) -> Result<Vec<Vec<u8>>> {
        let same = attribute.count() == Some(count) && self.H5Tget_size(*attribute.dtype)? == size && size > 0;
        let total = count.checked_mul(size).filter(|_| same && !attribute.variable);
        let total = total.ok_or_else(|| Error::new(Kind::Invalid, "attribute is no row of strings of that length"))?;
        let mut bytes = try_with_capacity(total)?;
        bytes.resize(total, 0u8);
        // SAFETY: lock held; all elements of the type fill `bytes` exactly.
        let spaces = unsafe {
            check(H5Aread(*attribute.id, *attribute.dtype, bytes.as_mut_ptr().cast()).into(), "H5Aread")?;
            sys::h5t::H5Tget_strpad(*attribute.dtype) == H5T_str_t::H5T_STR_SPACEPAD
        };
        let mut strings = try_with_capacity(count)?;
        strings.extend(bytes.chunks(size).map(|s| crate::image::hdf5::unpadded(s, spaces)));
        Ok(strings)
    }

    /// All elements of a dataset, in the file's own representation; `out` must be of their size.
    pub(super) fn read_all(&self, dataset: hid_t, dtype: hid_t, out: &mut [u8]) -> Result<()> {
        let space = self.H5Dget_space(dataset)?;
        // SAFETY: lock held, no pointers.
        let points = check(unsafe { H5Sget_simple_extent_npoints(*space) }, "H5Sget_simple_extent_npoints")?;
        if points.checked_mul(self.H5Tget_size(dtype)?) != Some(out.len()) {
            return Err(Error::new(Kind::Hdf5, "dataset changed its size while it was read"));
        }
        // SAFETY: lock held; all points of `dtype` fill `out` exactly.
        check(unsafe { H5Dread(dataset, dtype, 0, 0, 0, out.as_mut_ptr().cast()) }.into(), "H5Dread").map(drop)
    }

    /// The fill value in the representation of `dtype`, if one was set.
    pub(super) fn fill_value(&self, dcpl: hid_t, dtype: hid_t) -> Result<Option<Vec<u8>>> {
        let mut status = H5D_fill_value_t::H5D_FILL_VALUE_DEFAULT;
        let mut value = vec![0; self.H5Tget_size(dtype)?];
        // SAFETY: lock held; the library writes one of its enumerators, then one element of `dtype`.
        unsafe {
            check(H5Pfill_value_defined(dcpl, &raw mut status).into(), "H5Pfill_value_defined")?;
            if status != H5D_fill_value_t::H5D_FILL_VALUE_USER_DEFINED {
                return Ok(None);
            }
            check(H5Pget_fill_value(dcpl, dtype, value.as_mut_ptr().cast()).into(), "H5Pget_fill_value")?;
        }
        Ok(Some(value))
    }

    /// Bytes of an address and of a length in this file.
    pub(super) fn sizes(&self, file: hid_t) -> Result<(usize, usize)> {
        let (mut address, mut length) = (0, 0);
        let list = self.H5Fget_create_plist(file)?;
        // SAFETY: lock held; two places for two numbers.
        check(unsafe { H5Pget_sizes(*list, &raw mut address, &raw mut length) }.into(), "H5Pget_sizes")?;
        Ok((address, length))
    }

    /// Dimensions of a chunk, and whether chunks at the edge skip the filters.
    pub(super) fn chunk_shape(&self, dcpl: hid_t) -> Result<(Vec<u64>, bool)> {
        let (mut dims, mut options) = ([0; 32], 0);
        // SAFETY: lock held; the library writes at most as many dimensions as it is told there is room for.
        let rank = unsafe {
            check(H5Pget_chunk_opts(dcpl, &raw mut options).into(), "H5Pget_chunk_opts")?;
            check(H5Pget_chunk(dcpl, 32, dims.as_mut_ptr()).into(), "H5Pget_chunk")?
        };
        let dims = dims.get(..rank).ok_or_else(|| Error::new(Kind::Hdf5, "chunk has too many dimensions"))?;
        Ok((dims.to_vec(), options & sys::h5d::H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS != 0))
    }

    /// Number and first parameter of a filter.
    pub(super) fn filter(&self, dcpl: hid_t, index: c_uint) -> Result<(usize, u32)> {
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
    /// `Hdf5`, also for a chunk outside of the dataset or between the places for chunks.
    pub(super) fn chunks(
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
            return Err(Error::new(Kind::Hdf5, "chunks overlap or lie outside of the dataset"));
        }
        Ok(())
    }

    /// The type of variable-length strings.
    pub(super) fn var_string(&self, set: sys::h5t::H5T_cset_t) -> Result<VarString<'_>> {
        let dtype = self.H5Tcopy(*sys::h5t::H5T_C_S1)?;
        self.H5Tset_size(*dtype, sys::h5t::H5T_VARIABLE)?;
        self.H5Tset_cset(*dtype, set)?;
        Ok(VarString(dtype))
    }

    /// `H5T_IEEE_F16LE`, which the bindings lack.
    pub(super) fn f16(&self) -> hid_t {
        // SAFETY: set by `H5open` and never changed after.
        unsafe { H5T_IEEE_F16LE_g }
    }
}

/// A variable-length string type (a type of its own because values of it are pointers).
pub(super) struct VarString<'l>(Id<'l>);

/// An open attribute, and what is to be known before it is read.
pub(super) struct StringAttribute<'l> {
    id: Id<'l>,
    dtype: Id<'l>,
    pub(super) shape: Option<Vec<u64>>,
    pub(super) string: bool,
    pub(super) variable: bool,
    pub(super) utf8: bool,
}

impl StringAttribute<'_> {
    /// How many strings it has, if it is a scalar or a row.
    pub(super) fn count(&self) -> Option<usize> {
        self.shape.as_deref().and_then(string_count)
    }

    /// Its type.
    pub(super) fn dtype(&self) -> hid_t {
        *self.dtype
    }
}

fn c_string(text: impl AsRef<[u8]>) -> Result<CString> {
    CString::new(text.as_ref()).map_err(|_| Error::new(Kind::Invalid, "name or value holds a NUL character"))
}
