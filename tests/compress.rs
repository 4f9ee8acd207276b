//! Compressed saves: chunks that are placed, written and read back.
#![cfg(feature = "libhdf5")]

mod common;
mod hostile;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::*;
use hornbeam::archive::read::Members;
use hornbeam::commit;
use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::hdf5::libhdf5::LibHdf5;
use hornbeam::image::{Compression, Engine, EngineKind, Storage};
use hornbeam::io::ReadAt;
use hornbeam::io::emit::{Progress, Sink, Tensors};
use hornbeam::load::{self, Choice, Weights};
use hornbeam::save::{self, Plan, Target};
use hornbeam::tree::Tree;

#[derive(Clone, Default)]
struct Growing(Arc<Mutex<Vec<u8>>>);

impl Growing {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Sink for Growing {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut all = self.0.lock().unwrap();
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        assert!(start <= all.len(), "a gap from {} to {start}", all.len());
        assert!(start == all.len() || end <= all.len(), "half a patch");
        let len = all.len().max(end);
        all.resize(len, 0);
        all[start..end].copy_from_slice(bytes);
        Ok(())
    }
}

/// Tensors of every kind: random, zeros, numbers that compress; each handed out once.
struct Values(Vec<Vec<u8>>, Vec<bool>);

impl Values {
    fn of(tree: &Tree) -> Self {
        let mut state = 11u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let fill = |(i, d): (usize, &hornbeam::tree::Dataset)| {
            let n = d.dtype.size();
            let mut byte = |at: usize| match i % 3 {
                0 => random(),
                1 => 0,
                _ if at % n == n - 1 => random() % 4,
                _ => (at / 100) as u8,
            };
            (0..d.nbytes as usize).map(&mut byte).collect()
        };
        let values: Vec<_> = tree.datasets().iter().enumerate().map(fill).collect();
        let taken = vec![false; values.len()];
        Self(values, taken)
    }
}

impl Tensors for Values {
    fn tensor(&mut self, i: usize) -> Result<&[u8]> {
        assert!(!std::mem::replace(&mut self.1[i], true), "asked for twice");
        Ok(&self.0[i])
    }
}

/// The trees that are compressed: every dtype and rank, chunks cut off at every edge, the small and the empty.
fn compressible() -> Tree {
    let mut tree = rich();
    for (i, dtype) in DType::named().chain([DType::Opaque(1), DType::Opaque(2), DType::Opaque(7)]).enumerate() {
        tree.add_dataset(&format!("large/{i:02}_{}", dtype.name()), dtype, [131, 251], named("x")).unwrap();
    }
    for (i, shape) in [
        vec![16 << 10],
        vec![100_003],
        vec![1, 50_021],
        vec![50_021, 1],
        vec![5, 7, 1009],
        vec![3, 1, 11, 2003],
        vec![20_011, 1, 1, 2],
        vec![1 << 15, 0],
    ]
    .iter()
    .enumerate()
    {
        for dtype in [DType::U8, DType::F32, DType::F64] {
            tree.add_dataset(&format!("ranks/{i}_{}", dtype.name()), dtype, shape.clone(), vec![]).unwrap();
        }
    }
    tree
}

fn compress(tree: &Tree, how: Compression, archive: bool, base: u64) -> (Vec<u8>, save::Written) {
    let sink = Growing::default();
    sink.0.lock().unwrap().resize(base as usize, 7);
    let plan = Plan::compressed(tree.clone(), Box::new(LibHdf5), how);
    assert_eq!((plan.engine(), plan.weights_end(archive)), (EngineKind::LibHdf5, None));
    let mut none = || Ok(vec![]);
    let members: Option<save::Members<'_>> = if archive { Some(&mut none) } else { None };
    let mut values = Values::of(tree);
    let target = Target::Sink(Box::new(sink.clone()), base);
    let prepared = save::write(&plan, target, &mut values, members, &Progress::default()).unwrap();
    assert!(values.1.iter().zip(tree.datasets()).all(|(taken, d)| *taken == (d.nbytes > 0)));
    (sink.bytes(), prepared.commit().unwrap())
}

