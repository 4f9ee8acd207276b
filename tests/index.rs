//! What the readers make of images that are put together by hand: names, links, shared objects, types.
#![allow(missing_docs)]

mod hostile;

use std::sync::Arc;

use hornbeam::dtype::DType;
use hornbeam::error::{Error, Kind, Result};
#[cfg(feature = "libhdf5")]
use hornbeam::image::hdf5::libhdf5::LibHdf5;
use hornbeam::image::safetensors::Safetensors;
use hornbeam::image::{Engine, Index, Storage, hdf5::direct::Direct};
use hornbeam::load::{Choice, Weights};
use hostile::{Image, attribute, flagged, message};

fn engines() -> Vec<Box<dyn Engine>> {
    vec![
        Box::new(Direct),
        #[cfg(feature = "libhdf5")]
        Box::new(LibHdf5),
    ]
}

fn choices() -> Vec<Choice> {
    vec![
        Choice::Direct,
        #[cfg(feature = "libhdf5")]
        Choice::LibHdf5,
    ]
}

/// A heap of names, and where they are.
fn heap(names: &[&str]) -> (Vec<u8>, Vec<u64>) {
    let mut heap = vec![0; 8];
    let places = names.iter().map(|name| {
        let at = heap.len() as u64;
        heap.extend(name.bytes());
        heap.resize((heap.len() + 1).next_multiple_of(8), 0);
        at
    });
    let places = places.collect();
    (heap, places)
}

/// An image whose root has these members.
fn root(mut image: Image, members: &[(&str, u64)]) -> Vec<u8> {
    let names: Vec<&str> = members.iter().map(|m| m.0).collect();
    let (heap, places) = heap(&names);
    let entries: Vec<_> = places.into_iter().zip(members.iter().map(|m| m.1)).collect();
    let root = image.group(1, &heap, &entries);
    image.finish(root)
}

fn paths(index: &Index) -> Vec<&str> {
    index.datasets.iter().map(|d| &*d.path).collect()
}

fn refused(result: Result<Index>, words: &str) {
    let error: Error = result.unwrap_err();
    assert!(matches!(error.kind(), Kind::Image | Kind::Limit) && error.to_string().contains(words), "{error}");
}

/// Every reader of such a file finds another one, or not all.
#[test]
fn names_of_a_group_ascend() {
    for engine in engines() {
        for (names, words) in [
            (&["a", "b", "c"][..], None),
            (&["a", "a"], Some("twice")),
            (&["a", "b", "b"], Some("twice")),
            (&["b", "a"], Some("not in order")),
            (&["a", "c", "b", "d"], Some("not in order")),
            (&["a", "a/b"], Some("component")),
            (&["."], Some("component")),
            (&[".."], Some("component")),
        ] {
            let mut image = Image::new();
            let object = image.dataset(names.len() as u32, &[]);
            let members: Vec<_> = names.iter().map(|name| (*name, object)).collect();
            let index = engine.index(&root(image, &members));
            match words {
                None => assert_eq!(paths(&index.unwrap()), names),
                Some(words) => refused(index, words),
            }
        }
    }
}

/// Names of links that are messages of a header come in any order, and no two are the same.
#[test]
fn names_in_a_header_come_in_any_order() {
    for engine in engines() {
        for (names, words) in [("ab", None), ("ba", None), ("aba", Some("twice"))] {
            let mut image = Image::new();
            let object = image.dataset(2, &[]);
            let link = |name: u8| message(6, &[&[1, 0, 1, name][..], &object.to_le_bytes()].concat());
            let mut messages = vec![message(2, &[&[0; 2][..], &[0xff; 16]].concat())];
            messages.extend(names.bytes().map(link));
            let root = image.object(1, &messages);
            let index = engine.index(&image.finish(root));
            match words {
                None => assert_eq!(paths(&index.unwrap()), ["a", "b"]),
                Some(words) => refused(index, words),
            }
        }
    }
}

/// Two names of a dataset or a group: both are listed, and their bytes are read, whether the file counts its links or not.
#[test]
fn what_has_two_names_is_listed_under_both() {
    for counted in [true, false] {
        let mut image = Image::new();
        let links = if counted { 2 } else { 1 };
        let (names, places) = heap(&["x", "y"]);
        let note = attribute("note", &[0x13, 1, 0, 0, 2, 0, 0, 0], 1, b"hi");
        let object = image.dataset(links, &[note]);
        let other = image.dataset(1, &[]);
        let inner = image.group(links, &names, &[(places[0], object), (places[1], other)]);
        let bytes = root(image, &[("a", inner), ("b", object), ("c", inner)]);
        let mut seen = Vec::new();
        for engine in engines() {
            let index = engine.index(&bytes).unwrap();
            assert_eq!(paths(&index), ["a/x", "a/y", "b", "c/x", "c/y"], "{}", engine.kind());
            assert_eq!(index.groups.iter().map(|g| &*g.0).collect::<Vec<_>>(), ["a", "c"]);
            let notes: Vec<usize> = index.datasets.iter().map(|d| d.attributes.len()).collect();
            assert_eq!((notes, index.shared), (vec![1, 0, 1, 1, 0], true));
            seen.push(index);
        }
        assert!(seen.iter().all(|index| *index == seen[0]), "both engines say the same");
        for choice in choices() {
            let weights = Arc::new(Weights::open(Arc::new(bytes.clone()), choice).unwrap());
            for wanted in [vec![0, 1, 2, 3, 4], vec![4, 3], vec![2], vec![3, 0]] {
                let reading = weights.fetch(&wanted, true, 1 << 20).unwrap();
                for &i in &wanted {
                    assert_eq!(reading.take(i, &|| Ok(())).unwrap().expect("the first time").bytes(), b"1234");
                }
                reading.complete(false, &|| Ok(())).unwrap();
            }
        }
    }
}

