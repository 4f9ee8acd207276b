//! How new files and directories take the places of old ones.
#![cfg(unix)]

mod common;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use common::{ATOMIC, OVER, QUEUED};
use hornbeam::commit::{self, Pending};
use hornbeam::error::Kind;
use hornbeam::load;

fn names(directory: &Path) -> Vec<String> {
    let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(directory).unwrap().map(name).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn put(path: &Path, text: &str, options: commit::Options) -> Option<&'static str> {
    let pending = Pending::create(path, options).unwrap();
    pending.file().write_all(text.as_bytes()).unwrap();
    pending.commit(text.len() as u64).unwrap().in_place
}

#[test]
fn the_mode_is_kept_and_a_new_file_has_the_usual_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    fs::write(directory.path().join("usual"), b"").unwrap();
    put(&path, "first", ATOMIC);
    assert_eq!(mode(&path), mode(&directory.path().join("usual")));
    for wanted in [0o600, 0o640, 0o444 | 0o200, 0o755] {
        fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
        put(&path, "next", ATOMIC);
        assert_eq!(mode(&path), wanted);
    }
    assert_eq!(names(directory.path()), ["m.keras", "usual"]);
}

#[test]
fn an_old_file_stays_whole_for_whoever_has_it_open() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    put(&path, "first", ATOMIC);
    let reader = load::open(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    assert_eq!(put(&path, "2nd", ATOMIC), None);
    assert_ne!(fs::metadata(&path).unwrap().ino(), inode);
    let mut old = vec![0; reader.len() as usize];
    reader.read_at(&mut old, 0).unwrap();
    assert_eq!((&old[..], &fs::read(&path).unwrap()[..]), (&b"first"[..], &b"2nd"[..]));
    assert_eq!(put(&path, "in place", OVER), Some("atomic=False"));
    assert_eq!(fs::read(&path).unwrap(), b"in place");
}

#[test]
fn what_is_empty_or_open_for_writing_keeps_its_inode() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    let inode = || fs::metadata(&path).unwrap().ino();
    fs::write(&path, b"").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let first = inode();
    for options in [ATOMIC, commit::Options { durable: true, ..ATOMIC }] {
        fs::write(&path, b"").unwrap();
        assert_eq!(put(&path, "new", options), Some(commit::EMPTY));
        assert_eq!((inode(), mode(&path), &fs::read(&path).unwrap()[..]), (first, 0o640, &b"new"[..]));
    }
    // What can only read it, or is ours, does not count: it goes on seeing the old content.
    let reader = fs::File::open(&path).unwrap();
    let (held, other) = (Pending::create(&path, QUEUED).unwrap(), Pending::create(&path, QUEUED).unwrap());
    assert_eq!(put(&path, "newer", QUEUED), None);
    assert_ne!(inode(), first);
    assert_eq!(std::io::read_to_string(&reader).unwrap(), "new");
    drop((held, other));
    // One that is longer, or opened while it is being written.
    for open in [fs::File::options().write(true), fs::File::options().append(true).read(true)] {
        let before = inode();
        let pending = Pending::create(&path, ATOMIC).unwrap();
        pending.file().write_all(b"x").unwrap();
        let writer = open.open(&path).unwrap();
        assert_eq!(pending.commit(1).unwrap().in_place, Some(commit::OPEN));
        assert_eq!((inode(), &fs::read(&path).unwrap()[..]), (before, &b"x"[..]));
        drop(writer);
        assert_eq!(put(&path, "longer than one", ATOMIC), None);
    }
    // Opened under another name.
    let link = directory.path().join("link");
    fs::hard_link(&path, &link).unwrap();
    let writer = fs::File::options().write(true).open(&link).unwrap();
    assert_eq!(put(&path, "two names", ATOMIC), Some(commit::OPEN));
    assert_eq!(fs::read(&link).unwrap(), b"two names");
    drop(writer);
    assert_eq!(names(directory.path()), ["link", "m.keras"]);
}

