//! The libhdf5 engine: what it lays out it finds again, and hostile images end in an error.
#![cfg(feature = "libhdf5")]

mod common;
mod hostile;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::hdf5::libhdf5::LibHdf5;
use hornbeam::image::{Engine, Index, Layout, Storage};
use hornbeam::io::ReadAt;
use hornbeam::tree::{Attribute, Tree, Value};

/// Every kind of attribute.
fn strings() -> Vec<Attribute> {
    let names: Vec<_> = ["conv", "", "größe", "a longer name"].map(|s| s.as_bytes().to_vec()).into();
    let many: Vec<_> = (0..4000).map(|i| format!("layer_{i}").into_bytes()).collect();
    vec![
        ("bytes".into(), Value::Bytes(b"tensorflow".to_vec())),
        ("fixed".into(), Value::Fixed(20, names.clone())),
        ("fixed, empty".into(), Value::Fixed(1, vec![vec![]])),
        ("list".into(), Value::List(names)),
        ("list, empty".into(), Value::List(vec![])),
        ("list, long".into(), Value::List(many.clone())),
        ("list, long, too".into(), Value::Fixed(16, many)),
        ("text".into(), Value::Text("x".repeat(200_000))),
    ]
}

fn check_index(tree: &Tree, layout: &Layout, index: &Index) {
    assert_eq!(index.datasets.len(), tree.datasets().len());
    for (offset, dataset) in layout.offsets.iter().zip(tree.datasets()) {
        let found = index.datasets.iter().find(|f| f.path == *dataset.path).expect(&dataset.path);
        assert_eq!((found.dtype, &found.shape, found.nbytes), (dataset.dtype, &dataset.shape, dataset.nbytes));
        assert_eq!(found.attributes, dataset.attributes);
        assert_eq!(found.storage, offset.map_or(Storage::Empty, Storage::Contiguous), "{}", found.path);
    }
    assert_eq!(index.attributes, tree.attributes());
    for group in tree.groups() {
        let found = index.groups.iter().find(|(path, _)| *path == *group.path).expect(&group.path);
        // The library moves long ones to the end.
        let (mut found, mut wanted) = (found.1.clone(), group.attributes.clone());
        found.sort();
        wanted.sort();
        assert_eq!(found, wanted);
    }
}

/// With the attributes of each group in the order of their names.
fn by_name(mut index: Index) -> Index {
    index.groups.iter_mut().for_each(|(_, attributes)| attributes.sort());
    index.attributes.sort();
    index
}

#[test]
fn what_is_laid_out_is_found_again() {
    let tree = rich();
    let layout = LibHdf5.lay_out(&tree).unwrap();
    assert!(layout.metadata.is_sorted_by(|a, b| a.0 + a.1.len() as u64 <= b.0), "runs are ascending and disjoint");
    let image = fill(&tree, &layout);
    assert_eq!(image[8], 0, "superblock version");
    assert_eq!(image[24..32], [0; 8], "base address");
    assert_eq!(image[40..48], layout.len.to_le_bytes(), "end of file");
    let index = LibHdf5.index(&image).unwrap();
    check_index(&tree, &layout, &index);
    assert_eq!(LibHdf5.index(&File(image)).unwrap(), index);

    let names: Vec<_> = index.groups.iter().filter(|g| !g.0.contains('/')).map(|g| &g.0[..]).collect();
    assert_eq!(names, ["_layer_checkpoint_dependencies", "layers", "leer", "schichten", "types"]);
    let layers: Vec<_> = index.groups.iter().map(|g| &g.0[..]).filter(|g| g.starts_with("layers")).collect();
    assert_eq!(layers, ["layers", "layers/dense", "layers/dense/vars"], "parents first");
    assert!(index.datasets.windows(2).all(|w| w[0].path.split('/').lt(w[1].path.split('/'))));
}

#[test]
fn an_empty_tree_has_an_image() {
    let layout = LibHdf5.lay_out(&Tree::new()).unwrap();
    assert_eq!(LibHdf5.index(&fill(&Tree::new(), &layout)).unwrap(), Index::default());
}

#[test]
fn large_trees_take_memory_for_metadata_only() {
    let mut tree = Tree::new();
    for i in 0..2500 {
        tree.add_dataset(&format!("layers/l{}/vars/{}", i / 4, i % 4), DType::F32, [1 << 14, 1 << 12], vec![]).unwrap();
    }
    let layout = LibHdf5.lay_out(&tree).unwrap();
    let metadata: usize = layout.metadata.iter().map(|m| m.1.len()).sum();
    assert!(layout.len > 600 << 30 && metadata < 8 << 20, "{} bytes, {metadata} of metadata", layout.len);
}

#[test]
fn threads_share_the_library() {
    let tree = rich();
    let image = fill(&tree, &LibHdf5.lay_out(&tree).unwrap());
    let want = LibHdf5.index(&image).unwrap();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(LibHdf5.index(&image).unwrap(), want);
                    LibHdf5.lay_out(&tree).unwrap();
                }
            });
        }
    });
}