#[test]
fn a_group_in_itself_is_refused() {
    for depth in [0, 1, 5] {
        let mut image = Image::new();
        let (names, places) = heap(&["g"]);
        let start = image.group(2, &names, &[(places[0], 0x1111_2222_3333_4444)]);
        let mut last = start;
        for _ in 0..depth {
            last = image.group(1, &names, &[(places[0], last)]);
        }
        let mut bytes = root(image, &[("top", last)]);
        let at = bytes.windows(8).position(|w| w == 0x1111_2222_3333_4444u64.to_le_bytes()).unwrap();
        bytes[at..at + 8].copy_from_slice(&last.to_le_bytes());
        for engine in engines() {
            refused(engine.index(&bytes), "contains itself");
        }
    }
}

/// The address of everything counts from behind a user block; the superblock may know of it or not.
#[test]
fn a_user_block_comes_before_everything() {
    let mut image = Image::new();
    let object = image.dataset(1, &[]);
    let plain = root(image, &[("x", object)]);
    for block in [512, 1024, 2048, 65_536] {
        for base in [0, block as u64] {
            let mut bytes = vec![b'#'; block];
            bytes.extend(&plain);
            bytes[block + 24..block + 32].copy_from_slice(&base.to_le_bytes());
            let end = base + plain.len() as u64;
            bytes[block + 40..block + 48].copy_from_slice(&end.to_le_bytes());
            for choice in choices() {
                let weights = Arc::new(Weights::open(Arc::new(bytes.clone()), choice).unwrap());
                let part = weights.read_part(0, 1, 4, &|| Ok(())).unwrap();
                assert_eq!((paths(weights.index()), part.bytes()), (vec!["x"], &b"234"[..]), "{choice:?}");
                let reading = weights.fetch(&[0], true, 0).unwrap();
                assert_eq!(reading.take(0, &|| Ok(())).unwrap().unwrap().bytes(), b"1234");
            }
            for engine in engines() {
                let error = engine.index(&bytes[..bytes.len() - 1].to_vec()).unwrap_err();
                assert!(matches!(error.kind(), Kind::Image), "{error}");
            }
        }
    }
    for (bytes, words) in [(vec![0; 5000], "not an HDF5 file"), (vec![], "not an HDF5 file")] {
        for engine in engines() {
            refused(engine.index(&bytes), words);
        }
    }
    let mut odd = vec![0; 700];
    odd.extend(&plain);
    refused(Direct.index(&odd), "not an HDF5 file");
}

fn single(messages: &[Vec<u8>]) -> Vec<u8> {
    let mut image = Image::new();
    let object = image.dataset(1, messages);
    root(image, &[("x", object)])
}