#[test]
fn a_complete_file_is_removed_only_when_the_next_one_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    let complete = directory.path().join(".m.keras.0123456789abcdef01234567.complete.hornbeam-tmp");
    let own = directory.path().join(".m.keras.0123456789abcdef.complete.hornbeam-tmp");
    fs::write(&complete, b"of another host").unwrap();
    fs::write(&own, b"of a save that ended in its copy").unwrap();
    fs::write(&path, b"half").unwrap();
    let pending = Pending::create(&path, ATOMIC).unwrap();
    assert!(own.exists());
    drop(pending);
    assert!(own.exists());
    put(&path, "new", ATOMIC);
    assert!(!own.exists() && complete.exists());
}

#[test]
fn leftovers_are_not_opened_followed_or_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let name = |n: u8| root.join(format!(".m.keras.{n:016x}.hornbeam-tmp"));
    let victim = root.join("victim");
    fs::write(&victim, b"mine").unwrap();
    symlink("victim", name(1)).unwrap();
    symlink("nothing", name(2)).unwrap();
    fs::create_dir(name(3)).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(name(4)).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, name(5), 0o666.into()).unwrap();
    symlink("/dev/zero", name(6)).unwrap();
    for similar in ["0123456789ABCDEF", "0123456789abcdeg", "0123456789abcde", "0123456789abcdef0"] {
        fs::write(root.join(format!(".m.keras.{similar}.hornbeam-tmp")), b"not ours").unwrap();
    }
    // Of a leftover itself, nothing that lies at its directory's name but a directory.
    let left = name(7);
    fs::write(&left, b"half").unwrap();
    symlink("victim-directory", left.with_extension("hornbeam-dir")).unwrap();
    fs::create_dir(root.join("victim-directory")).unwrap();
    let before = names(root);
    let path = root.join("m.keras");
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send((put(&path, "new", ATOMIC), commit::clear_leftovers(&path))));
    waiting.recv_timeout(std::time::Duration::from_secs(60)).expect("it hangs");
    let after = names(root);
    let missing: Vec<_> = before.iter().filter(|n| !after.contains(n)).collect();
    assert_eq!(missing, [left.file_name().unwrap().to_str().unwrap()]);
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
}

#[test]
fn leftovers_of_another_host_are_left_alone_for_a_day() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let path = root.join("m.keras");
    let here = Pending::create(&path, ATOMIC).unwrap();
    let ours = names(root).pop().unwrap();
    let host = &ours[".m.keras.".len()..][..8];
    drop(here);
    let leave = |host: &str, hours: u64, process: u32| {
        let left = root.join(format!(".m.keras.{host}{process:08x}{hours:08x}.hornbeam-tmp"));
        let file = fs::File::create(&left).unwrap();
        let age = std::time::Duration::from_secs(hours * 3600);
        file.set_modified(std::time::SystemTime::now() - age).unwrap();
        left
    };
    let other = format!("{:08x}", !u32::from_str_radix(host, 16).unwrap());
    let dead = i32::MAX as u32;
    let (dead, recent, old) = (leave(host, 1, dead), leave(&other, 23, dead), leave(&other, 25, dead));
    let writing = leave(&other, 0, std::os::unix::process::parent_id());
    // Somebody there who still writes does not refuse us: nobody here knows whether he lives.
    let held = fs::File::open(&writing).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    put(&path, "new", ATOMIC);
    assert_eq!((dead.exists(), recent.exists(), old.exists()), (false, true, false));
    assert!(writing.exists());
}

#[test]
fn pipes_and_devices_are_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o666.into()).unwrap();
    let (done, waiting) = std::sync::mpsc::channel();
    let pipe = path.clone();
    std::thread::spawn(move || done.send((Pending::create(&pipe, ATOMIC).map(drop), load::open(&pipe).map(drop))));
    let (written, read) = waiting.recv_timeout(std::time::Duration::from_secs(60)).expect("it hangs");
    for error in [written.unwrap_err(), read.unwrap_err()] {
        assert!(matches!(error.kind(), Kind::Io(_)) && error.path() == Some(&path), "{error}");
    }
    assert_eq!(put(Path::new("/dev/null"), "gone", ATOMIC), Some("the target is not a regular file"));
}

