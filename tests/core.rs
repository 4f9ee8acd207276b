//! The core without Python: tree → plan → write → open → fetch, the archive, the commit, the background reader.
//!
//! One rule runs through it: whatever was done to a file, reading it gives an error or the bytes that were written.

mod hostile;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use hornbeam::archive::WEIGHTS;
use hornbeam::archive::read::{Members, Method};
use hornbeam::archive::write::{Archive, Content};
use hornbeam::commit::{self, Pending};
use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::{ALIGNMENT, Engine, EngineKind, Storage};
use hornbeam::io::ReadAt;
use hornbeam::io::emit::{self, Progress, Sink, Tensors};
use hornbeam::io::fetch::{Extent, Fetch, Interrupt, Request};
use hornbeam::load::{self, Choice, Weights};
use hornbeam::save::{self, Plan, Target, Written};
use hornbeam::tree::{Attribute, Tree, Value};
use proptest::prelude::*;

const ATOMIC: commit::Options = commit::Options { atomic: true, durable: false, queued: false };
const QUEUED: commit::Options = commit::Options { atomic: true, durable: false, queued: true };
const OVER: commit::Options = commit::Options { atomic: false, durable: false, queued: false };

/// Never interrupts a wait.
const WAIT: Interrupt<'_> = &|| Ok(());

/// Tensors that are in memory.
struct Values(Vec<Vec<u8>>);

impl Tensors for Values {
    fn tensor(&mut self, i: usize) -> Result<&[u8]> {
        Ok(&self.0[i])
    }
}

impl Values {
    /// Different bytes for every tensor and position.
    fn of(tree: &Tree, seed: u64) -> Self {
        let bytes = |i: usize, n: u64| {
            let mut x = seed ^ (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let next = move |_| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (x >> 56) as u8
            };
            (0..n).map(next).collect()
        };
        Self(tree.datasets().iter().enumerate().map(|(i, d)| bytes(i, d.nbytes)).collect())
    }
}

/// A sink in memory that insists on the order the trait promises.
#[derive(Clone)]
struct Grow {
    bytes: Arc<Mutex<Vec<u8>>>,
    patchable: bool,
}

impl Grow {
    fn new(start: &[u8], patchable: bool) -> Self {
        Self { bytes: Arc::new(Mutex::new(start.to_vec())), patchable }
    }

    fn take(self) -> Vec<u8> {
        std::mem::take(&mut *self.bytes.lock().unwrap())
    }
}

impl Sink for Grow {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut all = self.bytes.lock().unwrap();
        let at = offset as usize;
        if at == all.len() {
            all.extend_from_slice(bytes);
            return Ok(());
        }
        assert!(self.patchable, "a stream was patched");
        assert!(at + bytes.len() <= all.len(), "a gap, or a patch that reaches past the end");
        all[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn can_patch(&self) -> bool {
        self.patchable
    }
}

#[allow(clippy::unnecessary_wraps)] // what a save asks for
fn json_members() -> Result<Vec<(String, Content)>> {
    let text = |t: &str| Content::Bytes(t.as_bytes().to_vec());
    let members = [("metadata.json", text("{}")), ("config.json", text("{\"a\": 1}")), ("assets/größe/x", text("ß"))];
    Ok(members.map(|(name, content)| (name.to_owned(), content)).into())
}

/// The whole of a save to memory: the file's bytes, and what the save says of them.
fn to_memory(tree: &Tree, values: Values, archive: bool, patchable: bool, start: &[u8]) -> (Vec<u8>, Written) {
    let plan = Plan::new(tree.clone(), &Direct).unwrap();
    let sink = Grow::new(start, patchable);
    let mut values = values;
    let mut members = json_members;
    let members: Option<save::Members<'_>> = if archive { Some(&mut members) } else { None };
    let target = Target::Sink(Box::new(sink.clone()), start.len() as u64);
    let written = save::write(&plan, target, &mut values, members, &Progress::default()).unwrap().commit().unwrap();
    let bytes = sink.take();
    assert_eq!(written.bytes, (bytes.len() - start.len()) as u64);
    (bytes, written)
}

type Row = (String, DType, Vec<u64>, Vec<Attribute>, Vec<u8>);

/// Everything that can be read from a file, or the first error.
#[derive(Debug, PartialEq, Eq)]
struct Whole {
    members: BTreeMap<String, Vec<u8>>,
    attributes: Vec<Attribute>,
    groups: Vec<(String, Vec<Attribute>)>,
    datasets: Vec<Row>,
}

fn read_all(bytes: &[u8], archive: bool) -> Result<Whole> {
    let source: Arc<dyn ReadAt> = Arc::new(bytes.to_vec());
    let mut members = BTreeMap::new();
    let weights = if archive {
        let found = Members::open(&*source)?;
        for m in found.iter().filter(|m| m.name != WEIGHTS) {
            members.insert(m.name.clone(), m.read(&*source)?);
        }
        Weights::open_member(&source, &found, Choice::Direct)?
    } else {
        Weights::open(source, Choice::Direct)?
    };
    let weights = Arc::new(weights);
    let index = weights.index().clone();
    let all: Vec<usize> = (0..index.datasets.len()).collect();
    let reading = weights.fetch(&all, true, 0)?;
    reading.complete(false, WAIT)?; // before anything is taken: what fails its CRC is not even looked at
    let mut datasets = Vec::new();
    for (i, d) in index.datasets.into_iter().enumerate() {
        let huge = d.storage == Storage::Empty && d.nbytes > 1 << 20; // zeros that a damaged shape claims
        let slot = if huge { None } else { reading.take(i, WAIT)? };
        let value = slot.map_or_else(Vec::new, |slot| {
            assert_eq!(slot.bytes().as_ptr() as usize % ALIGNMENT as usize, 0, "{} is not aligned", d.path);
            slot.bytes().to_vec()
        });
        datasets.push((d.path, d.dtype, d.shape, d.attributes, value));
    }
    Ok(Whole { members, attributes: index.attributes, groups: index.groups, datasets })
}

/// Fails when reading panicked, in this thread (by itself) or in the reader's.
fn no_panic<T>(result: Result<T>) -> Option<T> {
    result.map_err(|e| assert!(!e.to_string().contains("panicked"), "{e}")).ok()
}

/// What a tree should be read back as.
fn expected(tree: &Tree, values: &Values, members: bool) -> Whole {
    let mut groups: BTreeMap<Vec<Vec<u8>>, (String, Vec<Attribute>)> = BTreeMap::new();
    let key = |path: &str| path.split('/').map(|p| p.as_bytes().to_vec()).collect::<Vec<_>>();
    let paths = tree.groups().iter().map(|g| format!("{}/x", g.path));
    for path in paths.chain(tree.datasets().iter().map(|d| d.path.to_string())) {
        let mut path = &path[..];
        while let Some((head, _)) = path.rsplit_once('/') {
            groups.entry(key(head)).or_insert_with(|| (head.to_owned(), vec![]));
            path = head;
        }
    }
    for g in tree.groups() {
        groups.insert(key(&g.path), (g.path.to_string(), g.attributes.clone()));
    }
    let mut datasets: Vec<_> = tree.datasets().iter().zip(&values.0).collect();
    datasets.sort_by_key(|(d, _)| key(&d.path));
    let row = |(d, v): (&hornbeam::tree::Dataset, &Vec<u8>)| {
        (d.path.to_string(), d.dtype, d.shape.clone(), d.attributes.clone(), v.clone())
    };
    let read = |(name, content)| match content {
        Content::Bytes(bytes) => (name, bytes),
        Content::File(_) => unreachable!("members of these tests are bytes"),
    };
    Whole {
        members: json_members().unwrap().into_iter().filter(|_| members).map(read).collect(),
        attributes: tree.attributes().to_vec(),
        groups: groups.into_values().collect(),
        datasets: datasets.into_iter().map(row).collect(),
    }
}

/// Saves and reads back, in every form; checks bytes, CRC and alignment.
fn round_trip(tree: &Tree, seed: u64) {
    for (archive, patchable, start) in
        [(false, true, &b""[..]), (true, true, b""), (true, false, b""), (true, true, b"before"), (true, false, b"12")]
    {
        let values = Values::of(tree, seed);
        let wanted = expected(tree, &values, archive);
        let (bytes, written) = to_memory(tree, values, archive, patchable, start);
        assert_eq!(read_all(&bytes, archive).unwrap(), wanted, "archive: {archive}, patchable: {patchable}");
        let (offset, image) = if archive {
            let members = Members::open(&bytes).unwrap();
            let m = members.get(WEIGHTS).unwrap();
            assert_eq!(m.crc, written.crc);
            (m.offset, &bytes[m.offset as usize..(m.offset + m.size) as usize])
        } else {
            (0, &bytes[..])
        };
        assert_eq!(crc32fast::hash(image), written.crc);
        for d in Direct.index(&image.to_vec()).unwrap().datasets {
            match d.storage {
                Storage::Contiguous(at) if d.nbytes >= ALIGNMENT => assert_eq!((offset + at) % ALIGNMENT, 0),
                Storage::Contiguous(at) => assert_eq!((offset + at) % 8, 0),
                other => assert_eq!((other, d.nbytes), (Storage::Empty, 0)),
            }
        }
    }
}

fn dtypes() -> Vec<DType> {
    DType::named().chain([DType::Opaque(1), DType::Opaque(2), DType::Opaque(7), DType::Opaque(u16::MAX)]).collect()
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-d]",
        2 => "[0-9]{1,3}",
        1 => "[^/\0]{1,12}".prop_filter("not a name", |n| n != "." && n != ".."),
        1 => Just("größe-данные-层".to_owned()),
        1 => Just("n".repeat(300)),
    ]
}