/// What the direct engine would have to guess it leaves to the other one.
#[test]
fn what_is_stored_elsewhere_is_left_to_the_other_engine() {
    let shared = |kind: u16| flagged(kind, 2, &[3, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
    for (what, messages) in [
        ("a dataspace", shared(1)),
        ("a type", shared(3)),
        ("a fill value", shared(5)),
        ("a layout", shared(8)),
        ("filters", shared(11)),
        ("an attribute", shared(12)),
        ("an unknown message that must be understood", flagged(0x40, 0x80, &[0; 8])),
        ("an attribute's dataspace", message(12, &[&[3, 2, 2, 0, 8, 0, 8, 0, 0][..], b"n\0", &[0; 16]].concat())),
        ("an attribute's type", message(12, &[&[3, 1, 2, 0, 8, 0, 8, 0, 0][..], b"n\0", &[0; 16]].concat())),
    ] {
        let error = Direct.index(&single(&[messages])).unwrap_err();
        assert!(matches!(error.kind(), Kind::Unsupported), "{what}: {error}");
    }
    for (what, messages) in
        [("an unknown message", flagged(0x40, 0, &[0; 8])), ("a comment", flagged(13, 0x80, b"hi\0"))]
    {
        assert_eq!(paths(&Direct.index(&single(&[messages])).unwrap()), ["x"], "{what}");
    }
}

/// Of two messages every reader would take another one.
#[test]
fn a_dataset_has_one_shape_type_and_layout() {
    for (kind, data) in [(1, vec![1, 0, 0, 0, 0, 0, 0, 0]), (3, vec![0x10, 0, 0, 0, 8, 0, 0, 0, 0, 0, 64, 0])] {
        refused(Direct.index(&single(&[message(kind, &data)])), "two shapes");
    }
    refused(Direct.index(&single(&[message(8, &[&[3, 1][..], &[0; 16]].concat())])), "two shapes");
}

/// What holds no numbers is listed, with its attributes; it is refused when it is asked for, and everything else is read.
#[test]
fn what_is_no_number_is_listed_and_refused_when_asked_for() {
    let float =
        |flags: [u8; 3]| [&[0x11][..], &flags, &[4, 0, 0, 0], &[0, 0, 32, 0, 23, 8, 0, 23, 127, 0, 0, 0]].concat();
    let mut image = Image::new();
    let object = image.typed(1, &float([0x20, 31, 0]), &[]);
    let found = Direct.index(&root(image, &[("x", object)])).unwrap().datasets.remove(0);
    assert_eq!((found.dtype, found.nbytes), (DType::F32, 4), "a float as all are");
    // The sign elsewhere, which the HDF5 library calls damaged.
    let mut image = Image::new();
    let object = image.typed(1, &float([0x20, 30, 0]), &[]);
    let found = Direct.index(&root(image, &[("x", object)])).unwrap().datasets.remove(0);
    assert!(matches!(found.storage, Storage::Unreadable(_)), "{found:?}");
    for (kind, words) in [
        (float([0x00, 31, 0]), "floats"), // the first bit of the mantissa is not implied
        (vec![0x10, 0, 0, 0, 4, 0, 0, 0, 3, 0, 29, 0], "integers"),
        (vec![0x13, 0, 0, 0, 4, 0, 0, 0], "strings"),
        (vec![0x14, 0, 0, 0, 4, 0, 0, 0, 0, 0, 32, 0], "bit fields"),
        (vec![0x17, 0, 0, 0, 8, 0, 0, 0], "references"),
    ] {
        let mut image = Image::new();
        let (number, other) = (image.dataset(1, &[]), image.typed(1, &kind, &[]));
        let bytes = root(image, &[("n", number), ("x", other)]);
        for choice in choices() {
            let weights = Arc::new(Weights::open(Arc::new(bytes.clone()), choice).unwrap());
            assert_eq!(paths(weights.index()), ["n", "x"]);
            let found = &weights.index().datasets[1];
            assert!(matches!(&found.storage, Storage::Unreadable(why) if why.contains(words)), "{:?}", found.storage);
            let reading = weights.fetch(&[0, 1], true, 0).unwrap();
            assert_eq!(reading.take(0, &|| Ok(())).unwrap().unwrap().bytes(), b"1234");
            for error in [
                reading.take(1, &|| Ok(())).map(|_| ()).unwrap_err(),
                weights.read_part(1, 0, 8, &|| Ok(())).map(|_| ()).unwrap_err(),
            ] {
                assert!(matches!(error.kind(), Kind::Unsupported) && error.to_string().contains(words), "{error}");
                assert_eq!(error.entry(), Some("x"));
            }
        }
    }
}

fn safetensors(header: &str, values: usize) -> Result<Index> {
    Safetensors.index(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; values]].concat())
}

/// As the reference reader: metadata may be null, and there is no limit on dimensions but that of a list.
#[test]
fn safetensors_are_read_as_the_reference_reads_them() {
    let one = r#""x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    assert_eq!(safetensors(&format!(r#"{{"__metadata__":null,{one}}}"#), 2).unwrap().attributes, []);
    assert_eq!(paths(&safetensors(&format!("{{{one},\"__metadata__\":null}}"), 2).unwrap()), ["x"]);
    for bad in ["1", "[]", "\"a\"", "{\"a\":1}", "{\"a\":null}", "false"] {
        let error = safetensors(&format!(r#"{{"__metadata__":{bad},{one}}}"#), 2).unwrap_err();
        assert!(error.to_string().contains("__metadata__"), "{error}");
    }
    for (rank, fine) in [(0, true), (33, true), (64, true), (65, false)] {
        let shape = vec!["1"; rank].join(",");
        let index = safetensors(&format!(r#"{{"x":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,1]}}}}"#), 1);
        match index {
            Ok(index) => assert_eq!((index.datasets[0].shape.len(), fine), (rank, true)),
            Err(error) => {
                assert!(!fine && matches!(error.kind(), Kind::Limit), "{error}");
                let text = error.to_string();
                assert!(text.contains("dimensions") && text.contains("64") && text.contains("65"), "{text}");
            }
        }
    }
}