#[test]
fn contiguous_datasets_can_be_read_too() {
    let tree = rich();
    let image = File(fill(&tree, &LibHdf5.lay_out(&tree).unwrap()));
    let (mut a, mut b) = (vec![0; 64 * 33 * 4], vec![0; 4]);
    LibHdf5.read(&image, &["layers/dense/vars/0", "scalar"], &mut [&mut a, &mut b]).unwrap();
    let number = |path: &str| tree.datasets().iter().position(|d| *d.path == *path).unwrap() as u8 | 128;
    assert!(a.iter().all(|&v| v == number("layers/dense/vars/0")));
    assert_eq!(b, [number("scalar"); 4]);
    for bad in ["layers", "nowhere", "scalar/0", "", "."] {
        LibHdf5.read(&image, &[bad], &mut [&mut [0; 4]]).unwrap_err();
    }
    assert!(matches!(LibHdf5.read(&image, &["scalar"], &mut [&mut [0; 5]]).unwrap_err().kind(), Kind::Invalid));
}

/// Fails, or panics, at the n-th read.
struct Flaky(Vec<u8>, AtomicUsize, bool);

impl ReadAt for Flaky {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.1.fetch_sub(1, Ordering::Relaxed) == 0 {
            assert!(!self.2, "as asked");
            return Err(Error::new(Kind::Io(std::io::Error::other("unplugged")), "cannot read"));
        }
        self.0.read_at(buf, offset)
    }
}

#[test]
fn errors_and_panics_of_the_source_come_back() {
    let tree = rich();
    let image = fill(&tree, &LibHdf5.lay_out(&tree).unwrap());
    for n in 0..20 {
        let error = LibHdf5.index(&Flaky(image.clone(), n.into(), false)).unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(_)) && error.to_string().contains("unplugged"), "{n}: {error}");
        // The first read, for the signature, is not the library's: no C code has to be unwound.
        let error = LibHdf5.index(&Flaky(image.clone(), (n + 1).into(), true)).unwrap_err();
        assert!(matches!(error.kind(), Kind::Internal), "{n}: {error}");
    }
    LibHdf5.index(&image).unwrap();
}

#[test]
fn truncated_images_are_refused() {
    let mut tree = Tree::new();
    tree.add_dataset("a/b", DType::F32, [100], vec![]).unwrap();
    let image = fill(&tree, &LibHdf5.lay_out(&tree).unwrap());
    for len in (0..image.len()).step_by(7) {
        let error = LibHdf5.index(&image[..len].to_vec()).unwrap_err();
        assert!(matches!(error.kind(), Kind::Image | Kind::Io(_)), "{len}: {error}");
    }
    LibHdf5.index(&image).unwrap();
}

#[test]
fn attributes_of_every_kind_cross_the_engines() {
    let mut tree = Tree::new();
    tree.set_attributes(strings()).unwrap();
    tree.add_group("strings", strings()).unwrap();
    tree.add_dataset("d", DType::F32, [2], strings()[..4].to_vec()).unwrap();
    for writer in [&Direct as &dyn Engine, &LibHdf5] {
        let layout = writer.lay_out(&tree).unwrap();
        let image = fill(&tree, &layout);
        for reader in [&Direct as &dyn Engine, &LibHdf5] {
            check_index(&tree, &layout, &by_name(reader.index(&image).unwrap()));
        }
    }
}

#[test]
fn a_long_string_that_is_named_many_times_is_refused() {
    let long = vec![b'x'; 300 << 10];
    let mut tree = Tree::new();
    let row = [vec![long], vec![b"short".to_vec(); 4000]].concat();
    tree.add_group("g", vec![("names".into(), Value::List(row))]).unwrap();
    let layout = Direct.lay_out(&tree).unwrap();
    let mut image = fill(&tree, &layout);
    assert!(LibHdf5.index(&image).is_ok(), "each is counted, not the whole file for each");
    // Every reference becomes the first one: 1.2 GB of strings in a file of 0.4 MB.
    let at = image.windows(4).position(|w| w == (300u32 << 10).to_le_bytes()).unwrap();
    let first: [u8; 16] = image[at..at + 16].try_into().unwrap();
    image[at..at + 16 * 4001].chunks_mut(16).for_each(|reference| reference.copy_from_slice(&first));
    for engine in [&Direct as &dyn Engine, &LibHdf5] {
        let error = engine.index(&image).unwrap_err();
        assert!(matches!(error.kind(), Kind::Limit), "{}: {error}", engine.kind());
    }
}

#[test]
fn attributes_that_no_header_holds_are_refused() {
    let row = |n: usize| vec![b"0123456789abcdef".to_vec(); n];
    for value in [
        Value::List(row(4033)),
        Value::Fixed(16, row(4033)),
        Value::Fixed(1, vec![]),
        Value::Fixed(15, row(1)),
        Value::Bytes(vec![0]),
    ] {
        let error = Tree::new().add_group("g", vec![("a".into(), value)]).unwrap_err();
        assert!(matches!(error.kind(), Kind::Invalid));
    }
    let twice = vec![("a".into(), "1".into()), ("a".into(), "2".into())];
    assert!(Tree::new().set_attributes(twice).is_err());
}
