//! The zip container: compressed members, many members, offsets beyond 32 bits.

mod common;

use std::fs::{self, File};
use std::sync::Arc;

use common::{Grow, Values, WAIT, json_members, no_panic, read_all, small_tree, to_memory};
use hornbeam::archive::WEIGHTS;
use hornbeam::archive::read::{Members, Method};
use hornbeam::archive::write::{Archive, Content};
use hornbeam::dtype::DType;
use hornbeam::error::{Kind, Result};
use hornbeam::image::Storage;
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::io::emit::{Progress, Sink, Tensors};
use hornbeam::load::{self, Choice, Weights};
use hornbeam::save::{self, Plan, Target};
use hornbeam::tree::Tree;

/// Bytes of a deflated copy of an archive, as `zip -9` or `zipfile` with ZIP_DEFLATED would write it.
fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    let bytes = bytes.to_vec();
    let members = Members::open(&bytes).unwrap();
    for m in members.iter() {
        let data = m.read(&bytes, WAIT).unwrap();
        let mut packed = Vec::with_capacity(data.len() + 1024);
        let mut stream = flate2::Compress::new(flate2::Compression::default(), false);
        let done = stream.compress_vec(&data, &mut packed, flate2::FlushCompress::Finish).unwrap();
        assert_eq!(done, flate2::Status::StreamEnd);
        let offset = out.len() as u32;
        let mut common = Vec::new(); // what both headers share: flags to extra length
        for n in [0x800u16, 8, 0, 0x21] {
            common.extend(n.to_le_bytes());
        }
        for n in [m.crc, packed.len() as u32, data.len() as u32] {
            common.extend(n.to_le_bytes());
        }
        common.extend((m.name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        out.extend(b"PK\x03\x04\x14\x00");
        out.extend(&common);
        out.extend(m.name.as_bytes());
        out.extend(packed);
        directory.extend(b"PK\x01\x02\x14\x03\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(m.name.as_bytes());
    }
    let count = members.iter().count() as u16;
    let (start, size) = (out.len() as u32, directory.len() as u32);
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    out.extend([size.to_le_bytes(), start.to_le_bytes()].concat());
    out.extend([0, 0]);
    out
}

#[test]
fn deflated_members_are_read_and_checked() {
    let tree = small_tree();
    let (stored, _) = to_memory(&tree, Values::of(&tree, 1), true, true, b"");
    let good = read_all(&stored, true).unwrap();
    let mut bytes = deflated(&stored);
    assert!(Members::open(&bytes).unwrap().iter().all(|m| m.method == Method::Deflated));
    assert_eq!(read_all(&bytes, true).unwrap(), good);
    for n in 0..bytes.len() {
        assert!(read_all(&bytes[..n], true).is_err(), "{n}");
    }
    for at in 0..bytes.len() {
        for value in [bytes[at] ^ 1, bytes[at] ^ 0x40, 0, 0xff] {
            let old = std::mem::replace(&mut bytes[at], value);
            if let Some(found) = no_panic(read_all(&bytes, true)) {
                assert_eq!(found, good, "byte {at}");
            }
            bytes[at] = old;
        }
    }
}

#[test]
fn more_members_than_16_bits_count() {
    for patchable in [true, false] {
        let mut sink = Grow::new(b"", patchable);
        let mut archive = Archive::new(0, &sink);
        archive.open_weights(3, &mut sink).and_then(|at| sink.write_at(b"abc", at)).unwrap();
        archive.close_weights(crc32fast::hash(b"abc"), &mut sink).unwrap();
        for i in 0..70_000 {
            archive.add(&format!("assets/{i}"), &Content::Bytes(vec![i as u8; i % 3]), &mut sink).unwrap();
        }
        let end = archive.finish(&mut sink).unwrap();
        let bytes = sink.take();
        assert_eq!(end, bytes.len() as u64);
        let members = Members::open(&bytes).unwrap();
        assert_eq!(members.iter().count(), 70_001);
        for i in [0, 1, 65_534, 65_535, 65_536, 69_999] {
            let found = members.get(&format!("assets/{i}")).unwrap().read(&bytes, WAIT).unwrap();
            assert_eq!(found, vec![i as u8; i % 3]);
        }
        assert_eq!(members.get(WEIGHTS).unwrap().read(&bytes, WAIT).unwrap(), b"abc");
    }
}

/// A file in which long runs of zeros take no room.
struct Sparse(File, bool);

impl Sink for Sparse {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        if bytes.len() >= 4096 && bytes.iter().all(|&b| b == 0) {
            return Ok(());
        }
        (&self.0).write_at(bytes, offset)
    }

    fn can_patch(&self) -> bool {
        self.1
    }
}

#[test]
fn members_and_offsets_beyond_4_gib() {
    /// One memory for many tensors, and another for the last.
    struct Shared(Vec<u8>, Vec<u8>, usize);
    impl Tensors for Shared {
        fn tensor(&mut self, i: usize) -> Result<&[u8]> {
            Ok(if i == self.2 { &self.1 } else { &self.0 })
        }
    }
    const EACH: u64 = 64 << 20;
    let directory = tempfile::tempdir().unwrap();
    for patchable in [true, false] {
        let path = directory.path().join("large.keras");
        let mut tree = Tree::new();
        for i in 0..65 {
            tree.add_dataset(&format!("a/{i}"), DType::U8, [EACH], vec![]).unwrap();
        }
        tree.add_dataset("b", DType::U8, [100], vec![]).unwrap();
        let plan = Plan::new(tree, &Direct).unwrap();
        let mut values = Shared(vec![0; EACH as usize], (0..100).collect(), 65);
        let mut members = json_members;
        let file = File::create(&path).unwrap();
        let target = Target::Sink(Box::new(Sparse(file, patchable)), 0);
        let prepared = save::write(&plan, target, &mut values, Some(&mut members), &Progress::default()).unwrap();
        let written = prepared.commit().unwrap();
        assert!(written.bytes > 4 << 30 && fs::metadata(&path).unwrap().len() == written.bytes);

        let source = load::open(&path).unwrap();
        let members = Members::open(&*source).unwrap();
        let weights = members.get(WEIGHTS).unwrap();
        assert_eq!((weights.size, weights.crc), (weights.stored, written.crc));
        assert_eq!(members.get("assets/größe/x").unwrap().read(&*source, WAIT).unwrap(), "ß".as_bytes());
        let weights = Arc::new(Weights::open_member(&source, &members, Choice::Direct).unwrap());
        let last = &weights.index().datasets[65];
        assert!(last.path == "b" && matches!(last.storage, Storage::Contiguous(at) if at > 4 << 30));
        let reading = weights.fetch(&[65], true, 0).unwrap();
        let slot = reading.take(65, WAIT).unwrap().unwrap();
        assert_eq!(slot.bytes(), (0..100).collect::<Vec<u8>>());
        reading.complete(true, WAIT).unwrap(); // the CRC of all 4 GiB, in no memory
    }
}

#[test]
fn an_asset_that_changes_or_is_missing_fails_the_save() {
    let directory = tempfile::tempdir().unwrap();
    let mut sink = Grow::new(b"", true);
    let mut archive = Archive::new(0, &sink);
    let error = archive.add("assets/x", &Content::File(directory.path().join("x")), &mut sink).unwrap_err();
    assert!(matches!(error.kind(), Kind::Io(_)) && error.member() == Some("assets/x"), "{error}");
    for name in ["", "a\0b", &"n".repeat(70_000)] {
        assert!(matches!(archive.add(name, &Content::Bytes(vec![]), &mut sink).unwrap_err().kind(), Kind::Invalid));
    }
}
