//! One error type: what went wrong, in which file, member and entry, what was expected and found, what to do.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of every fallible function of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong; decides the Python exception type (see `py/errors.rs`).
#[derive(Debug)]
pub enum Kind {
    /// The operating system refused an operation.
    Io(std::io::Error),
    /// The zip container is malformed.
    Archive,
    /// The bytes of a member do not match their CRC-32.
    Crc,
    /// The weights image, HDF5 or safetensors, is malformed.
    Image,
    /// A JSON text is malformed; the byte offset says where.
    Json(usize),
    /// A limit of `limits.rs` is exceeded.
    Limit,
    /// The file is well formed and asks for something that is refused: links out of the file, external storage.
    Unsafe,
    /// Legal, but nothing this build or engine can handle.
    Unsupported,
    /// The caller passed something that cannot be written.
    Invalid,
    /// What is being saved changed meanwhile.
    Changed,
    /// The operation was cancelled by the caller.
    Cancelled,
    /// The system has no memory for what a file or a model asks for.
    Memory,
    /// A fault of this crate's own: a thread panicked, an invariant is broken.
    Internal,
    /// The caller's own code failed, with this; it is handed back as it is.
    Caller(Box<dyn std::error::Error + Send + Sync>),
}

/// An error with its place. Build with [`Error::new`] and the `with_*` methods; the outer layers add what they know.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    what: String,
    path: Option<PathBuf>,
    member: Option<String>,
    entry: Option<String>,
    expected: Option<String>,
    found: Option<String>,
    advice: Option<&'static str>,
}

impl Error {
    /// A new error; `what` is one clause without a full stop.
    #[cold]
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            what: what.into(),
            path: None,
            member: None,
            entry: None,
            expected: None,
            found: None,
            advice: None,
        }))
    }

    /// Adds the file, unless an inner layer already did.
    #[must_use]
    pub fn with_path(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Adds the archive member, unless an inner layer already did.
    #[must_use]
    pub fn with_member(mut self, member: &str) -> Self {
        self.0.member.get_or_insert_with(|| member.to_owned());
        self
    }

    /// Adds the path inside the HDF5 image, unless an inner layer already did.
    #[must_use]
    pub fn with_entry(mut self, entry: &str) -> Self {
        self.0.entry.get_or_insert_with(|| entry.to_owned());
        self
    }

    /// Adds what was expected and what was found.
    #[must_use]
    pub fn with_found(mut self, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self.0.found = Some(found.to_string());
        self
    }

    /// Adds a sentence that says what the user can do.
    #[must_use]
    pub fn with_advice(mut self, advice: &'static str) -> Self {
        self.0.advice.get_or_insert(advice);
        self
    }

    /// The kind.
    pub fn kind(&self) -> &Kind {
        &self.0.kind
    }

    /// The kind, without the rest.
    pub fn into_kind(self) -> Kind {
        self.0.kind
    }

    /// The file, if known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The archive member, if known.
    pub fn member(&self) -> Option<&str> {
        self.0.member.as_deref()
    }

    /// The path inside the HDF5 image, if known.
    pub fn entry(&self) -> Option<&str> {
        self.0.entry.as_deref()
    }

    /// What was expected, if it can be said.
    pub fn expected(&self) -> Option<&str> {
        self.0.expected.as_deref()
    }

    /// What was found, if it can be said.
    pub fn found(&self) -> Option<&str> {
        self.0.found.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        f.write_str(&e.what)?;
        if let Kind::Io(io) = &e.kind {
            write!(f, ": {io}")?;
        }
        if let (Some(expected), Some(found)) = (&e.expected, &e.found) {
            write!(f, ": expected {expected}, found {found}")?;
        }
        match (&e.member, &e.entry) {
            (Some(m), Some(n)) => write!(f, " (entry '{n}' of member '{m}')")?,
            (Some(m), None) => write!(f, " (member '{m}')")?,
            (None, Some(n)) => write!(f, " (entry '{n}')")?,
            (None, None) => {}
        }
        if let Some(p) = &e.path {
            write!(f, " in '{}'", p.display())?;
        }
        f.write_str(".")?;
        if let Some(a) = e.advice {
            write!(f, " {a}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.kind {
            Kind::Io(e) => Some(e),
            _ => None,
        }
    }
}

/// The POSIX name of a kind of I/O error, which has another number on every system. For errors of Rust's own, and for
/// those of Windows, whose numbers mean something else.
pub fn posix_name(kind: std::io::ErrorKind) -> Option<&'static str> {
    use std::io::ErrorKind as K;
    Some(match kind {
        K::NotFound => "ENOENT",
        K::PermissionDenied => "EACCES",
        K::AlreadyExists => "EEXIST",
        K::WouldBlock => "EAGAIN",
        K::NotADirectory => "ENOTDIR",
        K::IsADirectory => "EISDIR",
        K::DirectoryNotEmpty => "ENOTEMPTY",
        K::ReadOnlyFilesystem => "EROFS",
        K::StaleNetworkFileHandle => "ESTALE",
        K::InvalidInput => "EINVAL",
        K::TimedOut => "ETIMEDOUT",
        K::StorageFull => "ENOSPC",
        K::NotSeekable => "ESPIPE",
        K::QuotaExceeded => "EDQUOT",
        K::FileTooLarge => "EFBIG",
        K::ResourceBusy => "EBUSY",
        K::ExecutableFileBusy => "ETXTBSY",
        K::Deadlock => "EDEADLK",
        K::CrossesDevices => "EXDEV",
        K::TooManyLinks => "EMLINK",
        K::InvalidFilename => "ENAMETOOLONG",
        K::ArgumentListTooLong => "E2BIG",
        K::Interrupted => "EINTR",
        K::Unsupported => "ENOTSUP",
        K::OutOfMemory => "ENOMEM",
        K::BrokenPipe => "EPIPE",
        _ => return None,
    })
}

