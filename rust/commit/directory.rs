//! Directories that replace others when they are complete.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::leftovers::{SUFFIX, Temporary, temporary};
use super::sync::{create_directories, sync_directory, sync_names};
use super::{Options, attributes, busy, directory, follow_links, refused_by_directory};
use crate::error::{Context, Error, Kind, Result};

/// A directory that is being written, beside the one it will replace. Dropping it without [`Directory::commit`] leaves
/// the target as it was.
#[derive(Debug)]
pub struct Directory {
    target: PathBuf,
    names: Vec<OsString>,
    temporary: Option<PathBuf>,
    lock: Option<File>,
    lost: Option<&'static str>,
    durable: bool,
    process: u32, // as in `Pending`
}

impl Directory {
    /// Makes the directory to write to. A target that holds anything but `names` is written in place, so that nothing
    /// of somebody else's is lost; so is a mount point, one without a name (`.`), and any without `options.atomic`.
    ///
    /// # Errors
    /// `Io`, also when the target is a file.
    pub fn create(target: &Path, names: &[&str], options: Options) -> Result<Self> {
        Self::create_inner(target, names, options).map_err(|e| e.with_path(target))
    }

    fn create_inner(target: &Path, names: &[&str], options: Options) -> Result<Self> {
        let target = follow_links(target)?;
        let names: Vec<OsString> = names.iter().map(Into::into).collect();
        let (durable, process) = (options.durable, std::process::id());
        let replaceable = match fs::read_dir(&target) {
            Ok(entries) => {
                let known = entries.flatten().all(|e| names.contains(&e.file_name()));
                known && target.file_name().is_some() && !is_mount_point(&target)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                create_directories(directory(&target), durable)?;
                true
            }
            Err(e) => return Err(Error::new(Kind::Io(e), "cannot write to this directory")),
        };
        if options.atomic && replaceable {
            match temporary(&target, options.queued) {
                Ok(Temporary { file: lock, path, .. }) => {
                    // The locked file stands for the directory of the same name with another ending.
                    let inner = path.with_extension("hornbeam-dir");
                    if let Err(e) = fs::create_dir(&inner) {
                        let _ = fs::remove_file(&path);
                        return Err(Error::new(Kind::Io(e), "cannot create a directory beside the target"));
                    }
                    let lost = match (File::open(&target), File::open(&inner)) {
                        (Ok(old), Ok(new)) if cfg!(unix) => attributes::copy(&old, &new),
                        _ => None,
                    };
                    let (temporary, lock) = (Some(inner), Some(lock));
                    return Ok(Self { target, names, temporary, lock, lost, durable, process });
                }
                Err(e) if target.is_dir() && refused_by_directory(&e) => {}
                Err(e) if e.kind() == ErrorKind::ResourceBusy => return Err(busy(e)),
                Err(e) => return Err(Error::new(Kind::Io(e), "cannot create a file in this directory")),
            }
        }
        fs::create_dir_all(&target).during("cannot create the directory")?;
        Ok(Self { target, names, temporary: None, lock: None, lost: None, durable, process })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.target)
    }

    /// Puts the directory in the target's place, in one step where the system can. Returns what it could not take over
    /// from the old one.
    ///
    /// # Errors
    /// `Io`.
    pub fn commit(mut self) -> Result<Option<&'static str>> {
        let target = self.target.clone();
        self.commit_inner().map_err(|e| e.with_path(&target))?;
        Ok(self.lost)
    }

    fn commit_inner(&mut self) -> Result<()> {
        if self.durable {
            sync_names(self.path())?;
        }
        let Some(temporary) = self.temporary.clone() else {
            return if self.durable { sync_directory(&self.target) } else { Ok(()) };
        };
        if self.target.exists() {
            exchange(&temporary, &self.target)?; // the old one now has the temporary name, and is removed on drop
            self.keep_others(&temporary)?;
        } else {
            fs::rename(&temporary, &self.target).during("cannot put the new directory in place")?;
        }
        if self.durable {
            sync_directory(&self.target)?;
        }
        Ok(())
    }
}

impl Directory {
    /// Brings what somebody put into the old directory meanwhile into the new one.
    fn keep_others(&mut self, old: &Path) -> Result<()> {
        for entry in fs::read_dir(old).into_iter().flatten().flatten() {
            if !self.names.contains(&entry.file_name())
                && let Err(e) = fs::rename(entry.path(), self.target.join(entry.file_name()))
            {
                self.temporary = None; // removes nothing
                let what = format!("cannot move a file of somebody else; it is kept in '{}'", old.display());
                return Err(Error::new(Kind::Io(e), what));
            }
        }
        Ok(())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary
            && self.process == std::process::id()
        {
            let _ = fs::remove_dir_all(path);
            self.lock = None;
            let _ = fs::remove_file(path.with_extension(&SUFFIX[1..]));
        }
    }
}

/// Swaps two directories.
fn exchange(new: &Path, old: &Path) -> Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    // Two steps: a crash between them leaves the old directory beside the target, under a name that tells.
    let aside = new.with_extension("hornbeam-old"); // the new one's name is random
    fs::rename(old, &aside).during("cannot move the old directory aside")?;
    match fs::rename(new, old) {
        Ok(()) => fs::rename(&aside, new).during("cannot remove the old directory"),
        Err(e) => {
            let _ = fs::rename(&aside, old);
            Err(Error::new(Kind::Io(e), "cannot put the new directory in the old one's place"))
        }
    }
}

/// Whether another file system begins there: a directory that cannot be renamed.
fn is_mount_point(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(inner), Ok(outer)) = (path.metadata(), directory(path).metadata()) {
            return inner.dev() != outer.dev();
        }
    }
    #[cfg(not(unix))]
    let _ = path;
    false
}
