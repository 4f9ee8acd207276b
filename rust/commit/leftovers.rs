//! Temporary files: how they are named, who holds them, and which of them crashed saves left behind.
//!
//! `.<name>.<host><process><random>.hornbeam-tmp`, each number of 8 hex digits; `.complete` comes before the ending
//! while a complete new file is copied over the old one. Up to version 0.1.0 the host was not part of the name.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use super::directory;
use super::lock::{Lock, carefully, lock};
use super::overwrite::mark;

/// Ending of our temporary files.
pub(super) const SUFFIX: &str = ".hornbeam-tmp";
/// Comes before the ending of a complete file, which only the next complete save may remove.
const COMPLETE: &str = ".complete";
/// Bytes of a target's name that its temporary file repeats: a name may have 255, and more is added.
const KEPT_BYTES: usize = 180;
/// Bytes that version 0.1.0 repeated.
const KEPT_BYTES_BEFORE: usize = 200;
/// Locks may be local to a host, and other owners' files are theirs: such a leftover is left alone for so long.
const FOREIGN_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// A new, locked file beside a target.
#[derive(Debug)]
pub(super) struct Temporary {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Complete files of saves that ended while they copied; to be removed when this one is complete.
    pub(super) superseded: Vec<PathBuf>,
}

/// Makes a locked file beside `target`; clears those that crashed saves left. `ResourceBusy` while somebody else,
/// unless it is this process and the saves are `queued`, writes one.
pub(super) fn temporary(target: &Path, queued: bool) -> std::io::Result<Temporary> {
    let Some(name) = target.file_name() else { return Err(ErrorKind::IsADirectory.into()) };
    let own = std::process::id();
    let found = clear_named(directory(target), name, |process| queued && process == own);
    if let Some(writer) = found.writer {
        let text = format!("another save of this file is under way, in process {writer}");
        return Err(std::io::Error::new(ErrorKind::ResourceBusy, text));
    }
    let mut hasher = std::hash::RandomState::new().build_hasher(); // seeded by the system
    loop {
        hasher.write_u32(own);
        let random = hasher.finish() as u32;
        let path = directory(target).join(format!("{}{:08x}{own:08x}{random:08x}{SUFFIX}", prefix(name), host()));
        let mut open = OpenOptions::new();
        open.read(true).write(true).create_new(true);
        mark(&mut open); // for a moment it is still open where it has taken the target's place
        #[cfg(windows)]
        std::os::windows::fs::OpenOptionsExt::share_mode(&mut open, 1 | 2); // cannot be removed while it is open
        match open.open(&path) {
            // Between its creation and its lock another save may have cleared it.
            Ok(file) if lock(&file) != Lock::Taken && path.exists() => {
                return Ok(Temporary { file, path, superseded: found.complete });
            }
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// The name that says that a temporary file is complete.
pub(super) fn completed(temporary: &Path) -> PathBuf {
    let name = temporary.file_name().and_then(OsStr::to_str).unwrap_or_default();
    temporary.with_file_name(format!("{}{COMPLETE}{SUFFIX}", name.strip_suffix(SUFFIX).unwrap_or(name)))
}

/// Removes what crashed saves of `target` left beside it.
pub fn clear_leftovers(target: &Path) {
    if let Some(name) = target.file_name() {
        clear_named(directory(target), name, |_| true);
    }
}

/// Removes a leftover, unless somebody holds it.
pub(super) fn remove(path: &Path) {
    if let Some((_file, Lock::Acquired)) = open_and_lock(path) {
        let _ = fs::remove_file(path);
    }
}

/// What begins the names of a target's temporary files. Long names are cut, and told apart by a hash.
fn prefix(name: &OsStr) -> String {
    match name.to_str() {
        Some(text) if text.len() <= KEPT_BYTES => format!(".{text}."),
        _ => {
            let text = name.to_string_lossy();
            format!(".{}~{:016x}.", cut(&text, KEPT_BYTES), hash(name.as_encoded_bytes()))
        }
    }
}

fn cut(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|&i| text.is_char_boundary(i));
    &text[..end.unwrap_or(0)]
}

/// FNV-1a, 64 bits: the same in every process and version.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// A number of this host: on Linux of this start of it, elsewhere of its name.
fn host() -> u32 {
    static HOST: OnceLock<u32> = OnceLock::new();
    *HOST.get_or_init(|| {
        if cfg!(target_os = "linux")
            && let Ok(id) = fs::read("/proc/sys/kernel/random/boot_id")
        {
            return crc32fast::hash(&id);
        }
        #[cfg(unix)]
        return crc32fast::hash(rustix::system::uname().nodename().to_bytes());
        #[cfg(not(unix))]
        crc32fast::hash(std::env::var_os("COMPUTERNAME").unwrap_or_default().as_encoded_bytes())
    })
}

/// What a temporary file's name says.
#[derive(Debug, PartialEq, Eq)]
struct Name {
    host: Option<u32>, // not in names of version 0.1.0
    process: u32,
    complete: bool,
}

impl Name {
    /// The name of a temporary file of a target, without the target's prefix.
    fn parse(rest: &[u8]) -> Option<Self> {
        let rest = rest.strip_suffix(SUFFIX.as_bytes())?;
        let (digits, complete) = match rest.strip_suffix(COMPLETE.as_bytes()) {
            Some(digits) => (digits, true),
            None => (rest, false),
        };
        if !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let number = |at: usize| {
            let text = std::str::from_utf8(&digits[at..at + 8]).ok()?;
            u32::from_str_radix(text, 16).ok()
        };
        match digits.len() {
            16 => Some(Self { host: None, process: number(0)?, complete }),
            24 => Some(Self { host: Some(number(0)?), process: number(8)?, complete }),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Found {
    writer: Option<u32>,
    complete: Vec<PathBuf>,
}

/// Removes what nobody holds; reports the process of somebody who writes, other than those that `may`, and complete
/// files that nobody holds.
///
/// A lock goes on in forked children, so a writer counts only while its own process lives. Where that cannot be seen,
/// on another host or in another container, both write, and the last one to finish stays.
fn clear_named(directory: &Path, name: &OsStr, may: impl Fn(u32) -> bool) -> Found {
    let mut found = Found::default();
    let now = prefix(name);
    let before = name.to_str().map(|text| format!(".{}.", cut(text, KEPT_BYTES_BEFORE)));
    let Ok(entries) = fs::read_dir(directory) else { return found };
    for entry in entries.flatten() {
        let entry_name = entry.file_name();
        let bytes = entry_name.as_encoded_bytes();
        let parsed = bytes.strip_prefix(now.as_bytes()).and_then(Name::parse).or_else(|| {
            // Cut without a hash, it may be another target's: it is removed, and refuses nobody.
            let rest = bytes.strip_prefix(before.as_ref()?.as_bytes())?;
            Name::parse(rest).filter(|n| n.host.is_none())
        });
        let Some(parsed) = parsed else { continue };
        let path = entry.path();
        let Some((file, lock)) = open_and_lock(&path) else { continue };
        let Ok(metadata) = file.metadata() else { continue };
        let here = parsed.host.is_none_or(|h| h == host());
        match lock {
            Lock::Taken => {
                let exact = bytes.starts_with(now.as_bytes());
                let writes = here && exact && !may(parsed.process) && is_alive(parsed.process);
                found.writer = found.writer.or(writes.then_some(parsed.process));
            }
            Lock::Acquired if (here && is_own(&metadata)) || is_old(&metadata) => {
                if parsed.complete {
                    found.complete.push(path);
                // Where there are no locks the open file itself is one: it cannot be removed, and then it is somebody's.
                } else if cfg!(unix) || fs::remove_file(&path).is_ok() {
                    let made = path.with_extension("hornbeam-dir");
                    if made.symlink_metadata().is_ok_and(|m| m.is_dir()) {
                        let _ = fs::remove_dir_all(made);
                    }
                    let _ = fs::remove_file(path);
                }
            }
            Lock::Acquired | Lock::Unknown => {}
        }
    }
    found
}

/// Opens a leftover and asks for its lock: nothing but a regular file, which is not waited for, followed or changed.
fn open_and_lock(path: &Path) -> Option<(File, Lock)> {
    if !path.symlink_metadata().is_ok_and(|m| m.is_file()) {
        return None; // opening a device may do something already
    }
    let open = |write| {
        let mut open = OpenOptions::new();
        carefully(&mut open);
        let file = open.read(true).write(write).open(path).ok()?;
        file.metadata().is_ok_and(|m| m.is_file()).then_some(file)
    };
    let file = open(false)?;
    match lock(&file) {
        // NFS locks only what is open for writing.
        Lock::Unknown => open(true).map(|file| {
            let locked = lock(&file);
            (file, locked)
        }),
        known => Some((file, known)),
    }
}

fn is_own(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::uid(metadata) == rustix::process::geteuid().as_raw();
    #[cfg(not(unix))]
    {
        let _ = metadata;
        true
    }
}

fn is_old(metadata: &Metadata) -> bool {
    let age = metadata.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
    age.is_some_and(|age| age > FOREIGN_AGE)
}

#[cfg(unix)]
fn is_alive(process: u32) -> bool {
    use rustix::process::{Pid, test_kill_process};
    let process = i32::try_from(process).ok().and_then(Pid::from_raw);
    process.is_some_and(|p| !matches!(test_kill_process(p), Err(rustix::io::Errno::SRCH)))
}

#[cfg(not(unix))]
fn is_alive(_: u32) -> bool {
    false
}
