//! Which targets keep their inode, and the copy of a complete file over one of them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::path::Path;

/// Why a target is written over: nothing is lost by it.
pub const EMPTY: &str = "the target is empty";
/// Why a target is written over: the caller reads what he saved through what he has open.
pub const OPEN: &str = "this process has the target open for writing";

/// Whether a save must not put another file in this one's place, and why: it is empty, as a file is that was made to
/// be written to, or this process has it open for writing. The second is known on Linux only.
pub fn keeps_inode(target: &Path) -> Option<&'static str> {
    let found = target.metadata().ok().filter(Metadata::is_file)?;
    if found.len() == 0 {
        return Some(EMPTY);
    }
    is_open_for_writing(target).then_some(OPEN)
}

/// Marks descriptors that saves write through: nobody else asks not to wait for a regular file
/// ([`is_open_for_writing`]).
pub(super) fn mark(open: &mut OpenOptions) {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(open, rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    #[cfg(not(unix))]
    let _ = open;
}

/// Opens a target for writing, as it is; a pipe that nobody reads is an error and not waited for.
pub(super) fn open_target(target: &Path, open: &mut OpenOptions) -> std::io::Result<File> {
    mark(open);
    match open.open(target) {
        // A file under a lease: the holder is asked to give it up, which takes a moment.
        Err(e) if e.kind() == ErrorKind::WouldBlock && target.metadata()?.is_file() => {
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::custom_flags(open, 0);
            open.open(target)
        }
        other => other,
    }
}

/// Whether a descriptor of this process that no save has marked can write to the file.
#[cfg(target_os = "linux")]
fn is_open_for_writing(target: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    use std::os::fd::AsFd;
    const DESCRIPTORS: &str = "/proc/self/fd";
    // What is known of a file is enough: a descriptor of a file server that does not answer must not be waited for.
    let identity = |at: std::os::fd::BorrowedFd<'_>, path: &Path| {
        let found = statx(at, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO).ok()?;
        Some((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
    };
    let Some(wanted) = identity(CWD, target) else { return false };
    let (Ok(directory), Ok(names)) = (File::open(DESCRIPTORS), std::fs::read_dir(DESCRIPTORS)) else { return false };
    names.flatten().map(|entry| entry.file_name()).any(|name| {
        identity(directory.as_fd(), name.as_ref()) == Some(wanted)
            && std::fs::read_to_string(Path::new("/proc/self/fdinfo").join(&name))
                .is_ok_and(|info| is_foreign_writer(&info))
    })
}

/// Reads the flags in `/proc/self/fdinfo/<n>` (proc(5)): an octal number.
#[cfg(target_os = "linux")]
fn is_foreign_writer(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| u32::from_str_radix(text.trim(), 8).ok()).unwrap_or(0);
    flags & 3 != 0 && flags & rustix::fs::OFlags::NONBLOCK.bits() == 0
}

#[cfg(not(target_os = "linux"))]
fn is_open_for_writing(_: &Path) -> bool {
    false
}

/// Copies the `len` bytes of a complete file over the target, which keeps its inode, mode and owner. One that was empty
/// is empty again after an error.
pub(super) fn overwrite(mut source: &File, target: &Path, len: u64, durable: bool) -> std::io::Result<()> {
    let file = open_target(target, OpenOptions::new().write(true))?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "it is no regular file any more"));
    }
    let copied = reserve(&file, len).and_then(|()| {
        source.seek(SeekFrom::Start(0))?;
        // On Linux in the kernel: file systems that can share the blocks do.
        let n = std::io::copy(&mut source, &mut &file)?;
        if n != len {
            return Err(std::io::Error::new(ErrorKind::UnexpectedEof, format!("{n} of {len} bytes were copied")));
        }
        file.set_len(len)?;
        if durable { file.sync_all() } else { Ok(()) }
    });
    if copied.is_err() && found.len() == 0 {
        file.set_len(0)?;
    }
    copied
}

/// Asks for the blocks before the first old byte is overwritten, where the file system can.
#[cfg(target_os = "linux")]
fn reserve(file: &File, len: u64) -> std::io::Result<()> {
    use rustix::{fs, io::Errno};
    if len == 0 {
        return Ok(());
    }
    match fs::fallocate(file, fs::FallocateFlags::KEEP_SIZE, 0, len) {
        Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(_: &File, _: u64) -> std::io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn writers_are_known_by_their_flags() {
        let info = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t29\n");
        for (flags, writes) in [
            ("0100000", false),   // read-only
            ("0100001", true),    // write-only
            ("0100002", true),    // both
            ("02102001", true),   // append, close on exec
            ("010000000", false), // O_PATH
            ("02104001", false),  // of this crate: it does not block
            ("", false),
        ] {
            assert_eq!(is_foreign_writer(&info(flags)), writes, "{flags}");
        }
    }

    #[test]
    fn only_what_this_process_can_write_to_or_is_empty_keeps_its_inode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m");
        assert_eq!(keeps_inode(&path), None);
        std::fs::write(&path, b"").unwrap();
        assert_eq!(keeps_inode(&path), Some(EMPTY));
        std::fs::write(&path, b"old").unwrap();
        assert_eq!(keeps_inode(&path), None);
        let reader = File::open(&path).unwrap();
        let marked = open_target(&path, OpenOptions::new().write(true)).unwrap();
        assert_eq!(keeps_inode(&path), None);
        for open in [OpenOptions::new().write(true), OpenOptions::new().read(true).append(true)] {
            let writer = open.open(&path).unwrap();
            assert_eq!(keeps_inode(&path), Some(OPEN));
            drop(writer);
            assert_eq!(keeps_inode(&path), None);
        }
        drop((reader, marked));
        assert_eq!(keeps_inode(directory.path()), None);
        // Another save of this process has just put its file there, and not closed it yet.
        let written = super::super::leftovers::temporary(&path, true).unwrap();
        std::fs::write(&written.path, b"new").unwrap();
        std::fs::rename(&written.path, &path).unwrap();
        assert_eq!(keeps_inode(&path), None);
        drop(written);
    }
}
