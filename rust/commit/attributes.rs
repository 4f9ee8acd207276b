//! What the new file or directory takes over from the old one.

use std::fs::File;

/// Copies mode, owner, group and access list. Returns what could not be kept: the new file is whole without it.
pub(super) fn copy(old: &File, new: &File) -> Option<&'static str> {
    let mut lost = None;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, fchown};
        let (Ok(was), Ok(is)) = (old.metadata(), new.metadata()) else { return Some("its owner and mode") };
        if (was.uid(), was.gid()) != (is.uid(), is.gid()) && fchown(new, Some(was.uid()), Some(was.gid())).is_err() {
            let _ = fchown(new, None, Some(was.gid()));
            lost = Some("its owner or group");
        }
        // After `fchown`, which clears set-user-id.
        let mode = new.metadata().map_or(0, |m| m.mode());
        if mode != was.mode() && new.set_permissions(was.permissions()).is_err() {
            lost = Some("its mode");
        }
        #[cfg(target_os = "linux")]
        {
            const ACCESS_LIST: &str = "system.posix_acl_access";
            let mut value = [0u8; 4096];
            if let Ok(n) = rustix::fs::fgetxattr(old, ACCESS_LIST, &mut value[..])
                && rustix::fs::fsetxattr(new, ACCESS_LIST, &value[..n], rustix::fs::XattrFlags::empty()).is_err()
            {
                lost = Some("its access list");
            }
        }
    }
    #[cfg(not(unix))]
    let _ = (old, new, &mut lost);
    lost
}
