//! A new file takes the place of the old one only when it is complete.
//!
//! Everything is written to a temporary file beside the target, which replaces it by `rename`; where the target has to
//! keep its inode, the complete file is copied over it. A temporary file belongs to whoever holds its lock: the next
//! save removes those that nobody holds. What each system can do is in `docs/format.md`.
#![forbid(unsafe_code)]

mod attributes;
mod directory;
mod leftovers;
mod lock;
mod overwrite;
mod sync;

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use directory::Directory;
pub use leftovers::clear_leftovers;
pub use lock::FileLock;
pub use overwrite::{EMPTY, OPEN, keeps_inode};
pub use sync::{create_directories, sync, sync_name};

use crate::error::{Context, Error, Kind, Result};
use leftovers::{Temporary, completed, temporary};
use overwrite::{open_target, overwrite};
use sync::sync_directory;

/// How a file is to be replaced.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Write beside the target and rename; otherwise straight over the old file, as Keras does.
    pub atomic: bool,
    /// Data and directory reach stable storage before [`Pending::commit`] returns.
    pub durable: bool,
    /// Other saves of this process to the same file may be under way: somebody keeps them in order.
    pub queued: bool,
}

/// How a file took its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Why the target was written over instead of being replaced, if it was.
    pub in_place: Option<&'static str>,
    /// What the new file could not take over from the old one: its owner, its mode.
    pub lost: Option<&'static str>,
}

/// A file that is being written. Dropping it without [`Pending::commit`] leaves the target as it was.
#[derive(Debug)]
pub struct Pending {
    file: Option<File>,
    target: PathBuf,
    temporary: Option<PathBuf>,
    superseded: Vec<PathBuf>,
    replaced: Option<File>,
    committed: Committed,
    durable: bool,
    process: u32, // a forked child must not remove what its parent writes
}

impl Pending {
    /// Opens the file to write to.
    ///
    /// # Errors
    /// `Io` as opening the target for writing would give: missing directory, no permission, is a directory.
    pub fn create(target: &Path, options: Options) -> Result<Self> {
        Self::create_inner(target, options).map_err(|e| e.with_path(target))
    }

    fn create_inner(target: &Path, options: Options) -> Result<Self> {
        let target = follow_links(target)?;
        // Keras opens the target for writing: what it may not write, we may not replace.
        let replaced = match open_target(&target, OpenOptions::new().write(true)) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(Error::new(Kind::Io(e), "cannot write to this file")),
        };
        let regular = replaced.as_ref().is_none_or(|f| f.metadata().is_ok_and(|m| m.is_file()));
        let why = match (options.atomic, regular) {
            (true, true) => match temporary(&target, options.queued) {
                Ok(Temporary { file, path, superseded }) => {
                    let lost = replaced.as_ref().and_then(|old| attributes::copy(old, &file));
                    return Ok(Self {
                        file: Some(file),
                        target,
                        temporary: Some(path),
                        superseded,
                        replaced,
                        committed: Committed { in_place: None, lost },
                        durable: options.durable,
                        process: std::process::id(),
                    });
                }
                // The directory takes no new file; the old one may be written all the same.
                Err(e) if replaced.is_some() && refused_by_directory(&e) => "the directory takes no temporary file",
                Err(e) if e.kind() == ErrorKind::ResourceBusy => return Err(busy(e)),
                Err(e) => return Err(Error::new(Kind::Io(e), "cannot create a file in this directory")),
            },
            (true, false) => "the target is not a regular file",
            (false, _) => "atomic=False",
        };
        let missing = replaced.is_none(); // Linux lets nobody "create" another owner's file in a sticky directory
        let open =
            |read| open_target(&target, OpenOptions::new().read(read).write(true).create(missing).truncate(true));
        let file = open(true).or_else(|_| open(false)).during("cannot write to this file")?;
        Ok(Self {
            file: Some(file),
            target,
            temporary: None,
            superseded: Vec::new(),
            replaced: None,
            committed: Committed { in_place: Some(why), lost: None },
            durable: options.durable,
            process: std::process::id(),
        })
    }

    /// The file to write to.
    ///
    /// # Panics
    /// Never: the file is there until [`Pending::commit`].
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("open until commit")
    }

    /// Why the target is written over instead of being replaced, if it is.
    pub fn in_place(&self) -> Option<&'static str> {
        self.committed.in_place
    }

    /// Cuts the file to `len` bytes and puts it in the target's place. Where the target keeps its inode, or its
    /// directory does not let it be replaced, the complete file is copied over it.
    ///
    /// # Errors
    /// `Io`; the target is then as it was, unless it is written in place, or its directory could not be brought to
    /// stable storage: then it is the new one, which a loss of power may still undo. When the copy failed, an empty
    /// target is empty again; of others the complete new file stays, and the error names it.
    pub fn commit(mut self, len: u64) -> Result<Committed> {
        let target = self.target.clone();
        self.commit_inner(len).map_err(|e| e.with_path(&target))?;
        Ok(self.committed)
    }

    fn commit_inner(&mut self, len: u64) -> Result<()> {
        let file = self.file.as_ref().expect("open until commit");
        if self.temporary.is_some() || file.metadata().is_ok_and(|m| m.is_file()) {
            file.set_len(len).during("cannot set the file's size")?;
        }
        if self.durable {
            // On macOS `sync_all` is F_FULLFSYNC.
            file.sync_all().during("cannot bring the file to stable storage")?;
        }
        let Some(temporary) = &self.temporary else {
            // It may have been made just now.
            let made = self.durable && file.metadata().is_ok_and(|m| m.is_file());
            return if made { sync_directory(&self.target) } else { Ok(()) };
        };
        let why = if let Some(why) = keeps_inode(&self.target) {
            why
        } else {
            if cfg!(windows) {
                self.file = None; // an open file cannot be renamed there
                self.replaced = None;
            }
            match fs::rename(temporary, &self.target) {
                Ok(()) => {
                    self.temporary = None;
                    return self.replaced_by_rename();
                }
                Err(e) => match refusal(&e).filter(|_| self.target.is_file()) {
                    Some(why) => why,
                    None => return Err(Error::new(Kind::Io(e), "cannot put the new file in the old one's place")),
                },
            }
        };
        self.copy_over(len, why)
    }

    fn replaced_by_rename(&mut self) -> Result<()> {
        if let Some(old) = self.replaced.take() {
            close_in_background(old);
        }
        if self.durable {
            sync_directory(&self.target)?;
        }
        self.supersede();
        Ok(())
    }

    /// Copies the complete file over the target, and removes it.
    fn copy_over(&mut self, len: u64, why: &'static str) -> Result<()> {
        let Some(mut temporary) = self.temporary.clone() else { return Ok(()) };
        // Under this name no other save takes it for a leftover: after a crash it may be the only complete copy.
        let complete = completed(&temporary);
        if fs::rename(&temporary, &complete).is_ok() {
            temporary.clone_from(&complete);
            self.temporary = Some(complete);
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => File::open(&temporary).during("cannot read the new file again")?,
        };
        if self.durable {
            sync_directory(&self.target)?; // the temporary file is beside it
        }
        if let Err(e) = overwrite(&file, &self.target, len, self.durable) {
            let what = if self.target.metadata().is_ok_and(|m| m.len() == 0) {
                "cannot write to this file, which is empty as before".to_owned()
            } else {
                self.temporary = None; // it may be the only complete copy
                format!("cannot write to this file; the new one is kept as '{}'", temporary.display())
            };
            return Err(Error::new(Kind::Io(e), what));
        }
        self.committed = Committed { in_place: Some(why), lost: None };
        if self.durable {
            sync_directory(&self.target)?;
        }
        self.supersede();
        Ok(())
    }

    /// The target is complete: the copies that other saves left of what should have stood there are of no use.
    fn supersede(&mut self) {
        self.superseded.drain(..).for_each(|path| leftovers::remove(&path));
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary
            && self.process == std::process::id()
        {
            self.file = None;
            let _ = fs::remove_file(path); // what stays is cleared by the next save
        }
    }
}

