//! No size that a caller chooses wraps or writes what cannot be read back: trees and archives at and beyond every limit.
//!
//! What is accepted is laid out, and found again as it was; the rest is refused. Tensors are never written: only their
//! places matter, so they may be as large as numbers go.

use std::collections::BTreeMap;

use hornbeam::archive::read::Members;
use hornbeam::archive::write::{Archive, Content};
use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::safetensors::Safetensors;
use hornbeam::image::{Engine, EngineKind, Layout, Storage};
use hornbeam::io::ReadAt;
use hornbeam::io::emit::Progress;
use hornbeam::limits::*;
use hornbeam::save::{self, Plan, Target};
use hornbeam::tree::{Attribute, Tree, Value};
use proptest::prelude::*;

/// A file of which only the metadata is there.
struct Sparse(Layout);

impl ReadAt for Sparse {
    fn len(&self) -> u64 {
        self.0.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        for (at, bytes) in &self.0.metadata {
            let (from, to) = (offset.max(*at), (offset + buf.len() as u64).min(at + bytes.len() as u64));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
}

fn engines() -> Vec<Box<dyn Engine>> {
    vec![
        Box::new(Direct),
        Box::new(Safetensors),
        #[cfg(feature = "libhdf5")]
        Box::new(hornbeam::image::hdf5::libhdf5::LibHdf5),
    ]
}

/// One request to write something.
#[derive(Clone, Debug)]
enum Entry {
    Group(String, Vec<Attribute>),
    Dataset(String, DType, Vec<u64>, Vec<Attribute>),
}

fn refused(error: &Error) {
    assert!(matches!(error.kind(), Kind::Invalid), "{error}");
}

/// Adds what the tree takes; lays it out with every engine, and finds it again. Returns how many entries it took, and
/// how many engines laid them out.
fn write(entries: &[Entry]) -> (usize, usize) {
    let mut laid_out = 0;
    let mut taken = 0;
    for engine in engines() {
        let flat = engine.kind() == EngineKind::Safetensors;
        let mut tree = if flat { Tree::flat() } else { Tree::new() };
        taken = 0;
        for entry in entries {
            let added = match entry {
                Entry::Group(path, attributes) if path.is_empty() => tree.set_attributes(attributes.clone()),
                Entry::Group(path, attributes) => tree.add_group(path, attributes.clone()),
                Entry::Dataset(path, dtype, shape, attributes) => {
                    tree.add_dataset(path, *dtype, shape.clone(), attributes.clone())
                }
            };
            match added {
                Ok(()) => taken += 1,
                Err(e) => refused(&e),
            }
        }
        let plan = Plan::new(tree.clone(), &*engine).map(|p| (p.weights_end(false), p.weights_end(true)));
        let layout = match engine.lay_out(&tree) {
            Ok(layout) => layout,
            Err(e) => {
                // The library says in its own words what it cannot hold.
                assert!(matches!(e.kind(), Kind::Invalid | Kind::Image | Kind::Unsupported), "{}: {e}", engine.kind());
                assert!(plan.is_err());
                continue;
            }
        };
        laid_out += 1;
        let (end, archive) = plan.unwrap();
        assert!(end == Some(layout.len) && archive > end);
        let offsets = layout.offsets.clone();
        let found = engine.index(&Sparse(layout)).unwrap_or_else(|e| panic!("{}: {e}", engine.kind()));
        let by_path: BTreeMap<&str, _> = found.datasets.iter().map(|d| (d.path.as_str(), d)).collect();
        assert_eq!(by_path.len(), tree.datasets().len());
        let sorted = |attributes: &[Attribute]| {
            let mut all = attributes.to_vec();
            all.sort();
            all
        };
        for (i, wanted) in tree.datasets().iter().enumerate() {
            let dataset = by_path[&*wanted.path];
            assert_eq!((dataset.dtype, &dataset.shape, dataset.nbytes), (wanted.dtype, &wanted.shape, wanted.nbytes));
            match offsets[i] {
                Some(at) => assert_eq!(dataset.storage, Storage::Contiguous(at)),
                None => assert_eq!(dataset.storage, Storage::Empty),
            }
            if !flat {
                assert_eq!(sorted(&dataset.attributes), sorted(&wanted.attributes));
            }
        }
        if !flat {
            assert_eq!(sorted(&found.attributes), sorted(tree.attributes()));
            let by_path: BTreeMap<&str, _> = found.groups.iter().map(|(path, a)| (path.as_str(), a)).collect();
            for group in tree.groups() {
                assert_eq!(sorted(by_path[&*group.path]), sorted(&group.attributes));
            }
        }
    }
    (taken, laid_out)
}

/// A number near a limit, or small.
fn near(limit: usize) -> impl Strategy<Value = usize> {
    prop_oneof![0..4usize, limit.saturating_sub(9)..limit + 10]
}

fn name_of(bytes: usize) -> String {
    "n".repeat(bytes)
}

fn value() -> impl Strategy<Value = Value> {
    let rows = || {
        prop_oneof![
            near(MAX_ATTRIBUTE_BYTES / 16),
            3950..4100usize, // where name and value together reach the limit
        ]
    };
    prop_oneof![
        (0..70_000usize).prop_map(|n| Value::Text("x".repeat(n))),
        near(1 << 16).prop_map(|n| Value::Bytes(vec![b'x'; n])),
        rows().prop_map(|n| Value::List(vec![b"ab".to_vec(); n])),
        (near(40), rows()).prop_map(|(length, n)| Value::Fixed(length, vec![vec![b'a'; length.min(3)]; n])),
        Just(Value::Fixed(usize::MAX, vec![b"a".to_vec(); 2])),
    ]
}

fn attributes() -> impl Strategy<Value = Vec<Attribute>> {
    let name = prop_oneof![1..8usize, 900..MAX_ATTRIBUTE_NAME_BYTES + 3].prop_map(name_of);
    let many = near(1000).prop_map(|n| (0..n).map(|i| (i.to_string(), "x".into())).collect());
    prop_oneof![4 => prop::collection::vec((name, value()), 0..3), 1 => many]
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-c]{1,2}(/[a-c]){0,2}",
        near(MAX_DEPTH).prop_map(|depth| vec!["d"; depth].join("/")),
        near(MAX_PATH_BYTES).prop_map(name_of),
        // Many names of one group, and one that is only a prefix of another.
        (1..70usize, 1..3usize).prop_map(|(n, length)| format!("many/{}", "m".repeat(n * length))),
    ]
}