#[test]
fn links_are_followed_and_stay() {
    let directory = tempfile::tempdir().unwrap();
    let (root, elsewhere) = (directory.path(), directory.path().join("elsewhere"));
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("real"), b"old").unwrap();
    symlink("elsewhere/second", root.join("first")).unwrap();
    symlink("real", elsewhere.join("second")).unwrap();
    put(&root.join("first"), "new", ATOMIC);
    assert_eq!(fs::read_link(root.join("first")).unwrap(), Path::new("elsewhere/second"));
    assert_eq!(fs::read_link(elsewhere.join("second")).unwrap(), Path::new("real"));
    assert_eq!(fs::read(elsewhere.join("real")).unwrap(), b"new");
    symlink("elsewhere/not-yet", root.join("dangling")).unwrap();
    put(&root.join("dangling"), "made", ATOMIC);
    assert_eq!(fs::read(elsewhere.join("not-yet")).unwrap(), b"made");
    symlink("loop", root.join("loop")).unwrap();
    assert!(matches!(Pending::create(&root.join("loop"), ATOMIC).unwrap_err().kind(), Kind::Io(_)));
    assert_eq!(names(root), ["dangling", "elsewhere", "first", "loop"]);
    assert_eq!(names(&elsewhere), ["not-yet", "real", "second"]);
}

#[test]
fn leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let path = root.join("m.keras");
    let dead = root.join(".m.keras.0123456789abcdef.hornbeam-tmp");
    fs::write(&dead, b"half").unwrap();
    let dead_directory = dead.with_extension("hornbeam-dir");
    fs::create_dir(&dead_directory).unwrap();
    fs::write(dead_directory.join("config.json"), b"half").unwrap();
    let other = root.join(".other.keras.0123456789abcdef.hornbeam-tmp");
    let similar = root.join(".m.keras.notes");
    fs::write(&other, b"of another target").unwrap();
    fs::write(&similar, b"not ours").unwrap();

    let living = Pending::create(&path, ATOMIC).unwrap();
    assert!(!dead.exists() && !dead_directory.exists() && other.exists() && similar.exists());
    let before = names(root);
    put(&path, "second", QUEUED); // while the first still writes
    for name in &before {
        assert!(root.join(name).exists(), "{name} was in use");
    }
    living.file().write_all(b"first").unwrap();
    living.commit(5).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"first");
    assert_eq!(names(root).len(), 3, "{:?}", names(root));
}

#[test]
fn a_dropped_one_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    drop(Pending::create(&path, ATOMIC).unwrap());
    assert_eq!(names(directory.path()), [""; 0]);
    fs::write(&path, b"old").unwrap();
    let pending = Pending::create(&path, ATOMIC).unwrap();
    pending.file().write_all(b"half").unwrap();
    drop(pending);
    assert_eq!((names(directory.path()), fs::read(&path).unwrap()), (vec!["m.keras".into()], b"old".to_vec()));
}