/// Writes a small file the same way.
///
/// # Errors
/// As [`Pending::create`] and [`Pending::commit`].
pub fn write(target: &Path, bytes: &[u8], options: Options) -> Result<Committed> {
    let pending = Pending::create(target, options)?;
    crate::io::write_all_at(pending.file(), bytes, 0).during("cannot write").map_err(|e| e.with_path(target))?;
    pending.commit(bytes.len() as u64)
}

/// Takes a file away; where it has to stay, its content.
///
/// # Errors
/// `Io`.
pub fn withdraw(path: &Path, durable: bool) -> Result<()> {
    if keeps_inode(path).is_none() {
        match fs::remove_file(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {} // the directory gives no file away
            Err(e) => return Err(Error::new(Kind::Io(e), "cannot remove this file").with_path(path)),
            Ok(()) if durable => return sync_directory(path),
            Ok(()) => return Ok(()),
        }
    }
    write(path, b"", Options { atomic: false, durable, queued: false }).map(drop)
}

/// The file that `path` stands for, if it is a symbolic link; the link itself stays.
fn follow_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(link) => path = path.parent().unwrap_or(Path::new("")).join(link),
            Err(_) => return Ok(path),
        }
    }
    Err(Error::new(Kind::Io(std::io::Error::other("too many levels of symbolic links")), "cannot open"))
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn busy(e: std::io::Error) -> Error {
    Error::new(Kind::Io(e), "cannot write to this file")
        .with_advice("Let one process write each path, or wait for the other save.")
}

fn refused_by_directory(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::Unsupported)
}

/// Why the system refuses to put a file in this one's place, if it does: a full or failing disk is no refusal.
fn refusal(e: &std::io::Error) -> Option<&'static str> {
    const DIRECTORY: &str = "the directory does not let the target be replaced";
    const MOUNT: &str = "the target is a mount point";
    const UNABLE: &str = "the file system does not replace files";
    #[cfg(unix)]
    {
        use rustix::io::Errno;
        let number = Errno::from_io_error(e)?;
        let known = [
            (Errno::PERM, DIRECTORY), // a sticky directory, a file of another owner
            (Errno::ACCESS, DIRECTORY),
            (Errno::XDEV, MOUNT),
            (Errno::BUSY, MOUNT),
            (Errno::NOTSUP, UNABLE),
            (Errno::OPNOTSUPP, UNABLE),
        ];
        known.iter().find_map(|&(n, why)| (n == number).then_some(why))
    }
    #[cfg(not(unix))]
    match e.kind() {
        ErrorKind::PermissionDenied => Some(DIRECTORY), // somebody has it open
        ErrorKind::CrossesDevices | ErrorKind::ResourceBusy => Some(MOUNT),
        ErrorKind::Unsupported => Some(UNABLE),
        _ => None,
    }
}

/// The last close of a replaced file frees its pages: 130 to 330 ms for 512 MB, not on the caller's time.
fn close_in_background(old: File) {
    if old.metadata().is_ok_and(|m| m.len() >= 16 << 20) {
        let _ = std::thread::Builder::new().name("hornbeam-close".into()).spawn(move || drop(old));
    }
}
