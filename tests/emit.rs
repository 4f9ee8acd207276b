//! Writing: where writes end, and what a sink or a tensor that fails leaves.

mod common;

use std::fs;
use std::sync::atomic::Ordering;

use common::*;
use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::image::Engine;
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::io::emit::{self, Progress, Sink, Tensors};
use hornbeam::save::{self, Plan, Target};
use hornbeam::tree::Tree;

/// A sink that notes where writes end.
struct Ends(Grow, Vec<u64>);

impl Sink for Ends {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.1.push(offset + bytes.len() as u64);
        self.0.write_at(bytes, offset)
    }
}

#[test]
fn writes_end_at_multiples_of_a_block_in_the_file() {
    const BLOCK: u64 = emit::WRITE_BYTES as u64;
    let mut tree = Tree::new();
    for (i, n) in [5, BLOCK - 1, BLOCK, BLOCK + 1, 0, 9 * BLOCK + 3, 300_000, 5 * BLOCK].into_iter().enumerate() {
        tree.add_dataset(&format!("t{i}"), DType::U8, [n], vec![]).unwrap();
    }
    let layout = Direct.lay_out(&tree).unwrap();
    for base in [0, 64, 1000, BLOCK - 1] {
        let mut sink = Ends(Grow::new(&vec![0; base as usize], false), vec![]);
        let (mut values, progress) = (Values::of(&tree, 1), Progress::default());
        let crc = emit::emit(&layout, tree.datasets(), &mut values, base, &mut sink, &progress).unwrap();
        let Ends(file, mut ends) = sink;
        let file = file.take();
        assert_eq!(crc, crc32fast::hash(&file[base as usize..]));
        assert_eq!(ends.pop(), Some(base + layout.len));
        let blocks: Vec<u64> = (base / BLOCK + 1..=(base + layout.len - 1) / BLOCK).map(|i| i * BLOCK).collect();
        assert_eq!(ends, blocks);
    }
}

// ---- failing sinks and tensors ----

/// A sink that fails when it holds more than some bytes.
struct Full(Grow, usize);

impl Sink for Full {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        if offset as usize + bytes.len() > self.1 {
            return Err(Error::new(Kind::Io(std::io::ErrorKind::StorageFull.into()), "full"));
        }
        self.0.write_at(bytes, offset)
    }
}

#[test]
fn a_sink_that_fails_anywhere_fails_the_save() {
    let tree = small_tree();
    let (bytes, _) = to_memory(&tree, Values::of(&tree, 1), true, true, b"");
    let plan = Plan::new(tree.clone(), &Direct).unwrap();
    for room in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        let target = Target::Sink(Box::new(Full(Grow::new(b"", true), room)), 0);
        let mut members = json_members;
        let saved = save::write(&plan, target, &mut Values::of(&tree, 1), Some(&mut members), &Progress::default());
        let error = saved.err().unwrap_or_else(|| panic!("{room} bytes were enough"));
        assert!(matches!(error.kind(), Kind::Io(e) if e.kind() == std::io::ErrorKind::StorageFull), "{error}");
    }
}

#[test]
fn a_failing_save_leaves_the_old_file_and_nothing_else() {
    struct Fails(Values, usize);
    impl Tensors for Fails {
        fn tensor(&mut self, i: usize) -> Result<&[u8]> {
            if i >= self.1 { Err(Error::new(Kind::Invalid, "no such tensor")) } else { self.0.tensor(i) }
        }
    }
    let tree = small_tree();
    let plan = Plan::new(tree.clone(), &Direct).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.keras");
    fs::write(&path, b"old").unwrap();
    let check = |saved: Result<save::Prepared>, why: &str| {
        assert!(saved.is_err(), "{why}");
        assert_eq!(fs::read(&path).unwrap(), b"old", "{why}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{why}");
    };
    let target = || Target::Path(path.clone(), ATOMIC);
    for i in 0..4 {
        let mut tensors = Fails(Values::of(&tree, 1), i);
        check(save::write(&plan, target(), &mut tensors, Some(&mut json_members), &Progress::default()), "a tensor");
    }
    let mut short = Values::of(&tree, 1);
    short.0[0].pop();
    check(save::write(&plan, target(), &mut short, None, &Progress::default()), "a tensor's size");
    let mut members = || Err(Error::new(Kind::Invalid, "no config"));
    let saved = save::write(&plan, target(), &mut Values::of(&tree, 1), Some(&mut members), &Progress::default());
    check(saved, "the members");
    let cancelled = Progress::default();
    cancelled.cancelled.store(true, Ordering::Relaxed);
    check(save::write(&plan, target(), &mut Values::of(&tree, 1), None, &cancelled), "cancelled");
    // Complete, but not committed.
    let prepared = save::write(&plan, target(), &mut Values::of(&tree, 1), None, &Progress::default()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(prepared);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}