/// Everything of an image, through the background reader, equals what was saved.
fn check_values(tree: &Tree, weights: &Arc<Weights>) {
    let values = Values::of(tree).0;
    let all: Vec<usize> = (0..weights.index().datasets.len()).collect();
    let reading = weights.fetch(&all, true, 1 << 20).unwrap();
    for (i, found) in weights.index().datasets.iter().enumerate() {
        let at = tree.datasets().iter().position(|d| *d.path == *found.path).expect(&found.path);
        let d = &tree.datasets()[at];
        assert_eq!((found.dtype, &found.shape, &found.attributes), (d.dtype, &d.shape, &d.attributes), "{}", d.path);
        let slot = reading.take(i, &|| Ok(())).unwrap();
        assert!(slot.as_ref().map_or(&[][..], |s| s.bytes()) == values[at], "{}", d.path);
    }
    reading.complete(false, &|| Ok(())).unwrap();
}

#[test]
fn what_is_compressed_is_read_back() {
    let tree = compressible();
    let plain = LibHdf5.index(&fill(&tree, &LibHdf5.lay_out(&tree).unwrap())).unwrap();
    for (level, shuffle, chunk_bytes) in [(4, true, 1 << 20), (9, false, 5000), (1, true, 1024), (0, true, 1 << 16)] {
        let how = Compression::new(level, shuffle, chunk_bytes).unwrap();
        let (image, written) = compress(&tree, how, false, 0);
        assert_eq!((written.bytes, written.crc), (image.len() as u64, crc32fast::hash(&image)));
        assert_eq!(image[40..48], (image.len() as u64).to_le_bytes(), "end of file");
        assert_eq!(compress(&tree, how, false, 0).0, image, "the same bytes every time");

        let error = Direct.index(&image).unwrap_err();
        assert!(matches!(error.kind(), Kind::Unsupported), "{error}");
        let weights = Arc::new(Weights::open(Arc::new(File(image)), Choice::Auto).unwrap());
        assert_eq!(weights.engine(), EngineKind::LibHdf5);
        assert_eq!(weights.index().groups, plain.groups);
        for found in &weights.index().datasets {
            let chunked = found.nbytes >= hornbeam::io::pack::WORTH_A_CHUNK && !found.shape.is_empty();
            assert_eq!(matches!(found.storage, Storage::Engine), chunked, "{}", found.path);
        }
        check_values(&tree, &weights);
    }
}

/// What is too small for chunks is an image as any other, which the direct engine reads.
#[test]
fn what_has_no_chunks_stays_as_it_is() {
    let how = Compression::new(4, true, 1 << 20).unwrap();
    let mut small = Tree::new();
    small.add_dataset("scalar", DType::F32, [], vec![]).unwrap();
    small.add_dataset("empty", DType::I64, [4, 0], vec![]).unwrap();
    small.add_dataset("layers/dense/vars/0", DType::F32, [64, 33], named("dense")).unwrap();
    // Names that are not ASCII give dense groups, which only libhdf5 reads: not `rich()`.
    for tree in [small, Tree::new()] {
        let (image, written) = compress(&tree, how, false, 0);
        assert_eq!(written.crc, crc32fast::hash(&image));
        let weights = Arc::new(Weights::open(Arc::new(image), Choice::Auto).unwrap());
        assert_eq!(weights.engine(), EngineKind::Direct);
        check_values(&tree, &weights);
    }
}

#[test]
fn compressed_archives_are_whole() {
    let tree = compressible();
    let how = Compression::new(6, true, 3000).unwrap();
    for base in [0, 1000] {
        let (bytes, written) = compress(&tree, how, true, base);
        assert_eq!(written.bytes, bytes.len() as u64 - base);
        let members = Members::open(&bytes).unwrap();
        let source: Arc<dyn ReadAt> = Arc::new(bytes.clone());
        for choice in [Choice::Auto, Choice::LibHdf5] {
            let weights = Arc::new(Weights::open_member(&source, &members, choice).unwrap());
            assert!(weights.has_crc());
            check_values(&tree, &weights);
        }
        // One bit anywhere: the checksum tells before the C library sees it.
        let member = members.iter().next().unwrap();
        for at in [member.offset, member.offset + 3000, member.offset + member.size - 1] {
            let mut bad = bytes.clone();
            bad[at as usize] ^= 4;
            let source: Arc<dyn ReadAt> = Arc::new(bad);
            for choice in [Choice::Auto, Choice::LibHdf5] {
                let error = Weights::open_member(&source, &members, choice).err().unwrap();
                assert!(matches!(error.kind(), Kind::Crc), "{error}");
            }
        }
    }
}

