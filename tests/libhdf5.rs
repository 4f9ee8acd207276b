//! The libhdf5 engine: what it lays out it finds again, and hostile images end in an error.
#![cfg(feature = "libhdf5")]

use std::sync::atomic::{AtomicUsize, Ordering};

use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
use hornbeam::h5::libhdf5::LibHdf5;
use hornbeam::h5::{ALIGNMENT, Engine, Index, Layout, Storage};
use hornbeam::io::ReadAt;
use hornbeam::tree::{Attribute, Tree};

fn named(name: &str) -> Vec<Attribute> {
    vec![("name".into(), name.into())]
}

/// Every dtype, scalars, empty tensors, empty groups, names that are not ASCII, more links than a compact group holds.
fn rich() -> Tree {
    let mut tree = Tree::new();
    tree.add_group("_layer_checkpoint_dependencies", vec![]).unwrap();
    tree.add_group("layers/dense", named("dense")).unwrap();
    tree.add_group("layers/dense/vars", vec![]).unwrap();
    tree.add_group("leer", vec![("a".into(), String::new()), ("ü".into(), "größe".into())]).unwrap();
    for (i, dtype) in DType::named().chain([DType::Opaque(1), DType::Opaque(2)]).enumerate() {
        tree.add_dataset(&format!("types/{i:02}_{}", dtype.name()), dtype, [3, 5], vec![]).unwrap();
    }
    tree.add_dataset("scalar", DType::F32, [], vec![]).unwrap();
    tree.add_dataset("empty", DType::I64, [4, 0], named("nothing")).unwrap();
    tree.add_dataset("layers/dense/vars/0", DType::F32, [64, 33], vec![]).unwrap();
    tree.add_dataset("layers/dense/vars/1", DType::Opaque(2), [33], vec![("dtype".into(), "bfloat16".into())]).unwrap();
    for i in 0..30 {
        tree.add_dataset(&format!("schichten/größe_{i}/vars/0"), DType::F64, [i + 1], vec![]).unwrap();
    }
    tree
}

/// The image that a layout describes, its payload a pattern of the dataset's number.
fn fill(tree: &Tree, layout: &Layout) -> Vec<u8> {
    let mut image = vec![0; layout.len as usize];
    for (at, bytes) in &layout.metadata {
        image[*at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    for (i, (offset, dataset)) in layout.offsets.iter().zip(tree.datasets()).enumerate() {
        assert_eq!(offset.is_none(), dataset.nbytes == 0);
        let Some(offset) = *offset else { continue };
        assert!(dataset.nbytes < ALIGNMENT || offset.is_multiple_of(ALIGNMENT), "{} at {offset}", dataset.path);
        let slot = &mut image[offset as usize..][..dataset.nbytes as usize];
        assert!(slot.iter().all(|&b| b == 0), "{} overlaps something", dataset.path);
        slot.fill(i as u8 | 128);
    }
    image
}

fn check_index(tree: &Tree, layout: &Layout, index: &Index) {
    assert_eq!(index.datasets.len(), tree.datasets().len());
    for (offset, dataset) in layout.offsets.iter().zip(tree.datasets()) {
        let found = index.datasets.iter().find(|f| f.path == *dataset.path).expect(&dataset.path);
        assert_eq!((found.dtype, &found.shape, found.nbytes), (dataset.dtype, &dataset.shape, dataset.nbytes));
        assert_eq!(found.attributes, dataset.attributes);
        assert_eq!(found.storage, offset.map_or(Storage::Empty, Storage::Contiguous), "{}", found.path);
    }
    for group in tree.groups() {
        let found = index.groups.iter().find(|(path, _)| *path == *group.path).expect(&group.path);
        assert_eq!(found.1, group.attributes);
    }
}

/// An image that is not in memory.
struct File(Vec<u8>);

impl ReadAt for File {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
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
        let error = LibHdf5.index(&Flaky(image.clone(), n.into(), true)).unwrap_err();
        assert!(matches!(error.kind(), Kind::Io(_)) && error.to_string().contains("panic"), "{n}: {error}");
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
        assert!(matches!(error.kind(), Kind::Hdf5 | Kind::Io(_)), "{len}: {error}");
    }
    LibHdf5.index(&image).unwrap();
}

/// Changed bytes give an index or an error. (libhdf5 is not memory-safe: a crash here is to be looked at, not ignored.)
#[test]
fn mutated_images_do_not_panic() {
    let tree = rich();
    let layout = LibHdf5.lay_out(&tree).unwrap();
    let image = fill(&tree, &layout);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let rounds = std::env::var("HORNBEAM_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(300);
    for _ in 0..rounds {
        let mut bad = image.clone();
        for _ in 0..=random(4) {
            let (at, bytes) = &layout.metadata[random(layout.metadata.len())];
            bad[*at as usize + random(bytes.len())] = [0, 1, 255, random(256) as u8][random(4)];
        }
        let Ok(index) = LibHdf5.index(&bad) else { continue };
        for found in index.datasets.iter().filter(|f| f.nbytes < 1 << 20) {
            let mut out = vec![0; found.nbytes as usize];
            let _ = LibHdf5.read(&bad, &[&found.path], &mut [&mut out]);
        }
    }
}