#[test]
fn long_names_leave_room_for_the_temporary_one() {
    let directory = tempfile::tempdir().unwrap();
    let text = |name: String| std::ffi::OsString::from(name);
    let bytes = std::ffi::OsString::from_vec;
    for name in [text("n".repeat(255)), text("ß".repeat(127)), bytes(vec![0xff; 255]), bytes(vec![0xff; 3])] {
        let path = directory.path().join(&name);
        put(&path, "new", ATOMIC);
        fs::write(&path, b"").unwrap();
        put(&path, "copied", ATOMIC); // by the longest name of all
        assert_eq!(fs::read(&path).unwrap(), b"copied");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[test]
fn names_that_begin_alike_are_different_files() {
    let directory = tempfile::tempdir().unwrap();
    for length in [1, 179, 180, 181, 200, 254] {
        let path = |last: char| directory.path().join(format!("{}{last}", "m".repeat(length)));
        let first = Pending::create(&path('1'), ATOMIC).unwrap();
        let second = Pending::create(&path('2'), ATOMIC).unwrap();
        assert!(Pending::create(&path('1'), ATOMIC).is_err());
        first.commit(1).unwrap();
        second.commit(2).unwrap();
        assert_eq!((fs::metadata(path('1')).unwrap().len(), fs::metadata(path('2')).unwrap().len()), (1, 2));
    }
    // What version 0.1.0 called after the first 200 bytes is cleared.
    let left = directory.path().join(format!(".{}.0123456789abcdef.hornbeam-tmp", "m".repeat(200)));
    fs::write(&left, b"half").unwrap();
    put(&directory.path().join("m".repeat(230)), "new", ATOMIC);
    assert!(!left.exists());
}

#[test]
fn errors_are_those_of_opening_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let kind = |path: &Path| match Pending::create(path, ATOMIC).unwrap_err() {
        e if e.path() != Some(path) => panic!("{e} does not name its file"),
        e => match e.into_kind() {
            Kind::Io(io) => io.raw_os_error().unwrap(),
            other => panic!("{other:?}"),
        },
    };
    let open = |path: &Path| File::create(path).unwrap_err().raw_os_error().unwrap();
    fs::write(root.join("file"), b"").unwrap();
    for path in ["missing/m.keras", "file/m.keras", "."].map(|p| root.join(p)) {
        assert_eq!(kind(&path), open(&path), "{}", path.display());
    }
    // The directory disappears while the file is written.
    fs::create_dir(root.join("gone")).unwrap();
    let path = root.join("gone/m.keras");
    let pending = Pending::create(&path, ATOMIC).unwrap();
    fs::remove_dir_all(root.join("gone")).unwrap();
    let error = pending.commit(0).unwrap_err();
    assert!(matches!(error.kind(), Kind::Io(e) if e.kind() == std::io::ErrorKind::NotFound), "{error}");
    assert_eq!(error.path(), Some(path.as_path()));
}

/// Permissions mean nothing to root: it runs this test again as somebody else.
#[test]
fn what_permissions_refuse() {
    const HERE: &str = "HORNBEAM_TEST_UNPRIVILEGED";
    if let Some(root) = std::env::var_os(HERE) {
        return unprivileged(Path::new(&root));
    }
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    if fs::metadata(root).unwrap().uid() != 0 {
        return unprivileged(root);
    }
    let copy = root.join("test");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    fs::create_dir(root.join("in")).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    chown(root.join("in"), Some(65_534), Some(65_534)).unwrap();
    let mut again = Command::new(copy);
    again.args(["--exact", "what_permissions_refuse"]).env(HERE, root.join("in"));
    let done = again.uid(65_534).gid(65_534).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
}

fn unprivileged(root: &Path) {
    let (closed, path) = (root.join("closed"), root.join("closed/m.keras"));
    fs::create_dir(&closed).unwrap();
    fs::write(&path, b"old").unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    // The directory takes no temporary file; the old file may be written all the same.
    assert_eq!(put(&path, "in place", ATOMIC), Some("the directory takes no temporary file"));
    assert_eq!(fs::read(&path).unwrap(), b"in place");
    let denied = |path: &Path| {
        let error = Pending::create(path, ATOMIC).unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(e) if e.kind() == std::io::ErrorKind::PermissionDenied), "{error}");
    };
    denied(&closed.join("new.keras"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    denied(&path);
    // Neither may it be replaced where the directory would allow it.
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    denied(&path);
    assert_eq!((fs::read(&path).unwrap(), names(&closed)), (b"in place".to_vec(), vec!["m.keras".to_owned()]));
}

#[test]
fn concurrent_saves_leave_one_whole_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    let one = |byte: u8| {
        for i in 0..100usize {
            let bytes = vec![byte; 1000 + i];
            commit::write(&path, &bytes, QUEUED).unwrap();
            let found = fs::read(&path).unwrap();
            assert!(found.len() >= 1000 && found.iter().all(|&b| b == found[0]), "a mixture");
        }
    };
    std::thread::scope(|s| (1..5).for_each(|b| drop(s.spawn(move || one(b)))));
    assert_eq!(names(directory.path()), ["m.keras"]);
}