/// A tree of 5 GiB that compresses to little: the header has room for 64 bits, and the file needs none.
#[test]
fn what_could_be_large_has_room_for_its_size() {
    struct Zeros(Vec<u8>);
    impl Tensors for Zeros {
        fn tensor(&mut self, _: usize) -> Result<&[u8]> {
            Ok(&self.0)
        }
    }
    let mut tree = Tree::new();
    for i in 0..40 {
        tree.add_dataset(&i.to_string(), DType::F32, [64, 1 << 19], vec![]).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.keras");
    let plan = Plan::compressed(tree, Box::new(LibHdf5), Compression::new(1, true, 1 << 20).unwrap());
    let target = Target::Path(path.clone(), commit::Options { atomic: true, durable: false, queued: false });
    let mut members = || Ok(vec![]);
    let mut zeros = Zeros(vec![0; 128 << 20]);
    save::write(&plan, target, &mut zeros, Some(&mut members), &Progress::default()).unwrap().commit().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.len() < 100 << 20);
    let members = Members::open(&bytes).unwrap(); // compares both headers
    let source: Arc<dyn ReadAt> = Arc::new(bytes);
    let weights = Arc::new(Weights::open_member(&source, &members, Choice::Auto).unwrap());
    let reading = weights.fetch(&[7], true, 0).unwrap();
    assert!(reading.take(7, &|| Ok(())).unwrap().unwrap().bytes().iter().all(|&b| b == 0));
}

#[test]
fn a_damaged_chunk_is_an_error_of_complete() {
    let mut tree = Tree::new();
    for i in 0..5 {
        tree.add_dataset(&format!("a/{i}"), DType::F32, [300, 100], vec![]).unwrap();
    }
    let (image, _) = compress(&tree, Compression::new(4, true, 20_000).unwrap(), false, 0);
    let whole = Weights::open(Arc::new(image.clone()), Choice::Auto).unwrap();
    let names: Vec<_> = (0..5).collect();
    let mut caught = 0;
    for at in (4000..image.len()).step_by(499) {
        let mut bad = image.clone();
        bad[at] ^= 16;
        let Ok(weights) = Weights::open(Arc::new(File(bad)), Choice::Auto) else { continue };
        if weights.index() != whole.index() {
            continue;
        }
        let reading = Arc::new(weights).fetch(&names, true, 0).unwrap();
        if let Err(error) = reading.complete(false, &|| Ok(())) {
            assert!(matches!(error.kind(), Kind::Image) && error.to_string().contains("a/"), "{error}");
            caught += 1;
        }
    }
    assert!(caught > 20, "{caught}");
}

/// Fails at the n-th write.
struct Failing(Growing, usize);

impl Sink for Failing {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.1 = self.1.checked_sub(1).ok_or_else(|| Error::new(Kind::Io(std::io::Error::other("full")), "no room"))?;
        self.0.write_at(bytes, offset)
    }
}

#[test]
fn a_save_that_fails_anywhere_ends() {
    let tree = compressible();
    let plan = || Plan::compressed(tree.clone(), Box::new(LibHdf5), Compression::new(1, true, 2000).unwrap());
    for n in [0, 1, 5, 20, 100] {
        let target = Target::Sink(Box::new(Failing(Growing::default(), n)), 0);
        let error = save::write(&plan(), target, &mut Values::of(&tree), None, &Progress::default()).unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
    }
    let stopped = Progress::default();
    stopped.cancelled.store(true, Ordering::Relaxed);
    let target = Target::Sink(Box::new(Growing::default()), 0);
    let error = save::write(&plan(), target, &mut Values::of(&tree), None, &stopped).unwrap_err();
    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
    let mut values = Values::of(&tree);
    values.0[60].pop();
    let target = Target::Sink(Box::new(Growing::default()), 0);
    let error = save::write(&plan(), target, &mut values, None, &Progress::default()).unwrap_err();
    assert!(matches!(error.kind(), Kind::Changed), "{error}");
}

