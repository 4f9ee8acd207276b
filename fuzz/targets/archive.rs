//! Any bytes as an archive: an error, or members that can be read.
#![no_main]

use std::sync::Arc;

use hornbeam::archive::read::Members;
use hornbeam::io::ReadAt;
use hornbeam::load::{Choice, Weights};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let source: Arc<dyn ReadAt> = Arc::new(data.to_vec());
    let Ok(members) = Members::open(&*source) else { return };
    for member in members.iter().filter(|m| m.size < 1 << 20) {
        let _ = member.read(&*source);
    }
    let _ = Weights::open_member(&source, &members, Choice::Auto);
});