fn attributes() -> impl Strategy<Value = Vec<Attribute>> {
    let bytes = || prop::collection::vec(1u8.., 0..20);
    let value = prop_oneof![
        "[^\0]{0,20}".prop_map(Value::Text),
        Just(Value::Text("long ".repeat(20_000))),
        bytes().prop_map(Value::Bytes),
        prop::collection::vec(bytes(), 0..20).prop_map(Value::List),
        (20usize..30, prop::collection::vec(bytes(), 1..20)).prop_map(|(n, all)| Value::Fixed(n, all)),
    ];
    prop::collection::btree_map("[^\0]{1,20}", value, 0..3).prop_map(|m| m.into_iter().collect())
}

fn tree() -> impl Strategy<Value = Tree> {
    let path = prop::collection::vec(name(), 1..5).prop_map(|parts| parts.join("/"));
    let shape = prop_oneof![
        Just(vec![]),
        prop::collection::vec(0u64..5, 1..5),
        prop::collection::vec(1u64..=1, 32),
        (1u64..3000).prop_map(|n| vec![n]),
    ];
    let node = (path, prop::option::weighted(0.8, (prop::sample::select(dtypes()), shape)), attributes());
    (prop::collection::vec(node, 0..40), attributes()).prop_map(|(nodes, attributes)| {
        let mut tree = Tree::new();
        tree.set_attributes(attributes).unwrap();
        for (path, dataset, attributes) in nodes {
            let mut next = tree.clone();
            let added = match dataset {
                Some((DType::Opaque(n), shape)) if n > 100 && shape.iter().product::<u64>() > 10 => {
                    next.add_dataset(&path, DType::Opaque(3), shape, attributes)
                }
                Some((dtype, shape)) => next.add_dataset(&path, dtype, shape, attributes),
                None => next.add_group(&path, attributes),
            };
            if added.is_ok() {
                tree = next; // what collides with an earlier path is simply not there
            }
        }
        tree
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(tree in tree(), seed: u64) {
        round_trip(&tree, seed);
    }

    #[test]
    fn random_damage_is_an_error_or_harmless(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let tree = small_tree();
        for archive in [true, false] {
            let (mut bytes, _) = to_memory(&tree, Values::of(&tree, 1), archive, true, b"");
            let good = read_all(&bytes, archive).unwrap();
            for (at, value) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let found = no_panic(read_all(&bytes, archive));
            if archive { // a bare image has no checksum
                prop_assert!(found.is_none_or(|f| f == good));
            }
        }
    }
}

/// Every kind of thing, in few bytes.
fn small_tree() -> Tree {
    let mut tree = Tree::new();
    let tag = |v: &str| vec![("dtype".to_owned(), v.into())];
    tree.set_attributes(vec![("model_config".into(), Value::Bytes(b"{}".to_vec()))]).unwrap();
    let names = vec![b"dense".to_vec(), b"".to_vec()];
    tree.add_group("names", vec![("a".into(), Value::List(names.clone())), ("b".into(), Value::Fixed(6, names))])
        .unwrap();
    tree.add_group("layers/dense/vars", vec![("name".into(), "größe".into())]).unwrap();
    tree.add_dataset("layers/dense/vars/0", DType::F32, [3, 7], vec![]).unwrap();
    tree.add_dataset("layers/dense/vars/1", DType::Opaque(2), [7], tag("bfloat16")).unwrap();
    tree.add_dataset("scalar", DType::I64, [], vec![]).unwrap();
    tree.add_dataset("empty", DType::C64, [0, 3], vec![]).unwrap();
    tree.add_dataset("flags", DType::Bool, [3], vec![]).unwrap();
    tree
}

#[test]
fn groups_of_any_size_are_read_back() {
    // 8 names fill a symbol node, 8 · 32 a B-tree node, 8 · 32² its second level.
    for siblings in [0, 1, 7, 8, 9, 255, 256, 257, 300, 8192, 8193] {
        let mut tree = Tree::new();
        for i in 0..siblings {
            tree.add_dataset(&format!("g/{i}"), DType::U8, [i % 3], vec![]).unwrap();
            tree.add_group(&format!("h/{i}"), vec![]).unwrap();
        }
        let values = Values::of(&tree, siblings);
        let wanted = expected(&tree, &values, false);
        let (bytes, _) = to_memory(&tree, values, false, true, b"");
        assert_eq!(read_all(&bytes, false).unwrap(), wanted, "{siblings}");
    }
    round_trip(&Tree::new(), 0);
}

/// B-trees of a few nodes with more leaves than there are atoms in the room. Without a bound this test would not end.
#[test]
fn trees_that_meet_again_are_refused() {
    let (image, _) = to_memory(&small_tree(), Values::of(&small_tree(), 1), false, true, b"");
    for (levels, empty) in [(3, false), (15, false), (15, true), (60, false)] {
        let bad = hostile::pyramid(image.clone(), hostile::GROUPS, levels, empty);
        let error = Direct.index(&bad).unwrap_err();
        assert!(matches!(error.kind(), Kind::Limit | Kind::Hdf5), "{error}");
    }
}

#[test]
fn large_tensors_cross_every_block_boundary() {
    let mut tree = Tree::new();
    let block = hornbeam::io::emit::BLOCK as u64;
    for (i, n) in [1, block - 1, block, block + 1, 63, 3 * block + 5, 5 << 20, 1].into_iter().enumerate() {
        tree.add_dataset(&format!("v/{i}"), DType::U8, [n], vec![]).unwrap();
    }
    round_trip(&tree, 3);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let tree = small_tree();
    for (archive, patchable) in [(true, true), (true, false), (false, true)] {
        let (bytes, _) = to_memory(&tree, Values::of(&tree, 1), archive, patchable, b"");
        for n in 0..bytes.len() {
            let error = read_all(&bytes[..n], archive).expect_err("a part of the file was taken for the whole");
            let text = error.to_string();
            assert!(!text.contains("panicked"), "{text}");
            assert!(matches!(error.kind(), Kind::Archive | Kind::Hdf5 | Kind::Io(_)), "{n}: {text}");
        }
        // Bytes behind an archive are nobody's: `zipfile` reads it as well.
        let mut longer = bytes.clone();
        longer.push(0);
        if archive {
            assert_eq!(read_all(&longer, true).unwrap(), read_all(&bytes, true).unwrap());
        }
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_harmless() {
    let tree = small_tree();
    for patchable in [true, false] {
        let (mut bytes, _) = to_memory(&tree, Values::of(&tree, 1), true, patchable, b"");
        let good = read_all(&bytes, true).unwrap();
        let end = Members::open(&bytes).unwrap().get(WEIGHTS).map(|m| (m.offset + m.size) as usize).unwrap();
        let start = Members::open(&bytes).unwrap().get(WEIGHTS).map(|m| m.offset as usize).unwrap();
        for at in 0..bytes.len() {
            // Every bit of the container; one of each byte of the payload, all of which the checksum covers alike.
            let bits = if (start..end).contains(&at) { at % 8..at % 8 + 1 } else { 0..8 };
            for bit in bits {
                bytes[at] ^= 1 << bit;
                // Dates, versions, modes and padding may be anything; the payload may not.
                if let Some(found) = no_panic(read_all(&bytes, true)) {
                    assert!(!(start..end).contains(&at), "bit {bit} of byte {at}");
                    assert_eq!(found, good, "bit {bit} of byte {at}");
                }
                bytes[at] ^= 1 << bit;
            }
        }
        // Without the container there is no checksum, but no panic either, and nothing outside the image is read.
        let mut image = bytes[start..end].to_vec();
        for at in 0..image.len() {
            for value in [0xff, image[at] ^ 1] {
                let old = std::mem::replace(&mut image[at], value);
                no_panic(read_all(&image, false));
                image[at] = old;
            }
        }
    }
}

#[test]
fn a_wrong_payload_byte_is_a_crc_error_that_says_where() {
    let tree = small_tree();
    let (mut bytes, written) = to_memory(&tree, Values::of(&tree, 1), true, true, b"");
    let member = Members::open(&bytes).unwrap().get(WEIGHTS).cloned().unwrap();
    bytes[(member.offset + member.size - 1) as usize] ^= 0x10;
    let error = read_all(&bytes, true).unwrap_err();
    assert!(matches!(error.kind(), Kind::Crc), "{error}");
    assert_eq!(error.expected(), Some(&format!("{:08x}", written.crc)[..]));
    assert!(error.to_string().contains("use another copy"), "{error}");
}

// ---- the container ----

/// Bytes of a deflated copy of an archive, as `zip -9` or `zipfile` with ZIP_DEFLATED would write it.
fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    let bytes = bytes.to_vec();
    let members = Members::open(&bytes).unwrap();
    for m in members.iter() {
        let data = m.read(&bytes).unwrap();
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
            let found = members.get(&format!("assets/{i}")).unwrap().read(&bytes).unwrap();
            assert_eq!(found, vec![i as u8; i % 3]);
        }
        assert_eq!(members.get(WEIGHTS).unwrap().read(&bytes).unwrap(), b"abc");
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
        assert_eq!(members.get("assets/größe/x").unwrap().read(&*source).unwrap(), "ß".as_bytes());
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

// ---- writes ----

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
    const BLOCK: u64 = emit::BLOCK as u64;
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

// ---- commit ----

#[cfg(unix)]
mod replacing {
    use std::os::unix::ffi::OsStringExt;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

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
        pending.commit(text.len() as u64).unwrap()
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
            assert_eq!(pending.commit(1).unwrap(), Some(commit::OPEN));
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
        let leave = |host: &str, hours: u64| {
            let left = root.join(format!(".m.keras.{host}7fffffff{hours:08x}.hornbeam-tmp"));
            let file = fs::File::create(&left).unwrap();
            let age = std::time::Duration::from_secs(hours * 3600);
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
            left
        };
        let other = format!("{:08x}", !u32::from_str_radix(host, 16).unwrap());
        let (dead, recent, old) = (leave(host, 1), leave(&other, 23), leave(&other, 25));
        // Somebody there who still writes does not refuse us: nobody here knows whether he lives.
        let held = fs::File::open(&recent).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        put(&path, "new", ATOMIC);
        assert_eq!((dead.exists(), recent.exists(), old.exists()), (false, true, false));
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
        again.args(["--exact", "replacing::what_permissions_refuse"]).env(HERE, root.join("in"));
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
}

// ---- the background reader ----

/// Zeros without end that note how far they were read.
#[derive(Default)]
struct Zeros {
    read: AtomicU64,
    taken: AtomicU64,
    lead: AtomicU64,
}

impl ReadAt for Zeros {
    fn len(&self) -> u64 {
        1 << 50
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let end = self.read.fetch_max(offset + buf.len() as u64, Ordering::SeqCst).max(offset + buf.len() as u64);
        self.lead.fetch_max(end.saturating_sub(self.taken.load(Ordering::SeqCst)), Ordering::SeqCst);
        Ok(())
    }
}

const MIB: u64 = 1 << 20;

fn request(source: Arc<dyn ReadAt>, len: u64, tensors: Vec<Extent>, read_ahead: u64) -> Request {
    let decode = Box::new(|_: &dyn ReadAt, _: &[usize], _: &mut [&mut [u8]]| Ok(()));
    Request { source, image: Extent { offset: 0, len }, tensors, decoded: vec![], decode, crc: None, read_ahead }
}

#[test]
fn the_reader_runs_ahead_by_no_more_than_it_may() {
    let source = Arc::new(Zeros::default());
    let tensors: Vec<_> = (0..64).map(|i| Extent { offset: i * MIB, len: MIB }).collect();
    let fetch = Fetch::start(request(source.clone(), 64 * MIB, tensors, 4 * MIB)).unwrap();
    for i in 0..64 {
        source.taken.store((i + 1) * MIB, Ordering::SeqCst); // about to be
        let slot = fetch.take(i as usize, WAIT).unwrap().unwrap();
        // Enough work that a reader without a limit would be at the end.
        assert_eq!(crc32fast::hash(&vec![0; 8 << 20]), crc32fast::hash(&vec![0; 8 << 20]));
        assert!(slot.bytes().iter().all(|&b| b == 0));
    }
    fetch.complete(WAIT).unwrap();
    let lead = source.lead.load(Ordering::SeqCst);
    assert!(lead <= 5 * MIB, "{lead} bytes ahead"); // the limit, and the tensor that reaches it
    assert!(lead >= 2 * MIB, "it never ran ahead");
}

/// Tensors to be decoded: `n` of one MiB each, filled with their number; those in `bad` fail. Notes what was decoded.
fn decoding(n: usize, bad: &'static [usize], read_ahead: u64) -> (Request, Arc<Mutex<Vec<Vec<usize>>>>) {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&batches);
    let decode = move |source: &dyn ReadAt, numbers: &[usize], out: &mut [&mut [u8]]| {
        source.read_at(&mut [0], 0)?;
        noted.lock().unwrap().push(numbers.to_vec());
        for (&i, out) in numbers.iter().zip(out) {
            if bad.contains(&i) {
                return Err(Error::new(Kind::Hdf5, "chunk is damaged"));
            }
            out.fill(i as u8);
        }
        Ok(())
    };
    let plain = vec![Extent { offset: 0, len: 10 }, Extent { offset: 10, len: 10 }];
    let decoded = vec![MIB; n];
    (Request { decoded, decode: Box::new(decode), ..request(Arc::new(vec![9u8; 20]), 20, plain, read_ahead) }, batches)
}

#[test]
fn decoded_tensors_are_read_ahead_like_others() {
    for read_ahead in [0, 3 * MIB, u64::MAX] {
        for step in [1, 7] {
            let (request, batches) = decoding(64, &[], read_ahead);
            let fetch = Fetch::start(request).unwrap();
            for i in 0..64 {
                let i = i * step % 64;
                let slot = fetch.take(i + 2, WAIT).unwrap().unwrap();
                assert!(slot.len == MIB as usize && slot.bytes().iter().all(|&b| b == i as u8));
                assert!(fetch.take(i + 2, WAIT).unwrap().is_none(), "taken twice");
            }
            assert_eq!(fetch.take(1, WAIT).unwrap().unwrap().bytes(), [9; 10]);
            fetch.complete(WAIT).unwrap();
            let batches = batches.lock().unwrap();
            let mut all = batches.concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..64), "each once");
            let most = batches.iter().map(Vec::len).max().unwrap();
            assert!(most as u64 <= (read_ahead / MIB).clamp(1, 32), "{most} at a time");
        }
    }
}

#[test]
fn complete_decodes_everything_and_drain_nothing_more() {
    let (request, batches) = decoding(100, &[], 0);
    let fetch = Fetch::start(request).unwrap();
    fetch.complete(WAIT).unwrap();
    assert_eq!(batches.lock().unwrap().concat().len(), 100);
    for i in (0..100).rev() {
        assert_eq!(fetch.take(i + 2, WAIT).unwrap().unwrap().bytes()[7], i as u8);
    }

    let (request, batches) = decoding(100, &[], 0);
    let fetch = Fetch::start(request).unwrap();
    assert!(fetch.take(50 + 2, WAIT).unwrap().is_some());
    fetch.drain(WAIT).unwrap();
    assert_eq!(*batches.lock().unwrap(), [[50]]);

    let (request, _) = decoding(100, &[99], u64::MAX);
    let error = Fetch::start(request).unwrap().complete(WAIT).unwrap_err();
    assert!(error.to_string().contains("chunk is damaged"), "{error}");
    drop(Fetch::start(decoding(1000, &[], u64::MAX).0).unwrap()); // stops
}

#[test]
fn tensors_are_taken_in_any_order_and_once() {
    let data: Vec<u8> = (0..3 * MIB).map(|i| ((i * 7) >> 3) as u8).collect();
    let edges = [0, 1, 64, 1000, MIB - 1, MIB, MIB + 70_000, 3 * MIB];
    let mut tensors: Vec<_> = edges.windows(2).map(|e| Extent { offset: e[0], len: e[1] - e[0] }).collect();
    tensors.insert(3, Extent { offset: 500, len: 0 });
    tensors.swap(0, 5);
    let crc = crc32fast::hash(&data);
    for read_ahead in [0, 1, 100_000, u64::MAX] {
        for rotate in 0..tensors.len() {
            let source: Arc<dyn ReadAt> = Arc::new(data.clone());
            let whole = Request { crc: Some(crc), ..request(source, 3 * MIB, tensors.clone(), read_ahead) };
            let fetch = Fetch::start(whole).unwrap();
            let mut order: Vec<usize> = (0..tensors.len()).rev().collect();
            order.rotate_left(rotate);
            for &i in &order {
                let Extent { offset, len } = tensors[i];
                let slot = fetch.take(i, WAIT).unwrap();
                let found = slot.as_ref().map_or(&[][..], |s| s.bytes());
                assert_eq!(found, &data[offset as usize..(offset + len) as usize]);
                assert!(fetch.take(i, WAIT).unwrap().is_none(), "taken twice");
            }
            fetch.complete(WAIT).unwrap();
        }
    }
}

#[test]
fn what_is_not_wanted_still_passes_the_checksum() {
    let data: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8).collect();
    let tensors = vec![Extent { offset: 100, len: 50 }];
    for (damage, wanted) in [(None, true), (Some(0), false), (Some(120), false), (Some(MIB - 1), false)] {
        let mut bytes = data.clone();
        damage.into_iter().for_each(|at: u64| bytes[at as usize] ^= 1);
        for drop_rest in [true, false] {
            let source: Arc<dyn ReadAt> = Arc::new(bytes.clone());
            let crc = Some(crc32fast::hash(&data));
            let fetch = Fetch::start(Request { crc, ..request(source, MIB, tensors.clone(), 0) }).unwrap();
            let done = if drop_rest { fetch.drain(WAIT) } else { fetch.complete(WAIT) };
            assert_eq!(done.is_ok(), wanted, "{damage:?}");
            if let Err(e) = done {
                assert!(matches!(e.kind(), Kind::Crc), "{e}");
                assert!(fetch.complete(WAIT).is_err(), "the second question is answered differently");
            }
            if !drop_rest {
                assert_eq!(fetch.take(0, WAIT).unwrap().unwrap().bytes().len(), 50);
            }
        }
    }
}

#[test]
fn dropping_stops_the_reader_in_the_middle_of_a_run() {
    // A terabyte that belongs to no tensor: to read it all would take minutes.
    let source = Arc::new(Zeros::default());
    let fetch = Fetch::start(Request { crc: Some(1), ..request(source.clone(), 1 << 40, vec![], u64::MAX) }).unwrap();
    while source.read.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    drop(fetch);
    assert!(source.read.load(Ordering::SeqCst) < 1 << 40);
    assert_eq!(Arc::strong_count(&source), 1, "the reader still holds its file");
}

#[test]
fn an_interrupt_ends_the_wait_and_an_error_reaches_whoever_asks() {
    struct Fails(u64);
    impl ReadAt for Fails {
        fn len(&self) -> u64 {
            1 << 30
        }

        fn read_at(&self, _: &mut [u8], offset: u64) -> Result<()> {
            if offset >= self.0 {
                Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"))
            } else {
                Ok(())
            }
        }
    }
    let tensors: Vec<_> = (0..4).map(|i| Extent { offset: i * MIB, len: MIB }).collect();
    let fetch = Fetch::start(request(Arc::new(Fails(2 * MIB)), 4 * MIB, tensors.clone(), u64::MAX)).unwrap();
    assert!(fetch.take(0, WAIT).unwrap().is_some());
    let error = fetch.take(3, WAIT).unwrap_err();
    assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
    assert!(fetch.take(2, WAIT).is_err() || fetch.complete(WAIT).is_err());
    assert!(fetch.take(1, WAIT).unwrap().is_some(), "what was read before stays");

    let stop = || Err(Error::new(Kind::Cancelled, "interrupted"));
    let fetch = Fetch::start(Request {
        crc: Some(1),
        ..request(Arc::new(Zeros::default()), 1 << 40, vec![Extent { offset: (1 << 40) - 1, len: 1 }], u64::MAX)
    });
    let error = fetch.unwrap().take(0, &stop).unwrap_err();
    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
}

/// Bytes that the reader's thread gets only when the gate is open; what others get, `for_others` says.
struct Gated<F> {
    data: Vec<u8>,
    open: Mutex<bool>,
    changed: Condvar,
    for_others: F,
}

impl<F: Fn() -> Result<()>> Gated<F> {
    fn open_gate(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl<F: Fn() -> Result<()> + Send + Sync> ReadAt for Gated<F> {
    fn len(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if std::thread::current().name() == Some("hornbeam-fetch") {
            drop(self.changed.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
        } else {
            (self.for_others)()?;
        }
        self.data[..].read_at(buf, offset)
    }
}

/// 40 MiB in tensors large and small, with gaps, read through a closed gate.
fn gated<F: Fn() -> Result<()> + Send + Sync + 'static>(for_others: F) -> (Arc<Gated<F>>, Request) {
    let data: Vec<u8> = (0..40 * MIB).map(|i| ((i * 7) >> 5) as u8).collect();
    let mut tensors = vec![Extent { offset: 5, len: 11 * MIB + 3 }, Extent { offset: 12 * MIB, len: 4 * MIB }];
    tensors.extend((0..220).map(|i| Extent { offset: 17 * MIB + i * 100_000, len: 99_000 }));
    let crc = Some(crc32fast::hash(&data));
    let source = Arc::new(Gated { data, open: Mutex::new(false), changed: Condvar::new(), for_others });
    (Arc::clone(&source), Request { crc, ..request(source, 40 * MIB, tensors, u64::MAX) })
}

/// Opens the gate at the end, also of a test that fails: the reader's thread is waited for.
struct Opened<'a, F: Fn() -> Result<()>>(&'a Gated<F>);

impl<F: Fn() -> Result<()>> Drop for Opened<'_, F> {
    fn drop(&mut self) {
        self.0.open_gate();
    }
}

/// Waits for long, but not for ever.
fn patience() -> impl Fn() -> Result<()> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    move || if std::time::Instant::now() < end { Ok(()) } else { Err(Error::new(Kind::Cancelled, "nobody helped")) }
}