fn shape() -> impl Strategy<Value = Vec<u64>> {
    let large = (0..64u32, 0..3u64).prop_map(|(bits, less)| (1u64 << bits).wrapping_sub(less));
    prop_oneof![
        prop::collection::vec(large, 0..4),
        near(MAX_RANK).prop_map(|rank| vec![1; rank]),
        Just(vec![0, u64::MAX]),
        Just(vec![u64::MAX, 0]),
        Just(vec![1 << 59]),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let dtype = prop::sample::select(DType::named().collect::<Vec<_>>());
    prop_oneof![
        1 => (prop_oneof![Just(String::new()), path()], attributes()).prop_map(|(p, a)| Entry::Group(p, a)),
        3 => (path(), dtype, shape(), attributes()).prop_map(|(p, d, s, a)| Entry::Dataset(p, d, s, a)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_a_tree_takes_is_found_again(entries in prop::collection::vec(entry(), 1..8)) {
        write(&entries);
    }

    #[test]
    fn what_an_archive_takes_is_found_again(
        names in prop::collection::vec(member_name(), 0..6),
        base in prop_oneof![Just(0u64), 0..100u64],
    ) {
        let mut bytes = vec![0u8; 8 << 20];
        let mut sink = &mut bytes[..];
        let mut archive = Archive::new(0, &sink);
        let payload = archive.open_weights(base, &mut sink).unwrap();
        archive.close_weights(crc32fast::hash(&vec![0; base as usize]), &mut sink).unwrap();
        assert!(payload > 0);
        let mut taken = vec![hornbeam::archive::WEIGHTS.to_owned()];
        for (i, name) in names.iter().enumerate() {
            match archive.add(name, &Content::Bytes(vec![i as u8; i]), &mut sink) {
                Ok(()) => taken.push(name.clone()),
                Err(e) => refused(&e),
            }
        }
        let end = archive.finish(&mut sink).unwrap() as usize;
        let file = bytes[..end].to_vec();
        let members = Members::open(&file).unwrap();
        assert_eq!(members.iter().map(|m| m.name.clone()).collect::<Vec<_>>(), taken);
        for member in members.iter() {
            member.read(&file, &|| Ok(())).unwrap();
        }
    }
}

fn member_name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ab]{1,2}(/[ab]){0,1}",
        near(usize::from(u16::MAX)).prop_map(name_of),
        near(usize::from(u16::MAX)).prop_map(|n| "ß".repeat(n / 2)),
        prop::sample::select(vec![
            "..",
            "../a",
            "a/../b",
            "/a",
            "a//b",
            "a\\b",
            "C:/a",
            "./a",
            "a/",
            "",
            "a\0b",
            "model.weights.h5",
            "größe",
            "a b",
            "a..b",
        ])
        .prop_map(str::to_owned),
    ]
}

