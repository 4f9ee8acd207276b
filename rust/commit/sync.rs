//! Stable storage for directories and whole trees.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use super::{directory, follow_links};
use crate::error::{Context, Error, Kind, Result};

/// Brings the names in the directory that a file is in to stable storage; an error names the file.
pub(super) fn sync_directory(target: &Path) -> Result<()> {
    sync_names(directory(target)).map_err(|e| e.with_path(target))
}

/// Brings the names in a directory to stable storage, where a directory can be opened; an error names no path yet.
pub(super) fn sync_names(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let opened = File::open(path).during("cannot open the directory")?;
        opened.sync_all().during("cannot bring the directory to stable storage")?;
    }
    Ok(())
}

/// Brings a file, or a directory with everything in it, to stable storage; not its name. Links to directories are not
/// followed.
///
/// # Errors
/// `Io`.
pub fn sync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).during("cannot list the directory").map_err(|e| e.with_path(path))? {
            let inner = entry.during("cannot list the directory").map_err(|e| e.with_path(path))?.path();
            if !(inner.is_symlink() && inner.is_dir()) {
                sync(&inner)?;
            }
        }
        return sync_names(path).map_err(|e| e.with_path(path));
    }
    if !path.is_file() {
        return Ok(()); // nobody waits for a pipe
    }
    let synced = OpenOptions::new().read(true).write(cfg!(windows)).open(path).and_then(|file| file.sync_all());
    synced.during("cannot bring the file to stable storage").map_err(|e| e.with_path(path))
}

/// Brings the name of a file to stable storage; of what a link stands for, its own.
///
/// # Errors
/// `Io`.
pub fn sync_name(path: &Path) -> Result<()> {
    sync_directory(&follow_links(path)?)
}

/// Makes a directory and those above it; with `durable`, their names are on stable storage afterwards.
///
/// # Errors
/// `Io`.
pub fn create_directories(path: &Path, durable: bool) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    create_directories(directory(path), durable)?;
    match fs::create_dir(path) {
        Err(e) if !(e.kind() == ErrorKind::AlreadyExists && path.is_dir()) => {
            Err(Error::new(Kind::Io(e), "cannot create the directory").with_path(path))
        }
        _ if durable => sync_directory(path),
        _ => Ok(()),
    }
}