#[test]
fn whoever_waits_reads_the_rest() {
    for drop_rest in [false, true] {
        let (source, request) = gated(|| Ok(()));
        let tensors = request.tensors.clone();
        let fetch = Fetch::start(request).unwrap();
        let opened = Opened(&*source);
        // The reader has one part at most, the first 4 MiB; this tensor is in the last one.
        let last = tensors.len() - 1;
        let slot = fetch.take(last, &patience()).unwrap().unwrap();
        drop(opened);
        if drop_rest { fetch.drain(WAIT) } else { fetch.complete(WAIT) }.unwrap();
        let is =
            |i: usize, bytes: &[u8]| bytes == &source.data[tensors[i].offset as usize..][..tensors[i].len as usize];
        assert!(is(last, slot.bytes()));
        for i in (0..last).filter(|_| !drop_rest) {
            assert!(is(i, fetch.take(i, WAIT).unwrap().unwrap().bytes()), "{i}");
        }
    }
}

#[test]
fn what_an_interrupted_helper_leaves_is_read_by_others() {
    let slow = AtomicBool::new(true);
    let (source, request) = gated(move || {
        let since = std::time::Instant::now();
        // Longer than a waiter waits before it asks whether to go on.
        while slow.load(Ordering::SeqCst) && since.elapsed() < 2 * hornbeam::io::fetch::POLL {
            std::thread::yield_now();
        }
        slow.store(false, Ordering::SeqCst);
        Ok(())
    });
    let tensors = request.tensors.clone();
    let fetch = Fetch::start(request).unwrap();
    let opened = Opened(&*source);
    let stop = || Err(Error::new(Kind::Cancelled, "interrupted"));
    let error = fetch.take(tensors.len() - 1, &stop).unwrap_err();
    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
    drop(opened);
    fetch.complete(WAIT).unwrap();
    for (i, &Extent { offset, len }) in tensors.iter().enumerate() {
        let slot = fetch.take(i, WAIT).unwrap().unwrap();
        assert_eq!(slot.bytes(), &source.data[offset as usize..(offset + len) as usize], "{i}");
    }
}

