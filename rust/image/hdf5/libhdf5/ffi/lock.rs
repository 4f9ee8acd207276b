//! The one lock of the library, its start, and what `fork` needs.

#[cfg(unix)]
use std::cell::Cell;
#[cfg(unix)]
use std::ffi::c_int;
use std::ffi::c_uint;
use std::marker::PhantomData;
use std::ptr;
#[cfg(unix)]
use std::sync::MutexGuard;
#[cfg(unix)]
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use sys::h5::{H5dont_atexit, H5open, herr_t};
use sys::h5e::{H5E_DEFAULT, H5Eset_auto2};
use sys::h5i::hid_t;

use super::super::driver::{CLASS, Class};
use super::sys;
use crate::error::{Error, Kind, Result};

// What the bindings lack or declare wrongly.
// SAFETY: signatures and layouts are those of the headers of HDF5 2.2.0, which is linked statically at that version.
unsafe extern "C" {
    fn H5FDregister(class: *const Class) -> hid_t;
    fn H5PLset_loading_state(flags: c_uint) -> herr_t;
    #[cfg(unix)]
    fn pthread_atfork(before: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> c_int;
}

/// Proof that the HDF5 lock is held and the library is running. Cannot leave its thread.
pub(in super::super) struct Library {
    pub(super) driver: hid_t,
    not_send: PhantomData<*const ()>,
}

/// Taken before the HDF5 lock, for `fork`: `parking_lot` keeps its waiting threads in a table with locks of its own, and a
/// child could inherit one of those; a std mutex has no such thing.
static GATE: Mutex<()> = Mutex::new(());

/// Runs `f` with the library locked. Must not be called from a [`crate::io::ReadAt`] that `f` reads.
pub(in super::super) fn library<T>(f: impl FnOnce(&Library) -> Result<T>) -> Result<T> {
    static DRIVER: OnceLock<hid_t> = OnceLock::new();
    #[cfg(unix)]
    prepare_for_fork();
    let _gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
    let _guard = sys::LOCK.lock();
    match *DRIVER.get_or_init(start) {
        driver if driver > 0 => f(&Library { driver, not_send: PhantomData }),
        _ => Err(Error::new(Kind::Unsupported, "the HDF5 library does not start")),
    }
}

/// Starts the library: no clean-up at exit (other threads may still read), no plugins, no messages on stderr.
fn start() -> hid_t {
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

/// Has every `fork` that begins from now on wait for the gate.
///
/// One that has begun does not, so this must come well before the gate is first taken. Threads that come at once all ask
/// for it: whoever waited for another thread here could wait for ever in a child.
#[cfg(unix)]
pub fn prepare_for_fork() {
    static PREPARED: AtomicBool = AtomicBool::new(false);
    if !PREPARED.load(Ordering::Acquire) {
        // SAFETY: the handlers touch the gate only, and may run more than once for a fork.
        unsafe { pthread_atfork(before_fork, after_fork, after_fork) };
        PREPARED.store(true, Ordering::Release);
    }
}

/// A child of `fork` has this thread only: the library must be at rest, and no lock held by another thread.
#[cfg(unix)]
extern "C" fn before_fork() {
    // Fails in a thread that is ending: then the gate is not kept.
    let _ = FORKING.try_with(|held| {
        let gate = held.take().unwrap_or_else(|| GATE.lock().unwrap_or_else(PoisonError::into_inner));
        held.set(Some(gate));
    });
}

#[cfg(unix)]
extern "C" fn after_fork() {
    let _ = FORKING.try_with(Cell::take);
}