#[test]
fn tensors_that_are_too_large_together_are_refused() {
    let half = |name: &str| Entry::Dataset(name.into(), DType::U8, vec![1 << 59], vec![]);
    let many: Vec<_> = (0..40).map(|i| half(&i.to_string())).collect();
    let (taken, laid_out) = write(&many);
    assert_eq!(taken, 2); // 2^60 bytes
    assert!(laid_out >= 2);
    let mut tree = Tree::new();
    tree.add_dataset("a", DType::U8, [1 << 60], vec![]).unwrap();
    let plan = Plan::new(tree, &Direct).unwrap();
    for base in [MAX_IMAGE_BYTES + 1, u64::MAX] {
        let target = Target::Sink(Box::new(Vec::leak(Vec::new())), base);
        let tensors: &mut dyn hornbeam::io::emit::Tensors = &mut Nothing;
        refused(&save::write(&plan, target, tensors, None, &Progress::default()).unwrap_err());
    }
}

struct Nothing;

impl hornbeam::io::emit::Tensors for Nothing {
    fn tensor(&mut self, _: usize) -> Result<&[u8]> {
        Ok(&[])
    }
}

#[test]
fn name_and_value_of_an_attribute_fit_one_message() {
    for name in [900, 960, MAX_ATTRIBUTE_NAME_BYTES] {
        for rows in 3900..=MAX_ATTRIBUTE_BYTES / 16 {
            let attribute = (name_of(name), Value::List(vec![b"ab".to_vec(); rows]));
            let mut tree = Tree::new();
            let taken = tree.add_group("g", vec![attribute.clone()]);
            let size = attribute.1.strings().len() * 16 + (name + 1).next_multiple_of(8) + 56;
            assert_eq!(taken.is_ok(), size <= MAX_MESSAGE_BYTES, "{name} {rows}");
            if rows % 16 == 0 {
                write(&[Entry::Group("g".into(), vec![attribute])]);
            }
        }
    }
}

#[test]
fn attributes_that_no_reader_takes_together_are_refused() {
    let large = || Value::Text("x".repeat((MAX_HEADER_BYTES / 4) as usize));
    let entries: Vec<_> = (0..5).map(|i| Entry::Group(format!("g{i}"), vec![("a".into(), large())])).collect();
    assert_eq!(write(&entries).0, 3);
    let mut tree = Tree::new();
    let mut add = |i: usize| tree.add_dataset(&format!("d{i}"), DType::F32, [1], vec![("a".into(), large())]).is_ok();
    assert_eq!((0..5).map(&mut add).collect::<Vec<_>>(), [true, true, true, false, false]);
}