#[test]
fn an_error_of_a_helper_is_the_outcome() {
    for crc in [true, false] {
        let failed = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&failed);
        let (source, request) = gated(move || {
            noted.store(true, Ordering::SeqCst);
            Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"))
        });
        let fetch = Fetch::start(Request { crc: request.crc.filter(|_| crc), ..request }).unwrap();
        let opened = Opened(&*source);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| fetch.take(100, &patience()).map(|_| ()));
            while !failed.load(Ordering::SeqCst) && !waits.is_finished() {
                std::thread::yield_now();
            }
            drop(opened); // the reader has its part, and finds nothing more to do
            let error = waits.join().unwrap().unwrap_err();
            assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
            assert!(fetch.complete(WAIT).is_err());
        });
    }
}

#[test]
fn an_error_of_a_background_worker_beside_a_helping_caller_is_an_error() {
    #[derive(Default)]
    struct Source {
        step: Mutex<usize>, // 1: both read; 2: the background worker has failed
        changed: Condvar,
        hashed: AtomicBool,
    }
    impl ReadAt for Source {
        fn len(&self) -> u64 {
            16 * MIB
        }

        fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
            buf.fill(0);
            let step = self.step.lock().unwrap();
            if std::thread::current().name() == Some("hornbeam-fetch") {
                let mut step = self.changed.wait_while(step, |s| *s < 1).unwrap();
                *step = 2;
                self.changed.notify_all();
                return Err(Error::new(Kind::Io(std::io::Error::from_raw_os_error(5)), "disk"));
            }
            let mut step = step;
            if *step == 0 {
                *step = 1;
                self.changed.notify_all();
            }
            drop(self.changed.wait_while(step, |s| *s < 2).unwrap());
            // Long enough that the worker could have said that all is over.
            while !self.hashed.swap(true, Ordering::SeqCst) {
                assert_eq!(crc32fast::hash(&vec![0; 64 << 20]), crc32fast::hash(&vec![0; 64 << 20]));
            }
            Ok(())
        }
    }
    for last in [true, false] {
        let source = Arc::new(Source::default());
        let tensors = vec![Extent { offset: 0, len: 16 * MIB }];
        let fetch = Fetch::start(request(source, 16 * MIB, tensors, u64::MAX)).unwrap();
        let error = if last { fetch.take(0, WAIT).map(drop) } else { fetch.complete(WAIT) }.unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(e) if e.raw_os_error() == Some(5)), "{error}");
        assert!(fetch.complete(WAIT).is_err());
    }
}