#[test]
fn a_second_writer_is_refused_while_the_first_lives() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    let first = Pending::create(&path, QUEUED).unwrap();
    let refused = Pending::create(&path, ATOMIC).unwrap_err();
    assert!(matches!(refused.kind(), Kind::Io(e) if e.kind() == std::io::ErrorKind::ResourceBusy), "{refused}");
    let process = std::process::id().to_string();
    assert!(refused.to_string().contains(&process) && refused.path() == Some(&path), "{refused}");
    // Files whose names begin alike are other files.
    put(&directory.path().join("m.kera"), "other", ATOMIC);
    put(&directory.path().join("m.keras.0123456789abcdef.hornbeam-tmp"), "other", ATOMIC);
    // A lock that outlives its process, in a child of it, stops nobody, and its file stays.
    let orphan = directory.path().join(".m.keras.7fffffff89abcdef.hornbeam-tmp");
    let held = fs::File::create(&orphan).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    drop(first);
    put(&path, "second", ATOMIC);
    assert!(orphan.exists());
    drop(held);
    put(&path, "third", ATOMIC);
    assert!(!orphan.exists());
}

const NAMES: [&str; 2] = ["config.json", "assets"];

#[test]
fn a_directory_is_exchanged_when_it_is_complete() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    for text in ["first", "second"] {
        let made = commit::Directory::create(&target, &NAMES, ATOMIC).unwrap();
        assert_ne!(made.path(), target);
        fs::write(made.path().join("config.json"), text).unwrap();
        fs::create_dir(made.path().join("assets")).unwrap();
        if text == "second" {
            assert_eq!(fs::read(target.join("config.json")).unwrap(), b"first");
        }
        made.commit().unwrap();
        assert_eq!(fs::read(target.join("config.json")).unwrap(), text.as_bytes());
        assert_eq!(names(root.path()), ["model"]);
    }
    let dropped = commit::Directory::create(&target, &NAMES, ATOMIC).unwrap();
    fs::write(dropped.path().join("config.json"), "third").unwrap();
    drop(dropped);
    assert_eq!(names(root.path()), ["model"]);
    assert_eq!(fs::read(target.join("config.json")).unwrap(), b"second");
    // Parents are made, as Keras makes them.
    commit::Directory::create(&root.path().join("a/b/c"), &NAMES, ATOMIC).unwrap().commit().unwrap();
    assert!(root.path().join("a/b/c").is_dir());
}

#[test]
fn a_directory_with_something_else_in_it_is_written_in_place() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("notes.txt"), "mine").unwrap();
    let made = commit::Directory::create(&target, &NAMES, ATOMIC).unwrap();
    assert_eq!(made.path(), target);
    made.commit().unwrap();
    assert_eq!(fs::read(target.join("notes.txt")).unwrap(), b"mine");
    fs::remove_file(target.join("notes.txt")).unwrap();
    assert_eq!(commit::Directory::create(&target, &NAMES, OVER).unwrap().path(), target);
    fs::write(root.path().join("file"), "x").unwrap();
    for path in ["file", "file/below"] {
        let error = commit::Directory::create(&root.path().join(path), &NAMES, ATOMIC).unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(_)), "{error}");
    }
    assert_eq!(names(root.path()), ["file", "model"]);
}

