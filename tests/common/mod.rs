//! What several tests of the core share: trees, their values, sinks, whole saves and whole loads.
#![allow(dead_code)] // each test that includes this uses some of it

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hornbeam::archive::WEIGHTS;
use hornbeam::archive::read::Members;
use hornbeam::archive::write::Content;
use hornbeam::commit;
use hornbeam::dtype::DType;
use hornbeam::error::{Kind, Result};
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::image::{ALIGNMENT, Layout, Storage};
use hornbeam::io::ReadAt;
use hornbeam::io::emit::{Progress, Sink, Tensors};
use hornbeam::io::fetch::Interrupt;
use hornbeam::load::{Choice, Weights};
use hornbeam::save::{self, Plan, Target, Written};
use hornbeam::tree::{Attribute, Tree, Value};

pub(crate) const ATOMIC: commit::Options = commit::Options { atomic: true, durable: false, queued: false };
pub(crate) const QUEUED: commit::Options = commit::Options { atomic: true, durable: false, queued: true };
pub(crate) const OVER: commit::Options = commit::Options { atomic: false, durable: false, queued: false };

/// Never interrupts a wait.
pub(crate) const WAIT: Interrupt<'_> = &|| Ok(());

/// Tensors that are in memory.
pub(crate) struct Values(pub(crate) Vec<Vec<u8>>);

impl Tensors for Values {
    fn tensor(&mut self, i: usize) -> Result<&[u8]> {
        Ok(&self.0[i])
    }
}

impl Values {
    /// Different bytes for every tensor and position.
    pub(crate) fn of(tree: &Tree, seed: u64) -> Self {
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
pub(crate) struct Grow {
    bytes: Arc<Mutex<Vec<u8>>>,
    patchable: bool,
}

impl Grow {
    pub(crate) fn new(start: &[u8], patchable: bool) -> Self {
        Self { bytes: Arc::new(Mutex::new(start.to_vec())), patchable }
    }

    pub(crate) fn take(self) -> Vec<u8> {
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
pub(crate) fn json_members() -> Result<Vec<(String, Content)>> {
    let text = |t: &str| Content::Bytes(t.as_bytes().to_vec());
    let members = [("metadata.json", text("{}")), ("config.json", text("{\"a\": 1}")), ("assets/größe/x", text("ß"))];
    Ok(members.map(|(name, content)| (name.to_owned(), content)).into())
}

/// The whole of a save to memory: the file's bytes, and what the save says of them.
pub(crate) fn to_memory(
    tree: &Tree,
    values: Values,
    archive: bool,
    patchable: bool,
    start: &[u8],
) -> (Vec<u8>, Written) {
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

pub(crate) type Row = (String, DType, Vec<u64>, Vec<Attribute>, Vec<u8>);

/// Everything that can be read from a file, or the first error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) members: BTreeMap<String, Vec<u8>>,
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) groups: Vec<(String, Vec<Attribute>)>,
    pub(crate) datasets: Vec<Row>,
}

pub(crate) fn read_all(bytes: &[u8], archive: bool) -> Result<Whole> {
    let source: Arc<dyn ReadAt> = Arc::new(bytes.to_vec());
    let mut members = BTreeMap::new();
    let weights = if archive {
        let found = Members::open(&*source)?;
        for m in found.iter().filter(|m| m.name != WEIGHTS) {
            members.insert(m.name.clone(), m.read(&*source, WAIT)?);
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

/// Fails when reading panicked, in this thread (by itself) or in the reader's, or broke an invariant.
pub(crate) fn no_panic<T>(result: Result<T>) -> Option<T> {
    result.map_err(|e| assert!(!matches!(e.kind(), Kind::Internal), "{e}")).ok()
}

/// What a tree should be read back as.
pub(crate) fn expected(tree: &Tree, values: &Values, members: bool) -> Whole {
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

pub(crate) fn dtypes() -> Vec<DType> {
    DType::named().chain([DType::Opaque(1), DType::Opaque(2), DType::Opaque(7), DType::Opaque(u16::MAX)]).collect()
}

/// Every kind of thing, in few bytes.
pub(crate) fn small_tree() -> Tree {
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

pub(crate) fn named(name: &str) -> Vec<Attribute> {
    vec![("name".into(), name.into())]
}

/// Every dtype, scalars, empty tensors, empty groups, names that are not ASCII, more links than a compact group holds.
pub(crate) fn rich() -> Tree {
    let mut tree = Tree::new();
    tree.add_group("_layer_checkpoint_dependencies", vec![]).unwrap();
    tree.add_group("layers/dense", named("dense")).unwrap();
    tree.set_attributes(named("root")).unwrap();
    tree.add_group("layers/dense/vars", vec![]).unwrap();
    tree.add_group("leer", vec![("a".into(), "".into()), ("ü".into(), "größe".into())]).unwrap();
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
pub(crate) fn fill(tree: &Tree, layout: &Layout) -> Vec<u8> {
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

/// An image that is not in memory.
pub(crate) struct File(pub(crate) Vec<u8>);

impl ReadAt for File {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
}
