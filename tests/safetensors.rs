//! Files of safetensors: what is written is read, and what is malformed is refused.

mod common;

use std::fs;
use std::sync::Arc;

use common::*;
use hornbeam::dtype::DType;
use hornbeam::error::{Kind, Result};
use hornbeam::image::safetensors::Safetensors;
use hornbeam::image::{ALIGNMENT, EngineKind};
use hornbeam::io::emit::Progress;
use hornbeam::load::{self, Choice, Weights};
use hornbeam::save::{self, Plan, Target};
use hornbeam::tree::{Attribute, Tree};
use proptest::prelude::*;

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
        assert!(matches!(error.kind(), Kind::Image | Kind::Limit | Kind::Unsupported | Kind::Json(_)), "{error:?}");
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