#[test]
fn compressions_that_are_none_are_refused() {
    for (level, chunk_bytes) in [(10, 1 << 20), (4, 1023), (4, (1 << 30) + 1)] {
        assert!(matches!(Compression::new(level, true, chunk_bytes).unwrap_err().kind(), Kind::Invalid));
    }
    assert!(matches!(Choice::Direct.compressor().err().unwrap().kind(), Kind::Unsupported));
    let how = Compression::new(4, true, 1 << 20).unwrap();
    assert!(matches!(Direct.lay_out_chunked(&rich(), &[], how).err().unwrap().kind(), Kind::Unsupported));
}

/// Memory that grows, shared with the test; written in order but for patches.
/// B-trees of a few nodes with more leaves than there are atoms in the room. Without a bound this test would not end.
#[test]
fn trees_that_meet_again_are_refused() {
    let how = Compression::new(1, true, 1024).unwrap();
    let mut tree = Tree::new();
    tree.add_dataset("a", DType::U8, [40_000], vec![]).unwrap(); // 40 chunks: one node
    let (image, _) = compress(&tree, how, false, 0);
    for (levels, empty) in [(1, false), (2, true), (10, false), (10, true), (60, false)] {
        let bad = hostile::pyramid(image.clone(), hostile::Node::chunks(1), levels, empty);
        assert!(bad.len() < image.len() + 200_000);
        // Whether there are chunks at all is asked for the index; all of them are looked up to read them.
        let opened = Weights::open(Arc::new(File(bad)), Choice::LibHdf5).map(Arc::new);
        let error = opened.and_then(|w| w.fetch(&[0], true, 0)?.complete(false, &|| Ok(()))).unwrap_err();
        assert!(matches!(error.kind(), Kind::Image) && error.to_string().contains("B-tree is"), "{error}");
    }
    let image = fill(&rich(), &LibHdf5.lay_out(&rich()).unwrap());
    for (levels, empty) in [(1, false), (10, false), (10, true), (60, true)] {
        let bad = hostile::pyramid(image.clone(), hostile::GROUPS, levels, empty);
        let error = LibHdf5.index(&bad).unwrap_err();
        assert!(matches!(error.kind(), Kind::Image) && error.to_string().contains("B-tree is"), "{error}");
    }
}

/// Datasets each below the limit for one, together far above what the file can stand for.
#[test]
fn many_datasets_together_are_no_bomb() {
    let how = Compression::new(1, true, 1024).unwrap();
    let mut tree = Tree::new();
    tree.add_dataset("a", DType::U8, [40_009], vec![]).unwrap();
    let (image, _) = compress(&tree, how, false, 0);
    let open = |elements: u64| {
        let mut claims = image.clone();
        for at in 0..image.len() - 8 {
            if image[at..at + 8] == 40_009_u64.to_le_bytes() {
                claims[at..at + 8].copy_from_slice(&elements.to_le_bytes());
            }
        }
        Weights::open(Arc::new(claims), Choice::LibHdf5).map(Arc::new)
    };
    assert!(matches!(open((4 << 30) + 1).err().unwrap().kind(), Kind::Limit), "Keras' limit for one");
    let half = open(2 << 30).unwrap();
    assert!(half.index().datasets[0].nbytes == 2 << 30);
    let (all, none) = ((0..half.index().datasets.len()).collect::<Vec<_>>(), &[][..]);
    load::check_expansion([(&*half, &all[..]), (&*half, &all)]).unwrap();
    load::check_expansion([(&*half, &all[..]), (&*half, &all), (&*half, none)]).unwrap();
    let error = load::check_expansion([(&*half, &all[..]), (&*half, &all), (&*half, &all)]).unwrap_err();
    assert!(matches!(error.kind(), Kind::Limit) && error.to_string().contains("together"), "{error}");
    // What is written may be of any size: what a file can hold, it may ask for.
    let small = open(40_009).unwrap();
    load::check_expansion(vec![(&*small, &[0usize][..]); 200_000]).unwrap();
}
