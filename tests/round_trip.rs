//! A save and a load of whole files: what is written is read, and damage is an error or harmless.
//!
//! One rule runs through these tests: whatever was done to a file, reading it gives an error or the bytes that were written.

mod common;
mod hostile;

use common::{Values, dtypes, expected, no_panic, read_all, small_tree, to_memory};
use hornbeam::archive::WEIGHTS;
use hornbeam::archive::read::Members;
use hornbeam::dtype::DType;
use hornbeam::error::Kind;
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::{ALIGNMENT, Engine, Storage};
use hornbeam::tree::{Attribute, Tree, Value};
use proptest::prelude::*;

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
        assert!(matches!(error.kind(), Kind::Limit | Kind::Image), "{error}");
    }
}

#[test]
fn large_tensors_cross_every_block_boundary() {
    let mut tree = Tree::new();
    let block = hornbeam::io::emit::WRITE_BYTES as u64;
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
            assert!(matches!(error.kind(), Kind::Archive | Kind::Image | Kind::Io(_)), "{n}: {error}");
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