/// An empty vector with room for `capacity` elements: for every size that a file or a model decides.
///
/// # Errors
/// `Memory`.
pub fn try_with_capacity<T>(capacity: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(capacity).map_err(|_| out_of_memory(capacity.saturating_mul(size_of::<T>())))?;
    Ok(vector)
}

/// Appends to a vector that a file or a model lets grow.
///
/// # Errors
/// `Memory`.
#[inline]
pub fn try_push<T>(to: &mut Vec<T>, item: T) -> Result<()> {
    if to.len() == to.capacity() {
        to.try_reserve(1).map_err(|_| out_of_memory(2 * to.len() * size_of::<T>()))?;
    }
    to.push(item);
    Ok(())
}

/// The error for `bytes` that could not be had.
#[cold]
pub fn out_of_memory(bytes: usize) -> Error {
    Error::new(Kind::Memory, format!("not enough memory: {bytes} bytes could not be allocated"))
        .with_advice("Free memory, or raise the limit of this process.")
}

/// Adds a place to the error of a `Result`; the outer layers know the path, the inner ones the entry.
pub trait Context<T> {
    /// Turns an I/O error into [`Error`], saying what was attempted.
    fn during(self, what: &str) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn during(self, what: &str) -> Result<T> {
        self.map_err(|e| Error::new(Kind::Io(e), what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn kinds_have_the_names_that_posix_gives_their_numbers() {
        let numbers = [
            ("ENOENT", 2),
            ("EINTR", 4),
            ("E2BIG", 7),
            ("EAGAIN", 11),
            ("ENOMEM", 12),
            ("EACCES", 13),
            ("EBUSY", 16),
            ("EEXIST", 17),
            ("EXDEV", 18),
            ("ENOTDIR", 20),
            ("EISDIR", 21),
            ("EINVAL", 22),
            ("ETXTBSY", 26),
            ("EFBIG", 27),
            ("ENOSPC", 28),
            ("ESPIPE", 29),
            ("EROFS", 30),
            ("EMLINK", 31),
            ("EPIPE", 32),
            ("EDEADLK", 35),
            ("ENAMETOOLONG", 36),
            ("ENOTEMPTY", 39),
            ("ENOTSUP", 95),
            ("ETIMEDOUT", 110),
            ("ESTALE", 116),
            ("EDQUOT", 122),
        ];
        for (name, number) in numbers {
            let kind = std::io::Error::from_raw_os_error(number).kind();
            assert_eq!(posix_name(kind), Some(name), "{kind:?}");
        }
        // A number without a name of its own, and Rust's own kinds, have none.
        let other = std::io::Error::from_raw_os_error(5).kind();
        for kind in [other, std::io::ErrorKind::Other, std::io::ErrorKind::UnexpectedEof] {
            assert_eq!(posix_name(kind), None);
        }
    }

    #[test]
    fn display_names_every_place_and_inner_wins() {
        let e = Error::new(Kind::Image, "bad shape")
            .with_entry("a/b")
            .with_entry("outer")
            .with_member("model.weights.h5")
            .with_path(Path::new("/x.keras"))
            .with_found("[2]", "[3]")
            .with_advice("Save it again.");
        assert_eq!(
            e.to_string(),
            "bad shape: expected [2], found [3] (entry 'a/b' of member 'model.weights.h5') in '/x.keras'. Save it again."
        );
    }
}
