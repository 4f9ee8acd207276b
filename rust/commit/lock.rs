//! Locks on files. They end with the process that holds them, however it ends.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Acquired,
    Taken,
    /// The file system has no locks.
    #[cfg_attr(not(unix), allow(dead_code))]
    Unknown,
}

#[cfg(unix)]
pub(super) fn lock(file: &File) -> Lock {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Lock::Acquired,
        Err(rustix::io::Errno::WOULDBLOCK) => Lock::Taken,
        Err(_) => Lock::Unknown,
    }
}

/// There the open file is the lock: it cannot be removed, and [`FileLock`] lets nobody else open it.
#[cfg(not(unix))]
pub(super) fn lock(_: &File) -> Lock {
    Lock::Acquired
}

/// Has opening neither follow a link nor wait for a pipe or a terminal.
pub(super) fn carefully(open: &mut OpenOptions) {
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY;
        std::os::unix::fs::OpenOptionsExt::custom_flags(open, flags.bits().cast_signed());
    }
    #[cfg(not(unix))]
    let _ = open;
}

/// What this process holds, by the numbers of the locks. The number that comes next is the first.
static HELD: Mutex<(u64, BTreeMap<u64, File>)> = Mutex::new((0, BTreeMap::new()));

fn held() -> MutexGuard<'static, (u64, BTreeMap<u64, File>)> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An exclusive lock on a file of its own, which stays: removing it would let two hold "the" lock. Another lock on the
/// file is refused, in this process too.
#[derive(Debug)]
pub struct FileLock {
    number: u64,
    /// Whether others are refused: the file system has locks.
    pub exclusive: bool,
}

impl FileLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// `WouldBlock` where somebody holds it; those of making the file; `InvalidInput` where something else stands there.
    pub fn take(path: &Path) -> Result<Self> {
        let mut open = OpenOptions::new();
        carefully(open.read(true).write(true).create(true).truncate(false));
        #[cfg(windows)]
        std::os::windows::fs::OpenOptionsExt::share_mode(&mut open, 0);
        let file = open.open(path).map_err(|e| match e.raw_os_error() {
            Some(32) if cfg!(windows) => ErrorKind::WouldBlock.into(), // a sharing violation
            _ => e,
        })?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "a lock must be a file; remove what stands there"));
        }
        let exclusive = match lock(&file) {
            Lock::Acquired => true,
            Lock::Taken => return Err(ErrorKind::WouldBlock.into()),
            Lock::Unknown => false,
        };
        let (next, files) = &mut *held();
        let number = *next;
        *next += 1;
        files.insert(number, file);
        Ok(Self { number, exclusive })
    }

    /// Whether this process holds it.
    pub fn is_held(&self) -> bool {
        held().1.contains_key(&self.number)
    }

    /// Gives it back.
    pub fn release(&self) {
        held().1.remove(&self.number);
    }

    /// In a forked child: closes its copies of all that its parent holds, which leaves them to the parent. No other
    /// thread may be in the functions above when a process forks.
    pub fn leave_to_parent() {
        held().1.clear();
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        self.release();
    }
}