#[test]
#[cfg(unix)]
fn what_others_put_there_meanwhile_and_the_mode_stay() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    fs::create_dir(&target).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(target.join("config.json"), "first").unwrap();
    let made = commit::Directory::create(&target, &NAMES, ATOMIC).unwrap();
    fs::write(made.path().join("config.json"), "second").unwrap();
    fs::write(target.join("notes.txt"), "mine").unwrap();
    made.commit().unwrap();
    assert_eq!(fs::read(target.join("notes.txt")).unwrap(), b"mine");
    assert_eq!(fs::read(target.join("config.json")).unwrap(), b"second");
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o750);
    assert_eq!(names(root.path()), ["model"]);
    // A path without a name cannot be renamed.
    assert_eq!(commit::Directory::create(Path::new("."), &NAMES, ATOMIC).unwrap().path(), Path::new("."));
}

#[test]
fn a_directory_that_a_killed_save_left_is_cleared() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    // What a kill leaves is what forgetting leaves, once the lock is gone.
    let left = commit::Directory::create(&target, &NAMES, ATOMIC).unwrap();
    let inner = left.path().to_owned();
    fs::write(inner.join("config.json"), "half").unwrap();
    let lock = inner.with_extension("hornbeam-tmp");
    assert!(lock.exists());
    let second = commit::Directory::create(&target, &NAMES, QUEUED).unwrap();
    assert!(inner.exists() && lock.exists(), "the first one is alive");
    drop(second);
    drop(left);
    fs::create_dir(&inner).unwrap();
    fs::write(&lock, "").unwrap();
    commit::Directory::create(&target, &NAMES, ATOMIC).unwrap().commit().unwrap();
    assert_eq!(names(root.path()), ["model"]);
}

#[test]
fn a_lock_is_one_object_s_and_only_a_file_is_locked() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("lock");
    let kind = |path: &Path| commit::FileLock::take(path).unwrap_err().kind();
    let first = commit::FileLock::take(&path).unwrap();
    assert!(first.exclusive && first.is_held());
    assert_eq!(kind(&path), ErrorKind::WouldBlock);
    first.release();
    assert!(!first.is_held());
    let second = commit::FileLock::take(&path).unwrap();
    drop(first); // which does not give back what is another's
    assert_eq!(kind(&path), ErrorKind::WouldBlock);
    drop(second);
    assert!(commit::FileLock::take(&path).unwrap().is_held());
    assert_eq!(fs::read(&path).unwrap(), b"");
    symlink("elsewhere", root.path().join("link")).unwrap();
    assert!(Command::new("mkfifo").arg(root.path().join("pipe")).status().unwrap().success());
    assert_eq!(kind(&root.path().join("pipe")), ErrorKind::InvalidInput);
    commit::FileLock::take(&root.path().join("link")).unwrap_err();
    commit::FileLock::take(root.path()).unwrap_err();
    assert_eq!(names(root.path()), ["link", "lock", "pipe"]);
}

#[test]
fn trees_with_links_and_pipes_are_brought_to_stable_storage() {
    let root = tempfile::tempdir().unwrap();
    let inner = root.path().join("a/b");
    commit::create_directories(&inner, true).unwrap();
    commit::create_directories(&inner, false).unwrap();
    fs::write(inner.join("file"), "content").unwrap();
    fs::set_permissions(inner.join("file"), fs::Permissions::from_mode(0o444)).unwrap();
    symlink(root.path(), inner.join("loop")).unwrap();
    symlink("nothing", inner.join("dangling")).unwrap();
    assert!(Command::new("mkfifo").arg(inner.join("pipe")).status().unwrap().success());
    commit::sync(root.path()).unwrap();
    commit::sync_name(&inner.join("file")).unwrap();
    let file = commit::create_directories(&inner.join("file/c"), false).unwrap_err();
    assert!(
        matches!(file.kind(), Kind::Io(e) if e.kind() == ErrorKind::NotADirectory || e.kind() == ErrorKind::AlreadyExists)
    );
}