#[test]
fn tensors_that_overlap_or_leave_the_image_are_refused() {
    let e = |offset, len| Extent { offset, len };
    let refused = [
        vec![e(0, 10), e(9, 5)],
        vec![e(0, 10), e(0, 10)],
        vec![e(50, 51)],
        vec![e(101, 1)],
        vec![e(u64::MAX, 2)],
        vec![e(1, u64::MAX)],
    ];
    for tensors in refused {
        let started = Fetch::start(request(Arc::new(vec![0; 100]), 100, tensors.clone(), 0));
        assert!(matches!(started.err().map(Error::into_kind), Some(Kind::Hdf5)), "{tensors:?}");
    }
    for tensors in [vec![e(0, 10), e(10, 90)], vec![e(100, 0)], vec![]] {
        Fetch::start(request(Arc::new(vec![0; 100]), 100, tensors, 0)).unwrap().complete(WAIT).unwrap();
    }
}

mod safetensors {
    use super::*;
    use hornbeam::image::safetensors::Safetensors;

    /// A file: the header's length, the header, the values.
    fn file(header: &str, values: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), values].concat()
    }

    fn open(bytes: Vec<u8>) -> Result<Arc<Weights>> {
        Weights::open(Arc::new(bytes), Choice::Safetensors).map(Arc::new)
    }

    /// Every dtype by turns, a scalar, nothing, names of all kinds.
    fn valid() -> Vec<u8> {
        let header = r#"{"__metadata__":{"format":"pt","b":"ß"},
            "z":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},
            "bf":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},
            "":{"dtype":"F8_E4M3","shape":[],"data_offsets":[32,33]},
            "dtype":{"data_offsets":[33,35],"shape":[2,1],"dtype":"BOOL","strides":[1]},
            "gr\u00f6\u00dfe/\ud83d\ude00":{"dtype":"C64","shape":[3,0],"data_offsets":[33,33]}}   "#;
        file(header, &(0..35).collect::<Vec<u8>>())
    }

    #[test]
    fn every_field_is_read() {
        let weights = open(valid()).unwrap();
        assert_eq!(weights.engine(), EngineKind::Safetensors);
        let index = weights.index();
        assert_eq!(index.attributes, [("b", "ß"), ("format", "pt")].map(|(k, v)| (k.to_owned(), v.into())));
        assert!(index.groups.is_empty());
        let rows: Vec<_> = index.datasets.iter().map(|d| (&*d.path, d.dtype, &d.shape[..], d.nbytes)).collect();
        assert_eq!(
            rows,
            [
                ("", DType::Opaque(1), &[][..], 1),
                ("bf", DType::Opaque(2), &[4], 8),
                ("dtype", DType::Bool, &[2, 1], 2),
                ("größe/😀", DType::C64, &[3, 0], 0),
                ("z", DType::F32, &[2, 3], 24),
            ]
        );
        assert_eq!(index.datasets[1].attributes, [("dtype".to_owned(), "bfloat16".into())]);
        let reading = weights.fetch(&[4, 0, 1, 2, 3], true, 1 << 20).unwrap();
        for (i, wanted) in [(4, 8..32), (0, 32..33), (1, 0..8), (2, 33..35), (3, 0..0)] {
            let wanted: Vec<u8> = wanted.collect();
            let len = wanted.len() as u64;
            assert_eq!(reading.take(i, WAIT).unwrap().unwrap().bytes(), wanted);
            assert_eq!(weights.read_part(i, 0, len, WAIT).unwrap().bytes(), wanted);
            assert_eq!(weights.read_part(i, len / 2, len, WAIT).unwrap().bytes(), &wanted[len as usize / 2..]);
            assert!(weights.read_part(i, 0, len + 1, WAIT).is_err());
            assert_eq!(weights.offset(i), None, "memory is no file");
        }
    }

    #[test]
    fn what_is_written_is_read_and_aligned() {
        let metadata = vec![("format".to_owned(), "keras".into()), ("b".to_owned(), "ß\"\n".into())];
        let tag = |name: &str| vec![("dtype".to_owned(), name.into())];
        let mut tree = Tree::flat();
        tree.add_group("__metadata__", metadata.clone()).unwrap();
        for (name, dtype, shape, attributes) in [
            ("odd", DType::U8, vec![3], vec![]),
            ("a/b", DType::F32, vec![16, 4], tag("float32")),
            ("a", DType::F64, vec![], vec![]),
            ("größe/😀\u{1}", DType::Opaque(2), vec![5, 7], tag("bfloat16")),
            ("", DType::Opaque(1), vec![4], tag("float8_e5m2")),
            ("nothing", DType::C64, vec![0, 3], vec![]),
            ("big", DType::I8, vec![700_032], vec![]),
            ("flag", DType::Bool, vec![1], vec![]),
        ] {
            tree.add_dataset(name, dtype, shape, attributes).unwrap();
        }
        let mut values = Values::of(&tree, 7);
        let plan = Plan::new(tree, &Safetensors).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let target = Target::Path(path.clone(), ATOMIC);
        let written = save::write(&plan, target, &mut values, None, &Progress::default()).unwrap().commit().unwrap();
        assert_eq!(Some(written.bytes), plan.weights_end(false));
        let bytes = fs::read(&path).unwrap();
        assert_eq!(crc32fast::hash(&bytes), written.crc);
        let weights = Weights::open(load::open(&path).unwrap(), Choice::Safetensors).map(Arc::new).unwrap();
        let index = weights.index();
        let mut sorted = metadata;
        sorted.sort();
        assert_eq!(index.attributes, sorted);
        assert_eq!(index.datasets.len(), plan.tree().datasets().len());
        for (i, found) in index.datasets.iter().enumerate() {
            let at = plan.tree().datasets().iter().position(|d| *d.path == *found.path).unwrap();
            let wanted = &plan.tree().datasets()[at];
            assert_eq!((found.dtype, &found.shape), (wanted.dtype, &wanted.shape));
            assert_eq!(weights.read_part(i, 0, found.nbytes, WAIT).unwrap().bytes(), values.0[at]);
            if let Some(offset) = weights.offset(i) {
                let unit = if found.nbytes % ALIGNMENT == 0 { ALIGNMENT } else { found.dtype.size() as u64 };
                assert_eq!(offset % unit, 0, "{}", found.path);
            }
        }
    }

    #[test]
    fn what_the_format_lacks_is_not_written() {
        let refused = |path: &str, dtype, tag: &[Attribute], group: Option<&str>| {
            let mut tree = Tree::flat();
            if let Some(group) = group {
                tree.add_group(group, vec![]).unwrap();
            }
            tree.add_dataset(path, dtype, [1], tag.to_vec()).unwrap();
            Plan::new(tree, &Safetensors).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(refused("a", DType::F32, &[], None), "");
        assert!(refused("a", DType::C128, &[], None).contains("no such dtype: expected another, found complex128"));
        assert!(refused("a", DType::Opaque(2), &[], None).contains("found V2"));
        assert!(refused("__metadata__", DType::F32, &[], None).contains("cannot have this name"));
        assert!(refused("a", DType::F32, &[], Some("g")).contains("no groups"));
        let long = "n".repeat(16_000);
        let mut tree = Tree::flat();
        for i in 0..6_300 {
            tree.add_dataset(&format!("{long}{i}"), DType::U8, [0], vec![]).unwrap();
        }
        let error = Plan::new(tree, &Safetensors).err().unwrap().to_string();
        assert!(error.contains("do not fit into the header") && error.contains("Save in shards"), "{error}");
    }

    fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    #[test]
    fn what_is_malformed_says_so() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            file(&format!(r#"{{"a":{}}}"#, tensor(dtype, shape, offsets)), &[0; 8])
        };
        let two = |a: &str, b: &str| {
            let header = format!(r#"{{"a":{},"b":{}}}"#, tensor("U8", "[4]", a), tensor("U8", "[4]", b));
            file(&header, &[0; 8])
        };
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(2000), "]".repeat(2000));
        let long = tensor("U8", &format!("[{}]", vec!["1"; 65].join(",")), "[0,8]");
        let mut not_utf8 = file("{\"x\": 0}", b"");
        not_utf8[10] = 0xff;
        assert!(open(one("U8", "[8]", "[0,8]")).is_ok());
        assert!(open(two("[4,8]", "[0,4]")).is_ok());
        for (bytes, wanted) in [
            (vec![], "too short"),
            (vec![1; 7], "too short"),
            (vec![0xff; 64], "header of the safetensors file is too large"),
            (file("", b"")[..].to_vec(), "no JSON object"),
            (file("{}", b"")[..9].to_vec(), "truncated: expected 10 bytes, found 9 bytes"),
            (file(" {}", b""), "no JSON object"),
            (file("[]", b""), "no JSON object"),
            (not_utf8, "not UTF-8"),
            (file("{\"a\"", b""), "malformed JSON at byte 4"),
            (file("{}", b"x"), "left over"),
            (file(r#"{"a":1}"#, b""), "a tensor is no object"),
            (file(r#"{"a":{}}"#, b""), "lacks its dtype"),
            (file(r#"{"__metadata__":{"a":1}}"#, b""), "no object of strings"),
            (file(r#"{"__metadata__":{"a":"b","a":"b"}}"#, b""), "a name comes twice"),
            (file(r#"{"__metadata__":{"a":"b"},"__metadata__":{"c":"d"}}"#, b""), "a name comes twice"),
            (file(r#"{"\ud800":1}"#, b""), "not Unicode"),
            (file(&format!(r#"{{"a":{0},"a":{0}}}"#, tensor("U8", "[0]", "[0,0]")), b""), "a name comes twice"),
            (file(r#"{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, b""), "duplicate"),
            (file(&deep, b""), "nested too deeply"),
            (file(&format!(r#"{{"a":{long}}}"#), &[0; 8]), "too many dimensions: expected at most 64"),
            (file(&format!("{{\"a\":[{}]}}", vec!["{}"; 1001].join(",")), b""), "too long: expected at most 64"),
            (one("F4", "[16]", "[0,8]"), "a dtype that cannot be read"),
            (one("U8", "[7]", "[0,8]"), "does not match its data_offsets: expected 7 bytes, found 8 (entry 'a')"),
            (one("U8", "[-8]", "[0,8]"), "lacks its dtype"),
            (one("U8", "[8.0]", "[0,8]"), "lacks its dtype"),
            (one("U8", "[8]", "[8,0]"), "end before they begin"),
            (one("U8", "[8]", "[0]"), "not two"),
            (one("U8", "[7]", "[1,8]"), "a hole between them"),
            (one("U8", "[9]", "[0,9]"), "truncated"),
            (one("F64", "[2305843009213693952]", "[0,8]"), "overflows"),
            (one("U8", "[18446744073709551615]", "[0,18446744073709551615]"), "truncated"),
            (one("U8", "[18446744073709551616]", "[0,8]"), "lacks its dtype"),
            (two("[0,4]", "[0,4]"), "overlap"),
            (two("[0,4]", "[3,7]"), "overlap"),
            (two("[0,4]", "[5,9]"), "a hole between them"),
        ] {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
            let error = open(bytes).err().unwrap_or_else(|| panic!("{text} was read"));
            assert!(error.to_string().contains(wanted), "{text}: {error}");
            assert!(matches!(error.kind(), Kind::Hdf5 | Kind::Limit | Kind::Unsupported | Kind::Json(_)), "{error:?}");
        }
    }

    fn read(bytes: Vec<u8>) {
        let Some(weights) = no_panic(open(bytes)) else { return };
        let datasets = &weights.index().datasets;
        let reading = weights.fetch(&(0..datasets.len()).collect::<Vec<_>>(), true, 1 << 20).unwrap();
        for (i, d) in datasets.iter().enumerate() {
            assert_eq!(d.dtype.nbytes(&d.shape), Some(d.nbytes));
            let part = weights.read_part(i, 0, d.nbytes, WAIT).unwrap();
            assert_eq!(part.bytes(), reading.take(i, WAIT).unwrap().unwrap().bytes());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), len in 0_u64..220) {
            read(bytes.clone());
            read([&len.to_le_bytes()[..], b"{", &bytes].concat());
        }

        #[test]
        fn random_headers_never_panic(header in r#"(\{|\}|\[|\]|,|:|"(a|b|dtype|shape|data_offsets|__metadata__|U8|F4)"|[0-9]){0,40}"#) {
            read(file(&format!("{{{header}"), &[0; 9]));
        }

        #[test]
        fn damage_never_panics(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let mut bytes = valid();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            read(bytes);
        }

        #[test]
        fn damaged_numbers_never_panic(at in any::<prop::sample::Index>(), digits in "[0-9]{1,20}") {
            let bytes = valid();
            let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut header = std::str::from_utf8(&bytes[8..8 + size]).unwrap().to_owned();
            let places: Vec<usize> = header.match_indices(|c: char| c.is_ascii_digit()).map(|m| m.0).collect();
            let at = places[at.index(places.len())];
            header.replace_range(at..=at, &digits);
            read(file(&header, &bytes[8 + size..]));
        }
    }

    #[test]
    fn a_part_of_a_file_is_read_where_it_is() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let tree = small_tree();
        let (bytes, _) = to_memory(&tree, Values::of(&tree, 3), true, true, b"");
        file.write_all(&bytes).unwrap();
        let source = load::open(file.path()).unwrap();
        let members = Members::open(&*source).unwrap();
        let weights = Arc::new(Weights::open_member(&source, &members, Choice::Direct).unwrap());
        for (i, d) in weights.index().datasets.iter().enumerate() {
            let whole = weights.read_part(i, 0, d.nbytes, WAIT).unwrap();
            match weights.offset(i) {
                Some(at) => assert_eq!(whole.bytes(), &bytes[at as usize..][..d.nbytes as usize]),
                None => assert_eq!(d.nbytes, 0),
            }
            let error = weights.read_part(i, 1, 0, WAIT).unwrap_err().to_string();
            assert!(error.contains(&d.path), "{error}");
        }
    }
}
