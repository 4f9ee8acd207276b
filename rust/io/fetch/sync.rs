//! The standard library's locks and threads; in this crate's own unit tests those of `shuttle`, which tries many
//! interleavings of the same code.

#[cfg(test)]
pub(super) use shuttle::{
    sync::atomic::{AtomicBool, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
    thread::{Builder, JoinHandle},
};
#[cfg(not(test))]
pub(super) use std::{
    sync::atomic::{AtomicBool, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
    thread::{Builder, JoinHandle},
};
